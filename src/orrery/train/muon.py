"""Muon: momentum, then each matrix's update is replaced by its nearest semi-orthogonal matrix (Newton-Schulz).

After Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with the update scaled by
0.2 sqrt(max(rows, columns)) as in "Muon is scalable for LLM training" (arXiv 2502.16982), so that its root mean square
matches AdamW's and one learning rate suits both.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic's coefficients of Jordan et al.: steep at zero, so that small singular values grow fast.
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalise(matrices: Tensor, steps: int = 5, bf16: bool = False) -> Tensor:
    """Approximately U V^T of each matrix U S V^T: singular values end in about 0.7..1.2.

    Args:
        matrices: [K, rows, columns], any float dtype.
        bf16: compute in bfloat16, which is enough for this iteration and several times faster where the chip has it.

    Returns:
        the same shape, float32.

    The iteration can run on the small Gram matrix X X^T (all factors are polynomials in it and commute); for matrices
    at least twice as wide as high that is cheaper, as for convolution kernels by far. bfloat16 is too coarse for it.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = x.float() / (x.float().norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    if bf16 or x.shape[2] < 2 * x.shape[1]:
        x = x.bfloat16() if bf16 else x
        for _ in range(steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
        x = x.float()
    else:
        gram = x @ x.mT
        eye = torch.eye(x.shape[1], dtype=x.dtype)
        product: Tensor | None = None
        for step in range(steps):
            factor = _A * eye + _B * gram + _C * (gram @ gram)
            product = factor if product is None else factor @ product
            if step + 1 < steps:
                gram = factor @ gram @ factor
        x = product @ x if product is not None else x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Nesterov momentum and orthogonalised updates for matrices; a kernel of more dimensions is reshaped to [out, -1].

    Args:
        params: parameters of two or more dimensions.
        lr: learning rate of the update whose root mean square is about 0.2.
        momentum: 0..1. weight_decay: decoupled, multiplied by lr.
        bf16: orthogonalise in bfloat16.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, momentum: float = 0.95, weight_decay: float = 0.0, bf16: bool = False
    ) -> None:
        self.bf16 = bf16
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Matrices of one shape go through together."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape[0], p[0].numel()].append(p)
            for (rows, columns), params in shapes.items():
                grads = [p.grad for p in params if p.grad is not None]
                for p in params:
                    if "momentum" not in self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum"] for p in params]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                updates = torch._foreach_lerp(grads, buffers, group["momentum"])
                stacked = orthogonalise(torch.stack([u.reshape(rows, columns) for u in updates]), bf16=self.bf16)
                scale = 0.2 * max(rows, columns) ** 0.5
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                directions = [u.view(p.shape) for u, p in zip(stacked.contiguous(), params, strict=True)]
                torch._foreach_add_(params, directions, alpha=-group["lr"] * scale)
