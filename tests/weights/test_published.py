"""Published models by name, from a hub: files fetched when they are needed and no sooner, in tiny sizes."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import orrery
from orrery.errors import InputError
from orrery.nn.dit import PRESETS as TRANSFORMERS
from orrery.nn.dit import DiT, DiTConfig
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE, VAEConfig
from orrery.weights import CATALOGUE, convert, find_model, load_part, pipeline_dir, sources
from orrery.weights.catalogue import COMPONENTS
from orrery.weights.layouts import text_prefix

SMALL = DiTConfig(width=48, depth=2, heads=2, adaln_rank=8, text_dim=32, context_dim=24)
VAE_SMALL = VAEConfig(base=8)
SIZE, FRAMES, PROMPT = (32, 48), 9, "a red ball falls"


def random_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {key: (torch.randn(value.shape) * 0.1).bfloat16() for key, value in network.state_dict().items()}


@pytest.fixture
def published(hub, qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """predict2.5-2b and what it shares, tiny, served by a hub; the catalogue points there. Returns the 2B's folder."""
    entry = CATALOGUE["predict2.5-2b"]
    assert entry.weights is not None and entry.weights.file is not None
    folder = tmp_path / "served"
    (folder / entry.weights.file).parent.mkdir(parents=True)
    weights = {f"net.{key}": value for key, value in random_weights(DiT(SMALL)).items()}
    torch.save(weights, folder / entry.weights.file)
    torch.save(random_weights(VAE(VAE_SMALL)), folder / "tokenizer.pth")
    hub.folders[entry.weights.repo] = folder
    hub.folders[COMPONENTS["reason1-7b"].repo] = qwen_folder
    at_main = dataclasses.replace(entry.weights, revision=None)
    monkeypatch.setitem(CATALOGUE, entry.name, dataclasses.replace(entry, weights=at_main))
    for name, files in COMPONENTS.items():
        monkeypatch.setitem(COMPONENTS, name, dataclasses.replace(files, revision=None))
    monkeypatch.setitem(TRANSFORMERS, "2b", SMALL)
    monkeypatch.setitem(VAES, "wan2.1", dataclasses.replace(VAES["wan2.1"], base=VAE_SMALL.base))
    text = pipeline_dir.text_config(qwen_folder, qwen_folder)
    monkeypatch.setitem(sources.TEXTS, "reason1-7b", text)
    return folder


def generate(world: orrery.World, **options) -> orrery.Video:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a size that the model was not trained at
        return world.generate(PROMPT, frames=FRAMES, size=SIZE, steps=2, **options)


def test_a_published_model_by_name(hub, published: Path) -> None:
    assert CATALOGUE["predict2.5-2b"].state == "not downloaded"
    world = orrery.load("predict2.5-2b", device="cpu")
    video = generate(world)
    assert video.frames.shape == (FRAMES, *SIZE, 3) and video.fps == 16 and video.frames.std() > 1
    assert CATALOGUE["predict2.5-2b"].state == "downloaded"
    assert world.config.sampling.schedule == "karras" and world.dtype == torch.float32
    assert len(world.hash) == 16
    asked = len(hub.requests)
    again = generate(orrery.load("predict2.5-2b", device="cpu"))
    assert (again.frames == video.frames).all() and len(hub.requests) == asked  # all from the cache


def test_nothing_is_fetched_before_it_is_needed(hub, published: Path, tmp_path: Path) -> None:
    find_model("predict2.5-2b")
    assert hub.requests == []
    world = orrery.load("predict2.5-2b", device="cpu", placement="stages", embeddings=tmp_path / "kept")
    assert hub.sent("tokenizer.pth") == 0 and hub.sent("model.safetensors") == 0
    first = generate(world)
    for folder in ("models--nvidia--Cosmos-Reason1-7B",):  # the encoder is gone; the embeddings are not
        for file in (tmp_path / "hub" / folder).rglob("model.safetensors"):
            file.unlink()
    sent = hub.sent("model.safetensors")
    again = generate(orrery.load("predict2.5-2b", device="cpu", placement="stages", embeddings=tmp_path / "kept"))
    assert (again.frames == first.frames).all() and hub.sent("model.safetensors") == sent


