"""The two tasks: what the losses say, that they fall, and what is exported."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orrery.errors import InputError
from orrery.train.flow import FlowTask, generated_error
from orrery.train.loop import Trainer
from orrery.train.recipe import VAELossRecipe, load_recipe
from orrery.train.start import open_run, train
from orrery.train.vae import VAETask, kl_divergence, psnr, reconstruction_loss, sobel

CPU = torch.device("cpu")
FAST = {"lr": 1e-2, "matrix_lr": 1e-2, "hold": 0.5}


def opened(recipe: Path) -> Trainer:
    torch.set_num_threads(1)
    return open_run(load_recipe(recipe), CPU)


def test_sobel_of_ramps_and_constants() -> None:
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    horizontal, vertical = sobel((2 * x - 3 * y)[None, None, None])
    assert horizontal.shape[-2:] == (4, 5)
    assert torch.allclose(horizontal, torch.full_like(horizontal, 2)) and torch.allclose(
        vertical, torch.full_like(vertical, -3)
    )


def test_foreground_weight_moves_the_loss_to_things_and_keeps_its_scale() -> None:
    truth = torch.zeros(1, 3, 1, 8, 8)
    thing = torch.zeros(1, 1, 1, 8, 8)
    thing[..., :4, :4] = 1
    recipe = VAELossRecipe(foreground=5.0)
    on_thing = reconstruction_loss(truth + thing, truth, thing, recipe)["l1"]
    on_rest = reconstruction_loss(truth + (1 - thing), truth, thing, recipe)["l1"]
    # 16 of 64 pixels weigh 5, the mean weight is 2: 16 * 5 / 2 / 64 and 48 / 2 / 64
    assert float(on_thing) == pytest.approx(0.625) and float(on_rest) == pytest.approx(0.375)
    even = reconstruction_loss(truth + 0.5, truth, thing, recipe)
    assert float(even["l1"]) == pytest.approx(0.5) and float(even["l2"]) == pytest.approx(0.25)
    assert float(even["sharpness"]) == pytest.approx(0, abs=1e-6)
    spectrum = reconstruction_loss(truth + 0.5, truth, None, VAELossRecipe(sharpness="fft"))["sharpness"]
    assert float(spectrum) == pytest.approx(0.5 * 8 / 40, rel=1e-4), "a constant error is all in one coefficient"


def test_kl_and_psnr_against_their_formulas() -> None:
    assert float(kl_divergence(torch.zeros(4), torch.zeros(4))) == 0
    assert float(kl_divergence(torch.full((4,), 2.0), torch.full((4,), math.log(3.0)))) == pytest.approx(
        0.5 * (4 + 3 - 1 - math.log(3))
    )
    truth = torch.zeros(2, 3, 1, 4, 4)
    mask = torch.zeros(2, 1, 1, 4, 4)
    mask[..., :2] = 1
    off = truth + 0.2 * mask  # 0.1 of the full range on half of the pixels
    assert psnr(off, truth).tolist() == pytest.approx([10 * math.log10(2 / 0.01)] * 2, rel=1e-4)
    assert psnr(off, truth, mask).tolist() == pytest.approx([20.0] * 2, rel=1e-4)


def test_loss_counts_generated_frames_only_whatever_their_number() -> None:
    target = torch.zeros(3, 2, 5, 2, 2)
    v = torch.ones_like(target)
    v[:, :, :2] = 100.0
    mask = torch.zeros(3, 1, 5, 2, 2)
    mask[1, :, :2] = 1
    mask[2] = 1
    whole, given, nothing = generated_error(v, target, mask).tolist()
    assert whole == pytest.approx((2 * 1e4 + 3) / 5)
    assert given == pytest.approx(1.0), "the official denominator would give 0.6"
    assert nothing == 0.0


def test_vae_overfits_four_clips_and_exports_normalised_latents(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe("vae", tmp_path / "run", 120, data={"max_clips": 4}, batch=4, flip=0.0, optimizer=FAST)
    trainer = opened(recipe)
    task = trainer.task
    assert isinstance(task, VAETask)
    losses = [float(trainer.train_step()[1]["loss"]) for _ in range(120)]
    assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:5])
    trainer.export(tmp_path / "vae", str(recipe))
    from orrery.train.export import load_vae

    vae, _ = load_vae(tmp_path / "vae")
    frames, _ = task.batch()
    latents = torch.cat([vae.encode(frames), vae.encode(frames.flip(0))])
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.1
    assert (latents.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 0.1
    assert float(psnr(vae.decode(vae.encode(frames)), frames).mean()) > 18
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    assert config["training"]["step"] == 120 and config["training"]["clips_seen"] == 480


def test_vae_batch_flips_pixels_and_masks_alike(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    task = opened(write_recipe("vae", tmp_path / "run", 1, flip=1.0, batch=8)).task
    assert isinstance(task, VAETask)
    order = task.order.state()
    frames, masks = task.batch()
    task.order.load_state(order)
    indices = task.order.take(8)
    assert masks is not None and frames.shape == (8, 3, 5, 16, 16) and masks.shape == (8, 1, 5, 16, 16)
    for row, index in enumerate(indices):
        clip = task.train[index]
        assert clip.foreground is not None
        assert np.array_equal(masks[row, 0].numpy() > 0, clip.foreground[:, :, ::-1])
        pixels = ((frames[row].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy().astype(np.uint8)
        assert np.array_equal(pixels, clip.frames[:, :, ::-1])


def test_flow_overfits_four_clips(tmp_path: Path, tiny_vae: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe("flow", tmp_path / "run", 200, tiny_vae, data={"max_clips": 4}, batch=4, optimizer=FAST)
    trainer = opened(recipe)
    task = trainer.task
    assert isinstance(task, FlowTask)
    fixed = [task.batch() for _ in range(4)]

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([float(task.loss(task.model, batch)[0]) for batch in fixed]))

    before = loss()
    for _ in range(200):
        trainer.train_step()
    assert loss() < 0.6 * before


def test_a_frozen_text_encoder_stays_as_it_was_drawn(
    tmp_path: Path, tiny_vae: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe("flow", tmp_path / "frozen", 4, tiny_vae, text={"frozen": True})
    trainer = open_run(load_recipe(recipe), torch.device("cpu"))
    before = {name: weight.clone() for name, weight in trainer.task.model.state_dict().items()}
    trainer.train_step()
    trainer.train_step()
    after = trainer.task.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("text."))
    assert not all(torch.equal(after[name], before[name]) for name in before if name.startswith("transformer."))


def test_held_out_scenes_are_told_apart(tmp_path: Path, dataset: Path, write_recipe: Callable[..., Path]) -> None:
    mixed = tmp_path / "mixed"
    shutil.copytree(dataset, mixed)
    lines = [json.loads(line) for line in (mixed / "index.jsonl").read_text().splitlines()]
    for line in lines:
        line["scene"] = "push" if line["seed"] == 1001 else "drop"
    (mixed / "index.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = write_recipe("vae", tmp_path / "out", 4, data={"root": str(mixed)})
    trainer = open_run(load_recipe(recipe), torch.device("cpu"))
    found = trainer.task.validate(trainer.ema.model)
    assert found["psnr_drop"] != found["psnr_push"]
    assert found["psnr"] == pytest.approx((found["psnr_drop"] + found["psnr_push"]) / 2)


def test_flow_batch_takes_captions_of_the_side_it_shows(
    tmp_path: Path, tiny_vae: Path, write_recipe: Callable[..., Path]
) -> None:
    task = opened(write_recipe("flow", tmp_path / "run", 1, tiny_vae, batch=8)).task
    assert isinstance(task, FlowTask)
    batch = task.batch()
    assert batch.x0.shape == (16, 16, 2, 2, 2) and batch.tokens.shape == (8, 12)
    assert torch.equal(batch.x0[0::2], batch.x0[1::2]) and not torch.equal(batch.noise[0::2], batch.noise[1::2])
    sides = set()
    for row in range(8):
        words = task.tokenizer.decode(batch.tokens[row].tolist())
        matches = [
            (i, m)
            for i in range(8)
            for m in range(2)
            if torch.equal(task.cache.latents[i, m].float(), batch.x0[2 * row]) and task.cache.captions[i][m] in words
        ]
        assert matches, f"the latents of sample {row} do not belong to its caption {words!r}"
        sides.add(matches[0][1])
    assert sides == {0, 1}


def test_flow_validation_is_fixed_and_leaves_the_random_state_alone(
    tmp_path: Path, tiny_vae: Path, write_recipe: Callable[..., Path]
) -> None:
    trainer = opened(write_recipe("flow", tmp_path / "run", 1, tiny_vae))
    state = trainer.random.torch.get_state()
    first, second = trainer.task.validate(trainer.ema.model), trainer.task.validate(trainer.ema.model)
    assert first == second and torch.equal(state, trainer.random.torch.get_state())
    names = ["loss", "loss_given0", "loss_given1", "loss_given2", *(f"loss_t{t}" for t in (0.1, 0.3, 0.5, 0.7, 0.9))]
    assert list(first) == names and first["loss_given2"] == 0, "2 latent frames, both given: nothing left to say"


def test_a_finished_flow_run_leaves_a_model_that_loads_and_a_sheet(
    tmp_path: Path, tiny_vae: Path, write_recipe: Callable[..., Path]
) -> None:
    from orrery.weights import load_model

    folder = train(write_recipe("flow", tmp_path / "run", 2, tiny_vae))
    model = load_model(folder)
    assert folder == tmp_path / "run" / "model" and model.config.frames == 5 and model.config.training["step"] == 2
    trained = opened(write_recipe("flow", tmp_path / "run", 2, tiny_vae)).ema.model.get_submodule("transformer")
    for name, value in trained.state_dict().items():
        assert torch.allclose(value.half().float(), model.transformer.state_dict()[name], atol=1e-7), name
    assert list((tmp_path / "run" / "sheets").glob("*.png"))
    assert "loss_given1" in (folder / "README.md").read_text()


def test_what_does_not_fit_is_said_before_training(
    tmp_path: Path, tiny_vae: Path, write_recipe: Callable[..., Path]
) -> None:
    wrong = [
        (
            write_recipe("vae", tmp_path / "a", 1, data={"size": [32, 32]}),
            r"is 16x16; the recipe's data\.size = \[32, 32\]",
        ),
        (write_recipe("vae", tmp_path / "b", 1, data={"frames": 9}), r"none of the 10 clips"),
        (write_recipe("vae", tmp_path / "c", 1, data={"heldout_from": 5000}), r"no held-out clip .* 5000"),
        (write_recipe("vae", tmp_path / "d", 1, vae={"preset": "huge"}), r"vae\.preset = 'huge'; allowed: "),
        (write_recipe("flow", tmp_path / "e", 1, tmp_path), r"no VAE in "),
        (
            write_recipe("flow", tmp_path / "f", 1, tiny_vae, transformer={"override": {"widht": 3}}),
            r"unknown key widht = 3",
        ),
    ]
    for recipe, message in wrong:
        with pytest.raises(InputError, match=message):
            train(recipe)
    with pytest.raises(InputError, match="no checkpoint to export"):
        train(write_recipe("vae", tmp_path / "g", 1), export=tmp_path / "x")


def test_skipped_steps_are_counted_and_a_hopeless_run_gives_up(
    tmp_path: Path, write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = opened(write_recipe("vae", tmp_path / "run", 100))
    weights = {name: value.clone() for name, value in trainer.ema.model.state_dict().items()}
    monkeypatch.setattr(VAETask, "loss", lambda self, model, batch: (next(model.parameters()).sum() * float("nan"), {}))
    monkeypatch.setattr(VAETask, "batch", lambda self: None)
    with pytest.raises(RuntimeError, match="50 steps in a row"):
        trainer.run()
    assert trainer.skipped == 50 and trainer.ema.updates == 0
    assert all(torch.equal(value, trainer.ema.model.state_dict()[name]) for name, value in weights.items())


def test_flow_batch_may_continue_a_chunk_and_cut_the_last_clause(
    tmp_path: Path, tiny_vae: Path, dataset: Path, write_recipe: Callable[..., Path]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    index = (data / "index.jsonl").read_text().replace(' left"', ' left, plain look"')
    (data / "index.jsonl").write_text(index.replace(' right"', ' right, plain look"'))
    recipe = write_recipe(
        "flow", tmp_path / "run", 1, tiny_vae, batch=8, data={"root": str(data)}, loss={"midstream": 1.0}
    )
    batch = opened(recipe).task.batch()
    assert batch.x0.shape == (16, 16, 1, 2, 2) and batch.noise.shape == batch.x0.shape
    task = opened(write_recipe("flow", tmp_path / "b", 1, tiny_vae, batch=8, data={"root": str(data)})).task
    assert isinstance(task, FlowTask)
    whole = {task.tokenizer.decode(row.tolist()) for row in task.batch().tokens}
    cut = write_recipe(
        "flow", tmp_path / "c", 1, tiny_vae, batch=8, data={"root": str(data)}, loss={"caption_cut": 1.0}
    )
    short = {task.tokenizer.decode(row.tolist()) for row in opened(cut).task.batch().tokens}
    assert all("plain look" in text for text in whole)
    assert not any("look" in text for text in short) and all("square moves" in text for text in short)


def test_a_refused_run_leaves_nothing_and_does_not_fix_its_clips(
    tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError, match=r"is 16x16; the recipe's data\.size"):
        train(write_recipe("vae", out, 1, data={"size": [32, 32]}))
    assert not out.exists()
    with pytest.raises(InputError, match="none of the 10 clips"):
        train(write_recipe("vae", out, 1, data={"scenes": ["zzz"]}))
    assert not out.exists()


@pytest.mark.parametrize("line", ['{"id": "a", "scene": "s", "seed": "q", "caption": "c", "frames": 5}', "[1]"])
def test_a_line_that_is_no_clip_is_named(tmp_path: Path, line: str, write_recipe: Callable[..., Path]) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match="is no clip"):
        train(write_recipe("vae", tmp_path / "run", 1, data={"root": str(tmp_path / "data")}))


@pytest.mark.parametrize("spoil", ["config.json", "vae.safetensors"])
def test_a_broken_vae_is_named(tmp_path: Path, tiny_vae: Path, spoil: str, write_recipe: Callable[..., Path]) -> None:
    broken = tmp_path / "vae"
    shutil.copytree(tiny_vae, broken)
    (broken / spoil).write_text("<html>")
    with pytest.raises(InputError, match="cannot be read"):
        train(write_recipe("flow", tmp_path / "run", 1, broken))
