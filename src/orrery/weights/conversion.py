"""Between the formats of a model: an official .pt, a diffusers directory, a folder of ours; in every direction.

Whatever `find_model` finds can be written as any of the three. Tensors keep their dtype and their bits; a round trip
gives back the same. The tables of `layouts` do the renaming, as they do in loading.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from orrery.errors import InputError, note
from orrery.files import atomic_file, atomic_folder
from orrery.weights import pipeline_dir
from orrery.weights.config import ModelConfig
from orrery.weights.layouts import diffusers_control_keys, diffusers_transformer_key, diffusers_vae_key, text_key
from orrery.weights.lora import Lora, merged_weights
from orrery.weights.official import even_spread, official_table
from orrery.weights.parts import BRANCH, DECODER, PARTS, ModelFiles
from orrery.weights.pipeline_dir import CONTROLNET, SIDECAR
from orrery.weights.preview import PREVIEW, find_preview
from orrery.weights.store import empty_part, part_weights, write_config
from orrery.weights.tensors import TORCH_SUFFIXES

FORMATS = ("orrery", "diffusers", "official")
Report = Callable[[str], None]
Weights = Callable[..., Mapping[str, Tensor]]
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
        destination: a .pt for "official" (the transformer with its control branch if it has one, or with
            parts=("vae",) Wan's VAE); a folder otherwise.
        to: one of FORMATS. An official file and a diffusers directory hold one control branch at most.
        parts: which networks, control branches ("control-KIND") among them; default those that lie with the model, so
            that shared ones are not copied, and all branches that it was found with. Parts that are left out stay
            shared (ours), or are left out (diffusers).
        report: is told, line by line, what is written.
        loras: are merged into the transformer.

    Raises:
        InputError: an unknown format or part; a destination that cannot be written; a model that the format has no
            words for.
    """
    if to not in FORMATS:
        raise InputError(f"the format is {to!r}; allowed are {', '.join(FORMATS)}")
    branches = [BRANCH + kind for kind in files.config.controls]
    own = [name for name in PARTS if name not in files.config.shared] if to != "official" else ["transformer"]
    if to == "diffusers" and files.config.own_decoder:
        own = [name for name in PARTS if name in own or name == "vae"]  # there is no word for half a VAE
    chosen = own + branches if parts is None else list(parts)
    if unknown := [name for name in chosen if name not in (*PARTS, *branches)]:
        allowed = ", ".join((*PARTS, *branches))
        raise InputError(f"the parts {', '.join(unknown)} are unknown; allowed are {allowed}")
    kinds = [name.removeprefix(BRANCH) for name in chosen if name in branches]
    if to != "orrery" and len(kinds) > 1:
        raise InputError(
            f"the format {to} holds one control branch, here are {', '.join(kinds)}: name the one to write"
        )
    controls = {kind: control for kind, control in files.config.controls.items() if kind in kinds}
    files = dataclasses.replace(files, config=dataclasses.replace(files.config, controls=controls))
    write = {"official": _to_official, "diffusers": _to_diffusers, "orrery": _to_orrery}[to]
    return write(files, Path(destination), chosen, partial(_weights, files, report, loras))


def _weights(
    files: ModelFiles, report: Report, loras: Sequence[Lora], name: str, aloud: bool = True
) -> Mapping[str, Tensor]:
    """Of one part, still on the disk, with the LoRAs merged where they belong."""
    weights: Mapping[str, Tensor] = part_weights(files, name, empty_part(files, name))
    if name == "transformer" and loras:
        weights = merged_weights(weights, loras)
    if aloud:
        size = sum(value.numel() * value.element_size() for value in weights.values())
        report(f"{name}: {len(weights)} tensors, {size / 1e9:.2f} GB")
    return weights


def _write(weights: Mapping[str, Tensor], path: Path, rename: Callable[[str], str] = str) -> None:
    save_file({rename(key): value.contiguous() for key, value in weights.items()}, path, {"format": "pt"})


def _to_official(files: ModelFiles, path: Path, parts: Sequence[str], weights_of: Weights) -> Path:
    branch = next((name for name in parts if name.startswith(BRANCH)), None)
    if [name for name in parts if name != branch] not in (["transformer"], ["vae"]) or (branch and "vae" in parts):
        raise InputError(
            "an official file holds the transformer, alone or with its control branch, or the VAE, not "
            f"{', '.join(parts) or 'nothing'}"
        )
    if path.suffix not in TORCH_SUFFIXES:
        raise InputError(f"cannot write {path}: an official file ends in {', '.join(TORCH_SUFFIXES)}")
    if branch:
        _check_spread(files.config, "an official file")
    weights = weights_of("vae" if "vae" in parts else "transformer")
    if "vae" not in parts:
        if branch:
            weights = dict(weights) | dict(weights_of(branch))
        if files.config.actions:
            note(
                f"{path}: an official file does not say what the numbers of an action are, nor their scale and "
                "statistics: keep the config.json that does"
            )
        counts = files.config.training.get("official", {})
        weights = official_table(weights, files.config.transformer, counts)
    with atomic_file(path) as unfinished:
        torch.save(dict(weights), unfinished)
    return path


