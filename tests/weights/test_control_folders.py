"""Control branches in a model folder of ours: kinds, configs, saving, loading strictly, which are found."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orrery.errors import InputError
from orrery.kinds import KINDS, control_kind
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.nn.dit import DiTConfig
from orrery.weights import (
    CATALOGUE,
    ModelConfig,
    find_model,
    load_model,
    load_part,
    model_hash,
    part_hash,
    save_control,
    save_model,
)

TINY_CONTROL = ControlConfig(blocks=2, every=1, channels=16)  # beside the tiny model's two blocks


def same(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "tiny"))


def new_branch(folder: Path, seed: int) -> ControlBranch:
    """A random branch for the model of a folder, nothing at zero."""
    torch.manual_seed(seed)
    branch = ControlBranch(find_model(folder).config.transformer, TINY_CONTROL)
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.normal_(std=0.2)
    return branch


# Kinds and configs


def test_kinds() -> None:
    assert KINDS == ("edge", "blur", "depth", "seg")
    assert [control_kind(name) for name in (*KINDS, "vis")] == [*KINDS, "blur"]
    with pytest.raises(InputError, match=r"the control is 'lidar'; allowed are edge, blur, depth, seg \(vis"):
        control_kind("lidar")


def test_config_lists_controls_in_the_published_order(tiny_folder: Path) -> None:
    config = find_model(tiny_folder).config
    assert config.controls == {}
    two = dataclasses.replace(config, controls={"seg": TINY_CONTROL, "vis": TINY_CONTROL})
    assert list(two.controls) == ["blur", "seg"]
    assert ModelConfig.from_json(json.loads(json.dumps(two.to_json()))) == two
    old = {key: value for key, value in config.to_json().items() if key != "controls"}
    assert ModelConfig.from_json(old) == config


@pytest.mark.parametrize(
    "controls, message",
    [
        ({"lidar": {}}, "the control is 'lidar'; allowed are edge"),
        ({"edge": {"blocks": 2, "evry": 1}}, "control edge has the unknown key 'evry'; allowed are blocks, every"),
        ({"edge": {"blocks": "two"}}, "control edge: blocks is 'two'"),
        ({"edge": {"blocks": 2, "every": 7}}, r"control edge: a branch at base blocks \(0, 7\) needs a deeper base"),
        ({"edge": {"blocks": 0, "every": 1}}, "blocks must be at least 1, got 0"),
        ({"vis": {"blocks": 1}, "blur": {"blocks": 1}}, "controls names a kind twice: vis, blur"),
        (["edge"], "controls must be a table"),
    ],
)
def test_config_refuses_what_cannot_be(controls, message: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"controls": controls}))
    with pytest.raises(InputError, match=message):
        find_model(folder)


# A model folder of ours


def test_a_branch_is_put_into_a_folder_and_loaded(folder: Path) -> None:
    before, names = model_hash(folder), set(os.listdir(folder))
    branch = new_branch(folder, 1)
    path = save_control(folder, "vis", branch, {"steps": 5})
    assert path == folder / "control-blur.safetensors"
    assert set(os.listdir(folder)) == names | {path.name}
    files = find_model(folder)
    assert files.config.controls == {"blur": TINY_CONTROL}
    assert files.config.training["controls"] == {"blur": {"steps": 5}}
    assert files.config.training["recipe"] == "none: random"
    assert set(files.parts) == {"transformer", "vae", "text", "control-blur"}
    loaded = load_part(files, "control-blur")
    assert isinstance(loaded, ControlBranch) and loaded.config == TINY_CONTROL and not loaded.training
    assert loaded.base == files.config.transformer and not any(p.requires_grad for p in loaded.parameters())
    expected = {key: value.half().float() for key, value in branch.state_dict().items()}
    assert same(loaded, expected)
    assert {value.dtype for value in load_file(path).values()} == {torch.float16}
    assert model_hash(folder) == before  # the same model, with a branch beside it
    again = new_branch(folder, 2)
    one = part_hash(files, "control-blur")
    save_control(folder, "edge", new_branch(folder, 3), {"steps": 9})
    save_control(folder, "blur", again, {"steps": 6})
    files = find_model(folder)
    assert list(files.config.controls) == ["edge", "blur"] and files.config.training["controls"]["blur"] == {"steps": 6}
    assert same(load_part(files, "control-blur"), {key: v.half().float() for key, v in again.state_dict().items()})
    assert model_hash(folder) == before and part_hash(files, "control-blur") != one


def test_what_does_not_fit_is_not_saved(folder: Path, full_disk) -> None:
    names, config = set(os.listdir(folder)), (folder / "config.json").read_text()
    branch = new_branch(folder, 1)
    with pytest.raises(InputError, match="the control is 'sound'"):
        save_control(folder, "sound", branch, {})
    with pytest.raises(ValueError, match="the branch was not built for the transformer of"):
        save_control(folder, "edge", ControlBranch(DiTConfig(width=48, depth=2, heads=2), TINY_CONTROL), {})
    with full_disk(3000), pytest.raises(InputError, match="control-edge"):
        save_control(folder, "edge", branch, {})
    with torch.no_grad():
        branch.control_blocks[0].after_proj.bias[0] = 1e6
    with pytest.raises(ValueError, match=r"control-edge: control_blocks\.0\.after_proj\.bias is not finite"):
        save_control(folder, "edge", branch, {})
    with pytest.raises(InputError, match="config.json"):
        save_control(folder / "nowhere", "edge", branch, {})
    assert set(os.listdir(folder)) == names and (folder / "config.json").read_text() == config


def test_loading_a_branch_is_strict(folder: Path) -> None:
    path = save_control(folder, "edge", new_branch(folder, 1), {})
    whole, key = load_file(path), "control_blocks.1.after_proj.weight"
    for content, message in (
        ({k: v for k, v in whole.items() if k != key}, f"lacks 1 of {len(whole)} weights: {key}"),
        (whole | {"control_blocks.2.extra": torch.zeros(1)}, r"1 unknown weights: control_blocks\.2\.extra"),
        (whole | {key: whole[key][:3].contiguous()}, rf"another shape: {key} is \[3, 48\].* \[48, 48\]"),
    ):
        save_file(content, path)
        with pytest.raises(InputError, match=message):
            load_part(find_model(folder), "control-edge")
    path.unlink()
    with pytest.raises(InputError, match="control-edge.safetensors: no such file"):
        load_part(find_model(folder), "control-edge")
    with pytest.raises(InputError, match="has no part 'control-seg'; it has transformer, vae, text, control-edge"):
        load_part(find_model(folder), "control-seg")


def test_a_whole_model_keeps_its_branches(folder: Path, tmp_path: Path) -> None:
    save_control(folder, "seg", new_branch(folder, 1), {"steps": 2})
    model = load_model(folder)
    assert set(model.controls) == {"seg"}
    again = load_model(save_model(tmp_path / "copy", model, "# card", torch.float32))
    assert again.config == model.config and same(again.controls["seg"], dict(model.controls["seg"].state_dict()))
    with pytest.raises(ValueError, match="the control branches are not those of the config"):
        save_model(tmp_path / "x", dataclasses.replace(model, controls={}), "# card")
    assert load_model(find_model(folder, controls=())).controls == {}


def test_which_branches_are_found(folder: Path, tmp_path: Path) -> None:
    for seed, kind in enumerate(("edge", "depth")):
        save_control(folder, kind, new_branch(folder, seed), {})
    for asked, expected in ((None, ["edge", "depth"]), (("depth",), ["depth"]), ((), []), ("edge", ["edge"])):
        files = find_model(folder, controls=asked)
        assert list(files.config.controls) == expected
        assert {name for name in files.parts if name.startswith("control-")} == {f"control-{kind}" for kind in expected}
    with pytest.raises(InputError, match="has no control seg; it has edge, depth"):
        find_model(folder, controls=("edge", "seg"))
    with pytest.raises(InputError, match="has no control edge; it has none"):
        find_model(CATALOGUE["predict2.5-2b"].name, controls=["edge"])
    with pytest.raises(InputError, match="the control blur is asked for twice: blur, vis"):
        find_model(folder, controls=("blur", "vis"))
    with pytest.raises(InputError, match="the control is 'Edge'"):
        find_model(folder, controls=("Edge",))


def test_a_branch_from_another_folder_fits_the_same_base_alone(folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
    branch = new_branch(folder, 1)
    path = save_control(folder, "edge", branch, {})
    expected = {key: value.half().float() for key, value in branch.state_dict().items()}
    for where in (folder, path):
        files = find_model(tiny_folder, controls={"edge": where})
        assert files.config.controls == {"edge": TINY_CONTROL} and same(load_part(files, "control-edge"), expected)
    with pytest.raises(InputError, match=f"{folder} has no control seg; it has edge"):
        find_model(tiny_folder, controls={"seg": folder})
    with pytest.raises(InputError, match="is the control branch of edge, asked for is seg"):
        find_model(tiny_folder, controls={"seg": path})
    with pytest.raises(InputError, match="nowhere holds no control branch: allowed are"):
        find_model(tiny_folder, controls={"edge": tmp_path / "nowhere"})
    weights = load_file(folder / "transformer.safetensors")
    weights["blocks.1.mlp.layer2.weight"][5, 7] += 1
    save_file(weights, folder / "transformer.safetensors")
    with pytest.raises(
        InputError, match=r"trained beside another base than the transformer of .* their blocks\.1\.mlp"
    ):
        load_part(find_model(tiny_folder, controls={"edge": folder}), "control-edge")
    assert same(load_part(find_model(folder), "control-edge"), expected)  # its own it is not asked about
