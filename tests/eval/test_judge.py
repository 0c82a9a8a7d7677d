"""Judging robots in a model and in truth: the loop, what is kept, the report, `orrery judge`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from PIL import Image

import orrery.env
from orrery.cli.main import main
from orrery.env.cells import SUCCESS
from orrery.errors import InputError, OrreryError
from orrery.eval import judgement
from orrery.eval.pictures import GOAL_RADIUS, SCALE, Dot, scatter, side_by_side
from orrery.eval.policies import ALL, FINAL_SEED, TUNING_SEED, Asked, Scripted
from orrery.eval.trials import Episodes, Pair, Trial, judge, play, worth_a_look
from orrery.video import Video
from orrery.world import load

LAST = 6


class Line:
    """A vector environment without a picture: a point goes by a tenth of the action from a place that the seed says, in
    0.08 to 0.43, to 0; there within 0.05 it is a success. A world that lies turns the actions of odd seeds round."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, num_envs: int = 3, lies: bool = False) -> None:
        self.num_envs, self.lies, self.asked = num_envs, lies, []

    def reset(self, seed: Sequence[int]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        self.seeds = np.array(seed)
        self.asked.append(list(seed))
        self.x = 0.08 + 0.05 * (self.seeds % 8)
        self.over, self.count = np.zeros(self.num_envs, bool), 0
        return self._seen(), {"distance": self.x.copy()}

    def step(self, actions: np.ndarray) -> tuple:
        sign = np.where(self.lies & (self.seeds % 2 == 1), -1, 1)
        self.x = np.where(self.over, self.x, self.x + 0.1 * sign * actions[:, 0])
        self.count += 1
        terminated = ~self.over & (np.abs(self.x) < 0.05)
        truncated = ~self.over & ~terminated & (self.count >= LAST)
        self.over |= terminated | truncated
        frames = np.repeat(self._seen()["image"][:, None], 4, 1)
        info = {"distance": np.abs(self.x), "frames": frames}
        return self._seen(), np.zeros(self.num_envs), terminated, truncated, info

    def _seen(self) -> dict[str, np.ndarray]:
        images = np.zeros((self.num_envs, 64, 64, 3), np.uint8)
        images[:, 0, 0, 0] = np.round(200 * np.abs(self.x))
        return {"image": images, "goal": np.zeros((self.num_envs, 2), np.float32)}


def robot(name: str, speed: float) -> Asked:
    return Asked(name, lambda seen: np.tile([-speed, 0.0], (len(seen["image"]), 1)))


def test_a_game_is_played_to_its_end() -> None:
    """From 0.08 + 0.05 k, at 0.1 or 0.05 a step, to within 0.05; 6 steps are all."""
    env, told = Line(3), []
    episodes, films, goals = play(robot("fast", 1.0), env, range(8), told.append)
    assert episodes.success.tolist() == [True] * 8 and told == [3, 6, 8]
    assert episodes.steps.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [len(film) for film in films] == (1 + 4 * episodes.steps).tolist() and goals.shape == (8, 2)
    assert (episodes.distance < 0.05).all() and env.asked[-1] == [6, 7, 7]  # filled up
    slow, _, _ = play(robot("slow", 0.5), Line(8), range(8))
    assert slow.success.tolist() == [True] * 6 + [False] * 2
    assert slow.steps.tolist() == [1, 2, 3, 4, 5, 6, LAST, LAST]
    assert slow.distance[-1] == pytest.approx(0.43 - 6 * 0.05)


def test_the_size_of_a_batch_changes_nothing() -> None:
    found = [play(robot("slow", 0.5), Line(size), range(10))[0] for size in (1, 4, 10)]
    for other in found[1:]:
        assert all((getattr(found[0], name) == getattr(other, name)).all() for name in vars(other))


def test_actions_are_checked() -> None:
    for answer, said in (
        (lambda seen: np.zeros((2, 2)), r"\[2, 2\]; allowed is \[3, 2\]"),
        (lambda seen: np.full((3, 2), np.nan), "not finite"),
        (lambda seen: "left", "no numbers|could not"),
    ):
        with pytest.raises((InputError, ValueError), match=said):
            play(Asked("mine", answer), Line(3), range(3))
    episodes, _, _ = play(robot("far", 1.001), Line(1), range(1))  # a little over is cut
    assert episodes.success.all()


def test_worlds_that_begin_anew_are_refused() -> None:
    env = Line()
    env.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(InputError, match="'NextStep'; allowed is 'Disabled'"):
        play(robot("a", 1), env, range(3))


ROBOTS = [robot("fast", 1.0), robot("slow", 0.5), robot("slower", 0.3), robot("back", -1.0)]


def test_a_true_model_and_one_that_lies(tmp_path: Path) -> None:
    """Half of the seeds are odd: who is good fails there, in the world that lies. Agreement tells; among
    the good, r does not."""
    for name in "ab":
        (tmp_path / name).mkdir()
    honest = judge(ROBOTS, Line(), Line(), range(8), tmp_path / "a", {})
    found = judgement.compared(honest)
    assert found.pearson.value == pytest.approx(1) and found.agreement.value == 1 and found.mmrv.value == 0
    lied = judge(ROBOTS, Line(lies=True), Line(), range(8), tmp_path / "b", {})
    found = judgement.compared(lied)
    assert lied[0].model.success.tolist() == [True, False] * 4 and lied[0].truth.success.all()
    assert found.agreement.value < 0.7 and found.kappa.value < 0.4 and found.pearson.value < 0.1
    good = judgement.compared(lied[:3])  # without the one that turned round wins
    assert good.agreement.value < 0.7 and good.bias.value < -0.2 and good.pearson.value > 0.95
    summary = judgement.summarise(lied)
    assert [each["policy"] for each in summary["policies"]][0] == "fast"
    assert summary["policies"][0]["model"]["success"] == 0.5 and summary["policies"][0]["agreement"] == 0.5
    back = next(each for each in summary["policies"] if each["policy"] == "back")
    assert back["kappa"] == 0 and back["truth"]["success"] == 0
    json.dumps(summary, allow_nan=False)


def test_a_stopped_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, truth = Line(), Line()

    def run(robots: list[Asked], seeds: range = range(4), told: list | None = None, **settings: Any) -> list[Trial]:
        model.asked, truth.asked = [], []
        note = None if told is None else lambda *words: told.append(words)
        return judge(robots, model, truth, seeds, tmp_path, settings, {"fast": "1"}, note)

    first = run(ROBOTS[:2], steps=8)
    assert len(model.asked) == len(truth.asked) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"fast.json", "slow.json"}
    told: list[tuple] = []
    again = run(ROBOTS, told=told, steps=8)
    assert len(model.asked) == 4  # of the two new ones alone
    assert told[:2] == [("fast", "model", 4, 4), ("fast", "truth", 4, 4)]
    assert sum(done for _, _, done, of in told if done == of) == 4 * 2 * 4
    for one, other in zip(first, again):
        for part in ("model", "truth"):
            for name, value in vars(getattr(one, part)).items():
                assert np.allclose(value, getattr(getattr(other, part), name), atol=1e-4)
    assert not capsys.readouterr().err
    run(ROBOTS[:2], steps=9)
    assert len(model.asked) == 4 and capsys.readouterr().err.count("done again") == 2
    run(ROBOTS[:1], range(5), steps=9)
    assert len(model.asked) == 2 and "other settings, seeds" in capsys.readouterr().err
    (tmp_path / "fast.json").write_text('{"settings"')
    run(ROBOTS[:1], range(5), steps=9)
    assert len(model.asked) == 2 and "cannot be read" in capsys.readouterr().err
    judge(ROBOTS[:1], model, truth, range(5), tmp_path, {"steps": 9}, {"fast": "2"})
    assert "another policy" in capsys.readouterr().err


