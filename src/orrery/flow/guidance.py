"""Classifier-free guidance in the convention of the published Video2World models."""

from collections.abc import Callable, Sequence

from torch import Tensor

from .conditioning import FrameCondition


def guided(v_cond: Tensor, v_uncond: Tensor, g: float) -> Tensor:
    """v = v_c + g (v_c - v_u), elementwise on tensors of one shape.

    g = 0 is the plain conditional velocity, so g is the usual guidance scale minus 1 (their g = 7 is scale 8).
    v_u comes from the negative prompt and sees the same given frames as v_c.
    """
    return v_cond + g * (v_cond - v_uncond)


def guided_velocity(
    predict: Callable[[Tensor, Tensor], Sequence[Tensor]], given: FrameCondition, noise: Tensor, g: float
) -> Callable[[Tensor, float], Tensor]:
    """The velocity field that `solve` follows: given frames put in place, guidance between two predictions.

    Args:
        predict: (x, times) -> the conditional velocity and, where there is guidance, the one it leads away from; each
            of x's shape. `one_by_one` and `side_by_side` make it out of a network.
        given: what the clip begins with. noise: the clip's starting noise [B, C, T, H, W]. g: see `guided`.
    """

    def velocity(x: Tensor, timestep: float) -> Tensor:
        x, times = given.replace(x), given.timesteps(timestep)
        answers = [given.velocity(answer.float(), noise) for answer in predict(x, times)]
        return guided(answers[0], answers[1], g) if len(answers) == 2 else answers[0]

    return velocity


def one_by_one(networks: Sequence[Callable[[Tensor, Tensor], Tensor]]) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Predictions of one v(x, times) after the other: half the memory."""
    return lambda x, times: [network(x, times) for network in networks]


def side_by_side(network: Callable[[Tensor, Tensor], Tensor], count: int) -> Callable[[Tensor, Tensor], list[Tensor]]:
    """Predictions of one v(x, times) that answers `count` texts in one batch [count * B, ...], text by text."""

    def predict(x: Tensor, times: Tensor) -> list[Tensor]:
        answers = network(x.repeat(count, *[1] * (x.ndim - 1)), times.repeat(count, *[1] * (times.ndim - 1)))
        return list(answers.chunk(count))

    return predict
