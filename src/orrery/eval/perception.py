"""Small networks that look at pictures of our worlds: a perceiver (what is where, and how near) and a look classifier.

They serve two ends. As a judge: trained on simulator renders of both looks, the perceiver stands in for the published
benchmark's depth and segmentation models, which know no 64x64 pictures (specification of evaluation, B2). As the pupil
of Sim2Real: the same network trained on one kind of pictures or another tells what these are worth. Nothing here asks
a simulator; a seed is one network on one machine.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.eval.judging import true_tracks
from orrery.eval.objects import COLOURS

CLASSES = ("background", *COLOURS, "arm")
LOOKS = ("plain", "real")
STRIDE = 8  # sides of pictures must be multiples of this
STEPS, BATCH, RATE = 600, 16, 3e-3
AT_ONCE = 128  # pictures in one forward pass of `perceive`

Net = TypeVar("Net", bound=nn.Module)
Take = Callable[[np.ndarray], Tensor]  # [N, ...] -> what belongs to a batch's pictures, [B, ...]


def class_map(segmentation: np.ndarray, names: Mapping[int, str]) -> np.ndarray:
    """A simulator's segmentation as classes: [..., H, W] ids -> uint8 index into `CLASSES`.

    names: id -> colour of the thing, or "arm". 0 is background.

    Raises:
        ValueError: a name that is no class; an id in the picture that has no name.
    """
    table = np.zeros(256, np.uint8)
    for number, name in names.items():
        if name not in CLASSES[1:]:
            raise ValueError(f"thing {number} is {name!r}; allowed are {', '.join(CLASSES[1:])}")
        table[number] = CLASSES.index(name)
    if unknown := set(np.unique(segmentation).tolist()) - {0, *names}:
        raise ValueError(f"the segmentation holds ids {sorted(unknown)}, which have no name; named are {sorted(names)}")
    return table[segmentation]


def inverse_depth(metres: np.ndarray) -> np.ndarray:
    """1 / metres, float32; 0 for the sky, which is infinitely far."""
    return (1 / metres).astype(np.float32)


class _Block(nn.Module):
    """Two 3x3 convolutions, each normalised; the second one's output is added to the first one's."""

    def __init__(self, inputs: int, width: int, stride: int = 1):
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, stride, 1)
        self.second = nn.Conv2d(width, width, 3, 1, 1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.first(x)))
        return x + F.silu(self.norms[1](self.second(x)))


class _Encoder(nn.Module):
    """Pixels [B, 3, H, W] to features of width w at half the size, 2w at a quarter, 4w at an eighth."""

    def __init__(self, width: int):
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        # Cells of 2x2 pixels from the start: full resolution would cost most of the time and gain an edge pixel.
        self.blocks = nn.ModuleList(_Block(i, o, s) for i, o, s in zip((12, *widths), widths, (1, 2, 2)))

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x, features = F.pixel_unshuffle(pixels, 2), []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features


class Perceiver(nn.Module):
    """A U-Net: the class and the inverse depth of every pixel. 223,000 parameters at width 24.

    >>> net = train_perceiver(frames, classes, inverse, seed=0)
    >>> seen = perceive(net, video.frames)
    """

    def __init__(self, width: int = 24):
        super().__init__()
        self.encoder = _Encoder(width)
        self.up = nn.ModuleList(nn.Conv2d(2 * w, w, 1) for w in (width, 2 * width))
        self.decode = nn.ModuleList(_Block(w, w) for w in (width, 2 * width))
        self.head = nn.Conv2d(width, 4 * (len(CLASSES) + 1), 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W] in -1..1 -> (logits [B, len(CLASSES), H, W], inverse depth [B, H, W] in 1 / metres)."""
        *skips, x = self.encoder(pixels)
        for skip, up, block in zip(reversed(skips), reversed(self.up), reversed(self.decode)):
            x = block(skip + F.interpolate(up(x), scale_factor=2.0))
        out = F.pixel_shuffle(self.head(x), 2)
        return out[:, :-1], F.softplus(out[:, -1])


