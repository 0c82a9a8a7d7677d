"""How well a model predicts what actions do, by how far ahead: held-out episodes, rolled out from their first frame.

Beside the truth stand two baselines: the first frame, which says that nothing moves, and the same model told the
actions of another episode; and the truth itself, encoded and decoded, which is as good as its VAE lets it be. A model
that ignores its actions is no better than with others'.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from orrery.data.episodes import Episodes
from orrery.errors import InputError
from orrery.eval.metrics import bootstrap, psnr, ssim
from orrery.sim.detect import detect_all
from orrery.video import to_frames, to_pixels
from orrery.world import Rollout, World

WAYS = ("model", "shuffled", "copied", "coded")
MEASURES = ("psnr", "ssim", "latent", "cube", "peg")
LOST = 0.5  # metres that count where a thing of the truth is not seen in the prediction


@dataclass(frozen=True)
class Horizons:
    """Errors by horizon. values: way -> measure -> [episodes, steps]; steps[j] ends j + 1 latent frames ahead.

    psnr (dB) and ssim are means over the frames of a step; latent: L2 distance of the latent frame to the truth's over
    the truth's own norm; cube, peg: centimetres between where the detector sees it in the last frame of the step and
    where it sees it in the truth's, NaN where the truth does not show it. moved: [episodes, steps], centimetres that
    the cube has moved by then. videos: truth and ways [episodes, 1 + 4 * steps, H, W, 3] uint8.
    """

    values: dict[str, dict[str, np.ndarray]]
    moved: np.ndarray
    videos: dict[str, np.ndarray]

    def clearly_better(self, measure: str, over: str = "shuffled") -> np.ndarray:
        """Of each step, the lower end of the bootstrap's 95 % interval of how much better the model is than `over`
        (paired over episodes): above 0 is clearly better."""
        sign = 1 if measure in ("psnr", "ssim") else -1
        gain = sign * (self.values["model"][measure] - self.values[over][measure])
        return np.array([bootstrap(column)[1] for column in gain.T])


def measure_horizons(
    world: World,
    episodes: Episodes,
    indices: Sequence[int],
    steps: int,
    seed: int = 0,
    solver_steps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Horizons:
    """Roll these episodes out for `steps` latent frames from their first frame, in one batch.

    Raises:
        InputError: an episode is shorter than that, or fewer than two (nothing to shuffle).
    """
    if len(indices) < 2:
        raise InputError(f"{len(indices)} episodes; allowed are at least 2, whose actions can be exchanged")
    count = 1 + steps * world.factors.temporal
    clips, deeds = [], []
    for index in indices:
        frames, actions = episodes.frames(index), episodes.actions(index)
        if len(frames) < count or len(actions) < count - 1:
            raise InputError(f"episode {episodes.ids[index]} has {len(frames)} frames; {count} are asked for")
        clips.append(frames[:count])
        deeds.append(actions[: count - 1])
    truth, told = np.stack(clips), np.stack(deeds)
    seeds = [seed + index for index in range(len(indices))]
    drawn = {"copied": np.repeat(truth[:, :1], count, axis=1)}
    for number, (way, actions) in enumerate((("model", told), ("shuffled", np.roll(told, 1, axis=0)))):
        rollout, pieces = Rollout(world, list(truth[:, 0]), seeds, steps=solver_steps), [truth[:, :1]]
        size = rollout.frames_a_step
        for start in range(0, count - size, size):
            pieces.append(rollout.step(actions[:, start : start + size]))
            if progress is not None:
                progress(number * (count - 1) + start + size, 2 * (count - 1))
        drawn[way] = np.concatenate(pieces, axis=1)
    drawn["coded"] = np.stack([_coded(world, clip) for clip in truth])
    values = {way: compare(world, drawn[way], truth) for way in WAYS}
    cubes = detect_all(truth[:, 4::4].reshape(-1, *truth.shape[2:]))[:, 1].reshape(len(truth), steps, 2)
    first = detect_all(truth[:, 0])[:, 1]
    moved = 100 * np.linalg.norm(cubes - first[:, None], axis=2)
    return Horizons(values, moved, {"truth": truth, **drawn})


def compare(world: World, frames: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure [B, steps] of frames against truth [B, 1 + 4 * steps, H, W, 3] uint8 (see `Horizons`)."""
    count, factor = len(frames), world.factors.temporal
    steps = (frames.shape[1] - 1) // factor
    out: dict[str, Any] = {}
    for name, function in (("psnr", psnr), ("ssim", ssim)):
        rows = [function(one[1:], two[1:]) for one, two in zip(frames, truth, strict=True)]
        out[name] = np.stack(rows).reshape(count, steps, factor).mean(2)
    ours, theirs = (_latents(world, each) for each in (frames, truth))
    out["latent"] = (ours - theirs).flatten(2).norm(dim=2).div(theirs.flatten(2).norm(dim=2)).numpy()
    ends = slice(factor, None, factor)
    seen, real = (detect_all(each[:, ends].reshape(-1, *each.shape[2:])) for each in (frames, truth))
    gap = np.linalg.norm(seen - real, axis=2)
    gap = np.where(np.isnan(seen[..., 0]) & ~np.isnan(real[..., 0]), LOST, gap).reshape(count, steps, 3)
    return out | {"peg": 100 * gap[:, :, 0], "cube": 100 * gap[:, :, 1]}


@torch.no_grad()
def _coded(world: World, clip: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] uint8, encoded and decoded."""
    return to_frames(world.model.vae.decode(_encoded(world, clip).to(world.model.vae_dtype), chunk=1)[0])


@torch.no_grad()
def _latents(world: World, frames: np.ndarray) -> torch.Tensor:
    """[B, T - 1, C, h, w]: latent frames after the first."""
    return torch.stack([_encoded(world, clip)[0, :, 1:].transpose(0, 1).cpu() for clip in frames])


def _encoded(world: World, clip: np.ndarray) -> torch.Tensor:
    """Latents [1, C, T', h, w] float32 of frames [T, H, W, 3] uint8."""
    return world.model.vae.encode(to_pixels(clip[None]).to(world.device, world.model.vae_dtype)).float()
