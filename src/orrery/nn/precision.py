"""Parts of a network that compute in fp32 whatever the dtype of the weights."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def full_precision(wanted: bool, device: torch.device) -> AbstractContextManager:
    """Keeps an enclosing autocast out of the fp32 regions, where wanted; costs nothing where there is none."""
    if wanted and device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


class FollowingLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)
