"""What is to be generated, with every number settled and checked before anything is computed."""

import dataclasses
import math
import operator
import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from orrery.errors import InputError
from orrery.nn.text import PromptReader
from orrery.video import Video, from_image
from orrery.weights import ModelConfig, Sampling

Start = Video | str | os.PathLike[str] | np.ndarray | Image.Image

GIVEN_LATENTS = 2  # of a video, and of the chunk before
SMALLEST_START = 16  # pixels a side
MOST_STEPS = 1000
MOST_FRAMES = 65_537
HANDOVERS = ("latents", "frames")


@dataclass(frozen=True)
class Request:
    """What is to be generated.

    sampling: the model's, with what was asked for instead; `steps`, `guidance` and `negative_prompt` are read off it.
    frames: 4k + 1. size: (H, W). given: None, or the start as the model will see it: 1 frame, or the last 5, at `size`.
    overlap, handover: how many latents a chunk of a long video hands to the next, and whether as they are or decoded
    and encoded again.
    """

    prompt: str
    sampling: Sampling
    seed: int
    frames: int
    size: tuple[int, int]
    given: Video | None
    overlap: int = GIVEN_LATENTS
    handover: str = "latents"

    @property
    def steps(self) -> int:
        """Of the solver."""
        return self.sampling.steps

    @property
    def guidance(self) -> float:
        """g of v_c + g (v_c - v_u)."""
        return self.sampling.guidance

    @property
    def negative_prompt(self) -> str | None:
        """Text of v_u; None: zeros in place of the text."""
        return self.sampling.negative_prompt


@dataclass(frozen=True)
class Factors:
    """Sizes that a model's networks impose: pixels and frames a latent, patch and largest size of the transformer."""

    spatial: int
    temporal: int
    patch: tuple[int, int, int]
    largest: tuple[int, int, int]

    @staticmethod
    def of(config: ModelConfig) -> "Factors":
        """Of a model's config."""
        vae, transformer = config.vae, config.transformer
        return Factors(
            spatial=vae.patch * 2 ** len(vae.temporal_down),
            temporal=vae.temporal_patch * 2 ** sum(vae.temporal_down),
            patch=transformer.patch,
            largest=transformer.max_size,
        )

    @property
    def size_step(self) -> tuple[int, int]:
        """Height and width of a video must be multiples of these."""
        return self.spatial * self.patch[1], self.spatial * self.patch[2]


def settle(
    config: ModelConfig,
    reader: PromptReader,
    name: str,
    prompt: str,
    start: Start | None,
    *,
    seed: int,
    frames: int | None,
    size: tuple[int, int] | None,
    overlap: int,
    handover: str,
    **sampling: Any,
) -> Request:
    """Check and settle the arguments of `World.generate`; those of `sampling` that are None are the model's.

    Warns about words the model cannot read, and about what it was not trained for.

    Raises:
        InputError: an empty prompt, a start that cannot be used, a number out of range.
    """
    factors = Factors.of(config)
    _check_prompt(prompt, reader, name)
    size = check_size(config, factors, size)
    given = None if start is None else _given(start, size, factors, config.fps)
    frames = check_frames(config, factors, frames, given)
    if handover not in HANDOVERS:
        raise InputError(f"handover is {handover!r}; allowed are {', '.join(HANDOVERS)}")
    overlap = whole("overlap", overlap, 1, GIVEN_LATENTS)
    return Request(
        prompt=prompt,
        sampling=_sampling(config, sampling),
        seed=whole("seed", seed, 0, 2**32 - 1),
        frames=frames,
        size=size,
        given=given,
        overlap=overlap,
        handover=handover,
    )


def _check_prompt(prompt: str, reader: PromptReader, name: str) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"the prompt is {prompt!r}; it must say something")
    unknown = [word for word in reader.unknown_words(prompt) if any(map(str.isalnum, word))]
    if unknown:
        words = ", ".join(map(repr, unknown))
        _warn(f"words that the model does not know: {words} (`orrery models {name}` lists those it knows)")
    if cut := reader.tokens_cut(prompt):
        _warn(f"the prompt is {cut} tokens longer than the model's {reader.config.length}: its end is cut off")


