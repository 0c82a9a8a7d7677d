"""How well a clip keeps to its control: four numbers of PAI-Bench-Transfer (specification of evaluation, section B2).

Each compares what was generated with the clip whose control it got: colours and light (`blur_ssim`), edges (`edge_f1`),
depth (`depth_si_rmse`), objects (`mask_miou`). Depth and masks are given here as arrays, whichever model or simulator
they come from. All fit clips of one size and length; `comparable` makes two so, the way the benchmark does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orrery.control.blur import bilateral
from orrery.control.edge import EDGE_PRESETS, edges
from orrery.control.inputs import resized
from orrery.control.optional import opencv
from orrery.errors import InputError

WINDOW = 7  # pixels a side of SSIM's window, all weighted alike, as scikit-image's default
K1, K2 = 0.01, 0.03
MATCHED = 0.1  # IoU above which two masks are taken for the same thing


@dataclass(frozen=True)
class EdgeScore:
    """Each in 0..1, over all pixels of all frames."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class MaskScore:
    """miou: mean IoU of the matches above `MATCHED` (0 if there is none), which ignores what was missed. recall: the
    share of the true masks that have such a match. matches: (phrase, true phrase, IoU) of all pairs, also the bad."""

    miou: float
    recall: float
    matches: tuple[tuple[str, str, float], ...]


def comparable(frames: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """frames [T, H, W, 3] uint8 at the size of truth [T', H', W', 3] (area when it gets smaller, linear when larger),
    and both as long as the shorter."""
    length = min(len(frames), len(truth))
    size = (truth.shape[1], truth.shape[2])
    smaller = size[0] * size[1] < frames.shape[1] * frames.shape[2]
    return resized(frames[:length], size, "area" if smaller else "linear"), truth[:length]


def blur_ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """SSIM after a bilateral filter has taken the detail out of both, in -1..1; frames and truth [T, H, W, 3] uint8, at
    least 7x7.

    As scikit-image's `structural_similarity` by default: a uniform 7x7 window, sample covariance, the mean over colours
    and over pixels with a whole window around them; then over frames. The range of a frame is from the least to the
    largest value of the blurred truth (at least 1, so that a flat frame has a number too).

    Raises:
        InputError: shapes or dtypes that differ from this.
    """
    _check_frames(frames, truth)
    if min(truth.shape[1:3]) < WINDOW:
        raise InputError(f"frames are {truth.shape[1]}x{truth.shape[2]}; blur SSIM needs at least {WINDOW}x{WINDOW}")
    scores = []
    for t in range(len(truth)):  # frame by frame: the means of a long clip in float64 would fill the memory
        made, real = bilateral(frames[t : t + 1])[0], bilateral(truth[t : t + 1])[0]
        scores.append(_ssim(made, real, max(int(real.max()) - int(real.min()), 1)))
    return float(np.mean(scores))


def _ssim(a: np.ndarray, b: np.ndarray, span: float) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _windowed(a), _windowed(b)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_a = sample * (_windowed(a * a) - mean_a**2)
    var_b = sample * (_windowed(b * b) - mean_b**2)
    covariance = sample * (_windowed(a * b) - mean_a * mean_b)
    c1, c2 = (K1 * span) ** 2, (K2 * span) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float((top / bottom).mean())


def _windowed(x: np.ndarray) -> np.ndarray:
    """Means over the window, [H - 6, W - 6, 3] of x [H, W, 3]: only where it fits."""
    inside = WINDOW // 2
    return opencv().blur(x, (WINDOW, WINDOW))[inside:-inside, inside:-inside]


def edge_f1(frames: np.ndarray, truth: np.ndarray, thresholds: tuple[int, int] = EDGE_PRESETS["medium"]) -> EdgeScore:
    """Precision, recall and F1 of Canny's edges against those of truth, pixel by pixel, without tolerance, pooled over
    the clip; frames and truth [T, H, W, 3] uint8.

    Two clips without any edge agree: all are 1. If only one has none, all are 0. (The benchmark's code stops at both.)

    Raises:
        InputError: shapes or dtypes that differ from this.
    """
    _check_frames(frames, truth)
    hit = found = wanted = 0
    for t in range(len(truth)):
        made, real = edges(frames[t : t + 1], *thresholds), edges(truth[t : t + 1], *thresholds)
        hit += int((made & real).sum())
        found += int(made.sum())
        wanted += int(real.sum())
    if not found and not wanted:
        return EdgeScore(1.0, 1.0, 1.0)
    return EdgeScore(hit / found if found else 0.0, hit / wanted if wanted else 0.0, 2 * hit / (found + wanted))


def depth_si_rmse(depth: np.ndarray, truth: np.ndarray) -> float:
    """Scale-invariant RMSE of depth against truth, both [T, H, W] numbers, in the unit of truth; 0 is best.

    A pixel counts where both are above 0 and finite. In each frame depth is multiplied by median(truth) /
    median(depth); then the root of the mean square of the difference, and the mean over frames. A frame without a pixel
    that counts adds 0, as in the benchmark. A common offset is an error, a common factor is none.

    Raises:
        InputError: shapes that differ from this, or no pixel that counts in the whole clip.
    """
    if depth.shape != truth.shape or truth.ndim != 3 or not truth.size:
        raise InputError(f"both must be depth [T, H, W] of one shape, got {list(depth.shape)} and {list(truth.shape)}")
    errors = []
    for made, real in zip(depth, truth, strict=True):
        made, real = made.astype(np.float64), real.astype(np.float64)
        valid = (made > 0) & (real > 0) & np.isfinite(made) & np.isfinite(real)
        if valid.any():
            made, real = made[valid], real[valid]
            errors.append(float(np.sqrt(np.mean((made * (np.median(real) / np.median(made)) - real) ** 2))))
    if not errors:
        raise InputError("in no frame is there a pixel where both depths are above 0 and finite")
    return sum(errors) / len(truth)


def by_phrase(ids: np.ndarray, phrases: Sequence[str]) -> dict[str, np.ndarray]:
    """The masks [T, H, W] bool of `mask_miou`, of ids [T, H, W] (0 none, i is phrases[i - 1]): things of one name are
    one mask.

    Raises:
        InputError: an id without a phrase.
    """
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) <= len(phrases):
        raise InputError(f"ids go from {ids.min()} to {ids.max()}; allowed are 0 to {len(phrases)}, one a phrase")
    masks: dict[str, np.ndarray] = {}
    for index, phrase in enumerate(phrases, start=1):
        mask = ids == index
        masks[phrase] = masks[phrase] | mask if phrase in masks else mask
    return masks


