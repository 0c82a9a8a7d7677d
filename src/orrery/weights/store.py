"""Models into memory, strictly, and model folders onto the disk.

A network is built on the meta device, its weights are mapped from their files, renamed by the layout's table, compared
key by key and shape by shape, and handed over one tensor at a time: on a CPU, in the dtype of the file, the mapped
pages are the weights; otherwise each is copied where it belongs. So, in the dtype of the file or on the
way to a GPU, the host never holds more than the file once.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from orrery.errors import InputError, one_line
from orrery.files import atomic_folder
from orrery.nn.dit import DiT
from orrery.nn.text import TextEncoder
from orrery.nn.vae import VAE
from orrery.weights.config import ModelConfig
from orrery.weights.layouts import TEXT_EXTRA, diffusers_transformer_key, diffusers_vae_key, text_key, text_prefix
from orrery.weights.lora import lora_from_tensors, merged_weights
from orrery.weights.official import official_weights
from orrery.weights.sources import PARTS, ModelFiles, Part, find_model
from orrery.weights.tensors import read_tensors, tensor_files

NAMED_KEYS = 3  # of many, in an error
HASHED_WHOLE = 256 * 2**20
SAMPLES, SAMPLE = 64, 2**20


@dataclass(frozen=True)
class Model:
    """The three networks of a model and its config."""

    config: ModelConfig
    transformer: DiT
    vae: VAE
    text: TextEncoder


def load_model(
    name_or_path: str | PathLike[str] | ModelFiles,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """All three networks of a model, in evaluation mode.

    Args:
        name_or_path: what `find_model` takes, or what it returned.
        device, dtype: of the transformer and the text encoder; the VAE is float32.

    Raises:
        InputError: a file is missing or broken; config.json has an unknown key or an impossible value; the weights
            have a key too many, a key too few, or another shape.
    """
    files = name_or_path if isinstance(name_or_path, ModelFiles) else find_model(name_or_path)
    parts: dict[str, Any] = {
        name: load_part(files, name, device, torch.float32 if name == "vae" else dtype) for name in PARTS
    }
    return Model(files.config, **parts)


def load_part(
    files: ModelFiles, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """One network of a model ("transformer", "vae" or "text") with its weights, in evaluation mode, frozen.

    dtype: None for that of the file. Raises InputError as `load_model` does.
    """
    module = empty_part(files, name)
    weights = part_weights(files, name, module)
    module.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)
    return module.eval().requires_grad_(False)


def empty_part(files: ModelFiles, name: str) -> nn.Module:
    """The network on the meta device: every shape, no number."""
    config = files.config
    try:
        with torch.device("meta"):
            if name == "text":
                return TextEncoder(config.text, load_tokenizer(files.tokenizer()))
            return DiT(config.transformer) if name == "transformer" else VAE(config.vae)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{files.name}: {one_line(error)}") from error


def load_tokenizer(path: Path) -> Any:
    """A tokenizer.json through `tokenizers`; a folder of another kind of tokenizer through `transformers`."""
    try:
        if path.is_dir():
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a missing and for a broken file
        raise InputError(f"cannot read {path}: {one_line(error)}") from error


def part_weights(files: ModelFiles, name: str, module: nn.Module) -> dict[str, Tensor]:
    """The weights of a part by our names, still on the disk, compared with the (meta) module.

    Raises:
        InputError: a key is missing, unknown or of another shape: the first few by name, and how many.
    """
    part = files.parts[name]
    path = part.find()
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    tensors, renamed = _in_layout(part, path, files.config, wanted)
    missing = [theirs for theirs in renamed.values() if theirs not in tensors]
    unknown = sorted(tensors.keys() - set(renamed.values()))
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of {len(wanted)} weights: {_few(missing)}")
    if unknown:
        raise InputError(f"{path} holds {len(unknown)} unknown weights: {_few(unknown)}")
    weights = {ours: tensors[theirs] for ours, theirs in renamed.items()}
    other = [key for key, value in weights.items() if tuple(value.shape) != wanted[key]]
    if other:
        shapes = f"{renamed[other[0]]} is {list(weights[other[0]].shape)}, the config asks for {list(wanted[other[0]])}"
        raise InputError(f"{path}: {len(other)} weights have another shape: {shapes}")
    return weights


def _in_layout(
    part: Part, path: Path, config: ModelConfig, wanted: Iterable[str]
) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors of a part's files that are weights, and for each of our names the name it has among them."""
    tensors = read_tensors(path)
    if part.layout == "official":
        base, adapters = official_weights(tensors, str(path))
        names = {name: name for name in wanted}
        if not adapters:
            return base, names
        shapes = {key: tuple(value.shape) for key, value in base.items()}
        return merged_weights(base, [lora_from_tensors(adapters, shapes, str(path))]), names
    if part.layout == "qwen":
        prefix = text_prefix(tensors.keys())
        kept = {key: value for key, value in tensors.items() if not TEXT_EXTRA.match(key)}
        return kept, {name: text_key(name, prefix) for name in wanted}
    if part.layout == "diffusers":
        if any(name.startswith("x_embedder.") for name in wanted):
            return tensors, {name: diffusers_transformer_key(name) for name in wanted}
        return tensors, {name: diffusers_vae_key(name, config.vae) for name in wanted}
    return tensors, {name: name for name in wanted}  # "orrery", and "wan", whose names ours are


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED_KEYS]) + (", ..." if len(names) > NAMED_KEYS else "")


