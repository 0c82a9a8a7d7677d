"""A tiny decoder of latents, for watching a video while it is denoised: far cheaper than the VAE's, less exact.

Layout of TAEHV (madebyollin/taehv, the tiny autoencoder of Hunyuan and Wan latents): 2D convolutions on single frames,
in which every block also sees its own input of one frame before. So it is causal, and a stream remembers one frame a
block. Latents are those that the transformer sees (normalised); pixels are in 0..1 inside. `PRESETS["taew2.1"]` is the
decoder of `taew2_1.pth`; the embedded models' has the same layout, narrower, with patches in space and time at its end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orrery.nn.vae_blocks import Stream

LIMIT = 3.0  # latents are softly bounded to -LIMIT .. LIMIT


@dataclass(frozen=True)
class PreviewConfig:
    """Shape of a preview decoder. Lists are accepted for tuples, as JSON has them.

    widths: channels of each stage, innermost first, and of what the last stage passes to the head: one more than there
        are stages. blocks: memory blocks a stage. time_up, space_up: by how much each stage multiplies frames, and
        height and width. patch, time_patch: pixels and frames that one place of the head's output holds.
    latent_mean, latent_std: per channel, for a decoder that was trained on latents as the VAE has them before they are
        normalised; empty: it takes normalised ones.
    """

    latent_channels: int = 16
    widths: tuple[int, ...] = (256, 128, 64, 64)
    blocks: int = 3
    time_up: tuple[int, ...] = (1, 2, 2)
    space_up: tuple[int, ...] = (2, 2, 2)
    patch: int = 1
    time_patch: int = 1
    head_kernel: int = 3
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("widths", "time_up", "space_up", "latent_mean", "latent_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        stages = len(self.widths) - 1
        for name in ("time_up", "space_up"):
            if stages < 1 or len(getattr(self, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries; {len(self.widths)} widths: {stages}")
        numbers = {name: getattr(self, name) for name in ("latent_channels", "blocks", "patch", "time_patch")}
        for name in ("widths", "time_up", "space_up"):
            numbers[name] = min(getattr(self, name))
        for name, number in numbers.items():
            if number < 1:
                raise ValueError(f"{name} holds {number}; allowed: at least 1")
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not {self.latent_channels} or 0")
        if self.head_kernel not in (1, 3):
            raise ValueError(f"head_kernel is {self.head_kernel}; allowed: 1, 3")

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return self.time_patch * math.prod(self.time_up)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width."""
        return self.patch * math.prod(self.space_up)


PRESETS = {
    "taew2.1": PreviewConfig(),
    "mini": PreviewConfig(widths=(64, 64), blocks=1, time_up=(1,), space_up=(2,), patch=4, time_patch=4, head_kernel=1),
}


class MemoryBlock(nn.Module):
    """Three convolutions with ReLU over a frame and the frame before, added to the frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inputs = (2 * width, width, width)
        layers = [layer for n in inputs for layer in (nn.Conv2d(n, width, 3, padding=1), nn.ReLU(inplace=True))]
        self.conv = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, stream: Stream | None) -> Tensor:
        """x [T, B, C, H, W] -> the same shape; zeros stand for the frame before the first."""
        past = None if stream is None else stream.past(self)
        if past is None:
            past = torch.zeros_like(x[:1])
        if stream is not None:
            stream.keep(self, x[-1:])
        pair = torch.cat([x, torch.cat([past, x[:-1]])], dim=2)
        return F.relu(self.conv(_images(pair)).unflatten(0, x.shape[:2]) + x)


class Grow(nn.Module):
    """A 1x1 convolution that makes `time` frames of each, then `space` times as many rows and columns (nearest)."""

    def __init__(self, width: int, time: int, space: int) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.conv = nn.Conv2d(width, width * time, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, B, C, H, W] -> [T * time, B, C, H * space, W * space]."""
        frames, batch, channels, _, _ = x.shape
        x = _in_time(self.conv(_images(x)).unflatten(0, (frames, batch)), self.time)
        if self.space > 1:  # published nets enlarge first: the same numbers, at space² times the price
            x = F.interpolate(_images(x), scale_factor=float(self.space)).unflatten(0, (-1, batch))
        return x


