"""Control branches in official files, by name from a hub, and converted; the encoder of reference images."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orrery.errors import InputError
from orrery.kinds import KINDS
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.nn.dit import PRESETS as TRANSFORMERS
from orrery.nn.dit import DiT, DiTConfig
from orrery.nn.image import ImageEncoder
from orrery.weights import (
    CATALOGUE,
    convert,
    find_model,
    load_model,
    load_part,
    model_hash,
    pipeline_dir,
    sources,
)
from orrery.weights.catalogue import control_of_file
from orrery.weights.layouts import IMAGE_KEYS, official_buffers

BASE = DiTConfig(width=48, depth=4, heads=2, adaln_rank=8, text_dim=32, context_dim=24, image_context=20)
PLAIN = dataclasses.replace(BASE, image_context=0)
CONTROL = ControlConfig(blocks=2, every=2, channels=32)
EDGE, DEPTH = (f"{CATALOGUE['transfer2.5-2b'].controls[kind].file}".rpartition("/")[2] for kind in ("edge", "depth"))


def drawn(shapes: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """Random numbers throughout, none zero, in bfloat16."""
    g = torch.Generator().manual_seed(seed)
    return {key: (torch.randn(value.shape, generator=g) * 0.2).bfloat16() for key, value in shapes.items()}


def base_weights(config: DiTConfig = BASE, image_seed: int = 0) -> dict[str, torch.Tensor]:
    """The same base for any seed but for its image context, as in the published files."""
    with torch.device("meta"):
        state = DiT(config).state_dict()
    plain = {key: value for key, value in state.items() if not IMAGE_KEYS.search(key)}
    image = {key: value for key, value in state.items() if key not in plain}
    return drawn(plain, 100) | drawn(image, 200 + image_seed)


def branch_weights(config: DiTConfig = BASE, seed: int = 0) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state = ControlBranch(config, CONTROL).state_dict()
    return drawn(state, 300 + seed)


def official_file(path: Path, config: DiTConfig = BASE, seed: int = 0) -> Path:
    """A published file: base, branch, tables, counters and extra state under one prefix."""
    table: dict = base_weights(config, seed) | branch_weights(config, seed) | official_buffers(config)
    table |= {"accum_iteration": torch.tensor(7), "control_blocks.0.self_attn.q_norm._extra_state": torch.zeros(0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({f"net.{key}": value for key, value in table.items()}, path)
    return path


def same(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = network.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[key], weights[key]) for key in weights)


def without_image(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if not IMAGE_KEYS.search(key)}


@pytest.fixture
def parts(tiny_folder: Path) -> dict[str, Path]:
    """VAE and text encoder that fit BASE (text of width 32)."""
    return {"vae": tiny_folder, "text": tiny_folder}


# Official files


def test_an_official_file_is_base_and_branch(parts, tmp_path: Path, capsys) -> None:
    path = official_file(tmp_path / EDGE)
    assert control_of_file(path) == "edge"
    files = find_model(path, **parts)
    assert files.config.transformer == dataclasses.replace(BASE) and files.config.controls == {"edge": CONTROL}
    assert same(load_part(files, "transformer", dtype=None), base_weights())
    assert same(load_part(files, "control-edge", dtype=None), branch_weights())
    sampling = files.config.sampling
    assert (sampling.guidance, sampling.steps, sampling.schedule, sampling.shift) == (3, 35, "shift", 5)
    assert sampling.solver == "unipc" and sampling.conditional_timestep is None
    assert "video game" in (sampling.negative_prompt or "") and files.parts["image"].layout == "siglip2"
    assert files.config.training["official"]["accum_iteration"] == 7
    assert capsys.readouterr().err == ""
    alone = find_model(path, **parts, controls=())
    assert alone.config.transformer == PLAIN and alone.config.controls == {} and "image" not in alone.parts
    assert same(load_part(alone, "transformer", dtype=None), without_image(base_weights()))
    assert "without image context: it belongs to a control branch, and none is asked for" in capsys.readouterr().err
    with pytest.raises(InputError, match="is the control branch of edge, asked for is seg"):
        find_model(path, **parts, controls=("seg",))
    bare = dataclasses.replace(files, config=dataclasses.replace(files.config, controls={}))
    assert model_hash(files) == model_hash(bare) != model_hash(alone)


def test_a_file_of_another_name_is_asked_what_it_is(parts, tmp_path: Path, capsys) -> None:
    path = official_file(tmp_path / "mine.pt")
    with pytest.raises(InputError, match=r"mine\.pt holds a control branch and does not say of what: .*--control edge"):
        find_model(path, **parts)
    files = find_model(path, **parts, controls=["vis"])
    assert "mine.pt: sampled like transfer2.5-2b" in capsys.readouterr().err
    assert files.config.controls == {"blur": CONTROL}
    assert same(load_part(files, "control-blur", dtype=None), branch_weights())
    like = find_model(path, **parts, controls=["vis"], like="transfer2.5-2b-edge-distilled")
    assert like.config.sampling.steps == 4 and like.config.transformer.image_context == 20
    with pytest.raises(InputError, match="holds one control branch, asked for are edge, seg: say where the others are"):
        find_model(path, **parts, controls=("edge", "seg"))


def test_ignorable_keys_aside_an_official_branch_is_strict(parts, tmp_path: Path) -> None:
    path = official_file(tmp_path / EDGE)
    table = torch.load(path, weights_only=True)
    torch.save(table | {"net.control_blocks.0.extra": torch.zeros(1)}, path)
    with pytest.raises(InputError, match=r"1 unknown weights: control_blocks\.0\.extra"):
        load_part(find_model(path, **parts), "control-edge")
    load_part(find_model(path, **parts), "transformer")
    torch.save({key: value for key, value in table.items() if "control_blocks.1.cross_attn.k_img" not in key}, path)
    with pytest.raises(InputError, match=r"lacks 2 of \d+ weights: control_blocks\.1\.cross_attn\.k_img"):
        load_part(find_model(path, **parts), "control-edge")
    torch.save({key: value for key, value in table.items() if "control_embedder" not in key}, path)
    with pytest.raises(InputError, match="holds no whole control branch: it lacks 'control_embedder"):
        find_model(path, **parts)


def test_several_files_share_one_base_and_lose_image_context(parts, tmp_path: Path, capsys) -> None:
    edge, depth = official_file(tmp_path / EDGE, seed=1), official_file(tmp_path / DEPTH, seed=2)
    files = find_model(edge, **parts, controls={"depth": depth, "edge": None})
    note = capsys.readouterr().err
    assert note.count("without image context: it belongs to one branch alone, and several are asked for") == 1
    assert files.config.transformer == PLAIN and list(files.config.controls) == ["edge", "depth"]
    assert same(load_part(files, "transformer", dtype=None), without_image(base_weights(BASE, 1)))
    assert same(load_part(files, "control-edge", dtype=None), without_image(branch_weights(BASE, 1)))
    assert same(load_part(files, "control-depth", dtype=None), without_image(branch_weights(BASE, 2)))
    table = torch.load(depth, weights_only=True)
    table["net.blocks.3.mlp.layer2.weight"] = table["net.blocks.3.mlp.layer2.weight"].clone()
    table["net.blocks.3.mlp.layer2.weight"][0, 0] += 1
    torch.save(table, depth)
    again = find_model(edge, **parts, controls={"edge": None, "depth": depth})
    assert same(load_part(again, "control-edge", dtype=None), without_image(branch_weights(BASE, 1)))
    with pytest.raises(InputError, match=f"{DEPTH} was trained beside another base than the transformer of .*{EDGE}"):
        load_part(again, "control-depth")


def test_a_branch_alone_beside_another_files_image_context_is_refused(parts, tmp_path: Path) -> None:
    """Its own projections of image tokens are in its own file's base."""
    edge, depth = official_file(tmp_path / EDGE, seed=1), official_file(tmp_path / DEPTH, seed=2)
    files = find_model(edge, **parts, controls={"depth": depth})
    with pytest.raises(InputError, match=r"another base .* their img_context_proj\.0\.weight differ"):
        load_part(files, "control-depth")


