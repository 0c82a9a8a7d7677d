"""The causal video VAE: shapes, causality, streaming, statistics, refusals, and that every parameter is trained."""

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from orrery.nn import vae_blocks, winograd
from orrery.nn.vae import PRESETS, VAE, VAEConfig
from orrery.nn.vae_blocks import CausalConv3d, ChannelNorm, convolve_doubled

SMALL = {
    "wan2.1": VAEConfig(base=8, latent_channels=4, latent_mean=(0.5, 0.0, -1.0, 2.0), latent_std=(1.0, 2.0, 0.5, 3.0)),
    "wan2.2": VAEConfig(base=8, decoder_base=16, latent_channels=6, patch=2, shortcuts=True),
    "mini": dataclasses.replace(PRESETS["mini"], base=24, latent_channels=4),
    "factorised": VAEConfig(
        base=8, latent_channels=4, factorised=True, temporal_patch=2, temporal_down=(True, False, False)
    ),
}
every_config = pytest.mark.parametrize("name", SMALL)


def build(name: str, dtype: torch.dtype = torch.float32) -> VAE:
    """A small VAE with all parameters random, also those that start at zero or one."""
    torch.manual_seed(0)
    vae = VAE(SMALL[name])
    for parameter in vae.parameters():
        std = 0.2 if parameter[0].numel() == 1 else parameter[0].numel() ** -0.5
        parameter.data += torch.randn_like(parameter) * std
    return vae.eval().to(dtype)


def clip(vae: VAE, count: int = 13, batch: int = 1) -> torch.Tensor:
    size = 2 * vae.spatial_factor
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(batch, 3, count, size, size + vae.spatial_factor, generator=generator) * 2 - 1
    return frames.to(next(vae.parameters()).dtype)


@every_config
@torch.no_grad()
def test_shapes(name):
    vae = build(name)
    frames = clip(vae)
    latents = vae.encode(frames)
    expected = (1, vae.config.latent_channels, 1 + 12 // vae.temporal_factor, 2, 3)
    assert latents.shape == expected
    assert vae.decode(latents).shape == frames.shape
    assert vae.decode(vae.encode(frames[:, :, :1])).shape == frames[:, :, :1].shape


@pytest.mark.parametrize(
    ("preset", "parameters", "tensors"),
    [("wan2.1", 126_892_531, 194), ("wan2.2", 704_688_668, 196), ("mini", 2_809_456, 82)],
)
def test_presets(preset, parameters, tensors):
    with torch.device("meta"):
        vae = VAE(PRESETS[preset])
    assert sum(p.numel() for p in vae.parameters()) == parameters
    assert len(vae.state_dict()) == tensors
    assert vae.temporal_factor == 4
    assert vae.spatial_factor == {"wan2.1": 8, "wan2.2": 16, "mini": 8}[preset]


def test_published_names():
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in VAE(PRESETS["wan2.1"]).state_dict().items()}
    assert shapes["conv1.weight"] == (32, 32, 1, 1, 1)
    assert shapes["encoder.downsamples.3.shortcut.weight"] == (192, 96, 1, 1, 1)
    assert shapes["encoder.downsamples.5.time_conv.weight"] == (192, 192, 3, 1, 1)
    assert shapes["encoder.downsamples.2.resample.1.weight"] == (96, 96, 3, 3)
    assert shapes["encoder.middle.1.norm.gamma"] == (384, 1, 1)
    assert shapes["decoder.upsamples.3.time_conv.weight"] == (768, 384, 3, 1, 1)
    assert shapes["decoder.upsamples.12.residual.6.weight"] == (96, 96, 3, 3, 3)
    assert shapes["decoder.head.0.gamma"] == (96, 1, 1, 1)
    assert "decoder.upsamples.11.time_conv.weight" not in shapes


