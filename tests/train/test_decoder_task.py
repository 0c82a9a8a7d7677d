"""Tuning a decoder: it draws better, the encoder stays, and the run resumes bit for bit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orrery.errors import InputError
from orrery.nn.dit import DiT
from orrery.train.checkpoint import CheckpointFolder
from orrery.train.recipe import load_recipe
from orrery.train.start import open_run, train
from orrery.video import Video
from orrery.weights import load_part, save_transformer
from orrery.weights.config import read_config
from orrery.weights.sources import find_model


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Magenta squares that drift over grey, which orrery-mini has never seen."""
    root = tmp_path_factory.mktemp("episodes") / "squares"
    root.mkdir()
    with open(root / "index.jsonl", "w", encoding="utf-8") as index:
        for seed in range(6):
            x, y = np.random.default_rng(seed).integers(4, 40, 2)
            clip = np.full((13, 64, 64, 3), 150, np.uint8)
            for t in range(13):
                clip[t, y : y + 10, x + t : x + t + 10] = (240, 25, 200)
            folder = root / f"push-{seed:07d}"
            folder.mkdir()
            Video(clip, 12).save(folder / "rgb.mp4", crf=1, pixel_format="yuv444p")
            np.save(folder / "actions.npy", np.zeros((13, 1), np.float32))
            (folder / "meta.json").write_text(json.dumps({"action_names": ["x"]}))
            line = {"id": folder.name, "scene": "push", "seed": seed, "caption": "-", "frames": 13, "fps": 12.0}
            index.write(json.dumps(line) + "\n")
    return root


@pytest.fixture
def recipe(tmp_path: Path, episodes: Path) -> Callable[..., Path]:
    def write(out: str, steps: int, **more: Any) -> Path:
        lines = {
            "task": "decoder", "out": str(tmp_path / out), "base": "mini", "steps": steps, "batch": 1, "seed": 1,
            "device": "cpu", "threads": 1, "frames": 9, "parts": ["decoder.upsamples.4", "decoder.head"],
            "data.root": str(episodes), "data.heldout": 2, "loss.foreground": 3.0, "optimizer.lr": 2e-3,
            "optimizer.warmup": 0, "optimizer.decay": "none", "optimizer.ema": 0.5, "validation.steps": 1000,
            "validation.clips": 2, "validation.sheet": 1, "log.steps": 1000,
        } | more  # fmt: skip
        path = tmp_path / f"{out}.toml"
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in lines.items()))
        return path

    return write


def opened(path: Path):
    return open_run(load_recipe(path), torch.device("cpu"))


def test_it_draws_better_and_only_the_parts_change(recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = opened(recipe("run", 16))
    before = trainer.task.validate(trainer.ema.model)
    assert before["psnr"] == pytest.approx(before["before"], abs=1e-4)
    trainer.run()
    after = trainer.task.validate(trainer.ema.model)
    assert after["before"] == pytest.approx(before["before"]) and after["psnr"] > before["psnr"] + 1
    old = trainer.task.frozen.state_dict()
    for name, value in trainer.ema.model.state_dict().items():
        assert torch.equal(value, old[name]) == (not name.startswith(("decoder.upsamples.4", "decoder.head"))), name
    base = find_model("mini", controls=()).config
    transformer = DiT(dataclasses.replace(base.transformer, depth=1))
    shared = {"vae": "mini", "text": "mini"}
    config = dataclasses.replace(base, transformer=transformer.config, shared=shared, controls={}, training={})
    folder = save_transformer(tmp_path / "model", transformer, config, "# a card")
    train(recipe("run", 16), export=folder)
    assert read_config(folder).own_decoder and read_config(folder).training["decoder"]["step"] == 16
    loaded = load_part(find_model(folder), "vae").state_dict()
    for name, value in trainer.ema.model.state_dict().items():
        assert torch.equal(loaded[name], value.half().float()), name  # stored in float16, and nothing else lost


def test_a_killed_run_resumes_bit_for_bit(recipe: Callable[..., Path]) -> None:
    whole = opened(recipe("whole", 4))
    whole.run()
    assert [path.name for path in train(recipe("half", 2)).iterdir()] == ["decoder.safetensors"]  # no model there
    rest = opened(recipe("half", 4))
    rest.run()
    one, two = (CheckpointFolder.load(CheckpointFolder(r.folder / "checkpoints", 2).latest()) for r in (whole, rest))
    for key, value in one["model"].items():
        assert torch.equal(value, two["model"][key]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ["encoder.conv1"]}, "no part of the VAE's decoder"),
        ({"parts": []}, "parts"),
        ({"frames": 8}, "frames = 8; allowed: 4k + 1"),
        ({"data.heldout": 6}, "allowed: fewer"),
    ],
)
def test_refuses_what_cannot_be(recipe: Callable[..., Path], change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        opened(recipe("run", 5, **change))
    assert message in str(caught.value)
