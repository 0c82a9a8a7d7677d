"""Neighbourhood attention: the definition against a slow loop over NATTEN's rules, every backend against the
definition, and the published schedules against what their authors say of them."""

import dataclasses
import itertools
import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orrery.nn import neighbourhood, neighbourhood_flex
from orrery.nn.kernels import attention
from orrery.nn.neighbourhood import choose_backend, neighbourhood_attention
from orrery.nn.neighbourhood_pattern import (
    FULL,
    PUBLISHED,
    Fitted,
    Pattern,
    Triple,
    attention_share,
    axis_groups,
    neighbourhood_mask,
)
from orrery.world.memory import peak_bytes

PAGE = (24, 44, 80)  # tokens of 93 frames of 704 x 1280 pixels

CASES: list[tuple[Triple, Pattern]] = [
    ((5, 4, 4), Pattern((FULL, 3, 3))),
    ((5, 7, 9), Pattern((3, 4, 5), (2, 1, 3))),  # cut in time too; strides that leave a rest
    ((4, 11, 10), Pattern((FULL, 2, 3), (1, 1, 2), (1, 4, 3))),  # residues of unequal length
    ((3, 9, 13), Pattern((2, 3, 4), (1, 3, 2), (1, 2, 3))),
    ((6, 5, 5), Pattern((2, FULL, FULL), (2, 1, 1))),  # windows side by side
    ((2, 11, 20), PUBLISHED["2b"][0]),
    ((2, 11, 20), PUBLISHED["2b"][2]),
    ((2, 11, 20), PUBLISHED["2b"][11]),
]


