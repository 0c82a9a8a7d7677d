"""Robots of graded skill for the tabletop, and how a user's own robot is loaded.

All see pixels alone, through `orrery.sim.detect`, so that the same robot acts in a world model and in MuJoCo. Noise is
drawn for each copy and step from (robot, seed of the episode, step): who else is in the batch changes nothing, and the
two worlds meet the same noise.

Two sets of robots with nothing in common, and two ranges of seeds:

- `TUNING`, from seed `TUNING_SEED` on, is for developing: of the model, of this judge, of the task.
- `FINAL`, from seed `FINAL_SEED` on, is for the number that is reported. No model, no setting of one and no robot is
  chosen by what `FINAL` did in a model.

Demonstrations for the robots that learn have seeds from `orrery.eval.cloning.FIRST_SEED` on, below both.
"""

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol
from zlib import crc32

import numpy as np

from orrery.errors import InputError, one_line
from orrery.sim.detect import detect_all
from orrery.sim.tabletop import REACH, TRAVEL, Manner, push_towards

Observations = Mapping[str, np.ndarray]
TUNING_SEED, FINAL_SEED = 10_000, 20_000
ASIDE = 0.1  # metres to the right of the goal: where `wrong-goal` pushes to


class Policy(Protocol):
    """A robot that acts in several copies of the tabletop at once.

    name: for tables and files. reset: episodes with these seeds begin, one a copy. act: observations `image`
    [B, 64, 64, 3] uint8 and `goal` [B, 2] metres -> actions [B, 2] in [-1, 1]. Copies that are over stand still and
    are asked all the same; what is answered for them is not used.
    """

    name: str

    def reset(self, seeds: Sequence[int]) -> None: ...

    def act(self, observations: Observations) -> np.ndarray: ...


@dataclass(frozen=True)
class View:
    """What a scripted robot knows of one copy at one step; all places [2] in metres.

    peg, cube: as seen now, or where they were seen last. tip: where the peg was told to be by now; it runs after that.
    goal: of the cube. before: peg and cube [2, 2] as seen a step ago. step: from 0. rng: of this robot, seed and step.
    """

    peg: np.ndarray
    cube: np.ndarray
    tip: np.ndarray
    goal: np.ndarray
    before: np.ndarray
    step: int
    rng: np.random.Generator


Choose = Callable[[View], np.ndarray]


def random(view: View) -> np.ndarray:
    """Anything."""
    return view.rng.uniform(-1, 1, 2)


def still(view: View) -> np.ndarray:
    """Nothing."""
    return np.zeros(2)


def push(view: View) -> np.ndarray:
    """The scripted robot that made the clips, on places that it sees."""
    return push_towards(view.peg, view.cube, view.goal)


def ahead(view: View) -> np.ndarray:
    """It counts on the peg getting where it was told to be: the peg runs some centimetres after."""
    return push_towards(view.tip, view.cube, view.goal)


def mirrored(view: View) -> np.ndarray:
    """Takes left for right."""
    return push(view) * (-1, 1)


def wrong_goal(view: View) -> np.ndarray:
    """Pushes to a place `ASIDE` to the right of the goal."""
    return push_towards(view.peg, view.cube, view.goal + (ASIDE, 0))


def half_speed(view: View) -> np.ndarray:
    """Does the right thing at half the speed."""
    return push(view) / 2


def late(view: View) -> np.ndarray:
    """Acts on what it saw a step ago."""
    return push_towards(view.before[0], view.before[1], view.goal)


def alternate(view: View) -> np.ndarray:
    """Acts in every second step."""
    return push(view) if view.step % 2 == 0 else np.zeros(2)


def forgetful(share: float) -> Choose:
    """Does anything in that share of its steps."""

    def choose(view: View) -> np.ndarray:
        return random(view) if view.rng.random() < share else push(view)

    return choose


@dataclass(frozen=True)
class Spec:
    """A robot of ours: what it is in words; how it chooses; how noisy it is (standard deviation of what is added to its
    actions); or of how many demonstrations it learnt instead of `choose`."""

    about: str
    choose: Choose | None = None
    noise: float = 0.0
    demonstrations: int = 0


def _noisy(noise: float) -> Spec:
    return Spec(f"push, noise {noise:g} on its actions", push, noise)


