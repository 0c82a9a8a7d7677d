"""Noise levels and network times of a sampling run: the three published schedules.

A schedule has N noise levels sigma (which are the flow times t in (0, 1]) and a final 0. The network is asked N
times, and is told a time in 0..1000 units that the official code TRUNCATES to a whole number while the solver keeps
the exact sigma. Published models were tuned with this; `exact_times=True` tells the network 1000 sigma instead.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TIME_UNITS = 1000.0
STUDENT_STEPS = 4


@dataclass(frozen=True)
class Schedule:
    """Noise levels `sigmas` [N + 1] (float32, CPU, strictly falling from at most 1 to exactly 0) and the times
    `timesteps` [N] (float32, CPU, 0..1000) that the network is told at the first N of them."""

    sigmas: Tensor
    timesteps: Tensor

    def __post_init__(self):
        if self.sigmas.ndim != 1 or len(self.sigmas) < 2 or self.timesteps.shape != (len(self.sigmas) - 1,):
            raise ValueError(
                f"a schedule needs sigmas [N + 1] and timesteps [N] with N >= 1; got {tuple(self.sigmas.shape)} "
                f"and {tuple(self.timesteps.shape)}"
            )
        if not bool((self.sigmas.diff() < 0).all()) or self.sigmas[0] > 1 or self.sigmas[-1] != 0:
            raise ValueError(f"sigmas must fall strictly from at most 1 to 0; got {self.sigmas.tolist()}")

    def __len__(self) -> int:
        """Number of network evaluations N."""
        return len(self.timesteps)


def _schedule(sigmas: np.ndarray, exact_times: bool) -> Schedule:
    times = TIME_UNITS * sigmas
    if not exact_times:
        times = np.trunc(times)
    return Schedule(
        torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32)), torch.from_numpy(times.astype(np.float32))
    )


def _check_steps(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")


def shift_schedule(steps: int = 35, shift: float = 5.0, exact_times: bool = False) -> Schedule:
    """The schedule of the pre-trained 2B and of both 14B models: `steps` evaluations.

    s runs linearly from 0.999 down to (not including) 0, then sigma = shift s / (1 + (shift - 1) s). The start is
    0.999 and not 1 because the official sampler reads it off a table of 1000 training times.
    """
    _check_steps(steps)
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive")
    # The table is float32, so its first entry is the float32 next to 0.999. That matters: from 0.999 itself, 2/3 of the
    # way comes out as 665.999... instead of 666 and is truncated to the wrong time.
    s = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
    return _schedule(shift * s / (1 + (shift - 1) * s), exact_times)


def karras_schedule(
    steps: int = 35, sigma_max: float = 200.0, sigma_min: float = 0.01, rho: float = 7.0, exact_times: bool = False
) -> Schedule:
    """The schedule of the post-trained 2B and of the camera models: `steps + 1` evaluations.

    Noise-to-signal ratios fall from sigma_max to sigma_min (both included) evenly in the power 1/rho (Karras et al.
    2022, equation 5), and r / (1 + r) turns each into a flow time. `steps` counts intervals, as the official option
    does, so the default asks the network 36 times.
    """
    _check_steps(steps)
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}; needed is 0 < sigma_min < sigma_max")
    if not rho > 0:
        raise ValueError(f"rho is {rho}; it must be positive")
    ramp = np.linspace(0.0, 1.0, steps + 1)
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    ratio = (top + ramp * (bottom - top)) ** rho
    return _schedule(ratio / (1 + ratio), exact_times)


def distilled_schedule(steps: int = 4, shift: float = 5.0, exact_times: bool = True) -> Schedule:
    """The schedule of the distilled 2B: `steps` evaluations, the first at pure noise (sigma 1).

    s runs linearly from 1 down to (not including) 0, then sigma = shift s / (1 + (shift - 1) s). Four steps are
    1, 15/16, 5/6, 5/8: the flow times of the TrigFlow angles pi/2, atan 15, atan 5 and atan 5/3 that the student was
    trained at (tan(angle) = sigma / (1 - sigma)). Fewer steps are the first of these four, as the official code has it.
    Specification of the base model, section 4.8.
    """
    _check_steps(steps)
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive")
    s = np.linspace(1.0, 0.0, max(steps, STUDENT_STEPS) + 1)[:steps]
    return _schedule(shift * s / (1 + (shift - 1) * s), exact_times)


def start_at(schedule: Schedule, sigma: float, exact_times: bool = False) -> Schedule:
    """The rest of a schedule from noise level `sigma` on: where an edit begins that keeps part of what there is
    (SDEdit, arXiv 2108.01073: latents (1 - sigma) x0 + sigma noise). sigma itself is the first level.

    Raises:
        ValueError: sigma outside (0, 1].
    """
    if not 0 < sigma <= 1:
        raise ValueError(f"sigma is {sigma}; allowed is above 0 to 1")
    later = schedule.sigmas[:-1] < sigma - 1e-6
    if bool(later.all()):
        return schedule
    first = _schedule(np.array([sigma]), exact_times)
    return Schedule(
        torch.cat([first.sigmas[:1], schedule.sigmas[:-1][later], schedule.sigmas[-1:]]),
        torch.cat([first.timesteps, schedule.timesteps[later]]),
    )
