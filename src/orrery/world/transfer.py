"""Transfer: what a video shows, drawn anew. Control branches hold the structure, the prompt says how it looks.

Sim2Real and Real2Real (arXiv 2511.00062; Cosmos-Transfer2.5, specification of Transfer, sections 1 to 3). Every kind of
control is a video as long as the input; it goes through the same VAE, and its branch adds its share to the one base
pass. A long input is drawn in chunks. With `handover="latents"` the whole control video is encoded once, as a stream,
and each chunk takes its part of it; with "frames" each chunk is decoded, and it, its control and what is handed on are
encoded from its own first frame, as the official code does.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from orrery.control.masks import guidance_mask, normalised, weight_maps
from orrery.flow import FrameCondition, Schedule, held, start_at
from orrery.nn.conditions import Control
from orrery.nn.control import ActiveControl, ControlBranch
from orrery.video import Video
from orrery.world.plan import Plan
from orrery.world.speed import Spent
from orrery.world.transfer_request import TransferRequest

if TYPE_CHECKING:
    from orrery.world.world import Progress, World

Velocity = Callable[[Tensor, float], Tensor]


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

    def shortened(self, schedule: Schedule) -> Schedule:
        """The part of a schedule that is walked."""
        if self.known is None or self.sigma is None:
            return schedule
        return start_at(schedule, self.sigma, self.exact_times)

    def begin(
        self, velocity: Velocity, schedule: Schedule, given: FrameCondition, noise: Tensor
    ) -> tuple[Velocity, Tensor]:
        """The velocity field and starting latents of this edit, on its own (`shortened`) schedule."""
        if self.known is None:
            return velocity, noise
        x = noise
        if self.sigma is not None:
            level = float(schedule.sigmas[0])
            x = (1 - level) * given.replace(self.known) + level * noise
        if self.hold is not None:
            velocity = held(velocity, schedule, self.known, noise, self.hold, self.hold_until)
        return velocity, x


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
    world.spent = Spent()
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        if base.handover == "frames":
            frames = _chained_frames(world, request, plan, progress)
        else:
            frames = world._decode(_latents(world, request, plan, progress), plan).frames
    video = Video(frames[: request.length], request.fps)
    maps = {signal.kind: signal.video for signal in request.signals}
    source = request.source
    if request.out_size != base.size:
        video = video.resize(*request.out_size, crop=False)
        source = None if source is None else source.resize(*request.out_size, crop=False)
    return Transferred(video, maps, source)


def _latents(world: "World", request: TransferRequest, plan: Plan, progress: "Progress | None") -> Tensor:
    """Latents of the whole video; a chunk begins with the last latents of the one before."""
    layout = _layout(world, request)
    whole_piece = _piece(world, request, plan, 0, _padded_frames(world, request))
    embeddings, images = world._embed(request.base, plan), _reference(world, request, plan)
    known = world._known(request.base, plan)
    latents = known[:, :, :0]
    with world.model.use_controlled(request.kinds, plan.placement, plan.resident) as (transformer, branches):
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
        with world.model.use_controlled(request.kinds, plan.placement, plan.resident) as (transformer, branches):
            texts = [transformer.encode_text(t.to(world.device), i) for t, i in zip(embeddings, images, strict=False)]
            report, edit = world._offset(progress, index, layout.chunks), piece.edit(request, branches)
            chunk = world._chunk(transformer, request.base, plan, index, layout.native, known, texts, report, edit)
        del texts, edit
        video = world._decode(chunk, plan)
        pieces.append(video.frames[again if index else 0 :])
        known = world._encode(video[-again:], plan) if again else nothing
    return np.concatenate(pieces)


def _reference(world: "World", request: TransferRequest, plan: Plan) -> list[Tensor | None]:
    """Tokens of the reference image for the prompt, and zeros for what guidance leads away from."""
    if request.image is None:
        return [None, None]
    with world.model.use("image", plan.placement) as encoder:
        tokens = encoder.encode(request.image).to(world.device, world.dtype)
    return [tokens, torch.zeros_like(tokens)]


def _piece(world: "World", request: TransferRequest, plan: Plan, start: int, count: int) -> _Piece:
    """What acts on `count` frames of the (continued) input from frame `start` on."""
    need, factors = start + count, world.factors
    part = slice(start, need)
    signals, latents = request.signals, {}
    for signal in signals:
        frames = pad_frames(signal.video.frames, need)[part]
        latents[signal.kind] = _control_latents(world, plan, Video(frames, request.fps))
    weights: dict[str, float | Tensor] = dict(
        zip(request.kinds, normalised([signal.weight for signal in signals]), strict=True)
    )
    if any(signal.mask is not None for signal in signals):
        masks = [None if s.mask is None else pad_frames(s.mask, need)[part] for s in signals]
        patch = factors.patch
        grid = (
            ((count - 1) // factors.temporal + 1) // patch[0],
            request.base.size[0] // factors.spatial // patch[1],
            request.base.size[1] // factors.spatial // patch[2],
        )
        maps = weight_maps(masks, [s.weight for s in signals], grid, world.device)
        weights = {s.kind: each for s, each in zip(signals, maps, strict=True)}
    known = hold = None
    if request.source is not None and (request.hold is not None or request.sigma is not None):
        known = world._encode(Video(pad_frames(request.source.frames, need)[part], request.fps), plan)
    if request.hold is not None and known is not None:
        grid = (known.shape[2], known.shape[3], known.shape[4])
        hold = guidance_mask(pad_frames(request.hold, need)[part], grid, world.device)
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
