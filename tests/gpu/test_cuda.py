"""What must hold on a GPU: `pytest -m gpu`. Skipped where torch sees none."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from orrery.flow import numpy_noise
from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig
from orrery.nn.dit import PRESETS, Conditions, DiT
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE
from orrery.train.muon import orthogonalise
from orrery.world import load

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def randomised(net: DiT) -> DiT:
    with torch.no_grad():
        for layer in net.zero_initialised():
            torch.nn.init.normal_(layer.weight, std=0.02)
    return net.eval()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_transformer_agrees_with_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    net = randomised(DiT(PRESETS["mini"]))
    x, text, t = (
        torch.randn(2, 16, 5, 8, 8),
        torch.randn(2, 40, 256),
        torch.tensor([[0.0, 0.0, 700.0, 700.0, 700.0]] * 2),
    )
    expected = net(x, t, Conditions(text))
    moved = net.to("cuda", dtype)
    found = moved(x.cuda(), t.cuda(), Conditions(text.to("cuda", dtype)))
    assert found.dtype == torch.float32
    assert (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


@torch.no_grad()
def test_vae_agrees_with_the_cpu_streamed_and_whole() -> None:
    torch.manual_seed(0)
    vae = VAE(VAES["mini"]).eval()
    frames = torch.rand(1, 3, 17, 64, 64) * 2 - 1
    latents = vae.encode(frames)
    decoded = vae.decode(latents)
    with torch.backends.cudnn.flags(allow_tf32=False):
        moved = vae.cuda()
        assert (moved.encode(frames.cuda(), chunk=4).cpu() - latents).abs().max() < 1e-3
        assert (moved.decode(latents.cuda(), chunk=1).cpu() - decoded).abs().max() < 1e-3


def test_noise_does_not_depend_on_the_device() -> None:
    assert torch.equal(numpy_noise(3, (1, 16, 5, 8, 8)).cuda().cpu(), numpy_noise(3, (1, 16, 5, 8, 8)))


def test_a_training_step_under_bf16_autocast_keeps_fp32_weights() -> None:
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(PRESETS["mini"], depth=2)).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        v = net(
            torch.randn(4, 16, 5, 8, 8).cuda(),
            torch.full((4,), 500.0).cuda(),
            Conditions(torch.randn(4, 40, 256).cuda()),
        )
        loss = (v - 1).square().mean()
    loss.backward()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads)


def test_muon_in_bf16_levels_singular_values() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 64, 256).cuda(), bf16=True))
    assert 0.5 < values.min() and values.max() < 1.4


def test_the_same_seed_is_the_same_video(tiny_folder: Path) -> None:
    world = load(tiny_folder, device="cuda")
    a, b = (world.generate("a red ball falls", seed=3).frames for _ in range(2))
    assert (a == b).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@torch.no_grad()
def test_control_branches_agree_with_the_cpu(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    net = randomised(DiT(PRESETS["mini"]))
    branches = [ControlBranch(net.config, ControlConfig(2, 3, 16)).initialise(net).eval() for _ in range(2)]
    for branch in branches:
        for layer in branch.zero_initialised():
            layer.weight.normal_(std=0.1)
    x, text, signal = torch.randn(1, 16, 5, 8, 8), torch.randn(1, 40, 256), torch.randn(1, 16, 5, 8, 8)
    weights = (0.4, torch.rand(1, 5, 4, 4))
    t = torch.full((1,), 700.0)
    controls = [ActiveControl(branch, signal, weight) for branch, weight in zip(branches, weights, strict=True)]
    expected = net(x, t, Conditions(text, controls=controls))
    assert (expected - net(x, t, Conditions(text))).abs().max() > 0.01
    moved = [branch.to("cuda", dtype) for branch in branches]
    on_gpu = [w.cuda() if isinstance(w, torch.Tensor) else w for w in weights]
    controls = [ActiveControl(b, signal.cuda(), w) for b, w in zip(moved, on_gpu, strict=True)]
    found = net.to("cuda", dtype)(x.cuda(), t.cuda(), Conditions(text.to("cuda", dtype), controls=controls))
    assert (found.cpu() - expected).abs().max() <= tolerance * expected.abs().max()


def test_transfer_on_the_gpu_is_the_one_on_the_cpu() -> None:
    """The embedded model: the same noise on both, float32; pixels may differ by rounding that steps amplify."""
    from orrery.video import Video

    frames = np.random.default_rng(0).integers(0, 256, (17, 8, 8, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
    prompt = "a red ball falls and bounces, realistic look"
    results = [
        load("mini", device, torch.float32).transfer(prompt, Video(frames, 12), ["edge"], seed=1, steps=4).video.frames
        for device in ("cpu", "cuda")
    ]
    assert np.abs(results[0].astype(int) - results[1]).mean() < 1
