"""Official .pt, diffusers directories and our folders: read strictly, written back bit for bit, never executed."""

import dataclasses
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orrery.errors import InputError
from orrery.nn.dit import PRESETS, DiT, DiTConfig
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE
from orrery.weights import CATALOGUE, ModelFiles, convert, find_model, load_part
from orrery.weights.catalogue import entry_of_file
from orrery.weights.layouts import diffusers_transformer_key, official_buffers
from orrery.weights.tensors import read_tensors

SMALL = DiTConfig(width=48, depth=2, heads=2, adaln_rank=8, text_dim=32, context_dim=24)


def transformer_weights(config: DiTConfig = SMALL, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Random throughout, none zero."""
    torch.manual_seed(0)
    return {key: torch.randn(value.shape).to(dtype) * 0.1 for key, value in DiT(config).state_dict().items()}


def official(config: DiTConfig = SMALL, prefix: str = "net.") -> dict[str, object]:
    """What an official file holds: weights, rotary tables, counters, TransformerEngine's extra state."""
    table: dict[str, object] = dict(transformer_weights(config)) | official_buffers(config)
    table |= {"accum_iteration": torch.tensor(23000), "accum_video_sample_counter": torch.tensor(77)}
    table |= {"accum_image_sample_counter": torch.tensor(5), "accum_train_in_hours": torch.tensor(1.5)}
    table["blocks.0.self_attn.q_norm._extra_state"] = io.BytesIO(b"te")
    table["t_embedding_norm._extra_state"] = torch.zeros(0, dtype=torch.uint8)
    return {prefix + key: value for key, value in table.items()}


@pytest.fixture(scope="module")
def parts(tiny_folder: Path) -> dict[str, Path]:
    """VAE and text encoder that fit SMALL, from the tiny model (text of width 32)."""
    return {"vae": tiny_folder, "text": tiny_folder}


def found(path: Path, parts: dict[str, Path], **more: str) -> ModelFiles:
    return find_model(path, **parts, **more)


def same(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


def test_published_parameter_counts_and_keys() -> None:
    """Specification, sections 2.1 and 7: counts exact, every key with its shape."""
    for preset, total, keys, width in (("2b", 2_059_174_912, 569, 2048), ("14b", 14_368_047_104, 729, 5120)):
        with torch.device("meta"):
            state = DiT(PRESETS[preset]).state_dict()
        assert sum(value.numel() for value in state.values()) == total and len(state) == keys
        assert len(official_buffers(PRESETS[preset])) == 3
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        expected = {
            "x_embedder.proj.1.weight": (width, 72),
            "t_embedder.1.linear_1.weight": (width, width),
            "t_embedder.1.linear_2.weight": (3 * width, width),
            "t_embedding_norm.weight": (width,),
            "crossattn_proj.0.weight": (1024, 100352),
            "crossattn_proj.0.bias": (1024,),
            "final_layer.adaln_modulation.1.weight": (256, width),
            "final_layer.adaln_modulation.2.weight": (2 * width, 256),
            "final_layer.linear.weight": (64, width),
        }
        for i in range(PRESETS[preset].depth):
            block = f"blocks.{i}"
            for name in ("q_proj", "k_proj", "v_proj", "output_proj"):
                expected[f"{block}.self_attn.{name}.weight"] = (width, width)
                cross = 1024 if name in ("k_proj", "v_proj") else width
                expected[f"{block}.cross_attn.{name}.weight"] = (width, cross)
            for attention in ("self_attn", "cross_attn"):
                expected |= {f"{block}.{attention}.{norm}.weight": (128,) for norm in ("q_norm", "k_norm")}
            expected[f"{block}.mlp.layer1.weight"] = (4 * width, width)
            expected[f"{block}.mlp.layer2.weight"] = (width, 4 * width)
            for part in ("self_attn", "cross_attn", "mlp"):
                expected[f"{block}.adaln_modulation_{part}.1.weight"] = (256, width)
                expected[f"{block}.adaln_modulation_{part}.2.weight"] = (3 * width, 256)
        assert shapes == expected
    with torch.device("meta"):
        vae = VAE(VAES["wan2.1"])
    assert sum(weight.numel() for weight in vae.parameters()) == 126_892_531 and len(vae.state_dict()) == 194


def test_every_published_model_can_be_found_without_a_network() -> None:
    published = [entry for entry in CATALOGUE.values() if entry.weights]
    assert len(published) == 21
    for entry in published:
        if entry.unsupported:
            with pytest.raises(InputError, match=f"{entry.name!r} is not supported yet: it needs {entry.unsupported}"):
                find_model(entry.name)
            continue
        files = find_model(entry.name)
        native = (13, (256, 320), 4) if entry.actions else (93, (704, 1280), 16)
        assert (files.config.frames, files.config.resolution, files.config.fps) == native
        branches = {f"control-{kind}" for kind in entry.kinds}
        assert set(files.parts) - {"image"} == {"transformer", "vae", "text"} | branches
        assert {files.parts[name].layout for name in ("transformer", *branches)} == {"official"}
    post, pre, few = (find_model(f"predict2.5-2b{end}").config for end in ("", "-pretrained", "-distilled"))
    assert (post.sampling.schedule, post.sampling.conditional_timestep) == ("karras", 0.1)
    assert (pre.sampling.schedule, pre.sampling.shift, pre.sampling.conditional_timestep) == ("shift", 5, None)
    assert (few.sampling.solver, few.sampling.steps, few.sampling.guidance) == ("renoise", 4, 0)
    assert not few.transformer.fp32_modulation and few.text_only and not post.text_only
    assert find_model("predict2.5-14b").config.transformer.width == 5120
    assert find_model("predict2.5-14b").config.sampling.schedule == "shift"  # post-trained, yet not Karras


@pytest.mark.parametrize("prefix", ["net.", "net_ema.", ""])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "module"])
def test_official_files_in_every_wrapping(prefix, wrapper, parts, tmp_path: Path) -> None:
    table: dict = official(prefix=prefix)
    path = tmp_path / "model.pt"
    torch.save(table if wrapper is None else {wrapper: table, "iteration": 3}, path)
    files = found(path, parts)
    assert files.config.transformer == dataclasses.replace(SMALL)
    assert same(load_part(files, "transformer", dtype=None), transformer_weights())
    assert files.config.training["official"]["accum_iteration"] == 23000


