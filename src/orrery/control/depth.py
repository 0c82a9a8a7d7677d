"""Depth as a control video: grey, near is bright, the range of the whole clip spread over 0 to 255.

Out of a simulator's exact depth, or of a model's (see `models`), which gives inverse depth up to a scale and an offset;
a model that looks at one frame at a time chooses them anew in each, and `aligned` takes that out. Specification of
Transfer, section 2.
"""

import numpy as np

from orrery.errors import InputError

STILL = 8  # grey levels: a pixel whose colours change by less is taken to show the same place at the same depth
LEAST_STILL = 0.05  # of the pixels; with fewer, all are used
FITS, WORST = 5, 0.05  # rounds of fitting, each without the share of pixels that the one before fitted worst
FITTED = 0.05  # of the spread: an error below it is never bad


def depth_map(metres: np.ndarray) -> np.ndarray:
    """Of exact depth: [T, H, W] metres, inf for the sky -> [T, H, W, 3] uint8.

    Raises:
        InputError: depth that is not above 0.
    """
    metres = np.asarray(metres)
    if metres.ndim != 3 or metres.dtype.kind != "f" or not bool((metres > 0).all()):  # refuses nan too
        lowest = metres.min() if metres.size else "empty"
        shape = f"{metres.dtype} {list(metres.shape)}"
        raise InputError(f"depth must be [T, H, W] float metres above 0; got {shape} from {lowest}")
    near, far = float(metres.min()), float(metres.max())  # inf is far: its inverse is 0
    return _grey(metres, 1 / far, 1 / near, invert=True)


def inverse_depth_map(inverse: np.ndarray) -> np.ndarray:
    """Of inverse depth in any unit: [T, H, W], larger is nearer -> [T, H, W, 3] uint8.

    Raises:
        InputError: another shape, or a value that is not finite.
    """
    inverse = np.asarray(inverse)
    if inverse.ndim != 3 or not inverse.size or not bool(np.isfinite(inverse).all()):
        raise InputError(f"inverse depth must be [T, H, W], at least 1 pixel, finite; got shape {list(inverse.shape)}")
    return _grey(inverse, float(inverse.min()), float(inverse.max()), invert=False)


def _grey(values: np.ndarray, low: float, high: float, invert: bool) -> np.ndarray:
    """values [T, H, W], or their inverse, from low..high to 0..255, three times; a frame at a time, for long clips."""
    out = np.empty((*values.shape, 3), np.uint8)
    for t, frame in enumerate(values):
        frame = frame.astype(np.float32)
        grey = ((1 / frame if invert else frame) - low) / max(high - low, 1e-12) * 255
        out[t] = np.rint(np.clip(grey, 0, 255)).astype(np.uint8)[..., None]
    return out


def aligned(current: np.ndarray, previous: np.ndarray, still: np.ndarray) -> np.ndarray:
    """`current` inverse depth [H, W] float32, scaled and shifted to agree with `previous` [H, W] where nothing moved.

    still: [H, W] bool, see `still_pixels`. A line is fitted again and again without the few pixels farthest from it
    (not without all that are far for the median error: that is 0 under a large sky of one value, which says nothing).
    The slope is the ratio of the spreads, not that of least squares: with noise in both frames the latter is always too
    small, and over a hundred frames in a row the depth would fade to a flat grey.
    """
    if still.mean() < LEAST_STILL:
        still = np.ones_like(still)
    x, y = current[still].astype(np.float64), previous[still].astype(np.float64)
    scale, shift, least = 1.0, 0.0, FITTED * float(y.std()) + 1e-12
    for _ in range(FITS):
        spread = float(x.std())
        scale = float(y.std()) / spread if spread > 1e-9 else 1.0
        shift = float(y.mean()) - scale * float(x.mean())
        error = np.abs(scale * x + shift - y)
        good = error <= max(float(np.quantile(error, 1 - WORST)), least)
        if good.all() or good.sum() < 16:
            break
        x, y = x[good], y[good]
    return (scale * current + shift).astype(np.float32)


def still_pixels(frame: np.ndarray, previous: np.ndarray) -> np.ndarray:
    """Where two frames [H, W, 3] uint8 differ by less than `STILL` in every colour: [H, W] bool."""
    return np.abs(frame.astype(np.int16) - previous).max(-1) < STILL
