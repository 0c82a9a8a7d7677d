"""Clips painted by hand: discs of the worlds' colours over a floor, where every answer is known."""

import numpy as np
import pytest

RGB = {"red": (217, 31, 26), "green": (26, 166, 51), "blue": (26, 64, 230), "yellow": (242, 204, 26)}
RGB |= {"purple": (140, 38, 178), "cyan": (26, 191, 204)}
WOOD = (150, 104, 66)


def _paint(discs: list[list[tuple[str, float, float, float]]], size: int = 64, floor=WOOD) -> np.ndarray:
    """Frames [T, size, size, 3] uint8; discs[t] holds (colour, x, y, radius). Edges are soft, as a camera's are."""
    y, x = np.indices((size, size)).astype(np.float32)
    frames = np.empty((len(discs), size, size, 3), np.float32)
    frames[:] = floor
    for frame, items in zip(frames, discs, strict=True):
        for colour, cx, cy, radius in items:
            alpha = np.clip(radius + 0.5 - np.hypot(x - cx, y - cy), 0, 1)[..., None]
            frame[:] = frame * (1 - alpha) + np.array(RGB[colour]) * alpha
    return frames.round().astype(np.uint8)


@pytest.fixture(scope="session")
def paint():
    """paint(discs, size=64, floor=WOOD) -> frames."""
    return _paint
