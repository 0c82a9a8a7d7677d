"""The order in which a run sees its clips: shuffled anew in every epoch, and resumable at any clip.

The permutation of epoch e is a pure function of (seed, e), so the whole state of the order is two integers.
"""

import numpy as np


class ShuffledOrder:
    """An endless stream of indices 0..length-1; every epoch is another permutation.

    Args:
        length: number of clips, at least 1.
        seed: the permutations follow from it.

    Raises:
        ValueError: length < 1.
    """

    def __init__(self, length: int, seed: int) -> None:
        if length < 1:
            raise ValueError(f"an order needs at least 1 clip, got {length}")
        self.length, self.seed = length, seed
        self.epoch, self.offset = 0, 0
        self._permutation = self._shuffle()

    def _shuffle(self) -> np.ndarray:
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.length)

    def take(self, count: int) -> list[int]:
        """The next `count` indices; a batch may straddle two epochs."""
        indices: list[int] = []
        while len(indices) < count:
            if self.offset >= self.length:
                self.epoch, self.offset = self.epoch + 1, 0
                self._permutation = self._shuffle()
            step = min(count - len(indices), self.length - self.offset)
            indices += self._permutation[self.offset : self.offset + step].tolist()
            self.offset += step
        return indices

    def state(self) -> dict[str, int]:
        """The position, as JSON-able integers."""
        return {"epoch": self.epoch, "offset": self.offset}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue where `state()` was taken."""
        self.epoch, self.offset = int(state["epoch"]), int(state["offset"])
        self._permutation = self._shuffle()
