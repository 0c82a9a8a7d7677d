"""Preview decoders on disk: ours, beside the VAE whose latents they draw, and the published TAEHV files.

Ours is `preview.safetensors`: the weights, and in the file's metadata the network's config, how it was trained, and
which VAE it belongs to. A model that shares an embedded model's VAE has that model's preview decoder too. A published
file (`taew2_1.pth`, or the same as safetensors) has no config: the network is read off the shapes of its weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from orrery.errors import InputError, note, one_line
from orrery.files import atomic_file
from orrery.nn.empty import shapes_only
from orrery.nn.preview import Preview, PreviewConfig
from orrery.nn.vae import VAEConfig
from orrery.weights.parts import ModelFiles
from orrery.weights.tensors import read_tensors

PREVIEW = "preview.safetensors"
NAMED_KEYS = 3  # of many, in an error
PUBLISHED = PreviewConfig()
ENCODER = "encoder."  # a published file holds one too; it is passed over
RAW = "lighttae"  # in the name of files of this layout that were trained on latents before they are normalised


def load_preview(
    files: ModelFiles,
    path: str | PathLike[str] | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Preview | None:
    """The preview decoder of a model, in evaluation mode, frozen.

    Args:
        files: the model, as `find_model` returned it.
        path: a TAEHV file or one of ours, to be used instead of the model's own.
        device, dtype: of the network.

    Returns:
        None where no path is given and the model has none.

    Raises:
        InputError: a file that is missing, broken or of another layout; a decoder for other latents than the model's.
    """
    if path is None:
        found = find_preview(files)
        if found is None:
            return None
    else:
        found = Path(path)
    config, weights = read_preview(found, files.config.vae)
    with shapes_only():
        network = Preview(config)
    _check_keys(found, weights, {key: tuple(value.shape) for key, value in network.state_dict().items()})
    network.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)
    return network.channels_last().eval().requires_grad_(False)


def find_preview(files: ModelFiles) -> Path | None:
    """The model's own preview decoder, None if there is none: beside the weights of its VAE; of a model that shares
    its VAE, first in its own folder."""
    folders = [files.folder] if files.folder is not None and "vae" in files.config.shared else []
    vae = files.parts["vae"]
    if vae.layout == "orrery":
        folders.append(vae.find().parent)
    return next((folder / PREVIEW for folder in folders if (folder / PREVIEW).is_file()), None)


def read_preview(path: Path, vae: VAEConfig) -> tuple[PreviewConfig, dict[str, Tensor]]:
    """Config and weights of a file, for the latents of a VAE.

    Raises:
        InputError: see `load_preview`.
    """
    tensors = read_tensors(path)
    metadata = _metadata(path)
    if "preview" in metadata:
        if metadata.get("vae") != vae_mark(vae):
            raise InputError(
                f"{path} was made for another VAE than the model's; make one with `orrery train "
                "recipes/mini-preview.toml --set base=FOLDER`"
            )
        try:
            config = PreviewConfig(**json.loads(metadata["preview"]))
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: its metadata is no config of a preview decoder: {one_line(error)}") from error
        return config, tensors
    config = infer_config(tensors, str(path))
    weights = {key: value for key, value in tensors.items() if not key.startswith(ENCODER)}
    if RAW in path.name.lower():
        note(f"{path.name}: of LightX2V by its name, so it is given latents as they are before normalisation")
        config = replace(config, latent_mean=vae.latent_mean, latent_std=vae.latent_std)
    check_fits(config, vae, str(path))
    return config, weights


def infer_config(tensors: Mapping[str, Tensor], where: str) -> PreviewConfig:
    """The network of a published file: three stages of three memory blocks; widths, growth in time and patches are read
    off the shapes.

    Raises:
        InputError: it is not of that layout.
    """
    stride = PUBLISHED.blocks + 3  # a stage: blocks, enlargement, growth, convolution
    after = [2 + stride * stage for stage in range(1, len(PUBLISHED.widths))]
    names = ["decoder.1.weight", *(f"decoder.{last}.weight" for last in after)]
    grown = [f"decoder.{last - 1}.conv.weight" for last in after]
    head = f"decoder.{after[-1] + 2}.weight"
    for name in (*names, *grown, head):
        if name not in tensors or tensors[name].ndim != 4:
            raise InputError(f"{where} is no TAEHV decoder: it lacks the convolution {name}")
    shapes = {name: tuple(tensors[name].shape) for name in (*names, *grown, head)}
    patch = round((shapes[head][0] / 3) ** 0.5)
    time_up = tuple(shapes[name][0] // shapes[name][1] for name in grown)
    if 3 * patch**2 != shapes[head][0] or min(time_up) < 1:
        raise InputError(f"{where} is no TAEHV decoder: {head} gives {shapes[head][0]} channels; allowed: 3 patch²")
    widths = tuple(shapes[name][0] for name in names)
    return replace(PUBLISHED, latent_channels=shapes[names[0]][1], widths=widths, time_up=time_up, patch=patch)


def check_fits(config: PreviewConfig, vae: VAEConfig, where: str) -> None:
    """Refuse a preview decoder whose latents or frames are not the VAE's.

    Raises:
        InputError: other channels, or another factor in time or space.
    """
    spatial = vae.patch * 2 ** len(vae.temporal_down)
    mine = (config.latent_channels, config.temporal_factor, config.spatial_factor)
    theirs = (vae.latent_channels, vae.temporal_factor, spatial)
    if mine != theirs:
        told = "{} channels, {} frames and {}x{} pixels a latent"
        one, two = (told.format(*three, three[-1]) for three in (mine, theirs))
        raise InputError(f"{where} is for another VAE: {one}; the model's has {two}")


def save_preview(
    path: Path, network: Preview, vae: VAEConfig, training: Mapping[str, Any], dtype: torch.dtype = torch.float16
) -> None:
    """Write a preview decoder, whole or not at all.

    Args:
        vae: the VAE, latent statistics included, whose latents it draws. training: JSON values.

    Raises:
        InputError: it cannot be written.
        ValueError: a weight is not finite in `dtype`.
    """
    weights = {}
    for key, value in network.state_dict().items():
        weights[key] = value.detach().to("cpu", dtype).contiguous()
        if not bool(weights[key].isfinite().all()):
            raise ValueError(f"preview: {key} is not finite in {str(dtype).removeprefix('torch.')}")
    metadata = {
        "format": "pt",
        "preview": json.dumps(asdict(network.config)),
        "vae": vae_mark(vae),
        "training": json.dumps(dict(training)),
    }
    with atomic_file(path) as partial:
        partial.write_bytes(save(weights, metadata))


def vae_mark(vae: VAEConfig) -> str:
    """16 hex digits over a VAE's config. It holds the measured statistics of the latents, so that two trainings of one
    shape differ, and another dtype of the same weights does not."""
    return hashlib.sha256(json.dumps(asdict(vae), sort_keys=True).encode()).hexdigest()[:16]


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):  # a torch checkpoint, which `read_tensors` has read
        return {}


def _check_keys(path: Path, weights: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for what, names in (("lacks", wanted.keys() - weights.keys()), ("holds unknown", weights.keys() - wanted.keys())):
        if names:
            few = ", ".join(sorted(names)[:NAMED_KEYS]) + (", ..." if len(names) > NAMED_KEYS else "")
            raise InputError(f"{path} {what} {len(names)} weights: {few}")
    for key, shape in wanted.items():
        if tuple(weights[key].shape) != shape:
            raise InputError(f"{path}: {key} is {list(weights[key].shape)}, the config asks for {list(shape)}")
