"""Does a world model rank robots as the true world does? Pearson's r, Spearman's, MMRV, and how sure they are.

Definitions are those of SIMPLER (arXiv 2405.05941) as the specification of evaluation, B10, gives them. A correlation
over robots hides two things, so that they are asked beside it: whether the model is too kind or too harsh (`bias`), and
whether the same episode ends the same way (`agreement`, `kappa`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

TINY = 1e-8  # added to the denominator of Pearson's r by SIMPLER; with rates of trials it is below what is printed
LEVEL = 0.95
DRAWS = 2000
Z = 1.959963984540054  # of the normal distribution at LEVEL, both sides


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of x and y [P]: the product of the centred vectors over that of their lengths, + TINY.

    As in SIMPLER: 1 where the centred vectors are equal, thus also where both are constant; 0 where one is.

    Raises:
        ValueError: other shapes, or not finite.
    """
    x, y = _pair(x, y)
    x, y = x - x.mean(), y - y.mean()
    if np.abs(x - y).max() < 1e-12:
        return 1.0
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y) + TINY))


def ranks(x: np.ndarray) -> np.ndarray:
    """Ranks [P] float64 from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(np.asarray(x, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - counts + 1 + last) / 2)[inverse]


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of x and y [P]: Pearson's r of their ranks. Raises as `pearson` does."""
    x, y = _pair(x, y)
    return pearson(ranks(x), ranks(y))


def mmrv(model: np.ndarray, truth: np.ndarray) -> float:
    """Mean maximum rank violation of success rates [P]; 0 is best. The first argument is the judge, the second the real
    world: their order matters.

    For each robot i the largest |truth_i - truth_j| over the j of which the model and the truth disagree whether i is
    better than j; the mean over i. "Better" is strict: where the model alone sees a tie, only the better one counts.

    Raises:
        ValueError: other shapes, or not finite.
    """
    model, truth = _pair(model, truth)
    wrong = (model[:, None] > model) != (truth[:, None] > truth)
    return float((np.abs(truth[:, None] - truth) * wrong).max(1).mean())


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape or len(x) < 2:
        raise ValueError(f"both must be [P], P at least 2, got {list(x.shape)} and {list(y.shape)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a number is not finite")
    return x, y


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % interval of a success rate (Wilson 1927): within 0..1, and wider than a point where none or all did.

    Raises:
        ValueError: no trial, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes of {trials} trials")
    rate, square = successes / trials, Z * Z / trials
    middle = (rate + square / 2) / (1 + square)
    half = Z / (1 + square) * np.sqrt(rate * (1 - rate) / trials + square / (4 * trials))
    return float(max(0.0, middle - half)), float(min(1.0, middle + half))


def kappa(model: np.ndarray, truth: np.ndarray) -> float:
    """Cohen's kappa of yes and no [N] bool: agreement beyond what the two rates bring about by chance; 1 is perfect, 0
    chance. nan where both always say the same one thing."""
    model, truth = np.asarray(model, bool), np.asarray(truth, bool)
    a, b = model.mean(), truth.mean()
    chance = a * b + (1 - a) * (1 - b)
    return float("nan") if chance == 1 else float(((model == truth).mean() - chance) / (1 - chance))


@dataclass(frozen=True)
class Estimate:
    """A number, and the bootstrap's 95 % intervals: over trials (other seeds, these robots) and over robots (other
    robots, these seeds); (low, high)."""

    value: float
    trials: tuple[float, float]
    policies: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """What the model's verdict on P robots is worth.

    pearson, spearman, mmrv: of success rates. bias: mean of model - truth over all episodes. agreement: the share of
    episodes that end the same way in both; kappa: the same beyond chance.
    """

    pearson: Estimate
    spearman: Estimate
    mmrv: Estimate
    bias: Estimate
    agreement: Estimate
    kappa: Estimate


def compare(model: np.ndarray, truth: np.ndarray, seed: int = 0, draws: int = DRAWS) -> Comparison:
    """Compares successes of P robots on the same S seeds, model and truth [P, S] bool.

    The bootstrap over trials draws seeds, the same ones for all robots and for both worlds, because all robots meet the
    same starts; that over robots draws rows. Intervals are percentiles of `draws` draws from `seed`. Of kappa, draws in
    which it is not defined are left out.

    Raises:
        ValueError: other shapes; fewer than 2 robots; no seed.
    """
    model, truth = np.asarray(model, bool), np.asarray(truth, bool)
    if model.ndim != 2 or model.shape != truth.shape or len(model) < 2 or not model.shape[1]:
        raise ValueError(f"both must be [P, S], P at least 2, got {list(model.shape)} and {list(truth.shape)}")
    rng, (count, trials) = np.random.default_rng(seed), model.shape
    columns = rng.integers(trials, size=(draws, trials))
    rows = rng.integers(count, size=(draws, count))

    def estimate(measure: Callable[[np.ndarray, np.ndarray], float]) -> Estimate:
        by_trials = [measure(model[:, pick], truth[:, pick]) for pick in columns]
        by_policies = [measure(model[pick], truth[pick]) for pick in rows]
        return Estimate(measure(model, truth), _interval(by_trials), _interval(by_policies))

    return Comparison(
        pearson=estimate(lambda a, b: pearson(a.mean(1), b.mean(1))),
        spearman=estimate(lambda a, b: spearman(a.mean(1), b.mean(1))),
        mmrv=estimate(lambda a, b: mmrv(a.mean(1), b.mean(1))),
        bias=estimate(lambda a, b: float(a.mean() - b.mean())),
        agreement=estimate(lambda a, b: float((a == b).mean())),
        kappa=estimate(kappa),
    )


def _interval(values: list[float]) -> tuple[float, float]:
    found = np.array(values)
    found = found[~np.isnan(found)]
    if not len(found):
        return float("nan"), float("nan")
    low, high = np.percentile(found, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
