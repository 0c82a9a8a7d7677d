"""The tabletop as Gymnasium environments: the contract, the twins, the errors, batches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.error import InvalidAction, ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import orrery.env
from orrery.data.episodes import open_episodes
from orrery.env.cells import SUCCESS
from orrery.errors import InputError
from orrery.sim.detect import detect
from orrery.sim.store import write_dataset

orrery.env.register()


@pytest.fixture
def make(acting_folder: Path) -> Callable[..., gymnasium.Env]:
    def build(kind: str, **options: Any) -> gymnasium.Env:
        if kind == "model":
            return gymnasium.make(orrery.env.MODEL, model=acting_folder, **options)
        return gymnasium.make(orrery.env.TRUTH, **options)

    return build


@pytest.fixture
def make_many(acting_folder: Path) -> Callable[..., Any]:
    def build(kind: str, count: int, **options: Any) -> Any:
        name = orrery.env.MODEL if kind == "model" else orrery.env.TRUTH
        options |= {"model": acting_folder} if kind == "model" else {}
        return gymnasium.make_vec(name, num_envs=count, vectorization_mode="vector_entry_point", **options)

    return build


@pytest.mark.parametrize("kind", ["model", "truth"])
def test_passes_gymnasiums_checker(make: Callable[..., gymnasium.Env], kind: str) -> None:
    check_env(make(kind, render_mode="rgb_array").unwrapped)


def test_twins_have_the_same_spaces_and_begin_alike(make: Callable[..., gymnasium.Env]) -> None:
    model, truth = make("model"), make("truth")
    assert model.observation_space == truth.observation_space and model.action_space == truth.action_space
    for seed in (0, 5):
        (first, told), (second, also) = model.reset(seed=seed), truth.reset(seed=seed)
        assert (first["image"] == second["image"]).all() and (first["goal"] == second["goal"]).all()
        assert told == also
    (third, _), (fourth, _) = model.reset(), truth.reset()  # the next episode of the same seed
    assert (third["image"] == fourth["image"]).all() and (third["goal"] != first["goal"]).any()


@pytest.mark.parametrize("kind", ["model", "truth"])
def test_same_seed_same_episode_bit_for_bit(make: Callable[..., gymnasium.Env], kind: str) -> None:
    env, actions = make(kind), np.random.default_rng(0).uniform(-1, 1, (5, 2)).astype(np.float32)
    runs = []
    for _ in range(2):
        env.reset(seed=3)
        runs.append([env.step(action) for action in actions])
    for (one, reward, *_), (two, again, *_) in zip(*runs, strict=True):
        assert (one["image"] == two["image"]).all() and reward == again


@pytest.mark.parametrize("kind", ["model", "truth"])
def test_errors_that_users_of_gymnasium_expect(make: Callable[..., gymnasium.Env], kind: str) -> None:
    env = make(kind, max_steps=1)
    with pytest.raises(ResetNeeded):
        env.step(np.zeros(2, np.float32))
    with pytest.raises(ResetNeeded):
        env.unwrapped.step(np.zeros(2))
    bare = env.unwrapped
    bare.reset(seed=0)
    for action, message in (
        (np.array([0.0, 1.5]), "allowed is -1 to 1"),
        (np.array([0.0, np.nan]), "not finite"),
        (np.zeros(3), "allowed is"),
        (np.zeros((2, 2)), "allowed is"),
        ("left", "allowed"),
    ):
        with pytest.raises(InvalidAction, match=message):
            bare.step(action)
    _, _, terminated, truncated, _ = bare.step(np.zeros(2))
    assert truncated and not terminated
    with pytest.raises(ResetNeeded, match="is over"):
        bare.step(np.zeros(2))


def test_reward_is_progress_and_success_ends_the_episode(make: Callable[..., gymnasium.Env]) -> None:
    env = make("truth")
    observation, told = env.reset(seed=0)
    start = told["distance"]
    assert start == pytest.approx(np.linalg.norm(detect(observation["image"]).cube - observation["goal"]))
    seen = detect(observation["image"]).cube
    _, told = env.reset(seed=0, options={"goal": seen + [0.5 * SUCCESS, 0]})  # it is there already
    _, reward, terminated, truncated, told = env.step(np.zeros(2, np.float32))
    assert terminated and not truncated and told["success"]
    assert reward == pytest.approx(1, abs=0.02)


def test_begins_with_a_picture_or_a_frame_of_a_dataset(
    make: Callable[..., gymnasium.Env], tmp_path: Path, acting_folder: Path
) -> None:
    write_dataset(tmp_path / "clips", "tabletop", [4], size=64, frames=9)
    frames = open_episodes(tmp_path / "clips").frames(0)
    options = {"dataset": tmp_path / "clips", "episode": 0, "frame": 8}
    model, truth = make("model"), make("truth")
    (one, _), (two, _) = model.reset(seed=1, options=options), model.reset(seed=1, options={"image": frames[8]})
    assert (one["image"] == frames[8]).all() and (two["image"] == frames[8]).all()
    rebuilt, _ = truth.reset(seed=1, options={"image": frames[8]})
    assert np.linalg.norm(detect(rebuilt["image"]).cube - detect(frames[8]).cube) < 0.05  # its yaw is not known
    for wrong, message in (
        ({"image": np.zeros((4, 4))}, r"allowed is \[H, W, 3\] uint8"),
        ({"dataset": tmp_path / "clips", "frame": 9}, "allowed are 0 to 8"),
        ({"goal": [3, 0]}, "allowed are two metres"),
        ({"start": 1}, "unknown option 'start'"),
    ):
        with pytest.raises(InputError, match=message):
            model.unwrapped.reset(options=wrong)


@pytest.mark.parametrize("kind", ["model", "truth"])
def test_one_copy_in_a_batch_is_the_same_alone(
    make: Callable[..., gymnasium.Env], make_many: Callable[..., Any], kind: str
) -> None:
    many, rng = make_many(kind, 3), np.random.default_rng(0)
    many.reset(seed=[7, 8, 9])
    alone = make(kind)
    alone.reset(seed=8)
    for _ in range(4):
        actions = rng.uniform(-1, 1, (3, 2)).astype(np.float32)
        seen, rewards, *_ = many.step(actions)
        one, reward, *_ = alone.step(actions[1])
        assert np.abs(seen["image"][1].astype(int) - one["image"].astype(int)).max() <= 1
        assert rewards[1] == pytest.approx(reward, abs=1e-3)
    if kind == "model":
        inner, other = many.unwrapped.cells.backend.rollout._past[1], alone.unwrapped.cells.backend.rollout._past[0]
        assert (inner - other).abs().max() < 1e-4


def test_a_batch_goes_on_by_itself_or_stands_still(make_many: Callable[..., Any]) -> None:
    env, still = make_many("truth", 2, max_steps=2), np.zeros((2, 2), np.float32)
    first, _ = env.reset(seed=0)
    env.step(still)
    *_, truncated, _ = env.step(still)
    assert truncated.all()
    after, rewards, terminated, truncated, _ = env.step(still + 1)  # begins anew; the action does not count
    assert not truncated.any() and (rewards == 0).all()
    assert (after["goal"] != first["goal"]).any(axis=1).all()
    env = make_many("truth", 2, max_steps=1, autoreset_mode="Disabled")
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    env.reset(seed=0)
    seen, *_ = env.step(still)
    held, rewards, terminated, truncated, _ = env.step(still + 1)
    assert (held["image"] == seen["image"]).all() and (rewards == 0).all() and not truncated.any()
    again, _ = env.reset(seed=[5, 6], options={"reset_mask": np.array([False, True])})
    assert (again["image"][0] == held["image"][0]).all() and (again["goal"][1] != held["goal"][1]).any()
    with pytest.raises(InputError, match="allowed are 'NextStep', 'Disabled'"):
        make_many("truth", 2, autoreset_mode="SameStep")


def test_the_rendered_picture_shows_the_goal(make: Callable[..., gymnasium.Env]) -> None:
    env = make("truth", render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (256, 256, 3)
    plain = np.asarray(observation["image"]).repeat(4, 0).repeat(4, 1)
    assert (np.abs(picture.astype(int) - plain) > 60).any(2).sum() > 40


def test_refuses_a_model_that_is_no_tabletop(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="is no world of the tabletop"):
        gymnasium.make(orrery.env.MODEL, model=tiny_folder)
