"""Control networks of diffusers: what it saved loads here, keys and values equal; what we write loads there whole."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orrery.errors import InputError
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.weights import convert, find_model, load_part
from orrery.weights.layouts import IMAGE_KEYS, diffusers_control_keys, diffusers_transformer_key

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pipelines = pytest.importorskip("diffusers.pipelines.cosmos.pipeline_cosmos2_5_transfer")

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONTROL = ControlConfig(blocks=2, every=3, channels=32)


class Unguarded:
    """In place of the guardrail, which needs models of its own."""

    def to(self, device):
        return self


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Nothing at zero or one, in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.2)
    return module.to(torch.bfloat16)


def new_pipeline(qwen_folder: Path, image: bool):
    """Tiny, random, with a control network that has the base's copies, as the published conversion makes them."""
    shared = dict(
        num_attention_heads=2, attention_head_dim=24, text_embed_dim=24, adaln_lora_dim=8, rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None, use_crossattn_projection=True, crossattn_proj_in_channels=32,
        encoder_hidden_states_channels=24, img_context_dim_in=20 if image else None, img_context_dim_out=48,
    )  # fmt: skip
    transformer = diffusers.CosmosTransformer3DModel(
        in_channels=17, out_channels=16, num_layers=5, controlnet_block_every_n=3, **shared
    )
    controlnet = diffusers.CosmosControlNetModel(
        n_controlnet_blocks=2, in_channels=34, latent_channels=18, model_channels=48, **shared
    )
    transformer, controlnet = randomised(transformer, 0), randomised(controlnet, 1)
    theirs = {key.replace("patch_embed.", "patch_embed_base.", 1): v for key, v in transformer.state_dict().items()}
    controlnet.load_state_dict({key: v for key, v in theirs.items() if key in controlnet.state_dict()}, strict=False)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True]
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0, final_sigmas_type="zero"
    )
    return diffusers.Cosmos2_5_TransferPipeline(
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(qwen_folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(qwen_folder),
        transformer=transformer, vae=vae, scheduler=scheduler, controlnet=controlnet, safety_checker=Unguarded(),
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["text", "text+image"])
def saved(request, qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random Cosmos2_5_TransferPipeline that diffusers saved."""
    folder = tmp_path_factory.mktemp("transfer") / "pipeline"
    pipeline = new_pipeline(qwen_folder, request.param)
    pipeline.register_modules(safety_checker=None)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def image_width(folder: Path) -> int:
    return json.loads((folder / "transformer" / "config.json").read_text())["img_context_dim_in"] or 0


def test_a_directory_that_diffusers_saved(saved: Path) -> None:
    with pytest.raises(InputError, match="pipeline holds a control branch and does not say of what: .*--control edge"):
        find_model(saved)
    files = find_model(saved, controls=("seg",))
    config, image = files.config, image_width(saved)
    assert config.controls == {"seg": CONTROL} and config.transformer.image_context == image
    assert (config.sampling.guidance, config.sampling.steps, config.sampling.schedule) == (3, 36, "shift")
    assert config.sampling.conditional_timestep == 0.1 and config.sampling.exact_times
    assert ("image" in files.parts) == bool(image)
    base, branch = (load_part(files, name, dtype=None).state_dict() for name in ("transformer", "control-seg"))
    stored = load_file(saved / "transformer" / WEIGHTS)
    assert {diffusers_transformer_key(key) for key in base} == set(stored)
    assert all(torch.equal(value, stored[diffusers_transformer_key(key)]) for key, value in base.items())
    own, copies = diffusers_control_keys(branch, base)
    stored = load_file(saved / "controlnet" / WEIGHTS)
    assert {*own.values(), *copies.values()} == set(stored)
    assert all(torch.equal(branch[ours], stored[theirs]) for ours, theirs in own.items())
    assert any(IMAGE_KEYS.search(key) for key in own) == bool(image)
    assert find_model(saved, controls=()).config.controls == {}


def loads_whole(kind: type, folder: Path):
    """A model that diffusers loads with nothing missing, unexpected or of another shape."""
    network, told = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), told
    return network


@pytest.mark.parametrize("through", ["diffusers", "orrery"])
def test_what_we_write_loads_in_diffusers(through: str, saved: Path, tmp_path: Path) -> None:
    """diffusers -> (ours ->) diffusers: its own files again, bit for bit, dtype and all."""
    files = find_model(saved, controls=("edge",))
    if through == "orrery":
        files = find_model(convert(files, tmp_path / "ours", "orrery"), controls=("edge",))
    whole = convert(files, tmp_path / "pipeline", "diffusers")
    kinds = {"controlnet": diffusers.CosmosControlNetModel, "transformer": diffusers.CosmosTransformer3DModel}
    for sub, kind in kinds.items():
        network, before = loads_whole(kind, whole / sub), loads_whole(kind, saved / sub)
        state, stored, written = network.state_dict(), *(load_file(root / sub / WEIGHTS) for root in (saved, whole))
        assert state.keys() == stored.keys() == written.keys()
        for key, value in stored.items():
            assert written[key].dtype == value.dtype == torch.bfloat16 and torch.equal(written[key], value)
            assert torch.equal(state[key].to(value.dtype), value)
        for key, value in before.config.items():  # the width that image tokens would get means nothing without any
            if not key.startswith("_") and (key != "img_context_dim_out" or image_width(saved)):
                assert network.config[key] == value or list(network.config[key]) == list(value), key
    pipeline = diffusers.Cosmos2_5_TransferPipeline.from_pretrained(whole, safety_checker=Unguarded())
    assert type(pipeline.controlnet) is diffusers.CosmosControlNetModel
    assert pipeline.transformer.config.controlnet_block_every_n == 3
    again = find_model(whole)  # our orrery.json says of what it is
    assert again.config.controls == {"edge": CONTROL} and again.config.transformer == files.config.transformer


def test_a_control_network_by_itself(saved: Path, tmp_path: Path, capsys) -> None:
    """Of a pipeline's folder, or alone; beside the model's own, both lose the image context."""
    base = find_model(saved, controls=())
    alone = Path(shutil.copytree(saved / "controlnet", tmp_path / "depth"))
    own = load_part(find_model(saved, controls=("seg",)), "control-seg", dtype=None).state_dict()
    for where, every in ((saved, 3), (alone, 2)):  # alone it does not say how far apart it acts: spread evenly
        files = find_model(saved, controls={"depth": where})
        assert files.config.controls == {"depth": dataclasses.replace(CONTROL, every=every)}
        state = load_part(files, "control-depth", dtype=None).state_dict()
        assert all(torch.equal(value, own[key]) for key, value in state.items()) and state.keys() == own.keys()
    capsys.readouterr()
    both = find_model(saved, controls={"edge": None, "depth": alone})
    assert ("without image context" in capsys.readouterr().err) == bool(base.config.transformer.image_context)
    assert list(both.config.controls) == ["edge", "depth"] and both.config.transformer.image_context == 0
    expected = {key for key in own if not IMAGE_KEYS.search(key)}
    for name in ("control-edge", "control-depth"):
        assert load_part(both, name, dtype=None).state_dict().keys() == expected
    assert not any(IMAGE_KEYS.search(key) for key in load_part(both, "transformer").state_dict())


def test_a_control_network_of_another_base_is_refused(folder: Path, saved: Path, capsys) -> None:
    path = folder / "controlnet" / WEIGHTS
    weights = load_file(path)
    weights["patch_embed_base.proj.weight"][3, 4] += 1
    save_file(weights, path)
    with pytest.raises(InputError, match=r"trained beside another base .* their x_embedder\.proj\.1\.weight differ"):
        load_part(find_model(folder, controls=("edge",)), "control-edge")
    if not image_width(saved):
        return
    weights = load_file(saved / "controlnet" / WEIGHTS)
    weights["img_context_proj.0.weight"][1, 2] += 1
    save_file(weights, path)
    load_part(find_model(folder, controls=("edge",)), "control-edge")
    assert "its projection of image tokens differs from that of" in capsys.readouterr().err


def test_a_control_network_is_loaded_strictly(folder: Path) -> None:
    path = folder / "controlnet" / WEIGHTS
    whole, key = load_file(path), "control_blocks.0.before_proj.weight"
    save_file({name: value for name, value in whole.items() if name != key}, path)
    with pytest.raises(InputError, match=rf"lacks 1 of \d+ weights: {key}"):
        load_part(find_model(folder, controls=("edge",)), "control-edge")
    save_file(whole | {"learnable_pos_embed.pos_emb_t": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="1 unknown weights: learnable_pos_embed"):
        load_part(find_model(folder, controls=("edge",)), "control-edge")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "WanTransformer3DModel"}, "is of a WanTransformer3DModel; allowed is CosmosControlNetModel"),
        ({"extra_pos_embed_type": "learnable"}, "extra_pos_embed_type is 'learnable': learnt positions are not"),
        ({"n_controlnet_blocks": 3}, r"control edge: a branch at base blocks \(0, 3, 6\) needs a deeper base than 5"),
        ({"in_channels": 2}, "channels must be at least 1, got 0"),
    ],
)
def test_a_config_that_cannot_be(change: dict, message: str, folder: Path) -> None:
    path = folder / "controlnet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        find_model(folder, controls=("edge",))


def test_a_branch_of_ours_becomes_a_control_network(saved: Path, tmp_path: Path) -> None:
    """Only the branch: a folder with controlnet/ that diffusers and we load, beside the base that stays where it is."""
    files = find_model(saved, controls=("edge",))
    even = dataclasses.replace(files.config, controls={"edge": dataclasses.replace(CONTROL, every=2)})
    with pytest.raises(InputError, match="a control network of diffusers by itself does not say where a branch acts"):
        convert(files, tmp_path / "x", "diffusers", ("control-edge",))
    written = convert(dataclasses.replace(files, config=even), tmp_path / "d", "diffusers", ("control-edge",))
    assert {path.name for path in written.iterdir()} >= {"controlnet"} and not (written / "transformer").exists()
    state = loads_whole(diffusers.CosmosControlNetModel, written / "controlnet").state_dict()
    stored = load_file(saved / "controlnet" / WEIGHTS)
    assert state.keys() == stored.keys() and all(torch.equal(state[key].to(v.dtype), v) for key, v in stored.items())
    again = find_model(saved, controls={"edge": written})
    assert isinstance(load_part(again, "control-edge"), ControlBranch) and again.config.controls == even.controls
