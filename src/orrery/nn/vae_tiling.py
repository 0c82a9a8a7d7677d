"""The VAE tile by tile, for GPUs that hold only a part of a picture.

The outer loop goes over tiles of the picture, the inner one streams time (`VAE.decode_stream`, `VAE.encode_stream`), so
that the GPU holds one tile for a few frames, however large the picture and however long the clip. Every tile is worked
on alone and is wrong near an edge, where it lacks what lies beyond. So tiles overlap: of an overlap the outer quarters
are dropped and the inner half is blended by a linear ramp. The result is close to that of the whole picture, not equal;
`benchmarks/vae.py` measures how close. A picture of one tile is equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from orrery.nn.vae import VAE

# A tile of the Wan 2.1 decoder takes about 11 KiB a pixel in bfloat16, 21 in float32 (measured on a CPU): 1.6 or 3 GiB
# for 384x384. Tiles of this size make 1.25 times the work of 704x1280 at once; tiles of 32x32 make 1.67 times.
TILE = (48, 48)
OVERLAP = 8  # orrery-mini then errs by less than a step between uint8 values (0.0054; with 4 by 0.06, with 0 by 0.9)
EDGE = 0.25  # share of an overlap that is dropped at each side; with ramps over all of it, 8 is 20 dB worse


@torch.no_grad()
def decode_tiled(
    vae: VAE,
    latents: Tensor,
    tile: tuple[int, int] = TILE,
    overlap: int = OVERLAP,
    chunk: int = 1,
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Frames [B, 3, F, H, W], about [-1, 1] but not clamped, of normalised latents [B, Z, T, h, w]; without gradient.

    tile: height and width of the largest tile, in latents. overlap: latents that neighbours share at least, fewer than
        the tile has. chunk: latent frames decoded at a time. latents are taken to the VAE's device and dtype.
    dtype: of the result, which is put together on the CPU. For frames within [-1, 1] float16 rounds by at most 0.0013
        where four tiles meet and 0.00025 inside a tile, a sixth and a thirtieth of the step between uint8 values.

    Raises:
        ValueError: wrong shape of latents; tile, overlap or chunk out of range.
    """
    vae._check_latents(latents)
    factor, like = vae.spatial_factor, next(vae.parameters())
    batch, _, steps, height, width = latents.shape
    count = (steps - 1) * vae.temporal_factor + 1
    frames = torch.zeros(batch, 3, count, height * factor, width * factor, dtype=dtype)
    for rows, columns, weight in _tiles((height, width), tile, overlap, factor):
        target = frames[..., _scaled(rows, factor), _scaled(columns, factor)]
        begin, weight = 0, weight.to(like.device)
        for piece in vae.decode_stream(latents[..., rows, columns].to(like), chunk):
            target[:, :, begin : begin + piece.shape[2]] += (piece * weight).to("cpu", dtype)
            begin += piece.shape[2]
    return frames


@torch.no_grad()
def encode_tiled(
    vae: VAE, frames: Tensor, tile: tuple[int, int] = TILE, overlap: int = OVERLAP, chunk: int = 1
) -> Tensor:
    """Normalised latents [B, Z, T, h, w] of frames [B, 3, F, H, W] in [-1, 1]; without gradient.

    tile, overlap, chunk: as in `decode_tiled`, in latents; a chunk is chunk * temporal_factor frames. The frames may
    stay on the CPU: chunks of tiles are taken to the VAE's device and dtype, which are also those of the result.

    Raises:
        ValueError: wrong shape of frames; tile, overlap or chunk out of range.
    """
    vae._check_frames(frames, first=True)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk} latent frames, must be at least 1")
    factor, like = vae.spatial_factor, next(vae.parameters())
    height, width = (size // factor for size in frames.shape[3:])
    steps = (frames.shape[2] - 1) // vae.temporal_factor + 1
    latents = torch.zeros(len(frames), vae.config.latent_channels, steps, height, width, device=like.device)
    for rows, columns, weight in _tiles((height, width), tile, overlap, 1):
        part = frames[..., _scaled(rows, factor), _scaled(columns, factor)]
        later = part[:, :, 1:].split(chunk * vae.temporal_factor, dim=2)
        pieces = (piece.to(like) for piece in (part[:, :, :1], *later) if piece.shape[2])
        target = latents[..., rows, columns]
        begin, weight = 0, weight.to(like.device)
        for piece in vae.encode_stream(pieces):
            target[:, :, begin : begin + piece.shape[2]] += piece * weight
            begin += piece.shape[2]
    return latents.to(like.dtype)


def _tiles(
    size: tuple[int, int], tile: tuple[int, int], overlap: int, factor: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns (in latents) and blending weights [rows * factor, columns * factor] of every tile."""
    if len(tile) != 2 or min(tile) < 1:
        raise ValueError(f"tile is {tile} latents, must be a height and a width of at least 1")
    if not 0 <= overlap < min(tile):
        raise ValueError(f"overlap is {overlap} latents, must be 0 to {min(tile) - 1} for tiles of {tile[0]}x{tile[1]}")
    rows, columns = (_spans(n, t, overlap) for n, t in zip(size, tile, strict=True))
    across = _weights(columns, factor)
    for row, down in zip(rows, _weights(rows, factor), strict=True):
        for column, weight in zip(columns, across, strict=True):
            yield row, column, down[:, None] * weight


def _spans(length: int, tile: int, overlap: int) -> list[slice]:
    """The fewest parts of 0..length that are no longer than `tile` and share at least `overlap`; all of one length."""
    if length <= tile:
        return [slice(0, length)]
    count = math.ceil((length - overlap) / (tile - overlap))
    size = math.ceil((length + (count - 1) * overlap) / count)
    starts = [i * (length - size) // (count - 1) for i in range(count)]
    return [slice(start, start + size) for start in starts]


def _weights(spans: list[slice], factor: int) -> list[Tensor]:
    """A weight for each pixel of each part: 1 inside, ramps where parts meet; they sum to 1 at every pixel.

    Where a third part reaches into a ramp (tiles of less than two overlaps), the sum is divided out.
    """
    total = torch.zeros(spans[-1].stop * factor, dtype=torch.float64)
    weights = [torch.ones((span.stop - span.start) * factor, dtype=torch.float64) for span in spans]
    for left, right, span, following in zip(weights, weights[1:], spans, spans[1:], strict=False):
        shared = (span.stop - following.start) * factor
        if shared:
            places = (torch.arange(shared, dtype=torch.float64) + 0.5) / shared
            ramp = ((places - EDGE) / (1 - 2 * EDGE)).clamp(0, 1)
            right[:shared] = ramp
            left[-shared:] = torch.minimum(left[-shared:], ramp.flip(0))
    for weight, span in zip(weights, spans, strict=True):
        total[_scaled(span, factor)] += weight
    return [(weight / total[_scaled(span, factor)]).float() for weight, span in zip(weights, spans, strict=True)]


def _scaled(span: slice, factor: int) -> slice:
    return slice(span.start * factor, span.stop * factor)
