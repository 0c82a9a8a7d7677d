"""Post-training on actions: the model learns what they do, says so while it trains, and resumes bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orrery.errors import InputError
from orrery.train.checkpoint import CheckpointFolder
from orrery.train.recipe import load_recipe
from orrery.train.start import open_run, train
from orrery.video import Video
from orrery.weights import load_model
from orrery.weights.config import read_config
from orrery.world import load


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lamp: red and blue are as bright as the two numbers of the action say, which are held for four frames."""
    root = tmp_path_factory.mktemp("episodes") / "squares"
    root.mkdir()
    with open(root / "index.jsonl", "w", encoding="utf-8") as index:
        for seed in range(20):
            rng = np.random.default_rng(seed)
            actions = np.repeat(rng.choice([-1.0, 1.0], (4, 2)), 4, 0)
            clip = np.full((17, 32, 32, 3), 120, np.uint8)
            clip[1:, :, :, ::2] = (120 + 90 * actions)[:, None, None]
            folder = root / f"push-{seed:07d}"
            folder.mkdir()
            Video(clip, 10).save(folder / "rgb.mp4", crf=1, pixel_format="yuv444p")
            np.save(folder / "actions.npy", np.concatenate([actions, actions[-1:]]).astype(np.float32))
            (folder / "meta.json").write_text(json.dumps({"action_names": ["x", "y"]}))
            line = {"id": folder.name, "scene": "push", "seed": seed, "caption": "a square", "frames": 17, "fps": 10.0}
            index.write(json.dumps(line) + "\n")
    return root


@pytest.fixture
def recipe(tmp_path: Path, tiny_folder: Path, episodes: Path) -> Callable[..., Path]:
    def write(out: str, steps: int, **more: Any) -> Path:
        lines = {
            "task": "action", "out": str(tmp_path / out), "base": str(tiny_folder), "steps": steps, "batch": 8,
            "seed": 1, "device": "cpu", "threads": 1, "data.root": str(episodes), "data.heldout": 4,
            "window.latents": 3, "window.given": 2, "optimizer.lr": 3e-3, "optimizer.warmup": 0,
            "optimizer.decay": "none", "optimizer.ema": 0.9, "validation.steps": 1000, "validation.clips": 4,
            "validation.sheet": 1, "validation.sample_steps": 2, "validation.rollout": 2, "log.steps": 1000,
        } | more  # fmt: skip
        path = tmp_path / f"{out}.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
        return path

    return write


def opened(path: Path):
    return open_run(load_recipe(path), torch.device("cpu"))


def test_the_model_learns_what_actions_do_and_says_so(recipe: Callable[..., Path]) -> None:
    trainer = opened(recipe("run", 300))
    before = trainer.task.validate(trainer.ema.model)
    assert before["sensitivity"] == 0 and before["shuffled"] == pytest.approx(before["loss"], abs=1e-6)
    trainer.run()
    after = trainer.task.validate(trainer.ema.model)
    assert after["loss"] < 0.8 * before["loss"]
    assert after["sensitivity"] > 0.05
    assert after["shuffled"] > 1.02 * after["loss"]
    assert list((trainer.folder / "sheets").glob("*.png"))


def test_new_action_embedders_start_at_the_base(recipe: Callable[..., Path], tiny_folder: Path) -> None:
    """Step 0 is the base model: its kept blocks as they are, whatever the actions."""
    from orrery.nn.dit import Conditions

    task = opened(recipe("run", 5)).task
    base, network = load_model(tiny_folder).transformer, task.model["transformer"]
    x, times = torch.randn(2, 16, 3, 8, 8), torch.full((2, 3), 400.0)
    text = torch.zeros(1, 1, base.config.text_width)
    with torch.no_grad():
        plain = base(x, times, Conditions(text))
        acted = network(x, times, Conditions(text, actions=torch.randn(2, 2, 8)))
    assert torch.allclose(plain, acted, atol=1e-5)
    cut = opened(recipe("cut", 5, blocks=[1])).task
    kept = cut.model["transformer"].state_dict()["blocks.0.mlp.layer1.weight"]
    assert torch.equal(kept, base.state_dict()["blocks.1.mlp.layer1.weight"])


def test_the_statistics_are_those_of_the_training_episodes(recipe: Callable[..., Path], episodes: Path) -> None:
    task = opened(recipe("run", 5, scale=[2.0, 1.0])).task
    rows = np.concatenate([np.load(episodes / f"push-{seed:07d}" / "actions.npy")[:16] for seed in range(16)])
    told = task.config.actions
    assert told.names == ("x", "y") and (told.window, told.given) == (3, 2)
    assert np.allclose(told.mean, (rows * [2, 1]).mean(0), atol=1e-5)
    assert np.allclose(told.std, (rows * [2, 1]).std(0), atol=1e-5)
    assert torch.allclose(torch.cat(task.train.actions).reshape(-1, 2).mean(0), torch.zeros(2), atol=1e-4)
    assert (told.low, told.high) == ((-1.0, -1.0), (1.0, 1.0))


def test_windows_hold_the_actions_before_each_latent_frame(recipe: Callable[..., Path], episodes: Path) -> None:
    task = opened(recipe("run", 5)).task
    batch = task.batch()
    assert batch.actions.shape[:2] == (8, batch.x0.shape[2] - 1) and batch.actions.shape[2] == 8
    told = task.config.actions.told(np.load(episodes / "push-0000000" / "actions.npy")[:16])
    assert torch.allclose(task.train.actions[0], told.reshape(4, 8))


def test_a_killed_run_resumes_bit_for_bit(recipe: Callable[..., Path]) -> None:
    whole = opened(recipe("whole", 6))
    whole.run()
    half = opened(recipe("half", 3))
    half.run()
    rest = opened(recipe("half", 6))
    assert rest.step == 3
    rest.run()
    one, two = (CheckpointFolder.load(CheckpointFolder(r.folder / "checkpoints", 2).latest()) for r in (whole, rest))
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key


def test_exports_a_model_that_acts(recipe: Callable[..., Path], tmp_path: Path) -> None:
    folder = train(recipe("run", 3))
    config = read_config(folder)
    assert config.actions is not None and config.frames == 9 and config.training["step"] == 3
    world = load(folder)
    start = np.full((32, 48, 3), 90, np.uint8)
    assert world.rollout(start, np.zeros((8, 2))).frames.shape == (9, 32, 48, 3)
    shared = train(recipe("shared", 2, base="mini", blocks=[0, 6]))
    assert read_config(shared).shared == {"vae": "mini", "text": "mini"}
    assert {path.name for path in shared.iterdir()} == {"config.json", "README.md", "transformer.safetensors"}
    assert load(shared).rollout(np.full((64, 64, 3), 9, np.uint8), np.zeros((4, 2))).frames.shape == (5, 64, 64, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks": [7]}, "blocks names 7; allowed are 0 to 1"),
        ({"scale": [1.0]}, "scale has 1 numbers, an action has 2"),
        ({"data.heldout": 20}, "data.heldout = 20; allowed: fewer"),
        ({"window.given": 3}, "given = 3; allowed: less than latents = 3"),
        ({"window.latents": 9}, "has 33 frames"),
    ],
)
def test_refuses_what_cannot_be(recipe: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(recipe("run", 5, **change))
    assert message in str(caught.value)
