"""Solvers that carry noise to latents along a velocity field: Euler, UniPC, and the sampler of distilled models.

UniPC is the unified predictor-corrector of Zhao et al. 2023 (arXiv 2302.04867) in the configuration that the
published models use: multistep, order 2, B2(h) = e^h - 1, data prediction (x0 = x - sigma v), corrector from the
second evaluation on, order 1 in the first and in the last step. Here alpha = 1 - sigma and lambda = ln(alpha / sigma).
A corrector step costs no evaluation: it uses the velocity that the next predictor step needs anyway.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .schedule import Schedule

Velocity = Callable[[Tensor, float], Tensor]
Callback = Callable[[int, int, Tensor], None]


def _check_step(index: int, schedule: Schedule, v: Tensor, x: Tensor) -> None:
    if index >= len(schedule):
        raise ValueError(f"step {index + 1} asked of a schedule with {len(schedule)} steps")
    if v.shape != x.shape:
        raise ValueError(f"velocity {tuple(v.shape)} and latents {tuple(x.shape)} must have the same shape")


class Euler:
    """First order: x <- x + (sigma_next - sigma) v. Holds only its position in the schedule."""

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.index = 0

    def step(self, v: Tensor, x: Tensor) -> Tensor:
        """From latents x at the current sigma and velocity v there, to latents at the next; float32."""
        _check_step(self.index, self.schedule, v, x)
        sigma, following = self.schedule.sigmas[self.index : self.index + 2].tolist()
        self.index += 1
        return x.float() + (following - sigma) * v.float()


class Renoise:
    """The sampler of distilled models: to the end in one leap, then back up with the SAME starting noise.

    m = x - sigma v is where the velocity points; the next latents are (1 - sigma_next) m + sigma_next noise, with the
    noise that the trajectory began with. In the angles of TrigFlow, where x' = cos(a) x0 + sin(a) noise, this is
    x0 = c_skip x' + c_out F, x'_next = cos(a_next) x0 + sin(a_next) noise: with sigma = sin / (sin + cos) the network's
    input c_in x' is the flow's latents x, and F is its velocity. Specification, section 4.8. Stateful: one object per
    trajectory, which must begin at sigma 1.
    """

    def __init__(self, schedule: Schedule):
        if schedule.sigmas[0] != 1:
            raise ValueError(f"the first sigma is {schedule.sigmas[0].item()}; this sampler begins at pure noise, 1")
        self.schedule = schedule
        self.index = 0
        self._noise = torch.empty(0)  # what the first step is given

    def step(self, v: Tensor, x: Tensor) -> Tensor:
        """From latents x at the current sigma and velocity v there, to latents at the next; float32."""
        _check_step(self.index, self.schedule, v, x)
        x = x.float()
        if self.index == 0:
            self._noise = x
        sigma, following = self.schedule.sigmas[self.index : self.index + 2].tolist()
        self.index += 1
        return (1 - following) * (x - sigma * v.float()) + following * self._noise


@dataclass(frozen=True)
class _Interval:
    """Numbers of the step from level i to level i + 1, as the exponential integrator needs them.

    With m_i the data prediction at level i, every update is
        x_{i+1} = keep * x_i + pull * (m_i + rho_0 * (m_{i-1} - m_i) / ratio + rho_1 * (m_{i+1} - m_i)).
    The predictor knows no m_{i+1}: its rho are (1/2, 0). At order 1 there is no m_{i-1}: the predictor's rho are
    (0, 0), the corrector's (0, 1/2).
    """

    keep: float
    pull: float
    ratio: float  # the previous step in lambda over this one, backwards: negative
    corrector: tuple[float, float]  # rho of the order-2 corrector


def _intervals(sigmas: Tensor) -> list[_Interval]:
    """One `_Interval` per step but the last (which ends at sigma 0, where lambda is infinite).

    The arithmetic is float32, like the official sampler's: in double the trajectory would differ from it by the
    rounding of lambda.
    """
    alphas = 1 - sigmas
    lambdas = alphas.log() - sigmas.log()
    intervals = []
    for i in range(len(sigmas) - 2):
        h = lambdas[i + 1] - lambdas[i]
        phi_1 = torch.expm1(-h)  # this is B2 as well
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 0.5
        pull = -alphas[i + 1] * phi_1
        r = (lambdas[i - 1] - lambdas[i]) / h if i > 0 else torch.ones(())
        # rho solves [[1, 1], [r, 1]] rho = [phi_2, 2 phi_3] / phi_1: the moments of order 1 and 2 are matched.
        b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
        rho_0 = (b_1 - b_2) / (1 - r) if i > 0 else torch.zeros(())
        keep = sigmas[i + 1] / sigmas[i]
        intervals.append(_Interval(keep.item(), pull.item(), r.item(), (rho_0.item(), (b_1 - rho_0).item())))
    return intervals


class UniPC:
    """UniPC as described above. Stateful: call `step` once per level, in order; one object per trajectory."""

    def __init__(self, schedule: Schedule):
        if schedule.sigmas[0] >= 1:
            raise ValueError(
                f"the first sigma is {schedule.sigmas[0].item()}; UniPC needs it below 1, where ln(1 - sigma) is finite"
            )
        self.schedule = schedule
        self.index = 0
        self._intervals = _intervals(schedule.sigmas)
        self._predictions: list[Tensor] = []  # data predictions at the last two levels, newest last
        self._state = torch.empty(0)  # corrected latents at the previous level, from the first step on

    def step(self, v: Tensor, x: Tensor) -> Tensor:
        """From latents x at the current sigma and velocity v there, to latents at the next; float32.

        x must be what the last `step` returned: the corrector replaces it by a better one using v.
        """
        _check_step(self.index, self.schedule, v, x)
        i = self.index
        x = x.float()
        prediction = x - self.schedule.sigmas[i].item() * v.float()
        if i > 0:
            x = self._correct(i - 1, prediction)
        self.index += 1
        self._predictions = [*self._predictions[-1:], prediction]
        self._state = x
        return prediction if self.index == len(self.schedule) else self._predict(i, x)

    def _predict(self, i: int, x: Tensor) -> Tensor:
        """Latents at level i + 1 from latents x at level i; order 2 from the second level on."""
        interval, newest = self._intervals[i], self._predictions[-1]
        base = interval.keep * x + interval.pull * newest
        if i == 0:
            return base
        return base + interval.pull * 0.5 * ((self._predictions[-2] - newest) / interval.ratio)

    def _correct(self, i: int, arrived: Tensor) -> Tensor:
        """Latents at level i + 1 again, now that the data prediction `arrived` at that level is known."""
        interval, newest = self._intervals[i], self._predictions[-1]
        base = interval.keep * self._state + interval.pull * newest
        if i == 0:
            return base + interval.pull * 0.5 * (arrived - newest)
        rho_0, rho_1 = interval.corrector
        bend = (self._predictions[-2] - newest) / interval.ratio
        return base + interval.pull * (rho_0 * bend + rho_1 * (arrived - newest))


SOLVERS: dict[str, type[UniPC] | type[Euler] | type[Renoise]] = {"unipc": UniPC, "euler": Euler, "renoise": Renoise}


def solve(
    velocity: Velocity, noise: Tensor, schedule: Schedule, solver: str = "unipc", callback: Callback | None = None
) -> Tensor:
    """Carry `noise` [B, C, T, H, W] to latents [B, C, T, H, W] (float32, on noise's device).

    Args:
        velocity: called as velocity(x, timestep) with x float32 like noise and timestep a float in 0..1000; returns v
            of x's shape. Guidance and frame conditioning happen inside it.
        schedule: len(schedule) evaluations.
        solver: a key of SOLVERS.
        callback: called after each step as callback(steps done, steps in all, latents now).

    Gradients are recorded unless the caller switches them off.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver is {solver!r}; allowed are {', '.join(SOLVERS)}")
    state = SOLVERS[solver](schedule)
    x = noise.float()
    for done, timestep in enumerate(schedule.timesteps.tolist(), start=1):
        x = state.step(velocity(x, timestep), x)
        if callback is not None:
            callback(done, len(schedule), x)
    return x
