"""Rungs: what is asked for is what is done, exact ones change nothing, inexact ones stay within what they say."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import orrery
from orrery.errors import InputError
from orrery.nn import kernels
from orrery.nn.dit import Conditions
from orrery.nn.neighbourhood_pattern import PUBLISHED, Pattern
from orrery.nn.quantise import QuantisedLinear
from orrery.weights import find_model
from orrery.world import World
from orrery.world import speed as rungs
from orrery.world.speed import PRESETS, Speed, Spent, preset, speed_of

PROMPT = "a red ball falls and bounces, plain look"
CPU = torch.device("cpu")
MINI = find_model("mini").config


def latents(world: World, **options) -> torch.Tensor:
    """[1, C, T, H, W] of a generation."""
    request = world.request(PROMPT, seed=1, **options)
    world.spent = Spent()
    with torch.no_grad():
        return world._latents(request, world._plan_of(request), None)


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative root mean square."""
    return float((a - b).norm() / b.norm())


@pytest.fixture(scope="module")
def dense() -> torch.Tensor:
    return latents(orrery.load("mini", "cpu"))


# What is asked for.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (None, Speed()),
        ("exact", Speed()),
        ("compile", Speed(compile=True)),
        ("exact compile=off", Speed()),
        ("cache=0.02 interval=0.2:0.9", Speed(cache=0.02, interval=(0.2, 0.9))),
        ("exact steps=7 dtype=bfloat16 quantise=int8", Speed(steps=7, dtype="bfloat16", quantise="int8")),
        ("balanced cache=off", dataclasses.replace(PRESETS["balanced"], cache=0.0)),
        ("exact attention=sdpa sparse=2b", Speed(attention="sdpa", sparse="2b")),
        (Speed(cache=0.1), Speed(cache=0.1)),
    ],
)
def test_words(words: str | Speed | None, expected: Speed) -> None:
    assert speed_of(words, MINI, CPU) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fastest", "preset is 'fastest'; allowed are exact, balanced, fast"),
        ("exact turbo=1", "speed has no 'turbo'; allowed are attention=KERNEL, compile, cache=ERROR"),
        ("exact cache=much", "speed 'cache=much' is not of the form cache=ERROR"),
        ("exact cache=1.5", "cache is 1.5; allowed is a relative error from 0"),
        ("exact cache=nan", "cache is nan"),
        ("exact interval=0.9:0.1", "interval is 0.9 to 0.1; allowed are noise levels"),
        ("exact interval=0.9", "'interval=0.9' is not of the form interval=LOW:HIGH"),
        ("exact steps=0", "steps is 0; allowed is a whole number of at least 1"),
        ("exact compile=perhaps", "'compile=perhaps' is not of the form compile"),
        ("exact cache", "speed 'cache' is not of the form cache=ERROR"),
        ("exact quantise=int4", "quantise is 'int4'; allowed are int8, fp8"),
        ("exact sparse=3b", "sparse is '3b'; allowed are 2b, 14b"),
        ("exact attention=magic", "attention is 'magic'; allowed are auto, sdpa"),
        ("exact dtype=float8", "dtype is 'float8'; allowed are float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_is_refused_by_name(words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        orrery.load("mini", "cpu", speed=words)


def test_what_is_written_can_be_read() -> None:
    for speed in (*PRESETS.values(), Speed(compile=True, steps=4, interval=(0.25, 1.0), quantise="fp8")):
        assert speed_of(f"exact {str(speed).removeprefix('exact')}", MINI, CPU) == speed


def test_exact_is_what_changes_no_numbers() -> None:
    assert Speed().exact and Speed(compile=True).exact and Speed(attention="flash-attn-3").exact
    for inexact in (Speed(cache=0.01), Speed(steps=9), Speed(dtype="bfloat16"), Speed(attention="sage-attention")):
        assert not inexact.exact
    assert PRESETS["exact"] == Speed() and not PRESETS["balanced"].exact and not PRESETS["fast"].exact


def test_presets_leave_alone_what_has_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    few = dataclasses.replace(MINI, sampling=dataclasses.replace(MINI.sampling, steps=2))
    for name in PRESETS:
        speed = preset(name, few, CPU)
        assert speed.cache == 0 and speed.steps is None and speed.guidance_interval is None
    for has, dtype in ((True, "bfloat16"), (False, None)):
        monkeypatch.setattr(rungs, "multiplies_bfloat16", lambda has=has: has)
        assert preset("fast", few, CPU).dtype == dtype and preset("balanced", few, CPU).dtype is None


def test_steps_are_never_more_than_the_models_own() -> None:
    assert Speed(steps=100).steps_of(MINI) == MINI.sampling.steps and Speed(steps=3).steps_of(MINI) == 3
    world = orrery.load("mini", "cpu", speed="exact steps=3")
    assert world.request(PROMPT).steps == 3 and world.request(PROMPT, steps=5).steps == 5


# What is done.


def test_nothing_inexact_is_on_by_itself(dense: torch.Tensor) -> None:
    world = orrery.load("mini", "cpu")
    again = latents(world)
    assert torch.equal(again, dense) and world.spent == Spent(20, 0, 0.0)


@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_the_cache_stays_within_its_budget(budget: float, dense: torch.Tensor) -> None:
    world = orrery.load("mini", "cpu", speed=f"exact cache={budget}")
    drawn = latents(world)
    assert world.spent.evaluations + world.spent.skipped == 20 and world.spent.skipped >= 5
    assert 0 < apart(drawn, dense) <= budget and 0 < world.spent.error <= budget


def test_guidance_within_an_interval_asks_the_network_less(
    dense: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = orrery.load("mini", "cpu", speed="exact interval=0.5:1")
    sizes: list[int] = []
    forward = world.model.transformer.forward
    monkeypatch.setattr(world.model.transformer, "forward", lambda x, *more: sizes.append(len(x)) or forward(x, *more))
    assert 0 < apart(latents(world), dense) < 0.2
    assert len(sizes) == 20 and set(sizes) == {1, 2} and sizes == sorted(sizes, reverse=True)


def test_bfloat16_and_int8_stay_close(dense: torch.Tensor, capfd: pytest.CaptureFixture) -> None:
    for words in ("exact dtype=bfloat16", "exact quantise=int8"):
        assert 0 < apart(latents(orrery.load("mini", "cpu", speed=words)), dense) < 0.03
    assert "int8: 60 linear layers in 8 bits" in capfd.readouterr().err
    plain = orrery.load("mini", "cpu", "float32", speed="exact dtype=bfloat16")
    assert plain.dtype == plain.model.vae_dtype == torch.float32
    assert orrery.load("mini", "cpu", speed="exact dtype=bfloat16").model.vae_dtype == torch.bfloat16


@pytest.mark.parametrize("placement", ["resident", "stages", "blocks"])
def test_quantised_weights_live_wherever_weights_live(placement: str, dense: torch.Tensor) -> None:
    world = orrery.load("mini", "cpu", speed="exact quantise=int8", placement=placement)
    with world.model.use("transformer", placement) as network:
        assert sum(isinstance(module, QuantisedLinear) for module in network.modules()) == 60
    assert 0 < apart(latents(world), dense) < 0.03


def test_control_branches_are_prepared_too() -> None:
    world = orrery.load("mini", "cpu", speed="exact quantise=int8")
    for placement in ("resident", "stages"):
        with world.model.use_controlled(["edge"], placement) as (_, branches):
            assert any(isinstance(module, QuantisedLinear) for module in branches["edge"].modules())


def test_loras_are_merged_before_weights_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    from orrery.world import networks

    for name in ("merge", "prepare"):
        original = getattr(networks, name)
        monkeypatch.setattr(
            networks, name, lambda *a, name=name, original=original: (order.append(name), original(*a))[1]
        )
    from safetensors.torch import save_file

    key = "blocks.0.mlp.layer1"
    pair = {f"{key}.lora_A.weight": torch.randn(2, 256), f"{key}.lora_B.weight": torch.randn(1024, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    world = orrery.load("mini", "cpu", speed="exact quantise=int8")
    plain = latents(world, steps=2)
    order.clear()
    world.add_lora(tmp_path / "lora.safetensors")
    changed = latents(world, steps=2)
    assert order == ["merge", "prepare"] and apart(changed, plain) > 1e-3
    world.remove_loras()
    assert torch.equal(latents(world, steps=2), plain)


def test_a_sparse_pattern_is_for_its_own_depth(monkeypatch: pytest.MonkeyPatch, dense: torch.Tensor) -> None:
    with pytest.raises(InputError, match="sparse 2b is for 28 blocks; this network has 7"):
        orrery.load("mini", "cpu", speed="exact sparse=2b")
    monkeypatch.setitem(PUBLISHED, "2b", (None,) * 7)
    assert torch.equal(latents(orrery.load("mini", "cpu", speed="exact sparse=2b")), dense)
    monkeypatch.setitem(PUBLISHED, "2b", (None,) * 6 + (Pattern((-1, 3, 3)),))
    world = orrery.load("mini", "cpu", speed="exact sparse=2b")
    assert world.model.transformer.blocks[6].self_attn.sparse is not None
    assert apart(latents(world), dense) > 0.01


def test_the_kernel_that_is_named_is_used_and_left_again(monkeypatch: pytest.MonkeyPatch, dense: torch.Tensor) -> None:
    with pytest.raises(InputError, match="kernel 'flash-attn-3' is not available: it needs a CUDA GPU"):
        latents(orrery.load("mini", "cpu", speed="exact attention=flash-attn-3"))
    runs: list[str] = []
    mine = dataclasses.replace(
        kernels.KERNELS["sdpa"], name="mine", run=lambda q, k, v: (runs.append("mine"), kernels._sdpa(q, k, v))[1]
    )
    monkeypatch.setitem(kernels.KERNELS, "mine", mine)
    drawn = latents(orrery.load("mini", "cpu", speed="exact attention=mine"))
    assert torch.equal(drawn, dense) and len(runs) == 20 * 7 * 2 and kernels.current_kernel() == "sdpa"


def test_a_rollout_takes_kernel_and_steps_and_says_what_it_does_not_take(
    acting_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    deeds, table = np.zeros((8, 2), np.float32), np.zeros((64, 64, 3), np.uint8)
    plain = orrery.load(acting_folder, "cpu")
    expected = plain.rollout(table, deeds, steps=1)
    assert plain.spent == Spent(2, 0, 0.0) and "rollout" not in capfd.readouterr().err
    runs: list[str] = []
    mine = dataclasses.replace(
        kernels.KERNELS["sdpa"], name="mine", run=lambda q, k, v: (runs.append("mine"), kernels._sdpa(q, k, v))[1]
    )
    monkeypatch.setitem(kernels.KERNELS, "mine", mine)
    world = orrery.load(acting_folder, "cpu", speed="exact attention=mine steps=1 cache=0.1")
    assert (world.rollout(table, deeds).frames == expected.frames).all()
    assert len(runs) == 2 * 2 * len(world.model.transformer.blocks) and kernels.current_kernel() == "sdpa"
    assert "a rollout makes all its steps, and has no guidance: cache and interval do nothing" in capfd.readouterr().err


def test_a_sparse_pattern_runs_by_the_backend_that_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = Pattern((-1, 3, 3))
    monkeypatch.setitem(PUBLISHED, "2b", (None,) * 6 + (pattern,))
    asked: list[tuple] = []
    monkeypatch.setattr(rungs, "choose_backend", lambda *about: asked.append(about) or "masked")
    world = orrery.load("mini", "cpu", speed="exact sparse=2b")
    by_mask = latents(world, steps=2)
    assert asked == [((2, 80, 4, 64), (5, 4, 4), pattern, torch.float32, CPU)]
    assert [block.self_attn.sparse for block in world.model.transformer.blocks][5:] == [None, (pattern, "masked")]
    monkeypatch.undo()
    monkeypatch.setitem(PUBLISHED, "2b", (None,) * 6 + (pattern,))
    assert torch.allclose(latents(orrery.load("mini", "cpu", speed="exact sparse=2b"), steps=2), by_mask, atol=1e-4)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"compile needs a C\+\+ compiler, such as g\+\+, and none was found"):
        orrery.load("mini", "cpu", speed="exact compile")


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("placement", ["resident", "blocks"])
def test_compiled_blocks_are_the_plain_ones(placement: str, tiny_folder: Path) -> None:
    torch._dynamo.reset()
    plain = orrery.load(tiny_folder, "cpu").model.transformer
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, 6, plain.config.text_width, generator=generator)
    x = torch.randn(1, plain.config.latent_channels, 3, 4, 4, generator=generator)
    mask = torch.zeros(1, 1, 3, 4, 4)
    world = orrery.load(tiny_folder, "cpu", speed="exact compile", placement=placement)
    with torch.no_grad(), world.model.use("transformer", placement) as network:
        expected = plain(x, torch.tensor([500.0]), Conditions(text, mask))
        compiled = network(x, torch.tensor([500.0]), Conditions(text, mask))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert 0 < expected.abs().max() and (compiled - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-6


# Looking on.


def test_previews_lead_to_the_video() -> None:
    world = orrery.load("mini", "cpu")
    seen: list[tuple[int, int, int]] = []
    last = []

    def show(done: int, steps: int, video) -> None:
        seen.append((done, steps, len(video)))
        last.append(video)

    video = world.generate(PROMPT, seed=1, steps=5, show=show)
    assert seen == [(step, 5, 17) for step in range(1, 6)]
    errors = [abs(each.frames.astype(int) - video.frames).mean() for each in last]
    assert errors[-1] < 8 < errors[0] and errors[-1] < 0.7 * errors[0]
    assert torch.equal(torch.from_numpy(world.generate(PROMPT, seed=1, steps=5).frames), torch.from_numpy(video.frames))
    long = world.generate(PROMPT, seed=1, steps=2, frames=29, show=show)
    assert len(long) == 29 and seen[5:] == [(step, 4, 17) for step in range(1, 5)]


def test_a_model_without_a_preview_says_what_would_be_one(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="has no preview decoder; for the VAE of Wan 2.1 there is taew2_1.pth"):
        orrery.load(tiny_folder, "cpu").use_preview()