def save_model(folder: str | PathLike[str], model: Model, card: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model folder, whole or not at all; a model that stands there is replaced.

    Args:
        folder: its parent must exist.
        model: networks and config; the VAE's latent statistics are taken from `model.vae.config`.
        card: README.md.
        dtype: of the stored weights; float16 halves the size, and loading goes back to float32.

    Raises:
        InputError: the folder cannot be written, holds something else, or the disk is full.
        ValueError: a weight is not finite in `dtype`; the networks are not those of the config.
    """
    config = model.config
    for name, wanted in (("transformer", config.transformer), ("vae", config.vae), ("text", config.text)):
        if getattr(model, name).config != wanted:
            raise ValueError(f"the {name} was not built from the config that would be saved with it")
    if not isinstance(model.text.tokenizer, Tokenizer):
        raise ValueError(f"only a tokenizers.Tokenizer can be saved, got {type(model.text.tokenizer).__name__}")
    blobs = {name: save(_stored(name, getattr(model, name), dtype), {"format": "pt"}) for name in PARTS}
    with atomic_folder(folder, replaces="config.json") as partial:
        for name, blob in blobs.items():
            (partial / f"{name}.safetensors").write_bytes(blob)
        (partial / "tokenizer.json").write_text(model.text.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        write_config(partial, config, card)
    return Path(folder)


def write_config(folder: Path, config: ModelConfig, card: str) -> None:
    """config.json and README.md."""
    (folder / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")


def _stored(name: str, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for key, value in module.state_dict().items():
        weights[key] = value.detach().to("cpu", dtype).contiguous().clone()
        if not bool(weights[key].isfinite().all()):
            raise ValueError(f"{name}: {key} is not finite in {str(dtype).removeprefix('torch.')}")
    return weights


def model_hash(files: ModelFiles | str | PathLike[str]) -> str:
    """16 hex digits of the SHA-256 over config, tokenizer and weights: which model made this video.

    Parts that come from a hub at a fixed revision count by that; of a file above 256 MiB, its size and 64 samples.
    """
    if not isinstance(files, ModelFiles):
        files = find_model(files)
    digest = hashlib.sha256()
    if files.folder is not None and not files.config.shared:
        names = ["config.json", "tokenizer.json", *(f"{part}.safetensors" for part in PARTS)]
        for name in names:
            digest.update(_file_digest(files.folder / name))
        return digest.hexdigest()[:16]
    digest.update(json.dumps(_plain(files.config.to_json()), sort_keys=True).encode())
    for name in PARTS:
        part = files.parts[name]
        if "@" in part.identity:
            digest.update(part.identity.encode())
            continue
        for path in tensor_files(part.find()):
            digest.update(_file_digest(path))
    return digest.hexdigest()[:16]


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "training"}


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= HASHED_WHOLE:
            return hashlib.file_digest(file, "sha256").digest()
        digest = hashlib.sha256(str(size).encode())
        for index in range(SAMPLES):
            file.seek((size - SAMPLE) * index // (SAMPLES - 1))
            digest.update(file.read(SAMPLE))
        return digest.digest()
