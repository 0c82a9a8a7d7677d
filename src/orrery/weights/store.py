"""Saving and loading a model folder: config.json, three safetensors files, the tokenizer, the card.

Loading is strict: a key too many, a key too few, a shape that differs, an unknown option are errors that name it.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from torch import Tensor, nn

from orrery.errors import InputError
from orrery.files import atomic_folder
from orrery.nn.dit import DiT, DiTConfig
from orrery.nn.text import TextConfig, TextEncoder
from orrery.nn.vae import VAE, VAEConfig

PARTS = ("transformer", "vae", "text")
SOLVERS = ("unipc", "euler")
SCHEDULES = ("shift", "karras")


@dataclass(frozen=True)
class Sampling:
    """How a model wants to be sampled; the defaults are those of the published pre-trained models.

    schedule "shift" uses `shift`; "karras" does not. exact_times: the network is told 1000 sigma, not its whole part.
    guidance: g of v_c + g (v_c - v_u). conditional_timestep: time that given frames are told, None for that of the
    others. negative_prompt: text of v_u; None for zeros in place of the text.
    """

    solver: str = "unipc"
    schedule: str = "shift"
    shift: float = 5.0
    exact_times: bool = False
    steps: int = 35
    guidance: float = 7.0
    conditional_timestep: float | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {self.solver!r}; allowed are {', '.join(SOLVERS)}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; allowed are {', '.join(SCHEDULES)}")
        if self.steps < 1 or not self.shift > 0 or not (self.guidance >= 0 and math.isfinite(self.guidance)):
            raise ValueError(
                f"steps must be at least 1, shift above 0 and guidance at least 0, "
                f"got {self.steps}, {self.shift}, {self.guidance}"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Everything in config.json. frames (4k + 1) and resolution (H, W) are the model's native size in pixels;
    `training` records where the weights come from and is not interpreted."""

    transformer: DiTConfig
    vae: VAEConfig
    text: TextConfig
    sampling: Sampling
    fps: float
    frames: int
    resolution: tuple[int, int]
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", tuple(self.resolution))
        if self.frames % 4 != 1 or self.frames < 5:
            raise ValueError(f"frames must be 4k + 1 and at least 5, got {self.frames}")
        if len(self.resolution) != 2 or min(self.resolution) < 1:
            raise ValueError(f"resolution must be [H, W], got {list(self.resolution)}")
        if not self.fps > 0:
            raise ValueError(f"fps must be above 0, got {self.fps}")
        if self.transformer.text_width != self.text.text_dim:
            raise ValueError(
                f"the transformer takes text of width {self.transformer.text_width}, "
                f"the text encoder gives {self.text.text_dim}"
            )
        if self.transformer.latent_channels != self.vae.latent_channels:
            raise ValueError(
                f"the transformer has {self.transformer.latent_channels} latent channels, "
                f"the VAE {self.vae.latent_channels}"
            )

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `from_json`."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "ModelConfig":
        """A ModelConfig from parsed JSON.

        Raises:
            ValueError: a missing or unknown key, an impossible value.
        """
        parts = {"transformer": DiTConfig, "vae": VAEConfig, "text": TextConfig, "sampling": Sampling}
        _check_keys(ModelConfig, values, "config.json")
        built: dict[str, Any] = {name: _dataclass(part, values[name], name) for name, part in parts.items()}
        return ModelConfig(**dict(values) | built)


@dataclass(frozen=True)
class Model:
    """The three networks of a model and its config."""

    config: ModelConfig
    transformer: DiT
    vae: VAE
    text: TextEncoder


T = TypeVar("T")


def _check_keys(kind: type, values: Any, where: str) -> None:
    """Refuse what is not a dict with exactly the fields of `kind` (those with a default may be left out)."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of options, got {values!r}")
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            raise ValueError(f"{where} has the unknown key {key!r}; allowed are {', '.join(fields)}")
    for name, item in fields.items():
        optional = item.default is not dataclasses.MISSING or item.default_factory is not dataclasses.MISSING
        if not optional and name not in values:
            raise ValueError(f"{where} lacks the key {name!r}")
    hints = get_type_hints(kind)
    for key, value in values.items():
        if not _fits(hints[key], value):
            kinds = getattr(hints[key], "__name__", None) if get_origin(hints[key]) is None else None
            raise ValueError(f"{where}: {key} is {value!r}; allowed is {kinds or hints[key]}")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a JSON value can be what a config's field is annotated as; kinds that JSON has no word for always do."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(choice, value) for choice in inner)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        return len(kinds) == len(value) and all(map(_fits, kinds, value))
    if hint in (int, float):
        return isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
    return not isinstance(hint, type) or hint not in (str, bool, NoneType) or isinstance(value, hint)


def _dataclass(kind: type[T], values: Any, where: str) -> T:
    _check_keys(kind, values, where)
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


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
        (partial / "config.json").write_text(json.dumps(config.to_json(), indent=2) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")
    return Path(folder)


def _stored(name: str, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    weights = {}
    for key, value in module.state_dict().items():
        weights[key] = value.detach().to("cpu", dtype).contiguous().clone()
        if not bool(weights[key].isfinite().all()):
            raise ValueError(f"{name}: {key} is not finite in {str(dtype).removeprefix('torch.')}")
    return weights


def load_model(
    folder: str | PathLike[str], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """Read a model folder, in evaluation mode.

    Args:
        device, dtype: of the transformer and the text encoder; the VAE is float32 always.

    Raises:
        InputError: a file is missing or broken; config.json has an unknown key or an impossible value; the weights
            have a key too many, a key too few, or another shape.
    """
    folder = Path(folder)
    config = read_config(folder)
    try:
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises plain Exception for a missing and for a broken file
        raise InputError(f"cannot read {folder / 'tokenizer.json'}: {_one_line(error)}") from error
    try:
        with torch.device("meta"):  # no time spent on random weights that are about to be replaced
            model = Model(config, DiT(config.transformer), VAE(config.vae), TextEncoder(config.text, tokenizer))
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: {_one_line(error)}") from error
    for name in PARTS:
        module: nn.Module = getattr(model, name)
        _load(module, folder / f"{name}.safetensors", device, torch.float32 if name == "vae" else dtype)
        module.eval().requires_grad_(False)
    return model


def read_config(folder: Path) -> ModelConfig:
    """The config.json of a model folder.

    Raises:
        InputError: missing, not JSON, an unknown or missing key, an impossible value.
    """
    path = folder / "config.json"
    try:
        return ModelConfig.from_json(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:  # JSON errors are ValueErrors
        raise InputError(f"{path}: {_one_line(error)}") from error


def _load(module: nn.Module, path: Path, device: torch.device | str, dtype: torch.dtype) -> None:
    """Put the tensors of a file into a module that is still on the meta device."""
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {_one_line(error)}") from error
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of {len(wanted)} weights, the first is {missing[0]}")
    if unknown:
        raise InputError(f"{path} holds {len(unknown)} unknown weights, the first is {unknown[0]}")
    for key, value in weights.items():
        if value.shape != wanted[key].shape:
            raise InputError(f"{path}: {key} is {list(value.shape)}, config.json asks for {list(wanted[key].shape)}")
    module.load_state_dict({key: value.to(device, dtype) for key, value in weights.items()}, assign=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def model_hash(folder: str | PathLike[str]) -> str:
    """16 hex digits of the SHA-256 over config, tokenizer and weights: which model made this video."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", *(f"{part}.safetensors" for part in PARTS)):
        with open(Path(folder) / name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
