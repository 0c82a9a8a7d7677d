"""Getting better inside the model: the numbers of a policy, chosen by how it does in imagined episodes alone.

The policy is the scripted robot that goes round the cube and pushes it, with its seven numbers; the search is the
cross-entropy method (Rubinstein and Kroese 2004): draw candidates, keep the best, draw around them. All candidates and
all their episodes are one batch of cells, and the cells may be a world model's or MuJoCo's: what the search spends is
counted in steps of cells, the same in both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from orrery.env.cells import Cells, start_of
from orrery.errors import InputError
from orrery.sim.detect import detect_all
from orrery.sim.tabletop import Manner, push_towards

# number of `Manner` -> (least, most, what an engineer in a hurry would set)
NUMBERS: dict[str, tuple[float, float, float]] = {
    "clearance": (0.0, 0.2, 0.01),
    "aim": (0.1, 1.5, 1.3),
    "offset": (0.01, 0.2, 0.2),
    "steer": (0.0, 2.0, 0.0),
    "around": (0.2, 1.5, 1.2),
    "push": (0.1, 2.0, 1.6),
    "ease": (0.0, 2.0, 2.0),
}
START = np.array([start for _, _, start in NUMBERS.values()])


@dataclass(frozen=True)
class Pusher:
    """The policy: `push_towards` on what is seen. numbers: its Manner [P], or [B, P]: its own for each cell."""

    numbers: np.ndarray

    def act(self, images: np.ndarray, goals: np.ndarray) -> np.ndarray:
        """Actions [B, 2] of pictures [B, H, W, 3] uint8 and goals [B, 2] in metres; where it sees no cube or no peg it
        stands still."""
        seen = detect_all(images)
        numbers = np.broadcast_to(self.numbers, (len(images), len(NUMBERS)))
        rows = zip(seen[:, 0], seen[:, 1], goals.astype(float), numbers.tolist(), strict=True)
        return np.nan_to_num(np.stack([push_towards(peg, cube, goal, Manner(*how)) for peg, cube, goal, how in rows]))


@dataclass(frozen=True)
class Played:
    """Episodes of one policy or several: success [B] bool, returns [B] (sum of rewards), steps of cells in all."""

    success: np.ndarray
    returns: np.ndarray
    steps: int


def play(cells: Cells, policy: Pusher, seeds: Sequence[int]) -> Played:
    """One episode in every cell, begun from these seeds, as `reset(seed=...)` of the environments begins them."""
    if len(seeds) != cells.count:
        raise InputError(f"{len(seeds)} seeds for {cells.count} cells; allowed is one each")
    cells.reset(range(cells.count), [start_of(np.random.Generator(np.random.PCG64(seed)), None) for seed in seeds])
    success, returns, steps = np.zeros(cells.count, bool), np.zeros(cells.count), 0
    while cells.running.any():
        rows = [int(row) for row in np.flatnonzero(cells.running)]
        results = cells.step(policy.act(cells.images, cells.goals), rows)
        success |= results.terminated
        returns += results.rewards
        steps += len(rows)
    return Played(success, returns, steps)


@dataclass
class Search:
    """Where the cross-entropy method is: mean and spread [P] of the numbers, steps spent, and a line a round."""

    mean: np.ndarray
    spread: np.ndarray
    steps: int = 0
    rounds: list[dict[str, float]] = field(default_factory=list)


def improve(
    cells: Cells,
    population: int,
    rounds: int,
    seed: int = 0,
    first_seed: int = 0,
    budget: int | None = None,
    progress: Callable[[Search], None] | None = None,
) -> Search:
    """Search for better numbers, from START, in these cells.

    Args:
        cells: `population` times the number of episodes that a candidate is judged by; a candidate's return is the mean
            over its episodes, and all candidates of a round play the same.
        budget: steps of cells after which no further round begins.

    Raises:
        InputError: the cells cannot be shared out among the candidates.
    """
    if population < 4 or cells.count % population:
        raise InputError(f"{cells.count} cells for {population} candidates; allowed: a multiple of at least 4")
    rng, each = np.random.default_rng(seed), cells.count // population
    low, high = (np.array([row[i] for row in NUMBERS.values()]) for i in (0, 1))
    search = Search(START.copy(), 0.35 * (high - low))
    elite = max(2, population // 4)
    for number in range(rounds):
        if budget is not None and search.steps >= budget:
            break
        drawn = rng.normal(search.mean, search.spread, (population, len(NUMBERS)))
        drawn[0] = search.mean
        drawn = np.clip(drawn, low, high)
        seeds = [first_seed + number * each + i for i in range(each)] * population
        played = play(cells, Pusher(np.repeat(drawn, each, axis=0)), seeds)
        scores = played.returns.reshape(population, each).mean(1)
        best = drawn[np.argsort(-scores)[:elite]]
        search.mean = 0.3 * search.mean + 0.7 * best.mean(0)
        search.spread = 0.3 * search.spread + 0.7 * best.std(0) + 0.02 * (high - low)
        search.steps += played.steps
        success = played.success.reshape(population, each).mean(1)
        search.rounds.append(
            {
                "steps": float(search.steps),
                "mean return": float(scores.mean()),
                "best return": float(scores.max()),
                "success": float(success.mean()),
            }
        )
        if progress is not None:
            progress(search)
    return search
