"""A network's frozen config out of a recipe; the parts of a network that torch.compile takes."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from orrery.errors import InputError
from orrery.nn.compiling import compiler_problem
from orrery.nn.dit import Block
from orrery.nn.vae import Decoder, Encoder

REGIONS = (Block, Encoder, Decoder)
SHAPES = 64  # versions of one function that torch.compile may keep: a VAE has blocks of many widths


def configure(presets: Mapping[str, Any], preset: str, override: Mapping[str, Any], what: str) -> Any:
    """A preset's config with some fields replaced (lists become tuples).

    Args:
        presets: the network's presets by name. override: field -> value. what: the recipe's table, for messages.

    Raises:
        InputError: unknown preset or field, or a value that the config refuses.
    """
    if preset not in presets:
        raise InputError(f"{what}.preset = {preset!r}; allowed: {', '.join(presets)}")
    config = presets[preset]
    known = [field.name for field in fields(config)]
    for key, value in override.items():
        if key not in known:
            raise InputError(f"{what}.override: unknown key {key} = {value!r}; allowed: {', '.join(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in override.items()}
    try:
        return replace(config, **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}.override: {error}") from None


def compiles(wanted: bool, device: torch.device) -> bool:
    """Whether a run that wants its steps compiled can have it on this machine."""
    return wanted and not compiler_problem(device)


def compile_regions(network: nn.Module) -> None:
    """Let torch.compile have the blocks of transformers and the halves of VAEs, in place, for the shapes they meet.

    The blocks of a transformer share one compiled version a shape: the first step takes seconds and not minutes.
    """
    torch._dynamo.config.recompile_limit = SHAPES
    for module in network.modules():
        if isinstance(module, REGIONS):
            module.compile(dynamic=False)
