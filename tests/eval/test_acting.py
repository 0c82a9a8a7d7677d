"""Prediction by horizon: perfect predictions are perfect, a model that ignores its actions is found out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orrery.errors import InputError
from orrery.eval.acting import LOST, compare, measure_horizons
from orrery.eval.metrics import bootstrap
from orrery.sim.tabletop import HELD, Tabletop, draw_layout
from orrery.world import World, load


@pytest.fixture(scope="module")
def world(acting_folder: Path) -> World:
    return load(acting_folder)


class Filmed:
    """Three episodes of the simulator in memory."""

    fps, action_names, ids = 12.0, ("x", "y"), ["a", "b", "c"]

    def __init__(self) -> None:
        self._frames, self._actions = [], []
        table = Tabletop()
        for seed in range(3):
            rng = np.random.default_rng(seed)
            layout = draw_layout(rng)
            actions = np.repeat(rng.uniform(-1, 1, (3, 2)), HELD, 0)
            self._frames.append(np.stack([table.reset(layout), *(table.step(action) for action in actions)]))
            self._actions.append(actions.astype(np.float32))

    def __len__(self) -> int:
        return 3

    def frames(self, index: int) -> np.ndarray:
        return self._frames[index]

    def actions(self, index: int) -> np.ndarray:
        return self._actions[index]

    def text(self, index: int) -> str:
        return ""


@pytest.fixture(scope="module")
def filmed() -> Filmed:
    return Filmed()


def test_the_truth_has_no_error_and_a_lost_thing_counts(world: World, filmed: Filmed) -> None:
    truth = np.stack([filmed.frames(i) for i in range(3)])
    same = compare(world, truth, truth)
    assert same["ssim"].min() > 0.999 and same["latent"].max() < 1e-6
    assert np.nanmax(same["cube"]) == 0 and np.nanmax(same["peg"]) == 0
    empty = compare(world, np.full_like(truth, 150), truth)
    assert (empty["cube"][~np.isnan(empty["cube"])] == 100 * LOST).all()
    moved = truth.copy()
    moved[:, :, :, 4:] = truth[:, :, :, :-4]  # 4 pixels to the right, some 10 cm
    shifted = compare(world, moved, truth)
    assert 7 < np.nanmedian(shifted["cube"]) < 14


def test_measures_model_shuffled_and_first_frame(world: World, filmed: Filmed) -> None:
    told: list[tuple[int, int]] = []
    found = measure_horizons(world, filmed, [0, 1, 2], 3, progress=lambda *each: told.append(each))
    assert set(found.values) == {"model", "shuffled", "copied", "coded"}
    assert all(values.shape == (3, 3) for row in found.values.values() for values in row.values())
    assert told[-1] == (24, 24)
    copied = np.repeat(filmed.frames(1)[None, :1], 13, axis=1)
    alone = compare(world, copied, filmed.frames(1)[None])
    assert found.values["copied"]["psnr"][1] == pytest.approx(alone["psnr"][0])
    assert (found.videos["model"] != found.videos["shuffled"]).any()
    with torch.no_grad():
        pixels = torch.from_numpy(filmed.frames(2).transpose(3, 0, 1, 2).copy())[None].float() / 127.5 - 1
        again = world.model.vae.decode(world.model.vae.encode(pixels))[0].permute(1, 2, 3, 0)
    levels = ((again + 1) * 127.5).clamp(0, 255).numpy()
    assert np.abs(found.videos["coded"][2] - levels).max() < 0.51


def test_clearly_better_means_that_the_interval_leaves_out_zero(world: World, filmed: Filmed) -> None:
    found = measure_horizons(world, filmed, [0, 1, 2], 2)
    found.values["model"]["cube"] = found.values["shuffled"]["cube"] - 5.0
    assert (found.clearly_better("cube") > 0).all()
    found.values["model"]["psnr"] = found.values["shuffled"]["psnr"] - 1.0
    assert (found.clearly_better("psnr") < 0).all()


def test_the_bootstrap_leaves_out_what_is_not_there() -> None:
    mean, low, high = bootstrap(np.array([1.0, 2.0, 3.0, np.nan]))
    assert mean == 2 and low < 2 < high
    assert np.isnan(bootstrap(np.array([1.0]))).all()


def test_refuses_what_cannot_be_measured(world: World, filmed: Filmed) -> None:
    with pytest.raises(InputError, match="at least 2"):
        measure_horizons(world, filmed, [0], 2)
    with pytest.raises(InputError, match="has 13 frames; 17 are asked for"):
        measure_horizons(world, filmed, [0, 1], 4)
