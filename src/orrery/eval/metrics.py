"""Pixel metrics by frame, and the two predictions that need no model: copy the last given frame, show the empty scene.

SSIM is that of Wang, Bovik, Sheikh and Simoncelli (2004): an 11x11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03,
population covariance, averaged over the places where the whole window fits and over the three colours.
"""

import numpy as np

PEAK = 255.0
MOST_PSNR = 60.0  # dB: what an exact copy counts as, so that means stay finite
RADIUS, SIGMA = 5, 1.5


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[-1] != 3:
        raise ValueError(f"both must be frames [T, H, W, 3] of one shape, got {list(a.shape)} and {list(b.shape)}")
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"frames must be uint8, got {a.dtype} and {b.dtype}")


def psnr(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """PSNR of each frame in dB, [T] float64, at most `MOST_PSNR`; frames and truth [T, H, W, 3] uint8.

    Raises:
        ValueError: shapes or dtypes that differ from this.
    """
    _check(frames, truth)
    error = ((frames.astype(np.float64) - truth) ** 2).mean((1, 2, 3))
    least = PEAK**2 / 10 ** (MOST_PSNR / 10)
    return 10 * np.log10(PEAK**2 / np.maximum(error, least))


def ssim(frames: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """SSIM of each frame, [T] float64 in -1..1; frames and truth [T, H, W, 3] uint8, each side at least 11.

    Raises:
        ValueError: shapes or dtypes that differ from this.
    """
    _check(frames, truth)
    if min(frames.shape[1:3]) <= 2 * RADIUS:
        raise ValueError(f"frames are {frames.shape[1]}x{frames.shape[2]}; SSIM needs at least 11x11")
    a, b = frames.astype(np.float64), truth.astype(np.float64)
    mean_a, mean_b = _window(a), _window(b)
    var_a, var_b = _window(a * a) - mean_a**2, _window(b * b) - mean_b**2
    covariance = _window(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return (top / bottom).mean((1, 2, 3))


def _window(x: np.ndarray) -> np.ndarray:
    """Gaussian means [T, H - 10, W - 10, 3] of x [T, H, W, 3]: only where the whole window fits."""
    weights = np.exp(-0.5 * (np.arange(-RADIUS, RADIUS + 1) / SIGMA) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        length = x.shape[axis] - 2 * RADIUS
        x = sum(w * x.take(range(i, i + length), axis) for i, w in enumerate(weights))
    return x


def bootstrap(values: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % interval of the mean over resamples of the values; NaNs are left out."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return (float("nan"),) * 3
    picks = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def copy_last(truth: np.ndarray, given: int) -> np.ndarray:
    """The prediction that nothing moves: truth [T, H, W, 3], from frame `given` on replaced by frame given - 1.

    Raises:
        ValueError: given is below 1 or leaves no frame to predict.
    """
    if not 1 <= given < len(truth):
        raise ValueError(f"given is {given} frames of {len(truth)}; allowed is 1 to {len(truth) - 1}")
    out = truth.copy()
    out[given:] = truth[given - 1]
    return out


def empty_scene(clips: list[np.ndarray], occupied: list[np.ndarray]) -> np.ndarray:
    """The scene without its objects, [H, W, 3] float32: per pixel the median of the frames where nothing stands.

    Args:
        clips: frames [T, H, W, 3] uint8 of clips seen by one camera in one look.
        occupied: [T, H, W] bool, where things are. A pixel that is never free takes the median over all frames.

    Raises:
        ValueError: no clip, or sizes that differ.
    """
    if not clips or len(clips) != len(occupied):
        raise ValueError(f"{len(clips)} clips and {len(occupied)} masks; needed are as many of both, and at least 1")
    frames, taken = np.concatenate(clips).astype(np.float32), np.concatenate(occupied)
    if frames.shape[:3] != taken.shape:
        raise ValueError(f"frames are {list(frames.shape[:3])}, masks {list(taken.shape)}; they must agree")
    never = taken.all(0)
    hidden = np.where((taken & ~never)[..., None], np.float32(np.nan), frames)
    return np.nanmedian(hidden, axis=0)


def fit_brightness(empty: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """`empty` [H, W, 3] float as uint8, each colour scaled so that the median pixel has the brightness of `frame`
    [H, W, 3] uint8: one light is brighter than another."""
    ratio = (frame.astype(np.float64) + 1) / (empty + 1)
    gain = np.median(ratio, axis=(0, 1))
    return np.clip(np.rint(empty * gain), 0, 255).astype(np.uint8)
