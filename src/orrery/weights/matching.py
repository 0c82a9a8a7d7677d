"""The weights in a part's files, and the name that each of ours has among them: one case for each layout."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from orrery.errors import InputError, note
from orrery.weights.config import ModelConfig
from orrery.weights.layouts import (
    IMAGE_KEYS,
    TEXT_EXTRA,
    diffusers_control_keys,
    diffusers_transformer_key,
    diffusers_vae_key,
    text_key,
    text_prefix,
    vision_prefix,
)
from orrery.weights.lora import lora_from_tensors, merged_weights
from orrery.weights.official import official_weights, split_branch
from orrery.weights.parts import ModelFiles, Part
from orrery.weights.sources import transformer_shapes
from orrery.weights.tensors import read_tensors


def in_layout(
    part: Part, path: Path, config: ModelConfig, wanted: Iterable[str]
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors of a part's files that are weights of that part, still on the disk, and for each of our names
    (`wanted`) the name that it has among them."""
    tensors, names = read_tensors(path), {name: name for name in wanted}
    branch = any(name.startswith("control_") for name in names)
    if part.layout == "official":
        return _official(tensors, names, branch, part.drops_image, str(path))
    if part.drops_image:
        tensors = _without_image(tensors)
    if part.layout == "qwen":
        prefix = text_prefix(tensors.keys())
        kept = {key: value for key, value in tensors.items() if not TEXT_EXTRA.match(key)}
        return kept, {name: text_key(name, prefix) for name in names}
    if part.layout == "siglip2":
        prefix = vision_prefix(tensors.keys())
        tower = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        kept = {key: value for key, value in tower.items() if not key.startswith(f"{prefix}head.")}
        return kept, {name: prefix + name.removeprefix("model.") for name in names}
    if part.layout == "copies":
        return tensors, diffusers_control_keys((), names)[1]
    if part.layout == "diffusers" and branch:
        own, copies = diffusers_control_keys(names, transformer_shapes(config.transformer))
        return {key: value for key, value in tensors.items() if key not in copies.values()}, own
    if part.layout == "diffusers":
        if any(name.startswith("x_embedder.") for name in names):
            return tensors, {name: diffusers_transformer_key(name) for name in names}
        return tensors, {name: diffusers_vae_key(name, config.vae) for name in names}
    return tensors, names  # "orrery", and "wan", whose names ours are


def _official(
    tensors: Mapping[str, Tensor], names: dict[str, str], branch: bool, drops_image: bool, where: str
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """Of an official file the base, with the adapters of a fine-tune merged, or the control branch."""
    whole, adapters = official_weights(tensors, where)
    base, control = split_branch(whole)
    if branch:
        return _without_image(control) if drops_image else control, names
    base = _without_image(base) if drops_image else base
    if not adapters:
        return base, names
    shapes = {key: tuple(value.shape) for key, value in base.items()}
    return merged_weights(base, [lora_from_tensors(adapters, shapes, where)]), names


def _without_image(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if not IMAGE_KEYS.search(key)}


def check_same_base(files: ModelFiles, branch: Part) -> None:
    """Refuse a branch whose file holds another base than the model's transformer: a handful of weights from all depths
    are compared bit by bit (in the transformer's dtype).

    A control network of diffusers repeats the base's projection of image tokens, and theirs runs its own. Here there is
    one, the base's: where the two differ, a line says so.

    Raises:
        InputError: another base.
    """
    theirs, mine = branch.base, files.parts["transformer"]
    if theirs is None or theirs.identity == mine.identity:
        return
    config, depth = files.config, files.config.transformer.depth
    names = [
        "x_embedder.proj.1.weight", "t_embedder.1.linear_1.weight", "t_embedding_norm.weight", "crossattn_proj.0.bias",
        "blocks.0.self_attn.q_proj.weight", f"blocks.{depth // 2}.cross_attn.v_proj.weight",
        f"blocks.{depth - 1}.mlp.layer2.weight", "final_layer.linear.weight",
    ]  # fmt: skip
    image = "img_context_proj.0.weight"
    if config.transformer.image_context:
        names += [image, "blocks.0.cross_attn.v_img.weight"]
    here, named_here = in_layout(mine, mine.find(), config, names)
    path = theirs.find()
    there, named_there = in_layout(theirs, path, config, names)
    for name in names:
        one, two = here.get(named_here[name]), there.get(named_there.get(name, ""))
        if one is None or two is None or _equal(one, two):
            continue
        if theirs.layout == "copies" and name == image:
            note(f"{path}: its projection of image tokens differs from that of {files.name}, which is used for both")
            continue
        raise InputError(
            f"{path} was trained beside another base than the transformer of {files.name}: their {name} differ"
        )


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two.to(one.dtype))
