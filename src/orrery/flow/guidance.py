"""Classifier-free guidance in the convention of the published Video2World models, and where on the way it acts.

Guidance matters at some noise levels and costs an evaluation at all of them: within an interval only, the others are
made at half the arithmetic (Kynkaanniemi et al. 2024, arXiv 2404.07724). That is another sampler, not a rounding.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .conditioning import FrameCondition
from .schedule import TIME_UNITS, Schedule

Network = Callable[[Tensor, Tensor], Tensor]
Interval = tuple[float, float]
EDGE = 1e-6  # of sigma: float32 times of a level that is meant to be the edge


class Predict(Protocol):
    """Predictions [B, C, T, H, W] of latents x at `times`: the conditional velocity and, where there is guidance, the
    one it leads away from. count: only the first so many; None for all."""

    def __call__(self, x: Tensor, times: Tensor, count: int | None = None) -> Sequence[Tensor]: ...


def guided(v_cond: Tensor, v_uncond: Tensor, g: float) -> Tensor:
    """v = v_c + g (v_c - v_u), elementwise on tensors of one shape.

    g = 0 is the plain conditional velocity, so g is the usual guidance scale minus 1 (their g = 7 is scale 8).
    v_u comes from the negative prompt and sees the same given frames as v_c.
    """
    return v_cond + g * (v_cond - v_uncond)


def guided_velocity(
    predict: Predict, given: FrameCondition, noise: Tensor, g: float, interval: Interval | None = None
) -> Callable[[Tensor, float], Tensor]:
    """The velocity field that `solve` follows: given frames put in place, guidance between two predictions.

    Args:
        predict: see `Predict`; `one_by_one` and `side_by_side` make it out of a network.
        given: what the clip begins with. noise: the clip's starting noise [B, C, T, H, W]. g: see `guided`.
        interval: (low, high) noise levels sigma in 0..1, both included, where there is guidance; outside, the
            conditional prediction alone is made and is the velocity. None: everywhere.

    The level is read off the time that the network is told. Where that is truncated to a whole number, a level counts
    as up to 0.001 less than it is: one just above `high` may be inside, one just above `low` outside.

    Raises:
        ValueError: an interval that is not 0 <= low < high <= 1.
    """
    if interval is not None:
        _check(interval)

    def velocity(x: Tensor, timestep: float) -> Tensor:
        x, times = given.replace(x), given.timesteps(timestep)
        predictions = predict(x, times) if _within(timestep, interval) else predict(x, times, 1)
        answers = [given.velocity(answer.float(), noise) for answer in predictions]
        return guided(answers[0], answers[1], g) if len(answers) == 2 else answers[0]

    return velocity


def guidance_jumps(schedule: Schedule, interval: Interval | None) -> list[int]:
    """Steps, counted from 0, at which guidance within `interval` begins or ends: the velocity jumps there.

    Raises:
        ValueError: as `guided_velocity`.
    """
    if interval is None:
        return []
    _check(interval)
    inside = [_within(time, interval) for time in schedule.timesteps.tolist()]
    return [step for step in range(1, len(inside)) if inside[step] != inside[step - 1]]


def one_by_one(networks: Sequence[Network]) -> Predict:
    """Predictions of one v(x, times) after the other: half the memory."""

    def predict(x: Tensor, times: Tensor, count: int | None = None) -> list[Tensor]:
        return [network(x, times) for network in networks[:count]]

    return predict


def side_by_side(network: Network, count: int, first: Network | None = None) -> Predict:
    """Predictions of one v(x, times) that answers `count` texts in one batch [count * B, ...], text by text.

    first: v(x, times) of the first text alone, for an interval of guidance; without it the first cannot be asked alone.
    """
    texts = count

    def predict(x: Tensor, times: Tensor, count: int | None = None) -> list[Tensor]:
        if count is not None and count < texts:
            if first is None or count != 1:
                raise ValueError(f"{count} of {texts} predictions asked; allowed are all, or 1 where `first` makes it")
            return [first(x, times)]
        if len(times) > 1:  # times of batch 1 serve both texts, and are modulated once
            times = times.repeat(texts, *[1] * (times.ndim - 1))
        answers = network(x.repeat(texts, *[1] * (x.ndim - 1)), times)
        return list(answers.chunk(texts))

    return predict


def _within(timestep: float, interval: Interval | None) -> bool:
    if interval is None:
        return True
    low, high = interval
    return low - EDGE <= timestep / TIME_UNITS <= high + EDGE


def _check(interval: Interval) -> None:
    low, high = interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"interval is {tuple(interval)}; allowed is (low, high) with 0 <= low < high <= 1")
