"""Robots tried in a world model and in the true world, on the same seeds: success of every episode in both.

The worlds are Gymnasium vector environments in the mode "Disabled" (a copy that is over stands still), observations
`image` and `goal`, `info` with `distance` and `frames`: `orrery/Tabletop-v0` and `orrery/TabletopTruth-v0`, or any like
them. Each robot's results are a file, whole or absent, so that a stopped run goes on where it was.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orrery.errors import InputError, note
from orrery.eval.policies import Policy
from orrery.files import atomic_file

LEAST_SHOWN = 1e-3  # metres by which an episode that ends alike must end elsewhere to be shown as a disagreement
DISAGREEMENTS, AGREEMENTS = 2, 1  # clips that are kept of each robot
Progress = Callable[[str, str, int, int], None]  # robot, "model" or "truth", episodes done, of


@dataclass(frozen=True)
class Episodes:
    """What a robot did in one world; S episodes.

    success [S] bool; distance [S] metres from cube to goal at the end, as seen; steps [S] actions until then.
    """

    success: np.ndarray
    distance: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class Pair:
    """Both worlds' frames of one episode. model, truth [T, H, W, 3] uint8, each as long as it went; goal [2] metres;
    ends: success in the model, in the truth."""

    policy: str
    seed: int
    model: np.ndarray
    truth: np.ndarray
    goal: np.ndarray
    ends: tuple[bool, bool]


@dataclass(frozen=True)
class Trial:
    """A robot's episodes in both worlds, seed by seed. seconds: of the model and of the truth."""

    policy: str
    model: Episodes
    truth: Episodes
    seconds: tuple[float, float]


def play(
    policy: Policy, env: Any, seeds: Sequence[int], progress: Callable[[int], None] | None = None
) -> tuple[Episodes, list[np.ndarray], np.ndarray]:
    """One episode of a robot for each seed.

    Args:
        env: a vector environment (see the module). A batch that is not full is filled up with its last seed.
        progress: is told how many episodes are done, after each batch.

    Returns:
        The episodes, the frames of each [T, H, W, 3] uint8 from its first on, and the goals [S, 2].

    Raises:
        InputError: actions that are not [num_envs, 2], finite and in [-1, 1]; an environment that begins anew by
            itself.
    """
    mode = getattr(env.metadata.get("autoreset_mode"), "value", None)
    if mode != "Disabled":
        raise InputError(f"autoreset_mode of the environment is {mode!r}; allowed is 'Disabled'")
    parts, films, goals = [], [], []
    for first in range(0, len(seeds), env.num_envs):
        batch = list(seeds[first : first + env.num_envs])
        episodes, frames, aims = _play_batch(policy, env, batch)
        parts.append(episodes)
        films += frames
        goals.append(aims)
        if progress is not None:
            progress(first + len(batch))
    joined = [np.concatenate([getattr(part, name) for part in parts]) for name in ("success", "distance", "steps")]
    return Episodes(*joined), films, np.concatenate(goals)


def _play_batch(policy: Policy, env: Any, seeds: list[int]) -> tuple[Episodes, list[np.ndarray], np.ndarray]:
    count, size = len(seeds), env.num_envs
    filled = seeds + seeds[-1:] * (size - count)
    observations, info = env.reset(seed=filled)
    policy.reset(filled)
    running, success = np.ones(size, bool), np.zeros(size, bool)
    distance, steps = np.array(info["distance"], float), np.zeros(size, int)
    films = [[image[None]] for image in observations["image"]]
    goals = np.array(observations["goal"], float)
    while running[:count].any():
        actions = _checked(policy, policy.act(observations), size)
        observations, _, terminated, truncated, info = env.step(actions)
        for row in np.flatnonzero(running):
            films[row].append(info["frames"][row])
        success |= running & terminated
        steps += running
        distance = np.where(running, info["distance"], distance)
        running &= ~(terminated | truncated)
    ended = Episodes(success[:count], distance[:count], steps[:count])
    return ended, [np.concatenate(film) for film in films[:count]], goals[:count]


def _checked(policy: Policy, actions: Any, count: int) -> np.ndarray:
    """Actions [count, 2] float32, clipped to [-1, 1]: what a learnt robot may exceed by a little."""
    try:
        values = np.asarray(actions, dtype=np.float32)
    except (TypeError, ValueError):
        raise InputError(f"policy {policy.name}: its actions are no numbers, but {type(actions).__name__}") from None
    if values.shape != (count, 2):
        raise InputError(f"policy {policy.name}: its actions are {list(values.shape)}; allowed is [{count}, 2]")
    if not np.isfinite(values).all():
        raise InputError(f"policy {policy.name}: an action is not finite")
    return np.clip(values, -1, 1)