@every_config
@pytest.mark.parametrize("first_changed", [1, 5])
@torch.no_grad()
def test_latents_do_not_depend_on_later_frames(name, first_changed):
    vae = build(name)
    frames = clip(vae)
    changed = frames.clone()
    changed[:, :, first_changed:] = -changed[:, :, first_changed:]
    kept = 1 + (first_changed - 1) // vae.temporal_factor
    before, after = vae.encode(frames), vae.encode(changed)
    assert torch.equal(before[:, :, :kept], after[:, :, :kept])
    assert (before[:, :, kept:] - after[:, :, kept:]).abs().amax() > 1e-2
    latents = before.clone()
    latents[:, :, 2:] += 1
    seen = 1 + vae.temporal_factor
    assert torch.equal(vae.decode(before)[:, :, :seen], vae.decode(latents)[:, :, :seen])


@every_config
@torch.no_grad()
def test_past_is_used(name):
    vae = build(name)
    frames = clip(vae)
    changed = frames.clone()
    changed[:, :, 0] = -changed[:, :, 0]
    assert (vae.encode(frames)[:, :, 1] - vae.encode(changed)[:, :, 1]).abs().amax() > 1e-3


@every_config
@torch.no_grad()
def test_streaming_equals_whole_clip(name):
    vae = build(name)
    frames = clip(vae)
    latents = vae.encode(frames)
    for chunk in (4, 8, 12):
        torch.testing.assert_close(vae.encode(frames, chunk), latents, atol=1e-5, rtol=0)
    whole = vae.decode(latents)
    scale = max(1.0, whole.abs().amax().item())
    for chunk in (1, 2, 3):
        torch.testing.assert_close(vae.decode(latents, chunk) / scale, whole / scale, atol=1e-5, rtol=0)


@every_config
@torch.no_grad()
def test_chunks_of_unequal_length(name):
    vae = build(name)
    frames = clip(vae)
    latents = torch.cat(list(vae.encode_stream(frames.split([5, 8], dim=2))), dim=2)
    torch.testing.assert_close(latents, vae.encode(frames), atol=1e-5, rtol=0)


@torch.no_grad()
def test_decode_stream_yields_frames_as_they_come():
    vae = build("mini")
    latents = vae.encode(clip(vae))
    assert [piece.shape[2] for piece in vae.decode_stream(latents, 2)] == [5, 8]


@torch.no_grad()
def test_two_streams_do_not_meet():
    vae = build("wan2.1")
    first, second = clip(vae), -clip(vae)
    alone = [list(vae.encode_stream(c.split([1, 8, 4], dim=2))) for c in (first, second)]
    streams = [vae.encode_stream(c.split([1, 8, 4], dim=2)) for c in (first, second)]
    for i, pieces in enumerate(zip(*streams, strict=True)):
        assert torch.equal(pieces[0], alone[0][i]) and torch.equal(pieces[1], alone[1][i])


@every_config
@pytest.mark.parametrize("given", [1, 5, 9])
@torch.no_grad()
def test_only_conditioning_frames_need_encoding(name, given):
    vae = build(name)
    frames = clip(vae)
    kept = 1 + (given - 1) // vae.temporal_factor
    latents = vae.encode(frames)
    scale = latents.abs().amax()  # for another length a convolution may add in another order; measured: 5e-7
    alone = vae.encode(frames[:, :, :given])
    torch.testing.assert_close(alone / scale, latents[:, :, :kept] / scale, atol=2e-6, rtol=0)


@torch.no_grad()
def test_statistics_normalise():
    vae = build("wan2.1")
    frames = clip(vae)
    mean, _ = vae.moments(frames)
    latents = vae.encode(frames)
    torch.testing.assert_close(latents[:, 3], (mean[:, 3] - 2.0) / 3.0)
    torch.testing.assert_close(vae.decode(latents), vae.decode_raw(mean), atol=1e-4, rtol=0)
    assert vae.with_statistics([0] * 4, [1] * 4) is vae
    torch.testing.assert_close(vae.encode(frames), mean)
    with pytest.raises(ValueError, match="latent_std"):
        vae.with_statistics([0] * 4, [1, 1, 0, 1])


