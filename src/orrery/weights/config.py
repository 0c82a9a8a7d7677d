"""config.json of a model folder: every option of its networks and how it wants to be sampled; checked key by key."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from orrery.errors import InputError, one_line
from orrery.kinds import KINDS, control_kind
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.nn.dit import DiTConfig
from orrery.nn.empty import shapes_only
from orrery.nn.text import TextConfig
from orrery.nn.vae import VAEConfig

SOLVERS = ("unipc", "euler", "renoise")
SCHEDULES = ("shift", "karras", "distilled")
VAE_DTYPES = ("float32", "bfloat16")
CONVENTIONS = ("official", "diffusers")
HANDOVERS = ("latents", "frames")
EMPTY_PROMPTS = ("zeros", "encoded")


@dataclass(frozen=True)
class Sampling:
    """How a model wants to be sampled; the defaults are those of the published pre-trained models.

    schedule "shift" and "distilled" use `shift`; "karras" does not. exact_times: the network is told 1000 sigma, not
    its whole part. steps: of the solver; "karras" asks the network once more.
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
class ActionConfig:
    """Of a model that is told what a robot does: an action a frame, A numbers each.

    names: of the A numbers. mean, std: [A], of the actions it was trained on; the network is told (a - mean) / std.
    scale: [A] or empty, factors that belong to the published definition of an action and come before that (20 for the
    six of the pose, 1 for the gripper). low, high: [A] or empty, what an action may be.
    window: latent frames that the network sees at once, given and new. given: how many of them are given at most.
    handover: what goes on from one call to the next: "latents", the latest as they are; "frames", the latest frame,
    encoded anew (as published).
    empty_prompt: what stands in place of the text where there is no prompt: "zeros", or "encoded": what the text
    encoder makes of no words (as published, which saw zeros as well, for one clip in five).
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    window: int = 4
    given: int = 1
    handover: str = "frames"
    empty_prompt: str = "zeros"

    def __post_init__(self) -> None:
        for name in ("names", "mean", "std", "scale", "low", "high"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if len(value) != len(self.names) and (value or name in ("mean", "std")):
                raise ValueError(f"actions: {name} has {len(value)} values for {len(self.names)} names")
        if not self.names:
            raise ValueError("actions: names is empty; an action has at least 1 number")
        numbers = (*self.mean, *self.std, *self.scale, *self.low, *self.high)
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise ValueError(f"actions: all numbers must be finite and std above 0, std is {self.std}")
        if not 1 <= self.given < self.window:
            raise ValueError(f"actions: given is {self.given}, allowed is 1 to window - 1 = {self.window - 1}")
        if self.handover not in HANDOVERS:
            raise ValueError(f"actions: handover is {self.handover!r}; allowed are {', '.join(HANDOVERS)}")
        if self.empty_prompt not in EMPTY_PROMPTS:
            raise ValueError(f"actions: empty_prompt is {self.empty_prompt!r}; allowed are {', '.join(EMPTY_PROMPTS)}")

    @property
    def dimensions(self) -> int:
        """A."""
        return len(self.names)

    def told(self, actions: Any) -> torch.Tensor:
        """What the network is told of actions [..., A] (an array or a tensor): times `scale`, then (a - mean) / std;
        float32."""
        values = torch.as_tensor(actions, dtype=torch.float32)
        if self.scale:
            values = values * values.new_tensor(self.scale)
        return (values - values.new_tensor(self.mean)) / values.new_tensor(self.std)


@dataclass(frozen=True)
class ModelConfig:
    """Everything in config.json.

    frames (4k + 1), resolution (H, W): the model's native size in pixels. trained_sizes: other (H, W) that it was
    trained at; outside them `generate` warns, but for a model that names none. any_length: shorter videos are drawn at
    their own length; otherwise a native one is drawn and cut. text_only: it was published for Text2World alone.
    vae_dtype: of the VAE on a GPU; on a CPU it is float32. shared: parts ("vae", "text") that lie not in the model's
    folder but are components of the catalogue, or of an embedded model, by name (see `components`). controls: the
    control branches beside the transformer, by kind (in the order of KINDS). actions: of a model that is told what a
    robot does. own_decoder: some weights of the decoder of a shared VAE lie in the model's folder, tuned to its
    pictures; latents are the shared VAE's all the same. training: where the weights come from; not interpreted.
    """

    transformer: DiTConfig
    vae: VAEConfig
    text: TextConfig
    sampling: Sampling
    fps: float
    frames: int
    resolution: tuple[int, int]
    trained_sizes: tuple[tuple[int, int], ...] = ()
    any_length: bool = False
    text_only: bool = False
    vae_dtype: str = "float32"
    shared: Mapping[str, str] = field(default_factory=dict)
    controls: Mapping[str, ControlConfig] = field(default_factory=dict)
    actions: ActionConfig | None = None
    own_decoder: bool = False
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "resolution", tuple(self.resolution))
        object.__setattr__(self, "trained_sizes", tuple(tuple(size) for size in self.trained_sizes))
        if self.vae_dtype not in VAE_DTYPES:
            raise ValueError(f"vae_dtype is {self.vae_dtype!r}; allowed are {', '.join(VAE_DTYPES)}")
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
        per_latent = 0 if self.actions is None else self.actions.dimensions * self.vae.temporal_factor
        if self.transformer.actions != per_latent:
            raise ValueError(
                f"the transformer takes {self.transformer.actions} numbers of actions a latent frame, "
                f"the config's actions have {per_latent}"
            )
        if self.own_decoder and "vae" not in self.shared:
            raise ValueError("own_decoder is of a model that shares its VAE, which this one does not")
        object.__setattr__(self, "controls", _ordered(self.controls))
        for kind, control in self.controls.items():
            try:
                with shapes_only():
                    ControlBranch(self.transformer, control)
            except ValueError as error:
                raise ValueError(f"control {kind}: {error}") from error

    def with_conventions(self, conventions: str | None) -> "ModelConfig":
        """The same weights under the numerical conventions of the official code or of diffusers; None: as it is.

        Official: rotary exponents rounded to bfloat16 as the weights were trained with, and times truncated to whole
        numbers. diffusers: neither, and given frames are always told time 0.1. Specification, section 6.
        """
        if conventions is None:
            return self
        if conventions not in CONVENTIONS:
            raise InputError(f"conventions is {conventions!r}; allowed are {', '.join(CONVENTIONS)}")
        official = conventions == "official"
        sampling = dataclasses.replace(self.sampling, exact_times=not official)
        if not official:
            sampling = dataclasses.replace(sampling, conditional_timestep=0.1)
        transformer = dataclasses.replace(self.transformer, rope_bf16=official)
        return dataclasses.replace(self, transformer=transformer, sampling=sampling)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `from_json`; what a model has not is not spoken of."""
        values = dataclasses.asdict(self)
        return {key: value for key, value in values.items() if key not in ("actions", "own_decoder") or value}

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "ModelConfig":
        """A ModelConfig from parsed JSON.

        Raises:
            ValueError: a missing or unknown key, an impossible value.
        """
        parts = {"transformer": DiTConfig, "vae": VAEConfig, "text": TextConfig, "sampling": Sampling}
        _check_keys(ModelConfig, values, "config.json")
        built: dict[str, Any] = {name: _dataclass(part, values[name], name) for name, part in parts.items()}
        controls = values.get("controls", {})
        if not isinstance(controls, Mapping):
            raise ValueError(f"controls must be a table of branches by kind, got {controls!r}")
        built["controls"] = {
            kind: _dataclass(ControlConfig, branch, f"control {kind}") for kind, branch in controls.items()
        }
        actions = values.get("actions")
        built["actions"] = None if actions is None else _dataclass(ActionConfig, actions, "actions")
        return ModelConfig(**dict(values) | built)


T = TypeVar("T")


def _ordered(controls: Mapping[str, ControlConfig]) -> dict[str, ControlConfig]:
    """By the names and in the order of KINDS."""
    named = {control_kind(name): control for name, control in controls.items()}
    if len(named) < len(controls):
        raise ValueError(f"controls names a kind twice: {', '.join(controls)}")
    return {kind: named[kind] for kind in KINDS if kind in named}


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
        raise InputError(f"{path}: {one_line(error)}") from error