def _cloned(count: int) -> Spec:
    return Spec(f"a small network, cloned from {count} episodes of ahead", demonstrations=count)


TUNING: dict[str, Spec] = {
    "still": Spec("does nothing", still),
    "mirrored": Spec("push, left taken for right", mirrored),
    "alternate": Spec("push, in every second step", alternate),
    "forgetful-0.6": Spec("push, but anything in 0.6 of its steps", forgetful(0.6)),
    "noise-0.2": _noisy(0.2),
    "noise-0.7": _noisy(0.7),
    "cloned-10": _cloned(10),
    "cloned-40": _cloned(40),
}
FINAL: dict[str, Spec] = {
    "random": Spec("does anything", random),
    "push": Spec("goes round the cube and pushes it to the goal, by what it sees", push),
    "ahead": Spec("push, by where its peg was told to be, which runs some centimetres after", ahead),
    "late": Spec("push, by what it saw a step ago", late),
    "half-speed": Spec("push, at half the speed", half_speed),
    "wrong-goal": Spec("push, to a place 10 cm right of the goal", wrong_goal),
    "forgetful-0.3": Spec("push, but anything in 0.3 of its steps", forgetful(0.3)),
    "noise-0.4": _noisy(0.4),
    "noise-1.0": _noisy(1.0),
    "cloned-5": _cloned(5),
    "cloned-20": _cloned(20),
    "cloned-80": _cloned(80),
}
ALL = TUNING | FINAL
SETS = {"final": FINAL, "tuning": TUNING, "all": ALL, "none": {}}


def choose_robots(text: str) -> dict[str, Spec]:
    """Robots of ours by names and sets ("final", "tuning", "all", "none"), separated by commas.

    Raises:
        InputError: an unknown name.
    """
    chosen: dict[str, Spec] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in SETS and word not in ALL:
            raise InputError(f"--policies names {word!r}; allowed are {', '.join([*SETS, *ALL])}")
        chosen |= SETS[word] if word in SETS else {word: ALL[word]}
    return chosen


def generator(name: str, seed: int, step: int) -> np.random.Generator:
    """The noise of a robot, of an episode, of a step."""
    return np.random.default_rng([crc32(name.encode()), int(seed), step])