class LookClassifier(nn.Module):
    """Says of a picture how likely it has the realistic look. 164,000 parameters at width 24."""

    def __init__(self, width: int = 24):
        super().__init__()
        self.encoder = _Encoder(width)
        self.head = nn.Linear(4 * width, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in -1..1 -> logits [B] of `real`."""
        return self.head(self.encoder(pixels)[-1].mean((2, 3)))[:, 0]


@dataclass(frozen=True)
class Perception:
    """What a perceiver sees: classes [T, H, W] uint8 index into `CLASSES`; inverse [T, H, W] float32, 1 / metres."""

    classes: np.ndarray
    inverse: np.ndarray


def train_perceiver(
    frames: np.ndarray,
    classes: np.ndarray,
    inverse: np.ndarray | None = None,
    *,
    seed: int = 0,
    steps: int = STEPS,
    width: int = 24,
) -> Perceiver:
    """A perceiver trained from nothing, ready to use: BATCH pictures a step, half of them mirrored; AdamW, one cycle.

    No other augmentation: what the network knows of colour and texture, it knows from these pictures. Classes weigh as
    the inverse root of how often they occur, else small things are learnt long after the background.

    Args:
        frames: [N, H, W, 3] uint8. classes: [N, H, W] uint8, see `class_map`.
        inverse: [N, H, W], see `inverse_depth`; None leaves depth untrained. Its error counts in shares of each
            picture's mean, so that near scenes do not outweigh far ones.
        seed: of the weights, the order and the mirroring.

    Raises:
        ValueError: arrays that do not fit this; no picture; less than 1 step.
    """
    _check_frames(frames)
    _check_truth("classes", classes, frames)
    if classes.dtype != np.uint8 or classes.max() >= len(CLASSES):
        raise ValueError(f"classes must be uint8 below {len(CLASSES)}, got {classes.dtype} up to {classes.max()}")
    if inverse is not None:
        _check_truth("inverse", inverse, frames)

    share = torch.from_numpy(np.bincount(classes.ravel(), minlength=len(CLASSES)) / classes.size).float()
    weight = share.clamp(min=1e-3) ** -0.5

    def loss(net: Perceiver, take: Take) -> Tensor:
        logits, near = net(_pixels(take(frames)))
        total = F.cross_entropy(logits, take(classes).long(), weight)
        if inverse is not None:
            true = take(inverse).float()
            total = total + ((near - true).abs().mean((1, 2)) / true.mean((1, 2))).mean()
        return total

    return _trained(lambda: Perceiver(width), loss, len(frames), seed, steps)


def train_look_classifier(
    frames: np.ndarray, real: np.ndarray, *, seed: int = 0, steps: int = STEPS, width: int = 24
) -> LookClassifier:
    """A look classifier trained from nothing, as `train_perceiver` does it. frames [N, H, W, 3] uint8, real [N] bool.

    Raises:
        ValueError: arrays that do not fit this; pictures of one look alone.
    """
    _check_frames(frames)
    if real.shape != frames.shape[:1] or real.dtype != bool or real.all() or not real.any():
        raise ValueError(f"real must be [{len(frames)}] bool, some of either; got {real.dtype} {list(real.shape)}")

    def loss(net: LookClassifier, take: Take) -> Tensor:
        return F.binary_cross_entropy_with_logits(net(_pixels(take(frames))), take(real).float())

    return _trained(lambda: LookClassifier(width), loss, len(frames), seed, steps)


def perceive(net: Perceiver, frames: np.ndarray) -> Perception:
    """What `net` sees in frames [T, H, W, 3] uint8, each for itself.

    Raises:
        ValueError: another shape or dtype.
    """
    _check_frames(frames)
    classes, inverse = [], []
    with torch.inference_mode():
        for start in range(0, len(frames), AT_ONCE):
            logits, near = net(_pixels(torch.from_numpy(frames[start : start + AT_ONCE])))
            classes.append(logits.argmax(1).to(torch.uint8).numpy())
            inverse.append(near.numpy())
    return Perception(np.concatenate(classes), np.concatenate(inverse))


def looks_real(net: LookClassifier, frames: np.ndarray) -> np.ndarray:
    """How likely each of frames [T, H, W, 3] uint8 has the realistic look, [T] float32 in 0..1.

    Raises:
        ValueError: another shape or dtype.
    """
    _check_frames(frames)
    with torch.inference_mode():
        parts = torch.from_numpy(frames).split(AT_ONCE)
        return torch.cat([net(_pixels(part)).sigmoid() for part in parts]).numpy()


def class_iou(classes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Intersection over union of each of `CLASSES`, over all pixels together: [len(CLASSES)] float64, nan where
    neither shows the class. classes, truth [..., H, W] of one shape.

    Raises:
        ValueError: shapes that differ.
    """
    if classes.shape != truth.shape:
        raise ValueError(f"both must have one shape, got {list(classes.shape)} and {list(truth.shape)}")
    count = len(CLASSES)
    pairs = np.bincount(truth.astype(np.int64).ravel() * count + classes.ravel(), minlength=count**2)
    table = pairs.reshape(count, count)
    both = np.diag(table)
    either = table.sum(0) + table.sum(1) - both
    return np.where(either > 0, both / np.maximum(either, 1), np.nan)


def centroid_errors(classes: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixels between the centroids of each coloured object and of the true one, for every frame that shows it, [n].

    classes, truth [T, H, W], see `class_map`. An object that is not seen counts as half the picture's width, as in
    `orrery.eval.judge`; what else has its colour draws the centroid away.
    """
    numbers = {CLASSES.index(colour): colour for colour in COLOURS}
    seen, true = true_tracks(classes, numbers), true_tracks(truth, numbers)
    errors = []
    for colour in COLOURS:
        shown = ~np.isnan(true[colour].centre[:, 0])
        distance = np.linalg.norm(seen[colour].centre - true[colour].centre, axis=1)[shown]
        errors.append(np.where(np.isnan(distance), truth.shape[2] / 2, distance))
    return np.concatenate(errors)


def _trained(build: Callable[[], Net], loss: Callable[[Net, Take], Tensor], count: int, seed: int, steps: int) -> Net:
    """The network that `build` makes, after `steps` steps down `loss` on batches of `count` pictures."""
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    rng = np.random.default_rng(seed)
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        net = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(net.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01)
        for step, take in zip(range(steps), _batches(rng, count)):
            done = step / steps
            rate = min(10 * done + 1 / steps, 0.5 + 0.5 * math.cos(math.pi * done))  # up in a tenth, then down
            optimizer.param_groups[0]["lr"] = RATE * rate
            optimizer.zero_grad()
            loss(net, take).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    return net.eval().requires_grad_(False)


def _batches(rng: np.random.Generator, count: int) -> Iterator[Take]:
    """Batches without end: every picture once in random order, then again."""
    order = np.zeros(0, np.int64)
    while True:
        while len(order) < BATCH:
            order = np.concatenate([order, rng.permutation(count)])
        picks, order = order[:BATCH], order[BATCH:]
        mirrored = rng.random(BATCH) < 0.5

        def take(array: np.ndarray, picks: np.ndarray = picks, mirrored: np.ndarray = mirrored) -> Tensor:
            chosen = array[picks]
            if array.ndim > 2:
                chosen[mirrored] = chosen[mirrored, :, ::-1]
            return torch.from_numpy(chosen)

        yield take


def _pixels(frames: Tensor) -> Tensor:
    """[B, H, W, 3] uint8 -> [B, 3, H, W] in -1..1."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1


def _check_frames(frames: np.ndarray) -> None:
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"frames must be [T, H, W, 3] uint8, at least 1, got {frames.dtype} {list(frames.shape)}")
    if frames.shape[1] % STRIDE or frames.shape[2] % STRIDE:
        raise ValueError(f"frames are {frames.shape[1]}x{frames.shape[2]}; both sides must be multiples of {STRIDE}")


def _check_truth(name: str, truth: np.ndarray, frames: np.ndarray) -> None:
    if truth.shape != frames.shape[:3]:
        raise ValueError(f"{name} must be {list(frames.shape[:3])} as the frames are, got {list(truth.shape)}")
