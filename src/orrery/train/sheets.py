"""Contact sheets of training: clips below each other, frames side by side, as one PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from orrery.train.checkpoint import write_atomically


def save_sheet(path: Path, rows: Sequence[np.ndarray], every: int = 2, scale: int = 2) -> None:
    """Write one PNG with a row a clip.

    Args:
        rows: clips [T, H, W, 3] uint8, all of one size; `every`-th frame is shown, `scale` times enlarged.
    """
    lines = [np.concatenate(list(clip[::every]), axis=1) for clip in rows]
    width = max(line.shape[1] for line in lines)
    lines = [np.pad(line, ((0, 1), (0, width - line.shape[1]), (0, 0))) for line in lines]
    image = Image.fromarray(np.concatenate(lines))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    write_atomically(path, lambda temporary: image.save(temporary, format="PNG"))


def to_uint8(frames: "np.ndarray") -> np.ndarray:
    """[3, T, H, W] float in [-1, 1] -> [T, H, W, 3] uint8, values beyond clipped."""
    pixels = np.clip((frames.transpose(1, 2, 3, 0) + 1) * 127.5, 0, 255)
    return np.rint(pixels).astype(np.uint8)
