"""Models that are told actions: the published one by name, official files of it and of others, converted and back."""

import dataclasses
import inspect
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import orrery
from orrery.errors import InputError
from orrery.nn.dit import PRESETS, Conditions, DiT, DiTConfig
from orrery.weights import CATALOGUE, ActionConfig, ModelFiles, convert, find_model, load_model, load_part, read_lora
from orrery.weights import merge as merge_loras
from orrery.weights.config import ModelConfig
from orrery.weights.lora import save_lora
from orrery.weights.sources import transformer_shapes
from orrery.weights.tensors import read_tensors

NAME = "predict2.5-2b-action"
FILE = "38c6c645-7d41-4560-8eeb-6f4ddc0e6574_ema_bf16.pt"
SMALL = DiTConfig(width=48, depth=2, heads=2, adaln_rank=8, text_dim=32, context_dim=24)
BRIDGE = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")


def weights(values: int = 28, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Of SMALL told that many numbers of actions a latent frame, nothing at zero; as an official file has them."""
    torch.manual_seed(0)
    state = DiT(dataclasses.replace(SMALL, actions=values)).state_dict()
    return {f"net.{key}": torch.randn(value.shape).to(dtype) * 0.2 for key, value in state.items()}


@pytest.fixture
def found(tiny_folder: Path, tmp_path: Path):
    """found(name, values, **options): `find_model` of an official file of that name, in tmp_path."""

    def find(name: str, values: int = 28, **options: str) -> ModelFiles:
        torch.save(weights(values), tmp_path / name)
        return find_model(tmp_path / name, vae=tiny_folder, text=tiny_folder, **options)

    return find


def test_the_published_one_is_known_without_a_network() -> None:
    config = find_model(NAME).config
    actions = config.actions
    assert actions is not None and actions.names == BRIDGE and actions.dimensions == 7
    assert actions.scale == (20,) * 6 + (1,) and set(actions.mean) == {0} and set(actions.std) == {1}
    assert (actions.window, actions.given, actions.handover) == (4, 1, "frames")
    assert actions.empty_prompt == "encoded" and CATALOGUE[NAME].action_names == BRIDGE
    assert (config.frames, config.resolution, config.fps, config.any_length) == (13, (256, 320), 4, False)
    assert 1 + (actions.window - 1) * config.vae.temporal_factor == config.frames
    sampling = config.sampling
    assert (sampling.solver, sampling.schedule, sampling.shift, sampling.steps) == ("unipc", "shift", 5, 35)
    assert (sampling.guidance, sampling.negative_prompt, sampling.conditional_timestep) == (0, None, None)
    assert config.transformer == dataclasses.replace(PRESETS["2b"], actions=28)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert torch.allclose(actions.told([[0.01] * 6 + [1.0]]), torch.tensor([[0.2] * 6 + [1.0]]))


def test_published_shapes_and_count() -> None:
    """Section 4.6: the base's 569 tensors as they are, and eight of the two MLPs."""
    with torch.device("meta"):
        state, base = DiT(find_model(NAME).config.transformer).state_dict(), DiT(PRESETS["2b"]).state_dict()
    shapes = {key: list(value.shape) for key, value in state.items()}
    assert {key: shape for key, shape in shapes.items() if not key.startswith("action_embedder")} == {
        key: list(value.shape) for key, value in base.items()
    }
    assert {key: shape for key, shape in shapes.items() if key.startswith("action_embedder")} == {
        "action_embedder_B_D.fc1.weight": [8192, 28], "action_embedder_B_D.fc1.bias": [8192],
        "action_embedder_B_D.fc2.weight": [2048, 8192], "action_embedder_B_D.fc2.bias": [2048],
        "action_embedder_B_3D.fc1.weight": [8192, 28], "action_embedder_B_3D.fc1.bias": [8192],
        "action_embedder_B_3D.fc2.weight": [6144, 8192], "action_embedder_B_3D.fc2.bias": [6144],
    }  # fmt: skip
    assert len(state) == 577 and sum(value.numel() for value in state.values()) == 2_126_767_104
    size = 2 * sum(value.numel() for value in state.values()) / 1e9
    assert CATALOGUE[NAME].size / 1e9 == pytest.approx(size, abs=0.01)


def test_an_official_file_by_its_name(found, capsys: pytest.CaptureFixture[str]) -> None:
    files = found(FILE)
    assert files.config.transformer == dataclasses.replace(SMALL, actions=28)
    assert files.config.actions is not None and files.config.actions.names == BRIDGE
    assert files.config.frames == 13 and files.config.sampling.guidance == 0
    state, expected = load_part(files, "transformer", dtype=None).state_dict(), weights()
    assert {f"net.{key}" for key in state} == expected.keys()
    assert all(torch.equal(value, expected[f"net.{key}"]) for key, value in state.items())
    assert capsys.readouterr().err == ""


def test_of_a_file_of_ones_own_a_line_says_what_is_assumed(found, capsys: pytest.CaptureFixture[str]) -> None:
    own = found("mine.pt", 24).config
    assert own.actions == ActionConfig(
        tuple(f"action_{i}" for i in range(6)), (0.0,) * 6, (1.0,) * 6, window=4, empty_prompt="encoded"
    )
    sampled, taken = capsys.readouterr().err.splitlines()
    assert f"sampled like {NAME}, the published model of its kind" in sampled
    assert "24 numbers of actions at once: taken to be 4 actions of 6, one a frame, told as they are" in taken
    seven = found("mine.pt").config.actions  # as wide as the published one, yet nobody says that it is scaled so
    assert seven is not None and seven.names[0] == "action_0" and seven.scale == ()
    assert f"like='{NAME}' takes them as published" in capsys.readouterr().err
    seven = found("mine.pt", like=NAME).config.actions
    assert seven is not None and seven.names == BRIDGE and capsys.readouterr().err == ""
    long = found("mine.pt", 24, like="predict2.5-2b").config
    assert long.actions is not None and (long.frames, long.actions.window) == (93, 24)
    plain = found("mine.pt", 0, like=NAME).config  # a file that is told none
    assert plain.actions is None and plain.transformer.actions == 0 and plain.frames == 13


def test_widths_that_cannot_be_told_apart_are_refused(found) -> None:
    message = (
        r"takes 84 numbers .*: either 12 actions of 7, told to all frames alike \(a variant that is not supported\)"
    )
    with pytest.raises(InputError, match=message + rf", or 4 of 21; like='{NAME}' says the latter"):
        found("mine.pt", 84)
    told = found("mine.pt", 84, like=NAME).config.actions
    assert told is not None and told.dimensions == 21
    with pytest.raises(InputError, match=r"takes 30 numbers of actions at once; allowed is a multiple of 4"):
        found("mine.pt", 30)


def test_loading_is_strict(tiny_folder: Path, tmp_path: Path) -> None:
    table, path = weights(), tmp_path / FILE
    for changed, message in (
        ({k: v for k, v in table.items() if "B_3D" not in k}, r"lacks 4 of 57 weights: action_embedder_B_3D\.fc1\.w"),
        ({k: v for k, v in table.items() if "B_D" not in k}, r"holds 4 unknown weights: action_embedder_B_3D\."),
        (table | {"net.action_embedder_B_4D.fc1.weight": torch.ones(2)}, r"1 unknown weights: action_embedder_B_4D"),
        (
            table | {"net.action_embedder_B_D.fc1.weight": torch.ones(96, 28)},
            r"action_embedder_B_D\.fc1\.weight is \[96, 28\], the config asks for \[192, 28\]",
        ),
    ):
        torch.save(changed, path)
        with pytest.raises(InputError, match=message):
            load_part(find_model(path, vae=tiny_folder, text=tiny_folder), "transformer")
    torch.save(table | {"net.action_embedder_B_D.fc1.weight": torch.ones(3)}, path)
    with pytest.raises(InputError, match="holds no transformer of this family"):
        find_model(path)


def test_there_and_back_bit_for_bit(found, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = convert(found(FILE), tmp_path / "ours", "orrery", ["transformer", "vae", "text"])
    stored = json.loads((folder / "config.json").read_text())
    assert stored["actions"]["names"] == list(BRIDGE) and stored["transformer"]["actions"] == 28
    assert find_model(folder).config.actions == found(FILE).config.actions
    assert all(torch.equal(v, weights()[f"net.{k}"]) for k, v in load_file(folder / "transformer.safetensors").items())
    assert capsys.readouterr().err == ""
    back = read_tensors(convert(find_model(folder), tmp_path / "back.pt", "official"))
    assert "does not say what the numbers of an action are" in capsys.readouterr().err
    expected = weights()
    assert {key for key in back if "pos_embedder" not in key} == expected.keys()
    assert all(torch.equal(back[key], value) for key, value in expected.items())
    stored["actions"] |= {"mean": [0.5] * 7, "low": [-1] * 7, "high": [1] * 7, "names": list("abcdefg")}
    (folder / "config.json").write_text(json.dumps(stored))
    again = convert(find_model(folder), tmp_path / "again", "orrery")
    assert find_model(again).config.actions == find_model(folder).config.actions
    stored["actions"]["names"] = list("abcdef")
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match=r"config\.json: actions: mean has 7 values for 6 names"):
        find_model(folder)
    stored["actions"] = {"names": ["a"], "mean": [0.0], "std": [1.0]}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="takes 28 numbers of actions a latent frame, the config's actions have 4"):
        find_model(folder)
    stored["actions"]["empty_prompt"] = "none"
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InputError, match="actions: empty_prompt is 'none'; allowed are zeros, encoded"):
        find_model(folder)


