"""Robots for the tabletop: what they do, that who else is in the batch changes nothing, and users' own."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orrery.errors import InputError
from orrery.eval import cloning
from orrery.eval.policies import (
    ALL,
    FINAL,
    FINAL_SEED,
    SETS,
    TUNING,
    TUNING_SEED,
    Asked,
    Scripted,
    View,
    choose_robots,
    fingerprint,
    load_policy,
)
from orrery.sim.detect import detect_all
from orrery.sim.tabletop import HELD, TRAVEL, Layout, Tabletop, push_towards

BLANK = np.full((64, 64, 3), 128, np.uint8)
GOAL = np.array([0.2, 0.0])


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Three pictures of the tabletop [3, 64, 64, 3]: the cube further to the right in each, the peg to its left."""
    try:
        return np.stack(
            [
                Tabletop().reset(Layout(np.array([x - 0.3, -0.1]), np.array([x, -0.1]), 0.0, GOAL))
                for x in (-0.2, -0.1, 0)
            ]
        )
    except Exception as error:  # each OpenGL raises its own
        pytest.skip(f"MuJoCo cannot draw here: {error}")


def seen(images: np.ndarray, goal: np.ndarray = GOAL) -> dict[str, np.ndarray]:
    return {"image": images, "goal": np.repeat(goal[None].astype(np.float32), len(images), 0)}


def robot(name: str) -> Scripted:
    spec = ALL[name]
    assert spec.choose is not None
    return Scripted(name, spec.choose, spec.noise)


SCRIPTED = [name for name, spec in ALL.items() if spec.choose is not None]


def test_sets_are_apart() -> None:
    assert not FINAL.keys() & TUNING.keys() and len(FINAL) >= 8 and len(ALL) >= 12
    assert cloning.FIRST_SEED + max(spec.demonstrations for spec in ALL.values()) < TUNING_SEED < FINAL_SEED
    whats = [(spec.choose, spec.noise, spec.demonstrations) for spec in ALL.values()]
    assert len(set(whats)) == len(ALL)


@pytest.mark.parametrize("name", SCRIPTED)
def test_alone_as_in_a_batch(name: str, pictures: np.ndarray) -> None:
    together, alone = robot(name), [robot(name) for _ in range(3)]
    together.reset([5, 6, 7])
    for one, seed in zip(alone, (5, 6, 7)):
        one.reset([seed])
    for step in range(3):
        images = np.roll(pictures, step, 0)
        actions = together.act(seen(images))
        assert actions.shape == (3, 2) and (np.abs(actions) <= 1).all()
        assert (actions == np.concatenate([one.act(seen(images[i : i + 1])) for i, one in enumerate(alone)])).all()


@pytest.mark.parametrize("name", [name for name in SCRIPTED if name != "still"])
def test_again_the_same_and_other_seeds_other_noise(name: str, pictures: np.ndarray) -> None:
    one = robot(name)

    def acts(seed: int) -> np.ndarray:
        one.reset([seed] * 3)
        return np.stack([one.act(seen(pictures)) for _ in range(6)])

    first = acts(1)
    assert (acts(1) == first).all() and first.any()
    noisy = name.startswith(("random", "noise", "forgetful"))
    assert (acts(2) != first).any() == noisy


def test_what_they_do(pictures: np.ndarray) -> None:
    peg, cube = detect_all(pictures[:1])[0, :2]

    def acts(name: str, steps: int = 1) -> np.ndarray:
        one = robot(name)
        one.reset([3])
        return np.stack([one.act(seen(pictures[i : i + 1]))[0] for i in range(steps)])

    right = push_towards(peg, cube, seen(pictures)["goal"][0])
    assert right[0] > 0.5
    assert np.allclose(acts("push")[0], right) and np.allclose(acts("ahead")[0], right)
    assert np.allclose(acts("mirrored")[0], right * (-1, 1))
    assert np.allclose(acts("half-speed")[0], right / 2)
    assert not acts("still").any()
    later = acts("push", 2)
    assert np.allclose(acts("late", 2), [right, right]) and not np.allclose(later[0], later[1])
    assert np.allclose(acts("alternate", 2), [right, [0, 0]])
    assert np.allclose(acts("wrong-goal")[0], push_towards(peg, cube, seen(pictures)["goal"][0] + (0.1, 0)))


def test_ahead_counts_its_commands(pictures: np.ndarray) -> None:
    told: list[View] = []
    one = Scripted("x", lambda view: told.append(view) or np.array([1.0, 0.0]))  # type: ignore[func-returns-value]
    one.reset([0])
    for _ in range(2):
        one.act(seen(pictures[:1]))
    assert np.allclose(told[1].tip - told[0].tip, [TRAVEL, 0]) and np.allclose(told[0].tip, told[0].peg)
    assert TRAVEL == pytest.approx(0.6 * HELD / 12)


def test_noise_has_its_spread(pictures: np.ndarray) -> None:
    quiet = Scripted("noise-0.4", lambda view: np.zeros(2), 0.4)
    quiet.reset(range(900))
    actions = quiet.act(seen(np.repeat(pictures[:1], 900, 0)))
    assert actions.std() == pytest.approx(0.4, rel=0.06) and abs(actions.mean()) < 0.03


def test_what_is_not_seen(pictures: np.ndarray) -> None:
    """Never seen: nothing is done. Lost: it is where it was."""
    one = robot("push")
    one.reset([1])
    assert not one.act(seen(BLANK[None])).any()
    first = one.act(seen(pictures[:1]))
    assert first.any() and (one.act(seen(BLANK[None])) == first).all()
    one.reset([1])
    assert not one.act(seen(BLANK[None])).any()


