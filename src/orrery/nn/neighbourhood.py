"""Neighbourhood attention: each token of a grid [T, H, W] attends to a window of it, not to all of it.

What that leaves out of full attention is real: it is an inexact rung, made for networks that were trained with it (the
sparse Cosmos-Predict2 Video2World checkpoints). `nn.neighbourhood_pattern` says which keys a token sees.

Four backends compute the same thing: "gather" (windows collected, then `kernels.attention`: any device, no package),
"flex" (torch's FlexAttention), "natten" (the package), and "masked", the definition itself, for tests and small grids.
"""

import functools
import math
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from orrery.errors import note, one_line
from orrery.nn.kernels import HALF, attention, measure, random_qkv
from orrery.nn.neighbourhood_pattern import Fitted, Group, Pattern, Triple, all_groups, constant, neighbourhood_mask

MASKED_TOKENS = 8192  # beyond which the definition, N x N, is refused
GATHERED = 4  # keys collected at a time, in multiples of all keys: what "gather" takes of memory


@constant
def _mask(numbers: tuple[Triple, ...], device: torch.device) -> Tensor:
    return _cached_mask(Fitted(*numbers), device)


@functools.lru_cache(maxsize=8)
def _cached_mask(fitted: Fitted, device: torch.device) -> Tensor:
    return neighbourhood_mask(fitted).to(device)


def _masked(q: Tensor, k: Tensor, v: Tensor, fitted: Fitted) -> Tensor:
    if q.shape[1] > MASKED_TOKENS:
        raise ValueError(f'backend "masked" takes at most {MASKED_TOKENS} tokens, got {q.shape[1]}')
    mask = _mask(tuple(fitted), q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2)


def _merged(groups: list[Group]) -> list[Group]:
    """Neighbours with the same window made one: at the borders, and where a window is all of its residue."""
    merged: list[Group] = []
    for group in groups:
        if merged and merged[-1].keys == group.keys:
            before = merged.pop().queries
            group = Group(range(before.start, group.queries.stop, before.step), group.keys)
        merged.append(group)
    return merged


_Steps = tuple[tuple[int, int, int, int], ...]


@constant
def _plan(numbers: tuple[Triple, ...], device: torch.device) -> tuple[Tensor, Tensor, _Steps, Tensor]:
    """How "gather" goes about it: M blocks of tokens are attended to side by side, as a batch.

    queries [M, n] and keys [M, m], numbers of tokens, where a block with fewer queries than others repeats one; steps,
    slices (queries from, to, keys from, to) of every block alike, one call of a kernel each; and back [N], where in
    [M * n] the answer to each token lies.
    """
    return _cached_plan(Fitted(*numbers), device)


@functools.lru_cache(maxsize=16)
def _cached_plan(fitted: Fitted, device: torch.device) -> tuple[Tensor, Tensor, _Steps, Tensor]:
    """One axis, that on which windows overlap most, is not copied window by window: in the order of its residues
    every window is a slice. The other axes' windows are collected side by side."""
    groups = all_groups(fitted)
    merged = [_merged(some) for some in groups]
    overlap = [len(some) * w / length for some, w, length in zip(merged, fitted.window, fitted.grid, strict=True)]
    sliced = overlap.index(max(overlap))
    pitch = (fitted.grid[1] * fitted.grid[2], fitted.grid[2], 1)  # between tokens along each axis
    order = [position for residue in range(fitted.dilation[sliced]) for position in
             range(fitted.grid[sliced])[residue :: fitted.dilation[sliced]]]  # fmt: skip
    queries = keys = torch.tensor(order)[None, :, None] * pitch[sliced]  # [blocks, along, beside]
    for axis in (axis for axis in range(3) if axis != sliced):
        beside = min((merged[axis], groups[axis]), key=lambda some: len(some) * max(len(g.queries) for g in some))
        longest = max(len(group.queries) for group in beside)
        asks = torch.tensor([[*g.queries, *[g.queries[-1]] * (longest - len(g.queries))] for g in beside]) * pitch[axis]
        sees = torch.tensor([list(g.keys) for g in beside]) * pitch[axis]
        queries, keys = (
            (tokens[:, None, :, :, None] + some[None, :, None, None, :]).flatten(3).flatten(0, 1)
            for tokens, some in ((queries, asks), (keys, sees))
        )
    steps, begin = [], 0
    for group in merged[sliced]:
        n, m, start = queries.shape[2], keys.shape[2], order.index(group.keys[0])
        steps.append((begin * n, (begin + len(group.queries)) * n, start * m, (start + len(group.keys)) * m))
        begin += len(group.queries)
    back = torch.empty(math.prod(fitted.grid), dtype=torch.long)
    back[queries.flatten()] = torch.arange(queries.numel())
    return queries.flatten(1).to(device), keys.flatten(1).to(device), tuple(steps), back.to(device)


def _gather(q: Tensor, k: Tensor, v: Tensor, fitted: Fitted) -> Tensor:
    queries, keys, steps, back = _plan(tuple(fitted), q.device)
    pieces = max(1, math.ceil(keys.numel() / (GATHERED * q.shape[1])))
    answers = []
    for asking, seen in zip(queries.chunk(pieces), keys.chunk(pieces), strict=True):
        parts = _attended(_collected(q, asking), _collected(k, seen), _collected(v, seen), steps)
        answers.append(torch.cat(parts, dim=1).unflatten(0, (q.shape[0], -1)).flatten(1, 2))
    return (answers[0] if pieces == 1 else torch.cat(answers, dim=1)).index_select(1, back)


def _attended(q: Tensor, k: Tensor, v: Tensor, steps: _Steps) -> list[Tensor]:
    """A function of its own, so that the collected windows are let go of before the answers are put together."""
    return [attention(q[:, a:b], k[:, c:d], v[:, c:d]) for a, b, c, d in steps]


