"""Acting in a world: from how it begins and what a robot does, what happens; open-ended, in constant memory.

Each step draws the latent frames that the actions lead to, with the latest ones given, and decodes them as the next
piece of one stream. Where the model goes on from latents, they are never decoded and encoded again, and a step is one
latent frame: the world answers action by action. Where it goes on from frames, as the published action-conditioned
model does (specification of Transfer, section 4.6), a step is a chunk of all latent frames that it was trained to draw
at once, and the last frame is encoded anew.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from orrery.errors import InputError, note
from orrery.flow.rolling import roll_on
from orrery.flow.schedule import shift_schedule
from orrery.nn.actions import group
from orrery.nn.dit import Conditions, DiT, TextContext
from orrery.nn.vae_blocks import Stream
from orrery.video import Video, to_frames, to_pixels
from orrery.weights import ActionConfig
from orrery.world.request import Start, as_video, whole
from orrery.world.speed import Spent, attention_kernel

if TYPE_CHECKING:
    from orrery.world.world import World

Progress = Callable[[int, int], None]


class Rollout:
    """Several copies of a world, each with its own past, moved on together.

    Args:
        world: a World whose model takes actions.
        starts: how each copy begins: an image, or a video whose last frames are the past.
        seeds: of each copy's noise. A copy depends on its start, its seed and its actions alone, whoever is beside it.
        prompt: words for all copies; "" for what the model was trained with where there were none.
        steps: of the solver; default the model's.

    >>> rollout = Rollout(world, ["table.png"], [0])
    >>> frames = rollout.step(np.zeros((1, rollout.frames_a_step, 2)))  # [1, 4, 64, 64, 3]
    """

    def __init__(
        self,
        world: "World",
        starts: Sequence[Start],
        seeds: Sequence[int],
        *,
        prompt: str = "",
        steps: int | None = None,
    ) -> None:
        self.world, self.actions = world, actions_of(world)
        sampling = world.config.sampling
        if world.speed.cache or world.speed.guidance_interval:
            note("speed: a rollout makes all its steps, and has no guidance: cache and interval do nothing here")
        own = world.speed.steps_of(world.config) or sampling.steps
        steps = whole("steps", own if steps is None else steps, 1, 1000)
        self.schedule = shift_schedule(steps, sampling.shift, sampling.exact_times)
        self.solver, self.conditional_timestep = sampling.solver, sampling.conditional_timestep
        self.factor = world.factors.temporal
        self._text = _encode_text(world, prompt)
        self._past: list[Tensor] = [torch.empty(0)] * len(starts)
        self._seeds, self._steps = [0] * len(starts), [0] * len(starts)
        self._stream: Stream | None = None
        self.restart(range(len(starts)), starts, seeds)

    def __len__(self) -> int:
        return len(self._past)

    @property
    def frames_a_step(self) -> int:
        """Frames, and actions, of the smallest step."""
        return self.factor * (1 if self.actions.handover == "latents" else self.actions.window - 1)

    @torch.no_grad()
    def restart(self, rows: Sequence[int], starts: Sequence[Start], seeds: Sequence[int]) -> None:
        """Begin some copies anew. rows: which; a start and a seed for each."""
        rows = list(rows)
        if not len(rows) == len(starts) == len(seeds):
            raise InputError(f"{len(starts)} starts and {len(seeds)} seeds for {len(rows)} copies; allowed: one each")
        videos = [self._begin(start) for start in starts]
        stream = Stream()
        for length in sorted({len(video) for video in videos}):
            here = [i for i, video in enumerate(videos) if len(video) == length]
            frames = np.stack([videos[i].frames for i in here])
            latents = self._encode(frames)
            for place, i in enumerate(here):
                self._past[rows[i]] = latents[place : place + 1, :, -self.actions.given :]
        for row, seed in zip(rows, seeds, strict=True):
            self._seeds[row], self._steps[row] = whole("seed", seed, 0, 2**32 - 1), 0
        if self.actions.handover == "frames":
            return
        # The decoder's memory begins with the last frame of the past: that of a still picture.
        last = self._encode(np.stack([video.frames[-1:] for video in videos]))
        self.world.model.vae.decode_next(last.to(self.world.model.vae_dtype), stream)
        if self._stream is None:
            self._stream = stream
        else:
            self._stream.put(self._index(rows), stream)

    def _begin(self, start: Start) -> Video:
        """The frames of a start that are the past: 1, or as many as fill the given latents."""
        video = as_video(start, 1 + self.factor * (self.actions.given - 1), self.world.config.fps)
        count = min(len(video), 1 + self.factor * (self.actions.given - 1))
        count = 1 + (count - 1) // self.factor * self.factor
        return video[-count:].resize(*self.world.config.resolution)

    @torch.no_grad()
    def step(self, actions: Any, rows: Sequence[int] | None = None) -> np.ndarray:
        """What happens next.

        Args:
            actions: [B, k * frames_a_step, A], row t acts between frames t and t + 1; finite numbers.
            rows: which copies move; the others stay as they are. Default all.

        Returns:
            uint8 [B, k * frames_a_step, H, W, 3], the frames after the latest.

        Raises:
            InputError: actions of another shape, or not finite.
        """
        rows = list(range(len(self))) if rows is None else list(rows)
        told = self._told(actions, len(rows))
        size = self.frames_a_step // self.factor
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            pieces = [self._advance(part, rows) for part in told.split(size, dim=1)]
        return np.concatenate(pieces, axis=1)

    def _told(self, actions: Any, count: int) -> Tensor:
        """Actions as the network is told them: [B, latent frames, values] on the device."""
        values = np.asarray(actions, dtype=np.float32)
        wanted = (count, self.frames_a_step, self.actions.dimensions)
        if values.ndim != 3 or values.shape[0] != count or values.shape[2] != wanted[2] or not values.shape[1]:
            raise InputError(f"actions are {list(values.shape)}; allowed is [{count}, k * {wanted[1]}, {wanted[2]}]")
        if values.shape[1] % wanted[1]:
            raise InputError(f"{values.shape[1]} actions; allowed is a multiple of {wanted[1]}, what one step takes")
        if not np.isfinite(values).all():
            raise InputError("an action is not finite")
        return group(self.actions.told(values), self.factor).to(self.world.device)

    def _advance(self, told: Tensor, rows: list[int]) -> np.ndarray:
        """One step of these copies: frames [B, f, H, W, 3]. Copies with as much past are drawn in one batch."""
        count, channels = told.shape[1], self.world.config.vae.latent_channels
        height, width = (side // self.world.factors.spatial for side in self.world.config.resolution)
        new = torch.empty(len(rows), channels, count, height, width, device=self.world.device)
        lengths = [self._past[row].shape[2] for row in rows]
        for length in sorted(set(lengths)):
            here = [i for i, each in enumerate(lengths) if each == length]
            past = torch.cat([self._past[rows[i]] for i in here])
            noise = torch.stack([self._noise(rows[i], new.shape[1:]) for i in here]).to(new)
            index = self._index(here)
            before = told.new_zeros(len(here), length - 1, told.shape[2])  # given frames are told no action
            network = partial(self._velocity, torch.cat([before, told[index]], dim=1))
            seen = (length + count, height, width)
            with attention_kernel(self.world.speed, self.world.model.transformer, len(here), seen, self.world.device):
                drawn = roll_on(network, past, noise, self.schedule, self.conditional_timestep, self.solver)
            self.world.spent.add(len(self.schedule), 0, 0.0)
            new[index] = drawn
        frames = self._decode(new, rows)
        for i, row in enumerate(rows):
            self._steps[row] += 1
            kept = torch.cat([self._past[row], new[i : i + 1]], dim=2)[:, :, -self.actions.given :].clone()
            self._past[row] = kept
        if self.actions.handover == "frames":
            again = self._encode(frames[:, -1:])
            for i, row in enumerate(rows):
                self._past[row] = again[i : i + 1]
        return frames

    def _velocity(self, actions: Tensor, x: Tensor, times: Tensor, mask: Tensor) -> Tensor:
        conditions = Conditions(self._text, mask, actions=actions, fps=self.world.config.fps)
        return self.world.model.transformer(x, times, conditions)

    def _noise(self, row: int, shape: Sequence[int]) -> Tensor:
        rng = np.random.default_rng([self._seeds[row], self._steps[row]])
        return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))

    def _decode(self, latents: Tensor, rows: list[int]) -> np.ndarray:
        vae = self.world.model.vae
        latents = latents.to(self.world.model.vae_dtype)
        if self.actions.handover == "frames":
            past = torch.cat([self._past[row] for row in rows]).to(latents)
            pixels = vae.decode(torch.cat([past, latents], dim=2))[:, :, -latents.shape[2] * self.factor :]
        else:
            assert self._stream is not None
            index = self._index(rows)
            part = self._stream if rows == list(range(len(self))) else self._stream.take(index)
            pixels = vae.decode_next(latents, part)
            if part is not self._stream:
                self._stream.put(index, part)
        return to_frames(pixels)

    def _encode(self, frames: np.ndarray) -> Tensor:
        """[B, T, H, W, 3] uint8 -> latents [B, C, T', h, w] float32."""
        pixels = to_pixels(frames).to(self.world.device, self.world.model.vae_dtype)
        return self.world.model.vae.encode(pixels).float()

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(list(rows), dtype=torch.int64, device=self.world.device)


def actions_of(world: "World") -> ActionConfig:
    """What the model of a world is told of actions.

    Raises:
        InputError: it is told none.
    """
    if world.config.actions is None:
        raise InputError(f"model {world.name!r} takes no actions; one that does is 'tabletop'")
    return world.config.actions


def run_rollout(
    world: "World",
    start: Start,
    actions: Any,
    *,
    seed: int = 0,
    prompt: str = "",
    steps: int | None = None,
    progress: Progress | None = None,
) -> Video:
    """See `World.rollout`.

    Raises:
        InputError: a model that takes no actions; actions of another shape, too few, or not finite.
    """
    rollout, world.spent = Rollout(world, [start], [seed], prompt=prompt, steps=steps), Spent()
    values = np.asarray(actions, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] != rollout.actions.dimensions:
        raise InputError(f"actions are {list(values.shape)}; allowed is [N, {rollout.actions.dimensions}]")
    size = rollout.frames_a_step
    if len(values) < size:
        raise InputError(f"{len(values)} actions; allowed are at least {size}, what one step takes")
    if left := len(values) % size:
        note(f"the last {left} of {len(values)} actions are left out: a step takes {size}")
    first = as_video(start, 1, world.config.fps)[-1:].resize(*world.config.resolution).frames
    pieces, total = [first], len(values) // size
    for step in range(total):
        pieces.append(rollout.step(values[None, step * size : (step + 1) * size])[0])
        if progress is not None:
            progress(step + 1, total)
    return Video(np.concatenate(pieces), world.config.fps)


def _encode_text(world: "World", prompt: str) -> TextContext:
    """Keys and values of the words; of "", what the model was trained with: the empty caption, or zeros, of which one
    token says as much as many alike."""
    transformer: DiT = world.model.transformer
    with torch.no_grad():
        if not prompt and actions_of(world).empty_prompt == "zeros":
            zeros = torch.zeros(1, 1, world.config.transformer.text_width, device=world.device, dtype=world.dtype)
            return transformer.encode_text(zeros)
        text = world.model.text
        return transformer.encode_text(text(text.tokenize([prompt]).to(world.device)))
