"""A model folder that holds its transformer alone and shares the rest of an embedded model."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import orrery
from orrery.errors import InputError
from orrery.kinds import KINDS
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.nn.dit import DiT
from orrery.weights import (
    CATALOGUE,
    ActionConfig,
    ModelConfig,
    ModelEntry,
    convert,
    find_model,
    load_model,
    model_hash,
    save_control,
    save_transformer,
)
from orrery.weights.catalogue import supported
from orrery.weights.config import read_config

SHARED = {"vae": "tiny", "text": "tiny"}
ACTIONS = ActionConfig(("x", "y"), (0.5, -0.5), (2.0, 1.0), low=(-1, -1), high=(1, 1), window=4, handover="latents")
PROMPT = "a red ball falls"


@pytest.fixture
def embedded(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny model that is embedded in the package, as it were, under the name "tiny"."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "package" / "tiny"))
    monkeypatch.setitem(CATALOGUE, "tiny", ModelEntry("tiny", "a tiny model", folder=folder))
    return folder


@pytest.fixture
def config(embedded: Path) -> ModelConfig:
    own = read_config(embedded)
    transformer = dataclasses.replace(own.transformer, actions=8)
    return dataclasses.replace(own, transformer=transformer, actions=ACTIONS, shared=SHARED)


@pytest.fixture
def network(config: ModelConfig) -> DiT:
    torch.manual_seed(1)
    network = DiT(config.transformer).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(std=0.2)
    return network


@pytest.fixture
def folder(config: ModelConfig, network: DiT, tmp_path: Path) -> Path:
    return save_transformer(tmp_path / "told", network, config, "# told", torch.float32)


def test_only_the_transformer_is_written_and_all_is_loaded(
    folder: Path, embedded: Path, network: DiT, config: ModelConfig
) -> None:
    assert sorted(os.listdir(folder)) == ["README.md", "config.json", "transformer.safetensors"]
    files = find_model(folder)
    assert files.config == config and files.config.shared == SHARED and files.config.actions == ACTIONS
    assert files.parts["vae"].find() == embedded / "vae.safetensors"
    assert files.tokenizer() == embedded / "tokenizer.json"
    one, two = load_model(folder), load_model(embedded)
    for part, expected in (("transformer", network), ("vae", two.vae), ("text", two.text)):
        state = getattr(one, part).state_dict()
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
    assert torch.equal(one.text.encode([PROMPT]), two.text.encode([PROMPT]))


def test_it_is_float16_by_default_and_generates(
    config: ModelConfig, network: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_transformer(tmp_path / "told", network, config, "# told")
    assert (folder / "transformer.safetensors").stat().st_size < 2.2 * sum(
        each.numel() for each in network.parameters()
    )
    monkeypatch.setitem(CATALOGUE, "told", ModelEntry("told", "told actions", folder=folder))
    world = orrery.load("told", device="cpu")
    assert CATALOGUE["told"].state == "in the package" and CATALOGUE["told"].action_names == ("x", "y")
    assert world.generate(PROMPT, steps=2).frames.shape == (17, 32, 48, 3)  # without actions: no terms of them


def test_the_hash_covers_what_is_shared(folder: Path, embedded: Path) -> None:
    seen = [model_hash(folder)]
    for name in ("vae.safetensors", "text.safetensors", "tokenizer.json"):
        content = (embedded / name).read_bytes()
        (embedded / name).write_bytes(content[:-1] + b" ")
        seen.append(model_hash(folder))
        (embedded / name).write_bytes(content)
        assert model_hash(folder) == seen[0]
    config = json.loads((folder / "config.json").read_text())
    config["actions"]["std"] = [3.0, 1.0]
    (folder / "config.json").write_text(json.dumps(config))
    assert len({*seen, model_hash(folder)}) == 5


def test_the_hash_of_a_folder_is_of_its_content_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "me@home").mkdir()
    copy = Path(shutil.copytree(folder, tmp_path / "me@home" / "told"))
    os.utime(copy / "transformer.safetensors", (1, 1))
    assert model_hash(copy) == model_hash(folder)


def test_what_is_shared_must_be_there_and_the_same_network(folder: Path, embedded: Path) -> None:
    config = json.loads((folder / "config.json").read_text())

    def with_(**changes) -> None:
        (folder / "config.json").write_text(json.dumps(config | changes))

    with_(shared={"vae": "tinny", "text": "tiny"})
    with pytest.raises(InputError, match=r"the component 'tinny' as its vae; allowed are wan2\.1, mini, .*tiny"):
        find_model(folder)
    with_(shared={"vae": "reason1-7b", "text": "tiny"})
    with pytest.raises(InputError, match="the component 'reason1-7b' as its vae"):
        find_model(folder)
    with_(vae=config["vae"] | {"latent_mean": [1.0] * 16, "latent_std": [1.0] * 16})
    with pytest.raises(InputError, match="shares the vae of 'tiny', but states another network than tiny's"):
        find_model(folder)
    with_()
    (embedded / "text.safetensors").unlink()
    with pytest.raises(InputError, match=r"shares the text of 'tiny', but .*tiny holds no text\.safetensors"):
        find_model(folder)


def test_nothing_half_written(config: ModelConfig, network: DiT, tmp_path: Path, full_disk) -> None:
    before = sorted(os.listdir(tmp_path))
    with full_disk(5000), pytest.raises(InputError, match="cannot write .*told: File too large"):
        save_transformer(tmp_path / "told", network, config, "# told")
    unshared = dataclasses.replace(config, shared={"vae": "tiny"})
    with pytest.raises(ValueError, match="the config shares no text: save_model writes a model with all its parts"):
        save_transformer(tmp_path / "told", network, unshared, "# told")
    other = dataclasses.replace(config, shared={"vae": "none", "text": "tiny"})
    with pytest.raises(InputError, match="the component 'none'"):
        save_transformer(tmp_path / "told", network, other, "# told")
    controlled = dataclasses.replace(config, controls={"edge": ControlConfig(blocks=1, every=1, channels=16)})
    with pytest.raises(ValueError, match="control branches are not written here: edge"):
        save_transformer(tmp_path / "told", network, controlled, "# told")
    plain = dataclasses.replace(config, transformer=dataclasses.replace(config.transformer, actions=0), actions=None)
    with pytest.raises(ValueError, match="the transformer was not built from the config"):
        save_transformer(tmp_path / "told", network, plain, "# told")
    with torch.no_grad():
        network.t_embedding_norm.weight[0] = 1e6
    with pytest.raises(ValueError, match="t_embedding_norm.weight is not finite in float16"):
        save_transformer(tmp_path / "told", network, config, "# told")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_branch_beside_it_and_a_whole_copy_of_it(folder: Path, config: ModelConfig, tmp_path: Path) -> None:
    branch = ControlBranch(config.transformer, ControlConfig(blocks=1, every=1, channels=16))
    save_control(folder, "edge", branch, {})
    files = find_model(folder)
    assert set(files.config.controls) == {"edge"} and set(KINDS) > {"edge"}
    lean = convert(files, tmp_path / "lean", "orrery", ["transformer"])
    assert sorted(os.listdir(lean)) == ["README.md", "config.json", "transformer.safetensors"]
    assert find_model(lean).config.shared == SHARED
    whole = convert(files, tmp_path / "whole", "orrery", ["transformer", "vae", "text"])
    assert find_model(whole).config.shared == {} and find_model(whole).config.actions == ACTIONS
    one, two = load_model(folder), load_model(whole)
    for part in ("transformer", "vae", "text"):
        state = getattr(two, part).state_dict()
        assert all(torch.equal(state[key], value) for key, value in getattr(one, part).state_dict().items())


def test_a_repository_that_shares_takes_its_own_part_from_the_hub(hub, folder: Path, embedded: Path) -> None:
    hub.folders["me/told"] = folder
    files = find_model("me/told@main")
    assert files.parts["transformer"].identity == "me/told@main/transformer.safetensors"
    assert files.parts["vae"].find() == embedded / "vae.safetensors"
    assert load_model(files).config.actions == ACTIONS


def test_an_embedded_model_that_is_not_there_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = dataclasses.replace(CATALOGUE["tabletop"], folder=tmp_path / "nowhere")
    monkeypatch.setitem(CATALOGUE, "tabletop", entry)
    assert (entry.state, entry.size, entry.kinds, entry.action_names) == ("missing", 0, (), ())
    assert "tabletop" not in supported() and "mini" in supported()
    with pytest.raises(InputError, match="the weights of model 'tabletop' are missing"):
        find_model("tabletop")


@pytest.mark.skipif(CATALOGUE["tabletop"].state == "missing", reason="orrery-tabletop is not in this checkout")
def test_the_embedded_tabletop_model() -> None:
    files = find_model("tabletop")
    assert files.config.shared == {"vae": "mini", "text": "mini"} and files.config.actions is not None
    assert files.config.vae == find_model("mini").config.vae
    assert load_model(files).transformer.config.actions == 4 * files.config.actions.dimensions
