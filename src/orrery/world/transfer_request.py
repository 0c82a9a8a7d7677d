"""What a transfer is asked for, settled and checked before anything is drawn: input, control videos, masks, lengths."""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from orrery.control.masks import normalised, read_guidance, read_mask
from orrery.control.signals import SignalCache, make_signal, read_signal
from orrery.errors import InputError
from orrery.kinds import control_kind
from orrery.video import Video
from orrery.weights.catalogue import nearest_size
from orrery.world.request import GIVEN_LATENTS, MOST_FRAMES, Request, Start, as_video, settle, whole

if TYPE_CHECKING:
    from orrery.world.world import World

Source = Video | str | os.PathLike[str] | np.ndarray
GUIDED_STEP = 25  # the last step, counted from 0, of guided generation


@dataclass(frozen=True)
class Signal:
    """One kind of control, as a user asks for it.

    source: its control video: a Video, a file, an array [T, H, W, 3], or a simulator's depth.npz or segmentation.npz;
    None: it is made of the input video. weight: 0 to 1. mask: where it acts, 0 to 1: a video, an image, a file of
    either, an array [T, H, W]; None for everywhere. strength: preset of edge or blur. prompt: what a segmentation
    looks for; None: the prompt. models: what stands in for the default depth and segmentation models (see
    `orrery.control.models`). trim: let a longer control video or mask end with the input.
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

    base: prompt, sampling, seed, size, frames (4k + 1, at least the output's), handover. signals: those with a weight
    above 0, in the published order of kinds. source: the input at `base.size`, or None where only control videos were
    given. length, fps, out_size: of the output. image: [H, W, 3] uint8 reference, or None. hold: [T, H, W] in 0..1,
    where `source` is held in the first steps; hold_until: the last of them. sigma: None, or the noise level that
    `source` is drawn from.
    """

    base: Request
    signals: tuple[Prepared, ...]
    source: Video | None
    length: int
    fps: float
    out_size: tuple[int, int]
    chunk: int
    image: np.ndarray | None = None
    hold: np.ndarray | None = None
    hold_until: int = GUIDED_STEP
    sigma: float | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the signals."""
        return tuple(signal.kind for signal in self.signals)


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
    cache: SignalCache | None = None,
    **sampling: Any,
) -> TransferRequest:
    """Check and settle the arguments of `World.transfer`, control videos included; nothing is drawn.

    Raises:
        InputError: whatever cannot be; see `World.transfer`.
    """
    signals = _asked(world, controls)
    source = None if video is None else as_video(video, MOST_FRAMES, world.config.fps)
    extent = _extent(source, signals)
    picks = _picks(extent, fps, frames)
    rate = extent.fps if fps is None else float(fps)
    base = _base(
        world, prompt, len(picks), seed=seed, size=_size(world, size, extent.shape), overlap=overlap, handover=handover,
        **sampling,
    )  # fmt: skip
    if source is not None:
        source = Video(source.frames[picks], rate).resize(*base.size, crop=False)
    request = TransferRequest(
        base, (), source, len(picks), rate, extent.shape if keep_size else base.size, _chunk(world, chunk, overlap)
    )
    acting = {kind: signal for kind, signal in signals.items() if signal.weight > 0}
    request = _with_reference(world, request, image, tuple(acting))
    held = None if hold is None else read_guidance(hold, extent.shape, extent.length, labels=hold_labels)[picks]
    request = _with_known(request, held, hold_until, sigma_max)
    # Last, for a network may have to look at every frame: only of those that count, and when all else is right.
    prepared = (_prepare(kind, signal, request, extent, picks, cache) for kind, signal in acting.items())
    return replace(request, signals=tuple(prepared))


def _base(world: "World", prompt: str, length: int, *, overlap: int, handover: str, **options: Any) -> Request:
    """What is drawn, as `World.generate` would be asked for it."""
    if not 0 <= overlap <= GIVEN_LATENTS or (overlap == 0 and handover != "frames"):
        raise InputError(f"overlap is {overlap}; allowed are 1 and {GIVEN_LATENTS}, and 0 with handover 'frames'")
    factor = world.factors.temporal
    frames = -(-(length - 1) // factor) * factor + 1
    config, reader, name = world.config, world.model.reader, world.name
    if options.get("steps") is None:
        options["steps"] = world.speed.steps_of(config)
    base = settle(
        config, reader, name, prompt, None, frames=frames, overlap=max(overlap, 1), handover=handover, **options
    )
    return replace(base, overlap=overlap)


def _asked(world: "World", controls: Mapping[str, Signal | Source | None]) -> dict[str, Signal]:
    """Signals by kind, in the order of the model's branches, whatever the order they were asked for in."""
    if not controls:
        raise InputError("a transfer needs at least one control; allowed are edge, blur, depth and seg")
    asked: dict[str, Signal] = {}
    for name, value in controls.items():
        kind = control_kind(name)
        if kind in asked:
            raise InputError(f"the control {kind} is asked for twice")
        asked[kind] = value if isinstance(value, Signal) else Signal(value)
    if lacking := [kind for kind in asked if kind not in world.config.controls]:
        has = ", ".join(world.config.controls) or "none"
        raise InputError(f"model {world.name!r} has no control branch for {', '.join(lacking)}; it has: {has}")
    for kind, signal in asked.items():
        if not (isinstance(signal.weight, int | float) and 0 <= signal.weight <= 1):
            raise InputError(f"the weight of {kind} is {signal.weight}; allowed is 0 to 1")
    normalised([signal.weight for signal in asked.values()])  # refuses what cannot be weights together
    return {kind: asked[kind] for kind in world.config.controls if kind in asked}


