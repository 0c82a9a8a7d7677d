"""Weights on disk: the catalogue of models, strict loading, atomic saving.

A model is one folder:

    config.json               every option of its three networks, how to sample it, what it was trained on
    transformer.safetensors   the DiT, in the key layout of the published checkpoints
    vae.safetensors           the VAE
    text.safetensors          the text encoder
    tokenizer.json            its tokenizer
    README.md                 the model card

What loads and saves is imported on first use, so that the catalogue can be asked without waiting for torch.
"""

from typing import TYPE_CHECKING, Any

from orrery.weights.catalogue import CATALOGUE, ModelEntry, find_model

if TYPE_CHECKING:
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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'orrery.weights' has no attribute {name!r}")
    from orrery.weights import store

    return getattr(store, name)
