"""Pearson, Spearman, MMRV and their intervals: against scipy, and by hand."""

import numpy as np
import pytest
from scipy import stats

from orrery.eval.correlation import compare, kappa, mmrv, pearson, ranks, spearman, wilson

RNG = np.random.default_rng(7)
PAIRS = [(RNG.integers(0, 6, 9) / 5, RNG.integers(0, 6, 9) / 5) for _ in range(30)]  # with many ties


@pytest.mark.parametrize("x, y", PAIRS)
def test_as_scipy(x: np.ndarray, y: np.ndarray) -> None:
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-6)
    assert (ranks(x) == stats.rankdata(x)).all()


def test_pearson_where_scipy_has_no_answer() -> None:
    """As SIMPLER does it."""
    assert pearson([0.5, 0.5, 0.5], [0.2, 0.2, 0.2]) == 1
    assert pearson([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) == 0
    assert spearman([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]) == 0


def test_mmrv_by_hand() -> None:
    """B10's example with a tie, 0.133 and 0.533 with the arguments swapped. The model thinks 0 better than 1, which is
    better by 0.2; it sees no difference between 1 and 2, of which 1 is better by 0.2; it thinks 0 better than 2, which
    are alike. So 0.2 for robots 0 and 1, and for 2 nothing: seen from 2, both say "not better"."""
    model, truth = np.array([0.9, 0.1, 0.1]), np.array([0.5, 0.7, 0.5])
    assert mmrv(model, truth) == pytest.approx((0.2 + 0.2 + 0) / 3) == pytest.approx(0.133, abs=5e-4)
    assert mmrv(truth, model) == pytest.approx((0.8 + 0.8 + 0) / 3) == pytest.approx(0.533, abs=5e-4)


def test_mmrv_takes_the_worst_of_each_robot() -> None:
    truth = np.array([0.0, 0.1, 0.5, 1.0])
    assert mmrv(truth, truth) == mmrv(truth**3 / 2, truth) == 0
    assert mmrv(-truth, truth) == pytest.approx((1.0 + 0.9 + 0.5 + 1.0) / 4)
    assert mmrv(np.array([0.1, 0.0, 0.5, 1.0]), truth) == pytest.approx((0.1 + 0.1) / 4)


@pytest.mark.parametrize("measure", [pearson, spearman, mmrv])
def test_the_order_of_robots_says_nothing(measure) -> None:
    for x, y in PAIRS:
        order = RNG.permutation(len(x))
        assert measure(x[order], y[order]) == pytest.approx(measure(x, y), abs=1e-12)


@pytest.mark.parametrize("measure", [pearson, spearman, mmrv])
def test_refusals(measure) -> None:
    for x, y in (
        ([1.0], [1.0]),
        ([1, 2], [1, 2, 3]),
        ([[1, 2]], [[1, 2]]),
        ([1, np.nan], [1, 2]),
        ([1, 2], [np.inf, 1]),
    ):
        with pytest.raises(ValueError):
            measure(x, y)


@pytest.mark.parametrize("successes, trials", [(0, 8), (8, 8), (1, 48), (24, 48), (47, 48), (1, 1)])
def test_wilson_as_scipy(successes: int, trials: int) -> None:
    interval = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_wilson_refuses() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError):
            wilson(successes, trials)


def test_kappa_by_hand() -> None:
    """20 yes and 15 no of 50 in both; yes in 25 and 30: agreement 0.7, chance 0.5."""
    model = np.repeat([True, True, False, False], [20, 5, 10, 15])
    truth = np.repeat([True, False, True, False], [20, 5, 10, 15])
    assert kappa(model, truth) == pytest.approx((0.7 - 0.5) / (1 - 0.5))
    assert kappa(truth, truth) == 1 and kappa(~truth, truth) < 0
    assert np.isnan(kappa(np.ones(4, bool), np.ones(4, bool)))


def outcomes(rates: list[float], seeds: int = 40) -> np.ndarray:
    return np.random.default_rng(1).random((len(rates), seeds)) < np.array(rates)[:, None]


def test_a_perfect_judge_is_perfect_in_every_draw() -> None:
    """Only if the same seeds are drawn for both worlds and for all robots."""
    truth = outcomes([0.1, 0.4, 0.6, 0.9])
    found = compare(truth, truth, draws=200)
    for name, best in (("pearson", 1), ("spearman", 1), ("mmrv", 0), ("bias", 0), ("agreement", 1), ("kappa", 1)):
        estimate = getattr(found, name)
        numbers = [estimate.value, *estimate.trials, *(estimate.policies if name in ("bias", "agreement") else ())]
        assert numbers == pytest.approx([best] * len(numbers), abs=1e-6), name


def test_a_judge_who_says_the_opposite_in_the_same_numbers() -> None:
    """r is 1, and every episode ends the other way: what r hides, agreement tells."""
    truth = np.arange(40) < np.array([10, 20, 30])[:, None]
    model = truth[:, ::-1]
    found = compare(model, truth, draws=50)
    assert found.pearson.value == 1 and found.bias.value == 0
    assert found.agreement.value == pytest.approx((20 + 0 + 20) / 120) and found.kappa.value < 0


def test_bias_and_its_interval() -> None:
    rng = np.random.default_rng(3)
    truth = rng.random((6, 400)) < 0.5
    model = truth & (rng.random(truth.shape) < 0.8)
    found = compare(model, truth, draws=1000).bias
    assert found.value == pytest.approx(model.mean() - truth.mean())
    spread = (model.astype(float) - truth).mean(0).std(ddof=1) / np.sqrt(400)  # by seed: what is drawn
    low, high = found.trials
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    assert low < found.value < high < 0


def test_more_trials_narrow_one_interval_and_more_robots_the_other() -> None:
    rng = np.random.default_rng(5)

    def widths(robots: int, seeds: int) -> tuple[float, float]:
        rates = np.linspace(0.05, 0.95, robots)[:, None]
        model = np.clip(rates + rng.normal(0, 0.15, rates.shape), 0, 1)
        found = compare(rng.random((robots, seeds)) < model, rng.random((robots, seeds)) < rates, draws=300).pearson
        return found.trials[1] - found.trials[0], found.policies[1] - found.policies[0]

    few, more_seeds, more_robots = widths(6, 20), widths(6, 500), widths(60, 20)
    assert more_seeds[0] < few[0] / 2
    assert more_robots[1] < few[1] / 1.5


def test_the_same_seed_draws_the_same() -> None:
    model, truth = outcomes([0.1, 0.5, 0.8]), outcomes([0.2, 0.3, 0.9])[:, ::-1]
    assert compare(model, truth, draws=50) == compare(model, truth, draws=50)
    assert compare(model, truth, seed=1, draws=50) != compare(model, truth, draws=50)


def test_compare_refuses() -> None:
    for shape, other in (((1, 4), (1, 4)), ((2, 4), (2, 5)), ((3, 0), (3, 0)), ((4,), (4,))):
        with pytest.raises(ValueError, match="at least 2"):
            compare(np.ones(shape, bool), np.ones(other, bool))