def test_a_branch_without_image_context_beside_a_base_with(parts, tmp_path: Path, capsys) -> None:
    edge = official_file(tmp_path / EDGE, seed=1)
    old = official_file(tmp_path / "old.pt", PLAIN, seed=3)
    files = find_model(edge, **parts, controls={"seg": old})
    assert "without image context: the branch seg has none" in capsys.readouterr().err
    assert files.config.transformer == PLAIN
    assert same(load_part(files, "control-seg", dtype=None), branch_weights(PLAIN, 3))
    assert same(load_part(files, "transformer", dtype=None), without_image(base_weights()))


# By name, from a hub


@pytest.fixture
def published(hub, qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """transfer2.5-2b, tiny, served by a hub at main."""
    entry = CATALOGUE["transfer2.5-2b"]
    folder = tmp_path / "served"
    for seed, files in enumerate(entry.controls.values()):
        official_file(folder / str(files.file), seed=seed)
        hub.folders[files.repo] = folder
    at_main = {kind: dataclasses.replace(files, revision=None) for kind, files in entry.controls.items()}
    options = {"image_context": 20}
    changed = dataclasses.replace(entry, controls=at_main, network_options=options)
    monkeypatch.setitem(CATALOGUE, entry.name, changed)
    monkeypatch.setitem(TRANSFORMERS, "2b", PLAIN)
    monkeypatch.setattr(sources, "ControlConfig", lambda: CONTROL)
    monkeypatch.setitem(sources.TEXTS, "reason1-7b", pipeline_dir.text_config(qwen_folder, qwen_folder))
    return folder


def test_nothing_but_what_is_asked_for_is_downloaded(hub, published: Path, parts, capsys) -> None:
    entry = CATALOGUE["transfer2.5-2b"]
    files = find_model("transfer2.5-2b", **parts, controls=("depth",))
    assert hub.requests == [] and capsys.readouterr().err == "" and entry.state == "not downloaded"
    assert files.config.transformer == BASE and set(files.parts) == {
        *"transformer vae text control-depth image".split()
    }
    assert same(load_part(files, "transformer", dtype=None), base_weights(BASE, 2))
    assert same(load_part(files, "control-depth", dtype=None), branch_weights(BASE, 2))
    assert {item.path.rpartition("/")[2] for item in hub.asked("GET", ".pt")} == {DEPTH}
    assert entry.state == "1 of 4 downloaded"
    both = find_model("transfer2.5-2b", **parts, controls=("depth", "edge"))
    assert "without image context" in capsys.readouterr().err
    assert both.parts["transformer"].identity == both.parts["control-depth"].identity  # of the first that is asked for
    assert both.config.training["weights"] == both.parts["transformer"].identity
    load_part(both, "control-edge")
    assert entry.state == "2 of 4 downloaded"
    whole = find_model("transfer2.5-2b", **parts)
    assert tuple(whole.config.controls) == KINDS and whole.config.transformer == PLAIN
    assert same(load_model(whole, dtype=torch.bfloat16).controls["seg"], without_image(branch_weights(BASE, 3)))
    assert entry.state == "downloaded"
    with pytest.raises(InputError, match="transfer2.5-2b-edge-distilled has no control depth; it has edge"):
        find_model("transfer2.5-2b-edge-distilled", controls=("depth",))


def test_a_name_with_a_local_file_downloads_nothing(hub, published: Path, parts, tmp_path: Path) -> None:
    mine = official_file(tmp_path / "mine.pt", seed=7)
    files = find_model("transfer2.5-2b", **parts, controls={"seg": mine})
    assert same(load_part(files, "control-seg", dtype=None), branch_weights(BASE, 7))
    assert same(load_part(files, "transformer", dtype=None), base_weights(BASE, 7)) and hub.requests == []
    mixed = find_model("transfer2.5-2b", **parts, controls={"edge": mine, "seg": None})
    assert mixed.parts["transformer"].identity == mixed.parts["control-seg"].identity  # its own comes first
    load_part(mixed, "control-edge")


def test_published_entries() -> None:
    """Specification of Transfer, sections 1.5, 1.7 and 3.8."""
    entry, old, few = (CATALOGUE[f"transfer2.5-2b{end}"] for end in ("", "-v1", "-edge-distilled"))
    assert entry.kinds == old.kinds == KINDS and few.kinds == ("edge",)
    assert all(f"/{kind}/" in str(files.file) for kind, files in (*entry.controls.items(), *old.controls.items()))
    files = find_model(entry.name, controls=("edge",))
    assert files.config.transformer.image_context == 1152 and files.config.controls == {"edge": ControlConfig()}
    assert find_model(old.name, controls=("edge",)).config.transformer.image_context == 0
    config = find_model(few.name).config
    assert (config.sampling.solver, config.sampling.steps, config.sampling.guidance) == ("renoise", 4, 0)
    assert config.sampling.conditional_timestep == 0.1 and config.transformer.timestep_scale == 0.001
    assert not config.transformer.fp32_modulation and config.sampling.negative_prompt is None
    for each in (entry, old):
        for kind, files in each.controls.items():
            with torch.device("meta"):
                image = DiTConfig(**each.network_options)
                count = sum(
                    p.numel() for n in (DiT(image), ControlBranch(image, ControlConfig())) for p in n.parameters()
                )
            assert abs(files.size - 2 * count) < 0.01e9
            assert control_of_file(Path(f"x/{Path(str(files.file)).name}")) == kind
    with pytest.raises(InputError, match="'transfer2.5-2b-multiview' is not supported yet: it needs multi-view"):
        find_model("transfer2.5-2b-multiview")


# The encoder of reference images


def siglip_folder(folder: Path, whole: bool) -> Path:
    """A tiny SigLIP 2 with tokens of width 20 that transformers saved: all of it, or the vision tower."""
    import transformers

    vision = dict(hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    vision |= dict(patch_size=4, num_patches=16)
    text = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    text |= dict(bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    if whole:
        config = transformers.Siglip2Config(vision_config=vision, text_config=text)
        model = transformers.Siglip2Model(config)
    else:
        model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**vision))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "tower"])
