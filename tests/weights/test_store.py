"""A model folder: what is saved is what is loaded, and nothing else loads."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orrery.errors import InputError
from orrery.weights import CATALOGUE, Model, ModelConfig, find_model, load_model, model_hash, save_model


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Model:
    return load_model(tiny_folder)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_round_trip_is_exact_in_float32(model: Model, tmp_path: Path) -> None:
    again = load_model(save_model(tmp_path / "m", model, "# card", torch.float32))
    assert again.config == model.config
    for name in ("transformer", "vae", "text"):
        one, two = getattr(model, name).state_dict(), getattr(again, name).state_dict()
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in one)
    prompt = "a red ball rolls to the left"
    assert torch.equal(model.text.encode([prompt]), again.text.encode([prompt]))
    files = {
        "README.md",
        "config.json",
        "tokenizer.json",
        "text.safetensors",
        "transformer.safetensors",
        "vae.safetensors",
    }
    assert set(os.listdir(tmp_path / "m")) == files and os.listdir(tmp_path) == ["m"]
    assert (tmp_path / "m" / "README.md").read_text() == "# card\n"


def test_float16_halves_and_loads_as_float32(model: Model, tmp_path: Path) -> None:
    small = save_model(tmp_path / "m", model, "# card")
    stored = load_file(small / "transformer.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    again = load_model(small)
    for key, value in again.transformer.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.allclose(value, model.transformer.state_dict()[key], rtol=1e-3, atol=1e-6)
    assert not any(weight.requires_grad for weight in again.transformer.parameters())
    assert not again.transformer.training


def test_dtype_leaves_the_vae_in_float32(tiny_folder: Path) -> None:
    model = load_model(tiny_folder, dtype=torch.bfloat16)
    assert model.transformer.dtype == torch.bfloat16
    assert {weight.dtype for weight in model.text.parameters()} == {torch.bfloat16}
    assert {weight.dtype for weight in model.vae.parameters()} == {torch.float32}


def test_a_weight_that_float16_cannot_hold_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_model(tiny_folder)
    model.transformer.t_embedding_norm.weight[3] = 1e6
    with pytest.raises(ValueError, match=r"transformer: t_embedding_norm\.weight is not finite in float16"):
        save_model(tmp_path / "m", model, "# card")
    assert os.listdir(tmp_path) == []


def test_networks_of_another_config_are_refused(model: Model, tmp_path: Path) -> None:
    config = dataclasses.replace(model.config, vae=dataclasses.replace(model.config.vae, res_blocks=3))
    with pytest.raises(ValueError, match="the vae was not built from the config"):
        save_model(tmp_path / "m", dataclasses.replace(model, config=config), "# card")


def test_a_full_disk_leaves_the_old_model(folder: Path, model: Model, full_disk) -> None:
    before = model_hash(folder)
    with full_disk(5000), pytest.raises(InputError, match="cannot write .*tiny: File too large"):
        save_model(folder, model, "# card")
    assert model_hash(folder) == before and os.listdir(folder.parent) == ["tiny"]


def test_weights_must_match_exactly(folder: Path) -> None:
    path = folder / "transformer.safetensors"
    whole = load_file(path)
    key = "blocks.1.mlp.layer1.weight"
    save_file({k: v for k, v in whole.items() if k != key}, path)
    with pytest.raises(InputError, match=f"lacks 1 of {len(whole)} weights: {key}"):
        load_model(folder)
    save_file(whole | {"blocks.7.extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"1 unknown weights: blocks\.7\.extra"):
        load_model(folder)
    save_file(whole | {key: whole[key][:-1].contiguous()}, path)
    message = rf"1 weights have another shape: {key} is \[191, 48\], the config asks for \[192, 48\]"
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize("name", ["transformer.safetensors", "vae.safetensors", "tokenizer.json", "config.json"])
def test_missing_and_broken_files_are_named(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"\x07 not what it was")
    with pytest.raises(InputError, match=name) as broken:
        load_model(folder)
    assert "\n" not in str(broken.value)
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        load_model(folder)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["transformer"].update(widht=3), "transformer has the unknown key 'widht'"),
        (lambda c: c.update(colour="red"), "unknown key 'colour'"),
        (lambda c: c.pop("fps"), "lacks the key 'fps'"),
        (lambda c: c.update(frames=16), r"frames must be 4k \+ 1 .* got 16"),
        (lambda c: c["sampling"].update(solver="heun"), "solver is 'heun'; allowed are unipc, euler"),
        (lambda c: c["sampling"].update(guidance=-1), "guidance at least 0"),
        (lambda c: c["transformer"].update(text_dim=99), "text of width 99, the text encoder gives 32"),
        (lambda c: c["vae"].update(latent_channels=8), "16 latent channels, the VAE 8"),
        (lambda c: c.update(vae=[1]), "vae must be a table"),
    ],
)
def test_config_is_checked(folder: Path, change, message: str) -> None:
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_config_survives_json(model: Model) -> None:
    assert ModelConfig.from_json(json.loads(json.dumps(model.config.to_json()))) == model.config


def test_hash_follows_every_file(folder: Path) -> None:
    seen = {model_hash(folder)}
    assert seen == {model_hash(folder)}
    (folder / "README.md").write_text("another card")
    assert seen == {model_hash(folder)}  # words about the model are not the model
    edit(folder, lambda c: c.update(fps=11.0))
    seen.add(model_hash(folder))
    weights = load_file(folder / "vae.safetensors")
    first = sorted(weights)[0]
    save_file(weights | {first: weights[first] + 1}, folder / "vae.safetensors")
    seen.add(model_hash(folder))
    assert len(seen) == 3


def test_find_model(folder: Path, tmp_path: Path) -> None:
    assert find_model(str(folder)).folder == folder
    with pytest.raises(InputError, match=r"unknown model 'minni' \(did you mean 'mini'\?\); allowed are mini"):
        find_model("minni")
    with pytest.raises(InputError, match="not a model"):
        find_model(tmp_path)


def test_a_named_model_without_weights_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CATALOGUE, "mini", dataclasses.replace(CATALOGUE["mini"], folder=tmp_path))
    with pytest.raises(InputError, match="the weights of model 'mini' are missing"):
        find_model("mini")


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "fps", "fast"),
        (None, "frames", None),
        ("transformer", "width", "wide"),
        ("sampling", "steps", True),
        ("vae", "multipliers", 3),
    ],
)
def test_a_value_of_the_wrong_kind_is_named_with_its_key(part, key, value, folder: Path) -> None:
    edit(folder, lambda config: (config[part] if part else config).update({key: value}))
    with pytest.raises(InputError, match=f"{key} is {value!r}; allowed is "):
        load_model(folder)


def test_no_name_is_no_model() -> None:
    with pytest.raises(InputError, match="the model is ''"):
        find_model("")
