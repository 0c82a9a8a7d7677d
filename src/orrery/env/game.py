"""The game of `orrery play`, without its page: a tabletop in the world model and its twin in MuJoCo, moved alike.

Both begin with the same picture and are told the same actions; everything said of them is read from their pixels. A
game has no end: where the cube reaches the goal, the world goes on and another goal is drawn.
"""

import io
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from orrery.env.cells import SIZE, SUCCESS, Cells, Start, start_of
from orrery.errors import InputError
from orrery.sim.detect import PEG_HEIGHT, detect, detect_all, to_pixels
from orrery.sim.simulate import FPS
from orrery.sim.tabletop import TRAVEL, draw_goal
from orrery.video import Video
from orrery.world import World

ENDLESS = 10**9  # steps of an episode
SHOWN = 6  # steps for which a goal that was reached stays
FILM = 450  # steps that are kept for saving: 150 s
GAIN = 0.8  # of the way to the pointer a step: the arm runs after what it is told by some centimetres
PACKAGED = 24  # pictures to begin with where there is no MuJoCo that draws one
COLUMNS = 6  # of their sheet
HIGHEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Piece:
    """What comes next. header: for the page, plain JSON; frames: world -> [n, H, W, 3] uint8."""

    header: dict[str, Any]
    frames: dict[str, np.ndarray]


class Game:
    """One person's tabletop.

    Args:
        world: the model. truth: whether MuJoCo plays beside it. steps: of the model's solver, default its own.
        drawn: whether MuJoCo draws what a seed begins with; else it is one of the packaged pictures.
    """

    def __init__(self, world: World, truth: bool = True, steps: int | None = None, drawn: bool = True) -> None:
        self.cells = {"model": Cells("model", 1, world, steps=steps, max_steps=ENDLESS)}
        if truth:
            self.cells["truth"] = Cells("truth", 1, max_steps=ENDLESS)
        self.drawn = drawn
        self.playing: list[str] = []  # worlds that take part since the last begin
        self.rng = np.random.default_rng()
        self.goal = np.zeros(2)
        self.seed = self.rounds = 0
        self.scores: dict[str, int] = {}
        self.reached: dict[str, int] = {}  # world -> steps since it reached this goal
        self.film: deque[np.ndarray] = deque(maxlen=FILM)

    def begin(self, seed: int, image: bytes | None = None) -> Piece:
        """Begin anew, with what a seed draws or with a picture (the bytes of its file).

        Raises:
            InputError: the seed is out of range, or the picture cannot be read.
        """
        if not 0 <= seed <= HIGHEST_SEED:
            raise InputError(f"seed is {seed}; allowed is 0 to {HIGHEST_SEED}")
        start, self.rng = self._start(seed, image)
        note, frames = "", {}
        for name, cells in self.cells.items():
            try:
                cells.reset([0], [start])
            except InputError as error:
                if name == "model":
                    raise
                note = f"MuJoCo sits this one out: {error}"
                continue
            frames[name] = cells.images[:1].copy()
        self.playing, self.seed, self.goal = list(frames), seed, start.goal
        self.rounds, self.reached = 0, {}
        self.scores = dict.fromkeys(self.playing, 0)
        self.film.clear()
        return self._piece("begin", frames, {}, note)

    def _start(self, seed: int, image: bytes | None) -> tuple[Start, np.random.Generator]:
        """The start of `TabletopEnv.reset(seed=seed)`, and the generator that draws what comes after it."""
        picked = seed if self.drawn else seed % PACKAGED
        rng = seeding.np_random(picked)[0]
        if image is not None:
            return start_of(rng, {"image": _open_image(image)}), rng
        start = start_of(rng, None)
        return start if self.drawn else replace(start, layout=None, image=packaged_picture(picked)), rng

    def step(self, velocity: Sequence[float] | np.ndarray) -> Piece:
        """What happens next in all worlds when the peg is told this velocity [2], in [-1, 1]."""
        if not self.playing:
            raise InputError("nothing has begun yet; allowed after `begin`")
        actions = np.clip(np.asarray(velocity, np.float64), -1, 1)[None]
        if self.reached.get(self.playing[0], 0) >= SHOWN or len(self.reached) == len(self.playing):
            self._next_goal()
        frames, seconds = {}, {}
        for name in self.playing:
            began = time.perf_counter()
            frames[name] = self.cells[name].step(actions, [0]).frames[0]
            if self.cells[name].distances[0] < SUCCESS:
                self.cells[name].set_goal(0, self.goal)  # the episode is over, the world goes on
            seconds[name] = time.perf_counter() - began
        self._count()
        return self._piece("step", frames, seconds)

    def velocity_to(self, place: Sequence[float], world: str) -> np.ndarray:
        """The velocity [2] that brings the peg of a world to a place (x, y) of its picture, both 0 to 1."""
        if world not in self.playing:
            raise InputError(f"world is {world!r}; allowed are {', '.join(self.playing) or 'none yet'}")
        peg = detect(self.cells[world].images[0]).peg
        if np.isnan(peg).any():
            return np.zeros(2)
        x, y, w = _to_table() @ [*np.clip(place, 0, 1), 1]
        return shorten(GAIN * (np.array([x, y]) / w - peg) / TRAVEL)

    def another_goal(self) -> None:
        """Another goal, from the next step on."""
        self._next_goal()

    def _next_goal(self) -> None:
        cube = detect(self.cells[self.playing[0]].images[0]).cube
        centre = self.goal if np.isnan(cube).any() else cube
        self.goal = draw_goal(self.rng, np.clip(centre, [-0.34, -0.3], [0.34, 0.12]))
        for name in self.playing:
            self.cells[name].set_goal(0, self.goal)
        self.rounds, self.reached = self.rounds + 1, {}

    def _count(self) -> None:
        """Who has reached the goal, and for how long."""
        for name in self.playing:
            if name in self.reached:
                self.reached[name] += 1
            elif self.cells[name].distances[0] < SUCCESS:
                self.reached[name] = 0
                self.scores[name] += 1

    def _piece(self, kind: str, frames: dict[str, np.ndarray], seconds: Mapping[str, float], note: str = "") -> Piece:
        self.film.append(np.concatenate(list(frames.values()), axis=2))
        seen = {name: detect_all(pixels) for name, pixels in frames.items()}
        worlds = {name: self._told(name, places) for name, places in seen.items()}
        apart: list[float | None] = []
        if len(seen) == 2:
            apart = _numbers(np.linalg.norm(seen["model"][:, 1] - seen["truth"][:, 1], axis=1))
        header = dict(
            type=kind, seed=self.seed, round=self.rounds, ring=ring(self.goal).round(4).tolist(), worlds=worlds,
            apart=apart, seconds={name: round(value, 4) for name, value in seconds.items()}, note=note,
            count=len(next(iter(frames.values()))),
        )  # fmt: skip
        return Piece(header, frames)

    def _told(self, name: str, places: np.ndarray) -> dict[str, Any]:
        """Of one world, frame by frame: peg and cube (metres), where the peg is in the picture (0 to 1), the cube's
        distance to the goal (metres); None where it is not seen. And whether and how often a goal was reached."""
        return dict(
            peg=_rows(places[:, 0]), cube=_rows(places[:, 1]), at=_rows(_in_picture(places[:, 0], PEG_HEIGHT)),
            distance=_numbers(np.linalg.norm(places[:, 1] - self.goal, axis=1)),
            reached=name in self.reached, goals=self.scores[name],
        )  # fmt: skip

    def video(self) -> Video:
        """What was seen since the last begin (the latest 150 s of it): the worlds side by side."""
        if not self.film:
            raise InputError("there is nothing to save yet")
        return Video(np.concatenate(list(self.film)), float(FPS))