@every_config
def test_config_survives_json(name):
    config = SMALL[name]
    assert VAEConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    "wrong", [{"temporal_down": (True,)}, {"latent_mean": (0.0,) * 3}, {"latent_std": (-1.0,) * 16}]
)
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        VAEConfig(**wrong)


@pytest.mark.parametrize(
    ("shape", "number"),
    [
        ((1, 3, 4, 16, 16), "4 frames"),
        ((1, 3, 6, 16, 16), "6 frames"),
        ((1, 3, 0, 16, 16), "0 frames"),
        ((1, 3, 5, 20, 16), "height 20"),
        ((1, 3, 5, 16, 12), "width 12"),
        ((1, 4, 5, 16, 16), r"\[1, 4, 5, 16, 16\]"),
        ((3, 5, 16, 16), r"\[3, 5, 16, 16\]"),
    ],
)
def test_refused_frames(shape, number):
    vae = build("mini")
    for encode in (vae.encode, vae.moments):
        with pytest.raises(ValueError, match=number):
            encode(torch.zeros(shape))


def test_other_refusals():
    vae = build("mini")
    with pytest.raises(ValueError, match="chunk is 6"):
        vae.encode(torch.zeros(1, 3, 9, 16, 16), chunk=6)
    with pytest.raises(ValueError, match="5 frames in a later chunk"):
        list(vae.encode_stream([torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 3, 5, 16, 16)]))
    with pytest.raises(ValueError, match=r"\[1, 5, 1, 2, 2\]"):
        vae.decode(torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(ValueError, match="chunk is 0"):
        list(vae.decode_stream(torch.zeros(1, 4, 1, 2, 2), 0))


@every_config
def test_every_parameter_is_trained_from_scratch(name):
    torch.manual_seed(0)
    vae = VAE(SMALL[name])
    frames = clip(vae, 9)
    mean, logvar = vae.moments(frames)
    restored = vae.decode_raw(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
    assert 0.1 < mean.std() < 3 and 0.1 < restored.std() < 3
    (restored - frames).abs().mean().backward()
    # The attention's output projection starts at zero: what feeds it learns from the second step on.
    dead = {n for n, p in vae.named_parameters() if not p.grad.abs().sum() > 0 and ".middle.1." not in n}
    assert not dead


def test_a_few_steps_lower_the_loss():
    torch.manual_seed(0)
    vae = VAE(SMALL["mini"])
    frames = clip(vae, 5)
    optimiser = torch.optim.Adam(vae.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = (vae.decode_raw(vae.moments(frames)[0]) - frames).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kernel", [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1)])
def test_convolution_equals_padded_conv3d(kernel):
    torch.manual_seed(0)
    conv = CausalConv3d(5, 7, kernel)
    torch.nn.init.normal_(conv.bias)
    x = torch.randn(4, 2, 6, 5, 5)
    t, h, w = (k - 1 for k in kernel)
    padded = F.pad(x.permute(1, 4, 0, 2, 3), (w // 2, w // 2, h // 2, h // 2, t, 0))
    expected = F.conv3d(padded, conv.weight, conv.bias).permute(2, 0, 3, 4, 1)
    torch.testing.assert_close(conv(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv(x[:1]), expected[:1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("frames", "batch", "size"), [(1, 1, (1, 1)), (2, 2, (3, 5)), (3, 1, (4, 2))])
@torch.no_grad()
def test_convolution_of_doubled_pixels(frames, batch, size):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(frames, batch, *size, 5), torch.randn(7, 5, 3, 3) / 7, torch.randn(7)
    big = x.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(0, 1).permute(0, 3, 1, 2)
    for given in (bias, None):
        expected = F.conv2d(big.double(), weight.double(), None if given is None else given.double(), padding=1)
        actual = convolve_doubled(x, weight, given)
        assert actual.is_contiguous() and actual.shape == (frames, batch, 2 * size[0], 2 * size[1], 7)
        assert (actual.flatten(0, 1).permute(0, 3, 1, 2) - expected).abs().amax() < 3e-6


@every_config
@torch.no_grad()
def test_rearranged_convolutions_change_rounding_only(name, monkeypatch):
    # Small widths take the direct path by themselves; here every 3x3 convolution is rearranged.
    monkeypatch.setattr(winograd, "CHANNELS", 1)
    monkeypatch.setattr(winograd, "CHANNELS_OF_AN_IMAGE", 1)
    monkeypatch.setattr(winograd, "PIXELS", 1)
    monkeypatch.setattr(winograd, "WASTE", 100.0)
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append(len(given[0])) or convolve(*given))
    vae = build(name)
    frames = clip(vae, 9, batch=2)
    with winograd.disabled():
        latents = vae.encode(frames)
        decoded = vae.decode(latents)
    assert not calls
    scale = max(1.0, decoded.abs().amax().item())
    for chunk in (None, 4, 8):
        torch.testing.assert_close(vae.encode(frames, chunk), latents, atol=3e-5, rtol=0)
    for chunk in (None, 1, 2):
        torch.testing.assert_close(vae.decode(latents, chunk) / scale, decoded / scale, atol=3e-5, rtol=0)
    assert len(calls) > 20
    expected = vae.moments(frames)[0]  # gradients are off: rearranged as well
    calls.clear()
    with torch.enable_grad():
        torch.testing.assert_close(vae.moments(frames)[0], expected, atol=1e-4, rtol=0)
    assert not calls


@torch.no_grad()
def test_wide_levels_are_rearranged_by_default(monkeypatch):
    torch.manual_seed(0)
    conv = CausalConv3d(96, 96, (3, 3, 3))
    monkeypatch.setattr(winograd, "convolve", lambda *given: "rearranged")
    assert conv(torch.zeros(2, 1, 32, 32, 96)) == "rearranged"
    assert isinstance(conv(torch.zeros(2, 1, 8, 8, 96)), torch.Tensor)


@torch.no_grad()
def test_norm_in_pieces(monkeypatch):
    torch.manual_seed(0)
    norm, x = ChannelNorm(6), torch.randn(2, 1, 5, 7, 6)
    torch.nn.init.normal_(norm.gamma)
    expected = F.silu(norm(x))
    for size in (1, 40, 10**6):
        monkeypatch.setattr(vae_blocks, "PIECE", size)
        torch.testing.assert_close(norm.silu(x), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_norm_agrees_with_plain(dtype):
    torch.manual_seed(0)
    norm = ChannelNorm(12)
    torch.nn.init.normal_(norm.gamma, mean=1, std=0.3)
    values = torch.randn(3, 2, 4, 4, 12).to(dtype)
    upstream = torch.randn_like(values)
    results = []
    for function in (norm.silu, lambda x: F.silu(norm(x))):
        x = values.clone().requires_grad_()
        norm.gamma.grad = None
        out = function(x)
        out.backward(upstream)
        results.append((out, x.grad, norm.gamma.grad))
    with torch.no_grad():
        results.append((norm.silu(values), *results[0][1:]))
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_norm_of_zeros_is_zero_and_has_a_gradient():
    norm = ChannelNorm(4)
    x = torch.zeros(1, 1, 1, 1, 4, requires_grad=True)
    norm.silu(x).sum().backward()
    assert torch.isfinite(x.grad).all() and torch.equal(norm(x), torch.zeros_like(x))


@torch.no_grad()
def test_bfloat16_runs_end_to_end():
    vae = build("wan2.1")
    frames = clip(vae, 5)
    reference = vae.encode(frames)
    low = vae.to(torch.bfloat16).encode(frames.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low.float() - reference).abs().mean() < 0.05 * reference.abs().mean() + 0.05
    assert vae.decode(low, 1).dtype == torch.bfloat16


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
def test_compiled_norms_are_the_plain_ones():
    torch._dynamo.reset()
    vae = build("wan2.1")
    latents = torch.randn(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = vae.decode(latents, chunk=1)
        assert vae.compile_norms() is vae
        compiled = vae.decode(latents, chunk=1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert plain.std() > 0.01 and (compiled - plain).abs().max() < 1e-5
