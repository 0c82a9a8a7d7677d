"""Weights on disk: the catalogue of models, strict loading, atomic saving.

A model is one folder:

    config.json               every option of its three networks, how to sample it, what it was trained on
    transformer.safetensors   the DiT, in the key layout of the published checkpoints
    vae.safetensors           the VAE
    text.safetensors          the text encoder
    tokenizer.json            its tokenizer
    README.md                 the model card
"""

from orrery.weights.catalogue import CATALOGUE, ModelEntry, find_model
from orrery.weights.store import Model, ModelConfig, Sampling, load_model, model_hash, save_model

__all__ = [
    "CATALOGUE",
    "Model",
    "ModelConfig",
    "ModelEntry",
    "Sampling",
    "find_model",
    "load_model",
    "model_hash",
    "save_model",
]
