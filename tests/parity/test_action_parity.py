"""The whole action-conditioned transformer against the published scheme written out anew, from the text of the
specifications (of the base model, section 1; of Transfer, section 4.6) and in plain functions: no other library has it.

The weights come out of an official file, so that what is compared is what a user loads.
"""

import math
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orrery.nn.dit import Conditions, DiT, DiTConfig
from orrery.weights import find_model, load_part

CONFIG = DiTConfig(width=96, depth=3, heads=2, adaln_rank=12, text_dim=32, context_dim=24, actions=28)
TOLERANCE = 1e-5
Weights = dict[str, Tensor]


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    out = x @ w[f"{name}.weight"].T
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def mlp_of_actions(actions: Tensor, w: Weights, name: str) -> Tensor:
    hidden = linear(actions, w, f"{name}.fc1")
    hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return linear(hidden, w, f"{name}.fc2")


def of_all_frames(terms: Tensor, mask: Tensor) -> Tensor:
    """Zeros before the terms, for the first latent frame, and times (1 - mask)."""
    whole = torch.cat([torch.zeros_like(terms[:, :1]), terms], dim=1)
    return whole * (1 - mask[:, 0, :, 0, 0])[..., None]


def rotary(size: tuple[int, int, int], dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, dim] for tokens in the order t, h, w."""
    space = dim // 6 * 2
    ratios, dims = (1.0, 3.0, 3.0), (dim - 2 * space, space, space)
    axes = []
    for length, ratio, d in zip(size, ratios, dims, strict=True):
        exponents = (torch.arange(0, d, 2) / d).bfloat16().float()  # as the published files hold them
        theta = 10000.0 * ratio ** (d / (d - 2))
        axes.append(torch.arange(length).float()[:, None] / theta**exponents)
    t, h, w = (axis.shape[0] for axis in axes)
    grid = torch.cat(
        [
            axes[0][:, None, None].expand(t, h, w, -1),
            axes[1][None, :, None].expand(t, h, w, -1),
            axes[2][None, None].expand(t, h, w, -1),
        ],
        dim=-1,
    ).reshape(t * h * w, -1)
    angles = torch.cat([grid, grid], dim=-1)
    return angles.cos(), angles.sin()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, heads, dim]: pairs (i, i + dim/2)."""
    one, two = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-two, one], dim=-1) * sin[:, None]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, N, heads, dim] -> [B, N, heads * dim]."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v).flatten(2)


def heads_of(x: Tensor, w: Weights, attention: str, letter: str, heads: int) -> Tensor:
    out = linear(x, w, f"{attention}.{letter}_proj").unflatten(-1, (heads, -1))
    return out if letter == "v" else norm(out, w[f"{attention}.{letter}_norm.weight"])