def test_choosing() -> None:
    assert choose_robots("final") == FINAL and choose_robots("all") == ALL and choose_robots("none") == {}
    assert list(choose_robots("push, still")) == ["push", "still"] and set(SETS) == {"final", "tuning", "all", "none"}
    with pytest.raises(InputError, match="'puhs'; allowed are final, .*push"):
        choose_robots("still,puhs")


# ---- clones


@pytest.fixture
def shown() -> dict[str, np.ndarray]:
    """Demonstrations of a robot that moves the way the cube should go: [1, 0] in the frame of features."""
    rng = np.random.default_rng(0)
    rows = [cloning.features(view(*rng.uniform(-0.4, 0.4, (4, 2))))[0] for _ in range(60)]
    return {"features": np.array(rows), "actions": np.tile([0.8, 0.0], (60, 1)), "episode": np.arange(60) // 6}


def view(peg: np.ndarray, cube: np.ndarray, tip: np.ndarray, goal: np.ndarray) -> View:
    return View(peg, cube, tip, goal, np.stack([peg, cube]), 0, np.random.default_rng(0))


def test_features_turn_with_the_table() -> None:
    places = np.random.default_rng(1).uniform(-0.3, 0.3, (4, 2))
    turned = places @ np.array([[0, 1], [-1, 0]])  # a quarter turn
    told, frame = cloning.features(view(*places))
    again, other = cloning.features(view(*turned))
    assert np.allclose(told[:7], again[:7]) and not np.allclose(told[7:], again[7:])
    assert np.allclose(frame @ frame.T, np.eye(2)) and np.allclose(other, frame @ np.array([[0, 1], [-1, 0]]))
    assert len(told) == cloning.FEATURES
    mirrored, _ = cloning.features(view(*(places * (1, -1))))
    assert np.allclose(mirrored[:7], told[:7] * (1, -1, 1, -1, 1, 1, 1))


def test_a_clone_does_what_it_was_shown(shown: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloning, "STEPS", 200)
    weights = cloning.clone(shown["features"], shown["actions"])
    again = cloning.clone(shown["features"], shown["actions"])
    assert all((weights[name] == again[name]).all() for name in weights)
    cube, goal = np.array([0.0, 0.0]), np.array([0.0, 0.3])
    action = cloning.network(weights)(view(np.array([0.0, -0.2]), cube, np.array([0.0, -0.2]), goal))
    assert np.allclose(action, [0, 0.8], atol=0.1)


def test_clones_are_kept(shown: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked: list[int] = []

    def demonstrate(env: object, count: int, tell: object) -> dict[str, np.ndarray]:
        asked.append(count)
        return {name: value[shown["episode"] < count] for name, value in shown.items()}

    monkeypatch.setattr(cloning, "demonstrate", demonstrate)
    monkeypatch.setattr(cloning, "STEPS", 20)
    two, eight = cloning.cloned({"cloned-2": 2, "cloned-8": 8}, tmp_path, None)
    assert asked == [8] and two.source != eight.source and fingerprint(two) != fingerprint(eight)
    (same,) = cloning.cloned({"cloned-2": 2}, tmp_path, None)
    assert asked == [8] and same.source == two.source
    (tmp_path / "cloned-2.safetensors").write_bytes(b"broken")
    (same,) = cloning.cloned({"cloned-2": 2}, tmp_path, None)
    assert same.source == two.source and "cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(cloning, "_code", lambda: "another")
    cloning.cloned({"cloned-2": 2}, tmp_path, None)
    assert asked == [8, 2] and "another version" in capsys.readouterr().err


# ---- users' own


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """module(code): a module of that code beside the user, by name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(code: str) -> str:
        name = f"robots_{abs(hash(code))}"
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


CODE = """
import numpy as np

class Robot:
    def reset(self, seeds):
        self.count = len(seeds)
    def act(self, observations):
        return np.ones((self.count, 2))

def right(observations):
    return np.tile([1, 0], (len(observations["image"]), 1))

named = Robot()
named.name = "my-robot"
"""


def test_own_class_object_and_function(module: Callable[[str], str]) -> None:
    name = module(CODE)
    for place, called in ((f"{name}:Robot", "Robot"), (f"{name}:named", "my-robot"), (f"{name}:right", "right")):
        policy = load_policy(place)
        policy.reset([1, 2])
        assert policy.name == called and policy.act(seen(np.stack([BLANK, BLANK]))).shape == (2, 2)
    assert isinstance(load_policy(f"{name}:right"), Asked)
    assert fingerprint(policy, f"{name}:right") and fingerprint(policy, f"{name}:right") != fingerprint(robot("push"))


@pytest.mark.parametrize(
    "attribute, said",
    [
        ("", "module:attribute"),
        (":Nothing", "AttributeError"),
        (":number", "int; allowed"),
        (":Broken", "RuntimeError: no robot today"),
        (":push", "'push' is taken"),
        (":strange", "'a/b' has to be"),
    ],
)
def test_own_refusals(attribute: str, said: str, module: Callable[[str], str]) -> None:
    code = "number = 3\nclass Broken:\n    def __init__(self): raise RuntimeError('no robot\\n today')\n"
    code += "def push(o): ...\ndef strange(o): ...\nstrange.name = 'a/b'\n"
    with pytest.raises(InputError, match=said):
        load_policy(module(code) + attribute)


def test_own_files_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ModuleNotFoundError"):
        load_policy("no_such_module:Robot")
    with pytest.raises(InputError, match="no such file"):
        load_policy(str(tmp_path / "robot.zip"))
    (tmp_path / "robot.zip").write_bytes(b"no zip")
    with pytest.raises(InputError, match="not a file that stable-baselines3 saved"):
        load_policy(str(tmp_path / "robot.zip"))