class Preview(nn.Module):
    """The decoder. Weights are named as in the published files (`decoder.1.weight`, `decoder.3.conv.0.weight`, ...).

    >>> preview = Preview(PRESETS["mini"])
    >>> frames = preview.decode(torch.zeros(1, 16, 5, 8, 8))  # [1, 3, 17, 64, 64]
    """

    def __init__(self, config: PreviewConfig) -> None:
        super().__init__()
        self.config = config
        inner = config.widths[0]
        # The published list counts a bound before the first convolution, and a nearest enlargement in front of each
        # growth: without weights, they are places that are passed over here.
        layers: list[nn.Module] = [
            nn.Identity(), nn.Conv2d(config.latent_channels, inner, 3, padding=1), nn.ReLU()
        ]  # fmt: skip
        stages = zip(config.widths, config.widths[1:], config.time_up, config.space_up, strict=False)
        for width, following, time, space in stages:
            layers += [MemoryBlock(width) for _ in range(config.blocks)]
            layers += [nn.Identity(), Grow(width, time, space), nn.Conv2d(width, following, 3, padding=1, bias=False)]
        pixels = 3 * config.time_patch * config.patch**2
        kernel = config.head_kernel
        layers += [nn.ReLU(), nn.Conv2d(config.widths[-1], pixels, kernel, padding=kernel // 2)]
        self.decoder = nn.ModuleList(layers)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width."""
        return self.config.spatial_factor

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return self.config.temporal_factor

    def channels_last(self) -> Preview:
        """Lay the weights out as the activations are, which saves a copy of them at every call; returns self."""
        for parameter in self.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return self

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W], about [-1, 1] but not clamped, of normalised latents [B, Z, T, h, w], as the VAE's
        `decode`; any h and w, F = (T - 1) temporal_factor + 1.

        Raises:
            ValueError: another shape.
        """
        return self._decode(latents, None)

    def decode_stream(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Frames [B, 3, f, H, W] of each `chunk` latent frames in turn: the whole clip's, in the memory of a chunk."""
        if chunk < 1:
            raise ValueError(f"chunk is {chunk} latent frames, must be at least 1")
        stream = Stream()
        for piece in latents.split(chunk, dim=2):
            yield self.decode_next(piece, stream)

    def decode_next(self, latents: Tensor, stream: Stream) -> Tensor:
        """Frames [B, 3, f, H, W] of the latents [B, Z, t, h, w] that follow those `stream` has seen, which is moved on:
        1 + (t - 1) temporal_factor of the first ones, t temporal_factor of later ones."""
        frames = self._decode(latents, stream)
        stream.advance()
        return frames

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels or latents.shape[2] == 0:
            raise ValueError(f"latents must be [B, {channels}, T, h, w] with T at least 1, got {list(latents.shape)}")
        batch = len(latents)
        x = self._bounded(latents).permute(2, 0, 1, 3, 4)
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                x = layer(x, stream)
            elif isinstance(layer, Grow):
                x = layer(x)
            elif not isinstance(layer, nn.Identity):
                x = layer(_images(x)).unflatten(0, (-1, batch))
        frames = self._unpatchify(x)
        return frames[:, :, self.temporal_factor - 1 :] if stream is None or stream.first else frames

    def _unpatchify(self, x: Tensor) -> Tensor:
        """[T, B, frames * 3 * patch², H, W] in 0..1 -> [B, 3, T', H', W'] in -1..1, moved once."""
        count, p = self.config.time_patch, self.config.patch
        frames, batch, _, height, width = x.shape
        x = x.permute(0, 1, 3, 4, 2).reshape(frames, batch, height, width, count, 3, p, p)
        x = x.permute(1, 5, 0, 4, 2, 6, 3, 7).reshape(batch, 3, frames * count, height * p, width * p)
        return x.mul_(2).sub_(1)

    def _bounded(self, latents: Tensor) -> Tensor:
        config = self.config
        if config.latent_std:
            latents = latents * latents.new_tensor(config.latent_std).view(-1, 1, 1, 1)
        if config.latent_mean:
            latents = latents + latents.new_tensor(config.latent_mean).view(-1, 1, 1, 1)
        return torch.tanh(latents / LIMIT) * LIMIT


def _images(x: Tensor) -> Tensor:
    """[T, B, C, H, W] -> [T * B, C, H, W], channels last in memory, which convolutions are fastest with."""
    return x.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _in_time(x: Tensor, count: int) -> Tensor:
    """[T, B, count * C, H, W] -> [T * count, B, C, H, W]: groups of channels are frames that follow each other."""
    if count == 1:
        return x
    frames = x.unflatten(2, (count, -1)).transpose(1, 2)
    return cast(Tensor, frames.flatten(0, 1))
