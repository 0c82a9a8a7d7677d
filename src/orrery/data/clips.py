"""Clips on disk: `DATASET/index.jsonl` and one folder a clip (`rgb.mp4`, ground truth), read for training.

The layout is the one that `orrery sim ... --clips N` writes. Held-out clips are those whose seed is at or above a
number that the recipe names, so that no list of names has to travel with the data.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orrery.errors import InputError
from orrery.video import Video


@dataclass(frozen=True)
class ClipEntry:
    """One line of index.jsonl."""

    id: str
    scene: str
    seed: int
    caption: str
    frames: int
    look: str = "plain"
    fps: float = 10.0
    objects: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    def as_json(self) -> dict[str, Any]:
        """The entry as a JSON-able dict, the inverse of `entry_from_json`."""
        return asdict(self) | {"objects": list(self.objects)}


@dataclass(frozen=True)
class Clip:
    """One decoded clip: frames [T, H, W, 3] uint8; foreground [T, H, W] bool or None; caption."""

    frames: np.ndarray
    foreground: np.ndarray | None
    caption: str


def entry_from_json(line: dict[str, Any]) -> ClipEntry:
    """A ClipEntry from one parsed line of index.jsonl; keys that training does not use are dropped.

    Raises:
        InputError: a needed key is missing.
    """
    try:
        return ClipEntry(
            id=str(line["id"]),
            scene=str(line["scene"]),
            seed=int(line["seed"]),
            caption=str(line["caption"]),
            frames=int(line["frames"]),
            look=str(line.get("look", "plain")),
            fps=float(line.get("fps", 10.0)),
            objects=tuple(item for item in line.get("objects", []) if isinstance(item, dict)),
        )
    except KeyError as error:
        raise InputError(f"index.jsonl: a line lacks {error}; needed: id, scene, seed, caption, frames") from None
    except (TypeError, ValueError, AttributeError):
        raise InputError(f"index.jsonl: {str(line)[:120]} is no clip; seed and frames must be numbers") from None


def read_index(root: Path) -> list[ClipEntry]:
    """All clips of a dataset, ordered by seed and scene: in which order parallel workers finished does not matter,
    and any first part of the list holds every scene.

    A half-written last line (the writer still runs, or was killed) is left out.

    Raises:
        InputError: no index.jsonl there, or it lists no clip.
    """
    path = Path(root) / "index.jsonl"
    if not path.is_file():
        raise InputError(
            f"no dataset at {root}: {path} does not exist; make one with `orrery sim SCENE --clips N -o {root}`"
        )
    entries: dict[str, ClipEntry] = {}
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = entry_from_json(json.loads(line))
        except json.JSONDecodeError:
            if number == len(lines):
                continue
            raise InputError(f"{path}, line {number}: not JSON") from None
        entries[entry.id] = entry
    if not entries:
        raise InputError(f"{path} lists no clip")
    return sorted(entries.values(), key=lambda entry: (entry.seed, entry.scene, entry.id))


def split(entries: Iterable[ClipEntry], heldout_from: int) -> tuple[list[ClipEntry], list[ClipEntry]]:
    """(training clips, held-out clips): held out are the seeds >= heldout_from."""
    entries = list(entries)
    return [e for e in entries if e.seed < heldout_from], [e for e in entries if e.seed >= heldout_from]


def list_hash(entries: Sequence[ClipEntry]) -> str:
    """A short hash of which clips these are and what they are called, in order."""
    text = "\n".join(f"{entry.id}\t{entry.caption}" for entry in entries)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_SWAP = {"left": "right", "right": "left", "leftward": "rightward", "rightward": "leftward"}
_SWAP |= {"leftwards": "rightwards", "rightwards": "leftwards", "leftmost": "rightmost", "rightmost": "leftmost"}
_SWAP |= {"clockwise": "counterclockwise", "counterclockwise": "clockwise"}
_SIDES = re.compile(r"\b(" + "|".join(sorted(_SWAP, key=len, reverse=True)) + r")\b", re.IGNORECASE)


def mirror_caption(caption: str) -> str:
    """The caption of the horizontally mirrored clip: left and right swapped, letter case of the first letter kept."""

    def swap(match: re.Match[str]) -> str:
        word = match.group(0)
        other = _SWAP[word.lower()]
        return other.capitalize() if word[0].isupper() else other

    return _SIDES.sub(swap, caption)


class ClipDataset:
    """A list of clips, decoded on demand, kept in memory up to `cache_gb`.

    Args:
        root: the dataset folder.
        entries: which clips; default all of index.jsonl.
        cache_gb: decoded uint8 frames kept in memory, in 10^9 bytes; 0 keeps none.
        foreground: also read segmentation.npz where a clip has one.

    `dataset[i]` is a Clip; `dataset.captions` costs no decoding.
    """

    def __init__(
        self, root: Path, entries: Sequence[ClipEntry] | None = None, cache_gb: float = 0.0, foreground: bool = False
    ) -> None:
        self.root = Path(root)
        self.entries = list(read_index(self.root) if entries is None else entries)
        self.foreground = foreground
        self._room = int(cache_gb * 1e9)
        self._cache: dict[int, Clip] = {}

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def captions(self) -> list[str]:
        """The captions, in the order of the clips."""
        return [entry.caption for entry in self.entries]

    def __getitem__(self, index: int) -> Clip:
        clip = self._cache.get(index)
        if clip is None:
            clip = self._read(self.entries[index])
            size = clip.frames.nbytes + (0 if clip.foreground is None else clip.foreground.nbytes)
            if size <= self._room:
                self._room -= size
                self._cache[index] = clip
        return clip

    def _read(self, entry: ClipEntry) -> Clip:
        folder = self.root / entry.id
        frames = Video.read(folder / "rgb.mp4").frames
        foreground = read_foreground(folder / "segmentation.npz") if self.foreground else None
        if foreground is not None and foreground.shape != frames.shape[:3]:
            raise InputError(
                f"{folder}: segmentation is {foreground.shape}, frames are {frames.shape[:3]}; they must agree"
            )
        return Clip(frames, foreground, entry.caption)


def read_foreground(path: Path) -> np.ndarray | None:
    """The things of a clip (first camera, segmentation id > 0) as [T, H, W] bool, or None without a segmentation."""
    return read_truth(path) > 0 if path.is_file() else None


def read_truth(path: Path) -> np.ndarray:
    """A clip's exact depth.npz (metres) or segmentation.npz (0 none, else which thing), first camera: [T, H, W].

    Raises:
        InputError: there is none, or it cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[archive.files[0]]
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist: the clip was made without {path.stem}; make the dataset with `orrery sim` and "
            f"without --without {path.stem}"
        ) from None
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