def check_size(config: ModelConfig, factors: Factors, size: tuple[int, int] | None) -> tuple[int, int]:
    """(H, W), the model's own if None; warns where the model was not trained. InputError: it cannot be."""
    height, width = config.resolution if size is None else size
    most = [factors.spatial * side for side in factors.largest[1:]]
    for name, value, step, limit in zip(("height", "width"), (height, width), factors.size_step, most):
        if whole(name, value, step, limit) % step:
            raise InputError(f"{name} must be a multiple of {step}, got {value}")
    trained = {config.resolution, *config.trained_sizes}
    if config.trained_sizes and (height, width) not in trained:
        allowed = ", ".join(f"{h}x{w}" for h, w in sorted(trained))
        _warn(f"the model was trained at {allowed}; {height}x{width} may look worse")
    return height, width


def check_frames(config: ModelConfig, factors: Factors, frames: int | None, given: Video | None) -> int:
    """Frames of a video, the model's own number if None; warns as above. InputError: they cannot be."""
    frames = whole("frames", config.frames if frames is None else frames, 1, MOST_FRAMES)
    factor = factors.temporal
    if frames % factor != 1:
        below = max(1, (frames - 1) // factor * factor + 1)
        raise InputError(f"frames must be {factor}k + 1, got {frames}; near it are {below} and {below + factor}")
    if given is not None and frames <= len(given):
        raise InputError(f"frames is {frames}, but the start already gives {len(given)}; allowed is more than that")
    if config.any_length and 1 < frames < config.frames:
        _warn(f"the model was trained on {config.frames} frames and on single ones; {frames} may look worse")
    if config.actions is not None and config.actions.empty_prompt == "zeros":
        _warn("the model was trained on actions, without words: `orrery rollout` tells it what is done")
    if config.text_only and given is not None:
        _warn("the model was published for Text2World; what it makes of a start was not shown")
    return frames


def _given(start: Start, size: tuple[int, int], factors: Factors, fps: float) -> Video:
    """The frames of `start` that condition the video, at `size`."""
    needed = factors.temporal * (GIVEN_LATENTS - 1) + 1
    video = as_video(start, needed, fps)
    if 1 < len(video) < needed:
        raise InputError(f"the start has {len(video)} frames; allowed are 1 (an image) or at least {needed}")
    if min(video.height, video.width) < SMALLEST_START:
        raise InputError(
            f"the start is {video.height}x{video.width} pixels; each side must be at least {SMALLEST_START}"
        )
    if len(video) > 1 and not 0.8 < video.fps / fps < 1.25:
        _warn(f"the start has {video.fps:g} fps and the model {fps:g}: frames are taken as they are")
    return video[-needed:].resize(*size)


def _sampling(config: ModelConfig, asked: dict[str, Any]) -> Sampling:
    """The model's sampling with what was asked for instead."""
    own = config.sampling
    changes = {key: value for key, value in asked.items() if value is not None}
    if "steps" in changes:
        changes["steps"] = whole("steps", changes["steps"], 1, MOST_STEPS)
    for key, least in (("guidance", 0.0), ("shift", 0.0)):
        value = changes.get(key, 1.0)
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= least):
            raise InputError(f"{key} must be a number of at least {least:g}, got {value}")
    try:
        sampling = dataclasses.replace(own, **changes)
    except ValueError as error:
        raise InputError(str(error)) from error
    if (sampling.solver == "renoise") != (sampling.schedule == "distilled"):
        raise InputError(
            f"solver {sampling.solver!r} and schedule {sampling.schedule!r} do not go together: renoise is for the "
            "schedule distilled, unipc and euler for shift and karras"
        )
    if own.solver == "renoise":
        if sampling.steps != own.steps:
            _warn(f"the model was distilled for {own.steps} steps; {sampling.steps} may look worse")
        if sampling.guidance > 0:
            _warn("guidance is built into a distilled model; more of it may look worse")
    return dataclasses.replace(sampling, guidance=float(sampling.guidance))


def as_video(start: Start, last: int, fps: float) -> Video:
    """Any kind of start as a Video; of a file at most the `last` frames; bare pixels are taken to run at `fps`."""
    if isinstance(start, Video):
        return start
    if isinstance(start, str | os.PathLike):
        return Video.read(start, last=last)
    if isinstance(start, Image.Image):
        return from_image(start)
    if isinstance(start, np.ndarray):
        return Video(start[None] if start.ndim == 3 else start, fps)
    raise InputError(
        f"a start cannot be {type(start).__name__}; allowed are a Video, a path, uint8 pixels and a Pillow image"
    )


def whole(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int within bounds.

    Raises:
        InputError: it is none, or outside them.
    """
    allowed = f"a whole number from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be {allowed}, got {value!r}") from None
    if not least <= number <= most:
        raise InputError(f"{name} must be {allowed}, got {number}")
    return number


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
