"""`orrery play` without a browser: the game's rules, what the server and a page say to each other, the verb."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import orrery.env.optional
import orrery.sim.render
from orrery.cli.main import main
from orrery.env import game as games
from orrery.env.cells import SIZE, SUCCESS, Cells, start_of
from orrery.env.game import PACKAGED, SHOWN, Game, packaged_picture
from orrery.env.play import MOST_GAMES, listen, parse, same_origin
from orrery.env.tabletop import TabletopEnv
from orrery.errors import InputError, OrreryError
from orrery.sim.detect import detect
from orrery.sim.tabletop import HELD, TRAVEL, push_towards
from orrery.video import Video
from orrery.world import World, load

pytest.importorskip("fastapi")
client = pytest.importorskip("websockets.sync.client")

STILL = json.dumps({"type": "act"})


@pytest.fixture(scope="module")
def world(acting_folder: Path) -> World:
    return load(acting_folder)


@pytest.fixture
def game(world: World) -> Game:
    return Game(world)


def png(pixels: np.ndarray, path: Path) -> bytes:
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


# ---- the game


def test_begins_as_the_environment_does(game: Game) -> None:
    env = TabletopEnv("truth")
    for seed in (0, 7):
        piece, (seen, _) = game.begin(seed), env.reset(seed=seed)
        assert list(piece.frames) == ["model", "truth"] and piece.header["count"] == 1
        for frames in piece.frames.values():
            assert (frames[0] == seen["image"]).all()
        assert np.allclose(game.goal, seen["goal"]) and piece.header["apart"] == [0]
        told = piece.header["worlds"]
        assert told["model"] == told["truth"] and not told["truth"]["reached"]
        ring = np.array(piece.header["ring"])
        assert ring.shape == (33, 2) and (ring > 0).all() and (ring < 1).all()


def test_both_worlds_are_told_the_same_action(game: Game) -> None:
    first = game.begin(3)
    piece = game.step([1, 0])
    assert {name: frames.shape for name, frames in piece.frames.items()} == dict.fromkeys(
        ("model", "truth"), (HELD, SIZE, SIZE, 3)
    )
    twin = TabletopEnv("truth")
    twin.reset(seed=3)
    assert (twin.step(np.array([1.0, 0.0]))[4]["frames"] == piece.frames["truth"]).all()
    assert (piece.frames["model"][-1] != first.frames["model"][0]).any()
    pegs = piece.header["worlds"]["truth"]["peg"]
    assert len(pegs) == HELD and pegs[-1][0] > pegs[0][0]
    json.dumps(piece.header, allow_nan=False)


def test_goes_on_after_the_goal_and_draws_another(game: Game) -> None:
    """A scripted robot plays in MuJoCo; nothing ends, and each goal counts once."""
    piece, rounds = game.begin(1), []
    for _ in range(70):
        seen = detect(piece.frames["truth"][-1])
        piece = game.step(push_towards(seen.peg, seen.cube, game.goal))
        rounds.append(piece.header["round"])
        if piece.header["worlds"]["truth"]["goals"]:
            break
    assert piece.header["worlds"]["truth"]["goals"] == 1 and piece.header["worlds"]["truth"]["reached"]
    assert piece.header["worlds"]["truth"]["distance"][-1] < SUCCESS and rounds[-1] == 0
    game.reached["model"] = 0  # the random model never gets there: as if it had
    goal = game.goal.copy()
    piece = game.step([0, 0])
    assert piece.header["round"] == 1 and (game.goal != goal).any()
    assert not piece.header["worlds"]["truth"]["reached"] and piece.header["worlds"]["truth"]["goals"] == 1
    game.reached["model"] = SHOWN  # the model alone, for long enough
    assert game.step([0, 0]).header["round"] == 2


def test_another_goal_when_asked(game: Game) -> None:
    game.begin(0)
    before = game.goal.copy()
    game.another_goal()
    piece = game.step([0, 0])
    assert (game.goal != before).any() and piece.header["round"] == 1
    assert all((cells.goals[0] == np.float32(game.goal)).all() for cells in game.cells.values())


@pytest.mark.parametrize("way", [(0.2, 0.0), (-0.2, 0.1), (0.0, -0.25)])
def test_the_peg_goes_where_a_pointer_is(game: Game, way: tuple[float, float]) -> None:
    game.begin(0)
    start = detect(game.cells["truth"].images[0]).peg
    target = np.clip(start + way, [-0.5, -0.45], [0.5, 0.3])
    place = games._in_picture(target[None], games.PEG_HEIGHT)[0]
    for _ in range(6):
        piece = game.step(game.velocity_to(place, "truth"))
    assert np.linalg.norm(np.array(piece.header["worlds"]["truth"]["peg"][-1]) - target) < 0.06
    far = game.velocity_to((0.0, 0.0), "truth")
    assert np.hypot(*far) == pytest.approx(1) and TRAVEL == pytest.approx(0.2)


def test_own_picture(game: Game, tmp_path: Path) -> None:
    game.begin(5)
    picture = game.cells["truth"].images[0].copy()
    piece = game.begin(0, png(picture, tmp_path / "a.png"))
    assert (piece.frames["model"][0] == picture).all() and set(piece.frames) == {"model", "truth"}
    assert np.abs(piece.frames["truth"][0].astype(int) - picture).mean() < 8  # rebuilt: the cube's yaw is unknown
    piece = game.begin(0, png(np.full((90, 120, 3), 90, np.uint8), tmp_path / "b.png"))
    assert list(piece.frames) == ["model"] and "no magenta peg" in piece.header["note"]
    assert list(game.step([0, 1]).frames) == ["model"] and game.video().width == SIZE
    with pytest.raises(InputError, match="not an image"):
        game.begin(0, b"GIF89a nothing")


def test_video_is_both_worlds_beside_each_other(game: Game) -> None:
    with pytest.raises(InputError, match="nothing to save"):
        game.video()
    first = game.begin(2)
    game.step([0, 1])
    video = game.video()
    assert video.frames.shape == (1 + HELD, SIZE, 2 * SIZE, 3) and video.fps == 12
    assert (video.frames[0, :, SIZE:] == first.frames["truth"][0]).all()
    game.begin(2)
    assert len(game.video()) == 1


def test_packaged_pictures_are_what_mujoco_draws(world: World) -> None:
    cells = Cells("truth", 1)
    for seed in (0, 11, PACKAGED - 1):
        cells.reset([0], [start_of(games.seeding.np_random(seed)[0], None)])
        assert np.abs(cells.images[0].astype(int) - packaged_picture(seed)).mean() < 2
    alone, drawn = Game(world, truth=False, drawn=False), Game(world, truth=False)
    piece = alone.begin(PACKAGED + 3)  # there are no more of them: it starts over
    assert list(piece.frames) == ["model"] and (piece.frames["model"][0] == packaged_picture(3)).all()
    drawn.begin(3)
    assert np.allclose(alone.goal, drawn.goal) and alone.step([1, 1]).header["apart"] == []


def test_set_goal_of_cells() -> None:
    cells = Cells("truth", 2, max_steps=1)
    with pytest.raises(Exception, match="not begun"):
        cells.set_goal(0, [0, 0])
    cells.reset([0, 1], [start_of(games.seeding.np_random(seed)[0], None) for seed in (0, 1)])
    assert cells.step(np.zeros((2, 2)), [0, 1]).truncated.all()
    cells.set_goal(1, detect(cells.images[1]).cube)
    assert cells.running.tolist() == [False, True] and cells.distances[1] < 1e-6
    assert cells.step(np.zeros((2, 2)), [1]).terminated.tolist() == [False, True]
    for goal in ([0, 0, 0], [0, 2], [np.nan, 0]):
        with pytest.raises(InputError, match="goal is"):
            cells.set_goal(0, goal)


# ---- what is said


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "JSON"),
        ("[]", "an object"),
        ('{"type": "fly"}', "fly"),
        ('{"type": "act", "velocity": [0, 2]}', "velocity.1"),
        ('{"type": "act", "velocity": [0, NaN]}', "velocity"),
        ('{"type": "act", "speed": 1}', "speed"),
        ('{"type": "begin", "seed": -1}', "seed"),
        ('{"type": "begin"}', "seed"),
    ],
)
def test_wrong_messages_are_named(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


def test_another_sites_page_may_not_drive() -> None:
    assert same_origin(None, "127.0.0.1:8008") and same_origin("http://127.0.0.1:8008", "127.0.0.1:8008")
    assert not same_origin("https://example.org", "127.0.0.1:8008") and not same_origin("null", "127.0.0.1:8008")


@contextmanager
def serving(*arguments: object, missing: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`orrery play` in a process of its own (an OpenGL context belongs to one thread), and its address.
    missing: a package that it shall not find."""
    words = ["play", "--port", "0", "--no-browser", *map(str, arguments)]
    code = f"import sys; sys.modules[{missing!r}] = None; from orrery.cli.main import main; main({words!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    try:
        printed = "".join(iter(process.stdout.readline, "Ctrl-C ends it.\n"))
        found = re.search(r"http://127\.0\.0\.1:\d+/", printed)
        assert found, printed
        yield process, found.group()
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def address(acting_folder: Path) -> Iterator[str]:
    with serving("--model", acting_folder, "--seed", 4) as (_, found):
        yield found