def test_diffusers_has_none_of_them(found, tmp_path: Path) -> None:
    """Its Cosmos-Predict2.5 is told no actions (a Cosmos 3 that is has other weights): written by us, it could not be
    read. Should a later diffusers know them, this fails, and the layout can be written."""
    cosmos = pytest.importorskip("diffusers.models.transformers.transformer_cosmos")
    options = inspect.signature(cosmos.CosmosTransformer3DModel.__init__).parameters
    assert not [name for name in options if "action" in name]
    for parts in (None, ["transformer"]):
        with pytest.raises(
            InputError, match="diffusers knows no Cosmos-Predict2.5 that is told actions.*orrery or off"
        ):
            convert(found(FILE), tmp_path / "theirs", "diffusers", parts)
    assert sorted(os.listdir(tmp_path)) == [FILE]


@pytest.mark.parametrize("layout", ["peft", "diffusers", "official"])
def test_adapters_of_the_action_embedders(layout: str, found, tmp_path: Path) -> None:
    """Rank 2 beside both MLPs, and beside one layer of a block, in every layout of LoRAs."""
    files = found(FILE)
    network = load_part(files, "transformer", dtype=torch.float32)
    assert isinstance(network, DiT)
    modules = ["action_embedder_B_D.fc1", "action_embedder_B_3D.fc2", "blocks.0.self_attn.q_proj"]
    shapes = transformer_shapes(files.config.transformer)
    prefix = {"peft": "base_model.model.", "diffusers": "transformer.", "official": "net.base_model.model."}[layout]
    end = ".default.weight" if layout == "official" else ".weight"
    torch.manual_seed(1)
    tensors = {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        name = module
        if layout == "diffusers":
            name = module.replace("blocks.0.self_attn.q_proj", "transformer_blocks.0.attn1.to_q")
        tensors[f"{prefix}{name}.lora_A{end}"] = torch.randn(2, columns)
        tensors[f"{prefix}{name}.lora_B{end}"] = torch.randn(rows, 2)
    if layout == "official":
        lora = None
        whole = {k.replace("net.", "net.base_model.model.", 1): v for k, v in weights().items()}
        whole = {
            k.replace(".weight", ".base_layer.weight").replace(".bias", ".base_layer.bias")
            if any(f".{module}." in k for module in modules)
            else k: v
            for k, v in whole.items()
        }
        torch.save(whole | tensors, tmp_path / FILE)
        merged = load_part(files, "transformer", dtype=torch.float32).state_dict()
    else:
        save_file(tensors, tmp_path / "lora.safetensors")
        lora = read_lora(tmp_path / "lora.safetensors", shapes)
        merge_loras(network, [lora])
        merged = network.state_dict()
    expected = weights()
    for module in modules:
        a, b = (t for k, t in tensors.items() if module.split(".")[-1] in k or ".to_q." in k and "q_proj" in module)
        whole_weight = expected[f"net.{module}.weight"].float() + b @ a
        tolerance = 0.05 if layout == "official" else 1e-4  # the official file's are merged in bfloat16
        assert torch.allclose(merged[f"{module}.weight"], whole_weight, atol=tolerance), module
    if lora is not None:
        again = read_lora(save_lora(tmp_path / "saved.safetensors", lora, "diffusers"), shapes)
        assert again.hash == lora.hash


def test_by_name_from_a_hub_and_without_actions(
    hub, qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`World.generate` on a model that could be told actions tells it none."""
    from orrery.nn.vae import PRESETS as VAES
    from orrery.nn.vae import VAE, VAEConfig
    from orrery.weights import pipeline_dir, sources
    from orrery.weights.catalogue import COMPONENTS

    entry, served = CATALOGUE[NAME], tmp_path / "served"
    assert entry.weights is not None and entry.weights.file is not None
    (served / entry.weights.file).parent.mkdir(parents=True)
    torch.save(weights(), served / entry.weights.file)
    torch.save(VAE(VAEConfig(base=8)).state_dict(), served / "tokenizer.pth")
    hub.folders[entry.weights.repo] = served
    hub.folders[COMPONENTS["reason1-7b"].repo] = qwen_folder
    for name, files in COMPONENTS.items():
        monkeypatch.setitem(COMPONENTS, name, dataclasses.replace(files, revision=None))
    monkeypatch.setitem(PRESETS, "2b", SMALL)
    monkeypatch.setitem(VAES, "wan2.1", dataclasses.replace(VAES["wan2.1"], base=8))
    monkeypatch.setitem(sources.TEXTS, "reason1-7b", pipeline_dir.text_config(qwen_folder, qwen_folder))
    world = orrery.load(NAME, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not of its native length, nor of another size: it names no others
        video = world.generate("a red ball falls", size=(32, 48), steps=2)
    assert video.frames.shape == (13, 32, 48, 3) and video.fps == 4
    network, actions = world.model.transformer, torch.zeros(1, 3, 28)
    x, text = torch.randn(1, 16, 4, 4, 6), torch.randn(1, 5, 32)
    none, zero = (network(x, torch.tensor([500.0]), Conditions(text, actions=each)) for each in (None, actions))
    assert none.shape == zero.shape and not torch.allclose(none, zero)  # zeros are an action; None is none


def test_what_the_command_line_says_of_them(capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    from orrery.cli.main import main

    def said(*arguments: str) -> str:
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        assert not end.value.code
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "250")
    listed = next(line for line in said("models").splitlines() if line.startswith(NAME))
    assert "not downloaded" in listed and listed.rstrip().endswith("actions: x, y, z, roll, pitch, yaw, gripper")
    one = said("models", NAME)
    assert "7 numbers a frame, those of 4 frames before a latent frame (28): x, y, z, roll, pitch, yaw, gripper" in one
    assert "4 latent frames (13 frames), at most 1 given; a rollout goes on from the latest frame, encoded anew" in one
    assert "scale 20, 20, 20, 20, 20, 20, 1\n" in one and "what the text encoder makes of no words" in one
    assert "actions" not in said("models", "mini")
    planned = said("plan", NAME, "--memory", "16")
    assert "256x320, 13 frames" in planned and "28 a latent frame; a rollout sees 4 latent frames at once" in planned


def test_a_model_that_is_told_actions_has_a_window(tiny_folder: Path) -> None:
    assert load_model(tiny_folder).config.actions is None
    for changes, message in (
        ({"given": 4}, r"given is 4, allowed is 1 to window - 1 = 3"),
        ({"handover": "pixels"}, "handover is 'pixels'; allowed are latents, frames"),
        ({"std": (0.0,)}, "std above 0"),
        ({"names": (), "mean": (), "std": ()}, "names is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            ActionConfig(**{"names": ("a",), "mean": (0.0,), "std": (1.0,)} | changes)
