"""Causal video VAE of the Wan 2.1 family.

Frames [B, 3, F, H, W] in [-1, 1] become latents [B, Z, T, H/8, W/8], with F = 4k + 1 and T = k + 1, and back.
One class serves the published Wan 2.1 VAE (the tokenizer of Cosmos-Predict2.5; key layout of `Wan2.1_VAE.pth`), the
Wan 2.2 VAE (spatial patches, 48 channels, averaging shortcuts) and Orrery's mini VAE (4x4x4 patches, factorised
kernels). It is strictly causal: the latents of the first 4k + 1 frames do not depend on what follows, and a clip can be
encoded and decoded chunk by chunk with the result of the whole clip. Specification of the base model, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from orrery.nn.vae_blocks import (
    AttentionBlock,
    CausalConv3d,
    ChannelNorm,
    DownLevel,
    Downsample,
    ResidualBlock,
    Stream,
    UpLevel,
    Upsample,
)


@dataclass(frozen=True)
class VAEConfig:
    """Shape of a VAE. Lists are accepted for tuples, so that a config read from JSON is equal to the one written.

    base, multipliers: widths of the encoder's levels are round(base * m); decoder_base is the decoder's (None = base).
    res_blocks: residual blocks per encoder level; decoder_res_blocks per decoder level (None = res_blocks + 1).
    temporal_down: for each step between levels, whether it also halves the frames.
    patch, temporal_patch: pixels and frames folded into channels before the encoder. With temporal_patch p the first
        frame is repeated p times, then p frames make a group.
    factorised: residual blocks of (1, 3, 3) then (3, 1, 1) kernels, and (1, 3, 3) at both ends, instead of (3, 3, 3).
    attention: middle of block, attention, block; otherwise of one block.
    shortcuts: levels carry a parameter-free averaging or duplicating shortcut (Wan 2.2).
    latent_mean, latent_std: per channel, applied by `encode` and undone by `decode`; empty = 0 and 1.
    """

    base: int = 96
    multipliers: tuple[float, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    temporal_down: tuple[bool, ...] = (False, True, True)
    latent_channels: int = 16
    patch: int = 1
    temporal_patch: int = 1
    factorised: bool = False
    attention: bool = True
    shortcuts: bool = False
    decoder_base: int | None = None
    decoder_res_blocks: int | None = None
    latent_mean: tuple[float, ...] = ()
    latent_std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("multipliers", "temporal_down", "latent_mean", "latent_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.temporal_down) != len(self.multipliers) - 1:
            raise ValueError(
                f"temporal_down has {len(self.temporal_down)} entries; {len(self.multipliers)} multipliers need "
                f"{len(self.multipliers) - 1}"
            )
        for name in ("latent_mean", "latent_std"):
            if len(getattr(self, name)) not in (0, self.latent_channels):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, not {self.latent_channels} or 0")
        if any(s <= 0 for s in self.latent_std):
            raise ValueError(f"latent_std must be positive, got {min(self.latent_std)}")

    def widths(self, base: int) -> list[int]:
        """Channels of each level, outermost first."""
        return [round(base * m) for m in self.multipliers]

    @property
    def pixel_channels(self) -> int:
        """Channels of a patch of pixels: 3 * temporal_patch * patch²."""
        return 3 * self.temporal_patch * self.patch**2

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return self.temporal_patch * 2 ** sum(self.temporal_down)


# fmt: off
_WAN21_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_WAN21_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
_WAN22_MEAN = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
               0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
               -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
               -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)
_WAN22_STD = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
              0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
              0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
              0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)
# fmt: on

PRESETS = {
    "wan2.1": VAEConfig(latent_mean=_WAN21_MEAN, latent_std=_WAN21_STD),
    "wan2.2": VAEConfig(
        base=160,
        decoder_base=256,
        latent_channels=48,
        patch=2,
        shortcuts=True,
        latent_mean=_WAN22_MEAN,
        latent_std=_WAN22_STD,
    ),
    "mini": VAEConfig(
        multipliers=(1, 5 / 3),
        temporal_down=(False,),
        patch=4,
        temporal_patch=4,
        factorised=True,
        attention=False,
        decoder_res_blocks=2,
    ),
}


class Encoder(nn.Module):
    """Patches x [T, B, H, W, pixel channels] -> [T', B, h, w, 2 Z]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths(config.base)
        kernel = (1, 3, 3) if config.factorised else (3, 3, 3)
        self.conv1 = CausalConv3d(config.pixel_channels, widths[0], kernel)
        layers: list[nn.Module] = []
        inputs = widths[0]
        for level, width in enumerate(widths):
            blocks = _residual_blocks(inputs, width, config.res_blocks, config.factorised)
            halves = level < len(widths) - 1
            time = halves and config.temporal_down[level]
            if halves:
                blocks.append(Downsample(width, time))
            layers += [DownLevel(blocks, inputs, width, 1 + time, 1 + halves)] if config.shortcuts else blocks
            inputs = width
        self.downsamples = nn.ModuleList(layers)
        self.middle = _middle(inputs, config)
        self.head = nn.ModuleDict(
            {"0": ChannelNorm(inputs), "2": CausalConv3d(inputs, 2 * config.latent_channels, kernel)}
        )

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = self.conv1(x, stream)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, stream)
        head = cast("dict[str, Any]", self.head)
        return head["2"](head["0"].silu(x), stream)