def test_averaged_weights_win(parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = {key: value + 1 if isinstance(value, torch.Tensor) else value for key, value in official().items()}
    torch.save(trained | official(prefix="net_ema."), tmp_path / "both.pt")
    assert same(load_part(found(tmp_path / "both.pt", parts), "transformer", dtype=None), transformer_weights())
    assert "the averaged ones are taken" in capsys.readouterr().err


def test_an_unknown_official_file_is_sampled_by_its_size_aloud(parts, tmp_path: Path, capsys) -> None:
    torch.save(official(), tmp_path / "mine.pt")
    assert found(tmp_path / "mine.pt", parts).config.sampling.schedule == "karras"
    assert "mine.pt: sampled like predict2.5-2b" in capsys.readouterr().err
    like = found(tmp_path / "mine.pt", parts, like="predict2.5-2b-pretrained")
    assert like.config.sampling.schedule == "shift" and capsys.readouterr().err == ""
    name = "d20b7120-df3e-4911-919d-db6e08bad31c_ema_bf16.pt"
    torch.save(official(), tmp_path / name)
    assert found(tmp_path / name, parts).config.sampling.schedule == "shift"  # the pre-trained one, by its name
    entry = entry_of_file(Path("x/575edf0f-d973-4c74-b52c-69929a08d0a5_ema_bf16.pt"))
    assert entry is not None and entry.name == "predict2.5-2b-distilled"


@pytest.mark.parametrize(
    "key, what",
    [
        ("view_embeddings.weight", "a multi-view model"),
        ("blocks.0.cam_encoder.weight", "a camera-conditioned model"),
        ("blocks.0.cross_view_attn.q_proj.weight", "a multi-view model"),
        ("input_hint_block.0.weight", "a multi-view model"),
        ("control_embedder.3.proj.1.weight", "a file of several control branches"),
    ],
)
def test_variants_are_refused_by_what_they_are(key, what, parts, tmp_path: Path) -> None:
    torch.save(official() | {f"net.{key}": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(InputError, match=f"is {what}.*not supported yet.*{key}"):
        found(tmp_path / "model.pt", parts)


def test_loading_is_strict(parts, tmp_path: Path) -> None:
    table = official()
    gone = [
        f"net.blocks.1.{name}.weight" for name in ("mlp.layer1", "mlp.layer2", "self_attn.k_proj", "self_attn.v_proj")
    ]
    torch.save({key: value for key, value in table.items() if key not in gone}, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt lacks 4 of 49 weights: blocks\.1\.\S+, \S+, \S+, \.\.\."):
        load_part(found(tmp_path / "a.pt", parts), "transformer")
    torch.save(table | {"net.blocks.0.extra.weight": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(InputError, match=r"b\.pt holds 1 unknown weights: blocks\.0\.extra\.weight"):
        load_part(found(tmp_path / "b.pt", parts), "transformer")
    torch.save(table | {"net.blocks.1.cross_attn.q_norm.weight": torch.zeros(3)}, tmp_path / "c.pt")
    with pytest.raises(InputError, match=r"1 weights have another shape: .*q_norm\.weight is \[3\].* \[24\]"):
        load_part(found(tmp_path / "c.pt", parts), "transformer")


@pytest.mark.parametrize("route", ["official", "diffusers", "orrery"])
def test_round_trips_are_exact(route, parts, tmp_path: Path) -> None:
    """official -> route -> ours, and back to official: every tensor bit for bit, counters included."""
    torch.save(official(), tmp_path / "first.pt")
    step = tmp_path / ("model.pt" if route == "official" else "model")
    whole = {} if route == "official" else {"parts": ("transformer",)}
    if route == "orrery":
        whole = {"parts": ("transformer", "vae", "text")}
    files = found(tmp_path / "first.pt", parts)
    convert(files, step, route, **whole)
    again = find_model(step, **({} if route == "orrery" else parts))
    assert same(load_part(again, "transformer", dtype=None), transformer_weights())
    convert(again, tmp_path / "last.pt", "official")
    one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=False) for name in ("first", "last"))
    tensors = {key for key in one if not key.endswith("_extra_state")}
    assert tensors == set(two)
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in tensors)


def test_wans_vae_in_every_format(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = VAES["wan2.1"]
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in VAE(config).state_dict().items()}
    weights = {key: torch.randn(shape, dtype=torch.bfloat16) for key, shape in shapes.items()}
    torch.save(weights, tmp_path / "Wan2.1_VAE.pth")
    files = find_model("predict2.5-2b", vae=tmp_path / "Wan2.1_VAE.pth")
    assert same(load_part(files, "vae", dtype=None), weights)
    convert(files, tmp_path / "d", "diffusers", ("vae",))
    again = find_model("predict2.5-2b", vae=tmp_path / "d" / "vae")
    assert again.config.vae == config and same(load_part(again, "vae", dtype=None), weights)
    convert(again, tmp_path / "back.pth", "official", ("vae",))
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back.keys() == weights.keys() and all(torch.equal(back[key], weights[key]) for key in back)


def test_a_transformer_in_diffusers_names_in_one_file(parts, tmp_path: Path) -> None:
    renamed = {diffusers_transformer_key(key): value for key, value in transformer_weights().items()}
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    files = found(tmp_path / "diffusion_pytorch_model.safetensors", parts)
    assert same(load_part(files, "transformer", dtype=None), transformer_weights())


def test_shards(tmp_path: Path) -> None:
    weights = {f"k{i}": torch.full((2,), float(i)) for i in range(4)}
    names = {key: f"model-0000{1 + i // 2}-of-00002.safetensors" for i, key in enumerate(weights)}
    for name in set(names.values()):
        save_file({key: value for key, value in weights.items() if names[key] == name}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    assert {key: value.tolist() for key, value in read_tensors(tmp_path).items()} == {
        key: value.tolist() for key, value in weights.items()
    }
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="the shard model-00002-of-00002.safetensors is missing"):
        read_tensors(tmp_path)
    index.write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    with pytest.raises(InputError, match="is not a file beside it"):
        read_tensors(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_in_it_is_not_run(zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bomb.pt"
    if zipped:
        torch.save({"net.x": torch.zeros(2), "hook": Bomb()}, path)
    else:
        path.write_bytes(pickle.dumps({"hook": Bomb()}, protocol=2))
    with pytest.raises(InputError, match=r"bomb\.pt: it wants to run \S*mkdir; .* nothing was run") as error:
        read_tensors(path)
    assert not (tmp_path / "exploded").exists() and "\n" not in str(error.value)


def broken(path: Path) -> None:
    """Flip bytes in the middle of the largest record."""
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    path.write_bytes(bytes(content))


def test_damaged_torch_files(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"net.a": torch.randn(200, 200), "net.b": torch.randn(3)}, path)
    whole = path.read_bytes()
    assert set(read_tensors(path)) == {"net.a", "net.b"}
    broken(path)
    with pytest.raises(InputError, match=r"model\.pt: it is damaged, 1 of \d+ records fail their checksum"):
        read_tensors(path)
    for size in (len(whole) // 2, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"model\.pt: it was cut short or is damaged"):
            read_tensors(path)


def test_a_file_without_checksums_is_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_tensors(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2, 3, 4]


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.randn(100)}, path)
    whole = path.read_bytes()
    for content in (whole[:-7], whole[:20], whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*a\.safetensors"):
            read_tensors(path)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "it is a web page saved under that name"),
        (b"\n<html lang=en>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
        (b"", "the file is empty"),
        (b"\x80\x02}q\x00.", None),
        (b"hello world, these are no weights", "it is no torch checkpoint, or damaged"),
    ],
)
def test_what_is_no_checkpoint(content: bytes, message: str | None, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message or "model.pt") as error:
        read_tensors(path)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.pt: no such file"):
        read_tensors(tmp_path / "none.pt")
    with pytest.raises(InputError, match="it holds none of diffusion_pytorch_model.safetensors"):
        read_tensors(tmp_path)
    (tmp_path / "x.gguf").write_bytes(b"GGUF" * 100)
    with pytest.raises(InputError, match="neither a safetensors file nor a torch checkpoint"):
        read_tensors(tmp_path / "x.gguf")


def test_convert_refuses_before_it_writes(parts, tmp_path: Path, tiny_folder: Path) -> None:
    mini = find_model(tiny_folder)
    with pytest.raises(InputError, match="diffusers knows no VAE with temporal_patch = 4"):
        convert(mini, tmp_path / "d", "diffusers")
    with pytest.raises(InputError, match="an official file ends in"):
        convert(mini, tmp_path / "x.bin2", "official")
    with pytest.raises(InputError, match="the format is 'onnx'; allowed are orrery, diffusers, official"):
        convert(mini, tmp_path / "x", "onnx")
    with pytest.raises(InputError, match="a model folder needs its vae, text"):
        convert(mini, tmp_path / "x", "orrery", ("transformer",))
    assert os.listdir(tmp_path) == []
