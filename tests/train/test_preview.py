"""Distilling a preview decoder: it comes closer to the VAE, resumes bit for bit, and is found beside the VAE."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from orrery.errors import InputError
from orrery.train.checkpoint import CheckpointFolder
from orrery.train.preview import PreviewTask
from orrery.train.recipe import load_recipe
from orrery.train.start import open_run, train
from orrery.weights.preview import PREVIEW, load_preview
from orrery.weights.sources import find_model


@pytest.fixture
def recipe(dataset: Path, tiny_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))

    def write(out: str, *more: str) -> Path:
        lines = [
            'task = "preview"', f'out = "{tmp_path / out}"', f'base = "{base}"', "steps = 6", "batch = 2", "seed = 3",
            'device = "cpu"', "threads = 1", "preview.override.widths = [12, 8]", "loss.noise = 0.2",
            f'data.root = "{dataset}"', "data.heldout_from = 1000", "data.frames = 5", "data.size = [16, 16]",
            'optimizer.name = "muon"', "optimizer.lr = 1e-2", "optimizer.matrix_lr = 1e-2", "optimizer.warmup = 0",
            "optimizer.ema = 0.5", "checkpoint.steps = 3", "checkpoint.keep = 3", "validation.steps = 1000",
            "validation.clips = 2", "validation.sheet = 1", "log.steps = 1000",
        ]  # fmt: skip
        path = tmp_path / f"{out}.toml"
        path.write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
        return path

    return write


def test_learns_what_the_vae_draws(recipe: Callable[..., Path]) -> None:
    path = recipe("learns", "data.cache_gb = 1e-6")  # no picture fits: each is made anew
    trainer = open_run(load_recipe(path, ["steps=60", "loss.noise=0"]), torch.device("cpu"))
    task = trainer.task
    before = task.validate(trainer.ema.model)
    for _ in range(60):
        trainer.train_step()
    after = task.validate(trainer.ema.model)
    assert after["psnr"] > before["psnr"] + 3
    assert after["vae_truth"] == before["vae_truth"], "the VAE is frozen"


def test_targets_are_the_vaes_pictures_with_or_without_a_cache(recipe: Callable[..., Path]) -> None:
    batches = []
    for name, room in (("kept", "1.0"), ("anew", "0.0")):
        task = open_run(load_recipe(recipe(name, f"data.cache_gb = {room}")), torch.device("cpu")).task
        assert isinstance(task, PreviewTask)
        batches.append([task.batch() for _ in range(6)])
        assert bool(task._pictures) == (name == "kept")
    for (one, picture), (other, same) in zip(*batches, strict=True):
        assert torch.equal(one, other) and torch.equal(picture, same)
    latents, pictures = batches[0][0]
    assert latents.shape == (2, 16, 2, 2, 2) and pictures.shape == (2, 3, 5, 16, 16)
    clean = [task.vae.decode(task.latents[i, side][None].float()) for i in range(8) for side in range(2)]
    for picture in pictures:
        assert min((picture - decoded[0].clamp(-1, 1)).abs().max() for decoded in clean) < 0.5 / 127.5 + 1e-6


def test_resumed_run_is_bitwise_the_same_and_exports(recipe: Callable[..., Path], tmp_path: Path) -> None:
    whole = train(recipe("whole"))
    train(recipe("parts"), ["steps=6"], max_seconds=0.0)  # stops after a step
    train(recipe("parts"))
    states: list[dict[str, Any]] = []
    for name in ("whole", "parts"):
        latest = CheckpointFolder(tmp_path / name / "checkpoints", 1).latest()
        assert latest is not None
        states.append(CheckpointFolder.load(latest))
    assert states[0]["step"] == states[1]["step"] == 6
    for part in ("model", "ema"):
        for key, value in states[0][part].items():
            assert torch.equal(value, states[1][part][key]), f"{part} {key} differs"
    base = tmp_path / "base"
    assert load_preview(find_model(base)) is None
    train(recipe("whole"), export=base)
    loaded = load_preview(find_model(base))
    assert loaded is not None
    for key, value in states[0]["ema"].items():
        assert torch.equal(loaded.state_dict()[key], value.half().float())
    assert load_file(whole / PREVIEW).keys() == loaded.state_dict().keys()
    assert list((tmp_path / "whole" / "sheets").glob("*.png"))


def test_a_decoder_for_another_vae_is_refused(recipe: Callable[..., Path]) -> None:
    path = recipe("other", "preview.override.time_patch = 2")
    with pytest.raises(InputError, match="for another VAE: 16 channels, 2 frames and 8x8 pixels"):
        open_run(load_recipe(path), torch.device("cpu"))