def _collected(x: Tensor, tokens: Tensor) -> Tensor:
    """x [B, N, heads, dim], tokens [M, n] -> [B * M, n, heads, dim]."""
    return x.index_select(1, tokens.flatten()).unflatten(1, tuple(tokens.shape)).flatten(0, 1)


def _flex(q: Tensor, k: Tensor, v: Tensor, fitted: Fitted) -> Tensor:
    from orrery.nn.neighbourhood_flex import flex_neighbourhood

    if q.device.type != "cuda" and q.shape[1] > MASKED_TOKENS:  # not compiled, it spells out N x N scores
        raise ValueError(f'backend "flex" takes at most {MASKED_TOKENS} tokens on {q.device.type}, got {q.shape[1]}')
    return flex_neighbourhood(q, k, v, fitted)


# Tiles of queries and keys with which a window of the published schedules is made of whole tiles: by major compute
# capability, for 128 numbers a head (cosmos-predict2's neighborhood_attn.py).
_NATTEN_TILES = {9: ((4, 4, 8), (4, 4, 8)), 10: ((8, 4, 8), (4, 4, 8))}


def _natten(q: Tensor, k: Tensor, v: Tensor, fitted: Fitted) -> Tensor:
    from natten import na3d  # type: ignore[import-not-found]

    tiles = _NATTEN_TILES.get(torch.cuda.get_device_capability(q.device)[0]) if q.shape[-1] == 128 else None
    options = {} if tiles is None else {"q_tile_shape": tiles[0], "kv_tile_shape": tiles[1]}
    volume = [x.unflatten(1, fitted.grid) for x in (q, k, v)]
    numbers = {"kernel_size": fitted.window, "stride": fitted.stride, "dilation": fitted.dilation}
    return na3d(*volume, **numbers, **options).flatten(1, 3)


def backend_problem(backend: str, dtype: torch.dtype, device: str | torch.device) -> str:
    """Why a backend cannot serve tensors of a dtype on a device, or an empty string."""
    if backend != "natten" or torch.device(device).type == "meta":
        return ""
    if torch.device(device).type != "cuda":
        return f"it needs a CUDA GPU, the tensors are on {torch.device(device).type}"
    if dtype not in HALF:
        return f"it takes {', '.join(str(one) for one in HALF)}, not {dtype}"
    if find_spec("natten") is None:
        return "the package natten is not installed"
    try:
        natten = import_module("natten")
    except Exception as error:  # a package built for another torch or CUDA fails in its own ways
        return f"the package natten cannot be used: {one_line(error)}"
    return "" if getattr(natten, "HAS_LIBNATTEN", False) else "the package natten was built without its CUDA kernels"


BACKENDS: dict[str, Callable[[Tensor, Tensor, Tensor, Fitted], Tensor]] = {
    "gather": _gather, "flex": _flex, "natten": _natten, "masked": _masked,
}  # fmt: skip


def neighbourhood_attention(
    q: Tensor, k: Tensor, v: Tensor, grid: Triple, pattern: Pattern, backend: str = "gather"
) -> Tensor:
    """Attention in which each token sees the window that a pattern gives it, scaled by 1/sqrt(dim).

    q, k, v [B, T*H*W, heads, dim] in the order (t, h, w), one dtype and one device -> the same shape. grid: (T, H, W).
    backend: one of BACKENDS. A grid of one frame, and one that a window covers whole, get full attention.
    ValueError for shapes that do not fit the grid and for a backend that is unknown or not available.
    """
    if q.ndim != 4 or q.shape[1] != math.prod(grid) or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(list(x.shape)) for x in (q, k, v))
        raise ValueError(
            f"q, k and v must be alike and [B, {math.prod(grid)}, heads, dim] on grid {grid}, got {shapes}"
        )
    if not torch.compiler.is_compiling():
        check_backend(backend, q.dtype, q.device)
    fitted = pattern.fitted(grid)
    if grid[0] == 1 or fitted.window == fitted.grid:
        return attention(q, k, v)
    if q.device.type == "meta":  # to count memory: only this one runs there, and it takes the most
        backend = "gather"
    return BACKENDS[backend](q, k, v, fitted)


def check_backend(backend: str, dtype: torch.dtype, device: str | torch.device) -> None:
    """ValueError for a backend that is unknown or cannot serve tensors of a dtype on a device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}")
    if problem := backend_problem(backend, dtype, device):
        raise ValueError(f'backend "{backend}" is not available: {problem}')


@functools.cache
def choose_backend(
    q_shape: tuple[int, int, int, int], grid: Triple, pattern: Pattern, dtype: torch.dtype, device: str | torch.device
) -> str:
    """The name of the fastest backend for q, k, v [B, T*H*W, heads, dim]; they agree but for rounding.

    On a GPU the available ones are timed on that very shape, once a process, and one line says what was chosen and
    why. On other devices it is "gather", without a line.
    """
    device, fitted = torch.device(device), pattern.fitted(grid)
    if device.type != "cuda":
        return "gather"
    names = ("gather", "flex", "natten")
    problems = {name: problem for name in names if (problem := backend_problem(name, dtype, device))}
    about = f"neighbourhood attention {list(q_shape)}, window {fitted.window} in {grid}"
    try:
        q, k, v = random_qkv(q_shape, q_shape, dtype, device)
        runs = {name: functools.partial(BACKENDS[name], q, k, v, fitted) for name in names if name not in problems}
        result = measure(runs, device)
    except torch.cuda.OutOfMemoryError:
        note(f"{about}: gather, unmeasured, for want of memory to measure in")
        return "gather"
    result.refused = problems | result.refused
    note(f"{about}: {result.best}, as measured: {result}")
    return result.best
