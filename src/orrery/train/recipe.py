"""Recipes: what a training run is, as TOML checked by pydantic.

Unknown keys and impossible values are refused with the key, the value and what is allowed.
"""

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orrery.errors import InputError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecipe(_Table):
    """Which clips. Paths are relative to the working directory."""

    root: Path
    heldout_from: int  # clips whose seed is this or larger are held out
    scenes: tuple[str, ...] = ()  # empty: all
    looks: tuple[str, ...] = ()
    max_objects: Count | None = None
    max_clips: Count | None = None
    frames: Annotated[int, Field(ge=1)] = 17
    size: tuple[Count, Count] = (64, 64)
    cache_gb: Weight = 4.0

    @model_validator(mode="after")
    def _whole_latents(self) -> "DataRecipe":
        if self.frames % 4 != 1:
            raise ValueError(f"frames = {self.frames}; allowed: 4k + 1 (1, 5, 9, 13, 17, ...)")
        return self


class OptimizerRecipe(_Table):
    """Peak learning rates: linear warm-up, `hold` (a fraction of the steps that remain) at the peak, decay to zero."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-3  # AdamW's peak
    matrix_lr: Rate | None = None  # Muon's peak
    weight_decay: Fraction = 0.01
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    warmup: Annotated[int, Field(ge=0)] = 100
    hold: Fraction = 0.0
    decay: Literal["linear", "cosine", "none"] = "linear"
    clip: Annotated[float, Field(gt=0)] = 1.0  # global norm of the gradient
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999

    @model_validator(mode="after")
    def _muon_has_its_rate(self) -> "OptimizerRecipe":
        if (self.name == "muon") != (self.matrix_lr is not None):
            raise ValueError(
                f"name = {self.name!r} with matrix_lr = {self.matrix_lr}; matrix_lr belongs to muon, which needs it"
            )
        return self


class CheckpointRecipe(_Table):
    """Checkpoints are written every `seconds`, and every `steps` where that is set; the last `keep` stay."""

    seconds: Annotated[float, Field(gt=0)] = 300.0
    steps: Count | None = None
    keep: Count = 2


class ValidateRecipe(_Table):
    """Every `steps`: held-out numbers over `clips` clips and a contact sheet of `sheet` clips, with the EMA weights."""

    steps: Count = 1000
    clips: Count = 32
    sheet: Annotated[int, Field(ge=0, le=16)] = 4


class LogRecipe(_Table):
    """A line in log.jsonl every `steps`; TensorBoard files too where asked (extra `train`)."""

    steps: Count = 20
    tensorboard: bool = False


class _Run(_Table):
    out: Path  # the run directory
    steps: Count
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on a GPU, fp32 on a CPU; weights are fp32
    threads: Count | None = None
    compile: bool = False  # torch.compile for the steps, where there is a compiler: slow at first, then faster
    batch: Count = 8
    optimizer: OptimizerRecipe = OptimizerRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    validation: ValidateRecipe = ValidateRecipe()
    log: LogRecipe = LogRecipe()


class _ClipRun(_Run):
    data: DataRecipe


class NetworkRecipe(_Table):
    """A preset's name, and the fields of its config that differ."""

    preset: str = "mini"
    override: dict[str, Any] = {}


class TextRecipe(NetworkRecipe):
    """frozen: keep the text encoder as it was drawn; what words mean is then left to the cross-attention."""

    frozen: bool = False


class VAELossRecipe(_Table):
    """Weights of the terms; pixels are in [-1, 1]. `foreground` multiplies things, where a clip has segmentation."""

    l1: Weight = 1.0
    l2: Weight = 1.0
    foreground: Annotated[float, Field(ge=1)] = 1.0
    sharpness: Literal["none", "sobel", "fft"] = "sobel"
    sharpness_weight: Weight = 0.5
    kl: Annotated[float, Field(ge=0, le=1e-2)] = 1e-5


class VAERecipe(_ClipRun):
    """Train a VAE on pixels."""

    task: Literal["vae"]
    vae: NetworkRecipe = NetworkRecipe()
    loss: VAELossRecipe = VAELossRecipe()
    flip: Fraction = 0.5
    subclip: Fraction = 0.0  # share of batches that are shorter, 4k + 1 frames from a random start
    statistics_clips: Count = 512  # clips for the latents' mean and std


