"""Attention kernels and neighbourhood attention on a GPU: every one that is there against the definition."""

import math

import pytest
import torch
from torch import Tensor

from orrery.nn import kernels
from orrery.nn.kernels import KERNELS, attention, choose, kernel_error, random_qkv, relative_error, using
from orrery.nn.neighbourhood import backend_problem, choose_backend, neighbourhood_attention
from orrery.nn.neighbourhood_pattern import PUBLISHED, Pattern, Triple

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda")
GRID: Triple = (4, 22, 40)


def qkv(queries: int, keys: int, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return random_qkv((batch, queries, 4, 128), (batch, keys, 4, 128), dtype, CUDA)


def available(dtype: torch.dtype, name: str) -> None:
    if reason := KERNELS[name].unavailable(dtype, CUDA):
        pytest.skip(reason)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("keys", [1500, 77])
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.exact])
@torch.no_grad()
def test_exact_kernels_differ_by_rounding(name: str, keys: int, dtype: torch.dtype) -> None:
    available(dtype, name)
    q, k, v = qkv(1500, keys, dtype)
    expected = kernels._sdpa(q.cpu().float(), k.cpu().float(), v.cpu().float()).cuda()
    with using(name, dtype, CUDA):
        assert relative_error(attention(q, k, v), expected) < kernels.TOLERANCE[dtype]
        shared = attention(q, k[:1], v[:1])
    repeated = kernels._sdpa(q.float(), k[:1].repeat(2, 1, 1, 1).float(), v[:1].repeat(2, 1, 1, 1).float())
    assert relative_error(shared, repeated) < kernels.TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.exact])
def test_exact_kernels_have_the_gradients(name: str) -> None:
    available(torch.bfloat16, name)
    gradients = []
    for one in ("sdpa", name):
        inputs = [x.requires_grad_() for x in qkv(300, 300, torch.bfloat16)]
        with using(one, torch.bfloat16, CUDA):
            out = attention(*inputs)
        gradients.append(torch.autograd.grad(out.float().square().sum(), inputs))
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 0.03


@pytest.mark.parametrize("name", list(KERNELS))
@torch.no_grad()
def test_compiled_without_a_break(name: str) -> None:
    available(torch.bfloat16, name)
    q, k, v = qkv(512, 512, torch.bfloat16)
    torch._dynamo.reset()
    with using(name, torch.bfloat16, CUDA):
        compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, fullgraph=True)(q, k, v)
        assert relative_error(compiled, attention(q, k, v) * 2) < 1e-2


def test_quantised_attention_is_near() -> None:
    available(torch.bfloat16, "sage-attention")
    assert 1e-3 < kernel_error("sage-attention", *qkv(4096, 4096, torch.bfloat16)) < 0.08


def test_choosing_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    kernels._choices.clear()
    shape = (1, 4096, 16, 128)
    name = choose(shape, shape, torch.bfloat16, CUDA)
    said = capsys.readouterr().err
    assert KERNELS[name].exact and f": {name}, as measured: " in said and "sdpa " in said and said.count("\n") == 1
    assert choose(shape, shape, torch.bfloat16, CUDA) == name and not capsys.readouterr().err


@pytest.mark.parametrize("backend", ["gather", "flex", "natten"])
@pytest.mark.parametrize("layer", [0, 2, 3, 11, 23])
@torch.no_grad()
def test_backends_are_the_definition(layer: int, backend: str) -> None:
    if reason := backend_problem(backend, torch.bfloat16, CUDA):
        pytest.skip(reason)
    pattern = PUBLISHED["2b"][layer]
    assert pattern is not None
    q, k, v = qkv(math.prod(GRID), math.prod(GRID), torch.bfloat16)
    expected = neighbourhood_attention(q.float(), k.float(), v.float(), GRID, pattern, "masked")
    for _ in range(2):  # the second time from what the first kept
        found = neighbourhood_attention(q, k, v, GRID, pattern, backend)
        assert relative_error(found, expected) < 1e-2


@pytest.mark.parametrize("backend", ["gather", "flex"])
@torch.no_grad()
def test_backends_compile_without_a_break(backend: str) -> None:
    pattern = Pattern((-1, 6, 12), (1, 2, 4))
    q, k, v = qkv(math.prod(GRID), math.prod(GRID), torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: neighbourhood_attention(q + 0, k, v, GRID, pattern, backend), fullgraph=True
    )
    expected = neighbourhood_attention(q.float(), k.float(), v.float(), GRID, pattern, "masked")
    assert relative_error(compiled(q, k, v), expected) < 1e-2


@torch.no_grad()
def test_windows_save_time(capsys: pytest.CaptureFixture[str]) -> None:
    """A twelfth of the arithmetic at the size of a published clip: less than half the time, by any backend."""
    grid, pattern = (24, 44, 80), PUBLISHED["2b"][3]
    assert pattern is not None
    shape = (1, math.prod(grid), 4, 128)
    q, k, v = random_qkv(shape, shape, torch.bfloat16, CUDA)
    backend = choose_backend(shape, grid, pattern, torch.bfloat16, CUDA)
    assert f": {backend}, as measured: " in capsys.readouterr().err
    windows = lambda name: min(  # noqa: E731
        kernels._milliseconds(lambda: neighbourhood_attention(q, k, v, grid, pattern, name), CUDA) for _ in range(4)
    )
    full = min(kernels._milliseconds(lambda: attention(q, k, v), CUDA) for _ in range(4))
    assert windows("gather") < full / 2 and windows(backend) < full / 2