class Decoder(nn.Module):
    """Latents x [T, B, h, w, Z] -> patches [T', B, H, W, pixel channels]."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths(config.decoder_base or config.base)[::-1]
        kernel = (1, 3, 3) if config.factorised else (3, 3, 3)
        count = config.decoder_res_blocks or config.res_blocks + 1
        self.conv1 = CausalConv3d(config.latent_channels, widths[0], kernel)
        self.middle = _middle(widths[0], config)
        layers: list[nn.Module] = []
        inputs = widths[0]
        for level, width in enumerate(widths):
            blocks = _residual_blocks(inputs, width, count, config.factorised)
            doubles = level < len(widths) - 1
            time = doubles and config.temporal_down[-1 - level]
            outputs = width // 2 if doubles and not config.shortcuts else width
            if doubles:
                blocks.append(Upsample(width, outputs, time))
            layers += [UpLevel(blocks, inputs, width, 1 + time, 1 + doubles)] if config.shortcuts else blocks
            inputs = outputs
        self.upsamples = nn.ModuleList(layers)
        self.head = nn.ModuleDict({"0": ChannelNorm(inputs), "2": CausalConv3d(inputs, config.pixel_channels, kernel)})

    def forward(self, x: Tensor, stream: Stream | None = None) -> Tensor:
        x = self.conv1(x, stream)
        for layer in [*self.middle, *self.upsamples]:
            x = layer(x, stream)
        head = cast("dict[str, Any]", self.head)
        return head["2"](head["0"].silu(x), stream)


def _residual_blocks(inputs: int, width: int, count: int, factorised: bool) -> list[nn.Module]:
    return [ResidualBlock(inputs if i == 0 else width, width, factorised) for i in range(count)]


def _middle(width: int, config: VAEConfig) -> nn.ModuleList:
    blocks: list[nn.Module] = [ResidualBlock(width, width, config.factorised)]
    if config.attention:
        blocks += [AttentionBlock(width), ResidualBlock(width, width, config.factorised)]
    return nn.ModuleList(blocks)


class VAE(nn.Module):
    """The autoencoder. `encode` and `decode` speak normalised latents; `moments` and `decode_raw` are for training.

    >>> vae = VAE(PRESETS["mini"])
    >>> latents = vae.encode(torch.zeros(1, 3, 17, 64, 64))  # [1, 16, 5, 8, 8]
    >>> frames = vae.decode(latents, chunk=1)  # [1, 3, 17, 64, 64]
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * channels, 2 * channels, (1, 1, 1))
        self.conv2 = CausalConv3d(channels, channels, (1, 1, 1))
        self.decoder = Decoder(config)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent along height and width."""
        return self.config.patch * 2 ** len(self.config.temporal_down)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return self.config.temporal_factor

    def with_statistics(self, mean: Iterable[float], std: Iterable[float]) -> VAE:
        """Store the per-channel mean and standard deviation of un-normalised latents in the config; returns self."""
        mean, std = tuple(float(m) for m in mean), tuple(float(s) for s in std)
        self.config = dataclasses.replace(self.config, latent_mean=mean, latent_std=std)
        return self

    def compile_norms(self) -> VAE:
        """Let torch.compile join each norm with the SiLU after it, for inference on a GPU: there a decoder spends more
        time moving bytes in them than in its convolutions. Returns self."""
        for module in self.modules():
            if isinstance(module, ChannelNorm):
                module.compiled = True
        return self

    # Training: whole clips, un-normalised.

    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, Z, T, h, w] and un-normalised, of frames [B, 3, F, H, W] in [-1, 1].

        F must be temporal_factor * k + 1, H and W multiples of spatial_factor: ValueError otherwise.
        """
        self._check_frames(frames, first=True)
        return self._moments(frames, None)

    def decode_raw(self, latents: Tensor) -> Tensor:
        """Frames [B, 3, F, H, W], about [-1, 1] but not clamped, of un-normalised latents [B, Z, T, h, w]."""
        self._check_latents(latents)
        return self._decode(latents, None)

    # Inference: normalised latents, whole or in chunks.

    def encode(self, frames: Tensor, chunk: int | None = None) -> Tensor:
        """Normalised latents [B, Z, T, h, w] (the mean, nothing is sampled) of frames [B, 3, F, H, W] in [-1, 1].

        chunk: frames encoded at a time after the first, a multiple of temporal_factor; None = the whole clip. The
        result is the same (to rounding), only the memory differs.
        """
        self._check_frames(frames, first=True)
        if chunk is None:
            return self.normalise(self._moments(frames, None)[0])
        if chunk < 1 or chunk % self.temporal_factor:
            raise ValueError(f"chunk is {chunk} frames, must be a positive multiple of {self.temporal_factor}")
        pieces = [frames[:, :, :1], *(p for p in frames[:, :, 1:].split(chunk, dim=2) if p.shape[2])]
        return torch.cat(list(self.encode_stream(pieces)), dim=2)

    def encode_stream(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Normalised latents [B, Z, t, h, w] for each chunk of frames [B, 3, f, H, W] of one clip, as they arrive.

        The first chunk has temporal_factor * k + 1 frames, each later one a positive multiple of temporal_factor.
        """
        stream = Stream()
        for frames in chunks:
            self._check_frames(frames, first=stream.first)
            yield self.normalise(self._moments(frames, stream)[0])
            stream.advance()

    def decode(self, latents: Tensor, chunk: int | None = None) -> Tensor:
        """Frames [B, 3, F, H, W], about [-1, 1] but not clamped, of normalised latents [B, Z, T, h, w].

        chunk: latent frames decoded at a time; None = the whole clip. The result is the same (to rounding).
        """
        if chunk is None:
            self._check_latents(latents)
            return self._decode(self.denormalise(latents), None)
        return torch.cat(list(self.decode_stream(latents, chunk)), dim=2)

    def decode_stream(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Frames [B, 3, f, H, W] of each `chunk` latent frames in turn, so that showing them can start at once."""
        self._check_latents(latents)
        if chunk < 1:
            raise ValueError(f"chunk is {chunk} latent frames, must be at least 1")
        stream = Stream()
        for piece in latents.split(chunk, dim=2):
            yield self.decode_next(piece, stream)

    def decode_next(self, latents: Tensor, stream: Stream) -> Tensor:
        """Frames [B, 3, f, H, W] of the latents [B, Z, t, h, w] that follow those `stream` has seen, for whoever has
        them one by one; the stream is moved on."""
        self._check_latents(latents)
        frames = self._decode(self.denormalise(latents), stream)
        stream.advance()
        return frames

    def normalise(self, latents: Tensor) -> Tensor:
        """(latents - latent_mean) / latent_std, per channel of [B, Z, T, h, w]."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """latents * latent_std + latent_mean, per channel of [B, Z, T, h, w]."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        channels = self.config.latent_channels
        mean = like.new_tensor(self.config.latent_mean or [0.0] * channels)
        std = like.new_tensor(self.config.latent_std or [1.0] * channels)
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)

    def _moments(self, frames: Tensor, stream: Stream | None) -> tuple[Tensor, Tensor]:
        x = self.encoder(self._patchify(frames, stream), stream)
        mean, logvar = self.conv1(x).permute(1, 4, 0, 2, 3).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def _decode(self, latents: Tensor, stream: Stream | None) -> Tensor:
        x = self.conv2(latents.permute(2, 0, 3, 4, 1).contiguous())
        return self._unpatchify(self.decoder(x, stream), stream)

    def _patchify(self, frames: Tensor, stream: Stream | None) -> Tensor:
        """[B, 3, F, H, W] -> [T, B, H/p, W/p, 3 * pt * p * p]; channels are ordered (colour, frame, column, row)."""
        p, pt = self.config.patch, self.config.temporal_patch
        if pt > 1 and (stream is None or stream.first):
            frames = torch.cat([frames[:, :, :1].expand(-1, -1, pt - 1, -1, -1), frames], dim=2)
        batch, colours, count, height, width = frames.shape
        x = frames.reshape(batch, colours, count // pt, pt, height // p, p, width // p, p)
        return x.permute(2, 0, 4, 6, 1, 3, 7, 5).reshape(count // pt, batch, height // p, width // p, -1).contiguous()

    def _unpatchify(self, x: Tensor, stream: Stream | None) -> Tensor:
        """The inverse of `_patchify`; of the copies of the first frame the last is kept."""
        p, pt = self.config.patch, self.config.temporal_patch
        count, batch, height, width, _ = x.shape
        x = x.reshape(count, batch, height, width, 3, pt, p, p).permute(1, 4, 0, 5, 2, 7, 3, 6)
        frames = x.reshape(batch, 3, count * pt, height * p, width * p)
        return frames[:, :, pt - 1 :] if stream is None or stream.first else frames

    def _check_frames(self, frames: Tensor, first: bool) -> None:
        if frames.ndim != 5 or frames.shape[1] != 3:
            raise ValueError(f"frames must be [B, 3, F, H, W], got {list(frames.shape)}")
        count, height, width = frames.shape[2:]
        factor = self.temporal_factor
        if first and count % factor != 1 % factor:
            raise ValueError(f"{count} frames: the number of frames must be {factor}k + 1 (1, {factor + 1}, ...)")
        if not first and (count == 0 or count % factor):
            raise ValueError(f"{count} frames in a later chunk: must be a positive multiple of {factor}")
        for name, size in (("height", height), ("width", width)):
            if size == 0 or size % self.spatial_factor:
                raise ValueError(f"{name} {size} must be a positive multiple of {self.spatial_factor}")

    def _check_latents(self, latents: Tensor) -> None:
        channels = self.config.latent_channels
        if latents.ndim != 5 or latents.shape[1] != channels:
            raise ValueError(f"latents must be [B, {channels}, T, h, w], got {list(latents.shape)}")
        if latents.shape[2] == 0:
            raise ValueError("latents have 0 frames, need at least 1")
