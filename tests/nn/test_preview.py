"""The preview decoder against a plain rewriting of the published one, frame by frame in lists; streaming; refusals."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orrery.nn.preview import PRESETS, Preview, PreviewConfig
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE
from orrery.nn.vae_blocks import Stream

NARROW: dict[str, Any] = {"widths": (12, 8, 6, 5), "latent_channels": 4}
SHAPES = {
    "published": PreviewConfig(**NARROW),
    "grows at once": PreviewConfig(**NARROW | {"time_up": (2, 1, 2), "patch": 2, "blocks": 2}),
    "patches": dataclasses.replace(PRESETS["mini"], widths=(10, 6), latent_channels=4),
}


def network(config: PreviewConfig, seed: int = 0) -> Preview:
    torch.manual_seed(seed)
    preview = Preview(config).eval()
    with torch.no_grad():
        for parameter in preview.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return preview


def plain_decode(weights: dict[str, Tensor], latents: Tensor, config: PreviewConfig) -> Tensor:
    """[B, T, Z, h, w] -> [B, F, 3, H, W] in 0..1, as the published decoder is described: enlarge, then grow."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"), padding=padding)

    frames = [F.relu(conv(torch.tanh(z / 3) * 3, "decoder.1")) for z in latents.unbind(1)]
    place = 3
    for time, space in zip(config.time_up, config.space_up, strict=True):
        for _ in range(config.blocks):
            before = [torch.zeros_like(frames[0]), *frames[:-1]]
            after = []
            for now, past in zip(frames, before, strict=True):
                x = F.relu(conv(torch.cat([now, past], 1), f"decoder.{place}.conv.0"))
                x = conv(F.relu(conv(x, f"decoder.{place}.conv.2")), f"decoder.{place}.conv.4")
                after.append(F.relu(x + now))
            frames, place = after, place + 1
        larger = [frame.repeat_interleave(space, 2).repeat_interleave(space, 3) for frame in frames]
        grown = [part for x in larger for part in conv(x, f"decoder.{place + 1}.conv", 0).chunk(time, 1)]
        frames, place = [conv(x, f"decoder.{place + 2}") for x in grown], place + 3
    head, padding = f"decoder.{place + 1}", config.head_kernel // 2
    frames = [part for x in frames for part in conv(F.relu(x), head, padding).chunk(config.time_patch, 1)]
    pictures = torch.stack([F.pixel_shuffle(x, config.patch) for x in frames], dim=1)
    return pictures[:, config.temporal_factor - 1 :]


@pytest.mark.parametrize("name", SHAPES)
def test_is_the_published_decoder(name: str) -> None:
    config, preview = SHAPES[name], network(SHAPES[name])
    latents = torch.randn(2, 4, 3, 4, 6) * 2
    frames = preview.decode(latents)
    wanted = plain_decode(preview.state_dict(), latents.transpose(1, 2), config).transpose(1, 2) * 2 - 1
    assert frames.shape == (2, 3, 9, 4 * config.spatial_factor, 6 * config.spatial_factor)
    torch.testing.assert_close(frames, wanted, atol=1e-5, rtol=1e-5)
    assert wanted.std() > 0.05, "a constant picture would agree with anything"


def test_keys_and_shapes_of_the_published_file() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in Preview(PRESETS["taew2.1"]).state_dict().items()}
    assert len(shapes) == 64
    assert shapes["decoder.1.weight"] == (256, 16, 3, 3)
    assert shapes["decoder.3.conv.0.weight"] == (256, 512, 3, 3)
    assert [shapes[f"decoder.{i}.conv.weight"][:2] for i in (7, 13, 19)] == [(256, 256), (256, 128), (128, 64)]
    assert [shapes[f"decoder.{i}.weight"][:2] for i in (8, 14, 20, 22)] == [(128, 256), (64, 128), (64, 64), (3, 64)]
    assert "decoder.8.bias" not in shapes and shapes["decoder.22.bias"] == (3,)


@pytest.mark.parametrize("name", SHAPES)
def test_a_stream_is_the_whole_clip(name: str) -> None:
    preview, latents = network(SHAPES[name]), torch.randn(2, 4, 5, 3, 4)
    stream = Stream()
    pieces = [preview.decode_next(latents[:, :, a:b], stream) for a, b in ((0, 2), (2, 3), (3, 5))]
    assert [piece.shape[2] for piece in pieces] == [5, 4, 8]
    torch.testing.assert_close(torch.cat(pieces, dim=2), preview.decode(latents), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat(list(preview.decode_stream(latents, 2)), dim=2), torch.cat(pieces, dim=2))
    later = latents.clone()
    later[:, :, 3:] += 1
    assert torch.equal(preview.decode(later)[:, :, :9], preview.decode(latents)[:, :, :9]), "not causal"


def test_the_embedded_one_fits_the_mini_vae_and_is_far_cheaper() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    vae, preview, latents = VAE(VAES["mini"]), Preview(PRESETS["mini"]), torch.randn(1, 16, 5, 8, 8)
    assert (preview.temporal_factor, preview.spatial_factor) == (vae.temporal_factor, vae.spatial_factor)
    counts = []
    for decoder in (vae, preview):
        with FlopCounterMode(display=False) as counter:  # with gradients: the VAE's plain path, as it is defined
            assert decoder.decode(latents).shape == (1, 3, 17, 64, 64)
        counts.append(counter.get_total_flops())
    assert counts[0] > 8 * counts[1]


def test_latents_before_normalisation_are_asked_for_by_statistics() -> None:
    mean, std = (0.3, -0.2, 1.0, 0.0), (2.0, 0.5, 1.5, 1.0)
    plain = network(SHAPES["published"])
    raw = Preview(dataclasses.replace(plain.config, latent_mean=mean, latent_std=std))
    raw.load_state_dict(plain.state_dict())
    latents = torch.randn(1, 4, 2, 3, 3)
    given = latents * torch.tensor(std).view(-1, 1, 1, 1) + torch.tensor(mean).view(-1, 1, 1, 1)
    torch.testing.assert_close(raw.decode(latents), plain.decode(given))


@pytest.mark.parametrize("shape", [(1, 5, 2, 3, 3), (1, 4, 0, 3, 3), (4, 2, 3, 3)])
def test_other_latents_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"latents must be \[B, 4, T, h, w\]"):
        network(SHAPES["patches"]).decode(torch.zeros(shape))


def test_an_empty_chunk_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk is 0 latent frames"):
        next(network(SHAPES["patches"]).decode_stream(torch.zeros(1, 4, 2, 3, 3), 0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_up": (1, 2)}, "time_up has 2 entries; 4 widths: 3"),
        ({"widths": (256, 0, 64, 64)}, "widths holds 0"),
        ({"blocks": 0}, "blocks holds 0"),
        ({"head_kernel": 2}, "head_kernel is 2; allowed: 1, 3"),
        ({"latent_mean": (0.0,)}, "latent_mean has 1 entries, not 16 or 0"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreviewConfig(**change)
