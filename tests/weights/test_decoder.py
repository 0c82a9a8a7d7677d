"""A decoder of a model's own over a shared VAE: other pictures, the same latents."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orrery.errors import InputError
from orrery.nn.dit import DiT
from orrery.weights import load_model, load_part, model_hash, save_model, save_transformer
from orrery.weights.config import read_config
from orrery.weights.conversion import convert
from orrery.weights.decoder import save_decoder
from orrery.weights.sources import find_model


@pytest.fixture
def sharing(tmp_path: Path) -> Path:
    """A model folder with a small transformer that shares orrery-mini's VAE and text encoder."""
    config = find_model("mini", controls=()).config
    transformer = DiT(dataclasses.replace(config.transformer, depth=1))
    shared = {"vae": "mini", "text": "mini"}
    config = dataclasses.replace(config, transformer=transformer.config, shared=shared, controls={}, training={})
    return save_transformer(tmp_path / "sharing", transformer, config, "# a card")


def tuned(folder: Path) -> dict[str, torch.Tensor]:
    weights = load_part(find_model(folder), "vae").state_dict()
    return {key: value + 0.1 for key, value in weights.items() if key.startswith("decoder.head")}


def test_pictures_change_and_latents_stay(sharing: Path) -> None:
    before, hashed = load_part(find_model(sharing), "vae"), model_hash(sharing)
    weights = tuned(sharing)
    save_decoder(sharing, weights, {"recipe": "a test"})
    after = load_part(find_model(sharing), "vae")
    frames = torch.rand(1, 3, 5, 64, 64) * 2 - 1
    latents = before.encode(frames)
    assert torch.equal(after.encode(frames), latents)
    assert (after.decode(latents) - before.decode(latents)).abs().max() > 1e-2
    for key, value in after.state_dict().items():
        assert torch.allclose(value, weights[key] if key in weights else before.state_dict()[key], atol=1e-3)
    assert model_hash(sharing) != hashed
    config = read_config(sharing)
    assert config.own_decoder and config.training["decoder"] == {"recipe": "a test"}
    assert read_config(find_model("mini").folder).own_decoder is False  # type: ignore[arg-type]


def test_saved_whole_it_needs_no_other(sharing: Path, tmp_path: Path) -> None:
    save_decoder(sharing, tuned(sharing), {})
    model = load_model(sharing)
    alone = dataclasses.replace(model, config=dataclasses.replace(model.config, shared={}, own_decoder=False))
    whole = load_model(save_model(tmp_path / "whole", alone, "# whole", dtype=torch.float32))
    for key, value in model.vae.state_dict().items():
        assert torch.equal(whole.vae.state_dict()[key], value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"encoder.conv1.bias": torch.zeros(3)}, "no weight of the VAE's decoder"),
        ({"decoder.nothing": torch.zeros(3)}, "no weight of the VAE's decoder"),
        ({"decoder.head.2.bias": torch.zeros(3)}, "is [3], the VAE's is"),
    ],
)
def test_refuses_weights_that_do_not_fit(sharing: Path, weights: dict[str, torch.Tensor], message: str) -> None:
    save_decoder(sharing, tuned(sharing), {})
    save_file(weights, sharing / "decoder.safetensors")
    with pytest.raises(InputError) as caught:
        load_part(find_model(sharing), "vae")
    assert message in str(caught.value)


def test_refuses_what_cannot_be(sharing: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has a VAE of its own"):
        save_decoder(tiny_folder, {}, {})
    with pytest.raises(ValueError, match="no finite weight of the decoder"):
        save_decoder(sharing, {"encoder.conv1.bias": torch.zeros(3)}, {})
    values = json.loads((tiny_folder / "config.json").read_text()) | {"own_decoder": True}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="own_decoder is of a model that shares its VAE"):
        read_config(tmp_path)
    save_decoder(sharing, tuned(sharing), {})
    (sharing / "decoder.safetensors").unlink()
    with pytest.raises(InputError, match="decoder"):
        load_part(find_model(sharing), "vae")


def test_conversion_takes_it_along_or_writes_the_vae_whole(sharing: Path, tmp_path: Path) -> None:
    save_decoder(sharing, tuned(sharing), {})
    wanted = load_part(find_model(sharing), "vae").state_dict()
    again = convert(find_model(sharing), tmp_path / "again", "orrery")
    whole = convert(find_model(sharing), tmp_path / "whole", "orrery", parts=("transformer", "vae"))
    assert (again / "decoder.safetensors").is_file() and not (whole / "decoder.safetensors").exists()
    for folder in (again, whole):
        for key, value in load_part(find_model(folder), "vae").state_dict().items():
            assert torch.equal(value, wanted[key]), (folder.name, key)
    with pytest.raises(InputError, match="diffusers knows no VAE"):  # it has no word for a decoder alone
        convert(find_model(sharing), tmp_path / "pipeline", "diffusers")
