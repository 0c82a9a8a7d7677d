"""Models into memory, strictly, and model folders onto the disk.

A network is built on the meta device, its weights are mapped from their files, renamed by the layout's table, compared
key by key and shape by shape, and handed over one tensor at a time: on a CPU, in the dtype of the file, the mapped
pages are the weights; otherwise each is copied where it belongs. So, in the dtype of the file or on the
way to a GPU, the host never holds more than the file once.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor, nn

from orrery.errors import InputError, one_line
from orrery.files import atomic_file, atomic_folder
from orrery.kinds import control_kind
from orrery.nn.control import ControlBranch
from orrery.nn.dit import DiT
from orrery.nn.empty import shapes_only
from orrery.nn.image import ImageEncoder
from orrery.nn.text import TextEncoder
from orrery.nn.vae import VAE
from orrery.weights.components import shared_parts
from orrery.weights.config import ModelConfig, read_config
from orrery.weights.decoder import decoder_weights
from orrery.weights.matching import check_same_base, in_layout
from orrery.weights.parts import BRANCH, PARTS, ModelFiles, Part
from orrery.weights.pipeline_dir import image_config
from orrery.weights.sources import find_model
from orrery.weights.tensors import tensor_files

NAMED_KEYS = 3  # of many, in an error
HASHED_WHOLE = 256 * 2**20
SAMPLES, SAMPLE = 64, 2**20


@dataclass(frozen=True)
class Model:
    """The three networks of a model and its config; controls: a branch for each kind of `config.controls`."""

    config: ModelConfig
    transformer: DiT
    vae: VAE
    text: TextEncoder
    controls: Mapping[str, ControlBranch] = field(default_factory=dict)


def load_model(
    name_or_path: str | PathLike[str] | ModelFiles,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """All three networks of a model and its control branches, in evaluation mode.

    Args:
        name_or_path: what `find_model` takes, or what it returned.
        device, dtype: of the transformer, the branches and the text encoder; the VAE is float32.

    Raises:
        InputError: a file is missing or broken; config.json has an unknown key or an impossible value; the weights
            have a key too many, a key too few, or another shape.
    """
    files = name_or_path if isinstance(name_or_path, ModelFiles) else find_model(name_or_path)
    parts: dict[str, Any] = {
        name: load_part(files, name, device, torch.float32 if name == "vae" else dtype) for name in PARTS
    }
    controls: Any = {kind: load_part(files, BRANCH + kind, device, dtype) for kind in files.config.controls}
    return Model(files.config, **parts, controls=controls)


def load_part(
    files: ModelFiles, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = torch.float32
) -> nn.Module:
    """One network of a model with its weights, in evaluation mode, frozen.

    name: "transformer", "vae" or "text"; "control-KIND" for a ControlBranch; "image" for the ImageEncoder of a model
    with image context. dtype: None for that of the file. Raises InputError as `load_model` does, and for a part that
    the model lacks, or a branch that was trained beside another base.
    """
    module = empty_part(files, name)
    weights = part_weights(files, name, module)
    module.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)
    return module.eval().requires_grad_(False)


def empty_part(files: ModelFiles, name: str) -> nn.Module:
    """The network on the meta device: every shape, no number."""
    config = files.config
    if name not in files.parts:
        raise InputError(f"{files.name} has no part {name!r}; it has {', '.join(files.parts)}")
    image = image_config(files.parts[name].find(), config.transformer.image_context) if name == "image" else None
    try:
        with shapes_only():
            if image is not None:
                return ImageEncoder(image)
            if name.startswith(BRANCH):
                return ControlBranch(config.transformer, config.controls[name.removeprefix(BRANCH)])
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
        InputError: a key is missing, unknown or of another shape: the first few by name, and how many. A control branch
            was trained beside another base than the model's.
    """
    part = files.parts[name]
    path = part.find()
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    tensors, renamed = in_layout(part, path, files.config, wanted)
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
    if part.base is not None:
        check_same_base(files, part)
    return weights if part.over is None else weights | decoder_weights(part.over, weights)


def _few(names: list[str]) -> str:
    return ", ".join(names[:NAMED_KEYS]) + (", ..." if len(names) > NAMED_KEYS else "")