def test_the_image_encoder_is_a_part_where_there_is_image_context(whole: bool, parts, tmp_path: Path) -> None:
    path, siglip = official_file(tmp_path / EDGE), siglip_folder(tmp_path / "siglip", whole)
    files = find_model(path, **parts, image=siglip)
    encoder = load_part(files, "image")
    assert isinstance(encoder, ImageEncoder)
    stored, prefix = load_file(siglip / "model.safetensors"), "vision_model." if whole else ""
    state = encoder.state_dict()
    assert len(state) == 5 + 2 * 16 and all(
        torch.equal(value, stored[prefix + key.removeprefix("model.")]) for key, value in state.items()
    )
    tokens = encoder.encode(torch.randint(0, 256, (32, 40, 3), dtype=torch.uint8))
    assert tokens.shape == (1, 16, 20) and tokens.isfinite().all()
    stored.pop(f"{prefix}post_layernorm.bias")
    save_file(stored, siglip / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="lacks 1 of 37 weights: .*post_layernorm.bias"):
        load_part(files, "image")
    with pytest.raises(InputError, match="is for a model with image context; .* has none"):
        find_model(path, **parts, image=siglip, controls=())
    with pytest.raises(InputError, match="holds no image encoder"):
        find_model(path, **parts, image=tmp_path)