def mask_miou(masks: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray]) -> MaskScore:
    """How well the masks of two clips agree, whatever they are called: phrase -> [T, H, W] bool, see `by_phrase`.

    IoU is over space and time. Masks are matched one to one so that the sum of IoU is largest (`assign`).

    Raises:
        InputError: no true mask, or masks of different shapes.
    """
    names, wanted = list(masks), list(truth)
    shapes = {mask.shape for mask in (*masks.values(), *truth.values())}
    if not wanted or len(shapes) != 1:
        listed = ", ".join(str(list(shape)) for shape in sorted(shapes)) or "none"
        raise InputError(
            f"needed are at least 1 true mask and all of one shape; got {len(wanted)} true, shapes {listed}"
        )
    overlaps = np.array([[_iou(masks[name], truth[other]) for other in wanted] for name in names])
    overlaps = overlaps.reshape(len(names), len(wanted))
    pairs = assign(overlaps)
    good = [float(overlaps[pair]) for pair in pairs if overlaps[pair] > MATCHED]
    matches = tuple((names[row], wanted[column], float(overlaps[row, column])) for row, column in pairs)
    return MaskScore(float(np.mean(good)) if good else 0.0, len(good) / len(wanted), matches)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def assign(gain: np.ndarray) -> list[tuple[int, int]]:
    """One column a row (or one row a column, if there are fewer columns) so that the sum of gain [n, m] is largest:
    pairs in the order of rows. The Hungarian algorithm with potentials: O(n^2 m)."""
    if not gain.size:
        return []
    if gain.shape[0] > gain.shape[1]:
        return sorted((row, column) for column, row in assign(gain.T))
    cost = -np.asarray(gain, np.float64)
    rows, columns = cost.shape
    row_potential, column_potential = np.zeros(rows + 1), np.zeros(columns + 1)
    owner = np.full(columns + 1, rows)  # the row that has each column, `rows` for none; the last column stands for none
    for row in range(rows):
        owner[columns] = row
        slack, came_from = np.full(columns, np.inf), np.full(columns, columns)
        visited = np.zeros(columns + 1, bool)
        column = columns
        while owner[column] != rows:  # a path of alternating steps from the new row to a free column
            visited[column] = True
            reduced = cost[owner[column]] - row_potential[owner[column]] - column_potential[:columns]
            nearer = ~visited[:columns] & (reduced < slack)
            slack[nearer], came_from[nearer] = reduced[nearer], column
            following = int(np.where(visited[:columns], np.inf, slack).argmin())
            step = slack[following]
            row_potential[owner[visited]] += step
            column_potential[visited] -= step
            slack[~visited[:columns]] -= step
            column = following
        while column != columns:  # every column on the path goes to the row before it
            owner[column] = owner[came_from[column]]
            column = came_from[column]
        owner[columns] = rows
    return sorted((int(owner[column]), column) for column in range(columns) if owner[column] != rows)


def _check_frames(frames: np.ndarray, truth: np.ndarray) -> None:
    if frames.shape != truth.shape or truth.ndim != 4 or truth.shape[-1] != 3 or not truth.size:
        shapes = f"{list(frames.shape)} and {list(truth.shape)}"
        raise InputError(f"both must be frames [T, H, W, 3] of one shape, got {shapes}; see `comparable`")
    if frames.dtype != np.uint8 or truth.dtype != np.uint8:
        raise InputError(f"frames must be uint8, got {frames.dtype} and {truth.dtype}")
