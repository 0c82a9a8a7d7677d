"""Rotary position embedding over latent frames, rows and columns (arXiv 2511.00062; half-split pairing).

A head of size d gives 2*(d//6) entries to rows, as many to columns and the rest to time. Axis a rotates its i-th pair
by position / theta_a^(2i/d_a) with theta_a = 10000 * ratio_a^(d_a/(d_a-2)). The angles stand in the order
[time | rows | columns], and entry i is paired with entry i + d/2.

The published networks are cast to bfloat16 with their exponents 2i/d_a in a buffer, so they were trained and are run
with exponents rounded to bfloat16: up to 1.9 % in a frequency. `bf16_exponents` repeats that rounding.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

THETA = 10000.0
TOKENS_AT_ONCE = 16_384
BASE_FPS = 24.0  # the frame rate at which a position counts one latent frame, where fps modulation is on


def axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Entries of a head that belong to (time, rows, columns). ValueError where an axis would get fewer than 4."""
    spatial = head_dim // 6 * 2
    if head_dim % 2 or spatial < 4:
        raise ValueError(f"head_dim must be even and at least 12 for three rotary axes, got {head_dim}")
    return head_dim - 2 * spatial, spatial, spatial


def axis_frequencies(dim: int, ratio: float, bf16_exponents: bool, device: torch.device | str | None) -> Tensor:
    """Angle per position of each of an axis' dim/2 pairs: fp32 [dim/2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    if bf16_exponents:
        exponents = exponents.bfloat16().float()
    return 1.0 / (THETA * ratio ** (dim / (dim - 2))) ** exponents


def rope_table(
    size: tuple[int, int, int],
    head_dim: int,
    ratios: tuple[float, float, float] = (1.0, 3.0, 3.0),
    bf16_exponents: bool = True,
    device: torch.device | str | None = None,
    fps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, each fp32 [N, head_dim], N = T * rows * columns in that order.

    size: (T, rows, columns) in tokens. ratios: in the same order. fps: None, or the video's frame rate; latent frame k
    then stands at position k / fps * 24 (no published checkpoint does that).
    """
    if min(size) < 1:
        raise ValueError(f"rope size must be positive in (T, rows, columns), got {tuple(size)}")
    if fps is not None and fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    angles = []
    for axis, (count, dim, ratio) in enumerate(zip(size, axis_sizes(head_dim), ratios, strict=True)):
        positions = torch.arange(count, dtype=torch.float32, device=device)
        if axis == 0 and fps is not None:
            positions = positions / fps * BASE_FPS
        angle = torch.outer(positions, axis_frequencies(dim, ratio, bf16_exponents, device))
        shape = [1, 1, 1, dim // 2]
        shape[axis] = count
        angles.append(angle.view(shape).expand(*size, -1))
    half = torch.cat(angles, dim=-1).flatten(0, 2)
    full = torch.cat((half, half), dim=-1)
    return full.cos(), full.sin()


@lru_cache(maxsize=4)
def cached_rope_table(
    size: tuple[int, int, int],
    head_dim: int,
    ratios: tuple[float, float, float],
    bf16_exponents: bool,
    device: torch.device,
    fps: float | None,
) -> tuple[Tensor, Tensor]:
    """`rope_table`, kept for the sizes in use. The tables are ordinary tensors, so one that was first made while
    sampling under `inference_mode` serves training too."""
    with torch.inference_mode(False):
        return rope_table(size, head_dim, ratios, bf16_exponents, device, fps)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, N, heads, dim] by a table [N, dim]; in fp32, back in the dtype of x.

    Without gradients, TOKENS_AT_ONCE at a time: the fp32 copies of a 720p clip would be the largest thing in memory.
    """
    half = x.shape[-1] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]  # both halves of a table are equal
    if torch.is_grad_enabled() or x.shape[1] <= TOKENS_AT_ONCE:
        return _rotate(x, cos, sin).to(x.dtype)
    out = torch.empty_like(x)
    for start in range(0, x.shape[1], TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        out[:, part] = _rotate(x[:, part], cos[part], sin[part])
    return out


def norm_rope(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm over the last axis with `weight` [dim], then `apply_rope`: what queries and keys go through.

    x [B, N, heads, dim], table [N, dim] -> [B, N, heads, dim]. In float32 and without gradients in half the passes over
    memory (the weight goes into the table, the norm comes last), equal to rounding, and with each head's tokens beside
    each other in memory, as attention reads them. Other dtypes are rounded after the norm as the published networks
    do, and torch.compile fuses the plain form by itself.
    """
    if torch.is_grad_enabled() or x.dtype != torch.float32 or torch.compiler.is_compiling():
        out = apply_rope(F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype), cos, sin)
        if torch.compiler.is_compiling() and x.device.type == "cpu":
            out = out.transpose(1, 2).contiguous().transpose(1, 2)  # the same layout; joined with what is before it
        return out
    half = x.shape[-1] // 2
    cos, sin, x = cos[:, :half], sin[:, :half], x.transpose(1, 2)
    (first, second), (w_first, w_second) = x.split(half, dim=-1), weight.split(half)
    scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    out = torch.empty(x.shape, device=x.device)
    out_first, out_second = out.split(half, dim=-1)
    torch.mul(first, cos * w_first, out=out_first).addcmul_(second, sin * w_second, value=-1)
    torch.mul(second, cos * w_second, out=out_second).addcmul_(first, sin * w_first)
    return out.mul_(scale).transpose(1, 2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().split(x.shape[-1] // 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
