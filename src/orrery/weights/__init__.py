"""Models on disk: the catalogue, the formats, strict loading, atomic saving.

A model folder of ours:

    config.json               every option of its three networks, how to sample it, what it was trained on
    transformer.safetensors   the DiT, in the key layout of the published checkpoints
    vae.safetensors           the VAE
    text.safetensors          the text encoder
    tokenizer.json            its tokenizer
    control-KIND.safetensors  a control branch beside the DiT, of those that config.json lists
    preview.safetensors       a tiny decoder of the VAE's latents, for watching; where there is one
    README.md                 the model card

VAE and text encoder may be shared instead (`components`): those of the published models, or of one in the package.

`find_model` finds a model (a name, a folder, an official .pt, a diffusers directory, a hub repository); `load_model`
and `load_part` read it; `convert` writes it in another format. All but the catalogue is imported on first use, so that
it can be asked without waiting for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from orrery.weights.catalogue import ASPECTS, CATALOGUE, SIZES, ModelEntry, find_entry, size_of

if TYPE_CHECKING:
    from orrery.weights.config import ActionConfig, ModelConfig, Sampling
    from orrery.weights.conversion import convert
    from orrery.weights.lora import Lora, merge, read_lora
    from orrery.weights.parts import ModelFiles
    from orrery.weights.preview import load_preview
    from orrery.weights.sources import find_model
    from orrery.weights.store import (
        Model,
        load_model,
        load_part,
        model_hash,
        part_hash,
        save_control,
        save_model,
        save_transformer,
    )

_HOMES = {
    "ActionConfig": "config",
    "ModelConfig": "config",
    "Sampling": "config",
    "convert": "conversion",
    "Lora": "lora",
    "merge": "lora",
    "read_lora": "lora",
    "ModelFiles": "parts",
    "load_preview": "preview",
    "find_model": "sources",
    "Model": "store",
    "load_model": "store",
    "load_part": "store",
    "model_hash": "store",
    "part_hash": "store",
    "save_control": "store",
    "save_model": "store",
    "save_transformer": "store",
}
__all__ = [
    "ASPECTS",
    "CATALOGUE",
    "SIZES",
    "ActionConfig",
    "Lora",
    "Model",
    "ModelConfig",
    "ModelEntry",
    "ModelFiles",
    "Sampling",
    "convert",
    "find_entry",
    "find_model",
    "load_model",
    "load_part",
    "load_preview",
    "merge",
    "model_hash",
    "part_hash",
    "read_lora",
    "save_control",
    "save_model",
    "save_transformer",
    "size_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orrery.weights' has no attribute {name!r}")
    return getattr(import_module(f"orrery.weights.{_HOMES[name]}"), name)
