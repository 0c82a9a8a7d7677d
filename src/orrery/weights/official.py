"""Official checkpoints: what their keys say about the networks, and writing them. Specification, section 2.1; of the
control branches, specification of Transfer, section 1.5."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from orrery.errors import InputError, note
from orrery.nn.control import ControlConfig
from orrery.nn.dit import DiTConfig
from orrery.weights.config import ActionConfig
from orrery.weights.layouts import CONTROL_KEYS, OFFICIAL_EXTRA, official_buffers, official_prefix
from orrery.weights.lora import split_adapters

# Parameters that only a variant has, and what it is called.
VARIANTS = (
    (re.compile(r"^control_(blocks_\d+|embedder\.\d+)\."), "a file of several control branches"),
    (re.compile(r"(^|\.)(view_embeddings|cross_view_attn|adaln_view_embedder)\."), "a multi-view model"),
    (re.compile(r"^input_hint_block\."), "a multi-view model"),
    (re.compile(r"(^|\.)cam_encoder\."), "a camera-conditioned model"),
)
T = TypeVar("T")
ACTION_KEY = "action_embedder_B_D.fc1.weight"
FLATTENED = 84  # values of the variant that is told the 12 actions of its clip in every frame; its keys are the same
_WINDOW = ("window", "given", "handover", "empty_prompt")
COUNTERS = re.compile(r"^accum_\w+$")


def official_weights(tensors: Mapping[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of an official file under our names, and the LoRA adapters that a fine-tune's file holds beside them.

    Prefixes are taken off (of a training file, the averaged weights count); counters and tables are left out.
    """
    prefix = official_prefix(tensors.keys())
    if prefix == "net_ema." and any(key.startswith("net.") for key in tensors):
        note(f"{where} holds trained and averaged weights: the averaged ones are taken, as the official code does")
    weights = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return split_adapters({key: value for key, value in weights.items() if not OFFICIAL_EXTRA.match(key)})


def split_branch(weights: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """The base's weights, and those of the control branch that the same file holds, by our names."""
    branch = {key: value for key, value in weights.items() if CONTROL_KEYS.match(key)}
    return {key: value for key, value in weights.items() if key not in branch}, branch


def counters(tensors: Mapping[str, Tensor]) -> dict[str, int | float]:
    """How much an official file says that it was trained: its `accum_*` values."""
    prefix = official_prefix(tensors.keys())
    return {
        key.removeprefix(prefix): value.item()
        for key, value in tensors.items()
        if COUNTERS.match(key.removeprefix(prefix)) and value.numel() == 1
    }


def official_table(weights: Mapping[str, Tensor], config: DiTConfig, counts: Mapping[str, Any]) -> dict[str, Tensor]:
    """An official file of our weights: `net.` before every name, the rotary tables and the counters beside them."""
    table = dict(weights) | official_buffers(config)
    for key, value in counts.items():
        if COUNTERS.match(key):
            table[key] = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float32)
    return {f"net.{key}": value for key, value in table.items()}


def is_diffusers(keys: Any) -> bool:
    """Whether these are diffusers' names of a transformer."""
    return any(key.startswith("transformer_blocks.") for key in keys)


def check_variant(keys: Any, where: str) -> None:
    """Refuse, by what it is, a network that is not the base transformer."""
    for pattern, what in VARIANTS:
        if found := next((key for key in keys if pattern.search(key)), None):
            raise InputError(f"{where} is {what}, which is not supported yet (it holds {found})")


