"""Which keys a token of a grid [T, H, W] attends to in neighbourhood attention, and the published sparse schedules.

The semantics are those of generalised neighbourhood attention (arXiv 2504.16922) as NATTEN implements it. Along each
axis, the positions of one residue modulo `dilation` form a sequence of their own; in it, `stride` queries side by side
share the window around the middle one of them (the right-hand one of two), moved inwards at the borders, so that every
query has a whole window.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

C = TypeVar("C", bound=Callable)
Triple = tuple[int, int, int]
FULL = -1  # as a window: the whole axis; as a base: the numbers hold at any length


@dataclass(frozen=True)
class Pattern:
    """Which keys a token sees, each field in the order (t, h, w); all fields are JSON values (tuples as lists).

    window: keys along each axis, FULL or at least 2. stride: queries that share a window. dilation: distance between
    the keys of a window. base: length of each axis for which the numbers are meant: at another they are scaled.
    """

    window: Triple
    stride: Triple = (1, 1, 1)
    dilation: Triple = (1, 1, 1)
    base: Triple = (FULL, FULL, FULL)

    def __post_init__(self) -> None:
        for name, least, full in (("window", 2, True), ("stride", 1, False), ("dilation", 1, False), ("base", 1, True)):
            value = tuple(getattr(self, name))  # JSON gives lists
            if len(value) != 3 or not all(isinstance(n, int) and (n >= least or (full and n == FULL)) for n in value):
                allowed = f"of at least {least}{f', or {FULL}' if full else ''}"
                raise ValueError(f"{name} must be three integers (t, h, w) {allowed}, got {value}")
            object.__setattr__(self, name, value)
        for window, stride in zip(self.window, self.stride, strict=True):
            if window != FULL and stride > window:
                raise ValueError(f"stride must be at most the window, got {self.stride} for {self.window}")

    def fitted(self, grid: Triple) -> "Fitted":
        """The pattern on a grid: its numbers scaled by grid / base and rounded, no window longer than its axis."""
        if len(grid) != 3 or min(grid) < 1:
            raise ValueError(f"grid must be three positive numbers (T, H, W), got {grid}")
        window, stride, dilation = [], [], []
        for i, length in enumerate(grid):
            scale = 1.0 if self.base[i] == FULL else length / self.base[i]
            keys = length if self.window[i] == FULL else min(max(2, round(self.window[i] * scale)), length)
            window.append(keys)
            stride.append(min(max(1, round(self.stride[i] * scale)), keys))
            dilation.append(min(max(1, round(self.dilation[i] * scale)), length // keys))
        return Fitted(*(_triple(one) for one in (grid, window, stride, dilation)))


def _triple(numbers: Sequence[int]) -> Triple:
    t, h, w = numbers
    return t, h, w


class Fitted(NamedTuple):
    """A pattern on one grid, every number as it is used; window * dilation never exceeds the grid.

    Functions that torch.compile takes for constant are given it as a plain tuple: a named one it cannot hand them.
    """

    grid: Triple
    window: Triple
    stride: Triple
    dilation: Triple

    @property
    def share(self) -> float:
        """Of the multiplications of full attention, those that are left."""
        return math.prod(self.window) / math.prod(self.grid)


_BASE = (FULL, 44, 80)  # tokens of 704 x 1280 pixels
_SPREAD = Pattern((FULL, 4, 16), dilation=(1, 11, 5), base=_BASE)
_SPREAD_WIDE = Pattern((FULL, 12, 16), (1, 4, 1), (1, 1, 5), _BASE)
_SMALL, _MEDIUM, _LARGE = (Pattern((FULL, h, w), (1, 4, 8), base=_BASE) for h, w in ((12, 24), (20, 40), (28, 56)))

# Layer by layer, None for full attention: cosmos-predict2's config_natten.py, of its sparse 720p Video2World models,
# the same for 10 and 16 frames a second (16 and 24 latent frames).
PUBLISHED: dict[str, tuple[Pattern | None, ...]] = {
    "2b": (
        *[_SPREAD] * 2, _SPREAD_WIDE, *[_SMALL] * 2, _SPREAD_WIDE, *[_SMALL] * 4, _SPREAD_WIDE,
        *[_MEDIUM] * 12, _LARGE, *[_MEDIUM] * 3, _SMALL,
    ),
    "14b": (
        *[_SPREAD] * 11, *[_SPREAD_WIDE] * 2, *[_SMALL] * 10, _MEDIUM, _LARGE, _MEDIUM, _LARGE, None, _LARGE,
        *[_MEDIUM] * 2, *[_LARGE] * 2, _MEDIUM, _LARGE, _MEDIUM,
    ),
}  # fmt: skip


def attention_share(schedule: Sequence[Pattern | None], grid: Triple) -> float:
    """Of the multiplications of full self-attention in all layers of a network, those that a schedule leaves.

    A grid of one frame is attended to in full.
    """
    if grid[0] == 1:
        return 1.0
    return sum(1.0 if one is None else one.fitted(grid).share for one in schedule) / len(schedule)


class Group(NamedTuple):
    """Positions along one axis: queries that share one window, and its keys; both at one distance (the dilation)."""

    queries: range
    keys: range


def axis_groups(length: int, window: int, stride: int, dilation: int) -> list[Group]:
    """The groups of an axis, residue after residue, each in order; every position is the query of exactly one."""
    groups = []
    for residue in range(dilation):
        positions = range(length)[residue::dilation]
        for first in range(0, len(positions), stride):
            leader = min(first + stride // 2, len(positions) - 1)
            start = min(max(leader - window // 2, 0), len(positions) - window)
            groups.append(Group(positions[first : first + stride], positions[start : start + window]))
    return groups


def all_groups(fitted: Fitted) -> list[list[Group]]:
    return [axis_groups(*numbers) for numbers in zip(*fitted, strict=True)]


def neighbourhood_mask(fitted: Fitted) -> Tensor:
    """The definition: bool [N, N], whether a query (row) sees a key (column), tokens in the order (t, h, w)."""
    whole = torch.ones(1, 1, dtype=torch.bool)
    for length, groups in zip(fitted.grid, all_groups(fitted), strict=True):
        axis = torch.zeros(length, length, dtype=torch.bool)
        for queries, keys in groups:
            axis[torch.tensor(queries)[:, None], torch.tensor(keys)] = True
        whole = (whole[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return whole


def constant(function: C) -> C:
    """Let torch.compile run a function of constants while it traces, and keep what it returns.

    It is what torch.compiler.assume_constant_result does; calling that would import the compiler, two seconds of it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