def connect(address: str, **options: Any) -> Any:
    return client.connect(f"{address.replace('http', 'ws')}game", max_size=None, **options)


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(message[:4], "little")
    return json.loads(message[4 : 4 + length]), message[4 + length :]


def test_a_session(address: str, tmp_path: Path) -> None:
    with connect(address) as page:
        hello = json.loads(page.recv())
        assert (hello["type"], hello["worlds"], hello["seed"]) == ("hello", ["model", "truth"], 4)
        page.send(STILL)
        assert "nothing has begun" in json.loads(page.recv())["message"]
        page.send(json.dumps({"type": "begin", "seed": 4}))
        header, pixels = unpack(page.recv())
        assert header["type"] == "begin" and len(pixels) == 2 * SIZE * SIZE * 3
        page.send(json.dumps({"type": "act", "to": [0.5, 0.5], "world": "truth", "limit": 0.5}))
        header, pixels = unpack(page.recv())
        assert header["type"] == "step" and header["count"] == HELD and len(pixels) == 2 * HELD * SIZE * SIZE * 3
        assert set(header["seconds"]) == {"model", "truth"}
        page.send(json.dumps({"type": "act", "to": [0.5, 0.5], "world": "moon"}))
        assert "world is 'moon'" in json.loads(page.recv())["message"]
        page.send(json.dumps({"type": "goal"}))
        page.send(STILL)
        assert unpack(page.recv())[0]["round"] == 1
        page.send(json.dumps({"type": "save"}))
        header, content = unpack(page.recv())
        assert header == {"type": "film", "name": "orrery-seed4.mp4"}
        (tmp_path / "film.mp4").write_bytes(content)
        assert len(Video.read(tmp_path / "film.mp4")) == 1 + 2 * HELD
        page.send(png(np.zeros((8, 8, 3), np.uint8), tmp_path / "c.png"))
        assert "MuJoCo sits this one out" in unpack(page.recv())[0]["note"]
        page.send(b"no picture")
        assert "not an image" in json.loads(page.recv())["message"]


