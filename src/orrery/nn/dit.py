"""The video transformer: one class for the whole family (arXiv 2511.00062; Cosmos-Predict2.5 checkpoints).

Latents, a frame mask and (in the published models) a padding mask are cut into patches; each block attends over all
tokens, then to the text, then applies an MLP, every step under AdaLN modulation by the timestep of its latent frame.
The parameter names are those of the published files without their `net.` prefix. Modulation is [B, T, 1, 1, D] (or
[B, 1, 1, 1, D] for a timestep that all frames share) and is broadcast over rows and columns, never computed per token.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orrery.nn.actions import ActionMLP, placed
from orrery.nn.attention import EPS, Attention, CrossAttention, RMSNorm
from orrery.nn.conditions import BaseState, Conditions, KeysValues, Projected, Rope, TextContext
from orrery.nn.precision import FollowingLinear, full_precision
from orrery.nn.rope import TOKENS_AT_ONCE, axis_sizes, cached_rope_table

CACHE = 2**21  # bytes that a core keeps near by; SMALLEST_PIECE rows still make an efficient matrix product
SMALLEST_PIECE = 128
IMAGE_TOKENS = 256  # of a reference image, in the published models


@dataclass(frozen=True)
class DiTConfig:
    """Every option of the published transformers; the defaults are the 2B's. All fields are JSON values.

    mlp_ratio: hidden width of the MLP over width. adaln_rank: rank of the modulation's low-rank pair; None or 0 for
    full-rank modulation. patch, max_size (latent frames, rows, columns), rope_ratios: in the order t, h, w.
    text_projection: text is [B, L, text_dim] and is projected to context_dim; without it, text is [B, L, context_dim].
    rope_bf16: rotary exponents rounded to bfloat16, as in the published bf16 files. rope_fps_modulation: positions in
    time scaled by 24 / fps. timestep_scale: factor from the 0..1000 units of `forward` to the embedded value.
    padding_mask: a mask channel follows the frame mask. fp32_modulation: time embedding, modulation and the final
    layer run in fp32 whatever the dtype of the weights. image_context: width of the tokens of a reference image that
    cross-attention sees beside the text; 0 for none. actions: numbers that say what is done within one latent frame
    (frames it covers times numbers an action); 0 for none.
    """

    latent_channels: int = 16
    width: int = 2048
    depth: int = 28
    heads: int = 16
    mlp_ratio: float = 4.0
    adaln_rank: int | None = 256
    patch: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 100352
    context_dim: int = 1024
    text_projection: bool = True
    max_size: tuple[int, int, int] = (128, 240, 240)
    rope_ratios: tuple[float, float, float] = (1.0, 3.0, 3.0)
    rope_bf16: bool = True
    rope_fps_modulation: bool = False
    timestep_scale: float = 0.001
    padding_mask: bool = True
    fp32_modulation: bool = True
    image_context: int = 0
    actions: int = 0

    def __post_init__(self) -> None:
        for name in ("patch", "max_size", "rope_ratios"):
            value = tuple(getattr(self, name))  # JSON gives lists
            if len(value) != 3 or min(value) <= 0:
                raise ValueError(f"{name} must be three positive numbers (t, h, w), got {value}")
            object.__setattr__(self, name, value)
        for name in ("latent_channels", "width", "depth", "heads", "text_dim", "context_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mlp_ratio <= 0:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio}")
        if self.adaln_rank is not None and self.adaln_rank < 0:
            raise ValueError(f"adaln_rank must be positive, or None or 0 for full rank, got {self.adaln_rank}")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must divide into {self.heads} heads of an even size")
        axis_sizes(self.head_dim)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def text_width(self) -> int:
        """Last axis of the text that the network is given."""
        return self.text_dim if self.text_projection else self.context_dim

    @property
    def input_channels(self) -> int:
        """Latent channels, frame mask and, where it is on, padding mask."""
        return self.latent_channels + 1 + self.padding_mask


PRESETS = {
    "2b": DiTConfig(),
    "14b": DiTConfig(width=5120, depth=36, heads=40),
    "mini": DiTConfig(
        width=256, depth=7, heads=4, adaln_rank=64, text_dim=256, context_dim=256, padding_mask=False,
        rope_ratios=(1.0, 1.0, 1.0), rope_bf16=False, max_size=(32, 32, 32),
    ),
}  # fmt: skip


class PatchEmbedding(nn.Module):
    """[B, C, T, H, W] -> [B, T/r, H/m, W/n, D]; a patch is flattened in the order (channel, r, m, n)."""

    def __init__(self, channels: int, patch: tuple[int, int, int], width: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(channels * math.prod(patch), width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        r, m, n = self.patch
        x = x.view(b, c, t // r, r, h // m, m, w // n, n)
        return self.proj(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4))


def unpatchify(x: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B, T/r, H/m, W/n, m*n*r*C] -> [B, C, T, H, W]. The order of features (m, n, r, C) is the published output
    layer's, and differs from that of the input patches."""
    b, t, h, w, _ = x.shape
    r, m, n = patch
    x = x.view(b, t, h, w, m, n, r, -1).permute(0, 7, 1, 6, 2, 4, 3, 5)
    return x.reshape(b, -1, t * r, h * m, w * n)


