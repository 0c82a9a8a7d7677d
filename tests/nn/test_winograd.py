"""Winograd's convolution against direct ones in double precision: borders, time, blocks, and when it is used."""

import math

import pytest
import torch
import torch.nn.functional as F

from orrery.nn import winograd

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def case(frames: int, size: tuple[int, int], batch: int = 1, taps: int = 3, channels: tuple[int, int] = (20, 24)):
    """Activations as after SiLU [T, B, H, W, I], past frames, weight and bias; outputs have a deviation of about 1."""
    torch.manual_seed(0)
    inputs, outputs = channels
    x = F.silu(torch.randn(frames, batch, *size, inputs))
    past = F.silu(torch.randn(taps - 1, batch, *size, inputs))
    weight = torch.randn(outputs, inputs, taps, 3, 3) / math.sqrt(4 * inputs * taps)
    return x, past, weight, torch.randn(outputs)


def direct(x, past, weight, bias):
    """The same by conv3d in double precision."""
    taps = weight.shape[2]
    before = x.new_zeros(taps - 1, *x.shape[1:]) if past is None else past
    volume = torch.cat([before, x]).permute(1, 4, 0, 2, 3).double()
    return F.conv3d(volume, weight.double(), bias.double(), padding=(0, 1, 1)).permute(2, 0, 3, 4, 1)


def assert_near(actual, expected):
    """Within what rounding explains: outputs of deviation 1, measured up to 7e-6."""
    assert actual.shape == expected.shape and actual.is_contiguous()
    assert (actual - expected).abs().amax() < 2e-5
    assert (actual - expected).square().mean().sqrt() < 2e-6


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (7, 9), (1, 5), (13, 6)])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("given", [False, True])
def test_causal_convolution(size, frames, given):
    x, past, weight, bias = case(frames, size)
    past = past if given else None
    assert_near(winograd.convolve(x, weight, bias, past), direct(x, past, weight, bias))


@pytest.mark.parametrize("taps", [1, 2, 3])
def test_batches_and_kernels(taps):
    x, past, weight, bias = case(3, (8, 10), batch=2, taps=taps)
    assert_near(winograd.convolve(x, weight, bias, past), direct(x, past, weight, bias))
    assert_near(winograd.convolve(x, weight, bias), direct(x, None, weight, bias))


@pytest.mark.parametrize("block", [1, 2**14, 2**16])
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_blocks_do_not_show(block, frames, monkeypatch):
    x, past, weight, bias = case(5, (18, 23), batch=2)
    monkeypatch.setattr(winograd, "BLOCK", block)
    monkeypatch.setattr(winograd, "FRAMES", frames)
    for before in (None, past):
        assert_near(winograd.convolve(x, weight, bias, before), direct(x, before, weight, bias))


def test_any_layout_of_the_input():
    x, past, weight, bias = case(2, (8, 8))
    moved = x.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)
    assert not moved.is_contiguous()
    assert torch.equal(winograd.convolve(moved, weight, bias, past), winograd.convolve(x, weight, bias, past))


def test_the_input_is_left_alone():
    x, past, weight, bias = case(2, (8, 8))
    copies = [t.clone() for t in (x, past, weight, bias)]
    winograd.convolve(x, weight, bias, past)
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, past, weight, bias), strict=True))


def test_the_points_are_better_than_the_usual_ones(monkeypatch):
    x, past, weight, bias = case(2, (32, 32), channels=(64, 64))
    expected = direct(x, past, weight, bias)
    ours = (winograd.convolve(x, weight, bias, past) - expected).square().mean().sqrt()
    monkeypatch.setattr(winograd, "POINTS", (0.0, 1.0, -1.0, 2.0, -2.0))
    for name, matrix in zip(("_B", "_G", "_A"), winograd._matrices(), strict=True):
        monkeypatch.setattr(winograd, name, matrix)
    usual = winograd.convolve(x, weight, bias, past)
    assert (usual - expected).abs().amax() < 2e-4  # the derivation holds for any points
    assert (usual - expected).square().mean().sqrt() > 1.5 * ours


@pytest.mark.parametrize(("length", "most"), [(1, 8), (9, 8), (16, 8), (17, 3), (5, 0)])
def test_parts(length, most):
    parts = winograd._parts(length, most)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(length))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) == sizes[0] <= max(most, 1) and max(sizes) - min(sizes) <= 1


def test_when_it_is_worthwhile():
    x, weight = torch.zeros(2, 1, 32, 32, 96), torch.zeros(96, 96, 3, 3, 3)
    assert winograd.worthwhile(x, weight)
    with winograd.disabled():
        assert not winograd.worthwhile(x, weight) and not winograd.possible(x, weight)
    assert winograd.worthwhile(x, weight)
    refused = {
        "temporal kernel": (x, weight[..., :1, :1]),
        "few pixels": (x[:1], weight),
        "few inputs": (x[..., :95], weight[:, :95]),
        "few outputs": (x, weight[:95]),
        "narrow for one frame": (x, weight[:, :, :1]),
        "wasteful": (torch.zeros(100, 1, 5, 5, 96), weight),
        "half precision": (x.bfloat16(), weight.bfloat16()),
        "double precision": (x.double(), weight.double()),
        "meta": (x.to("meta"), weight.to("meta")),
    }
    assert winograd.worthwhile(torch.zeros(2, 1, 32, 32, 160), torch.zeros(160, 160, 1, 3, 3))
    assert [name for name, given in refused.items() if winograd.worthwhile(*given)] == []
    with torch.autocast("cpu"):
        assert not winograd.worthwhile(x, weight)
    with torch.enable_grad():
        assert winograd.worthwhile(x, weight)
        assert not winograd.worthwhile(x, weight.clone().requires_grad_())
        assert not winograd.worthwhile(x.clone().requires_grad_(), weight)
