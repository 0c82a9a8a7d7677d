"""Statistics of a LeRobot dataset: of one episode, put together over many, and read from disk.

Each feature has min, max, mean, std, count and the quantiles q01 q10 q50 q90 q99; of numbers [A] each, of images
[3, 1, 1] in [0, 1]. Put together, all are exact but the quantiles, which are the means of the episodes' quantiles,
weighted by their frames: so LeRobot defines them, for the rows themselves are not at hand any more.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orrery.errors import InputError
from orrery.jsonfiles import read_text, short

if TYPE_CHECKING:
    from orrery.data.lerobot import Info

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
MOST_IMAGES, LARGEST = 100, 150  # frames of an episode, and about the side of one, that statistics of images look at

Statistics = dict[str, dict[str, np.ndarray]]


def of_rows(rows: np.ndarray) -> dict[str, np.ndarray]:
    """Of numbers [N] or [N, A], N at least 1."""
    return _moments(np.asarray(rows, np.float64).reshape(len(rows), -1), len(rows))


def of_images(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Of frames [T, H, W, 3] uint8: some of them, thinned out; `count` says of how many."""
    some = frames[np.unique(np.linspace(0, len(frames) - 1, min(len(frames), MOST_IMAGES)).round().astype(int))]
    step = max(1, max(frames.shape[1:3]) // LARGEST)
    pixels = some[:, ::step, ::step].reshape(-1, 3).astype(np.float64) / 255
    found = _moments(pixels, len(some))
    return {name: value if name == "count" else value.reshape(3, 1, 1) for name, value in found.items()}


def _moments(values: np.ndarray, count: int) -> dict[str, np.ndarray]:
    found = {"min": values.min(0), "max": values.max(0), "mean": values.mean(0), "std": values.std(0)}
    quantiles = np.quantile(values, list(QUANTILES.values()), axis=0)
    return found | {"count": np.array([count])} | dict(zip(QUANTILES, quantiles, strict=True))


class Pool:
    """Statistics of episodes put together, one by one. `pool.add({feature: its statistics})`, then `pool.result()`."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Any]] = {}

    def add(self, statistics: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """One episode's."""
        for key, one in statistics.items():
            count = int(np.asarray(one["count"]).sum())
            weighted = {name: one[name] * count for name in ("mean", *QUANTILES) if name in one}
            weighted["square"] = (np.square(one["std"]) + np.square(one["mean"])) * count
            old = self._sums.get(key)
            if old is None:
                self._sums[key] = {"min": one["min"], "max": one["max"], "count": count, "sums": weighted}
                continue
            old["min"], old["max"] = np.minimum(old["min"], one["min"]), np.maximum(old["max"], one["max"])
            old["count"] += count
            old["sums"] = {n: old["sums"][n] + value for n, value in weighted.items() if n in old["sums"]}

    def result(self) -> Statistics:
        """Of all that was added."""
        found: Statistics = {}
        for key, all_ in self._sums.items():
            means = {name: value / all_["count"] for name, value in all_["sums"].items()}
            variance = means.pop("square") - np.square(means["mean"])
            std = np.sqrt(np.maximum(variance, 0))
            found[key] = {"min": all_["min"], "max": all_["max"], "mean": means.pop("mean"), "std": std}
            found[key] |= {"count": np.array([all_["count"]])} | means
        return found


def pooled(episodes: Iterable[Mapping[str, Mapping[str, np.ndarray]]]) -> Statistics:
    """Statistics of all episodes together."""
    pool = Pool()
    for statistics in episodes:
        pool.add(statistics)
    return pool.result()


def as_arrays(tree: Any) -> Statistics:
    """Statistics as JSON has them, as arrays.

    Raises:
        InputError: that is no {feature: {name: numbers}} with min, max, mean, std and count.
    """
    needed: Sequence[str] = ("min", "max", "mean", "std")
    try:
        found = {
            str(key): {str(name): np.atleast_1d(np.asarray(value, np.float64)) for name, value in one.items()}
            for key, one in tree.items()
        }
    except (AttributeError, TypeError, ValueError):
        raise InputError(f"{short(tree)} are no statistics; allowed: {{feature: {{name: numbers}}}}") from None
    for key, one in found.items():
        if lacking := [name for name in needed if name not in one]:
            raise InputError(f"the statistics of {key} lack {', '.join(lacking)}; needed are {', '.join(needed)}")
    return found


def read_statistics(info: "Info") -> Statistics:
    """Of a dataset: meta/stats.json, or put together from meta/episodes_stats.jsonl (v2.1); {} where there is neither.

    Raises:
        InputError: the file is broken.
    """
    path = info.root / "meta/stats.json"
    lines = info.root / "meta/episodes_stats.jsonl"
    where: object = path
    try:
        if path.is_file():
            return as_arrays(json.loads(read_text(path)))
        if not lines.is_file():
            return {}
        pool = Pool()
        for number, text in enumerate(read_text(lines).split("\n"), 1):
            where = f"{lines} line {number}"
            if text.strip():
                pool.add(as_arrays(json.loads(text)["stats"]))
        return pool.result()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: {error}") from None
