"""Between the formats of a model: an official .pt, a diffusers directory, a folder of ours; in every direction.

Whatever `find_model` finds can be written as any of the three. Tensors keep their dtype and their bits; a round trip
gives back the same. The tables of `layouts` do the renaming, as they do in loading.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orrery.errors import InputError
from orrery.files import atomic_file, atomic_folder
from orrery.weights import pipeline_dir
from orrery.weights.config import ModelConfig
from orrery.weights.layouts import diffusers_transformer_key, diffusers_vae_key, text_key
from orrery.weights.lora import Lora, merged_weights
from orrery.weights.official import official_table
from orrery.weights.sources import PARTS, SIDECAR, ModelFiles
from orrery.weights.store import empty_part, part_weights, write_config
from orrery.weights.tensors import TORCH_SUFFIXES

FORMATS = ("orrery", "diffusers", "official")
Report = Callable[[str], None]
Weights = Callable[[str], Mapping[str, Tensor]]
# What a message becomes in Qwen2.5-VL's chat: section 5 of the specification, for tokenizers that bring no template.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def convert(
    files: ModelFiles,
    destination: str | PathLike[str],
    to: str,
    parts: Sequence[str] | None = None,
    report: Report = lambda line: None,
    loras: Sequence[Lora] = (),
) -> Path:
    """Write a model in another format, whole or not at all.

    Args:
        files: what `find_model` found.
        destination: a .pt for "official" (the transformer, or with parts=("vae",) Wan's VAE); a folder otherwise.
        to: one of FORMATS.
        parts: which networks; default those that lie with the model, so that shared ones are not copied. Parts that are
            left out stay shared (ours), or are left out (diffusers).
        report: is told, line by line, what is written.
        loras: are merged into the transformer.

    Raises:
        InputError: an unknown format or part; a destination that cannot be written; a model that the format has no
            words for.
    """
    if to not in FORMATS:
        raise InputError(f"the format is {to!r}; allowed are {', '.join(FORMATS)}")
    own = [name for name in PARTS if name not in files.config.shared]
    chosen = own if parts is None else list(parts)
    if unknown := [name for name in chosen if name not in PARTS]:
        raise InputError(f"the parts {', '.join(unknown)} are unknown; allowed are {', '.join(PARTS)}")
    destination = Path(destination)
    write = {"official": _to_official, "diffusers": _to_diffusers, "orrery": _to_orrery}[to]
    chosen = ["transformer"] if to == "official" and parts is None else chosen
    return write(files, destination, chosen, lambda name: _weights(files, name, report, loras))


def _weights(files: ModelFiles, name: str, report: Report, loras: Sequence[Lora]) -> Mapping[str, Tensor]:
    """Of one part, still on the disk, with the LoRAs merged where they belong."""
    weights: Mapping[str, Tensor] = part_weights(files, name, empty_part(files, name))
    if name == "transformer" and loras:
        weights = merged_weights(weights, loras)
    size = sum(value.numel() * value.element_size() for value in weights.values())
    report(f"{name}: {len(weights)} tensors, {size / 1e9:.2f} GB")
    return weights


def _write(weights: Mapping[str, Tensor], path: Path, rename: Callable[[str], str] = str) -> None:
    save_file({rename(key): value.contiguous() for key, value in weights.items()}, path, {"format": "pt"})


def _to_official(files: ModelFiles, path: Path, parts: Sequence[str], weights_of: Weights) -> Path:
    if len(parts) != 1 or parts[0] == "text":
        raise InputError(f"an official file holds the transformer or the VAE, not {', '.join(parts) or 'nothing'}")
    if path.suffix not in TORCH_SUFFIXES:
        raise InputError(f"cannot write {path}: an official file ends in {', '.join(TORCH_SUFFIXES)}")
    weights = weights_of(parts[0])
    if parts[0] == "transformer":
        counts = files.config.training.get("official", {})
        weights = official_table(weights, files.config.transformer, counts)
    with atomic_file(path) as partial:
        torch.save(dict(weights), partial)
    return path


def _to_orrery(files: ModelFiles, folder: Path, parts: Sequence[str], weights_of: Weights) -> Path:
    missing = [name for name in PARTS if name not in parts and name not in files.config.shared]
    if missing:
        raise InputError(f"a model folder needs its {', '.join(missing)}: name it among the parts")
    shared = {name: value for name, value in files.config.shared.items() if name not in parts}
    config = dataclasses.replace(files.config, shared=shared)
    with atomic_folder(folder, replaces="config.json") as partial:
        for name in parts:
            _write(weights_of(name), partial / f"{name}.safetensors")
        if "text" in parts:
            _copy_tokenizer(files.tokenizer(), partial, config, whole=False)
        write_config(partial, config, f"# {Path(files.name).name}\n\nConverted by Orrery from `{files.name}`.")
    return folder


def _to_diffusers(files: ModelFiles, folder: Path, parts: Sequence[str], weights_of: Weights) -> Path:
    config = files.config
    rename: dict[str, Callable[[str], str]] = {
        "transformer": diffusers_transformer_key,
        "vae": lambda key: diffusers_vae_key(key, config.vae),
        "text": lambda key: text_key(key, ""),
    }
    jsons: dict[str, Callable[[], dict[str, Any]]] = {
        "transformer": lambda: pipeline_dir.transformer_json(config.transformer),
        "vae": lambda: pipeline_dir.vae_json(config.vae),
        "text": lambda: pipeline_dir.text_json(config.text),
    }
    written = {name: jsons[name]() for name in parts}  # refuse before writing gigabytes
    shared = {name: value for name, value in config.shared.items() if name not in parts}
    with atomic_folder(folder, replaces=pipeline_dir.INDEX) as partial:
        for name in parts:
            sub = partial / pipeline_dir.FOLDERS[name]
            sub.mkdir()
            _json(sub / "config.json", written[name])
            file = "model.safetensors" if name == "text" else "diffusion_pytorch_model.safetensors"
            _write(weights_of(name), sub / file, rename[name])
        if "text" in parts:
            (partial / "tokenizer").mkdir()
            _copy_tokenizer(files.tokenizer(), partial / "tokenizer", config, whole=True)
        (partial / "scheduler").mkdir()
        _json(partial / "scheduler" / "scheduler_config.json", pipeline_dir.scheduler_json(config.sampling))
        _json(partial / SIDECAR, dataclasses.replace(config, shared=shared).to_json())
        _json(partial / pipeline_dir.INDEX, pipeline_dir.model_index(list(parts)))
    return folder


def _json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _copy_tokenizer(source: Path, folder: Path, config: ModelConfig, whole: bool) -> None:
    """The tokenizer.json; with `whole` also what transformers wants beside it."""
    home = source if source.is_dir() else source.parent
    if not (home / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(str(home), local_files_only=True)
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    for name in _TOKENIZER_FILES if whole else ("tokenizer.json",):
        if (home / name).is_file() and not (folder / name).exists():
            shutil.copyfile(home / name, folder / name)
    if whole and not (folder / "tokenizer_config.json").is_file():
        options = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": config.text.pad_token}
        _json(folder / "tokenizer_config.json", options | {"chat_template": CHAT, "padding_side": "right"})
