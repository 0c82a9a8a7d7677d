"""The VAE against diffusers' AutoencoderKLWan: random weights, small widths, Wan 2.1 and Wan 2.2 layouts."""

import pytest
import torch

from orrery.nn import winograd
from orrery.nn.vae import PRESETS, VAE, VAEConfig
from orrery.weights.layouts import diffusers_vae_key

diffusers = pytest.importorskip("diffusers")

WAN21 = VAEConfig(base=8, latent_channels=4)
WAN22 = VAEConfig(base=8, decoder_base=16, latent_channels=6, patch=2, shortcuts=True)
CONFIGS = pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])


def pair(config: VAEConfig) -> tuple[VAE, torch.nn.Module]:
    """Our VAE and theirs with the same random weights; the load is strict on both sides."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(
        base_dim=config.base,
        decoder_base_dim=config.decoder_base,
        z_dim=config.latent_channels,
        is_residual=config.shortcuts,
        in_channels=config.pixel_channels,
        out_channels=config.pixel_channels,
        patch_size=config.patch if config.patch > 1 else None,
        scale_factor_spatial=8 * config.patch,
        latents_mean=[0.0] * config.latent_channels,
        latents_std=[1.0] * config.latent_channels,
    ).eval()
    for name, parameter in theirs.named_parameters():
        spread = 0.3 if parameter.ndim == 1 or "gamma" in name else 0.8 / parameter[0].numel() ** 0.5
        torch.nn.init.normal_(parameter, mean=1.0 if "gamma" in name else 0.0, std=spread)
    weights = theirs.state_dict()
    ours = VAE(config).eval()
    names = {name: diffusers_vae_key(name, config) for name in ours.state_dict()}
    assert sorted(names.values()) == sorted(weights)
    ours.load_state_dict({name: weights[other] for name, other in names.items()})
    return ours, theirs


def frames_for(vae: VAE, count: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    size = 2 * vae.spatial_factor
    return torch.rand(1, 3, count, size, size + vae.spatial_factor, generator=generator) * 2 - 1


@CONFIGS
@torch.no_grad()
def test_encode(config):
    ours, theirs = pair(config)
    frames = frames_for(ours)
    expected = theirs.encode(frames).latent_dist
    mean, logvar = ours.moments(frames)
    assert expected.mean.std() > 0.1
    torch.testing.assert_close(mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(logvar, expected.logvar, atol=1e-4, rtol=0)
    for chunk in (4, 8):
        torch.testing.assert_close(ours.encode(frames, chunk), expected.mean, atol=1e-4, rtol=0)


@CONFIGS
@torch.no_grad()
def test_decode(config):
    ours, theirs = pair(config)
    latents = torch.randn(1, config.latent_channels, 3, 2, 3, generator=torch.Generator().manual_seed(2))
    expected = theirs.decode(latents).sample  # clamped to [-1, 1]; ours is not
    raw = ours.decode_raw(latents)
    assert (raw.abs() < 1).float().mean() > 0.5 and expected.std() > 0.1
    torch.testing.assert_close(raw.clamp(-1, 1), expected, atol=1e-4, rtol=0)
    for chunk in (1, 2):
        torch.testing.assert_close(ours.decode(latents, chunk).clamp(-1, 1), expected, atol=1e-4, rtol=0)


@CONFIGS
@torch.no_grad()
def test_image(config):
    ours, theirs = pair(config)
    image = frames_for(ours, 1)
    latents = theirs.encode(image).latent_dist.mean
    torch.testing.assert_close(ours.encode(image), latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.decode(latents).clamp(-1, 1), theirs.decode(latents).sample, atol=1e-4, rtol=0)


@torch.no_grad()
def test_levels_that_are_rearranged(monkeypatch):
    # Winograd's convolutions, here from a third of their usual width on, err by less than a hundredth of a uint8 step.
    monkeypatch.setattr(winograd, "CHANNELS", 32)
    ours, theirs = pair(VAEConfig(base=32, latent_channels=4))
    calls = []
    convolve = winograd.convolve
    monkeypatch.setattr(winograd, "convolve", lambda *given: calls.append(len(given[0])) or convolve(*given))
    latents = torch.randn(1, 4, 2, 6, 8, generator=torch.Generator().manual_seed(2))
    expected = theirs.decode(latents).sample
    assert expected.std() > 0.1
    for chunk in (None, 1):
        calls.clear()
        assert (ours.decode(latents, chunk).clamp(-1, 1) - expected).abs().amax() < 2e-5
        assert len(calls) > 5
    calls.clear()
    mean = theirs.encode(expected).latent_dist.mean
    assert (ours.encode(expected, 4) - mean).abs().amax() < 2e-5
    assert calls


@pytest.mark.parametrize("preset", ["wan2.1", "wan2.2"])
def test_published_sizes(preset):
    config = PRESETS[preset]
    options = {"dim_mult": [1, 2, 4, 4]}
    if preset == "wan2.2":
        zeros, ones = [0.0] * 48, [1.0] * 48
        options |= {"base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "patch_size": 2}
        options |= {"in_channels": 12, "out_channels": 12, "latents_mean": zeros, "latents_std": ones}
    with torch.device("meta"):
        ours, theirs = VAE(config), diffusers.AutoencoderKLWan(**options)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert {diffusers_vae_key(name, config): tensor.shape for name, tensor in ours.state_dict().items()} == shapes
    if preset == "wan2.1":
        assert config.latent_mean == tuple(theirs.config.latents_mean)
        assert config.latent_std == tuple(theirs.config.latents_std)
