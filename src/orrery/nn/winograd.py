"""Winograd's minimal filtering F(4x4, 3x3): 3x3 convolutions with 2.25 products a pixel, not 9, for the VAE on CPUs.

An image is cut into tiles of 4x4 pixels, each read with a rim of one pixel as d [6, 6]. With the matrices B, G and A of
`_matrices`, the 4x4 pixels of the convolution with g [3, 3] are A (G g G^T * B d B^T) A^T. Channels are summed between
the transforms, where each of the 36 places is one matrix product, and so are the taps of time of a causal kernel: a
frame is transformed once and serves as many output frames as there are taps. Lavin and Gray (arXiv 1509.09308); the
matrices are those of Cook and Toom for the points of `POINTS`.

Exact but for rounding, which is four times that of a direct convolution in float32 (root mean square, measured). With
the usual points 0, 1, -1, 2, -2 it is nine times, and the largest error five times what it is here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

POINTS = (0.0, 2 / 3, -2 / 3, 1.5, -1.5)  # and infinity
TILE, SIDE = 4, 6  # pixels that a tile yields, and reads, along each side
PLACES = SIDE * SIDE

# Measured with one thread on a Xeon with AVX-512, whose direct convolutions run near the speed of its products.
CHANNELS, CHANNELS_OF_AN_IMAGE = 96, 160  # fewer inputs or outputs: the transforms cost as much as they save; the
# second number is for kernels of one frame, whose products are a third, while the transforms are the same
PIXELS = 2048  # fewer, in all frames: transforming the weights costs more
WASTE = 1.25  # tiles may cover so many times the picture
BLOCK = 2**22  # floats of each of the two work buffers, about: half of it is half as fast at 384 channels
FRAMES = 8  # output frames that are worked on together

_allowed: ContextVar[bool] = ContextVar("winograd_allowed", default=True)


@contextmanager
def disabled() -> Iterator[None]:
    """Within this context (of this thread) the VAE's convolutions are computed as written: for tests and benchmarks."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def possible(x: Tensor, weight: Tensor) -> bool:
    """Whether a convolution may be rearranged: float32 on a CPU, no gradient, no autocast, no compiler that traces."""
    return (
        _allowed.get()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def worthwhile(x: Tensor, weight: Tensor) -> bool:
    """Whether `convolve` is possible, and faster than a direct convolution, for x [T, B, H, W, I] and weight [O, I, kt,
    kh, kw]: a 3x3 kernel, enough channels and pixels, and a picture that tiles of 4x4 do not exceed by much."""
    frames, batch, height, width, inputs = x.shape
    covered = math.ceil(height / TILE) * math.ceil(width / TILE) * TILE**2
    return (
        tuple(weight.shape[3:]) == (3, 3)
        and min(inputs, weight.shape[0]) >= (CHANNELS if weight.shape[2] > 1 else CHANNELS_OF_AN_IMAGE)
        and frames * batch * height * width >= PIXELS
        and covered <= WASTE * height * width
        and possible(x, weight)
    )


def convolve(x: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None = None) -> Tensor:
    """Causal convolution of x [T, B, H, W, I] with weight [O, I, kt, 3, 3], zeros around the picture, plus bias [O].

    past: the kt - 1 frames [kt - 1, B, H, W, I] before x; None = zeros, which cost nothing. All float32 on a CPU.
    Returns [T, B, H, W, O].
    """
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    if weight.shape[2] == 1:  # frames are so many more images
        _Convolution(x.flatten(0, 1)[None], None, weight, bias, out.flatten(0, 1)[None]).run()
    else:
        _Convolution(x, past, weight, bias, out).run()
    return out


def _matrices() -> tuple[Tensor, Tensor, Tensor]:
    """B (x) B [36, 36], G (x) G [36, 9] and A (x) A [16, 36] in float32: the transforms of flattened tiles."""
    b, g, a = ([[0.0] * columns for _ in range(rows)] for rows, columns in ((SIDE, SIDE), (SIDE, 3), (TILE, SIDE)))
    for row, point in enumerate(POINTS):
        others = [other for other in POINTS if other != point]
        scale = math.prod(point - other for other in others)
        b[row][: SIDE - 1] = _product(others)
        g[row] = [point**k / scale for k in range(3)]
        for k in range(TILE):
            a[k][row] = point**k
    b[-1] = _product(POINTS)
    g[-1][-1] = a[-1][-1] = 1.0
    one, two, three = (torch.tensor(matrix, dtype=torch.float64, device="cpu") for matrix in (b, g, a))
    return torch.kron(one, one).float(), torch.kron(two, two).float(), torch.kron(three, three).float()


def _product(roots: Sequence[float]) -> list[float]:
    """Coefficients, from the constant one on, of the polynomial that is the product of x - root."""
    coefficients = [1.0]
    for root in roots:
        shifted, scaled = [0.0, *coefficients], [*(root * c for c in coefficients), 0.0]
        coefficients = [s - r for s, r in zip(shifted, scaled, strict=True)]
    return coefficients


_B, _G, _A = _matrices()


def _transform(weight: Tensor) -> Tensor:
    """Weight [O, I, kt, 3, 3] at the 36 places, [36, kt * I, O]."""
    outputs, inputs, taps = weight.shape[:3]
    # First a plain transposition, for which torch has a fast path, then rows of outputs are moved.
    rows = weight.reshape(outputs, -1).t().contiguous().view(inputs, taps, 9, outputs)
    return (_G @ rows.permute(2, 1, 0, 3).reshape(9, -1)).view(PLACES, taps * inputs, outputs)


class _Convolution:
    """One convolution into out [T, B, H, W, O] of x [T, B, H, W, I] with weight [O, I, kt, 3, 3].

    The work is done in blocks of frames and tiles, and two buffers take turns: the frames of a block with their rim,
    their tiles [36, n, F, I], those transformed, the products [36, F', n, O], and pixels [16, F', n, O].
    """

    def __init__(self, x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor, out: Tensor) -> None:
        self.x, self.past, self.bias, self.out = x, past, bias, out
        self.taps = weight.shape[2]
        self.places = _transform(weight)
        self.buffers = [x.new_empty(0), x.new_empty(0)]

    def run(self) -> None:
        """Fill `out`."""
        frames, batch, height, width, inputs = self.x.shape
        spans = _parts(frames, FRAMES)
        count = spans[0].stop
        floats = PLACES * batch * max((count + self.taps - 1) * inputs, count * self.places.shape[-1])
        columns = _parts(math.ceil(width / TILE), BLOCK // floats)
        rows = _parts(math.ceil(height / TILE), BLOCK // (floats * columns[0].stop))
        for span in spans:
            for row in rows:
                for column in columns:
                    self._block(span, row, column)

    def _buffer(self, which: int, *shape: int) -> Tensor:
        """A tensor of this shape in one of the two buffers, which grows if need be."""
        size = math.prod(shape)
        if self.buffers[which].numel() < size:
            self.buffers[which] = self.x.new_empty(size)
        return self.buffers[which][:size].view(shape)

    def _block(self, span: slice, row: slice, column: slice) -> None:
        """Output frames `span` of the tiles in `row` and `column`."""
        batch, inputs, outputs = self.x.shape[1], self.x.shape[-1], self.places.shape[-1]
        start = span.start - (self.taps - 1)
        start = start if self.past is not None else max(start, 0)
        frames, count, down, across = span.stop - start, span.stop - span.start, _length(row), _length(column)
        tiles = batch * down * across
        rimmed = self._rimmed(slice(start, span.stop), row, column)
        a_frame, an_image, a_row, a_column, _ = rimmed.stride()
        strides = (a_row, a_column, an_image, TILE * a_row, TILE * a_column, a_frame, 1)
        cut = self._buffer(1, SIDE, SIDE, batch, down, across, frames, inputs)
        cut.copy_(rimmed.as_strided((SIDE, SIDE, batch, down, across, frames, inputs), strides))
        seen = self._buffer(0, PLACES, tiles, frames, inputs)
        torch.mm(_B, cut.view(PLACES, -1), out=seen.view(PLACES, -1))
        products = self._buffer(1, PLACES, count, tiles, outputs)
        self._multiply(seen, products, span.start - start)
        pixels = self._buffer(0, TILE**2, count * tiles * outputs)
        torch.mm(_A, products.view(PLACES, -1), out=pixels)
        self._write(pixels, span, row, column)

    def _rimmed(self, span: slice, row: slice, column: slice) -> Tensor:
        """Frames `span` of the block with a rim of one pixel, [F, B, 4 rows + 2, 4 columns + 2, I]; zeros outside."""
        x, past = self.x, self.past
        top, left = TILE * row.start - 1, TILE * column.start - 1
        height, width = TILE * _length(row) + 2, TILE * _length(column) + 2
        down, across = _inside(top, height, x.shape[2]), _inside(left, width, x.shape[3])
        rimmed = self._buffer(0, span.stop - span.start, x.shape[1], height, width, x.shape[-1])
        for dim, start, part, size in ((2, top, down, height), (3, left, across, width)):
            rimmed.narrow(dim, 0, part.start - start).zero_()
            rimmed.narrow(dim, part.stop - start, size - (part.stop - start)).zero_()
        inner = rimmed[:, :, down.start - top : down.stop - top, across.start - left : across.stop - left]
        before = max(-span.start, 0)
        if before and past is not None:
            inner[:before].copy_(past[len(past) - before :, :, down, across])
        inner[before:].copy_(x[max(span.start, 0) : span.stop, :, down, across])
        return rimmed

    def _multiply(self, seen: Tensor, products: Tensor, first: int) -> None:
        """products [36, F', n, O] = seen [36, n, F, I] by weights; the first of F' is the frame `first` of F.

        The frames that an output sees lie one after another, as the channels of one longer row do: no copy is made.
        """
        _, tiles, frames, inputs = seen.shape
        begin, end = first, first + products.shape[1]
        while begin < end:
            taps = min(self.taps, begin + 1)  # fewer where zeros stand before the clip
            stop = end if taps == self.taps else begin + 1
            rows = seen.as_strided(
                (PLACES, stop - begin, tiles, taps * inputs),
                (seen.stride(0), inputs, frames * inputs, 1),
                (begin + 1 - taps) * inputs,
            )
            weights = self.places[:, (self.taps - taps) * inputs :]
            if products.shape[1] == 1:
                torch.bmm(rows[:, 0], weights, out=products[:, 0])
            else:  # place by place, so that its weights are read once for all frames
                for one, weight, product in zip(rows, weights, products[:, begin - first : stop - first], strict=True):
                    torch.bmm(one, weight.expand(stop - begin, -1, -1), out=product)
            begin = stop

    def _write(self, pixels: Tensor, span: slice, row: slice, column: slice) -> None:
        """Put pixels [16, F' * n * O] plus the bias into their places of `out`."""
        batch, channels, down, across = self.out.shape[1], self.out.shape[-1], _length(row), _length(column)
        pixels = pixels.view(TILE, TILE, _length(span), batch, down, across, channels).permute(2, 3, 4, 0, 5, 1, 6)
        target = self.out[span, :, TILE * row.start : TILE * row.stop, TILE * column.start : TILE * column.stop]
        height, width = target.shape[2:4]
        if (height, width) == (TILE * down, TILE * across):
            torch.add(pixels, self.bias, out=target.view(pixels.shape))
        else:  # tiles that stick out of the picture
            whole = (pixels + self.bias).reshape(*target.shape[:2], TILE * down, TILE * across, channels)
            target.copy_(whole[:, :, :height, :width])


def _parts(length: int, most: int) -> list[slice]:
    """0..length in the fewest parts of at most max(most, 1), the longest first, none shorter by more than one."""
    count = math.ceil(length / max(most, 1))
    sizes = [length // count + (i < length % count) for i in range(count)]
    stops = list(itertools.accumulate(sizes))
    return [slice(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]


def _length(part: slice) -> int:
    return part.stop - part.start


def _inside(start: int, size: int, length: int) -> slice:
    """The part of start..start + size that lies in 0..length."""
    return slice(max(start, 0), min(start + size, length))
