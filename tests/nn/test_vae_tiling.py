"""The VAE tile by tile: exact weights, exactness of one tile, streaming, refusals, and the error at the seams."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orrery.nn import vae_tiling
from orrery.nn.vae import VAE, VAEConfig
from orrery.nn.vae_tiling import decode_tiled, encode_tiled

CONFIGS = {
    "wan2.1": VAEConfig(base=8, latent_channels=4, latent_mean=(0.5, 0.0, -1.0, 2.0), latent_std=(1.0, 2.0, 0.5, 3.0)),
    "mini": VAEConfig(
        base=12, multipliers=(1, 2), temporal_down=(False,), patch=4, temporal_patch=4, factorised=True,
        latent_channels=4, attention=False,
    ),
}  # fmt: skip
every_config = pytest.mark.parametrize("name", CONFIGS)


def build(name: str) -> VAE:
    """A small VAE with random weights whose decoder stays near [-1, 1]."""
    torch.manual_seed(0)
    return VAE(CONFIGS[name]).eval()


def latents_of(vae: VAE, height: int, width: int, steps: int = 3, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, vae.config.latent_channels, steps, height, width, generator=generator)


class Copying(VAE):
    """A VAE that only resizes: encoding averages blocks of pixels, decoding repeats latents."""

    def _moments(self, frames, stream):
        small = torch.nn.functional.avg_pool3d(frames[:, :, ::4], (1, 8, 8))
        return torch.cat([small, small[:, :1]], dim=1), torch.zeros(())

    def _decode(self, latents, stream):
        big = latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4).repeat_interleave(4, 2)
        return big[:, :, 3:] if stream is None or stream.first else big


@pytest.mark.parametrize("factor", [1, 8])
def test_weights_sum_to_one(factor):
    for length in range(1, 30):
        for tile in range(1, 12):
            for overlap in range(tile):
                spans = vae_tiling._spans(length, tile, overlap)
                total = torch.zeros(length * factor)
                for span, weight in zip(spans, vae_tiling._weights(spans, factor), strict=True):
                    total[span.start * factor : span.stop * factor] += weight
                torch.testing.assert_close(total, torch.ones_like(total), atol=3e-7, rtol=0)  # three roundings to float


def test_the_edges_of_tiles_count_for_nothing_where_others_overlap():
    for length, tile, overlap in ((20, 8, 2), (20, 8, 6), (30, 5, 4), (17, 3, 1)):
        weights = vae_tiling._weights(vae_tiling._spans(length, tile, overlap), 8)
        assert all(weight[0] == 0 for weight in weights[1:]) and all(weight[-1] == 0 for weight in weights[:-1])
        middle = weights[len(weights) // 2]
        torch.testing.assert_close(middle, middle.flip(0))  # both sides are treated alike


def test_parts_cover_and_overlap():
    for length in range(1, 40):
        for tile in range(1, 12):
            for overlap in range(tile):
                spans = vae_tiling._spans(length, tile, overlap)
                sizes = {span.stop - span.start for span in spans}
                assert spans[0].start == 0 and spans[-1].stop == length and len(sizes) == 1 and max(sizes) <= tile
                for left, right in zip(spans, spans[1:], strict=False):
                    assert left.start < right.start and left.stop - right.start >= overlap
                needed = 1 if length <= tile else math.ceil((length - overlap) / (tile - overlap))
                assert len(spans) == needed


@pytest.mark.parametrize(("tile", "overlap"), [((4, 4), 0), ((4, 4), 1), ((4, 4), 3), ((3, 5), 2), ((11, 2), 1)])
def test_what_no_edge_disturbs_goes_through_unchanged(tile, overlap):
    vae = Copying(CONFIGS["mini"])
    latents = latents_of(vae, 9, 7)
    constant = torch.full_like(latents, 0.3)
    for given in (latents, constant):
        torch.testing.assert_close(
            decode_tiled(vae, given, tile, overlap, dtype=torch.float32), vae.decode(given), atol=1e-6, rtol=0
        )
    frames = vae.decode(latents)
    torch.testing.assert_close(encode_tiled(vae, frames, tile, overlap), vae.encode(frames), atol=1e-6, rtol=0)
    halves = decode_tiled(vae, latents.clamp(-1, 1), tile, overlap)
    assert halves.dtype == torch.float16
    assert (halves - vae.decode(latents.clamp(-1, 1))).abs().amax() < 0.0013  # what decode_tiled promises


@every_config
@pytest.mark.parametrize("chunk", [1, 2, 5])
@torch.no_grad()
def test_one_tile_is_the_untiled_call_bit_for_bit(name, chunk):
    vae = build(name)
    latents = latents_of(vae, 3, 2, batch=2)
    frames = vae.decode(latents, chunk)
    for tile in ((3, 2), (32, 32)):
        assert torch.equal(decode_tiled(vae, latents, tile, 1, chunk, torch.float32), frames)
        assert torch.equal(decode_tiled(vae, latents, tile, 1, chunk), frames.half())
        assert torch.equal(encode_tiled(vae, frames, tile, 1, chunk), vae.encode(frames, 4 * chunk))


@every_config
@torch.no_grad()
def test_any_size_and_any_chunk(name):
    vae = build(name)
    latents = latents_of(vae, 7, 5)
    whole = vae.decode(latents)
    results = [decode_tiled(vae, latents, (3, 4), 2, chunk, torch.float32) for chunk in (1, 2, 3)]
    assert results[0].shape == whole.shape == (1, 3, 9, 56, 40)
    encoded = [encode_tiled(vae, whole, (3, 4), 2, chunk) for chunk in (1, 2)]
    assert encoded[0].shape == latents.shape
    for pieces in (results, encoded):
        for other in pieces[1:]:
            torch.testing.assert_close(other, pieces[0], atol=1e-5, rtol=0)
    image = decode_tiled(vae, latents[:, :, :1], (3, 4), 2, dtype=torch.float32)
    torch.testing.assert_close(image, results[0][:, :, :1], atol=1e-5, rtol=0)
    assert encode_tiled(vae, image, (3, 4), 2).shape == (1, 4, 1, 7, 5)


def test_takes_the_dtype_of_the_network_and_needs_no_gradient():
    vae = build("mini").bfloat16()
    frames = decode_tiled(vae, latents_of(vae, 3, 3), (2, 2), 1)
    assert frames.dtype == torch.float16 and not frames.requires_grad
    latents = encode_tiled(vae, frames, (2, 2), 1)
    assert latents.dtype == torch.bfloat16 and not latents.requires_grad


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile": (0, 4)}, r"tile is \(0, 4\)"),
        ({"tile": (4,)}, r"tile is \(4,\)"),
        ({"tile": (4, 3), "overlap": 3}, "overlap is 3 latents, must be 0 to 2 for tiles of 4x3"),
        ({"overlap": -1}, "overlap is -1"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_refused_options(options, words):
    vae = build("mini")
    with pytest.raises(ValueError, match=words):
        decode_tiled(vae, latents_of(vae, 4, 4), **options)
    with pytest.raises(ValueError, match=words):
        encode_tiled(vae, torch.zeros(1, 3, 5, 32, 32), **options)


def test_refused_shapes():
    vae = build("mini")
    with pytest.raises(ValueError, match=r"\[1, 5, 1, 2, 2\]"):
        decode_tiled(vae, torch.zeros(1, 5, 1, 2, 2))
    with pytest.raises(ValueError, match=r"\[4, 1, 2, 2\]"):
        decode_tiled(vae, torch.zeros(4, 1, 2, 2))
    with pytest.raises(ValueError, match="4 frames"):
        encode_tiled(vae, torch.zeros(1, 3, 4, 16, 16))
    with pytest.raises(ValueError, match="height 20"):
        encode_tiled(vae, torch.zeros(1, 3, 5, 20, 16))


def shapes_in_motion(count: int = 5, height: int = 128, width: int = 192) -> torch.Tensor:
    """Textured discs that move over a textured floor, [1, 3, F, H, W] in [-1, 1]; no randomness."""
    y, x = torch.meshgrid(torch.arange(height) * 1.0, torch.arange(width) * 1.0, indexing="ij")
    floor = 0.3 * ((x // 16 + y // 16) % 2 - 0.5)
    floor = torch.stack([floor + 0.3 * torch.sin(x / 17 + k) + 0.3 * torch.cos(y / 11 - k) for k in range(3)])
    colours = torch.tensor([[0.8, -0.6, -0.6], [-0.6, 0.7, -0.5], [-0.5, -0.4, 0.9]]).view(3, 3, 1, 1)
    texture = 0.8 + 0.2 * torch.sin(x / 3 + y / 4)
    frames = []
    for t in range(count):
        frame = floor
        places = ((40, 40, 18, 3, 2), (120, 80, 24, -3, 1), (160, 30, 14, -2, 3))
        for colour, (across, down, radius, right, below) in zip(colours, places, strict=True):
            inside = (x - across - right * t) ** 2 + (y - down - below * t) ** 2 < radius**2
            frame = torch.where(inside, colour * texture, frame)
        frames.append(frame)
    return torch.stack(frames, dim=1)[None]


@pytest.fixture(scope="module")
def mini() -> VAE:
    """The VAE that Orrery ships."""
    folder = Path(vae_tiling.__file__).parents[1] / "weights" / "mini"
    vae = VAE(VAEConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["vae"])).eval()
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    return vae.float()


def psnr(error: torch.Tensor) -> float:
    """Decibels of an error of frames in [-1, 1]."""
    return 10 * math.log10(4 / error.square().mean().item())


@torch.no_grad()
def test_seams_of_the_shipped_vae(mini):
    # Measured: 0.0080 and 72.9 dB with overlap 8, 1.05 and 33.0 dB without. A step of uint8 is 0.0078.
    frames = shapes_in_motion()
    latents = mini.encode(frames)
    whole = mini.decode(latents)
    assert psnr(whole - frames) > 22  # the clip is one that this VAE can show
    error = {n: decode_tiled(mini, latents, (16, 16), n, dtype=torch.float32) - whole for n in (0, 8)}
    assert error[8].abs().amax() < 0.008 and psnr(error[8]) > 72
    assert error[0].abs().amax() > 0.4 and psnr(error[0]) < 40
    spread = {n: encode_tiled(mini, frames, (16, 16), n) - latents for n in (0, 8)}  # latents have a deviation of 1
    assert spread[8].abs().amax() < 0.03 and spread[0].abs().amax() > 1


@torch.no_grad()
def test_a_wider_overlap_is_better(mini):
    latents = mini.encode(shapes_in_motion(1))
    whole = mini.decode(latents)
    errors = [psnr(decode_tiled(mini, latents, (16, 16), n, dtype=torch.float32) - whole) for n in (0, 2, 4, 8)]
    assert all(wider > narrower + 5 for narrower, wider in zip(errors, errors[1:], strict=False)), errors


@torch.no_grad()
def test_dropping_the_edges_of_tiles_is_better(mini, monkeypatch):
    latents = mini.encode(shapes_in_motion(1))
    whole = mini.decode(latents)
    dropped = psnr(decode_tiled(mini, latents, (16, 16), 8, dtype=torch.float32) - whole)
    monkeypatch.setattr(vae_tiling, "EDGE", 0.0)
    assert dropped > psnr(decode_tiled(mini, latents, (16, 16), 8, dtype=torch.float32) - whole) + 15
