"""World: text encoder, VAE and transformer assembled; from a prompt and a start to a Video.

Text2World, Image2World and Video2World are one call (arXiv 2511.00062): 0, 1 or 2 latent frames are given, the others
are drawn. A video longer than the model's native length is drawn in chunks that are chained in latent space: the last
latent frames of a chunk are the given frames of the next, and everything is decoded once, at the end, as a stream.
"""

import math
import operator
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from orrery.errors import InputError
from orrery.flow import FrameCondition, Schedule, guided_velocity, karras_schedule, numpy_noise, shift_schedule, solve
from orrery.nn.dit import Conditions
from orrery.video import Video, from_image
from orrery.weights import Model, find_model, load_model, model_hash

Start = Video | str | os.PathLike[str] | np.ndarray | Image.Image
Progress = Callable[[int, int], None]

GIVEN_LATENTS = 2  # of a video, and of the chunk before
SMALLEST_START = 16  # pixels a side
MOST_STEPS = 1000
MOST_FRAMES = 65_537
PIXELS_AT_ONCE = 2**21  # decoded together: bounds the VAE's memory


@dataclass(frozen=True)
class Request:
    """What is to be generated, with every number settled and checked. `given` is None, or the start as the model will
    see it: 1 frame, or the last 5, at `size` (H, W). negative_prompt None: zeros in place of the text."""

    prompt: str
    negative_prompt: str | None
    seed: int
    steps: int
    guidance: float
    frames: int
    size: tuple[int, int]
    given: Video | None


def load(
    name_or_path: str | os.PathLike[str] = "mini",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> "World":
    """A World from the catalogue or from a model folder.

    Args:
        device: default the GPU if torch sees one, else the CPU.
        dtype: of transformer and text encoder; default bfloat16 on a GPU and float32 on a CPU (where bfloat16 is
            slower). The VAE, the latents and the solver are float32 always.

    Raises:
        InputError: an unknown name, a folder that is no model, weights that do not fit their config, a device that
            this torch does not have.
    """
    folder = find_model(name_or_path)
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]  # torch adds a page
        raise InputError(f"device {str(device)!r} is not available: {why}") from error
    if device.type == "meta":
        raise InputError("device 'meta' holds no numbers; allowed are cpu, cuda, cuda:1, ...")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    return World(load_model(folder, device, dtype), name=str(name_or_path), device=device, dtype=dtype, folder=folder)