class Sinusoid(nn.Module):
    """Scaled timesteps [B, T] -> fp32 [B, T, width]: cosines, then sines, of width/2 frequencies from 1 to 1/10000."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, timesteps: Tensor) -> Tensor:
        half = self.width // 2
        index = torch.arange(half, dtype=torch.float32, device=timesteps.device)
        angles = timesteps.float().unsqueeze(-1) * torch.exp(index * (-math.log(10000.0) / half))
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimeMLP(nn.Module):
    """Sinusoid [B, T, D] -> (embedding [B, T, D], shared modulation [B, T, 3D] or None).

    With low-rank modulation the sinusoid itself is the embedding and the MLP gives the term that every modulation
    shares; with full-rank modulation the MLP gives the embedding.
    """

    def __init__(self, width: int, low_rank: bool):
        super().__init__()
        self.low_rank = low_rank
        self.linear_1 = FollowingLinear(width, width, bias=not low_rank)
        self.linear_2 = FollowingLinear(width, 3 * width if low_rank else width, bias=False)

    def forward(self, sinusoid: Tensor) -> tuple[Tensor, Tensor | None]:
        out = self.linear_2(F.silu(self.linear_1(sinusoid)))
        return (sinusoid, out) if self.low_rank else (out, None)


class Modulation(nn.Sequential):
    """Embedding [..., width] -> [..., parts * width]: SiLU and one linear layer, or a pair of the given rank."""

    def __init__(self, width: int, rank: int | None, parts: int):
        sizes = (width, rank, parts * width) if rank else (width, parts * width)
        layers = [FollowingLinear(a, b, bias=False) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        super().__init__(nn.SiLU(), *layers)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.layer1 = nn.Linear(width, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., width] -> the same shape. Without gradients some rows at a time: on a CPU as many as leave the hidden
        layer in its cache, elsewhere TOKENS_AT_ONCE, for the memory of the hidden layer."""
        rows, most = x.reshape(-1, x.shape[-1]), TOKENS_AT_ONCE
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            most = max(SMALLEST_PIECE, CACHE * torch.get_num_threads() // (self.hidden * x.element_size()))
        if torch.is_grad_enabled() or len(rows) <= most:
            return self.layer2(F.gelu(self.layer1(x)))
        out = torch.empty_like(rows)
        for part, piece in zip(out.split(most), rows.split(most), strict=True):
            part.copy_(self.layer2(F.gelu(self.layer1(piece))))
        return out.view_as(x)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, times (1 + scale), plus shift."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS).to(x.dtype), 1 + scale)


class Block(nn.Module):
    """Self-attention, cross-attention and MLP, each as x + gate * f(modulated_norm(x))."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, rank = config.width, config.adaln_rank
        self.fp32_modulation = config.fp32_modulation
        self.self_attn = Attention(width, width, config.heads)
        self.cross_attn = CrossAttention(width, config.context_dim, config.heads, bool(config.image_context))
        self.mlp = MLP(width, int(width * config.mlp_ratio))
        self.adaln_modulation_self_attn = Modulation(width, rank, 3)
        self.adaln_modulation_cross_attn = Modulation(width, rank, 3)
        self.adaln_modulation_mlp = Modulation(width, rank, 3)

    def forward(self, x: Tensor, embedding: Tensor, shared: Tensor | None, text: KeysValues, rope: Rope) -> Tensor:
        """x [B, T, H, W, D]; embedding [B or 1, T or 1, 1, 1, D]; shared, likewise with 3D, or None; text: its keys and
        values in this block."""
        with full_precision(self.fp32_modulation, x.device):
            self_attn, cross_attn, mlp = (
                self._modulate(layers, embedding, shared, x.dtype)
                for layers in (
                    self.adaln_modulation_self_attn,
                    self.adaln_modulation_cross_attn,
                    self.adaln_modulation_mlp,
                )
            )

        shift, scale, gate = self_attn
        h = modulated_norm(x, shift, scale).flatten(1, 3)
        q, k, v = self.self_attn.rotated(h, rope)
        del h
        _, *grid, _ = x.shape
        x = torch.addcmul(x, gate, self.self_attn(q, k, v, (grid[0], grid[1], grid[2])).view_as(x))
        del q, k, v

        shift, scale, gate = cross_attn
        h = modulated_norm(x, shift, scale).flatten(1, 3)
        x = torch.addcmul(x, gate, self.cross_attn.attend(h, text).view_as(x))
        del h

        shift, scale, gate = mlp
        return torch.addcmul(x, gate, self.mlp(modulated_norm(x, shift, scale)))

    def keys_values(self, context: Projected) -> KeysValues:
        """Of projected text and image, in this block."""
        text = self.cross_attn.keys_values(context[0])
        return text if len(context) == 1 else text + self.cross_attn.image_keys_values(context[1])

    @staticmethod
    def _modulate(
        layers: Modulation, embedding: Tensor, shared: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, ...]:
        """Shift, scale and gate."""
        out = layers(embedding)
        return (out if shared is None else out + shared).to(dtype).chunk(3, dim=-1)


class FinalLayer(nn.Module):
    """Modulated LayerNorm and the output projection, in the dtype of the time embedding."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.adaln_modulation = Modulation(config.width, config.adaln_rank, 2)
        self.linear = FollowingLinear(config.width, math.prod(config.patch) * config.latent_channels, bias=False)

    def forward(self, x: Tensor, embedding: Tensor, shared: Tensor | None) -> Tensor:
        out = self.adaln_modulation(embedding)
        if shared is not None:
            out = out + shared[..., : out.shape[-1]]
        shift, scale = out.chunk(2, dim=-1)
        return self.linear(modulated_norm(x.to(embedding.dtype), shift, scale))


def _summed(branches: Iterable[Iterable[tuple[int, Tensor]]]) -> dict[int, Tensor]:
    """What all control branches add, by block: a branch's share is let go of as soon as it is added."""
    total: dict[int, Tensor] = {}
    for branch in branches:
        for index, value in branch:
            total[index] = total[index] + value if index in total else value
            del value
    return total


class DiT(nn.Module):
    """The velocity network. `activation_checkpointing`: recompute each block in the backward pass to save memory.

    >>> net = DiT(PRESETS["mini"])
    >>> net(torch.randn(1, 16, 5, 8, 8), torch.tensor([500.0]), Conditions(torch.randn(1, 40, 256))).shape
    torch.Size([1, 16, 5, 8, 8])
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.walk: Callable[[], Iterable[nn.Module]] | None = None  # how blocks are gone through: see nn.offload
        self.x_embedder = PatchEmbedding(config.input_channels, config.patch, config.width)
        self.t_embedder = nn.Sequential(Sinusoid(config.width), TimeMLP(config.width, bool(config.adaln_rank)))
        self.t_embedding_norm = RMSNorm(config.width)
        if config.actions:
            sizes = (config.actions, 4 * config.width)
            self.action_embedder_B_D = ActionMLP(*sizes, config.width)
            if config.adaln_rank:
                self.action_embedder_B_3D = ActionMLP(*sizes, 3 * config.width)
        if config.text_projection:
            self.crossattn_proj = nn.Sequential(nn.Linear(config.text_dim, config.context_dim), nn.GELU())
        if config.image_context:
            self.img_context_proj = nn.Sequential(nn.Linear(config.image_context, config.width), nn.GELU())
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.init_weights()

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, and of the residual stream."""
        return next(self.x_embedder.parameters()).dtype

    def init_weights(self) -> None:
        """Truncated normals of variance 1/fan_in; zeros in the output layer and in the last layer of all that
        modulates, so that a new network is the identity from block to block and gives velocity 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for module in self.zero_initialised():
            nn.init.zeros_(module.weight)

    def zero_initialised(self) -> list[nn.Linear]:
        """The layers that `init_weights` sets to zero."""
        layers: list[nn.Module] = [self.final_layer.linear]
        for module in self.modules():
            if isinstance(module, Modulation):
                layers.append(module[-1])
            elif isinstance(module, TimeMLP) and module.low_rank:
                layers.append(module.linear_2)
        return [layer for layer in layers if isinstance(layer, nn.Linear)]

    def encode_text(self, text: Tensor, image: Tensor | None = None) -> TextContext:
        """Text [B, L, text_width] and, for a network with image context, image tokens [B, M, image_context] (None:
        zeros) -> their keys and values in every block, for all the steps of a clip."""
        context = self._project(text, image)
        return TextContext(tuple(cast(Block, block).keys_values(context) for block in self._walk()), context)

    def _project(self, text: Tensor, image: Tensor | None) -> Projected:
        projected = self.project_text(text)
        width = self.config.image_context
        if not width:
            if image is not None:
                raise ValueError("this network has no image context: leave the image None")
            return (projected,)
        if image is None:
            image = text.new_zeros(text.shape[0], IMAGE_TOKENS, width)
        if image.ndim != 3 or image.shape[-1] != width or image.shape[0] not in (1, text.shape[0]):
            raise ValueError(f"image must be [{text.shape[0]}, M, {width}], got {list(image.shape)}")
        return projected, self.img_context_proj(image.to(self.dtype)).expand(text.shape[0], -1, -1)

    def project_text(self, text: Tensor) -> Tensor:
        """Text [B, L, text_width] -> cross-attention context [B, L, context_dim]."""
        if text.ndim != 3 or text.shape[-1] != self.config.text_width:
            raise ValueError(f"text must be [B, L, {self.config.text_width}], got {list(text.shape)}")
        text = text.to(self.dtype)
        return self.crossattn_proj(text) if self.config.text_projection else text

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Velocity of the flow at `latents`.

        latents [B, C, T, H, W] (given frames already in place); timesteps in 0..1000, [B] for all frames alike or
        [B, T] per latent frame -> fp32 [B, C, T, H, W]. Times of batch 1 serve every item, and are modulated once.
        """
        size = self._token_size(latents)
        timesteps = self._check_timesteps(timesteps, latents)
        text = self._text(conditions, latents.shape[0])
        rope = self._rope(size, conditions.fps, latents.device)
        channels = self._input(latents, conditions)
        x = self.x_embedder(channels)
        with full_precision(self.config.fp32_modulation, x.device):
            embedding, shared = self._embed_time(timesteps, conditions, latents)
        residuals: dict[int, Tensor] = {}
        if conditions.controls:
            state = BaseState(x, channels[:, latents.shape[1] :], embedding, shared, text.context, rope)
            residuals = _summed(control.residuals(state) for control in conditions.controls)
            del state  # it holds the first tokens
        del channels
        for index, (block, layer_text) in enumerate(zip(self._walk(), text.layers, strict=True)):
            x = self._run(block)(x, embedding, shared, layer_text, rope)
            if index in residuals:
                x = x + residuals.pop(index).to(x.dtype)
        with full_precision(self.config.fp32_modulation, x.device):
            x = self.final_layer(x, embedding, shared)
        return unpatchify(x, self.config.patch).float()

    def _walk(self) -> Iterable[nn.Module]:
        """The blocks in order, each with its weights where the network computes."""
        return self.blocks if self.walk is None else self.walk()

    def _run(self, block: nn.Module) -> Callable[..., Tensor]:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return lambda *args: checkpoint(block, *args, use_reentrant=False)
        return block

    def _token_size(self, latents: Tensor) -> tuple[int, int, int]:
        config = self.config
        if latents.ndim != 5 or latents.shape[1] != config.latent_channels:
            raise ValueError(f"latents must be [B, {config.latent_channels}, T, H, W], got {list(latents.shape)}")
        for name, length, patch, limit in zip("THW", latents.shape[2:], config.patch, config.max_size, strict=True):
            if length < 1 or length % patch:
                raise ValueError(f"{name} of the latents must be a positive multiple of {patch}, got {length}")
            if length > limit:
                raise ValueError(f"{name} of the latents must be at most {limit}, got {length}")
        t, h, w = (length // patch for length, patch in zip(latents.shape[2:], config.patch, strict=True))
        return t, h, w

    def _check_timesteps(self, timesteps: Tensor, latents: Tensor) -> Tensor:
        """[B] or [B, T] -> [B, 1] or [B, T]; B may be 1."""
        batch, frames, shape = latents.shape[0], latents.shape[2], tuple(timesteps.shape)
        if shape not in {(b, *rest) for b in (1, batch) for rest in ((), (1,), (frames,))}:
            raise ValueError(
                f"timesteps must be [{batch}] or [{batch}, {frames}] (or a batch of 1), got {list(timesteps.shape)}"
            )
        if shape[1:] in ((), (1,)):
            return timesteps.reshape(-1, 1)
        if self.config.patch[0] != 1:
            raise ValueError(f"per-frame timesteps need a temporal patch of 1, this network has {self.config.patch[0]}")
        return timesteps

    def _embed_time(self, timesteps: Tensor, conditions: Conditions, latents: Tensor) -> tuple[Tensor, Tensor | None]:
        """[B, T or 1] in 0..1000 -> embedding [B, T or 1, 1, 1, D] and shared modulation [B, T or 1, 1, 1, 3D]; with
        actions, of every latent frame."""
        sinusoid = self.t_embedder[0](timesteps.float() * self.config.timestep_scale)
        if not self.config.fp32_modulation:
            sinusoid = sinusoid.to(self.dtype)
        embedding, shared = self.t_embedder[1](sinusoid)
        if (actions := self._actions(conditions, latents)) is not None:
            mask = conditions.frame_mask
            given = None if mask is None or latents.shape[2] == 1 else mask[:, 0, :, 0, 0]
            embedding = embedding + placed(self.action_embedder_B_D(actions), given)
            shared = None if shared is None else shared + placed(self.action_embedder_B_3D(actions), given)
        embedding = self.t_embedding_norm(embedding)[:, :, None, None]
        return embedding, None if shared is None else shared[:, :, None, None]

    def _actions(self, conditions: Conditions, latents: Tensor) -> Tensor | None:
        """[B or 1, T - 1, actions] in the dtype in which modulation is computed."""
        actions, count = conditions.actions, self.config.actions
        if actions is None:
            return None
        if not count:
            raise ValueError("this network knows no actions: leave Conditions.actions None")
        if self.config.patch[0] != 1:
            raise ValueError(f"actions need a temporal patch of 1, this network has {self.config.patch[0]}")
        batch, after = latents.shape[0], latents.shape[2] - 1
        if actions.ndim != 3 or actions.shape[0] not in (1, batch) or actions.shape[1:] != (after, count):
            raise ValueError(f"actions must be [{batch} or 1, {after}, {count}], got {list(actions.shape)}")
        return actions.float() if self.config.fp32_modulation else actions.to(self.dtype)

    def _text(self, conditions: Conditions, batch: int) -> TextContext:
        """What each block's cross-attention is given."""
        text = conditions.text
        given = text.batch if isinstance(text, TextContext) else text.shape[0]
        if given not in (1, batch):
            raise ValueError(f"text must have a batch of {batch} like the latents, or 1, got {given}")
        if isinstance(text, Tensor):
            return self.encode_text(text, conditions.image)
        if conditions.image is not None:
            raise ValueError("the text is encoded already: give the image to encode_text")
        if len(text.layers) != len(self.blocks):
            raise ValueError(f"this network has {len(self.blocks)} blocks, the TextContext is for {len(text.layers)}")
        return text

    def _rope(self, size: tuple[int, int, int], fps: float | None, device: torch.device) -> Rope:
        config = self.config
        if not config.rope_fps_modulation or size[0] == 1:
            fps = None
        elif fps is None:
            raise ValueError("this network scales positions by the frame rate: give Conditions(fps=...)")
        return cached_rope_table(size, config.head_dim, config.rope_ratios, config.rope_bf16, device, fps)

    def _input(self, latents: Tensor, conditions: Conditions) -> Tensor:
        """Latents, frame mask and padding mask on the channel axis, in the dtype of the weights."""
        batch, _, *size = latents.shape
        frame_mask, padding = conditions.frame_mask, conditions.padding_mask
        if frame_mask is None:
            frame_mask = latents.new_zeros(()).expand(batch, 1, *size)
        elif frame_mask.shape[0] not in (1, batch) or list(frame_mask.shape[1:]) != [1, *size]:
            raise ValueError(f"frame_mask must be {[batch, 1, *size]}, got {list(frame_mask.shape)}")
        channels = [latents, frame_mask.expand(batch, -1, -1, -1, -1)]
        if padding is not None and not self.config.padding_mask:
            raise ValueError("this network has no padding_mask channel: leave Conditions.padding_mask None")
        if self.config.padding_mask:
            if padding is None:
                padding = latents.new_zeros(1, 1, *size[1:])
            if padding.ndim != 4 or padding.shape[0] not in (1, batch) or padding.shape[1] != 1:
                raise ValueError(f"padding_mask must be [{batch} or 1, 1, rows, columns], got {list(padding.shape)}")
            padding = F.interpolate(padding.to(latents.dtype), size=size[1:], mode="nearest")
            channels.append(padding[:, :, None].expand(batch, -1, size[0], -1, -1))
        return torch.cat([channel.to(self.dtype) for channel in channels], dim=1)
