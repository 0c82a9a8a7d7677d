"""Step caching: leave out network evaluations whose answer can be forecast, within an error budget.

Along a trajectory the velocity is a smooth function of the noise level, so that the line through its last two values
often foretells the next one well. Caches for diffusion models reuse or extrapolate what networks computed before, and
decide by a fixed pattern or a threshold on some indicator (TeaCache, arXiv 2411.19108; EasyCache, arXiv 2507.02860;
AB-Cache, arXiv 2504.10540; TaylorSeer, arXiv 2503.06923). Here what is budgeted is what matters, the error of the final
latents, and nothing is read but velocities: whatever computes them is covered.

A velocity that is wrong by e at step i moves the final latents by about |sigma_i+1 - sigma_i| e. The error of a line
through values at a and b is, at sigma, c (sigma - a) (sigma - b) with c half the second derivative; each evaluation
that is made anyhow tells c, for the line before it missed it by a known amount. Where c grew since the evaluation
before, it is taken to grow as much again; and no line is followed far beyond its two values. A step is skipped while
the sum of what all skipped steps add, relative to the rms of the data prediction x - sigma v, stays within the share of
the budget that is due by that step. The sum takes errors as if they all pointed the same way, and does not know whether
the flow amplifies them: an estimate, not a bound. `benchmarks/knee.py` measures how it compares with the truth.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from .schedule import Schedule

WARM_UP = 3  # two evaluations make a line, and a third tells how far it misses
REACH = 2.0  # how far ahead a line is believed, in distances between the two values that make it


class StepCache:
    """A velocity field for `solve` (Euler or UniPC, one call a step) that forecasts some of its answers.

    >>> cache = StepCache(velocity, schedule, budget=0.02)
    >>> latents = solve(cache, noise, schedule)
    >>> cache.evaluations, cache.skipped, cache.estimated_error

    Args:
        velocity: (x [B, ...], timestep in 0..1000) -> velocity of x's shape. It is not called in skipped steps: what
            counts its own calls must be put around the cache, not inside.
        schedule: of the trajectory; each of its steps is one call.
        budget: how far the final latents may be off from those without the cache: rms of the difference over rms of
            the latents, of the worst sample of a batch. 0 never skips, and changes no bit.
        jumps: steps, counted from 0, at which the velocity jumps: a guidance interval begins or ends
            (`guidance_jumps`), latents are no longer held. They are evaluated, and what was before them is forgotten.

    The first three evaluations (also after a jump) and the last step are never skipped. One object a trajectory; it
    holds the last two velocities. Raises ValueError for a budget outside 0 to 1.
    """

    def __init__(
        self,
        velocity: Callable[[Tensor, float], Tensor],
        schedule: Schedule,
        budget: float,
        jumps: Collection[int] = (),
    ):
        if not 0 <= budget < 1:
            raise ValueError(f"budget is {budget}; allowed is 0 to below 1, a relative error of the final latents")
        self.velocity, self.schedule, self.budget, self.jumps = velocity, schedule, budget, frozenset(jumps)
        self.evaluations = 0
        self.estimated_error = 0.0
        self.pattern = ""  # one letter a step: "x" evaluated, "." skipped
        self._sigmas: list[float] = schedule.sigmas.tolist()
        self._known: list[tuple[float, Tensor]] = []  # the last two evaluations: sigma and velocity, newest last
        self._bend: float | None = None  # half the second derivative of the velocity, over the rms of the latents
        self._growth = 1.0  # of the bend from the evaluation before to the last one, at least 1: it may go on like that

    @property
    def skipped(self) -> int:
        """Steps that were answered without an evaluation."""
        return len(self.pattern) - self.evaluations

    def __str__(self) -> str:
        return (
            f"{self.skipped} of {len(self.pattern)} steps skipped ({self.pattern}), latents off by an estimated "
            f"{self.estimated_error:.3g} of a budget of {self.budget:g}"
        )

    def __call__(self, x: Tensor, timestep: float) -> Tensor:
        """Velocity at the next step of the schedule: the network's, or the forecast."""
        step = len(self.pattern)
        if step >= len(self.schedule):
            raise ValueError(f"step {step + 1} asked of a schedule with {len(self.schedule)} steps")
        if step in self.jumps:
            self._known, self._bend, self._growth = [], None, 1.0
        cost = self._cost(step)
        if cost is not None and self.estimated_error + cost <= self._due(step):
            self.estimated_error += cost
            self.pattern += "."
            return self._forecast(self._sigmas[step])
        v = self.velocity(x, timestep)
        self.evaluations += 1
        self.pattern += "x"
        if self.budget:
            self._learn(self._sigmas[step], x, v)
        return v

    def _due(self, step: int) -> float:
        """The part of the budget that may be spent by the end of `step`: even over the steps that can be skipped."""
        return self.budget * (step + 1 - WARM_UP) / (len(self.schedule) - WARM_UP - 1)

    def _cost(self, step: int) -> float | None:
        """What skipping `step` would add to the relative error of the final latents; None: it must not be skipped."""
        if self._bend is None or step + 1 == len(self.schedule):
            return None
        before, here, after = self._sigmas[step - 1 : step + 2]
        (a, _), (b, _) = self._known
        if b - here > REACH * (a - b):
            return None
        weight = max(before - here, here - after)  # UniPC's corrector uses the velocity for the step before as well
        return weight * self._bend * self._growth * self._distance(here)

    def _distance(self, sigma: float) -> float:
        """|(sigma - a) (sigma - b)|, by which the miss of the line through the two known velocities grows."""
        (a, _), (b, _) = self._known
        return abs((sigma - a) * (sigma - b))

    def _forecast(self, sigma: float) -> Tensor:
        (a, older), (b, newer) = self._known
        return newer + (sigma - b) / (b - a) * (newer - older)

    def _learn(self, sigma: float, x: Tensor, v: Tensor) -> None:
        """Compare the forecast with velocity v at x, and keep v."""
        v = v.detach().float()
        if len(self._known) == 2:
            miss, latents = _rms(self._forecast(sigma) - v), _rms(x.detach().float() - sigma * v)
            # One number leaves the device, in a step that has waited for a network; NaN skips nothing.
            bend = float((miss / latents.clamp_min(1e-12)).amax()) / self._distance(sigma)
            self._growth = max(1.0, bend / self._bend) if self._bend else 1.0
            self._bend = bend
        self._known = [*self._known[-1:], (sigma, v)]


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each sample of x [B, ...]: [B]."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1) / x[0].numel() ** 0.5
