"""Guided generation: parts of a known video are held to their own path for the first steps.

The network's input is, where the mask says so, the known latents at the noise level of the step; the solver's own
latents are not touched. So the parts that are held stay close to what they were and grow together with the rest.
Specification of Transfer, section 2, "Guided generation".
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
