"""Transfer: what a video shows, drawn anew. Control branches hold the structure, the prompt says how it looks.

Sim2Real and Real2Real (arXiv 2511.00062; Cosmos-Transfer2.5, specification of Transfer, sections 1 to 3). Every kind of
control is a video as long as the input; it goes through the same VAE, and its branch adds its share to the one base
pass. A long input is drawn in chunks. With `handover="latents"` the whole control video is encoded once, as a stream,
and each chunk takes its part of it; with "frames" each chunk is decoded, and it, its control and what is handed on are
encoded from its own first frame, as the official code does.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orrery.control.masks import guidance_mask, normalised, read_mask, weight_maps
from orrery.control.signals import kind_of, make_signal, read_signal
from orrery.errors import InputError
from orrery.flow import FrameCondition, Schedule, held, start_at
from orrery.nn.conditions import Control
from orrery.nn.control import ActiveControl, ControlBranch
from orrery.video import Video
from orrery.world.plan import Plan
from orrery.world.request import GIVEN_LATENTS, MOST_FRAMES, Request, Start, as_video, settle, whole

if TYPE_CHECKING:
    from orrery.world.world import Progress, World

Source = Video | str | os.PathLike[str] | np.ndarray
Velocity = Callable[[Tensor, float], Tensor]
GUIDED_STEP = 25  # the last step, counted from 0, of guided generation


@dataclass(frozen=True)
class Signal:
    """One kind of control, as a user asks for it.

    source: its control video: a Video, a file, an array [T, H, W, 3], or a simulator's depth.npz or segmentation.npz;
    None: it is made of the input video. weight: 0 to 1. mask: where it acts, 0 to 1: a video, an image, a file of
    either, an array [T, H, W]; None for everywhere. strength: preset of edge or blur. prompt: what a segmentation
    looks for. models: what stands in for the published depth and segmentation models (see `orrery.control.models`).
    trim: let a longer control video end with the input.
    """

    source: Source | None = None
    weight: float = 1.0
    mask: Any = None
    strength: str | None = None
    prompt: str | None = None
    models: Any = None
    trim: bool = False


@dataclass(frozen=True)
class Prepared:
    """One kind of control, ready: its video at the size and length of what is drawn; weight as asked for; mask
    [T, H, W] float32 or None."""

    kind: str
    video: Video
    weight: float
    mask: np.ndarray | None


@dataclass(frozen=True)
class TransferRequest:
    """What is to be drawn, with every number settled and checked.

    base: prompt, sampling, seed, size, frames (4k + 1, at least the output's), handover. signals: in the published
    order of kinds. source: the input at `base.size`, or None where only control videos were given. length, fps,
    out_size: of the output. image: [H, W, 3] uint8 reference, or None. hold: [1, 1, T', H', W'] where `source` is held
    in the first steps, hold_until: the last of them. sigma: None, or the noise level that `source` is drawn from.
    """

    base: Request
    signals: tuple[Prepared, ...]
    source: Video | None
    length: int
    fps: float
    out_size: tuple[int, int]
    chunk: int
    image: np.ndarray | None = None
    hold: Tensor | None = None
    hold_until: int = GUIDED_STEP
    sigma: float | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the signals that act at all."""
        return tuple(signal.kind for signal in self.signals if signal.weight > 0)


@dataclass(frozen=True)
class Transferred:
    """video: the result. controls: the control videos it followed, by kind, at the size that was drawn. source: the
    input in the result's size, or None."""

    video: Video
    controls: Mapping[str, Video]
    source: Video | None


@dataclass(frozen=True)
class Edit:
    """What acts on one chunk beside the text: control branches, and the known latents [1, C, T, H, W] that are held
    (`hold`) or drawn over (`sigma`)."""

    controls: Sequence[Control]
    known: Tensor | None = None
    hold: Tensor | None = None
    hold_until: int = 0
    sigma: float | None = None
    exact_times: bool = False

    def begin(
        self, velocity: Velocity, schedule: Schedule, given: FrameCondition, noise: Tensor
    ) -> tuple[Velocity, Schedule, Tensor]:
        """The velocity field, schedule and starting latents of this edit."""
        if self.known is None:
            return velocity, schedule, noise
        x = noise
        if self.sigma is not None:
            schedule = start_at(schedule, self.sigma, self.exact_times)
            level = float(schedule.sigmas[0])
            x = (1 - level) * given.replace(self.known) + level * noise
        if self.hold is not None:
            velocity = held(velocity, schedule, self.known, noise, self.hold, self.hold_until)
        return velocity, schedule, x


def settle_transfer(
    world: "World",
    prompt: str,
    video: Start | None,
    controls: Mapping[str, Signal | Source | None],
    *,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    keep_size: bool = True,
    frames: int | None = None,
    fps: float | None = None,
    chunk: int | None = None,
    overlap: int = GIVEN_LATENTS,
    handover: str = "latents",
    image: Start | None = None,
    hold: Any = None,
    hold_labels: Sequence[int] | None = None,
    hold_until: int = GUIDED_STEP,
    sigma_max: float | None = None,
    **sampling: Any,
) -> TransferRequest:
    """Check and settle the arguments of `World.transfer`, control videos included; nothing is drawn.

    Raises:
        InputError: whatever cannot be; see `World.transfer`.
    """
    signals = _asked(world, controls)
    source = None if video is None else as_video(video, MOST_FRAMES, world.config.fps)
    length, rate, shape = _extent(source, signals)
    size = _size(world, size, shape)
    drawn_source = None if source is None else _stretched(source, size)
    prepared = tuple(_prepare(kind, signal, drawn_source, size, length, rate) for kind, signal in signals.items())
    picks = _picks(length, rate, fps, frames)
    if fps is not None:
        rate = float(fps)
    prepared = tuple(_picked(signal, picks, rate) for signal in prepared)
    if drawn_source is not None:
        drawn_source = Video(drawn_source.frames[picks], rate)
    normalised([signal.weight for signal in prepared])  # refuses what cannot be weights
    length = len(picks)
    if not 0 <= overlap <= GIVEN_LATENTS or (overlap == 0 and handover != "frames"):
        raise InputError(f"overlap is {overlap}; allowed are 1 and {GIVEN_LATENTS}, and 0 with handover 'frames'")
    factor = world.factors.temporal
    base = settle(
        world.config, world.model.reader, world.name, prompt, None,
        seed=seed, frames=-(-(length - 1) // factor) * factor + 1, size=size, overlap=max(overlap, 1),
        handover=handover, **sampling,
    )  # fmt: skip
    base = replace(base, overlap=overlap)
    request = TransferRequest(
        base, prepared, drawn_source, length, rate, shape if keep_size else size, _chunk(world, chunk, overlap)
    )
    request = _with_reference(world, request, image)
    return _with_known(request, world, hold, hold_labels, hold_until, sigma_max)


def _asked(world: "World", controls: Mapping[str, Signal | Source | None]) -> dict[str, Signal]:
    """Signals by kind, in the order of the model's branches, whatever the order they were asked for in."""
    if not controls:
        raise InputError("a transfer needs at least one control; allowed are edge, blur, depth and seg")
    asked: dict[str, Signal] = {}
    for name, value in controls.items():
        kind = kind_of(name)
        if kind in asked:
            raise InputError(f"the control {kind} is asked for twice")
        asked[kind] = value if isinstance(value, Signal) else Signal(value)
    if lacking := [kind for kind in asked if kind not in world.config.controls]:
        has = ", ".join(world.config.controls) or "none"
        raise InputError(f"model {world.name!r} has no control branch for {', '.join(lacking)}; it has: {has}")
    return {kind: asked[kind] for kind in world.config.controls if kind in asked}


def _extent(source: Video | None, signals: Mapping[str, Signal]) -> tuple[int, float, tuple[int, int]]:
    """Frames, fps and (H, W) of the input, or of the first control video where there is none."""
    if source is not None:
        return len(source), source.fps, (source.height, source.width)
    for kind, signal in signals.items():
        if signal.source is None:
            raise InputError(
                f"{kind} is to be made of the input video, but there is none: give one, or a control video"
            )
    given = next((s.source for s in signals.values() if _is_video(s.source)), None)
    if given is None:
        raise InputError("give the input video, or a control that is a video: else nothing says how long and how fast")
    video = as_video(given, MOST_FRAMES, 1.0)  # type: ignore[arg-type]
    return len(video), video.fps, (video.height, video.width)


def _is_video(source: Source | None) -> bool:
    return isinstance(source, Video) or (
        isinstance(source, str | os.PathLike) and not str(source).lower().endswith((".npz", ".npy"))
    )


def _size(world: "World", size: tuple[int, int] | None, shape: tuple[int, int]) -> tuple[int, int]:
    """The size that is drawn: as asked for, or the trained one whose aspect ratio is nearest to the input's."""
    if size is not None:
        return size
    trained = world.config.trained_sizes or (world.config.resolution,)
    return min(trained, key=lambda each: abs(math.log(each[1] / each[0]) - math.log(shape[1] / shape[0])))


def _stretched(video: Video, size: tuple[int, int]) -> Video:
    return video.resize(*size, crop=False)


def _prepare(
    kind: str, signal: Signal, source: Video | None, size: tuple[int, int], length: int, fps: float
) -> Prepared:
    if signal.source is None:
        assert source is not None
        options = dict(strength=signal.strength, prompt=signal.prompt, models=signal.models)
        video = make_signal(kind, source, **options)  # type: ignore[arg-type]
    else:
        if signal.strength is not None:
            raise InputError(f"{kind}: a strength is for a control that is made of the input; a control video is given")
        video = read_signal(signal.source, kind, size=size, frames=length, fps=fps, trim=signal.trim)
    mask = None if signal.mask is None else read_mask(signal.mask, size, length)
    if not (isinstance(signal.weight, int | float) and 0 <= signal.weight <= 1):
        raise InputError(f"the weight of {kind} is {signal.weight}; allowed is 0 to 1")
    return Prepared(kind, Video(video.frames, fps), float(signal.weight), mask)


def _picks(length: int, rate: float, fps: float | None, frames: int | None) -> np.ndarray:
    """Which frames of the input are drawn: all, those at another rate, the first so many of them."""
    picks = np.arange(length)
    if fps is not None:
        if not (isinstance(fps, int | float) and 0 < fps <= rate):
            raise InputError(f"fps is {fps}; allowed is above 0 to {rate:g}, the input's")
        count = max(1, math.floor((length - 1) / rate * fps + 1e-6) + 1)
        picks = np.minimum(np.rint(np.arange(count) * rate / fps).astype(int), length - 1)
    if frames is not None:
        picks = picks[: whole("frames", frames, 1, MOST_FRAMES)]
    return picks


def _picked(signal: Prepared, picks: np.ndarray, rate: float) -> Prepared:
    mask = None if signal.mask is None else signal.mask[picks]
    return replace(signal, video=Video(signal.video.frames[picks], rate), mask=mask)


def _chunk(world: "World", chunk: int | None, overlap: int) -> int:
    """Frames that are drawn at once."""
    native, factor = world.config.frames, world.factors.temporal
    if chunk is None:
        return native
    least = 1 + factor * overlap  # one latent beyond those handed on
    if whole("chunk", chunk, 1, native) % factor != 1 or (chunk > 1 and chunk < least):
        raise InputError(
            f"chunk is {chunk}; allowed is {factor}k + 1 from {least} to {native} frames (or 1 for an image)"
        )
    if chunk != native and not world.config.any_length:
        raise InputError(f"chunk is {chunk}; model {world.name!r} draws {native} frames at once")
    return chunk


def _with_reference(world: "World", request: TransferRequest, image: Start | None) -> TransferRequest:
    """The request with its reference image at the size that is drawn."""
    if image is None:
        return request
    if not world.config.transformer.image_context:
        raise InputError(
            f"model {world.name!r} takes no reference image here: published branches do, one at a time, except blur"
        )
    if "blur" in request.kinds:
        raise InputError("a reference image does not go with blur, which keeps the colours of the input")
    height, width = request.base.size
    picture = Image.fromarray(as_video(image, 1, 1.0).frames[-1]).resize((width, height), Image.Resampling.LANCZOS)
    return replace(request, image=np.asarray(picture))


def _with_known(
    request: TransferRequest,
    world: "World",
    hold: Any,
    labels: Sequence[int] | None,
    hold_until: int,
    sigma_max: float | None,
) -> TransferRequest:
    """The request with what it keeps of the input's own pixels."""
    if hold is None and sigma_max is None:
        return request
    if request.source is None:
        raise InputError("guided generation and sigma_max keep something of the input video, but there is none")
    if request.base.sampling.solver == "renoise":
        raise InputError(
            "guided generation and sigma_max are not for distilled models, whose steps begin at pure noise"
        )
    if hold is not None:
        frames = _padded_frames(world, request)
        factors = world.factors
        hold = guidance_mask(
            hold, request.base.size, request.length, labels=labels, padded=frames,
            spatial=factors.spatial, temporal=factors.temporal,
        )  # fmt: skip
        request = replace(request, hold=hold, hold_until=whole("guided steps", hold_until, 0, 1000))
    if sigma_max is not None:
        if not (isinstance(sigma_max, int | float) and 0 < sigma_max <= 200):
            raise InputError(f"sigma_max is {sigma_max}; allowed is above 0 to 200")
        request = replace(request, sigma=sigma_max / (1 + sigma_max))
    return request


def pad_frames(frames: np.ndarray, count: int) -> np.ndarray:
    """[T, ...] continued to `count` frames by going back and forth: the clip, the clip backwards, ... A single frame
    is repeated."""
    while len(frames) < count:
        frames = np.concatenate([frames, frames[::-1]])
    return frames[:count]


@dataclass(frozen=True)
class _Layout:
    """How a video falls into chunks, in latent frames: each draws `native`, and repeats `overlap` of the one before."""

    native: int
    overlap: int
    chunks: int

    @property
    def total(self) -> int:
        """Latent frames of all chunks, as one video."""
        return self.native + (self.chunks - 1) * (self.native - self.overlap)

    def part(self, index: int) -> slice:
        """The latent frames of a chunk."""
        start = index * (self.native - self.overlap)
        return slice(start, start + self.native)


def _layout(world: "World", request: TransferRequest) -> _Layout:
    total = world._latent_frames(request.base.frames)
    native = world._latent_frames(request.chunk)
    if world.config.any_length:
        native = min(native, total)
    overlap = min(request.base.overlap, native - 1)
    if request.base.handover == "frames":
        # in pixels: a chunk decodes to 4 n - 3 frames, of which it repeats 4 o - 3
        factor = world.factors.temporal
        step = (native - 1) * factor + 1 - _repeated(overlap, factor)
        left = request.length - ((native - 1) * factor + 1)
        return _Layout(native, overlap, 1 + max(0, math.ceil(left / step)))
    return _Layout(native, overlap, 1 + max(0, math.ceil((total - native) / (native - overlap))))


def _repeated(overlap: int, factor: int) -> int:
    """Pixel frames that so many latents of a chunk's beginning are."""
    return (overlap - 1) * factor + 1 if overlap else 0


def _padded_frames(world: "World", request: TransferRequest) -> int:
    """Frames of the input that all chunks together look at."""
    layout, factor = _layout(world, request), world.factors.temporal
    if request.base.handover == "frames":
        step = (layout.native - 1) * factor + 1 - _repeated(layout.overlap, factor)
        return (layout.chunks - 1) * step + (layout.native - 1) * factor + 1
    return (layout.total - 1) * factor + 1


@dataclass(frozen=True)
class _Piece:
    """What acts on a chunk: control latents and weights by kind, known latents, where they are held."""

    latents: Mapping[str, Tensor]
    weights: Mapping[str, float | Tensor]
    known: Tensor | None
    hold: Tensor | None

    def edit(self, request: TransferRequest, branches: Mapping[str, ControlBranch]) -> Edit:
        """With the branches that are on the device."""
        controls = [
            ActiveControl(branches[kind], latents, self.weights[kind])
            for kind, latents in self.latents.items()
            if kind in branches and _acts(self.weights[kind])
        ]
        exact = request.base.sampling.exact_times
        return Edit(controls, self.known, self.hold, request.hold_until, request.sigma, exact)


def _acts(weight: float | Tensor) -> bool:
    """Whether a weight is above 0 anywhere: what is not is left out, and is the base model bit for bit."""
    return bool((weight > 0).any()) if isinstance(weight, Tensor) else weight > 0


def run_transfer(world: "World", request: TransferRequest, progress: "Progress | None" = None) -> Transferred:
    """Draw what `settle_transfer` settled."""
    base = request.base
    plan = world.plan(base.size, request.chunk, request.chunk, base.guidance > 0, request.kinds)
    world._tell(plan)
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        if base.handover == "frames":
            frames = _chained_frames(world, request, plan, progress)
        else:
            frames = world._decode(_latents(world, request, plan, progress), plan).frames
    video = Video(frames[: request.length], request.fps)
    maps = {signal.kind: signal.video for signal in request.signals}
    source = request.source
    if request.out_size != base.size:
        video = _stretched(video, request.out_size)
        source = None if source is None else _stretched(source, request.out_size)
    return Transferred(video, maps, source)


def _latents(world: "World", request: TransferRequest, plan: Plan, progress: "Progress | None") -> Tensor:
    """Latents of the whole video; a chunk begins with the last latents of the one before."""
    layout = _layout(world, request)
    whole_piece = _piece(world, request, plan, 0, _padded_frames(world, request))
    embeddings, images = world._embed(request.base, plan), _reference(world, request, plan)
    known = world._known(request.base, plan)
    latents = known[:, :, :0]
    with world.model.use_controlled(request.kinds, plan.placement) as (transformer, branches):
        texts = [transformer.encode_text(t.to(world.device), i) for t, i in zip(embeddings, images, strict=False)]
        for index in range(layout.chunks):
            edit = _cut(whole_piece, layout.part(index)).edit(request, branches)
            report = world._offset(progress, index, layout.chunks)
            chunk = world._chunk(transformer, request.base, plan, index, layout.native, known, texts, report, edit)
            latents = torch.cat([latents, chunk[:, :, layout.overlap :] if index else chunk], dim=2)
            known = chunk[:, :, -layout.overlap :] if layout.overlap else known
    return latents


def _chained_frames(world: "World", request: TransferRequest, plan: Plan, progress: "Progress | None") -> np.ndarray:
    """Frames of the whole video; a chunk begins with the last frames of the one before, encoded again."""
    layout, factor = _layout(world, request), world.factors.temporal
    length, again = (layout.native - 1) * factor + 1, _repeated(layout.overlap, factor)
    embeddings, images = world._embed(request.base, plan), _reference(world, request, plan)
    nothing = world._known(request.base, plan)
    known, pieces = nothing, []
    for index in range(layout.chunks):
        piece = _piece(world, request, plan, index * (length - again), length)
        with world.model.use_controlled(request.kinds, plan.placement) as (transformer, branches):
            texts = [transformer.encode_text(t.to(world.device), i) for t, i in zip(embeddings, images, strict=False)]
            report, edit = world._offset(progress, index, layout.chunks), piece.edit(request, branches)
            chunk = world._chunk(transformer, request.base, plan, index, layout.native, known, texts, report, edit)
        del texts, edit
        video = world._decode(chunk, plan)
        pieces.append(video.frames[again if index else 0 :])
        known = world._encode(video[-again:], plan) if again else nothing
    return np.concatenate(pieces)


def _reference(world: "World", request: TransferRequest, plan: Plan) -> list[Tensor | None]:
    """Tokens of the reference image for the prompt, and for what guidance leads away from, which sees none."""
    if request.image is None:
        return [None, None]
    with world.model.use("image", plan.placement) as encoder:
        return [encoder.encode(request.image).to(world.device, world.dtype), None]


def _piece(world: "World", request: TransferRequest, plan: Plan, start: int, count: int) -> _Piece:
    """What acts on `count` frames of the (continued) input from frame `start` on."""
    need, factors = start + count, world.factors
    part = slice(start, need)
    latents = {}
    for signal in request.signals:
        if signal.weight > 0:
            frames = pad_frames(signal.video.frames, need)[part]
            latents[signal.kind] = _control_latents(world, plan, Video(frames, request.fps))
    acting = [signal for signal in request.signals if signal.weight > 0]
    weights: dict[str, float | Tensor] = dict(
        zip((s.kind for s in acting), normalised([s.weight for s in acting]), strict=True)
    )
    if any(signal.mask is not None for signal in acting):
        masks = [None if s.mask is None else pad_frames(s.mask, need)[part] for s in acting]
        patch = factors.patch
        grid = (
            ((count - 1) // factors.temporal + 1) // patch[0],
            request.base.size[0] // factors.spatial // patch[1],
            request.base.size[1] // factors.spatial // patch[2],
        )
        maps = weight_maps(masks, [s.weight for s in acting], grid, world.device)
        weights = {s.kind: each for s, each in zip(acting, maps, strict=True)}
    known = hold = None
    if request.source is not None and (request.hold is not None or request.sigma is not None):
        known = world._encode(Video(pad_frames(request.source.frames, need)[part], request.fps), plan)
    if request.hold is not None:
        first = start // factors.temporal
        hold = request.hold[:, :, first : first + (count - 1) // factors.temporal + 1].to(world.device)
    return _Piece(latents, weights, known, hold)


def _control_latents(world: "World", plan: Plan, video: Video) -> Tensor:
    """Of a control video; zeros for one that is black throughout, which is how the published models know it."""
    latents = world._encode(video, plan)
    return latents if video.frames.any() else torch.zeros_like(latents)


def _cut(piece: _Piece, part: slice) -> _Piece:
    """The latent frames of a chunk."""
    return _Piece(
        {kind: latents[:, :, part] for kind, latents in piece.latents.items()},
        {kind: w[:, part] if isinstance(w, Tensor) else w for kind, w in piece.weights.items()},
        None if piece.known is None else piece.known[:, :, part],
        None if piece.hold is None else piece.hold[:, :, part],
    )