def test_an_image_encoder_of_another_width_is_refused(parts, tmp_path: Path) -> None:
    siglip = siglip_folder(tmp_path / "siglip", False)
    config = json.loads((siglip / "config.json").read_text())
    (siglip / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    files = find_model(official_file(tmp_path / EDGE), **parts, image=siglip)
    with pytest.raises(InputError, match="takes image tokens of width 20, .* gives 24"):
        load_part(files, "image")


# Conversion


@pytest.mark.parametrize("route", ["official", "diffusers", "orrery"])
@pytest.mark.parametrize("config", [PLAIN, BASE], ids=["plain", "image"])
def test_round_trips_are_exact(route: str, config: DiTConfig, parts, tmp_path: Path) -> None:
    """official -> route -> official: every tensor bit for bit, counters and tables included."""
    first = official_file(tmp_path / EDGE, config)
    files = find_model(first, **parts)
    step = tmp_path / ("model.pt" if route == "official" else "model")
    network = ("transformer", "control-edge")
    chosen = {"official": None, "diffusers": network, "orrery": (*network, "vae", "text")}[route]
    convert(files, step, route, chosen)
    again = find_model(step, **({} if route == "orrery" else parts), controls=("edge",))
    assert again.config.controls == {"edge": CONTROL} and again.config.transformer == dataclasses.replace(config)
    assert same(load_part(again, "control-edge", dtype=None), branch_weights(config))
    assert same(load_part(again, "transformer", dtype=None), base_weights(config))
    if route != "official":
        assert find_model(step, **({} if route == "orrery" else parts)).config.controls == {"edge": CONTROL}
    convert(again, tmp_path / "last.pt", "official")
    one, two = torch.load(first, weights_only=True), torch.load(tmp_path / "last.pt", weights_only=True)
    tensors = {key for key in one if not key.endswith("_extra_state")}
    assert tensors == set(two) and "net.control_blocks.1.after_proj.bias" in two
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == two[key].dtype for key in tensors)


