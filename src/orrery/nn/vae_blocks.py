"""Building blocks of the causal video VAE (Wan 2.1 and 2.2 family): convolutions, norms, residual blocks, resamplers.

Inside the VAE every activation is laid out as x [T, B, H, W, C], contiguous. Time comes first, so that the past of a
causal convolution is prepended without moving anything else and shifted clips are plain views; channels come last,
so that a spatial convolution is a channels-last `conv2d` over T*B images, a temporal one a `conv2d` along T, and the
channel norm a reduction over contiguous memory.
Parameters keep the published shapes and names (convolutions [O, I, kt, kh, kw], gamma [C, 1, 1, 1]).

Streaming state lives in a `Stream` that the caller passes along: one per clip and direction. `stream=None` means that
x is the whole clip. Equations: specification of the base model, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.nn import winograd
from orrery.nn.kernels import attention

PIECE = 2**17  # floats that a CPU normalises at a time: what several passes go over should stay in its caches


class Stream:
    """What a clip that is processed chunk by chunk remembers: the last frames that each causal layer has seen.

    `first` is True until `advance` is called after the first chunk.
    """

    def __init__(self) -> None:
        self.first = True
        self._past: dict[nn.Module, Tensor] = {}

    def past(self, layer: nn.Module) -> Tensor | None:
        """Frames [K, B, H, W, C] kept for `layer`, or None before its first chunk."""
        return self._past.get(layer)

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember `frames` for `layer`; copied, because a slice would hold the whole chunk in memory."""
        self._past[layer] = frames.clone()

    def advance(self) -> None:
        """Tell the stream that one chunk went through the whole network."""
        self.first = False

    def take(self, rows: Tensor) -> Stream:
        """The stream of some of a batch's clips. rows: int64 [n]."""
        part = Stream()
        part.first = self.first
        part._past = {layer: frames.index_select(1, rows) for layer, frames in self._past.items()}
        return part

    def put(self, rows: Tensor, part: Stream) -> None:
        """Put the stream of other clips in the place of some of the batch's.

        Raises:
            ValueError: one of the two streams has begun, the other has not.
        """
        if part.first != self.first or part._past.keys() != self._past.keys():
            raise ValueError("the streams of one batch must all have begun, or none of them")
        for layer, frames in part._past.items():
            self._past[layer].index_copy_(1, rows, frames)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, time_stride: int = 1) -> Tensor:
    """Convolve x [T, B, H, W, I] with weight [O, I, kt, kh, kw]: unpadded in time, same size in space.

    Returns [(T - kt) // time_stride + 1, B, H, W, O]. `time_stride` needs a purely temporal kernel.
    """
    frames, batch, height, width, channels = x.shape
    kernel_t, kernel_h, kernel_w = weight.shape[2:]
    if kernel_t > 1 and kernel_h == kernel_w == 1:
        # One image whose rows are the frames and whose columns are all pixels of all clips.
        rows = x.reshape(1, frames, batch * height * width, channels).permute(0, 3, 1, 2)
        out = F.conv2d(rows, weight.squeeze(-1), bias, stride=(time_stride, 1))
        return out.permute(0, 2, 3, 1).reshape(-1, batch, height, width, weight.shape[0])
    if time_stride != 1:
        raise ValueError(f"time_stride {time_stride} needs a kernel (k, 1, 1), got {tuple(weight.shape[2:])}")
    length, padding = frames - kernel_t + 1, (kernel_h // 2, kernel_w // 2)
    if kernel_t > 1 and batch == 1 and length * height * width < weight.shape[0] and winograd.possible(x, weight):
        # More weights than pixels: `conv3d` does not copy them tap by tap. (It is slower for larger pictures.)
        out = F.conv3d(x.permute(1, 4, 0, 2, 3), weight, bias, padding=(0, *padding))
        return out.permute(2, 0, 3, 4, 1).contiguous()
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    taps = weight.unbind(2)
    out = F.conv2d(images[: length * batch], taps[0], bias, padding=padding)
    for k in range(1, kernel_t):
        out.add_(F.conv2d(images[k * batch : (k + length) * batch], taps[k], padding=padding))
    return out.permute(0, 2, 3, 1).reshape(length, batch, height, width, weight.shape[0])


def convolve_doubled(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolve x [T, B, H, W, I], each pixel doubled along rows and columns, with weight [O, I, 3, 3]; zeros around.

    Of the four pixels that one becomes, each sees 2x2 pixels of x through sums of taps. Along a side the first sees its
    left neighbour through tap 0 and itself through taps 1 + 2, the second itself through 0 + 1 and its right neighbour
    through 2. So one convolution of x with four 2x2 kernels does, of 16 products in place of 36.
    Returns [T, B, 2 H, 2 W, O].
    """
    frames, batch, height, width, _ = x.shape
    sums = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])  # [which of the pixels, tap, tap of 3]
    kernels = torch.einsum("pyu,qxv,oiuv->pqoiyx", sums, sums, weight).flatten(0, 2)
    images = x.flatten(0, 1).permute(0, 3, 1, 2)
    shared = None if bias is None else bias.repeat(4)
    out = F.conv2d(images, kernels.contiguous(memory_format=torch.channels_last), shared, padding=1)
    # [T * B, H + 1, W + 1, 2, 2, O]: the second pixel's two taps begin one pixel later than the first's.
    out = out.permute(0, 2, 3, 1).unflatten(-1, (2, 2, -1))
    doubled = x.new_empty(frames * batch, height, 2, width, 2, len(weight))
    for p in (0, 1):
        for q in (0, 1):
            pixels = out[:, p : p + height, q : q + width, p, q]
            doubled[:, :, p, :, q] = pixels
    return doubled.view(frames, batch, 2 * height, 2 * width, len(weight))


class CausalConv3d(nn.Module):
    """Convolution whose output frame t sees frames t - kt + 1 .. t; zeros stand for what lies before the clip."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.reset_parameters()

    def reset_parameters(self, gain: float = 1.0) -> None:
        """Normal weights of variance gain² / fan-in, zero bias."""
        nn.init.normal_(self.weight, std=gain / math.sqrt(self.weight[0].numel()))
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, I] -> [T, B, H, W, O]."""
        history = self.weight.shape[2] - 1
        past = stream.past(self) if stream is not None else None
        if stream is not None and history:
            stream.keep(self, self._recent(x, past, history))
        if winograd.worthwhile(x, self.weight):
            return winograd.convolve(x, self.weight, self.bias, past)
        if past is None and len(x) == 1:
            return convolve(x, self.weight[:, :, -1:], self.bias)  # one frame: all other taps meet zeros
        if history:
            x = torch.cat([x.new_zeros(history, *x.shape[1:]) if past is None else past, x])
        return convolve(x, self.weight, self.bias)

    @staticmethod
    def _recent(x: Tensor, past: Tensor | None, history: int) -> Tensor:
        """The last `history` frames of past (None = zeros) and x."""
        if len(x) >= history:
            return x[-history:]
        return torch.cat([x.new_zeros(history, *x.shape[1:]) if past is None else past, x])[-history:]


class _NormSiLU(torch.autograd.Function):
    """SiLU(gamma * x / rms(x)) over the last dimension, with a hand-written backward (half the time of autograd's)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor) -> Tensor:
        wide = x.float()
        scale = _inverse_rms(wide)
        unit = wide * scale
        ctx.save_for_backward(unit, scale, gamma)
        return F.silu(unit * gamma).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        unit, scale, gamma = ctx.saved_tensors
        grad_normed = torch.ops.aten.silu_backward(grad.float(), unit * gamma)
        grad_gamma = (grad_normed * unit).flatten(0, -2).sum(0)
        grad_unit = grad_normed.mul_(gamma)
        along = torch.linalg.vecdot(grad_unit, unit).unsqueeze(-1).div_(unit.shape[-1])
        return torch.addcmul(grad_unit, unit, along, value=-1).mul_(scale).to(grad.dtype), grad_gamma


def _inverse_rms(x: Tensor) -> Tensor:
    """sqrt(C) / max(|x|, 1e-12) over the last dimension, kept as size 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.clamp_(min=1e-12).reciprocal_().mul_(math.sqrt(x.shape[-1]))


def _norm_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU(gamma * x / rms(x)) over the last dimension, for inference."""
    wide = x.float()
    return F.silu((wide * _inverse_rms(wide)).mul_(gamma), inplace=True).to(x.dtype)


@lru_cache(maxsize=1)
def _compiled_norm_silu() -> Callable[[Tensor, Tensor], Tensor]:
    """`_norm_silu` as one kernel for every size: it reads x once and writes the answer once, where the plain form of a
    bfloat16 VAE moves eight times as many bytes."""
    return torch.compile(_norm_silu, dynamic=True)


class ChannelNorm(nn.Module):
    """gamma * sqrt(C) * x / |x| over the channels, in float32; gamma has the published shape [C, 1, ...].

    compiled: with SiLU, without gradients, through torch.compile (see `VAE.compile_norms`).
    """

    compiled = False

    def __init__(self, channels: int, trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape and dtype."""
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).clamp(min=1e-12)
        scale = self.gamma.flatten() * math.sqrt(x.shape[-1])
        if torch.is_grad_enabled() or wide is x:
            return (wide / norm * scale).to(x.dtype)
        return wide.div_(norm).mul_(scale).to(x.dtype)  # in place: x was copied to float32

    def silu(self, x: Tensor) -> Tensor:
        """SiLU(self(x)); while training through a fused function."""
        if torch.is_grad_enabled() and (x.requires_grad or self.gamma.requires_grad):
            return _NormSiLU.apply(x, self.gamma.flatten())
        if self.compiled and not torch.is_grad_enabled():
            return _compiled_norm_silu()(x.flatten(0, -2), self.gamma.flatten()).view_as(x)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return F.silu(self(x), inplace=True)
        gamma = self.gamma.flatten()
        if x.numel() <= PIECE:
            return _norm_silu(x, gamma)
        out, rows = torch.empty_like(x), max(1, PIECE // x.shape[-1])
        for piece, result in zip(x.flatten(0, -2).split(rows), out.flatten(0, -2).split(rows), strict=True):
            result.copy_(_norm_silu(piece, gamma))
        return out


class ResidualBlock(nn.Module):
    """norm, SiLU, convolution, twice, plus the input (through a 1x1x1 convolution where the width changes).

    factorised: the first convolution is (1, 3, 3), the second (3, 1, 1); otherwise both are (3, 3, 3).
    """

    def __init__(self, inputs: int, outputs: int, factorised: bool = False) -> None:
        super().__init__()
        first, second = ((1, 3, 3), (3, 1, 1)) if factorised else ((3, 3, 3), (3, 3, 3))
        # Numbered as in the published files, where 1, 4 are activations and 5 is a dropout.
        last = CausalConv3d(outputs, outputs, second)
        last.reset_parameters(gain=0.3)  # close to identity, yet no dead gradient at the first step
        self.residual = nn.ModuleDict(
            {
                "0": ChannelNorm(inputs),
                "2": CausalConv3d(inputs, outputs, first),
                "3": ChannelNorm(outputs),
                "6": last,
            }
        )
        self.shortcut = CausalConv3d(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, inputs] -> [T, B, H, W, outputs]."""
        part = cast("dict[str, Any]", self.residual)
        h = part["2"](part["0"].silu(x), stream)
        h = part["6"](part["3"].silu(h), stream)
        skipped = x if self.shortcut is None else self.shortcut(x)
        return h + skipped if torch.is_grad_enabled() else h.add_(skipped)


class AttentionBlock(nn.Module):
    """Single-head self-attention among the pixels of each frame, plus the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, trailing=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, C] -> the same shape; frames do not mix, hence nothing is kept in the stream."""
        frames, batch, height, width, channels = x.shape
        qkv = F.linear(self.norm(x), self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.reshape(frames * batch, height * width, 1, 3 * channels).chunk(3, dim=-1)
        out = attention(q, k, v).reshape(x.shape)
        return x + F.linear(out, self.proj.weight.flatten(1), self.proj.bias)


class Downsample(nn.Module):
    """Halve height and width, and with `time` also the frames after the first (1 + 2k -> 1 + k)."""

    def __init__(self, channels: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv3d(channels, channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, C] -> [T', B, H/2, W/2, C]."""
        conv = self.resample["1"]
        images = F.pad(x, (0, 0, 0, 1, 0, 1)).flatten(0, 1).permute(0, 3, 1, 2)
        x = conv(images).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        if self.time_conv is None:
            return x.contiguous()
        past = stream.past(self) if stream is not None else None
        if stream is not None:
            stream.keep(self, x[-1:])
        # The first frame of a clip stays alone; later frames are merged in pairs, each pair looking one frame back.
        window = x if past is None else torch.cat([past, x])
        pairs = [] if len(window) < 3 else [convolve(window, self.time_conv.weight, self.time_conv.bias, time_stride=2)]
        return torch.cat(([x[:1]] if past is None else []) + pairs)


class Upsample(nn.Module):
    """Double height and width, and with `time` also the frames after the first (1 + k -> 1 + 2k)."""

    def __init__(self, channels: int, outputs: int, time: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": nn.Conv2d(channels, outputs, 3, padding=1)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, C] -> [T', B, 2H, 2W, outputs]."""
        if self.time_conv is not None:
            x = self._double_frames(self.time_conv, x, stream)
        conv = cast("nn.Conv2d", self.resample["1"])
        if winograd.possible(x, conv.weight):
            return convolve_doubled(x, conv.weight, conv.bias)
        frames, batch, height, width, channels = x.shape
        x = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1)
        x = x.reshape(frames * batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
        return conv(x).permute(0, 2, 3, 1).unflatten(0, (frames, batch)).contiguous()

    @staticmethod
    def _double_frames(time_conv: CausalConv3d, x: Tensor, stream: Stream | None) -> Tensor:
        """Every frame becomes two, except a clip's first, which the temporal convolution never sees."""
        alone = x[:1] if stream is None or stream.first else x[:0]
        rest = x[len(alone) :]
        if len(rest) == 0:
            return alone
        pairs = time_conv(rest, stream)
        frames, batch, height, width, channels = rest.shape
        pairs = pairs.reshape(frames, batch, height, width, 2, channels).permute(0, 4, 1, 2, 3, 5)
        return torch.cat([alone, pairs.flatten(0, 1)]) if len(alone) else pairs.flatten(0, 1)


class DownLevel(nn.Module):
    """A level of the Wan 2.2 encoder: its layers, plus a shortcut that averages groups of (channel, time, row, column).

    time, space: 1 or 2, the factors by which the level shrinks its input.
    """

    def __init__(self, layers: list[nn.Module], inputs: int, outputs: int, time: int, space: int) -> None:
        super().__init__()
        if inputs * time * space**2 % outputs:
            raise ValueError(f"{inputs} channels x {time * space**2} do not divide into {outputs} channels")
        self.downsamples = nn.ModuleList(layers)
        self.outputs, self.time, self.space = outputs, time, space

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, inputs] -> [T', B, H', W', outputs]."""
        return _chain(self.downsamples, x, stream).add_(self._average(x))

    def _average(self, x: Tensor) -> Tensor:
        t, s = self.time, self.space
        missing = -len(x) % t  # only a clip's first chunk is odd; zeros stand before it
        x = F.pad(x, (0, 0) * 4 + (missing, 0)) if missing else x
        frames, batch, height, width, _ = x.shape
        x = x.reshape(frames // t, t, batch, height // s, s, width // s, s, -1).permute(0, 2, 3, 5, 7, 1, 4, 6)
        return x.reshape(frames // t, batch, height // s, width // s, self.outputs, -1).mean(-1)


class UpLevel(nn.Module):
    """A level of the Wan 2.2 decoder: its layers, plus a shortcut that spreads channels over (time, row, column)."""

    def __init__(self, layers: list[nn.Module], inputs: int, outputs: int, time: int, space: int) -> None:
        super().__init__()
        if space > 1 and outputs * time * space**2 % inputs:
            raise ValueError(f"{outputs} channels x {time * space**2} are no multiple of {inputs} channels")
        self.upsamples = nn.ModuleList(layers)
        self.repeats = outputs * time * space**2 // inputs
        self.outputs, self.time, self.space = outputs, time, space

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        """x [T, B, H, W, inputs] -> [T', B, H', W', outputs]."""
        out = _chain(self.upsamples, x, stream)
        if self.space == 1:
            return out  # the outermost level keeps its size and has no shortcut
        spread = self._spread(x)
        return out.add_(spread[self.time - 1 :] if stream is None or stream.first else spread)

    def _spread(self, x: Tensor) -> Tensor:
        t, s = self.time, self.space
        frames, batch, height, width, _ = x.shape
        x = x.repeat_interleave(self.repeats, dim=-1)
        x = x.reshape(frames, batch, height, width, self.outputs, t, s, s).permute(0, 5, 1, 2, 6, 3, 7, 4)
        return x.reshape(frames * t, batch, height * s, width * s, self.outputs)


def _chain(layers: nn.ModuleList, x: Tensor, stream: Stream | None) -> Tensor:
    for layer in layers:
        x = layer(x, stream)
    return x