def test_a_download_that_was_cut_goes_on(hub, published: Path) -> None:
    """Cut once, it goes on by itself; cut for good, the next call does; the weights are whole either way."""
    hub.cut(5000)
    one = load_part(find_model("predict2.5-2b"), "transformer", dtype=None).state_dict()
    assert all(torch.equal(value, one[key]) for key, value in random_weights(DiT(SMALL)).items())


def test_the_vision_tower_is_not_loaded_and_old_names_are_known(qwen_folder: Path, tmp_path: Path) -> None:
    """Three ways in which Qwen2.5-VL has been saved over the years."""
    whole = load_file(qwen_folder / "model.safetensors")
    assert any("visual" in key for key in whole)
    expected = None
    old = text_prefix(whole)
    for new in ("model.language_model.", "model.", "language_model.model."):
        folder = Path(shutil.copytree(qwen_folder, tmp_path / new.replace(".", "_")))
        renamed = {key.replace(old, new) if "visual" not in key else key: value for key, value in whole.items()}
        save_file(renamed, folder / "model.safetensors", {"format": "pt"})
        files = find_model("predict2.5-2b")
        text, part, tokenizer = sources._text_part(folder)
        config = dataclasses.replace(
            files.config, text=text, transformer=dataclasses.replace(SMALL), shared={"vae": "wan2.1"}
        )
        files = dataclasses.replace(files, config=config, parts=dict(files.parts) | {"text": part}, tokenizer=tokenizer)
        encoder = load_part(files, "text")
        assert not any("visual" in key for key in encoder.state_dict())
        found = encoder.encode([PROMPT])
        assert found.shape == (1, 512, 32)
        assert expected is None or torch.equal(found, expected)
        expected = found
    (folder / "model.safetensors").unlink()
    save_file({key: value for key, value in renamed.items() if "layers.1" not in key}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"lacks \d+ of 26 weights: language_model\.model\.layers\.1"):
        load_part(files, "text")


def test_a_repository_of_several_models_asks_which(hub) -> None:
    with pytest.raises(InputError, match=r"holds several models; say which: predict2.5-2b, .*predict2.5-2b-distilled"):
        find_model("nvidia/Cosmos-Predict2.5-2B")
    assert hub.requests == []


@pytest.mark.parametrize("layout", ["diffusers", "orrery"])
def test_any_repository_in_a_layout_we_know(
    layout: str, hub, published: Path, qwen_folder: Path, tmp_path: Path
) -> None:
    torch.save(random_weights(VAE(VAE_SMALL)), tmp_path / "vae.pth")
    local = next(published.rglob("*_ema_bf16.pt"))
    files = find_model(local, vae=tmp_path / "vae.pth", text=qwen_folder)
    folder = convert(files, tmp_path / "converted", layout)
    hub.folders["me/worlds"] = folder
    remote = orrery.load("me/worlds@main", device="cpu")
    assert remote.name == "me/worlds@main"
    assert (generate(remote).frames == generate(orrery.load(folder, device="cpu")).frames).all()
    (folder / ("model_index.json" if layout == "diffusers" else "config.json")).unlink()
    hub.folders["me/nothing"] = folder
    if layout == "orrery":
        (folder / "other.json").write_text("{}")
    with pytest.raises(InputError, match="me/nothing@main holds no config.json and no model_index.json"):
        find_model("me/nothing")


def test_a_shared_part_of_a_folder_must_be_known(published: Path, qwen_folder: Path, tmp_path: Path) -> None:
    local = next(published.rglob("*_ema_bf16.pt"))
    folder = convert(find_model(local), tmp_path / "ours", "orrery")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "transformer.safetensors"]
    assert find_model(folder).config.shared == {"vae": "wan2.1", "text": "reason1-7b"}
    assert (generate(orrery.load(folder, device="cpu")).frames >= 0).all()
    config = json.loads((folder / "config.json").read_text())
    for shared, message in (({"vae": "wan9"}, "the component 'wan9'"), ({"eyes": "wan2.1"}, "the part 'eyes'")):
        (folder / "config.json").write_text(json.dumps(config | {"shared": shared}))
        with pytest.raises(InputError, match=f"shares {message}"):
            find_model(folder)
