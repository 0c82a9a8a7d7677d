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
    networks: Sequence[Callable[[Tensor, Tensor], Tensor]], given: FrameCondition, noise: Tensor, g: float
) -> Callable[[Tensor, float], Tensor]:
    """The velocity field that `solve` follows: given frames put in place, guidance between two predictions.

    Args:
        networks: v(x, times), conditional first, then, where there is guidance, what it leads away from; one or two.
        given: what the clip begins with. noise: the clip's starting noise [B, C, T, H, W]. g: see `guided`.
    """

    def velocity(x: Tensor, timestep: float) -> Tensor:
        x, times = given.replace(x), given.timesteps(timestep)
        answers = [given.velocity(network(x, times).float(), noise) for network in networks]
        return guided(answers[0], answers[1], g) if len(answers) == 2 else answers[0]

    return velocity