def test_tabs_have_their_own_games(address: str) -> None:
    with connect(address) as one, connect(address) as two:
        for page, seed in ((one, 1), (two, 2)):
            page.recv()
            page.send(json.dumps({"type": "begin", "seed": seed}))
        assert [unpack(page.recv())[0]["seed"] for page in (one, two)] == [1, 2]
        for page in (one, two):
            page.send(STILL)
        (first, _), (second, _) = unpack(one.recv()), unpack(two.recv())
        assert first["ring"] != second["ring"]


def test_too_many_tabs_and_other_sites_are_turned_away(address: str) -> None:
    with pytest.raises(Exception, match="403"):
        connect(address, origin="https://example.org")
    time.sleep(0.3)  # until those of the tests above have gone
    with ExitStack() as open_pages:
        pages = [open_pages.enter_context(connect(address)) for _ in range(MOST_GAMES)]
        assert all(json.loads(page.recv())["type"] == "hello" for page in pages)
        with connect(address) as late, pytest.raises(Exception, match="close one"):
            late.recv()


# ---- the verb


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in ("play", *arguments)])
    return int(end.value.code or 0)


def test_wrong_inputs_are_one_line(capsys: pytest.CaptureFixture[str], acting_folder: Path, tiny_folder: Path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        for arguments, complaint in (
            (("--port", port, "--model", acting_folder), f"port {port}: address already in use"),
            (("--port", 70000, "--model", acting_folder), "port is 70000"),
            (("--host", "300.1.1.1", "--model", acting_folder), "300.1.1.1"),
            (("--seed", -1, "--model", acting_folder), "--seed is -1"),
            (("--port", 0, "--model", tiny_folder), "no world of the tabletop"),
            (("--port", 0, "--model", "nowhere"), "nowhere"),
        ):
            assert call("--no-browser", *arguments) == 2
            lines = capsys.readouterr().err.splitlines()
            assert len(lines) == 1 and complaint in lines[0], lines


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = orrery.env.optional.find_spec
    monkeypatch.setattr(orrery.env.optional, "find_spec", lambda name: None if name == "uvicorn" else found(name))
    with pytest.raises(OrreryError, match=r"needs uvicorn: pip install 'orrery\[play\]'"):
        orrery.env.optional.check_packages()


def test_without_mujoco_the_model_plays_alone(acting_folder: Path) -> None:
    with serving("--model", acting_folder, "--seed", PACKAGED + 3, missing="mujoco") as (process, found):
        with connect(found) as page:
            hello = json.loads(page.recv())
            assert hello["worlds"] == ["model"] and "pip install 'orrery[sim]'" in hello["note"]
            page.send(json.dumps({"type": "begin", "seed": PACKAGED + 3}))
            header, pixels = unpack(page.recv())
            assert pixels == packaged_picture(3).tobytes() and header["apart"] == []
            page.send(STILL)
            assert list(unpack(page.recv())[0]["worlds"]) == ["model"]
        process.kill()
        assert process.stderr is not None and "orrery: without MuJoCo" in process.stderr.read()


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_serves_until_ctrl_c(acting_folder: Path) -> None:
    with serving("--model", acting_folder, "--no-truth", "--seed", 6) as (process, found):
        with connect(found) as page:
            hello = json.loads(page.recv())
            assert hello["worlds"] == ["model"] and hello["seed"] == 6
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        assert process.stderr is not None and process.stderr.read() == ""
