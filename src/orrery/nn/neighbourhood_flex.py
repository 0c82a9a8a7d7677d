"""Neighbourhood attention by torch's FlexAttention (arXiv 2412.05496), which skips blocks of the score matrix.

It skips whole blocks only, so tokens are put into an order in which blocks of queries and of keys are compact: axis by
axis, positions of one residue modulo the dilation side by side, then 3-D tiles (token permutation, arXiv 2504.16922).
With the published patterns every block is then seen whole or not at all.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from orrery.nn.neighbourhood_pattern import Fitted, Triple, axis_groups, constant

TILE = (4, 4, 8)
BLOCK = 128  # tokens of a tile


def _axis_tables(length: int, window: int, stride: int, dilation: int) -> tuple[Tensor, Tensor]:
    """For every position of an axis: its place when residues stand side by side, and the place where the window of
    the query there begins. In places a window is one stretch, whatever the dilation."""
    order = torch.cat([torch.arange(residue, length, dilation) for residue in range(dilation)])
    place = torch.empty_like(order)
    place[order] = torch.arange(length)
    start = torch.empty_like(place)
    for queries, keys in axis_groups(length, window, stride, dilation):
        start[torch.tensor(queries)] = place[keys[0]]
    return place, start


# order [N]: the token at each place; back [N]: the place of each token; and by place [3, N]: where the token stands
# on each axis, where its window begins and where it ends.
_Layout = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Of BlockMask.from_kv_blocks: how many blocks of keys a block of queries sees in part, which; wholly, which.
_Blocks = tuple[Tensor, Tensor, Tensor, Tensor]


def _layout(fitted: Fitted, device: torch.device) -> _Layout:
    axes = [_axis_tables(*numbers) for numbers in zip(*fitted, strict=True)]
    places = torch.meshgrid(*(place for place, _ in axes), indexing="ij")
    starts = torch.meshgrid(*(start for _, start in axes), indexing="ij")
    tile = torch.zeros(fitted.grid, dtype=torch.long)
    for place, size, length in zip(places, TILE, fitted.grid, strict=True):
        tile = tile * length + place // size
    order = tile.flatten().argsort(stable=True)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    where, start = (torch.stack([axis.flatten()[order] for axis in table]).int() for table in (places, starts))
    stop = start + torch.tensor(fitted.window, dtype=torch.int)[:, None]
    return order.to(device), back.to(device), where.to(device), start.to(device), stop.to(device)


def _sight(place: Tensor, start: Tensor, stop: Tensor) -> Callable[..., Tensor]:
    """Whether the query at one place sees the key at another. The same code with other tables for every pattern, so
    that patterns share a compiled kernel."""

    def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = key >= 0
        for axis in range(3):
            inside = inside & (start[axis, query] <= place[axis, key]) & (place[axis, key] < stop[axis, query])
        return inside

    return seen


def _blocks(seen: Callable[..., Tensor], tokens: int, device: torch.device) -> _Blocks:
    """Evaluates the mask one row of blocks at a time: create_block_mask would hold N x N at once."""
    count = -(-tokens // BLOCK)
    keys, zero = torch.arange(tokens, device=device), torch.zeros((), dtype=torch.long, device=device)
    any_seen, all_seen = (torch.zeros(count, count, dtype=torch.bool, device=device) for _ in range(2))
    for row in range(count):
        queries = keys[row * BLOCK : (row + 1) * BLOCK]
        inside = seen(zero, zero, queries[:, None], keys)
        inside = F.pad(inside, (0, count * BLOCK - tokens, 0, BLOCK - len(queries))).view(BLOCK, count, BLOCK)
        any_seen[row], all_seen[row] = inside.any(2).any(0), inside.all(2).all(0)
    return *_listed(any_seen & ~all_seen), *_listed(all_seen)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of a bool [rows, columns]: how many columns of each row are chosen, and which, those first."""
    which = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(1).int()[None, None], which.int()[None, None]


@functools.lru_cache(maxsize=8)
def _made(fitted: Fitted, device: torch.device) -> tuple[_Layout, _Blocks]:
    layout = _layout(fitted, device)
    return layout, _blocks(_sight(*layout[2:]), len(layout[0]), device)


@constant
def _constants(numbers: tuple[Triple, ...], device: torch.device) -> tuple[_Layout, _Blocks]:
    return _made(Fitted(*numbers), device)


@functools.lru_cache(maxsize=8)
def _block_mask(fitted: Fitted, device: torch.device) -> BlockMask:
    """One object for one pattern, so that the compiled kernel sees the same mask again."""
    return _assembled(*_made(fitted, device))


def _assembled(layout: _Layout, blocks: Sequence[Tensor]) -> BlockMask:
    tokens = len(layout[0])
    return BlockMask.from_kv_blocks(
        blocks[0],
        blocks[1],
        blocks[2],
        blocks[3],
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=_sight(*layout[2:]),
        seq_lengths=(tokens, tokens),
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    # fullgraph: after too many shapes torch raises, instead of going on uncompiled with N x N scores in memory.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def flex_neighbourhood(q: Tensor, k: Tensor, v: Tensor, fitted: Fitted) -> Tensor:
    """q, k, v [B, N, heads, dim] -> the same shape. On CUDA the kernel is compiled, at the first call of a shape;
    elsewhere it runs uncompiled, with all N x N scores in memory."""
    layout, blocks = _constants(tuple(fitted), q.device)
    order, back = layout[:2]
    q, k, v = (x.index_select(1, order).transpose(1, 2) for x in (q, k, v))
    if torch.compiler.is_compiling():
        made = [block.clone() for block in blocks]  # what is computed in the graph needs no guard, which constants lack
        answer = flex_attention(q, k, v, block_mask=_assembled(layout, made))
    else:
        kernel = _compiled() if q.device.type == "cuda" else cast(Callable[..., Any], flex_attention)
        answer = kernel(q, k, v, block_mask=_block_mask(fitted, q.device))
    return answer.transpose(1, 2).index_select(1, back)
