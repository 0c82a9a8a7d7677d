"""Edges: OpenCV's Canny on each RGB frame, white on black."""

import numpy as np

from orrery.control.optional import opencv
from orrery.control.presets import preset, whole_pair
from orrery.errors import InputError

# (low, high) thresholds of the gradient, in grey levels. Specification of Transfer, section 2.
EDGE_PRESETS = {
    "none": (20, 50),  # as published: a name for the lowest, not "no control"
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}


def edges(frames: np.ndarray, low: int, high: int) -> np.ndarray:
    """frames [T, H, W, 3] uint8 -> [T, H, W] bool. Pixels above `high`, and those above `low` that touch them.

    Raises:
        InputError: OpenCV is not installed.
    """
    cv2 = opencv()
    found = np.zeros(frames.shape[:3], bool)
    for t, frame in enumerate(frames):
        found[t] = cv2.Canny(np.ascontiguousarray(frame), low, high) > 0
    return found


def edge_map(frames: np.ndarray, strength: str | tuple[int, int] = "medium") -> np.ndarray:
    """The control video: frames [T, H, W, 3] uint8 -> [T, H, W, 3] uint8 of 0 and 255.

    strength: a preset's name (the higher, the fewer edges), or (low, high).

    Raises:
        InputError: an unknown preset, thresholds that are no thresholds; OpenCV is not installed.
    """
    low, high = _thresholds(strength)
    out = np.zeros(frames.shape, np.uint8)
    for t in range(len(frames)):
        out[t][edges(frames[t : t + 1], low, high)[0]] = 255
    return out


def _thresholds(strength: str | tuple[int, int]) -> tuple[int, int]:
    if isinstance(strength, str):
        return preset("edge strength", strength, EDGE_PRESETS)
    low, high = whole_pair("edge strength", strength, "(low, high)", 0)
    if low > high:
        raise InputError(f"edge strength is {strength}; the low threshold must not be above the high one")
    return low, high