def published(w: Weights, x: Tensor, times: Tensor, text: Tensor, mask: Tensor, actions: Tensor) -> Tensor:
    """Velocity [B, 16, T, H, W] of latents with frame mask [B, 1, T, H, W], times [B, T] in 0..1000, text [B, L, D] and
    actions [B, T - 1, 28]."""
    b, _, t, h, wide = x.shape
    heads, width = CONFIG.heads, CONFIG.width
    channels = torch.cat([x, mask, torch.zeros_like(mask)], dim=1)
    patches = channels.reshape(b, 18, t, 1, h // 2, 2, wide // 2, 2).permute(0, 2, 4, 6, 1, 3, 5, 7)
    tokens = linear(patches.reshape(b, t, h // 2, wide // 2, 72), w, "x_embedder.proj.1")
    context = F.gelu(linear(text, w, "crossattn_proj.0"))
    half = width // 2
    angles = times[..., None] * 0.001 * torch.exp(torch.arange(half) * (-math.log(10000.0) / half))
    sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
    shared = linear(F.silu(linear(sinusoid, w, "t_embedder.1.linear_1")), w, "t_embedder.1.linear_2")
    embedding = sinusoid + of_all_frames(mlp_of_actions(actions, w, "action_embedder_B_D"), mask)
    shared = shared + of_all_frames(mlp_of_actions(actions, w, "action_embedder_B_3D"), mask)
    embedding = norm(embedding, w["t_embedding_norm.weight"])
    cos, sin = rotary((t, h // 2, wide // 2), width // heads)

    def modulation(name: str) -> Tensor:
        return linear(linear(F.silu(embedding), w, f"{name}.1"), w, f"{name}.2")

    def normed(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        return y * (1 + scale[:, :, None, None]) + shift[:, :, None, None]

    for i in range(CONFIG.depth):
        for part in ("self_attn", "cross_attn", "mlp"):
            name = f"blocks.{i}.{part}"
            shift, scale, gate = (modulation(f"blocks.{i}.adaln_modulation_{part}") + shared).chunk(3, dim=-1)
            y = normed(tokens, shift, scale).flatten(1, 3)
            if part == "mlp":
                y = linear(F.gelu(linear(y, w, f"{name}.layer1")), w, f"{name}.layer2")
            else:
                source = y if part == "self_attn" else context
                q = heads_of(y, w, name, "q", heads)
                k, v = (heads_of(source, w, name, letter, heads) for letter in "kv")
                if part == "self_attn":
                    q, k = turned(q, cos, sin), turned(k, cos, sin)
                y = linear(attend(q, k, v), w, f"{name}.output_proj")
            tokens = tokens + gate[:, :, None, None] * y.view_as(tokens)
    shift, scale = (modulation("final_layer.adaln_modulation") + shared[..., : 2 * width]).chunk(2, dim=-1)
    out = linear(normed(tokens, shift, scale), w, "final_layer.linear")
    return out.reshape(b, t, h // 2, wide // 2, 2, 2, 16).permute(0, 6, 1, 2, 4, 3, 5).reshape(b, 16, t, h, wide)


def random_weights() -> Weights:
    """Of every parameter, nothing at zero or one; velocities come out at about one."""
    torch.manual_seed(0)
    weights = {}
    for name, value in DiT(CONFIG).state_dict().items():
        weights[name] = torch.randn(value.shape) * (0.2 if value.ndim < 2 else 0.7 * value.shape[-1] ** -0.5)
        if name.endswith("norm.weight"):
            weights[name] += 1
    return weights


def inputs(given: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 4, 8, 10, generator=g), torch.randn(2, 7, 32, generator=g)
    mask = torch.zeros(2, 1, 4, 8, 10)
    mask[:, :, :given] = 1
    return x, torch.tensor([[700.0] * 4, [120.0] * 4]), text, mask, torch.randn(2, 3, 28, generator=g)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def net(weights: Weights, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> DiT:
    """Out of an official file, by the published file's name."""
    path = tmp_path_factory.mktemp("action") / "38c6c645-7d41-4560-8eeb-6f4ddc0e6574_ema_bf16.pt"
    torch.save({f"net.{name}": value for name, value in weights.items()}, path)
    files = find_model(path, vae=tiny_folder, text=tiny_folder)
    assert files.config.transformer == CONFIG
    return cast(DiT, load_part(files, "transformer"))


@torch.no_grad()
@pytest.mark.parametrize("given", [0, 1, 2])
def test_the_published_forward_pass(net: DiT, weights: Weights, given: int) -> None:
    x, times, text, mask, actions = inputs(given)
    expected = published(weights, x, times, text, mask, actions)
    assert 0.3 < expected.std() < 3
    velocity = net(x, times, Conditions(text, mask, actions=actions))
    assert (velocity - expected).abs().max() <= TOLERANCE


@torch.no_grad()
def test_actions_make_a_difference_in_the_reference_too(weights: Weights) -> None:
    """What the comparison above is worth: without the terms, or with them on given frames, it would not hold."""
    x, times, text, mask, actions = inputs()
    expected = published(weights, x, times, text, mask, actions)
    without = {**weights, "action_embedder_B_3D.fc2.weight": torch.zeros(288, 384)}
    for wrong in (
        published(without, x, times, text, mask, actions),
        published(weights, x, times, text, mask, actions.flip(1)),
    ):
        assert (wrong - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("given", [1, 2])
def test_an_action_counts_where_it_is_done(net: DiT, given: int) -> None:
    """That of latent frame k changes the velocity, most of all there; of a given frame it does not count at all."""
    x, times, text, mask, actions = inputs(given)
    first = net(x, times, Conditions(text, mask, actions=actions))
    for k in range(1, 4):
        other = actions.clone()
        other[:, k - 1] += 0.5
        change = (net(x, times, Conditions(text, mask, actions=other)) - first).abs().mean((0, 1, 3, 4))
        if k < given:
            assert not change.any()
        else:
            assert change.argmax() == k and change[k] > 0.02
