"""Robots that learn: a small network that is shown what `ahead` does in MuJoCo (behaviour cloning).

While demonstrations are made the robot's actions are disturbed and the undisturbed ones are noted, so that they also
show how to come back to the way (as DART, arXiv 1703.09327, does it). The network sees places, not pixels, in a frame
whose axis points from the cube to the goal, where a push to the right is one to the left, turned.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from orrery.errors import note
from orrery.eval.policies import Observations, Scripted, View, ahead, fingerprint
from orrery.eval.trials import play
from orrery.files import atomic_file

FIRST_SEED = 1_000  # of demonstrations
DISTURBED = 0.4  # standard deviation of what is added to actions while demonstrations are made
WIDTH, STEPS, RATE = 64, 1500, 3e-3
SCALE = 0.3  # metres that are 1 to the network
FEATURES = 9
DEMONSTRATIONS = "demonstrations.safetensors"


def features(view: View) -> tuple[np.ndarray, np.ndarray]:
    """What the network is told [FEATURES] and the frame [2, 2], whose rows are the axes along and across.

    Of the peg, seen and told: how far along and across from the cube, and how far in all; how far the goal is; the way
    to it, as the table does have edges.
    """
    way = view.goal - view.cube
    left = float(np.linalg.norm(way))
    along = way / max(left, 1e-6)
    frame = np.stack([along, [-along[1], along[0]]])
    seen, told = frame @ (view.peg - view.cube), frame @ (view.tip - view.cube)
    lengths = np.linalg.norm(seen), np.linalg.norm(told), left
    return np.concatenate([np.array([*seen, *told, *lengths]) / SCALE, along]), frame


class _Demonstrator(Scripted):
    """`ahead`, disturbed, which notes what it saw and what it meant to do: a list a step of [B] rows."""

    def __init__(self) -> None:
        self.rows: list[dict[int, tuple[np.ndarray, np.ndarray]]] = []
        super().__init__("demonstrator", self._note, DISTURBED)

    def _note(self, view: View) -> np.ndarray:
        action = ahead(view)
        told, frame = features(view)
        self.rows[-1][len(self.rows[-1])] = told, frame @ action
        return action

    def reset(self, seeds: Sequence[int]) -> None:
        super().reset(seeds)
        self.rows = []

    def act(self, observations: Observations) -> np.ndarray:
        self.rows.append({})
        return super().act(observations)


def demonstrate(env: Any, count: int, tell: Callable[[int], None] | None = None) -> dict[str, np.ndarray]:
    """Demonstrations in a world (see `trials`): features [N, FEATURES], what the robot meant to do [N, 2] in the frame
    of `features`, and of which episode each is [N]. The first n episodes of more are n episodes."""
    told, meant, episode = [], [], []
    robot = _Demonstrator()
    for first in range(0, count, env.num_envs):
        seeds = range(FIRST_SEED + first, FIRST_SEED + min(first + env.num_envs, count))
        episodes, _, _ = play(robot, env, seeds)
        for row, steps in enumerate(episodes.steps):
            for step in range(int(steps)):
                if row in robot.rows[step]:
                    each, action = robot.rows[step][row]
                    told.append(each)
                    meant.append(action)
                    episode.append(first + row)
        if tell is not None:
            tell(min(first + env.num_envs, count))
    return {"features": np.array(told), "actions": np.array(meant), "episode": np.array(episode)}


def clone(told: np.ndarray, meant: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Trains the network of `network` on all steps at once; told [N, FEATURES], meant [N, 2]. Its mirror image with
    left and right of the way swapped is shown too. The same input and seed give the same weights."""
    flip = np.array([1, -1, 1, -1, 1, 1, 1, 1, 1.0])
    x = torch.from_numpy(np.concatenate([told, told * flip])).float()
    y = torch.from_numpy(np.concatenate([meant, meant * (1, -1)])).float()
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(FEATURES, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)
        )
        optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.01)
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            nn.functional.smooth_l1_loss(net(x), y, beta=0.3).backward()
            optimizer.step()
    return {name: value.detach().numpy() for name, value in net.state_dict().items()}


def network(weights: dict[str, np.ndarray]) -> Callable[[View], np.ndarray]:
    """How a clone chooses. One row at a time, in NumPy: who else is in the batch changes not even the last bit."""
    layers = [(weights[f"{i}.weight"].astype(float), weights[f"{i}.bias"].astype(float)) for i in (0, 2, 4)]

    def choose(view: View) -> np.ndarray:
        x, frame = features(view)
        for weight, bias in layers[:-1]:
            x = np.tanh(weight @ x + bias)
        return frame.T @ (layers[-1][0] @ x + layers[-1][1])

    return choose


def cloned(
    counts: dict[str, int], folder: Path, env: Any, tell: Callable[[int, int], None] | None = None
) -> list[Scripted]:
    """Robots cloned from so many episodes each (name -> episodes), from what `folder` holds or trained now.

    Demonstrations and networks are kept in `folder` as safetensors; those that another version of this code made are
    made again. tell: episodes demonstrated, of how many.
    """
    if not counts:
        return []
    most, code = max(counts.values()), _code()
    shown = _kept(folder / DEMONSTRATIONS, code)
    if shown is None or int(shown["count"][0]) < most:
        shown = demonstrate(env, most, None if tell is None else lambda done: tell(done, most))
        shown["count"] = np.array([most])
        _keep(folder / DEMONSTRATIONS, shown, code)
    robots = []
    for name, count in counts.items():
        weights = _kept(folder / f"{name}.safetensors", code)
        if weights is None:
            chosen = shown["episode"] < count
            weights = clone(shown["features"][chosen], shown["actions"][chosen])
            _keep(folder / f"{name}.safetensors", weights, code)
        source = hashlib.sha256(b"".join(weights[key].tobytes() for key in sorted(weights))).hexdigest()[:16]
        robots.append(Scripted(name, network(weights), source=source))
    return robots


def _code() -> str:
    """What decides a clone: this file, and what decides the robot that demonstrates."""
    robot = Scripted("ahead", ahead)
    return hashlib.sha256(Path(__file__).read_bytes() + fingerprint(robot).encode()).hexdigest()[:16]


def _keep(path: Path, arrays: dict[str, np.ndarray], code: str) -> None:
    stamp = np.frombuffer(code.encode(), np.uint8).copy()
    with atomic_file(path) as partial:
        save_file({name: np.ascontiguousarray(value) for name, value in (arrays | {"code": stamp}).items()}, partial)


def _kept(path: Path, code: str) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        arrays = load_file(path)
    except Exception as error:  # the library raises its own
        note(f"{path} cannot be read ({error}): made again")
        return None
    if bytes(arrays.pop("code", np.zeros(0, np.uint8))).decode() != code:
        note(f"{path} was made by another version: made again")
        return None
    return arrays