class FlowLossRecipe(_Table):
    """The objective of rectified flow (spec training.md, 1)."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: Annotated[float, Field(gt=0, le=100)] = 1.0
    high_noise_fraction: Fraction = 0.05
    condition: tuple[Fraction, Fraction, Fraction] = (0.3, 0.35, 0.35)  # P(0, 1, 2 given latent frames)
    conditional_timestep: Annotated[float, Field(ge=0, le=1000)] | None = 0.0  # None: same as the rest
    text_dropout: Fraction = 0.15
    caption_cut: Fraction = 0.0  # share of captions without their last clause (it names the look of our worlds)
    draws: Count = 1  # noise draws a clip and batch
    midstream: Fraction = 0.0  # share of batches without the clip's first latent frame: a chunk continued, 1 or 2 given

    @model_validator(mode="after")
    def _sums_to_one(self) -> "FlowLossRecipe":
        if abs(sum(self.condition) - 1) > 1e-6:
            raise ValueError(
                f"condition = {list(self.condition)} sums to {sum(self.condition):g}; allowed: probabilities with sum 1"
            )
        return self


class LatentRecipe(_Table):
    """The trained VAE (a directory with config.json and vae.safetensors), and whether mirrored clips are cached too."""

    vae: Path
    mirror: bool = True
    batch: Count = 8


class FlowValidateRecipe(ValidateRecipe):
    """Held-out velocity loss at fixed `times`, and samples."""

    times: tuple[Fraction, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    sample_steps: Count = 20
    guidance: Weight = 1.0


class FlowRecipe(_ClipRun):
    """Train a transformer and its text encoder, jointly, on cached latents."""

    task: Literal["flow"]
    latents: LatentRecipe
    transformer: NetworkRecipe = NetworkRecipe()
    text: TextRecipe = TextRecipe()
    loss: FlowLossRecipe = FlowLossRecipe()
    validation: FlowValidateRecipe = FlowValidateRecipe()


class BranchRecipe(_Table):
    """A control branch (see orrery.nn.control), and the signal that it sees.

    strength: of edge and blur: a preset's name, or "random": each clip's own draw over the range of training of the
    published models (specification of training, section 6.6).
    """

    kind: Literal["edge", "blur", "depth", "seg"]
    blocks: Count = 4
    every: Count = 7
    channels: Count = 128
    strength: str = "random"


class ControlLatentRecipe(_Table):
    """Whether mirrored clips are cached too, and how many clips are encoded together. The VAE is the base model's."""

    mirror: bool = True
    batch: Count = 8


class ControlRecipe(_ClipRun):
    """Train a control branch beside a frozen model, on its cached latents and those of the control videos.

    base: a named model or a model folder; it is not changed.
    """

    task: Literal["control"]
    base: str = "mini"
    control: BranchRecipe
    latents: ControlLatentRecipe = ControlLatentRecipe()
    loss: FlowLossRecipe = FlowLossRecipe()
    validation: FlowValidateRecipe = FlowValidateRecipe()


class EpisodeRecipe(_Table):
    """Which episodes (see orrery.data.episodes). The last `heldout` of the dataset are held out."""

    root: Path
    heldout: Count = 64
    max_episodes: Count | None = None
    camera: str | None = None  # of a dataset with several


class WindowRecipe(_Table):
    """What the model sees and is asked for: windows of `latents` latent frames, some of them shorter, in which 1 to
    `given` are given. The model will be used with such windows."""

    latents: Annotated[int, Field(ge=2)] = 4
    given: Count = 3
    shorter: Fraction = 0.3  # share of batches with fewer latent frames: a rollout begins with one
    start: Fraction = 0.15  # share of windows that begin where an episode does
    noise: Fraction = 0.1  # given frames get noise of up to this: what they are given later is their own work
    handover: Literal["latents", "frames"] = "latents"

    @model_validator(mode="after")
    def _leaves_something(self) -> "WindowRecipe":
        if self.given >= self.latents:
            raise ValueError(f"given = {self.given}; allowed: less than latents = {self.latents}")
        return self


class ActionLossRecipe(_Table):
    """The objective of rectified flow, as in FlowLossRecipe."""

    distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    shift: Annotated[float, Field(gt=0, le=100)] = 3.0
    high_noise_fraction: Fraction = 0.05
    conditional_timestep: Annotated[float, Field(ge=0, le=1000)] | None = 0.0


class ActionValidateRecipe(FlowValidateRecipe):
    """As FlowValidateRecipe; `rollout` latent frames are drawn for the sheet, and for the error of a rollout."""

    sample_steps: Count = 8
    guidance: Weight = 0.0
    rollout: Count = 12


class ActionRecipe(_Run):
    """Post-train a model on episodes, told what the robot does (specification of Transfer, section 4.6).

    base: a named model or a model folder; it is not changed. blocks: which of its blocks are kept; empty: all.
    scale: factors of the A numbers of an action, where its definition has them.
    """

    task: Literal["action"]
    base: str = "mini"
    blocks: tuple[Annotated[int, Field(ge=0)], ...] = ()
    scale: tuple[float, ...] = ()
    data: EpisodeRecipe
    window: WindowRecipe = WindowRecipe()
    loss: ActionLossRecipe = ActionLossRecipe()
    validation: ActionValidateRecipe = ActionValidateRecipe()


