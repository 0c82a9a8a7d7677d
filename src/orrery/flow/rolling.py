"""Rolling on: the latent frames that follow those that there are, drawn by the flow with the past given.

What is given is put in place, marked and told its own time, as in every generation (`flow.conditioning`); what is new
begins as noise. A window moves over the rollout, so that any length costs the memory of one window.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from orrery.flow.conditioning import FrameCondition
from orrery.flow.schedule import Schedule
from orrery.flow.solvers import solve

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def roll_on(
    network: Network,
    past: Tensor,
    noise: Tensor,
    schedule: Schedule,
    conditional_timestep: float | None = 0.0,
    solver: str = "unipc",
) -> Tensor:
    """The latents [B, C, n, H, W] that follow `past`, float32.

    Args:
        network: (latents [B, C, k + n, H, W], times, mask [B, 1, k + n, H, W]) -> velocity; it knows actions and text.
        past: [B, C, k, H, W], k >= 1.
        noise: [B, C, n, H, W], what the new frames begin as.
        conditional_timestep: time that the past is told, in 0..1000 units.
    """
    if past.ndim != 5 or past.shape[2] < 1 or past.shape[:2] != noise.shape[:2] or past.shape[3:] != noise.shape[3:]:
        raise ValueError(f"past {list(past.shape)} and noise {list(noise.shape)} must be [B, C, k or n, H, W], k >= 1")
    count = past.shape[2]
    condition = FrameCondition(torch.cat([past, torch.zeros_like(noise)], dim=2), count, conditional_timestep)
    start = torch.cat([torch.zeros_like(past), noise], dim=2)

    def velocity(x: Tensor, t: float) -> Tensor:
        v = network(condition.replace(x), condition.timesteps(t), condition.mask)
        return condition.velocity(v, start)

    return solve(velocity, start, schedule, solver)[:, :, count:]
