"""Networks that come and go: one video in every placement, nothing held too long, LoRAs, kept embeddings, dtypes."""

import functools
import json
import math
import shutil
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import orrery
from orrery.errors import InputError, OrreryError
from orrery.nn.offload import StreamedBlocks
from orrery.nn.vae_tiling import decode_tiled, encode_tiled
from orrery.video import Video
from orrery.weights import find_model, load_part
from orrery.weights.lora import Lora, LoraPair, save_lora
from orrery.weights.sources import transformer_shapes
from orrery.world import World
from orrery.world.networks import Embeddings
from orrery.world.plan import GIB, PLACEMENTS

PROMPT, NEGATIVE = "a red ball falls and bounces", "a blue cube rolls"


def moving() -> Video:
    rng = np.random.default_rng(3)
    return Video(rng.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8).repeat(8, axis=1).repeat(8, axis=2), 10)


def pixels(world: World, prompt: str = PROMPT, start: Video | None = None, **options: Any) -> np.ndarray:
    return world.generate(prompt, start, **{"seed": 1, "steps": 2} | options).frames


class Loads:
    """In place of `load_part`: writes down what is loaded, and what of earlier networks is still there then."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.alive: list[int] = []
        self.refused: tuple[str, ...] = ()
        self._held: list[weakref.ref] = []

    def load(self, files: Any, name: str, *where: Any) -> torch.nn.Module:
        assert name not in self.refused, f"{name} is loaded"
        self.alive.append(self.left())
        self.names.append(name)
        network = load_part(files, name, *where)
        self._held += [weakref.ref(parameter.untyped_storage()) for parameter in network.parameters()]
        return network

    def stream(self, *given: Any) -> StreamedBlocks:
        blocks = StreamedBlocks(*given)
        self._held.append(weakref.ref(blocks))
        return blocks

    def left(self) -> int:
        """How many weights of those that were loaded are still in memory, and how many streamed transformers."""
        return sum(each() is not None for each in self._held)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Loads:
    loads = Loads()
    monkeypatch.setattr("orrery.world.networks.load_part", loads.load)
    monkeypatch.setattr("orrery.world.networks.StreamedBlocks", loads.stream)
    return loads


# Placements.


@pytest.mark.parametrize(
    "options",
    [
        {"start": moving()},
        {"start": moving(), "frames": 33, "handover": "frames", "negative_prompt": NEGATIVE},
        {"frames": 29, "guidance": 0},
    ],
)
def test_every_placement_gives_the_same_video(tiny_folder: Path, options: dict) -> None:
    expected = pixels(orrery.load(tiny_folder, "cpu", placement="resident"), **options)
    assert expected.std() > 1 and (expected[-1] != expected[0]).any()
    for placement in ("stages", "blocks"):
        world = orrery.load(tiny_folder, "cpu", placement=placement)
        for _ in range(2):
            assert np.array_equal(pixels(world, **options), expected), placement


@pytest.mark.parametrize("placement", ["stages", "blocks"])
@pytest.mark.parametrize(
    "options, names",
    [
        ({}, ["text", "transformer", "vae"]),
        ({"start": moving()}, ["text", "vae", "transformer", "vae"]),
        ({"frames": 29}, ["text", "transformer", "vae"]),
        ({"frames": 29, "handover": "frames"}, ["text"] + ["transformer", "vae", "vae"] * 2),
    ],
)
def test_one_network_at_a_time(
    tiny_folder: Path, placement: str, options: dict, names: list[str], loads: Loads
) -> None:
    world = orrery.load(tiny_folder, "cpu", placement=placement)
    assert loads.names == []
    pixels(world, **options)
    assert loads.names == names and loads.alive == [0] * len(names) and loads.left() == 0


def test_resident_networks_stay(tiny_folder: Path, loads: Loads) -> None:
    world = orrery.load(tiny_folder, "cpu", placement="resident")
    assert loads.names == ["text", "transformer", "vae"]
    for _ in range(2):
        pixels(world, start=moving())
    assert len(loads.names) == 3
    world.model.release()
    assert loads.left() == 0
    pixels(world)
    assert len(loads.names) == 6


def test_networks_that_stayed_go_when_there_is_no_more_room(tiny_folder: Path, loads: Loads) -> None:
    """A world that was resident at one size may have to go stage by stage at a larger one."""
    world = orrery.load(tiny_folder, "cpu", placement="resident")
    expected = pixels(world)
    for placement in ("stages", "blocks"):
        loads.names.clear()
        loads.alive.clear()
        world.placement = placement
        assert np.array_equal(pixels(world), expected)
        assert loads.names == ["text", "transformer", "vae"] and loads.alive == [0, 0, 0]
    world.placement = "resident"
    assert np.array_equal(pixels(world), expected)


@pytest.mark.parametrize("placement", ["stages", "blocks"])
def test_an_exception_lets_go_as_well(tiny_folder: Path, placement: str, loads: Loads) -> None:
    networks = orrery.load(tiny_folder, "cpu", placement=placement).model
    with pytest.raises(ZeroDivisionError) as held, networks.use("transformer", placement) as transformer:
        transformer.encode_text(torch.zeros(1, 12, 32))
        raise ZeroDivisionError
    assert held.tb is not None and loads.left() == 0
    with networks.use("transformer", placement) as transformer:
        assert len(transformer.encode_text(torch.zeros(1, 12, 32)).layers) == 2
    assert loads.left() == 0 and all(parameter.numel() == 0 for parameter in transformer.parameters())


def test_a_network_that_does_not_fit_says_what_to_ask(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr("orrery.world.networks.load_part", full)
    with pytest.raises(OrreryError, match=r"the text does not fit into the memory of cpu; `orrery plan .*tiny`"):
        orrery.load(tiny_folder, "cpu")


def test_checking_a_request_loads_nothing(tiny_folder: Path, loads: Loads) -> None:
    world = orrery.load(tiny_folder, "cpu", placement="stages")
    with pytest.warns(UserWarning, match="does not know: 'green'"):
        world.request("a green ball")
    assert loads.names == []


def test_what_was_chosen_is_told_once(tiny_folder: Path, capsys: pytest.CaptureFixture) -> None:
    world = orrery.load(tiny_folder, "cpu", placement="stages")
    for _ in range(2):
        pixels(world)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("orrery: memory: stages, guidance in one batch; peak 0.0 of ")
    quiet = orrery.load(tiny_folder, "cpu")
    pixels(quiet)
    assert capsys.readouterr().err == ""


# LoRAs.


def new_lora(folder: Path, path: Path, seed: int) -> Path:
    """Of rank 2, on attention, MLP and modulation of the tiny transformer."""
    shapes = transformer_shapes(find_model(folder).config.transformer)
    torch.manual_seed(seed)
    pairs = {
        name: LoraPair(torch.randn(2, shape[1]) * 0.3, torch.randn(shape[0], 2) * 0.3, 0.5)
        for name, shape in shapes.items()
        if name.startswith("blocks.") and name.endswith(("q_proj.weight", "layer1.weight", "mlp.1.weight"))
    }
    assert len(pairs) == 8
    return save_lora(path, Lora("new", pairs))


@pytest.fixture
def loras(tiny_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    return new_lora(tiny_folder, tmp_path / "first", 1), new_lora(tiny_folder, tmp_path / "second", 2)


def test_loras_in_every_placement(tiny_folder: Path, loras: tuple[Path, Path]) -> None:
    first, second = loras
    plain = pixels(orrery.load(tiny_folder, "cpu", placement="resident"))
    seen = [plain]
    for merged in ([first], [(first, 0.5)], [first, (second, 0.5)]):
        found = [pixels(orrery.load(tiny_folder, "cpu", placement=p, loras=merged)) for p in PLACEMENTS]
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
        for other in seen:
            assert np.abs(found[0].astype(int) - other).mean() > 0.1
        seen.append(found[0])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_loras_come_and_go(tiny_folder: Path, placement: str, loras: tuple[Path, Path]) -> None:
    first, second = loras
    one, both = (
        pixels(orrery.load(tiny_folder, "cpu", placement=placement, loras=paths)) for paths in ([first], [*loras])
    )
    world = orrery.load(tiny_folder, "cpu", placement=placement)
    plain = pixels(world)
    assert world.add_lora(first).name == str(first) and len(world.loras) == 1
    assert np.array_equal(pixels(world), one) and not np.array_equal(one, plain)
    world.add_lora(second)
    assert np.array_equal(pixels(world), both) and len(world.loras) == 2
    world.remove_loras()
    assert world.loras == () and np.array_equal(pixels(world), plain)
    world.remove_loras()
    world.add_lora(first, scale=0.0)
    assert np.array_equal(pixels(world), plain)


def test_weights_are_bit_for_bit_what_they_were(tiny_folder: Path, loras: tuple[Path, Path]) -> None:
    world = orrery.load(tiny_folder, "cpu", dtype="bfloat16")
    before = {name: weight.clone() for name, weight in world.model.transformer.named_parameters()}
    for path in loras:
        world.add_lora(path, 3.0)
    assert any(not torch.equal(before[name], weight) for name, weight in world.model.transformer.named_parameters())
    world.remove_loras()
    assert all(torch.equal(before[name], weight) for name, weight in world.model.transformer.named_parameters())


def test_a_lora_that_does_not_fit_changes_nothing(tiny_folder: Path, loras: tuple[Path, Path], tmp_path: Path) -> None:
    world = orrery.load(tiny_folder, "cpu", loras=[loras[0]])
    expected = pixels(world)
    other = save_lora(
        tmp_path / "other",
        Lora("o", {"blocks.7.mlp.layer1.weight": LoraPair(torch.ones(1, 48), torch.ones(192, 1), 1)}),
    )
    with pytest.raises(InputError, match="blocks.7"):
        world.add_lora(other)
    with pytest.raises(InputError, match="blocks.7"):
        orrery.load(tiny_folder, "cpu", loras=[other])
    assert len(world.loras) == 1 and np.array_equal(pixels(world), expected)


def test_no_lora_is_left_out_in_silence(
    tiny_folder: Path, loras: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging may fail for want of memory; whoever tries again must not get a transformer without its LoRA."""
    whole = pixels(orrery.load(tiny_folder, "cpu", loras=[loras[0]]))
    plain_world = orrery.load(tiny_folder, "cpu")
    plain = pixels(plain_world)

    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError

    world = orrery.load(tiny_folder, "cpu", loras=[loras[0]])
    world.model.release()
    with monkeypatch.context() as patch:
        patch.setattr("orrery.world.networks.merge", full)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            pixels(world)
        with pytest.raises(torch.cuda.OutOfMemoryError):
            plain_world.add_lora(loras[0])
    assert np.array_equal(pixels(world), whole)
    assert plain_world.loras == () and np.array_equal(pixels(plain_world), plain)


