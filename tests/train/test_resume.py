"""Training killed at any moment and started again arrives at the weights of an undisturbed run, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from orrery.errors import InputError
from orrery.train.checkpoint import CheckpointFolder
from orrery.train.loop import Randomness
from orrery.train.start import train

# Run in a process of its own, which SIGKILLs itself: in the middle of a step, or when half of a checkpoint is written.
TRAIN = """
import os, signal, sys
from pathlib import Path
import torch
from orrery.train import optim, start

recipe, moment, number = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

step, save = optim.Optimizers.step, torch.save

def step_or_die(self, count, loss):
    if moment == "step" and count == number:
        die()
    return step(self, count, loss)

def save_or_die(state, path):
    save(state, path)
    if moment == "save" and state["step"] == number:
        os.truncate(path, path.stat().st_size // 2)
        die()

optim.Optimizers.step, torch.save = step_or_die, save_or_die
start.train(recipe)
"""


def final_state(out: Path) -> dict[str, Any]:
    latest = CheckpointFolder(out / "checkpoints", 1).latest()
    assert latest is not None
    return CheckpointFolder.load(latest)


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Weights, EMA, optimizer states, random states and data position are equal, bit for bit."""
    assert one["step"] == other["step"]
    for part in ("model", "ema"):
        assert one[part].keys() == other[part].keys()
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), f"{part} {name} differs"
    for left, right in zip(one["optimizers"], other["optimizers"], strict=True):
        for index, values in left["state"].items():
            for name, tensor in values.items():
                assert torch.equal(tensor, right["state"][index][name]), f"optimizer {index} {name} differs"
    assert torch.equal(one["random"]["torch"], other["random"]["torch"])
    assert one["random"]["numpy"] == other["random"]["numpy"]
    assert one["task"] == other["task"]


@pytest.mark.parametrize(("task", "moment", "number", "survives"), [("vae", "step", 6, 4), ("flow", "save", 12, 8)])
def test_killed_and_resumed_is_bitwise_the_same(
    task: str,
    moment: str,
    number: int,
    survives: int,
    tmp_path: Path,
    tiny_vae: Path,
    write_recipe: Callable[..., Path],
) -> None:
    """SIGKILL between two checkpoints, or while one is written; then the same command again."""
    steps, killed, whole = 16, tmp_path / "killed", tmp_path / "whole"
    recipe = write_recipe(task, killed, steps, tiny_vae)
    process = subprocess.run([sys.executable, "-c", TRAIN, str(recipe), moment, str(number)], capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()[-2000:]
    assert final_state(killed)["step"] == survives
    train(recipe)
    train(write_recipe(task, whole, steps, tiny_vae))
    assert_same_run(final_state(killed), final_state(whole))
    logged = [json.loads(line) for line in (killed / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == list(range(1, steps + 1)), "each step once"


def test_sigterm_saves_and_the_same_command_continues(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle of step 5 finishes that step; no checkpoint was due there."""
    from orrery.train.vae import VAETask

    draw, calls = VAETask.batch, []

    def batch(self: VAETask) -> Any:
        calls.append(None)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self)

    monkeypatch.setattr(VAETask, "batch", batch)
    recipe = write_recipe("vae", tmp_path / "stopped", 10, checkpoint={"steps": 100})
    with pytest.raises(SystemExit) as stopped:
        train(recipe)
    assert stopped.value.code == 130, "so that a script does not take a stopped run for a finished one"
    assert final_state(tmp_path / "stopped")["step"] == 5
    assert train(recipe) == tmp_path / "stopped" / "model"
    train(write_recipe("vae", tmp_path / "whole", 10, checkpoint={"steps": 100}))
    assert len(calls) == 20
    assert_same_run(final_state(tmp_path / "stopped"), final_state(tmp_path / "whole"))


def test_data_that_grew_is_taken_up_only_when_asked(
    tmp_path: Path, dataset: Path, write_recipe: Callable[..., Path], more_clips: Callable[..., None]
) -> None:
    import shutil

    root, out = tmp_path / "grows", tmp_path / "run"
    shutil.copytree(dataset, root)
    recipe = write_recipe("vae", out, 2, data={"root": str(root)})
    train(recipe)
    more_clips(root, [20, 21, 22])
    train(recipe, ["steps=3"])
    assert len(json.loads((out / "clips.json").read_text())["train"]) == 8
    train(recipe, ["steps=4"], refresh_data=True)
    assert len(json.loads((out / "clips.json").read_text())["train"]) == 11


def test_a_changed_recipe_is_refused_unless_it_only_moves_the_end(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe("vae", tmp_path / "run", 2)
    train(recipe)
    with pytest.raises(InputError, match=r"optimizer\.lr = 0\.003, the recipe now says 0\.01"):
        train(recipe, ["optimizer.lr=0.01"])
    assert final_state(tmp_path / "run")["step"] == 2
    train(recipe, ["steps=4", "checkpoint.keep=1"])
    assert final_state(tmp_path / "run")["step"] == 4
    assert len(CheckpointFolder(tmp_path / "run" / "checkpoints", 1).paths()) == 1


def test_one_run_directory_has_one_trainer(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    from orrery.train.start import claimed

    recipe = write_recipe("vae", tmp_path / "run", 2)
    with claimed(tmp_path / "run"), pytest.raises(InputError, match="another process is training"):
        train(recipe)


def test_checkpoint_is_whole_or_absent(tmp_path: Path, full_disk: Callable[[int], Any]) -> None:
    """A disk that fills up while the second checkpoint is written: the first stays, and nothing else."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    first = folder.save(1, {"step": 1, "weights": torch.arange(4)})
    with full_disk(50_000), pytest.raises(InputError, match="step-000000002"):
        folder.save(2, {"step": 2, "weights": torch.zeros(200_000)})
    assert folder.paths() == [first] and os.listdir(folder.folder) == [first.name]
    assert torch.equal(CheckpointFolder.load(first)["weights"], torch.arange(4))


def test_checkpoints_beyond_keep_and_what_killed_writers_left_are_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    (tmp_path / ".step-000000007.1234.partial.pt").write_bytes(b"half")
    for step in (8, 9, 10):
        folder.save(step, {"step": step})
    assert sorted(os.listdir(tmp_path)) == ["step-000000009.pt", "step-000000010.pt"]


def test_random_state_round_trips_through_a_checkpoint(tmp_path: Path) -> None:
    random = Randomness(5)
    random.numpy.random(3), torch.randn(3, generator=random.torch)
    path = CheckpointFolder(tmp_path, 1).save(1, {"random": random.state()})
    expected = random.numpy.random(4).tolist(), torch.randn(4, generator=random.torch)
    other = Randomness(6)
    other.load_state(CheckpointFolder.load(path)["random"])
    assert other.numpy.random(4).tolist() == expected[0]
    assert torch.equal(torch.randn(4, generator=other.torch), expected[1])