def trial(model: str, truth: str, apart: Sequence[float], name: str = "x") -> Trial:
    def part(word: str, distance: Any) -> Episodes:
        return Episodes(np.array([c == "1" for c in word]), np.array(distance, float), np.arange(len(word)) + 2)

    return Trial(name, part(model, apart), part(truth, [0.0] * len(apart)), (1.0, 1.0))


def test_what_is_worth_a_look() -> None:
    """Another end first, of those the furthest apart; a failure twice that ends elsewhere next; an agreement last."""
    assert worth_a_look(trial("10110", "11010", [0.0, 0.1, 0.3, 0.0, 0.9])) == [2, 1, 3]
    assert worth_a_look(trial("10010", "10010", [0.0, 0.1, 0.3, 0.0, 0.2])) == [2, 4, 3]
    assert worth_a_look(trial("000", "000", [0.0, 0.0, np.nan])) == [2]


def test_the_ring_is_where_the_task_is_done() -> None:
    assert GOAL_RADIUS == SUCCESS


def test_side_by_side() -> None:
    grey, white = np.full((5, 64, 64, 3), 60, np.uint8), np.full((9, 64, 64, 3), 200, np.uint8)
    grey[-1] = 90
    video = side_by_side(Pair("x", 1, grey, white, np.array([0.0, 0.0]), (True, False)))
    size = 64 * SCALE
    assert len(video) == 9 and video.width == 2 * size + 8 and video.fps == 12
    left, right = video.frames[:, -size:, :size], video.frames[:, -size:, -size:]
    assert (left[0, 5, 5] == 60).all() and (left[8, 5, 5] == 90).all() and (right[0, 5, 5] == 200).all()
    assert (left[0] == 255).any() and (left[0] == 255).mean() < 0.02  # the ring
    assert (video.frames[3, :20] != video.frames[4, :20]).any()  # it says how it ended