def infer_transformer(shapes: Mapping[str, tuple[int, ...]], like: DiTConfig, where: str) -> DiTConfig:
    """The config that a file's shapes speak of; what they do not say (rotary ratios, conventions) is taken from `like`.

    shapes: by our names.

    Raises:
        InputError: a variant that is not supported, or no transformer of this family.
    """
    check_variant(shapes, where)
    try:
        width, patched = shapes["x_embedder.proj.1.weight"]
        rank = shapes.get("blocks.0.adaln_modulation_mlp.2.weight", (0, 0))[1]
        (head,) = shapes["blocks.0.self_attn.q_norm.weight"]
        context = shapes["blocks.0.cross_attn.k_proj.weight"][1]
        hidden = shapes["blocks.0.mlp.layer1.weight"][0]
        out = shapes["final_layer.linear.weight"][0]
        _, actions = shapes.get(ACTION_KEY, (0, 0))
    except (KeyError, ValueError) as error:
        raise InputError(f"{where} holds no transformer of this family: it lacks {error}") from None
    text, image = shapes.get("crossattn_proj.0.weight"), shapes.get("img_context_proj.0.weight")
    volume = math.prod(like.patch)
    latent, channels = out // volume, patched // volume
    if channels - latent not in (1, 2):
        raise InputError(
            f"{where}: its patch embedding takes {channels} channels; a base model takes {latent + 1} or {latent + 2}"
        )
    depth = 1 + max(int(match[1]) for key in shapes if (match := re.match(r"blocks\.(\d+)\.", key)))
    return DiTConfig(
        latent_channels=latent,
        width=width,
        depth=depth,
        heads=width // head,
        mlp_ratio=hidden / width,
        adaln_rank=rank or None,
        patch=like.patch,
        text_dim=text[1] if text else like.text_dim,
        context_dim=context,
        text_projection=text is not None,
        max_size=like.max_size,
        rope_ratios=like.rope_ratios,
        rope_bf16=like.rope_bf16,
        rope_fps_modulation=like.rope_fps_modulation,
        timestep_scale=like.timestep_scale,
        padding_mask=channels - latent == 2,
        fp32_modulation=like.fp32_modulation,
        image_context=image[1] if image else 0,
        actions=actions,
    )


def infer_actions(
    values: int, factor: int, frames: int, like: Mapping[str, Any], stated: bool, where: str
) -> ActionConfig | None:
    """What is known of the actions of a model whose file takes `values` numbers of them a latent frame; None for 0. No
    file says what its numbers are; a line says what was assumed.

    factor: frames that a latent frame covers. frames: the model's native length. like: fields of the `ActionConfig` of
    the published model that it is sampled like, {} for none. stated: the user or the file's name says which that is.

    Raises:
        InputError: no whole number of actions; or they may be those of a whole chunk, flattened.
    """
    if not values:
        return None
    if stated and len(like.get("names", ())) * factor == values:
        return ActionConfig(**like)
    if values % factor:
        raise InputError(
            f"{where} takes {values} numbers of actions at once; allowed is a multiple of {factor}: a latent frame "
            f"covers {factor} frames, and each has an action"
        )
    count = values // factor
    if values == FLATTENED and not stated:
        raise InputError(
            f"{where} takes {values} numbers of actions at once: either 12 actions of 7, told to all frames alike (a "
            f"variant that is not supported), or {factor} of {count}; like='predict2.5-2b-action' says the latter"
        )
    hint = "; like='predict2.5-2b-action' takes them as published" if values == 28 and not stated else ""
    note(
        f"{where} takes {values} numbers of actions at once: taken to be {factor} actions of {count}, one a frame, "
        f"told as they are (no scale, mean 0, deviation 1){hint}"
    )
    window = {"window": 1 + (frames - 1) // factor} | {key: like[key] for key in _WINDOW if key in like}
    names = tuple(f"action_{index}" for index in range(count))
    return ActionConfig(names, (0.0,) * count, (1.0,) * count, **window)


def infer_control(shapes: Mapping[str, tuple[int, ...]], base: DiTConfig, where: str) -> ControlConfig:
    """The config of a branch beside `base` that a file's shapes speak of. Which blocks of the base it acts on no file
    says: they are spread evenly, as in the published ones.

    shapes: by our names.

    Raises:
        InputError: no branch that could stand beside this base.
    """
    try:
        patched = shapes["control_embedder.proj.1.weight"][1]
    except KeyError as error:
        raise InputError(f"{where} holds no whole control branch: it lacks {error}") from None
    numbers = [int(match[1]) for key in shapes if (match := re.match(r"control_blocks\.(\d+)\.", key))]
    blocks = 1 + max(numbers, default=-1)
    channels = patched // math.prod(base.patch) - (base.input_channels - base.latent_channels)
    try:
        return ControlConfig(blocks, even_spread(blocks, base), channels)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def even_spread(blocks: int, base: DiTConfig) -> int:
    """`every` of a branch of so many blocks that are spread evenly over the base's."""
    return max(1, base.depth // max(1, blocks))
