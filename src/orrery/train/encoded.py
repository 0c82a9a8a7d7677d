"""Episodes as training holds them: latents and normalised actions, every episode through the VAE once.

One file an episode in OUT/latents, named by a hash of the VAE, the dataset and the episode, so that a run that is
stopped while it encodes goes on where it stopped.
"""

import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orrery.data.episodes import Episodes
from orrery.errors import InputError
from orrery.files import atomic_file
from orrery.nn.actions import group
from orrery.nn.vae import VAE
from orrery.train.checkpoint import write_text
from orrery.train.recipe import EpisodeRecipe
from orrery.train.report import duration
from orrery.video import Video, to_pixels
from orrery.weights.config import ActionConfig

FRAMES_AT_ONCE = 128  # through the VAE


@dataclass(frozen=True)
class Encoded:
    """Episodes of at least a window. latents: [C, T, H, W] float16 each; actions: [T - 1, frames * A] float32 each,
    normalised; indices: which of the dataset's they are."""

    indices: list[int]
    latents: list[Tensor]
    actions: list[Tensor]

    def __len__(self) -> int:
        return len(self.indices)


def choose_episodes(episodes: Episodes, data: EpisodeRecipe, out: Path) -> tuple[list[int], list[int]]:
    """(training, held-out) episodes: chosen when the run begins, later those of OUT/episodes.json.

    Raises:
        InputError: too few episodes, or one of the run's is gone.
    """
    place, path = {name: i for i, name in enumerate(episodes.ids)}, out / "episodes.json"
    if path.is_file() and any((out / "checkpoints").glob("*.pt")):
        names = json.loads(path.read_text(encoding="utf-8"))
        if missing := [name for part in names.values() for name in part if name not in place]:
            raise InputError(f"{data.root} lacks {len(missing)} episodes of this run, such as {missing[0]}")
        return [place[name] for name in names["train"]], [place[name] for name in names["heldout"]]
    border = len(episodes) - data.heldout
    if border < 1:
        raise InputError(f"{data.root} has {len(episodes)} episodes, data.heldout = {data.heldout}; allowed: fewer")
    train, held = list(range(border))[: data.max_episodes], list(range(border, len(episodes)))
    names = {"train": [episodes.ids[i] for i in train], "heldout": [episodes.ids[i] for i in held]}
    write_text(path, json.dumps(names))
    return train, held


def encode_episodes(
    episodes: Episodes,
    indices: Sequence[int],
    vae: VAE,
    vae_hash: str,
    actions: ActionConfig,
    size: tuple[int, int],
    folder: Path,
) -> Encoded:
    """These episodes, encoded at `size` (H, W), those without a whole window left out.

    Raises:
        InputError: no episode is long enough, or one cannot be read.
    """
    say, factor = _Meter(), vae.temporal_factor
    found = Encoded([], [], [])
    for done, index in enumerate(indices, start=1):
        latents = latents_of(episodes, index, vae, vae_hash, size, folder)
        rows = episodes.actions(index)
        count = min(latents.shape[1], 1 + len(rows) // factor)
        if count >= actions.window:
            found.indices.append(index)
            found.latents.append(latents[:, :count])
            found.actions.append(group(actions.told(rows[: (count - 1) * factor])[None], factor)[0])
        say(done, len(indices))
    if not len(found):
        least = 1 + (actions.window - 1) * factor
        raise InputError(f"none of {len(indices)} episodes has {least} frames, which a window of training has")
    return found


def latents_of(episodes: Episodes, index: int, vae: VAE, vae_hash: str, size: tuple[int, int], folder: Path) -> Tensor:
    """Latents [C, T, h, w] float16 of an episode, from `folder` where they are there."""
    text = f"{vae_hash} {size} {episodes.ids[index]}"
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors"
    try:
        return load_file(path)["latents"]
    except (SafetensorError, KeyError, OSError):
        latents = _encode(episodes.frames(index), vae, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        save_file({"latents": latents}, partial)
    return latents


@torch.no_grad()
def _encode(frames: np.ndarray, vae: VAE, size: tuple[int, int]) -> Tensor:
    """[C, T', h, w] float16 of frames [T, H, W, 3]; the rest that fills no latent frame is left out."""
    frames = frames[: 1 + (len(frames) - 1) // vae.temporal_factor * vae.temporal_factor]
    if frames.shape[1:3] != size:
        frames = Video(frames, 1.0).resize(*size).frames
    device = next(vae.parameters()).device
    pieces = [frames[:1], *(frames[i : i + FRAMES_AT_ONCE] for i in range(1, len(frames), FRAMES_AT_ONCE))]
    stream = vae.encode_stream(to_pixels(piece[None]).to(device) for piece in pieces)
    return torch.cat([latents[0].half().cpu() for latents in stream], dim=1)


class _Meter:
    """Says how far encoding is, at most every ten seconds; silent when all came from the disk at once."""

    def __init__(self) -> None:
        self.begin = self.last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self.last > 10:
            self.last = now
            left = duration((now - self.begin) / done * (total - done))
            print(f"encoding episodes: {done} of {total}, {left} left", file=sys.stderr)