def test_scatter(tmp_path: Path) -> None:
    """A point is where it belongs: up and to the right for more success."""
    places = []
    for truth, model in ((0.2, 0.2), (0.8, 0.2), (0.2, 0.8)):
        scatter(tmp_path / "s.png", [Dot("a", (truth, truth, truth), (model, model, model))], "r")
        pixels = np.asarray(Image.open(tmp_path / "s.png")).astype(int)
        y, x = np.nonzero(np.abs(pixels - (31, 98, 178)).sum(2) < 30)
        places.append((x.mean(), y.mean()))
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(0.6 * 0.94 * 720, abs=3) and y1 == pytest.approx(y0, abs=1)
    assert y0 - y2 == pytest.approx(0.6 * 0.94 * 720, abs=3) and x2 == pytest.approx(x0, abs=1)


def test_seeds_of_the_two_sets() -> None:
    pick = {name: ALL[name] for name in ("push", "still")}
    assert judgement.first_seed({"push": pick["push"]}, None) == FINAL_SEED == judgement.first_seed({}, None)
    assert judgement.first_seed(pick, None) == TUNING_SEED and judgement.first_seed(pick, 30_000) == 30_000
    with pytest.raises(InputError, match="--first-seed is 1000; allowed is 10000"):
        judgement.first_seed(pick, 1000)


# ---- MuJoCo


@pytest.fixture(scope="module")
def truth() -> Any:
    orrery.env.register()
    env = judgement.make_env(judgement.TRUTH, 3)
    try:
        env.reset(seed=0)
    except Exception as error:  # each OpenGL raises its own
        pytest.skip(f"MuJoCo cannot draw here: {error}")
    return env


def test_a_good_robot_is_better_than_none(truth: Any) -> None:
    seeds = range(TUNING_SEED, TUNING_SEED + 3)
    choose = ALL["ahead"].choose
    assert choose is not None
    episodes, films, _ = play(Scripted("ahead", choose), truth, seeds)
    assert episodes.success.sum() >= 2 and (episodes.steps[episodes.success] < 24).all()
    assert films[0].shape == (1 + 4 * episodes.steps[0], 64, 64, 3)


def test_demonstrations(truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from orrery.eval import cloning

    monkeypatch.setattr(cloning, "FIRST_SEED", 4)
    shown = cloning.demonstrate(truth, 2)
    assert set(shown["episode"]) == {0, 1} and len(shown["features"]) == len(shown["actions"]) >= 6
    assert np.isfinite(shown["features"]).all() and (np.linalg.norm(shown["actions"], axis=1) <= 1.5).all()


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


MINE = "import numpy as np\ndef mine(seen):\n    return np.zeros((len(seen['image']), 2))\n"


def test_the_verb(truth: Any, acting_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "judged_robots.py").write_text(MINE)
    command = ["judge", "-o", "out", "--model", acting_folder, "--policies", "noise-0.2"]
    command += ["--policy", "judged_robots:mine"]
    command += ["--seeds", 1, "--first-seed", 30_000, "--steps", 1, "--copies", 2]
    assert call(*command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"mine +0% \[0%, 79%\] ", printed) and "MMRV" in printed
    result = json.loads((tmp_path / "out/results.json").read_text())
    assert result["first_seed"] == 30_000 and {each["policy"] for each in result["policies"]} == {"noise-0.2", "mine"}
    assert result["comparison"]["pearson"]["trials"] is not None
    clips = sorted(tmp_path.glob("out/clips/*/*.mp4"))
    assert clips and Video.read(clips[0]).width == 520
    assert Image.open(tmp_path / "out/sheet.png").height > 100 and Image.open(tmp_path / "out/scatter.png").width > 700
    monkeypatch.setattr("orrery.eval.trials.play", None)  # all is there
    assert call(*command) == 0


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "--output (-o) is missing"),
        (["-o", "x", "--policies", "puhs"], "names 'puhs'; allowed are final, tuning, all, none, still"),
        (["-o", "x", "--policies", "none"], "no policy"),
        (["-o", "x", "--seeds", 0], "--seeds is 0; allowed is 1 to 10000"),
        (["-o", "x", "--steps", 0], "--steps is 0"),
        (["-o", "x", "--first-seed", 5], "--first-seed is 5; allowed is 10000"),
        (["-o", "x", "--policy", "nothing"], "--policy is 'nothing'; allowed are module:attribute"),
        (["-o", "no/where"], "no does not exist"),
        (["-o", "x", "--model", "nonesuch"], "nonesuch"),
        (["-o", "file"], "it is a file, not a folder"),
    ],
)
def test_refusals_of_the_verb(words: list, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert call("judge", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_a_model_of_another_world(truth: Any, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    assert call("judge", "-o", tmp_path / "x", "--model", tiny_folder, "--policies", "push") == 2
    assert "no world of the tabletop" in capsys.readouterr().err


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("judge", "--list") == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^{re.escape(name)} +(final|tuning) ", printed, re.M) for name in ALL)


def test_gymnasium_has_to_know(monkeypatch: pytest.MonkeyPatch, acting_folder: Path) -> None:
    with pytest.raises(OrreryError, match="does not know orrery/Nothing-v0"):
        judgement.make_env("orrery/Nothing-v0", 1)
    with pytest.raises(InputError, match="two policies are called 'push'"):
        judgement.rehearse(load(acting_folder), {"push": ALL["push"]}, {"a:push": robot("push", 1)}, [1], Path("/x"))