def judge(
    policies: Sequence[Policy],
    model: Any,
    truth: Any,
    seeds: Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
    fingerprints: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    show: Callable[[Pair], None] | None = None,
) -> list[Trial]:
    """Each robot on the same seeds in both worlds; what is in `folder` already is not done again.

    Args:
        model, truth: the two worlds, vector environments (see the module).
        folder: has or gets a NAME.json for each robot.
        settings: JSON values that decide the results (model, steps, ...): a file with others is done again.
        fingerprints: of robots whose name alone does not say what they do; the same for them.
        progress: see Progress. show: is given the pairs of frames of each robot that are worth a look: where the two
            worlds disagree most and where they agree, before the robot's file is written.
    """
    trials = []
    for policy in policies:
        path = folder / f"{policy.name}.json"
        key = {"settings": dict(settings), "seeds": list(map(int, seeds)), "policy": policy.name}
        key["fingerprint"] = (fingerprints or {}).get(policy.name, "")
        if (known := _read(path, key)) is not None:
            trials.append(known)
            if progress is not None:
                progress(policy.name, "model", len(seeds), len(seeds))
                progress(policy.name, "truth", len(seeds), len(seeds))
            continue
        results, seconds = [], []
        for name, env in (("model", model), ("truth", truth)):

            def tell(done: int, robot: str = policy.name, world: str = name) -> None:
                if progress is not None:
                    progress(robot, world, done, len(seeds))

            began = time.perf_counter()
            results.append(play(policy, env, seeds, tell))
            seconds.append(round(time.perf_counter() - began, 2))
        (dreamt, films, goals), (real, real_films, _) = results
        trial = Trial(policy.name, dreamt, real, (seconds[0], seconds[1]))
        for row in worth_a_look(trial) if show is not None else []:
            ends = bool(dreamt.success[row]), bool(real.success[row])
            assert show is not None
            show(Pair(policy.name, int(seeds[row]), films[row], real_films[row], goals[row], ends))
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(key | _to_json(trial), indent=1) + "\n", encoding="utf-8")
        trials.append(trial)
    return trials


def worth_a_look(trial: Trial) -> list[int]:
    """Episodes by index: up to DISAGREEMENTS in which the worlds differ most (first in success, then in where the cube
    ends), then up to AGREEMENTS that succeed in both, or else fail in both, the longest."""
    differs = trial.model.success != trial.truth.success
    apart = np.nan_to_num(np.abs(trial.model.distance - trial.truth.distance))
    order = np.lexsort((-apart, ~differs))
    far = [int(row) for row in order if differs[row] or apart[row] > LEAST_SHOWN][:DISAGREEMENTS]
    both = trial.model.success & trial.truth.success
    order = np.lexsort((-(trial.model.steps + trial.truth.steps), ~both))
    alike = [int(row) for row in order if not differs[row] and int(row) not in far][:AGREEMENTS]
    return far + alike


def _to_json(trial: Trial) -> dict[str, Any]:
    worlds: dict[str, Any] = {}
    for name, part in (("model", trial.model), ("truth", trial.truth)):
        distance = [None if np.isnan(d) else round(float(d), 4) for d in part.distance]
        worlds[name] = {"success": part.success.astype(int).tolist(), "distance": distance}
        worlds[name]["steps"] = part.steps.tolist()
    return {"seconds": list(trial.seconds), **worlds}


def _read(path: Path, key: Mapping[str, Any]) -> Trial | None:
    """The trial in a file, if it was made in this way; a line says it if not."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if any(data.get(name) != value for name, value in json.loads(json.dumps(key)).items()):
            note(f"{path} is of other settings, seeds or another policy: done again")
            return None
        worlds = [
            Episodes(
                np.array(data[name]["success"], bool),
                np.array([np.nan if d is None else d for d in data[name]["distance"]], float),
                np.array(data[name]["steps"], int),
            )
            for name in ("model", "truth")
        ]
        if any(len(each) != len(key["seeds"]) for world in worlds for each in vars(world).values()):
            raise ValueError("lengths differ from the seeds")
        return Trial(key["policy"], worlds[0], worlds[1], tuple(data["seconds"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        note(f"{path} cannot be read ({error}): done again")
        return None
