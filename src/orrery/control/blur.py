"""Blur: a bilateral filter, then down and up again: colours and light stay, detail and texture go.

The published name of this kind is `vis`. Specification of Transfer, section 2.
"""

import numpy as np
import torch
import torch.nn.functional as F

from orrery.control.optional import opencv
from orrery.control.presets import preset, whole_pair

# (f, g): the bilateral filter runs at 1/f of the size; then the picture goes down to 1/g and up again.
BLUR_PRESETS = {
    "none": None,
    "very_low": (1, 4),
    "low": (4, 4),
    "medium": (2, 10),
    "high": (1, 16),
    "very_high": (4, 16),
}
DIAMETER, SIGMA_COLOUR, SIGMA_SPACE = 30, 150.0, 100.0  # of the bilateral filter: pixels, grey levels, pixels


def bilateral(
    frames: np.ndarray, diameter: int = DIAMETER, colour: float = SIGMA_COLOUR, space: float = SIGMA_SPACE
) -> np.ndarray:
    """OpenCV's bilateral filter on each frame: [T, H, W, 3] uint8 -> the same.

    Raises:
        InputError: OpenCV is not installed.
    """
    cv2 = opencv()
    out = np.empty_like(frames)
    for t, frame in enumerate(frames):
        out[t] = cv2.bilateralFilter(np.ascontiguousarray(frame), diameter, colour, space)
    return out


def blur_map(frames: np.ndarray, strength: str | tuple[int, int] = "medium") -> np.ndarray:
    """The control video: [T, H, W, 3] uint8 -> the same shape.

    strength: a preset's name, or (f, g).

    Raises:
        InputError: an unknown preset, factors that are no factors; OpenCV is not installed.
    """
    if isinstance(strength, str):
        factors = preset("blur strength", strength, BLUR_PRESETS)
    else:
        factors = whole_pair("blur strength", strength, "(f, g)", 1)
    if factors is None:
        return frames.copy()
    out = np.empty_like(frames)
    for t in range(len(frames)):
        out[t : t + 1] = _blurred(frames[t : t + 1], *factors)
    return out


def _blurred(frame: np.ndarray, small: int, coarse: int) -> np.ndarray:
    """One frame [1, H, W, 3]."""
    cv2 = opencv()
    height, width = frame.shape[1:3]
    if small > 1:
        size = (max(1, width // small), max(1, height // small))
        frame = cv2.resize(frame[0], size, interpolation=cv2.INTER_AREA)[None]
    frame = bilateral(frame)
    if small > 1:
        frame = cv2.resize(frame[0], (width, height), interpolation=cv2.INTER_LINEAR)[None]
    return down_up(frame, coarse)


def down_up(frames: np.ndarray, factor: int) -> np.ndarray:
    """Each frame at 1/factor of its size and back, both by antialiased bicubic interpolation: [T, H, W, 3] uint8."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    height, width = pixels.shape[2:]
    for size in ((max(1, height // factor), max(1, width // factor)), (height, width)):
        pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).round().clamp(0, 255)
    return pixels.to(torch.uint8).numpy().transpose(0, 2, 3, 1)
