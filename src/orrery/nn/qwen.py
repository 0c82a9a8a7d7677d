"""The Qwen2 language model without its output layer (arXiv 2407.10671): token ids -> the hidden states of every layer.

Also the language tower of a Qwen2.5-VL for text alone, whose three rotary positions are then one. Parameter names are
those of `transformers`, whose modules these networks equal (`tests/parity/test_text_parity.py`); they are written out
here because importing that library takes two seconds, most of what a short command would wait for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.nn.precision import full_precision


class RMSNorm(nn.Module):
    """x / rms(x), in fp32 and rounded to the dtype of x, times weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class SelfAttention(nn.Module):
    """Causal attention; `heads` queries share `kv_heads` keys and values, each group of queries one of them."""

    def __init__(self, width: int, heads: int, kv_heads: int):
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, kv_heads * self.dim)
        self.v_proj = nn.Linear(width, kv_heads * self.dim)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, L, width]; cos, sin [L, dim] -> [B, L, width]."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.dim)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = (each * cos + _turned(each) * sin for each in (q, k))
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, dim=1) for each in (k, v))
        return self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def _turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class MLP(nn.Module):
    """down(SiLU(gate x) * up x)."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and MLP, each as x + f(norm(x))."""

    def __init__(self, width: int, heads: int, kv_heads: int, hidden: int, eps: float):
        super().__init__()
        self.self_attn = SelfAttention(width, heads, kv_heads)
        self.mlp = MLP(width, hidden)
        self.input_layernorm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, L, width] -> the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2(nn.Module):
    """Token ids [B, L] int64 -> hidden states of layers 1 to n, the last one after the final norm, each
    [B, L, width] in the dtype of the weights. New weights are normal with deviation 0.02, biases zero."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        theta: float = 10000.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.theta, self.dim = theta, width // heads
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, heads, kv_heads, hidden, eps) for _ in range(layers))
        self.norm = RMSNorm(width, eps)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> list[Tensor]:
        x = self.embed_tokens(tokens)
        cos, sin = self._rotary(tokens.shape[1], x)
        states = []
        for layer in self.layers:
            x = layer(x, cos, sin)
            states.append(x)
        return [*states[:-1], self.norm(x)]

    def _rotary(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [L, dim], computed in fp32 and rounded to the dtype of `like`."""
        with full_precision(True, like.device):
            exponents = torch.arange(0, self.dim, 2, dtype=torch.float32, device=like.device) / self.dim
            positions = torch.arange(length, dtype=torch.float32, device=like.device)
            angles = torch.outer(positions, 1.0 / self.theta**exponents).repeat(1, 2)
        return angles.cos().to(like.dtype), angles.sin().to(like.dtype)
