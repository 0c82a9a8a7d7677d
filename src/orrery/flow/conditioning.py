"""Given frames: latents that the model is shown instead of being asked for.

The first n latent frames of a clip are given (n = 0 text, 1 image, 2 the last five frames of a video). At the input
they replace the noisy latents, and a mask channel marks them; at the output their velocity is replaced by the true
one, noise - latents, with the fixed starting noise. So they cost nothing in training, and in sampling they walk the
straight path to the given latents. They stop a little short, by (1 - sigma_0) of the way, because the published
schedules call pure noise sigma_0 < 1: 0.0002 under shift 5, 0.005 under Karras. A last `replace` removes even that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def frame_mask(
    count: int | Sequence[int] | Tensor,
    frames: int,
    height: int,
    width: int,
    batch: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Mask [B, 1, T, H, W] float32: 1 on the first `count` of `frames` latent frames, else 0.

    Args:
        count: how many frames are given, 0 to T; one number, or one per sample ([B]).
        frames, height, width: T, H and W in latent units.
        batch: B; may be left out (1 for a number, else the length of `count`).

    A single frame (T = 1) is an image: there is nothing to continue, its mask is all 0 whatever the count.
    Raises ValueError for a count outside 0..T or a batch that does not fit.
    """
    counts = torch.as_tensor(count)  # checked where it lives: counts on the CPU cost a GPU no wait
    if counts.ndim == 0:
        counts = counts.repeat(1 if batch is None else batch)
    if counts.ndim != 1 or counts.is_floating_point() or batch not in (None, len(counts)):
        raise ValueError(f"count must be one whole number or one for each of {batch} samples; got {count!r}")
    if frames == 1:
        return torch.zeros(len(counts), 1, 1, height, width, device=device)
    if bool((counts < 0).any()) or bool((counts > frames).any()):
        raise ValueError(f"count is {counts.tolist()}; allowed is 0 to {frames}, the number of latent frames")
    given = (torch.arange(frames, device=counts.device) < counts[:, None]).float().to(device)
    return given[:, None, :, None, None].repeat(1, 1, 1, height, width)


def sample_counts(batch: int, probabilities: Sequence[float], generator: torch.Generator | None = None) -> Tensor:
    """Draw how many frames are given, one int64 per sample [batch]: n with probability probabilities[n].

    The published mix for 0, 1 and 2 latent frames is (0.5, 0.25, 0.25).
    """
    weights = torch.tensor(probabilities, dtype=torch.float64)
    if weights.ndim != 1 or bool((weights < 0).any()) or abs(float(weights.sum()) - 1) > 1e-6:
        raise ValueError(f"probabilities are {list(probabilities)}; they must be at least 0 and sum to 1")
    device = generator.device if generator is not None else None
    return torch.multinomial(weights.to(device), batch, replacement=True, generator=generator)


@dataclass(frozen=True)
class FrameCondition:
    """Given frames of a batch, and what they do to the network's input, times and output.

    Args:
        latents: normalised latents [B, C, T, H, W]; only the given frames are read.
        count: how many first frames are given: one number, or one per sample [B].
        conditional_timestep: time in 0..1000 units that given frames are told (0.1 for the post-trained 2B: nearly
            clean); None tells them the time of the others, and the network gets one time per sample.
        mask: [B, 1, T, H, W] of 0 and 1 instead of `count`, when the given frames are not the first ones.
    """

    latents: Tensor
    count: int | Sequence[int] | Tensor = 0
    conditional_timestep: float | None = None
    mask: Tensor = None  # type: ignore[assignment]  # never None once made

    def __post_init__(self):
        if self.latents.ndim != 5:
            raise ValueError(f"latents must be [B, C, T, H, W]; got {tuple(self.latents.shape)}")
        batch, _, frames, height, width = self.latents.shape
        c = self.conditional_timestep
        if c is not None and not 0 <= c <= 1000:
            raise ValueError(f"conditional_timestep is {c}; allowed is 0 to 1000, or None")
        if self.mask is None:
            mask = frame_mask(self.count, frames, height, width, batch, self.latents.device)
            object.__setattr__(self, "mask", mask)
        elif self.mask.shape != (batch, 1, frames, height, width):
            raise ValueError(f"mask must be {[batch, 1, frames, height, width]}; got {list(self.mask.shape)}")

    def replace(self, x: Tensor) -> Tensor:
        """Network input: x [B, C, T, H, W] with the given frames put in place (in x's dtype)."""
        return torch.where(self.mask > 0, self.latents.to(x.dtype), x)

    def timesteps(self, t: float | Tensor) -> Tensor:
        """Network times in 0..1000, float32: [B] where all frames share t, or [B, T] where given frames have their own.

        t is a number or [B], in 0..1000.
        """
        batch, frames = self.latents.shape[0], self.latents.shape[2]
        times = torch.as_tensor(t, dtype=torch.float32, device=self.latents.device).expand(batch)
        if self.conditional_timestep is None:
            return times
        given = self.mask[:, 0, :, 0, 0] > 0
        own = torch.full((), self.conditional_timestep, dtype=torch.float32, device=self.latents.device)
        return torch.where(given, own, times[:, None].expand(batch, frames))

    def velocity(self, v: Tensor, noise: Tensor) -> Tensor:
        """Network output v [B, C, T, H, W] with the given frames' velocity replaced by noise - latents (in v's dtype).

        noise is the clip's starting noise (in training: its eps), the same at every step.
        """
        return torch.where(self.mask > 0, (noise - self.latents).to(v.dtype), v)
