"""Actions of a robot (or a car) as modulation: what is done between two latent frames moves the later one.

The actions that one latent frame covers (4 in the published model, of 7 numbers each) are one vector; two MLPs make of
it a term for the timestep embedding, before its norm, and one for the modulation that all blocks share. The first
latent frame has no action before it, and given frames are told none: their terms are zero. Parameter names are the
published ones. Specification of Transfer, section 4.6.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.nn.precision import FollowingLinear


class ActionMLP(nn.Module):
    """[..., values] -> [..., out], with one hidden layer."""

    def __init__(self, values: int, hidden: int, out: int):
        super().__init__()
        self.fc1, self.fc2 = FollowingLinear(values, hidden), FollowingLinear(hidden, out)

    def forward(self, actions: Tensor) -> Tensor:
        return cast(Tensor, self.fc2(F.gelu(self.fc1(actions), approximate="tanh")))


def group(actions: Tensor, frames: int) -> Tensor:
    """Actions one a pixel frame [B, N, A], N = frames * n, -> one vector a latent frame [B, n, frames * A].

    frames: pixel frames that a latent frame covers.

    Raises:
        ValueError: N is no multiple of `frames`.
    """
    if actions.ndim != 3 or actions.shape[1] % frames:
        raise ValueError(f"actions must be [B, N, A] with N a multiple of {frames}, got {list(actions.shape)}")
    return actions.reshape(actions.shape[0], -1, frames * actions.shape[2])


def placed(terms: Tensor, given: Tensor | None) -> Tensor:
    """Terms of the latent frames after the first [B, T - 1, D] -> of all frames [B, T, D], zero on the first and on
    given ones.

    given: [B or 1, T], 1 where the frame is given; None for none.
    """
    terms = torch.cat([torch.zeros_like(terms[:, :1]), terms], dim=1)
    return terms if given is None else terms * (1 - given.to(terms.dtype))[..., None]
