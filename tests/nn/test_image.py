"""The image encoder: our resizing and patches against transformers' image processor, the tokens against its model."""

import numpy as np
import pytest
import torch

from orrery.nn.image import ImageConfig, ImageEncoder, image_patches, patch_grid

TINY = ImageConfig(width=16, layers=2, heads=2, mlp=24, patch=4, tokens=36)


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with some noise, so that a wrong resize or order of axes shows."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    base = np.stack([255 * y / height, 255 * x / width, 127 + 120 * np.sin(x / 9)], axis=-1)
    return np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def encoder() -> ImageEncoder:
    torch.manual_seed(0)
    made = ImageEncoder(TINY).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.3)
    return made


def processor():
    """The image processor of transformers that does without torchvision."""
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    return module, module.Siglip2ImageProcessorPil


SIZES = [(704, 1280), (1280, 704), (960, 960), (720, 1280), (704, 960), (432, 768), (17, 3000), (64, 64), (33, 100)]


def test_the_size_is_the_reference_processors() -> None:
    module, _ = processor()
    rng = np.random.default_rng(1)
    sizes = SIZES + [tuple(map(int, pair)) for pair in rng.integers(16, 2000, (300, 2))]
    for most in (36, 256):
        for height, width in sizes:
            expected = module.get_image_size_for_max_num_patches(height, width, 16, most)
            assert tuple(16 * n for n in patch_grid(height, width, most)) == expected, (height, width, most)
    assert patch_grid(704, 1280, 256) == (12, 21)  # 252 patches and 4 of padding


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_the_reference_processors(size: tuple[int, int]) -> None:
    _, kind = processor()
    image = picture(*size)
    expected = kind()(image, return_tensors="pt")
    patches, grid = image_patches(image, 16, 256)
    assert list(grid) == expected["spatial_shapes"][0].tolist()
    theirs = expected["pixel_values"][0]
    assert patches.shape == theirs.shape == (256, 768)
    assert (patches - theirs).abs().max() <= 2.01 / 127.5  # one or two grey levels between PIL's resize and torch's
    assert (patches - theirs).abs().mean() < 0.1 / 127.5
    real = grid[0] * grid[1]
    assert expected["pixel_attention_mask"][0].sum() == real and not patches[real:].any()


def test_tokens_are_the_reference_models(encoder: ImageEncoder) -> None:
    """With a whole model of transformers with the same weights, head and all, given the processor's mask."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Siglip2VisionConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4, num_patches=36
    )
    reference = transformers.Siglip2VisionModel(config).eval()
    left = reference.load_state_dict(encoder.model.state_dict(), strict=False)
    assert not left.unexpected_keys and all(key.startswith("head.") for key in left.missing_keys)
    image = picture(40, 70)
    tokens = encoder.encode(image)
    assert tokens.shape == (1, 36, 16) and tokens.dtype == torch.float32 and not tokens.requires_grad
    patches, grid = image_patches(image, 4, 36)
    assert grid[0] * grid[1] < 36
    mask = (torch.arange(36) < grid[0] * grid[1])[None].long()
    with torch.no_grad():
        expected = reference(patches[None], mask, torch.tensor([grid])).last_hidden_state
        unmasked = reference(patches[None], torch.ones_like(mask), torch.tensor([grid])).last_hidden_state
    assert torch.allclose(tokens, expected, atol=1e-5) and (tokens - unmasked).abs().max() > 1e-3
    assert (encoder.encode(picture(40, 70)[:, ::-1]) - tokens).abs().max() > 0.01


def test_dtype_and_input_types(encoder: ImageEncoder) -> None:
    image = picture(30, 50)
    assert torch.equal(encoder.encode(image), encoder.encode(torch.from_numpy(image)))
    half = ImageEncoder(TINY).eval().to(torch.bfloat16)
    half.load_state_dict(encoder.state_dict())
    assert half.encode(image).dtype == torch.bfloat16
    assert torch.allclose(half.encode(image).float(), encoder.encode(image), atol=0.2)


def test_published_shape() -> None:
    with torch.device("meta"):
        state = ImageEncoder(ImageConfig()).state_dict()
    assert state["model.embeddings.patch_embedding.weight"].shape == (1152, 768)
    assert state["model.embeddings.position_embedding.weight"].shape == (256, 1152)
    assert state["model.encoder.layers.26.mlp.fc1.weight"].shape == (4304, 1152)
    assert not any("head" in key for key in state)


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros((0, 8, 3), np.uint8)],
)
def test_what_is_no_image_is_refused(image: np.ndarray, encoder: ImageEncoder) -> None:
    with pytest.raises(ValueError, match=r"an image must be uint8 \[H, W, 3\], got"):
        encoder.encode(image)


def test_wrong_configs_are_refused() -> None:
    with pytest.raises(ValueError, match="a square number, got 40"):
        ImageConfig(tokens=40)
    with pytest.raises(ValueError, match="width 16 must divide into 3 heads"):
        ImageConfig(width=16, heads=3)
    with pytest.raises(ValueError, match="image layers must be at least 1"):
        ImageConfig(layers=0)
