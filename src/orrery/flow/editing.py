"""Velocity fields with something around them: what holds a part of a video, what watches where a step leads to.

Guided generation: parts of a known video are held to their own path for the first steps. The network's input is, where
the mask says so, the known latents at the noise level of the step; the solver's own latents are not touched. So the
parts that are held stay close to what they were and grow together with the rest. Specification of Transfer, section 2.
"""

from collections.abc import Callable

from torch import Tensor

from .schedule import Schedule


def held(
    velocity: Callable[[Tensor, float], Tensor],
    schedule: Schedule,
    known: Tensor,
    noise: Tensor,
    mask: Tensor,
    last_step: int,
) -> Callable[[Tensor, float], Tensor]:
    """A velocity field for `solve`, one evaluation a step, that holds `known` in steps 0 to `last_step`.

    Args:
        known, noise: clean latents and the starting noise [B, C, T, H, W]. mask: [B or 1, 1, T, H, W] in 0..1, 1 where
            they are held. last_step: the last step, counted from 0, that holds them.
    """
    step = 0

    def field(x: Tensor, timestep: float) -> Tensor:
        nonlocal step
        if step <= last_step:
            sigma = float(schedule.sigmas[step])
            x = mask * ((1 - sigma) * known + sigma * noise) + (1 - mask) * x
        step += 1
        return velocity(x, timestep)

    return field


def watched(
    velocity: Callable[[Tensor, float], Tensor], schedule: Schedule, show: Callable[[int, Tensor], None]
) -> Callable[[Tensor, float], Tensor]:
    """A velocity field for `solve`, one evaluation a step, that tells where each step leads to: show(step from 0,
    x - sigma v), which are clean latents as they are expected there, [B, C, T, H, W] float32."""
    step = 0

    def field(x: Tensor, timestep: float) -> Tensor:
        nonlocal step
        v = velocity(x, timestep)
        show(step, x.float() - float(schedule.sigmas[step]) * v.float())
        step += 1
        return v

    return field
