"""Practising: the search finds better numbers where there are some, counts what it spends, and repeats itself."""

import numpy as np
import pytest

from orrery.env.cells import Cells
from orrery.env.improve import NUMBERS, START, Pusher, improve, play
from orrery.errors import InputError

GOOD = np.array([0.08, 0.6, 0.08, 1.0, 0.8, 0.6, 1.0])


def test_well_set_numbers_are_better_than_hasty_ones() -> None:
    cells = Cells("truth", 8, max_steps=16)
    bad, good = play(cells, Pusher(START), range(8)), play(cells, Pusher(GOOD), range(8))
    assert good.success.sum() > bad.success.sum() + 2
    assert good.returns.mean() > bad.returns.mean()
    assert good.steps <= 8 * 16


def test_a_pusher_that_sees_nothing_stands_still() -> None:
    assert (Pusher(GOOD).act(np.full((2, 64, 64, 3), 128, np.uint8), np.zeros((2, 2))) == 0).all()


def test_each_cell_may_have_its_own_numbers() -> None:
    cells = Cells("truth", 2, max_steps=3)
    mixed = play(cells, Pusher(np.stack([START, GOOD])), [5, 5])
    alone = [play(cells, Pusher(numbers), [5, 5]).returns[0] for numbers in (START, GOOD)]
    assert mixed.returns.tolist() == alone


class Hill:
    """Cells that reward being near GOOD at once: the search alone is tested, in no time."""

    count, max_steps = 32, 1

    def __init__(self) -> None:
        self.images, self.goals = np.zeros((32, 8, 8, 3), np.uint8), np.zeros((32, 2))


def test_the_search_climbs_counts_and_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    import orrery.env.improve as module

    low, high = (np.array([row[i] for row in NUMBERS.values()]) for i in (0, 1))

    def near(cells: Hill, policy: Pusher, seeds: list[int]) -> module.Played:
        distance = np.abs((policy.numbers - GOOD) / (high - low)).mean(1)
        return module.Played(distance < 0.1, -distance, len(seeds))

    monkeypatch.setattr(module, "play", near)
    first = improve(Hill(), 16, 12)  # type: ignore[arg-type]
    start = np.abs((START - GOOD) / (high - low)).mean()
    assert np.abs((first.mean - GOOD) / (high - low)).mean() < 0.4 * start
    assert first.steps == 12 * 32 and len(first.rounds) == 12
    assert (improve(Hill(), 16, 12).mean == first.mean).all()  # type: ignore[arg-type]
    assert (improve(Hill(), 16, 12, seed=1).mean != first.mean).any()  # type: ignore[arg-type]
    assert len(improve(Hill(), 16, 12, budget=100).rounds) == 4  # type: ignore[arg-type]
    with pytest.raises(InputError, match="32 cells for 5 candidates"):
        improve(Hill(), 5, 1)  # type: ignore[arg-type]


def test_the_same_search_in_the_model_and_in_mujoco(acting_folder) -> None:
    for kind in ("model", "truth"):
        found = improve(Cells(kind, 4, acting_folder, max_steps=2), 4, 1)
        assert found.steps == 8 and np.isfinite(found.mean).all()
