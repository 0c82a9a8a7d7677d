"""The straight path between data and noise, and the law of training times.

Rectified flow of the Cosmos-Predict2.5 report (arXiv 2511.00062): x_t = (1 - t) x0 + t eps, velocity v = eps - x0.
Time t runs from 0 (data) to 1 (noise). The network is told 1000 t; the factor is applied by the caller.
"""

import torch
from torch import Tensor

DISTRIBUTIONS = ("logit_normal", "uniform")


def _over(t: Tensor | float, x: Tensor) -> Tensor | float:
    """Shape t (a number, [B] or [B, T]) so that it broadcasts over x [B, C, T, H, W]; [B] fits any x [B, ...]."""
    if not isinstance(t, Tensor) or t.ndim == 0:
        return t
    if t.ndim == 1 and t.shape[0] in (1, x.shape[0]):
        return t.reshape(-1, *[1] * (x.ndim - 1))
    if t.ndim == 2 and x.ndim == 5 and t.shape[0] in (1, x.shape[0]) and t.shape[1] == x.shape[2]:
        return t[:, None, :, None, None]
    raise ValueError(
        f"t of shape {tuple(t.shape)} does not fit latents of shape {tuple(x.shape)}: "
        "allowed are a number, [B], or [B, T]"
    )


def interpolate(x0: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """x_t = (1 - t) x0 + t noise.

    Args:
        x0, noise: clean latents and unit Gaussian noise, both [B, C, T, H, W].
        t: time in [0, 1]; a number, [B] (one per sample), or [B, T] (one per latent frame).
    Raises ValueError when the shapes do not fit.
    """
    if x0.shape != noise.shape:
        raise ValueError(f"x0 {tuple(x0.shape)} and noise {tuple(noise.shape)} must have the same shape")
    t = _over(t, x0)
    return (1 - t) * x0 + t * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = noise - x0, the derivative of the path; it does not depend on t."""
    return noise - x0


def x0_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The clean latents that velocity v at (x_t, t) points to: x_t - t v. Shapes as in `interpolate`."""
    return x_t - _over(t, x_t) * v


def noise_from_velocity(x_t: Tensor, v: Tensor, t: Tensor | float) -> Tensor:
    """The noise that velocity v at (x_t, t) comes from: x_t + (1 - t) v. Shapes as in `interpolate`."""
    return x_t + (1 - _over(t, x_t)) * v


def shift_times(u: Tensor, shift: float) -> Tensor:
    """t = s u / (1 + (s - 1) u): moves times in [0, 1] towards noise for s > 1; the identity for s = 1."""
    if not shift > 0:
        raise ValueError(f"shift is {shift}; it must be positive")
    return shift * u / (1 + (shift - 1) * u)


def sample_times(
    batch: int,
    shift: float = 5.0,
    generator: torch.Generator | None = None,
    distribution: str = "logit_normal",
    high_noise_fraction: float = 0.05,
    high_noise_width: float = 0.02,
) -> Tensor:
    """Draw training times, one per sample: t [batch], float32, strictly inside (0, 1), on the generator's device.

    First u ~ sigmoid(N(0, 1)) (`logit_normal`) or u ~ U(0, 1) (`uniform`), then `shift_times`. Then, with probability
    `high_noise_fraction`, a time is replaced by one from the high-noise tail, uniform on [1 - high_noise_width, 1).

    The tail is continuous in t. The official code instead picks uniformly among the shifted grid's points above 980,
    which crowds the tail towards 1; the report only says 5 % of samples from the top 2 % of noise, and a law that is
    flat in t keeps that statement true for every shift.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least 1")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution is {distribution!r}; allowed are {', '.join(DISTRIBUTIONS)}")
    if not 0 <= high_noise_fraction <= 1:
        raise ValueError(f"high_noise_fraction is {high_noise_fraction}; allowed is 0 to 1")
    if not 0 < high_noise_width <= 1:
        raise ValueError(f"high_noise_width is {high_noise_width}; allowed is above 0 and at most 1")
    device = generator.device if generator is not None else None
    if distribution == "logit_normal":
        u = torch.randn(batch, generator=generator, device=device).sigmoid()
    else:
        u = torch.rand(batch, generator=generator, device=device)
    t = shift_times(u, shift)
    if high_noise_fraction > 0:
        # Both draws cover the whole batch, so the number of draws does not depend on their outcome.
        chosen = torch.rand(batch, generator=generator, device=device) < high_noise_fraction
        tail = 1 - high_noise_width * torch.rand(batch, generator=generator, device=device)
        t = torch.where(chosen, tail, t)
    # rand() can return exactly 0, which would put a sample at an end of the path.
    return t.clamp(2.0**-24, 1 - 2.0**-24)