class DecoderLossRecipe(_Table):
    """Weights of the terms, as in VAELossRecipe. `foreground` multiplies what differs from the empty scene, the median
    of first frames: for a camera that stands still."""

    l1: Weight = 1.0
    l2: Weight = 1.0
    foreground: Annotated[float, Field(ge=1)] = 1.0
    sharpness: Literal["none", "sobel", "fft"] = "none"
    sharpness_weight: Weight = 0.5
    noise: Fraction = 0.05  # latents get noise of up to this: what is decoded later was drawn by a model


class DecoderRecipe(_Run):
    """Tune the decoder of a shared VAE to a model's pictures; the encoder, and so the latents, stay.

    base: whose VAE. parts: prefixes of the weights that are tuned. frames: of a window.
    """

    task: Literal["decoder"]
    base: str = "mini"
    parts: Annotated[tuple[str, ...], Field(min_length=1)] = ("decoder.",)
    frames: Annotated[int, Field(ge=5)] = 17
    size: tuple[Count, Count] = (64, 64)
    data: EpisodeRecipe
    loss: DecoderLossRecipe = DecoderLossRecipe()


class PreviewLossRecipe(_Table):
    """Weights of the terms, against the VAE's own pictures of the same latents; pixels are in [-1, 1]."""

    l1: Weight = 1.0
    l2: Weight = 4.0
    noise: Fraction = 0.0  # latents get noise of up to this: what is watched is still on its way


class PreviewRecipe(_ClipRun):
    """Distil a VAE's decoder into a tiny one (orrery.nn.preview).

    base: whose VAE; a named model or a model folder, which is not changed. data.cache_gb: of the VAE's pictures too.
    """

    task: Literal["preview"]
    base: str = "mini"
    latents: ControlLatentRecipe = ControlLatentRecipe()
    preview: NetworkRecipe = NetworkRecipe()
    loss: PreviewLossRecipe = PreviewLossRecipe()


Recipe = VAERecipe | FlowRecipe | ControlRecipe | ActionRecipe | DecoderRecipe | PreviewRecipe
_TASKS: dict[str, Any] = {
    "vae": VAERecipe,
    "flow": FlowRecipe,
    "control": ControlRecipe,
    "action": ActionRecipe,
    "decoder": DecoderRecipe,
    "preview": PreviewRecipe,
}

# What a resumed run may change: it moves the end, the place or the reporting, not what the steps so far were.
RESUMABLE = frozenset(
    "steps device precision threads compile out checkpoint validation log data.root data.cache_gb latents.vae"
    " latents.batch statistics_clips".split()
)


def load_recipe(path: Path, sets: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; `sets` are `key=value` with dots for tables, values as in TOML (bare words are strings).

    Raises:
        InputError: no such file, not TOML, unknown key or impossible value; the message names all three.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {path} could not be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from None
    for item in sets:
        _apply_set(tree, item)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check a parsed recipe.

    Raises:
        InputError: the first fault, with the key, the value and what is allowed.
    """
    task = tree.get("task")
    if not isinstance(task, str) or task not in _TASKS:
        raise InputError(f"{name}: task = {task!r}; allowed: {', '.join(_TASKS)}")
    try:
        return _TASKS[task].model_validate(tree)
    except ValidationError as error:
        raise InputError(f"{name}: {_explain(_TASKS[task], error)}") from None


def _apply_set(tree: dict[str, Any], item: str) -> None:
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {item!r}: allowed: key=value, such as optimizer.lr=0.001")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *tables, last = key.strip().split(".")
    for table in tables:
        tree = tree.setdefault(table, {})
        if not isinstance(tree, dict):
            raise InputError(f"--set {item!r}: {table} is no table")
    tree[last] = value


def _explain(model: type[BaseModel], error: ValidationError) -> str:
    """The first fault of a ValidationError in one line: key, value, what is allowed."""
    fault = error.errors(include_url=False)[0]
    where = [str(part) for part in fault["loc"]]
    key = ".".join(where) or "recipe"
    if fault["type"] == "extra_forbidden":
        table: type[BaseModel] = model
        for part in where[:-1]:
            annotation = table.model_fields[part].annotation if part in table.model_fields else None
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                table = annotation
        return f"unknown key {key} = {fault['input']!r}; allowed: {', '.join(table.model_fields)}"
    if fault["type"] == "missing":
        return f"missing key {key}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}: {message}" if where else message
    allowed = message.removeprefix("Input should be ").partition(", unable")[0]
    if fault["input"] != fault["input"]:
        allowed = "a number, not nan"
    return f"{key} = {fault['input']!r}; allowed: {allowed}"


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(key, old, new) of every difference between two recipes as JSON that a resumed run may not make."""
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(old.keys() | new.keys()):
        name = prefix + key
        if name in RESUMABLE:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += changed_keys(before, after, name + ".")
        elif before != after:
            found.append((name, before, after))
    return found


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe, defaults filled in, as plain JSON types."""
    return json.loads(recipe.model_dump_json())