def _check_spread(config: ModelConfig, what: str) -> None:
    """Refuse what would not come back: neither format says at which blocks of the base a branch by itself acts."""
    for kind, control in config.controls.items():
        even = even_spread(control.blocks, config.transformer)
        if control.every != even:
            raise InputError(
                f"{what} does not say where a branch acts: {control.blocks} blocks beside {config.transformer.depth} "
                f"are taken to be {even} apart, those of {kind} are {control.every} apart"
            )


def _to_orrery(files: ModelFiles, folder: Path, parts: Sequence[str], weights_of: Weights) -> Path:
    missing = [name for name in PARTS if name not in parts and name not in files.config.shared]
    if missing:
        raise InputError(f"a model folder needs its {', '.join(missing)}: name it among the parts")
    shared = {name: value for name, value in files.config.shared.items() if name not in parts}
    over = files.parts["vae"].over if "vae" in shared else None
    config = dataclasses.replace(files.config, shared=shared, own_decoder=over is not None)
    with atomic_folder(folder, replaces="config.json") as unfinished:
        for name in parts:
            _write(weights_of(name), unfinished / f"{name}.safetensors")
        if over is not None:
            shutil.copyfile(over, unfinished / DECODER)
        if "vae" in parts and (preview := find_preview(files)) is not None:
            shutil.copyfile(preview, unfinished / PREVIEW)
        if "text" in parts:
            _copy_tokenizer(files.tokenizer(), unfinished, config, whole=False)
        write_config(unfinished, config, f"# {Path(files.name).name}\n\nConverted by Orrery from `{files.name}`.")
    return folder


def _to_diffusers(files: ModelFiles, folder: Path, parts: Sequence[str], weights_of: Weights) -> Path:
    config = files.config
    branch = next((name for name in parts if name.startswith(BRANCH)), "")
    control = next(iter(config.controls.values()), None)
    rename: dict[str, Callable[[str], str]] = {
        "transformer": diffusers_transformer_key,
        "vae": lambda key: diffusers_vae_key(key, config.vae),
        "text": lambda key: text_key(key, ""),
    }
    jsons: dict[str, Callable[[], dict[str, Any]]] = {
        "transformer": lambda: pipeline_dir.transformer_json(config.transformer, control),
        "vae": lambda: pipeline_dir.vae_json(config.vae),
        "text": lambda: pipeline_dir.text_json(config.text),
    }
    networks = [name for name in parts if name != branch]
    written = {name: jsons[name]() for name in networks}  # refuse before writing gigabytes
    if control is not None:
        if "transformer" not in parts:
            _check_spread(config, "a control network of diffusers by itself")
        written[CONTROLNET] = pipeline_dir.control_json(control, config.transformer)
    shared = {name: value for name, value in config.shared.items() if name not in parts}
    with atomic_folder(folder, replaces=pipeline_dir.INDEX) as unfinished:
        for name in networks:
            sub = unfinished / pipeline_dir.FOLDERS[name]
            sub.mkdir()
            _json(sub / "config.json", written[name])
            file = "model.safetensors" if name == "text" else "diffusion_pytorch_model.safetensors"
            _write(weights_of(name), sub / file, rename[name])
        if branch:
            (unfinished / CONTROLNET).mkdir()
            _json(unfinished / CONTROLNET / "config.json", written[CONTROLNET])
            table = _controlnet_table(weights_of(branch), weights_of("transformer", aloud=False))
            _write(table, unfinished / CONTROLNET / "diffusion_pytorch_model.safetensors")
        if "text" in parts:
            (unfinished / "tokenizer").mkdir()
            _copy_tokenizer(files.tokenizer(), unfinished / "tokenizer", config, whole=True)
        (unfinished / "scheduler").mkdir()
        _json(unfinished / "scheduler" / "scheduler_config.json", pipeline_dir.scheduler_json(config.sampling))
        _json(unfinished / SIDECAR, dataclasses.replace(config, shared=shared, own_decoder=False).to_json())
        _json(unfinished / pipeline_dir.INDEX, pipeline_dir.model_index([*networks, *([CONTROLNET] if branch else [])]))
    return folder


def _controlnet_table(branch: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a CosmosControlNetModel: a branch, and the copies of the base's embeddings that it keeps."""
    own, copies = diffusers_control_keys(branch, base)
    table = {theirs: branch[ours] for ours, theirs in own.items()}
    return table | {theirs: base[ours] for ours, theirs in copies.items()}


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