def window_start(index: int, length: int, window: int, stride: int) -> int:
    """NATTEN's rule (na_utils.cuh), term by term: from the left neighbour count, pushed back where it overhangs."""
    left, right = window // 2, window // 2 + (window % 2 - 1)
    leader = min((index // stride) * stride + stride // 2, length - 1)
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return start


def slow_sees(query: int, key: int, length: int, window: int, stride: int, dilation: int) -> bool:
    if query % dilation != key % dilation:
        return False
    residue = query % dilation
    own_length = (length - residue + dilation - 1) // dilation
    start = window_start(query // dilation, own_length, window, stride)
    return start <= key // dilation < start + window


def qkv(grid: Triple, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, grid[0] * grid[1] * grid[2], 2, 16)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    return 2 * q, k, v


@pytest.mark.parametrize("length, dilation", [(7, 1), (12, 1), (11, 3), (13, 2)])
def test_windows_of_an_axis_are_natten_s(length: int, dilation: int) -> None:
    for window in range(2, length // dilation + 1):
        for stride in range(1, window + 1):
            groups = axis_groups(length, window, stride, dilation)
            assert sorted(itertools.chain(*(group.queries for group in groups))) == list(range(length))
            for queries, keys in groups:
                for query in queries:
                    expected = [key for key in range(length) if slow_sees(query, key, length, window, stride, dilation)]
                    assert list(keys) == expected and len(expected) == window


def test_the_mask_is_the_product_of_its_axes() -> None:
    fitted = Fitted((3, 4, 7), (2, 3, 3), (1, 2, 1), (1, 1, 2))
    mask = neighbourhood_mask(fitted)
    tokens = list(itertools.product(*(range(length) for length in fitted.grid)))
    for (i, query), (j, key) in itertools.product(enumerate(tokens), repeat=2):
        assert mask[i, j] == all(slow_sees(*one) for one in zip(query, key, *fitted))
    assert (mask.sum(1) == 2 * 3 * 3).all() and not mask.all()


@pytest.mark.parametrize("grid, pattern", CASES)
def test_gathered_windows_are_the_definition(grid: Triple, pattern: Pattern) -> None:
    q, k, v = qkv(grid)
    found = neighbourhood_attention(q, k, v, grid, pattern)
    expected = neighbourhood_attention(q, k, v, grid, pattern, "masked")
    assert torch.allclose(found, expected, atol=2e-6)
    assert (expected - attention(q, k, v)).abs().max() > 0.1  # the pattern matters here


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("grid, pattern", [CASES[index] for index in (1, 3, 5)])
def test_flex_attention_is_the_definition(grid: Triple, pattern: Pattern) -> None:
    q, k, v = qkv(grid)
    found = neighbourhood_attention(q, k, v, grid, pattern, "flex")
    assert torch.allclose(found, neighbourhood_attention(q, k, v, grid, pattern, "masked"), atol=2e-6)


def test_natten_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, which has no build for CPUs: layout, names and numbers, by its documentation."""
    grid, pattern = CASES[3]
    q, k, v = qkv(grid)

    def na3d(
        query: Tensor, key: Tensor, value: Tensor, *, kernel_size: Triple, stride: Triple, dilation: Triple
    ) -> Tensor:
        assert query.shape == (2, *grid, 2, 16)
        mask = neighbourhood_mask(Fitted(grid, kernel_size, stride, dilation))
        q, k, v = (x.flatten(1, 3).transpose(1, 2) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return out.transpose(1, 2).reshape(query.shape)

    module = types.ModuleType("natten")
    vars(module).update(na3d=na3d, HAS_LIBNATTEN=True)
    monkeypatch.setitem(sys.modules, "natten", module)
    monkeypatch.setattr(neighbourhood, "check_backend", lambda *_: None)
    found = neighbourhood_attention(q, k, v, grid, pattern, "natten")
    assert torch.allclose(found, neighbourhood_attention(q, k, v, grid, pattern, "masked"), atol=2e-6)


def test_gradients_of_gathered_windows() -> None:
    grid, pattern = CASES[2]
    gradients = []
    for backend in ("gather", "masked"):
        inputs = [x.requires_grad_() for x in qkv(grid)]
        out = neighbourhood_attention(*inputs, grid, pattern, backend)
        gradients.append(torch.autograd.grad(out.square().sum(), inputs))
    for found, expected in zip(*gradients, strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def test_collecting_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, pattern = CASES[1]
    whole = neighbourhood_attention(*qkv(grid), grid, pattern)
    monkeypatch.setattr(neighbourhood, "GATHERED", 0.3)
    assert torch.equal(neighbourhood_attention(*qkv(grid), grid, pattern), whole)


@pytest.mark.parametrize("backend", ["gather", "flex"])
def test_compiled_without_a_break(backend: str) -> None:
    grid, pattern = CASES[0]
    torch._dynamo.reset()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return neighbourhood_attention(q + 0, k, v, grid, pattern, backend)

    q, k, v = qkv(grid)
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(q, k, v), neighbourhood_attention(q, k, v, grid, pattern, "masked"), atol=2e-6)


def test_one_frame_and_whole_windows_get_full_attention() -> None:
    q, k, v = qkv((1, 6, 6))
    assert torch.equal(neighbourhood_attention(q, k, v, (1, 6, 6), Pattern((FULL, 3, 3))), attention(q, k, v))
    assert torch.equal(neighbourhood_attention(q, k, v, (4, 3, 3), Pattern((FULL, 5, 5))), attention(q, k, v))


def test_published_schedules_leave_out_what_their_authors_say() -> None:
    said = {  # config_natten.py: of the 2B's and 14B's layers, by sparsity in percent
        "2b": {98: [0, 1], 95: [2, 5, 10], 92: [3, 4, 6, 7, 8, 9, 27], 77: [*range(11, 23), 24, 25, 26], 55: [23]},
        "14b": {
            98: [*range(11)], 95: [11, 12], 92: [*range(13, 23)], 77: [23, 25, 29, 30, 33, 35],
            55: [24, 26, 28, 31, 32, 34],
        },
    }  # fmt: skip
    for name, layers in said.items():
        found: dict[int, list[int]] = {}
        for index, pattern in enumerate(PUBLISHED[name]):
            if pattern is not None:
                found.setdefault(round(100 * (1 - pattern.fitted(PAGE).share)), []).append(index)
        assert found == layers
    assert [len(PUBLISHED[name]) for name in ("2b", "14b")] == [28, 36]
    assert [index for index, one in enumerate(PUBLISHED["14b"]) if one is None] == [27]


@pytest.mark.parametrize(
    "name, width, depth, frames, speedup",
    [("2b", 2048, 28, 24, 2.5), ("2b", 2048, 28, 16, 2.1), ("14b", 5120, 36, 24, 2.0), ("14b", 5120, 36, 16, 1.7)],
)
def test_the_arithmetic_left_allows_the_published_speedup(
    name: str, width: int, depth: int, frames: int, speedup: float
) -> None:
    """Of Video2World on an H200 SXM (cosmos-predict2's performance.md). What arithmetic alone would give must exceed
    it, and not by a factor: what is not matrix products takes time too."""
    grid = (frames, 44, 80)
    tokens, text = frames * 44 * 80, 512
    rest = tokens * width * width * (4 + 2 + 8) * 2 + 4 * tokens * text * width  # projections, MLP, cross-attention
    full = 4 * tokens**2 * width
    bound = (full + rest) / (full * attention_share(PUBLISHED[name], grid) + rest)
    assert speedup < bound < 1.5 * speedup


def test_gathering_wastes_no_arithmetic_on_the_published_grid() -> None:
    for pattern in {*PUBLISHED["2b"], *PUBLISHED["14b"]} - {None}:
        assert pattern is not None
        fitted = pattern.fitted(PAGE)
        queries, keys, steps, _ = neighbourhood._plan(tuple(fitted), torch.device("cpu"))
        products = len(queries) * sum((b - a) * (d - c) for a, b, c, d in steps)
        assert products == fitted.share * (24 * 44 * 80) ** 2
        assert keys.numel() <= 7 * 24 * 44 * 80 and len(steps) <= 11


@pytest.mark.parametrize("fitted", [
    Fitted((4, 24, 48), (4, 12, 24), (1, 4, 8), (1, 1, 1)),
    Fitted((4, 20, 40), (4, 12, 8), (1, 4, 1), (1, 1, 5)),
    Fitted((4, 12, 24), (4, 4, 8), (1, 1, 1), (1, 3, 3)),
])  # fmt: skip
def test_tiles_are_seen_whole_or_not_at_all(fitted: Fitted) -> None:
    """The published patterns, on smaller grids: FlexAttention computes nothing that it then throws away."""
    layout, (partial, _, whole, _) = neighbourhood_flex._made(fitted, torch.device("cpu"))
    blocks = -(-len(layout[0]) // 128)
    assert int(partial.sum()) == 0
    assert float(whole.sum()) == pytest.approx(fitted.share * blocks**2)


@pytest.mark.parametrize("grid, pattern", [CASES[1], CASES[3], ((4, 12, 24), Pattern((FULL, 5, 12), (1, 3, 4)))])
def test_blocks_are_told_apart(grid: Triple, pattern: Pattern) -> None:
    """Which blocks FlexAttention skips, which it masks and which it does not: what its uncompiled form ignores."""
    fitted, device = pattern.fitted(grid), torch.device("cpu")
    (order, back, *_), blocks = neighbourhood_flex._made(fitted, device)
    assert torch.equal(order[back], torch.arange(len(order)))
    mask = neighbourhood_mask(fitted)[order][:, order]
    count = -(-len(order) // 128)
    partial, whole = (
        torch.stack([torch.zeros(count).index_fill(0, row[:n].long(), 1) for n, row in zip(number[0, 0], which[0, 0])])
        for number, which in (blocks[:2], blocks[2:])
    )
    for i, j in itertools.product(range(count), repeat=2):
        block = mask[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        seen_whole = block.shape == (128, 128) and bool(block.all())
        assert whole[i, j] == seen_whole and partial[i, j] == (bool(block.any()) and not seen_whole)
    assert partial.any()


def test_patterns_share_a_compiled_kernel() -> None:
    """Else torch would soon have compiled as often as it allows, and go on uncompiled."""
    from torch.nn.attention.flex_attention import flex_attention

    graphs = []
    torch._dynamo.reset()
    kernel = torch.compile(
        flex_attention, backend=lambda graph, _: graphs.append(graph) or graph.forward, dynamic=False, fullgraph=True
    )
    grid = (2, 11, 20)
    q, k, v = (x.transpose(1, 2) for x in qkv(grid))
    answers = []
    for index in (0, 2, 3, 11, 23):
        pattern = PUBLISHED["2b"][index]
        assert pattern is not None
        mask = neighbourhood_flex._block_mask(pattern.fitted(grid), torch.device("cpu"))
        answers.append(kernel(q, k, v, block_mask=mask))
    assert len(graphs) == 1
    assert all((a - b).abs().max() > 0.1 for a, b in itertools.combinations(answers, 2))


def test_memory_can_be_planned() -> None:
    x = torch.empty(1, 24 * 44 * 80, 16, 128, dtype=torch.bfloat16, device="meta")
    pattern = PUBLISHED["2b"][3]
    assert pattern is not None
    bytes_each = x.numel() * 2
    peak = peak_bytes(lambda: neighbourhood_attention(x, x, x, PAGE, pattern, "natten"))
    # Keys and values three times each, the queries and the answers; the numbers of the tokens are small change.
    assert 8 * bytes_each <= peak <= 8.1 * bytes_each


BASE = (FULL, 44, 80)


@pytest.mark.parametrize(
    "pattern, grid, expected",
    [
        (Pattern((FULL, 12, 24), (1, 4, 8), base=BASE), (24, 22, 40), ((24, 6, 12), (1, 2, 4), (1, 1, 1))),
        (Pattern((FULL, 4, 16), dilation=(1, 11, 5), base=BASE), (5, 30, 52), ((5, 3, 10), (1, 1, 1), (1, 7, 3))),
        (Pattern((FULL, 12, 24), (1, 4, 8), base=BASE), (5, 4, 4), ((5, 2, 2), (1, 1, 1), (1, 1, 1))),
        (Pattern((3, 9, 9), (2, 3, 9), (4, 1, 2)), (7, 8, 20), ((3, 8, 9), (2, 3, 9), (2, 1, 2))),
    ],
)
def test_a_pattern_scales_with_the_grid(pattern: Pattern, grid: Triple, expected: tuple[Triple, ...]) -> None:
    assert pattern.fitted(grid)[1:] == expected


def test_patterns_are_json() -> None:
    for pattern in PUBLISHED["2b"]:
        assert pattern is not None and Pattern(**json.loads(json.dumps(dataclasses.asdict(pattern)))) == pattern


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(window=(1, 3, 3)), r"window must be three integers \(t, h, w\) of at least 2, or -1, got \(1, 3, 3\)"),
        (dict(window=(FULL, 3)), "window must be three"),
        (dict(window=(FULL, 3, 3), stride=(1, 0, 1)), "stride must be three integers .* of at least 1, got"),
        (dict(window=(FULL, 3, 3), dilation=(1, 1, FULL)), "dilation must be three integers .* of at least 1, got"),
        (dict(window=(FULL, 3, 3), base=(FULL, 0, 4)), "base must be three"),
        (dict(window=(FULL, 3, 3), stride=(9, 4, 1)), r"stride must be at most the window, got \(9, 4, 1\) for"),
    ],
)
def test_impossible_patterns_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(**fields)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = qkv((2, 4, 4))
    pattern = Pattern((FULL, 3, 3))
    with pytest.raises(ValueError, match=r"\[B, 36, heads, dim\] on grid \(2, 3, 6\), got \[2, 32, 2, 16\]"):
        neighbourhood_attention(q, k, v, (2, 3, 6), pattern)
    with pytest.raises(ValueError, match=r"must be alike"):
        neighbourhood_attention(q, k[:1], v, (2, 4, 4), pattern)
    with pytest.raises(ValueError, match="backend is 'dense'; allowed are gather, flex, natten, masked"):
        neighbourhood_attention(q, k, v, (2, 4, 4), pattern, "dense")
    with pytest.raises(ValueError, match='"natten" is not available: it needs a CUDA GPU, the tensors are on cpu'):
        neighbourhood_attention(q, k, v, (2, 4, 4), pattern, "natten")
    large = torch.empty(1, 1, 1, 1).expand(1, 8 * 40 * 40, 1, 1)
    for backend in ("masked", "flex"):
        with pytest.raises(ValueError, match=f'"{backend}" takes at most 8192 tokens.* got 12800'):
            neighbourhood_attention(large, large, large, (8, 40, 40), pattern, backend)
    with pytest.raises(ValueError, match="grid must be three positive numbers"):
        pattern.fitted((0, 4, 4))


def test_on_a_cpu_windows_are_gathered_without_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_backend((1, 84480, 16, 128), PAGE, Pattern((FULL, 12, 24)), torch.bfloat16, "cpu") == "gather"
    assert not capsys.readouterr().err


def test_importing_it_does_not_import_the_compiler() -> None:
    import subprocess

    code = "import sys, orrery.nn.neighbourhood; print('torch._dynamo' in sys.modules)"
    root = Path(neighbourhood.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"
