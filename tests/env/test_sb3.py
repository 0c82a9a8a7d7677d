"""stable-baselines3 with our environments: its own check, learning, and a saved robot that `orrery judge` takes."""

import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

import orrery.env
from orrery.errors import InputError
from orrery.eval.policies import load_policy
from orrery.world import load

pytest.importorskip("stable_baselines3")
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv

TRUTH, MODEL = "orrery/TabletopTruth-v0", "orrery/Tabletop-v0"


@pytest.fixture(scope="module")
def truth() -> Any:
    orrery.env.register()
    env = gymnasium.make(TRUTH, max_steps=8)
    try:
        env.reset(seed=0)
    except Exception as error:  # each OpenGL raises its own
        pytest.skip(f"MuJoCo cannot draw here: {error}")
    return env


def test_its_own_check(truth: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # what it would have otherwise warns
        check_env(truth.unwrapped, warn=True, skip_render_check=True)


def test_ppo_learns_and_its_robot_is_taken(truth: Any, tmp_path: Path) -> None:
    """Learns: its weights move, its numbers are finite, and it has seen every step of both copies."""
    vector = DummyVecEnv([lambda: Monitor(gymnasium.make(TRUTH, max_steps=8)) for _ in range(2)])
    model = PPO("MultiInputPolicy", vector, n_steps=32, batch_size=32, n_epochs=2, seed=0, device="cpu")
    before = {name: value.clone() for name, value in model.policy.state_dict().items()}
    model.learn(128)
    after = model.policy.state_dict()
    assert model.num_timesteps == 128 and len(model.ep_info_buffer) >= 2 * 64 // 8
    assert all(value.isfinite().all() for value in after.values())
    assert any((after[name] != value).any() for name, value in before.items() if name.startswith("action_net"))
    model.save(tmp_path / "robot.zip")
    policy = load_policy(str(tmp_path / "robot.zip"))
    policy.reset([0, 1])
    seen = [truth.reset(seed=seed)[0] for seed in (0, 1)]
    actions = policy.act({key: np.stack([each[key] for each in seen]) for key in ("image", "goal")})
    assert (
        policy.name == "robot"
        and actions.shape == (2, 2)
        and (np.abs(actions) <= 1).all()
        and (actions[0] != actions[1]).any()
    )


def test_its_other_algorithms_are_told_apart(truth: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    A2C("MultiInputPolicy", truth, n_steps=2, device="cpu").save(tmp_path / "other.zip")
    policy = load_policy(str(tmp_path / "other.zip"))
    assert policy.name == "other"
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(InputError, match="pip install stable-baselines3"):
        load_policy(str(tmp_path / "other.zip"))


def test_it_steps_in_a_world_model(acting_folder: Path) -> None:
    orrery.env.register()
    world = load(acting_folder)
    vector = DummyVecEnv([lambda: Monitor(gymnasium.make(MODEL, model=world, steps=1, max_steps=3)) for _ in range(2)])
    model = PPO("MultiInputPolicy", vector, n_steps=4, batch_size=8, n_epochs=1, seed=0, device="cpu")
    model.learn(8)
    assert model.num_timesteps == 8 and len(model.ep_info_buffer) == 2
