"""Latents cached on disk: every clip goes through the VAE once, as it is and mirrored, and never again.

Shards hold the clips of one scene and a range of seeds, float16, named by a hash of everything that went into them: the
VAE, the clips and their captions, the number of frames. So a shard is either right or not found, a killed encoder goes
on where it stopped, and a dataset that grew costs only its new shards.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from orrery.data.clips import ClipDataset, ClipEntry, list_hash, mirror_caption
from orrery.errors import InputError
from orrery.files import atomic_file
from orrery.video import to_pixels

SEEDS_PER_SHARD = 256

Encode = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LatentCache:
    """Cached clips. latents [N, M, C, T, H, W] float16, normalised; M = 2 (the clip, the mirrored clip) or 1.
    captions: N tuples of M captions."""

    latents: Tensor
    captions: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.captions)


def cache_latents(
    folder: Path,
    dataset: ClipDataset,
    encode: Encode,
    vae_hash: str,
    frames: int,
    mirror: bool = True,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> LatentCache:
    """The latents of a dataset, from the shards in `folder` where they are there, else encoded and written.

    Args:
        encode: pixels [B, 3, T, H, W] in [-1, 1] -> normalised latents [B, C, T', H', W'].
        vae_hash: names the VAE behind `encode`.
        frames: the first so many frames of each clip.
        mirror: also encode each clip mirrored left to right, with left and right swapped in its caption.
        batch: clips encoded together. progress: called with (clips done, clips in all).

    Raises:
        InputError: a clip cannot be read, or the folder cannot be written.
    """
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for index, entry in enumerate(dataset.entries):
        groups[entry.scene, entry.seed // SEEDS_PER_SHARD].append(index)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror}") from None
    order: list[int] = []
    parts: list[Tensor] = []
    for (scene, number), indices in sorted(groups.items()):
        entries = [dataset.entries[i] for i in indices]
        path = folder / f"{scene}-{number:05d}-{shard_hash(entries, vae_hash, frames, mirror)}.safetensors"
        latents = _read_shard(path, len(entries))
        if latents is None:
            latents = _encode(dataset, indices, encode, frames, mirror, batch)
            with atomic_file(path) as partial:
                save_file({"latents": latents}, partial)
        parts.append(latents)
        order += indices
        if progress is not None:
            progress(len(order), len(dataset))
    together = torch.cat(parts)
    together = together[torch.tensor(order).argsort()]
    captions: list[tuple[str, ...]] = [(c, mirror_caption(c)) if mirror else (c,) for c in dataset.captions]
    return LatentCache(together, captions)


def shard_hash(entries: Sequence[ClipEntry], vae_hash: str, frames: int, mirror: bool) -> str:
    """12 hex digits over everything that a shard's content depends on."""
    return hashlib.sha256(f"{vae_hash} {frames} {mirror} {list_hash(entries)}".encode()).hexdigest()[:12]


def _read_shard(path: Path, clips: int) -> Tensor | None:
    if not path.is_file():
        return None
    try:
        latents = load_file(path)["latents"]
    except (SafetensorError, KeyError, OSError):
        return None
    return latents if len(latents) == clips else None


@torch.no_grad()
def _encode(
    dataset: ClipDataset, indices: Sequence[int], encode: Encode, frames: int, mirror: bool, batch: int
) -> Tensor:
    rows: list[Tensor] = []
    for start in range(0, len(indices), batch):
        clips = np.stack([dataset[i].frames[:frames] for i in indices[start : start + batch]])
        views = [clips, clips[:, :, :, ::-1]] if mirror else [clips]
        rows.append(torch.stack([encode(to_pixels(view)).half().cpu() for view in views], dim=1))
    return torch.cat(rows)