class World:
    """A world model, ready to generate.

    >>> world = load("mini")
    >>> fall = world.generate("a red ball falls and bounces", seed=1)
    >>> on = world.generate("a red ball falls and bounces", start=fall, frames=33)
    """

    def __init__(self, model: Model, name: str, device: torch.device, dtype: torch.dtype, folder: Path) -> None:
        self.model, self.name, self.device, self.dtype, self.folder = model, name, device, dtype, folder
        self.config = model.config

    def __repr__(self) -> str:
        height, width = self.config.resolution
        length = f"{self.config.frames} frames, {self.config.fps:g} fps"
        return f"World({self.name!r}, {height}x{width}, {length}, {self.device})"

    @property
    def hash(self) -> str:
        """Which weights these are: 16 hex digits over the files of the model."""
        return model_hash(self.folder)

    @property
    def size_step(self) -> tuple[int, int]:
        """Height and width of a video must be multiples of these."""
        factor, (_, rows, columns) = self.model.vae.spatial_factor, self.config.transformer.patch
        return factor * rows, factor * columns

    def generate(
        self,
        prompt: str,
        start: Start | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
        progress: Progress | None = None,
    ) -> Video:
        """Simulate what happens.

        Args:
            prompt: what there is and what it does.
            start: how it begins: a Video, a path to one or to an image, uint8 pixels [H, W, 3] or [T, H, W, 3], or a
                Pillow image. An image is continued; of a video of at least 5 frames the last 5 are. It is cropped in
                the middle and resized to the model's resolution, and the result begins with it.
            seed: 0 to 2**32 - 1; the same seed gives the same video on one machine.
            steps, guidance, negative_prompt: default: what the model asks for.
            frames: 4k + 1; default the model's native length. More is drawn in chained chunks.
            size: (H, W); default the model's resolution.
            progress: called as progress(steps done, steps in all).

        Returns:
            The video, at the model's frame rate.

        Raises:
            InputError: an empty prompt, a start that cannot be used, a number out of range.
        """
        request = self.request(
            prompt,
            start,
            seed=seed,
            steps=steps,
            guidance=guidance,
            frames=frames,
            negative_prompt=negative_prompt,
            size=size,
        )
        return self.run(request, progress)

    def request(
        self,
        prompt: str,
        start: Start | None = None,
        *,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        frames: int | None = None,
        negative_prompt: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> Request:
        """Check and settle the arguments of `generate`, without generating. Warns about words the model cannot read."""
        sampling = self.config.sampling
        self._check_prompt(prompt)
        size = self._size(size)
        given = None if start is None else self._given(start, size)
        frames = _whole("frames", self.config.frames if frames is None else frames, 1, MOST_FRAMES)
        factor = self.model.vae.temporal_factor
        if frames % factor != 1:
            below = max(1, (frames - 1) // factor * factor + 1)
            raise InputError(f"frames must be {factor}k + 1, got {frames}; near it are {below} and {below + factor}")
        if given is not None and frames <= len(given):
            raise InputError(f"frames is {frames}, but the start already gives {len(given)}; allowed is more than that")
        guidance = sampling.guidance if guidance is None else guidance
        if not (isinstance(guidance, int | float) and math.isfinite(guidance) and guidance >= 0):
            raise InputError(f"guidance must be a number of at least 0, got {guidance}")
        return Request(
            prompt=prompt,
            negative_prompt=sampling.negative_prompt if negative_prompt is None else negative_prompt,
            seed=_whole("seed", seed, 0, 2**32 - 1),
            steps=_whole("steps", sampling.steps if steps is None else steps, 1, MOST_STEPS),
            guidance=float(guidance),
            frames=frames,
            size=size,
            given=given,
        )

    def run(self, request: Request, progress: Progress | None = None) -> Video:
        """Generate what `request` settled."""
        with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            return self._decode(self._latents(request, progress))

    def _check_prompt(self, prompt: str) -> None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f"the prompt is {prompt!r}; it must say something")
        unknown = [word for word in self.model.text.unknown_words(prompt) if any(map(str.isalnum, word))]
        if unknown:
            words = ", ".join(map(repr, unknown))
            _warn(f"words that the model does not know: {words} (`orrery models {self.name}` lists those it knows)")
        if cut := self.model.text.tokens_cut(prompt):
            _warn(f"the prompt is {cut} tokens longer than the model's {self.config.text.length}: its end is cut off")

    def _size(self, size: tuple[int, int] | None) -> tuple[int, int]:
        height, width = self.config.resolution if size is None else size
        factor, (_, rows, columns) = self.model.vae.spatial_factor, self.config.transformer.max_size
        for name, value, step, most in zip(
            ("height", "width"), (height, width), self.size_step, (factor * rows, factor * columns)
        ):
            if _whole(name, value, step, most) % step:
                raise InputError(f"{name} must be a multiple of {step}, got {value}")
        return height, width

    def _given(self, start: Start, size: tuple[int, int]) -> Video:
        """The frames of `start` that condition the video, at `size`."""
        needed = self.model.vae.temporal_factor * (GIVEN_LATENTS - 1) + 1
        video = _as_video(start, needed, self.config.fps)
        if 1 < len(video) < needed:
            raise InputError(f"the start has {len(video)} frames; allowed are 1 (an image) or at least {needed}")
        if min(video.height, video.width) < SMALLEST_START:
            raise InputError(
                f"the start is {video.height}x{video.width} pixels; each side must be at least {SMALLEST_START}"
            )
        if len(video) > 1 and not 0.8 < video.fps / self.config.fps < 1.25:
            _warn(f"the start has {video.fps:g} fps and the model {self.config.fps:g}: frames are taken as they are")
        return video[-needed:].resize(*size)

    def _schedule(self, steps: int) -> Schedule:
        sampling = self.config.sampling
        if sampling.schedule == "karras":
            return karras_schedule(steps, exact_times=sampling.exact_times)
        return shift_schedule(steps, sampling.shift, exact_times=sampling.exact_times)

    def _latents(self, request: Request, progress: Progress | None) -> Tensor:
        """Normalised latents [1, C, T, H, W] of the whole video, chunk after chunk."""
        vae, factor = self.model.vae, self.model.vae.temporal_factor
        native, total = ((frames - 1) // factor + 1 for frames in (self.config.frames, request.frames))
        overlap = min(GIVEN_LATENTS, native - 1)
        chunks = 1 + max(0, math.ceil((total - native) / (native - overlap)))
        schedule = self._schedule(request.steps)
        texts = self._texts(request)
        shape = (1, vae.config.latent_channels, native, *(side // vae.spatial_factor for side in request.size))
        known = torch.zeros(*shape[:2], 0, *shape[3:], device=self.device)
        if request.given is not None:
            known = vae.encode(request.given.to_tensor().to(self.device))
        latents = known[:, :, :0]
        for index in range(chunks):
            noise = numpy_noise((request.seed + index) % 2**32, shape).to(self.device)
            report = _offset(progress, index * len(schedule), chunks * len(schedule))
            chunk = self._chunk(noise, known, texts, request.guidance, schedule, report)
            latents = torch.cat([latents, chunk[:, :, overlap:] if index else chunk], dim=2)
            known = chunk[:, :, -overlap:]
        return latents[:, :, :total]

    def _texts(self, request: Request) -> list[Any]:
        """Cross-attention's keys and values for the prompt and, if there is guidance, for what it leads away from."""
        encoded = [self.model.text.encode([request.prompt])]
        if request.guidance > 0:
            negative = request.negative_prompt
            encoded.append(torch.zeros_like(encoded[0]) if negative is None else self.model.text.encode([negative]))
        return [self.model.transformer.encode_text(text) for text in encoded]

    def _chunk(
        self,
        noise: Tensor,
        known: Tensor,
        texts: list[Any],
        guidance: float,
        schedule: Schedule,
        report: Callable[[int, int, Tensor], None],
    ) -> Tensor:
        """One native length of latents [1, C, T, H, W] from its noise; the first known.shape[2] frames are given."""
        count = known.shape[2]
        latents = torch.cat([known, torch.zeros_like(noise[:, :, count:])], dim=2)
        given = FrameCondition(latents, count, self.config.sampling.conditional_timestep)
        conditions = [Conditions(text, frame_mask=given.mask) for text in texts]
        transformer = self.model.transformer
        networks = [lambda x, times, told=told: transformer(x, times, told) for told in conditions]
        velocity = guided_velocity(networks, given, noise, guidance)
        return solve(velocity, noise, schedule, self.config.sampling.solver, report)

    def _decode(self, latents: Tensor) -> Video:
        vae = self.model.vae
        height, width = (side * vae.spatial_factor for side in latents.shape[3:])
        chunk = max(1, PIXELS_AT_ONCE // (height * width * vae.temporal_factor))
        fps = self.config.fps
        pieces = [Video.from_tensor(piece, fps).frames for piece in vae.decode_stream(latents, chunk)]
        return Video(np.concatenate(pieces), fps)


def _as_video(start: Start, last: int, fps: float) -> Video:
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


def _whole(name: str, value: Any, least: int, most: int) -> int:
    """`value` as an int within bounds."""
    allowed = f"a whole number from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InputError(f"{name} must be {allowed}, got {value!r}") from None
    if not least <= number <= most:
        raise InputError(f"{name} must be {allowed}, got {number}")
    return number


def _offset(progress: Progress | None, before: int, total: int) -> Callable[[int, int, Tensor], None]:
    """The solver's callback for one chunk, as progress over all of them."""

    def report(done: int, _steps: int, _latents: Tensor) -> None:
        if progress is not None:
            progress(before + done, total)

    return report


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=4)
