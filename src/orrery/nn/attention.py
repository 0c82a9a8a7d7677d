"""The projections around attention: bias-free, with a per-head RMSNorm of queries and keys (arXiv 2511.00062).

Parameter names are the published checkpoints'. Which kernel computes attention itself is `nn.kernels`' concern.
"""

import torch.nn.functional as F
from torch import Tensor, nn, ones

from orrery.nn.kernels import attention
from orrery.nn.neighbourhood import neighbourhood_attention
from orrery.nn.neighbourhood_pattern import Pattern
from orrery.nn.rope import norm_rope

EPS = 1e-6  # of every norm in the published transformer


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis; fp32 inside, rounded once to the dtype of x."""

    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), EPS).to(x.dtype)


class Attention(nn.Module):
    """Queries from x [B, N, width], keys and values from context [B, L, context_width]; for self-attention both are x.

    The caller may keep keys and values of a context that does not change. sparse: of self-attention, a pattern and the
    backend of `nn.neighbourhood` in place of full attention; None for full attention.
    """

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.sparse: tuple[Pattern, str] | None = None
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(context_width, width, bias=False)
        self.v_proj = nn.Linear(context_width, width, bias=False)
        self.output_proj = nn.Linear(width, width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)

    def rotated(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """[B, N, width] -> of self-attention queries and keys, normalised and rotated, and plain values, each
        [B, N, heads, dim]."""
        split = (self.heads, -1)
        q = norm_rope(self.q_proj(x).unflatten(-1, split), self.q_norm.weight, EPS, *rope)
        k = norm_rope(self.k_proj(x).unflatten(-1, split), self.k_norm.weight, EPS, *rope)
        return q, k, self.v_proj(x).unflatten(-1, split)

    def queries(self, x: Tensor) -> Tensor:
        """[B, N, width] -> normalised queries [B, N, heads, dim]."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, -1)))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, context_width] -> normalised keys and plain values, each [B, L, heads, dim]."""
        keys = self.k_norm(self.k_proj(context).unflatten(-1, (self.heads, -1)))
        return keys, self.v_proj(context).unflatten(-1, (self.heads, -1))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Attend with prepared q, k, v [B, N, heads, dim] of tokens in a grid (T, rows, columns) and project:
        [B, N, width]."""
        if self.sparse is None:
            answer = attention(q, k, v)
        else:
            pattern, backend = self.sparse
            answer = neighbourhood_attention(q, k, v, grid, pattern, backend)
        return self.output_proj(answer.flatten(-2))


class CrossAttention(Attention):
    """Attention from x to a text, and with `image` beside it to the tokens of a reference image, under queries, keys
    and values of its own; both answers are summed and projected together (Cosmos-Transfer2.5)."""

    def __init__(self, width: int, context_width: int, heads: int, image: bool = False):
        super().__init__(width, context_width, heads)
        self.image = image
        if image:
            self.q_img = nn.Linear(width, width, bias=False)
            self.k_img = nn.Linear(width, width, bias=False)
            self.v_img = nn.Linear(width, width, bias=False)
            self.q_img_norm = RMSNorm(width // heads)
            self.k_img_norm = RMSNorm(width // heads)

    def image_keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Projected image tokens [B, M, width] -> normalised keys and plain values, each [B, M, heads, dim]."""
        keys = self.k_img_norm(self.k_img(tokens).unflatten(-1, (self.heads, -1)))
        return keys, self.v_img(tokens).unflatten(-1, (self.heads, -1))

    def attend(self, x: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """x [B, N, width]; keys and values of the text, and those of the image where there is one -> [B, N, width]."""
        answer = attention(self.queries(x), context[0], context[1])
        if self.image:
            queries = self.q_img_norm(self.q_img(x).unflatten(-1, (self.heads, -1)))
            answer = answer + attention(queries, context[2], context[3])
        return self.output_proj(answer.flatten(-2))