def shorten(velocity: Any, limit: float = 1.0) -> np.ndarray:
    """A velocity [2] at most so long, in its direction."""
    values = np.asarray(velocity, np.float64)
    return values * min(1.0, limit / max(float(np.hypot(*values)), 1e-9))


def ring(goal: np.ndarray) -> np.ndarray:
    """The circle of success about a goal, on the table, as it lies in the picture: [33, 2], both 0 to 1."""
    angles = np.linspace(0, 2 * np.pi, 33)
    return _in_picture(goal + SUCCESS * np.column_stack([np.cos(angles), np.sin(angles)]), 0.0)


def _in_picture(places: np.ndarray, height: float) -> np.ndarray:
    """Places [N, 2] at a height as (x, y) of the picture, 0 to 1."""
    return to_pixels(places, 1, height) + 0.5


@cache
def _to_table() -> np.ndarray:
    """[3, 3]: a homography from the picture (x, y, 1), 0 to 1, to the table at the height where a peg is seen."""
    places = np.array([[-0.5, -0.5], [0.5, -0.5], [-0.5, 0.5], [0.5, 0.5]])
    rows, right = [], []
    for (x, y), (u, v) in zip(places, _in_picture(places, PEG_HEIGHT), strict=True):
        rows += [[u, v, 1, 0, 0, 0, -x * u, -x * v], [0, 0, 0, u, v, 1, -y * u, -y * v]]
        right += [x, y]
    return np.append(np.linalg.solve(np.array(rows), np.array(right)), 1.0).reshape(3, 3)


def _rows(values: np.ndarray) -> list[list[float] | None]:
    return [None if np.isnan(row).any() else row.round(4).tolist() for row in values]


def _numbers(values: np.ndarray) -> list[float | None]:
    return [None if np.isnan(value) else round(float(value), 4) for value in values]


def _open_image(content: bytes) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError("this is not an image that can be decoded") from error
    return image


@cache
def _sheet() -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(files("orrery.env").joinpath("starts.png").read_bytes())) as image:
        return np.asarray(image.convert("RGB"))


def packaged_picture(seed: int) -> np.ndarray:
    """What MuJoCo draws for a seed below PACKAGED [H, W, 3] uint8, out of the package."""
    top, left = seed // COLUMNS * SIZE, seed % COLUMNS * SIZE
    return _sheet()[top : top + SIZE, left : left + SIZE].copy()


def draw_sheet(path: Path) -> None:
    """Make the packaged pictures again; needs MuJoCo."""
    from PIL import Image

    from orrery.sim.tabletop import Tabletop

    artist, pictures = Tabletop(SIZE), []
    for seed in range(PACKAGED):
        layout = start_of(seeding.np_random(seed)[0], None).layout
        assert layout is not None
        pictures.append(artist.reset(layout))
    rows = [np.concatenate(pictures[first : first + COLUMNS], 1) for first in range(0, PACKAGED, COLUMNS)]
    Image.fromarray(np.concatenate(rows)).save(path, optimize=True)