@dataclass(frozen=True)
class _Extent:
    """Of the input: frames, fps, (H, W)."""

    length: int
    fps: float
    shape: tuple[int, int]


def _extent(source: Video | None, signals: Mapping[str, Signal]) -> _Extent:
    """Of the input, or of the first control video where there is none."""
    if source is not None:
        return _Extent(len(source), source.fps, (source.height, source.width))
    for kind, signal in signals.items():
        if signal.source is None:
            raise InputError(
                f"{kind} is to be made of the input video, but there is none: give one, or a control video"
            )
    given = next((s.source for s in signals.values() if _is_video(s.source)), None)
    if given is None:
        raise InputError("give the input video, or a control that is a video: else nothing says how long and how fast")
    video = as_video(given, MOST_FRAMES, 1.0)  # type: ignore[arg-type]
    return _Extent(len(video), video.fps, (video.height, video.width))


def _is_video(source: Source | None) -> bool:
    return isinstance(source, Video) or (
        isinstance(source, str | os.PathLike)
        and not str(source).lower().endswith((".npz", ".npy"))
        and not os.path.isdir(source)
    )


def _size(world: "World", size: tuple[int, int] | None, shape: tuple[int, int]) -> tuple[int, int]:
    """The size that is drawn: as asked for, or the trained one whose aspect ratio is nearest to the input's."""
    if size is not None:
        return size
    trained = world.config.trained_sizes or (world.config.resolution,)
    return nearest_size(trained, shape)


def _prepare(
    kind: str, signal: Signal, request: TransferRequest, extent: _Extent, picks: np.ndarray, cache: SignalCache | None
) -> Prepared:
    """A signal made of the request's source, or read; of the picked frames, at the size that is drawn."""
    if signal.source is None:
        assert request.source is not None
        options = dict(strength=signal.strength, prompt=signal.prompt, models=signal.models)
        if kind == "seg" and signal.prompt is None:
            options |= {"prompt": request.base.prompt}  # as published: it looks for what the prompt tells of
        video = make_signal(kind, request.source, cache=cache, **options)
    else:
        if signal.strength is not None:
            raise InputError(f"{kind}: a strength is for a control that is made of the input; a control video is given")
        given = read_signal(
            signal.source, kind, size=request.base.size, frames=extent.length, fps=extent.fps, shape=extent.shape,
            trim=signal.trim,
        )  # fmt: skip
        video = Video(given.frames[picks], request.fps)
    mask = signal.mask
    if mask is not None:
        mask = read_mask(mask, extent.shape, extent.length, trim=signal.trim)[picks]
    return Prepared(kind, video, float(signal.weight), mask)


def _picks(extent: _Extent, fps: float | None, frames: int | None) -> np.ndarray:
    """Which frames of the input are drawn: all, those at another rate, the first so many of them."""
    picks = np.arange(extent.length)
    if fps is not None:
        if not (isinstance(fps, int | float) and 0 < fps <= extent.fps):
            raise InputError(f"fps is {fps}; allowed is above 0 to {extent.fps:g}, the input's")
        count = math.floor((extent.length - 1) / extent.fps * fps + 1e-6) + 1
        picks = np.minimum(np.rint(np.arange(count) * extent.fps / fps).astype(int), extent.length - 1)
    if frames is not None:
        picks = picks[: whole("frames", frames, 1, MOST_FRAMES)]
    return picks


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


def _with_reference(
    world: "World", request: TransferRequest, image: Start | None, kinds: tuple[str, ...]
) -> TransferRequest:
    """The request with its reference image at the size that is drawn."""
    if image is None:
        return request
    if not world.config.transformer.image_context:
        raise InputError(
            f"model {world.name!r} takes no reference image here: published branches do, one at a time, except blur"
        )
    if "blur" in kinds:
        raise InputError("a reference image does not go with blur, which keeps the colours of the input")
    height, width = request.base.size
    picture = Image.fromarray(as_video(image, 1, 1.0).frames[-1]).resize((width, height), Image.Resampling.LANCZOS)
    return replace(request, image=np.asarray(picture))


def _with_known(
    request: TransferRequest, hold: np.ndarray | None, hold_until: int, sigma_max: float | None
) -> TransferRequest:
    """The request with what it keeps of the input's own pixels."""
    if hold is None and sigma_max is None:
        return request
    if request.source is None:
        raise InputError("guided generation and sigma_max keep something of the input video, but there is none")
    if request.base.sampling.solver == "renoise":
        raise InputError("guided generation and sigma_max are not for distilled models, which begin at pure noise")
    if hold is not None:
        request = replace(request, hold=hold, hold_until=whole("guided steps", hold_until, 0, 1000))
    if sigma_max is not None:
        if not (isinstance(sigma_max, int | float) and 0 < sigma_max <= 200):
            raise InputError(f"sigma_max is {sigma_max}; allowed is above 0 to 200")
        request = replace(request, sigma=sigma_max / (1 + sigma_max))
    return request