def test_what_is_converted_of_several(parts, tmp_path: Path) -> None:
    edge, depth = official_file(tmp_path / EDGE, PLAIN, 1), official_file(tmp_path / DEPTH, PLAIN, 2)
    files = find_model(edge, **parts, controls={"edge": None, "depth": depth})
    for kind, name in (("official", "x.pt"), ("diffusers", "x")):
        with pytest.raises(InputError, match=f"the format {kind} holds one control branch, here are edge, depth"):
            convert(files, tmp_path / name, kind)
    with pytest.raises(
        InputError, match="the parts control-seg are unknown; allowed are transformer, vae, text, control"
    ):
        convert(files, tmp_path / "x", "orrery", ("transformer", "vae", "text", "control-seg"))
    with pytest.raises(InputError, match="holds the transformer, alone or with its control branch, or the VAE"):
        convert(files, tmp_path / "x.pt", "official", ("control-edge",))
    assert not (tmp_path / "x").exists() and not (tmp_path / "x.pt").exists()
    ours = find_model(convert(files, tmp_path / "ours", "orrery"))
    assert list(ours.config.controls) == ["edge", "depth"]
    assert same(load_part(ours, "control-depth", dtype=None), branch_weights(PLAIN, 2))
    convert(ours, tmp_path / "depth.pt", "official", ("transformer", "control-depth"))
    again = find_model(tmp_path / "depth.pt", **parts, controls=("depth",))
    assert same(load_part(again, "control-depth", dtype=None), branch_weights(PLAIN, 2))
    base = convert(ours, tmp_path / "base.pt", "official", ("transformer",))
    assert not any("control" in key for key in torch.load(base, weights_only=True))


def test_a_spread_that_a_file_cannot_say_is_refused(parts, tmp_path: Path) -> None:
    files = find_model(official_file(tmp_path / EDGE, PLAIN), **parts)
    odd = {"edge": ControlConfig(blocks=2, every=3, channels=32)}
    odd_files = dataclasses.replace(files, config=dataclasses.replace(files.config, controls=odd))
    with pytest.raises(InputError, match="2 blocks beside 4 are taken to be 2 apart, those of edge are 3 apart"):
        convert(odd_files, tmp_path / "x.pt", "official")
    written = convert(odd_files, tmp_path / "d", "diffusers", ("transformer", "control-edge"))
    assert find_model(written, **parts).config.controls == odd  # which this format says
    (written / "orrery.json").unlink()
    elsewhere = find_model(tmp_path / EDGE, **parts, controls={"edge": written})
    assert elsewhere.config.controls == odd
