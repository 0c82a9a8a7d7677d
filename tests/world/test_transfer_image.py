"""A reference image on its way through World.transfer: SigLIP 2 tokens, seen by the prompt and not by what guidance
leads away from."""

from pathlib import Path

import numpy as np
import pytest
import torch

import orrery
from orrery.errors import InputError
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.nn.dit import DiT, DiTConfig
from orrery.video import Video
from orrery.weights import Model, ModelConfig, Sampling, save_model
from orrery.weights.store import load_model, save_control
from orrery.world import Signal, World

transformers = pytest.importorskip("transformers")
PROMPT, WIDTH = "a red ball falls and bounces", 20


@pytest.fixture(scope="module")
def world(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """The tiny model with image context in base and branches, nothing at zero, and a tiny SigLIP 2."""
    torch.manual_seed(0)
    tiny = load_model(tiny_folder)
    config = DiTConfig(**{**tiny.config.transformer.__dict__, "image_context": WIDTH})
    transformer = DiT(config)
    with torch.no_grad():
        for layer in transformer.zero_initialised():
            layer.weight.normal_(std=0.3)
        for name, parameter in transformer.named_parameters():
            if "img" in name and parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    made = ModelConfig(**{**tiny.config.__dict__, "transformer": config, "sampling": Sampling(steps=4, guidance=1.0)})
    folder = tmp_path_factory.mktemp("models") / "image"
    save_model(folder, Model(made, transformer, tiny.vae, tiny.text), "# image", dtype=torch.float32)
    for kind in ("edge", "blur"):
        branch = ControlBranch(config, ControlConfig(blocks=2, every=1, channels=16)).initialise(transformer)
        with torch.no_grad():
            for layer in branch.zero_initialised():
                layer.weight.normal_(std=0.15)
        save_control(folder, kind, branch, {}, dtype=torch.float32)
    tower = transformers.Siglip2VisionModel(
        transformers.Siglip2VisionConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=4,
            num_patches=16, vision_use_head=False,
        )
    )  # fmt: skip
    tower.save_pretrained(folder / "siglip")
    return orrery.load(folder, "cpu", image=folder / "siglip")


def picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return coarse.repeat(10, 0).repeat(10, 1)


def control() -> dict[str, Signal]:
    return {"edge": Signal(Video(np.random.default_rng(1).integers(0, 256, (17, 32, 48, 3), dtype=np.uint8), 10))}


def test_the_image_matters_and_each_image_is_another(world: World) -> None:
    none, one, two = (
        world.transfer(PROMPT, None, control(), seed=1, image=image).video.frames.astype(int)
        for image in (None, picture(1), picture(2))
    )
    assert np.abs(none - one).mean() > 0.3 and np.abs(one - two).mean() > 0.3
    again = world.transfer(PROMPT, None, control(), seed=1, image=picture(1)).video.frames
    assert np.array_equal(one, again)


def test_only_the_prompt_sees_it_at_the_drawn_size(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list = []
    network = world.model.transformer
    original = network.encode_text
    monkeypatch.setattr(network, "encode_text", lambda text, image=None: seen.append(image) or original(text, image))
    request = world.transfer_request(PROMPT, None, control(), image=picture(1))
    assert request.image is not None and request.image.shape == (32, 48, 3)
    world.run_transfer(request)
    assert seen[0].shape == seen[1].shape == (1, 16, WIDTH) and not seen[1].any()
    with torch.no_grad():
        assert torch.equal(seen[0], world.model._keep("image").encode(request.image))  # type: ignore[operator]


def test_placements_agree(world: World) -> None:
    first = world.transfer(PROMPT, None, control(), seed=1, image=picture(1)).video.frames.astype(int)
    assert world.files.folder is not None
    other = orrery.load(world.files.folder, "cpu", image=world.files.folder / "siglip", placement="stages")
    assert np.abs(other.transfer(PROMPT, None, control(), seed=1, image=picture(1)).video.frames - first).max() <= 1


def test_not_with_blur(world: World) -> None:
    blurred = {"blur": control()["edge"]}
    with pytest.raises(InputError, match="does not go with blur, which keeps the colours"):
        world.transfer_request(PROMPT, None, blurred, image=picture(1))
