"""Compiled steps take the weights where plain ones take them; attention in bfloat16 on a CPU is plain products."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orrery.nn import kernels
from orrery.train.loop import Trainer, pick_device
from orrery.train.networks import REGIONS
from orrery.train.recipe import load_recipe
from orrery.train.start import open_run

COMPILER = any(map(shutil.which, ("g++", "clang++")))


def trained(recipe: Path, steps: int, *sets: str) -> Trainer:
    trainer = open_run(load_recipe(recipe, sets), pick_device("cpu"))
    for _ in range(steps):
        trainer.train_step()
    return trainer


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize(
    "task", ["flow", pytest.param("control", marks=pytest.mark.slow), pytest.param("vae", marks=pytest.mark.slow)]
)
def test_compiled_steps_are_the_plain_ones(
    task: str,
    tmp_path: Path,
    tiny_vae: Path,
    tiny_folder: Path,
    write_recipe: Callable[..., Path],
) -> None:
    base = tiny_folder if task == "control" else tiny_vae
    out = tmp_path / "plain"
    recipe = write_recipe(task, out, 8, base)
    plain = trained(recipe, 3)
    compiled = trained(recipe, 3, f"out={tmp_path / 'compiled'}", "compile=true")
    networks = [compiled.task.model, *([compiled.task.base] if task == "control" else [])]
    for network in networks:
        assert any(module._compiled_call_impl is not None for module in network.modules())
    taken = [m for network in networks for m in network.modules() if m._compiled_call_impl is not None]
    assert taken and all(isinstance(module, REGIONS) for module in taken)
    assert all(module._compiled_call_impl is None for module in compiled.ema.model.modules())
    before = trained(recipe, 0, f"out={tmp_path / 'before'}").task.model.state_dict()
    for name, weight in plain.task.model.state_dict().items():
        other = compiled.task.model.state_dict()[name]
        moved = (weight - before[name]).abs().max()
        assert (weight - other).abs().max() <= 1e-5 + 0.05 * moved, f"{name}: {(weight - other).abs().max()}"
    assert any((weight != before[name]).any() for name, weight in plain.task.model.state_dict().items())
    assert compiled.task.validate(compiled.ema.model).keys() == plain.task.validate(plain.ema.model).keys()


def test_without_a_compiler_it_says_so_and_trains(
    tmp_path: Path,
    tiny_vae: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("orrery.nn.compiling.shutil.which", lambda name: None)
    trainer = trained(write_recipe("flow", tmp_path / "out", 4, tiny_vae), 1, "compile=true")
    assert "needs a C++ compiler, such as g++, and none was found: steps run uncompiled" in capsys.readouterr().err
    assert all(module._compiled_call_impl is None for module in trainer.task.model.modules())


@pytest.mark.parametrize(("precision", "kernel"), [("bf16", "products"), ("fp32", "sdpa")])
def test_attention_of_a_step(
    precision: str,
    kernel: str,
    tmp_path: Path,
    tiny_vae: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = set()
    attend = kernels.attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        seen.add(kernels.current_kernel())
        return attend(q, k, v)

    monkeypatch.setattr("orrery.nn.attention.attention", watched)
    trained(write_recipe("flow", tmp_path / precision, 4, tiny_vae), 1, f"precision={precision}")
    assert seen == {kernel} and kernels.current_kernel() == "sdpa"