@dataclass
class Scripted:
    """A robot that sees peg and cube and chooses; one that is not seen is where it was seen last, and before it was
    ever seen the robot does nothing.

    Args:
        name: for tables, files and its noise. choose: an action of a View. noise: standard deviation of what is added.
    """

    name: str
    choose: Choose
    noise: float = 0.0
    source: str = ""  # whatever else decides how it acts, for `fingerprint`
    _seeds: list[int] = field(default_factory=list, repr=False)
    _step: int = field(default=0, repr=False)

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin episodes with these seeds."""
        self._seeds, self._step = list(seeds), 0
        self._places = np.full((len(self._seeds), 2, 2), np.nan)
        self._tips = np.full((len(self._seeds), 2), np.nan)

    def act(self, observations: Observations) -> np.ndarray:
        """Actions [B, 2] in [-1, 1]."""
        seen = detect_all(observations["image"])[:, :2]
        before = self._places
        self._places = np.where(np.isnan(seen), before, seen)
        before = np.where(np.isnan(before), self._places, before)
        self._tips = np.where(np.isnan(self._tips), self._places[:, 0], self._tips)
        actions = np.zeros((len(seen), 2))
        for row in np.flatnonzero(~np.isnan(self._places).any((1, 2))):
            rng = generator(self.name, self._seeds[row], self._step)
            peg, cube = self._places[row]
            view = View(peg, cube, self._tips[row], observations["goal"][row], before[row], self._step, rng)
            action = np.asarray(self.choose(view), float)
            if self.noise:
                action = action + rng.normal(0, self.noise, 2)
            actions[row] = np.clip(action, -1, 1)
        self._tips = np.clip(self._tips + TRAVEL * actions, *REACH)
        self._step += 1
        return actions


@dataclass
class Asked:
    """A function of the observations as a policy."""

    name: str
    function: Callable[[Observations], Any]

    def reset(self, seeds: Sequence[int]) -> None:
        """It remembers nothing."""

    def act(self, observations: Observations) -> np.ndarray:
        """Actions [B, 2]."""
        return np.asarray(self.function(observations), dtype=np.float64)


def fingerprint(policy: Policy, place: str | None = None) -> str:
    """What decides what a robot does, as 16 hex digits: for ours, code and weights; for a user's, the file at its
    `place` (see `load_policy`). "" where that cannot be told."""
    if place is not None:
        module = sys.modules.get(place.partition(":")[0])
        file = place if place.endswith(".zip") else getattr(module, "__file__", None)
        return "" if file is None else sha256(Path(file).read_bytes()).hexdigest()[:16]
    files = [Path(__file__), Path(str(inspect.getsourcefile(detect_all)))]
    code = (
        b"".join(file.read_bytes() for file in files)
        + (inspect.getsource(push_towards) + inspect.getsource(Manner)).encode()
    )
    return sha256(code + str(getattr(policy, "source", "")).encode()).hexdigest()[:16]


def load_policy(place: str) -> Policy:
    """A user's own robot.

    Args:
        place: `module:attribute` (modules of the working folder are found too): a class that is called without
            arguments, an object with `reset` and `act`, or a function of the observations. Or a .zip that
            stable-baselines3 saved; loading one runs pickled code, so take only files that you trust.

    Raises:
        InputError: it is not there, or is nothing of that; the name is that of a robot of ours.
    """
    policy = _saved_policy(Path(place)) if place.endswith(".zip") else _imported_policy(place)
    if policy.name in ALL:
        raise InputError(f"--policy {place}: the name {policy.name!r} is taken by a robot of ours; give it another")
    if not policy.name or not all(c.isalnum() or c in "._-" for c in policy.name) or policy.name[0] == ".":
        raise InputError(f"--policy {place}: the name {policy.name!r} has to be letters, digits, '.', '_' and '-'")
    return policy


def _imported_policy(place: str) -> Policy:
    module, colon, attribute = place.partition(":")
    if not (module and colon and attribute):
        raise InputError(f"--policy is {place!r}; allowed are module:attribute and a .zip of stable-baselines3")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the user, as `python -m` finds it
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        if inspect.isclass(found):
            found = found()
    except Exception as error:  # of the user's code, whatever it raises
        raise InputError(f"--policy {place}: {type(error).__name__}: {one_line(error)}") from error
    if hasattr(found, "act") and hasattr(found, "reset"):
        if not isinstance(getattr(found, "name", None), str):
            found.name = attribute
        return found
    if callable(found) and not hasattr(found, "act"):
        return Asked(str(getattr(found, "name", attribute)), found)
    raise InputError(f"--policy {place} is {type(found).__name__}; allowed is what has reset and act, or a function")


# A .zip does not say which algorithm it is; one has settings that the others lack.
_ALGORITHMS = (("PPO", "clip_range"), ("SAC", "target_entropy"), ("TD3", "policy_delay"), ("A2C", "gae_lambda"))


def _saved_policy(path: Path) -> Policy:
    import json
    from zipfile import BadZipFile, ZipFile

    if not path.is_file():
        raise InputError(f"--policy {path}: no such file")
    try:
        with ZipFile(path) as archive:
            settings = json.loads(archive.read("data"))
    except (BadZipFile, KeyError, ValueError) as error:
        raise InputError(f"--policy {path}: not a file that stable-baselines3 saved ({one_line(error)})") from error
    algorithm = next((name for name, key in _ALGORITHMS if key in settings), None)
    if algorithm is None:
        allowed = ", ".join(name for name, _ in _ALGORITHMS)
        raise InputError(f"--policy {path}: its algorithm is unknown here; allowed are {allowed}")
    try:
        import stable_baselines3
    except ImportError as error:
        raise InputError(f"--policy {path} needs stable-baselines3: pip install stable-baselines3 ({error})") from error
    try:
        model = getattr(stable_baselines3, algorithm).load(path, device="cpu")
    except Exception as error:  # unpickles: raises anything
        raise InputError(f"--policy {path}: {type(error).__name__}: {one_line(error)}") from error
    return Asked(path.stem, lambda observations: model.predict(dict(observations), deterministic=True)[0])