# Text embeddings on disk.


def kept_world(folder: Path, embeddings: Path, **options: Any) -> World:
    return orrery.load(folder, "cpu", placement="stages", embeddings=embeddings, **options)


def test_a_prompt_is_encoded_once(tiny_folder: Path, tmp_path: Path, loads: Loads) -> None:
    folder, options = tmp_path / "some" / "where", {"negative_prompt": NEGATIVE}
    plain = orrery.load(tiny_folder, "cpu", placement="stages")
    expected, of_negative = pixels(plain, **options), pixels(plain, NEGATIVE)
    assert np.array_equal(pixels(kept_world(tiny_folder, folder), **options), expected)
    assert len(list(folder.iterdir())) == 2
    loads.names.clear()
    loads.refused = ("text",)
    assert np.array_equal(pixels(kept_world(tiny_folder, folder), **options), expected)
    assert np.array_equal(pixels(kept_world(tiny_folder, folder), NEGATIVE), of_negative)
    assert loads.names == ["transformer", "vae"] * 2


def test_only_what_is_new_is_encoded(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels(kept_world(tiny_folder, tmp_path))
    encoded: list[str] = []
    encode = orrery.nn.text.TextEncoder.encode
    monkeypatch.setattr(
        "orrery.nn.text.TextEncoder.encode", lambda self, prompts: encoded.extend(prompts) or encode(self, prompts)
    )
    pixels(kept_world(tiny_folder, tmp_path), PROMPT, negative_prompt=NEGATIVE)
    assert encoded == [NEGATIVE]


def test_others_do_not_hit(tiny_folder: Path, tmp_path: Path, loads: Loads) -> None:
    kept = tmp_path / "kept"
    pixels(kept_world(tiny_folder, kept))
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    changed = load_file(other / "text.safetensors")
    save_file({key: value + 1 for key, value in changed.items()}, other / "text.safetensors")
    loads.refused = ("text",)
    for options, prompt in (
        ({}, "a red ball"),
        ({"dtype": "bfloat16"}, PROMPT),
        ({"text": other}, PROMPT),
    ):
        with pytest.raises(AssertionError, match="text is loaded"):
            pixels(kept_world(tiny_folder, kept, **options), prompt)
    with pytest.raises(AssertionError, match="text is loaded"):
        pixels(kept_world(other, kept))
    pixels(kept_world(tiny_folder, kept, conventions="official"))  # another transformer's affair
    pixels(kept_world(tiny_folder, kept), PROMPT.upper())  # other letters, the same tokens


def test_another_tokenizer_does_not_hit(tiny_folder: Path, tmp_path: Path, loads: Loads) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    pixels(kept_world(folder, tmp_path / "kept"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["red"], words["ball"] = words["ball"], words["red"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    loads.refused = ("text",)
    with pytest.raises(AssertionError, match="text is loaded"):
        pixels(kept_world(folder, tmp_path / "kept"))


def damage_by(tensors: dict[str, torch.Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


@pytest.mark.parametrize(
    "damage, why",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:200]), "it is no safetensors file, or damaged"),
        (lambda path: path.write_bytes(b""), "the file is empty"),
        (lambda path: path.write_text("<html>"), "a web page"),
        (damage_by({"other": torch.ones(1, 12, 32)}), "holds no embedding of this text encoder"),
        (damage_by({"embedding": torch.ones(1, 12, 16)}), "holds no embedding of this text encoder"),
        (damage_by({"embedding": torch.full((1, 12, 32), math.nan)}), "holds no embedding of this text encoder"),
    ],
)
def test_a_damaged_file_is_told_and_made_again(
    tiny_folder: Path, tmp_path: Path, damage: Callable[[Path], None], why: str, loads: Loads,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    expected = pixels(kept_world(tiny_folder, tmp_path))
    (path,) = tmp_path.glob("*.safetensors")
    whole = path.read_bytes()
    damage(path)
    capsys.readouterr()
    assert np.array_equal(pixels(kept_world(tiny_folder, tmp_path)), expected)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "embedding" in line]
    assert line.startswith("orrery: a text embedding is made again: ") and str(path) in line and why in line
    assert path.read_bytes() == whole
    loads.refused = ("text",)
    assert np.array_equal(pixels(kept_world(tiny_folder, tmp_path)), expected)


def test_files_are_whole_or_absent(
    tiny_folder: Path, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    embeddings = Embeddings(tmp_path, orrery.load(tiny_folder, "cpu").model)
    with full_disk(500), pytest.raises(InputError, match="cannot write .*File too large"):
        embeddings.put(PROMPT, torch.ones(1, 12, 32))
    assert list(tmp_path.iterdir()) == [] and embeddings.get(PROMPT) is None
    embeddings.put(PROMPT, torch.ones(1, 12, 32))
    with full_disk(500), pytest.raises(InputError, match="cannot write"):
        embeddings.put(PROMPT, torch.zeros(1, 12, 32))
    assert torch.equal(embeddings.get(PROMPT), torch.ones(1, 12, 32)) and len(list(tmp_path.iterdir())) == 1


def test_embeddings_come_back_as_they_were(tiny_folder: Path, tmp_path: Path) -> None:
    embeddings = Embeddings(tmp_path, orrery.load(tiny_folder, "cpu", dtype="bfloat16").model)
    for index, prompt in enumerate(("", "a\nred", "é" * 3000, "../left/and/right", "a\0ball")):
        value = torch.randn(1, 12, 32).bfloat16() + index
        embeddings.put(prompt, value.transpose(1, 2).contiguous().transpose(1, 2))
        assert torch.equal(embeddings.get(prompt), value) and embeddings.get(prompt).dtype == torch.bfloat16
    assert len(list(tmp_path.iterdir())) == 5


def test_a_folder_that_cannot_be(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder .*file: "):
        kept_world(tiny_folder, tmp_path / "file")


# The VAE in tiles.


def test_tiles_are_close(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    given = {"start": moving(), "frames": 29}
    world = orrery.load(tiny_folder, "cpu", placement="resident")
    whole, whole_given = pixels(world, frames=29), pixels(world, **given)
    assert "tiles" not in capsys.readouterr().err
    monkeypatch.setattr("orrery.world.world.device_bytes", lambda _: 1000)
    assert world.plan((32, 48), 29).tiled
    for expected, options in ((whole, {"frames": 29}), (whole_given, given)):
        one_tile = pixels(world, **options)
        assert one_tile.shape == expected.shape == (29, 32, 48, 3)
        assert np.abs(one_tile.astype(int) - expected).max() <= 1  # float16
    told = capsys.readouterr().err
    assert "VAE in tiles" in told and "this is more than there is, and may fail" in told

    calls: list[str] = []
    for name, function in (("decode_tiled", decode_tiled), ("encode_tiled", encode_tiled)):
        small = functools.partial(function, tile=(4, 4), overlap=2)
        monkeypatch.setattr(
            f"orrery.world.world.{name}", lambda *args, name=name, small=small: calls.append(name) or small(*args)
        )
    tiles = pixels(world, frames=29)
    assert calls == ["decode_tiled"] and tiles.shape == whole.shape
    error = np.abs(tiles.astype(int) - whole)
    assert 0 < error.mean() < 0.1 * whole.std()
    assert max(error[:, :, :8].max(), error[:, :, -8:].max()) <= 1  # far from the seam
    assert pixels(world, **given).shape == whole.shape and calls[1:] == ["encode_tiled", "decode_tiled"]


# Dtypes.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_by_name(tiny_folder: Path, dtype: str) -> None:
    world = orrery.load(tiny_folder, "cpu", dtype=dtype)
    wanted = getattr(torch, dtype)
    assert world.dtype == wanted == orrery.load(tiny_folder, "cpu", dtype=wanted).dtype
    assert {weight.dtype for net in (world.model.transformer, world.model.text) for weight in net.parameters()} == {
        wanted
    }
    assert {weight.dtype for weight in world.model.vae.parameters()} == {torch.float32}
    assert pixels(world).std() > 1
    assert orrery.load(tiny_folder, "cpu").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float8", "", "torch.float32", "bf16"])
def test_unknown_dtypes_are_refused(tiny_folder: Path, dtype: str) -> None:
    with pytest.raises(InputError, match=f"dtype is '{dtype}'; allowed are float32, bfloat16, float16"):
        orrery.load(tiny_folder, "cpu", dtype=dtype)


@pytest.mark.parametrize(
    "name, gibibytes, expected",
    [
        ("predict2.5-2b", 12, torch.bfloat16),
        ("predict2.5-2b", 24, torch.float32),
        ("predict2.5-14b", 64, torch.bfloat16),
        ("predict2.5-14b", 128, torch.float32),
        ("mini", 0.01, torch.float32),
    ],
)
def test_a_large_model_on_a_small_machine(
    name: str, gibibytes: float, expected: torch.dtype, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("orrery.world.devices.device_bytes", lambda _: int(gibibytes * GIB))
    assert orrery.world.devices.pick_dtype(None, find_model(name), torch.device("cpu")) == expected
    told = capsys.readouterr().err
    assert ("orrery: bfloat16: in float32 the weights alone would fill more than half" in told) == (
        expected == torch.bfloat16
    )
    assert orrery.world.devices.pick_dtype(None, find_model(name), torch.device("cuda")) == torch.bfloat16