def save_model(folder: str | PathLike[str], model: Model, card: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write a model folder, whole or not at all; a model that stands there is replaced.

    Args:
        folder: its parent must exist.
        model: networks, control branches and config; the VAE's latent statistics are from `model.vae.config`.
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
    if {kind: branch.config for kind, branch in model.controls.items()} != config.controls:
        raise ValueError("the control branches are not those of the config that would be saved with them")
    if not isinstance(model.text.tokenizer, Tokenizer):
        raise ValueError(f"only a tokenizers.Tokenizer can be saved, got {type(model.text.tokenizer).__name__}")
    config = replace(config, own_decoder=False)  # the VAE is written whole
    networks = {name: getattr(model, name) for name in PARTS}
    networks |= {BRANCH + kind: branch for kind, branch in model.controls.items()}
    blobs = {name: save(_stored(name, network, dtype), {"format": "pt"}) for name, network in networks.items()}
    with atomic_folder(folder, replaces="config.json") as partial:
        for name, blob in blobs.items():
            (partial / f"{name}.safetensors").write_bytes(blob)
        (partial / "tokenizer.json").write_text(model.text.tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
        write_config(partial, config, card)
    return Path(folder)


def save_transformer(
    folder: str | PathLike[str], transformer: DiT, config: ModelConfig, card: str, dtype: torch.dtype = torch.float16
) -> Path:
    """Write a model folder that holds its transformer alone, whole or not at all; a model that stands there is
    replaced. VAE, text encoder and tokenizer are those that `config.shared` names, of an embedded model:
    {"vae": "mini", "text": "mini"}, or of the published ones.

    Args:
        folder: its parent must exist.
        config: without control branches (`save_control` adds them afterwards); `vae` and `text` are those of the model
            that shares them.
        card: README.md.
        dtype: of the stored weights.

    Raises:
        InputError: the folder cannot be written, or holds something else; the disk is full; a shared part is unknown,
            missing, or another network than the config states.
        ValueError: a weight is not finite in `dtype`; a part is neither written nor shared; the transformer is not that
            of the config.
    """
    if transformer.config != config.transformer:
        raise ValueError("the transformer was not built from the config that would be saved with it")
    if missing := [name for name in PARTS[1:] if name not in config.shared]:
        raise ValueError(f"the config shares no {', '.join(missing)}: save_model writes a model with all its parts")
    if config.controls:
        raise ValueError(f"control branches are not written here: {', '.join(config.controls)}; use save_control")
    if config.own_decoder:
        raise ValueError("a decoder of its own is not written here; use save_decoder afterwards")
    shared_parts(config)
    blob = save(_stored("transformer", transformer, dtype), {"format": "pt"})
    with atomic_folder(folder, replaces="config.json") as partial:
        (partial / "transformer.safetensors").write_bytes(blob)
        write_config(partial, config, card)
    return Path(folder)


def save_control(
    directory: str | PathLike[str],
    kind: str,
    branch: ControlBranch,
    training: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Put a control branch into a model folder of ours, beside what is there; one of the same kind is replaced.

    The weights are written first, then config.json, each whole or not at all: should it stop between the two, a new
    branch is not listed yet. All else in config.json stays as it is.

    Args:
        kind: "edge", "blur", "depth" or "seg".
        training: how it was trained; JSON values. Becomes `training["controls"][kind]` of the config.
        dtype: of the stored weights.

    Returns:
        The file of the branch.

    Raises:
        InputError: no model folder; it cannot be written, or the disk is full; an unknown kind.
        ValueError: a weight is not finite in `dtype`; the branch belongs to a transformer of another config.
    """
    folder, kind = Path(directory), control_kind(kind)
    config = read_config(folder)
    if replace(branch.base, rope_bf16=config.transformer.rope_bf16) != config.transformer:
        raise ValueError(f"the branch was not built for the transformer of {folder}")
    blob = save(_stored(BRANCH + kind, branch, dtype), {"format": "pt"})
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))  # as they are: no default is added
    trained = values.setdefault("training", {})
    trained["controls"] = dict(trained.get("controls", {})) | {kind: dict(training)}
    values["controls"] = dict(values.get("controls", {})) | {kind: asdict(branch.config)}
    text = json.dumps(values, indent=2) + "\n"
    path = folder / f"{BRANCH}{kind}.safetensors"
    with atomic_file(path) as partial:
        partial.write_bytes(blob)
    with atomic_file(folder / "config.json") as partial:
        partial.write_text(text, encoding="utf-8")
    return path


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
    """16 hex digits of the SHA-256 over config, tokenizer and weights, shared ones too: which model made this video.

    Parts that come from a hub at a fixed revision count by that; of a file above 256 MiB, its size and 64 samples.
    Control branches do not count, so that a model stays the same one when it is given another: see `part_hash`.
    """
    if not isinstance(files, ModelFiles):
        files = find_model(files)
    digest = hashlib.sha256()
    if files.folder is not None and not any(_on_hub(files.parts[name]) for name in PARTS):
        digest.update(hashlib.sha256(_without_controls(files.folder / "config.json")).digest())
        tokenizer = files.tokenizer()
        digest.update(_file_digest(tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer))
    else:
        digest.update(json.dumps(_plain(files.config.to_json()), sort_keys=True).encode())
    for name in PARTS:
        _update(digest, files.parts[name])
    return digest.hexdigest()[:16]


def part_hash(files: ModelFiles, name: str) -> str:
    """16 hex digits of the SHA-256 over the weights of one part, such as "control-edge"; as in `model_hash`."""
    digest = hashlib.sha256()
    _update(digest, files.parts[name])
    return digest.hexdigest()[:16]


def _update(digest: Any, part: Part) -> None:
    if _on_hub(part):
        digest.update(part.identity.encode())
        return
    for path in tensor_files(part.find()) + ([] if part.over is None else [part.over]):
        digest.update(_file_digest(path))


def _on_hub(part: Part) -> bool:
    """Whether it is a file of a hub, which its identity names with a revision; that of a file here begins with its
    place."""
    return "@" in part.identity and not Path(part.identity).is_absolute()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("training", "controls")}


def _without_controls(path: Path) -> bytes:
    """A config.json of ours as it was before it was given control branches."""
    content = path.read_bytes()
    values = json.loads(content)
    if "controls" not in values:
        return content
    training = {key: value for key, value in values.get("training", {}).items() if key != "controls"}
    rest = {key: value for key, value in values.items() if key != "controls"} | {"training": training}
    return (json.dumps(rest, indent=2) + "\n").encode()


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
