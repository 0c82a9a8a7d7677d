"""Robot cells: several copies of the tabletop that are moved on together, in MuJoCo or in a world model.

Everything that an environment says of a cell (observation, reward, success) comes from here and from pixels, by one
detector; the two kinds differ in nothing but who draws the next frames.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gymnasium.error import InvalidAction, ResetNeeded

from orrery.errors import InputError
from orrery.sim.detect import detect, detect_all, layout_of
from orrery.sim.tabletop import HELD, Layout, Tabletop, draw_goal, draw_layout
from orrery.video import Video, from_image
from orrery.world import Rollout, World, load

SIZE, ACTIONS = 64, 2
SUCCESS = 0.07  # metres from the cube to the goal at which the task is done
MAX_STEPS = 24
BONUS = 1.0  # reward of success; before, the reward is the metres that the cube came nearer
OPTIONS = ("image", "goal", "dataset", "episode", "frame", "reset_mask")


class Backend(Protocol):
    """Who draws the frames of all cells."""

    def reset(self, rows: Sequence[int], starts: Sequence["Start"]) -> np.ndarray:
        """Begin these cells; their first frames [n, H, W, 3] uint8."""
        ...

    def step(self, rows: Sequence[int], actions: np.ndarray) -> np.ndarray:
        """The frames [n, HELD, H, W, 3] that follow in these cells when each holds its action [n, 2]."""
        ...


@dataclass(frozen=True)
class Start:
    """How a cell begins: a layout, or a picture [H, W, 3] uint8; the goal [2], metres; the seed of a model's noise."""

    layout: Layout | None
    image: np.ndarray | None
    goal: np.ndarray
    seed: int


class TruthBackend:
    """MuJoCo. A picture is rebuilt from what the detector sees in it."""

    def __init__(self, count: int) -> None:
        self.cells = [Tabletop(SIZE) for _ in range(count)]

    def reset(self, rows: Sequence[int], starts: Sequence[Start]) -> np.ndarray:
        frames = []
        for row, start in zip(rows, starts, strict=True):
            layout = start.layout if start.image is None else layout_of(start.image, start.goal)
            assert layout is not None
            frames.append(self.cells[row].reset(layout))
        return np.stack(frames)

    def step(self, rows: Sequence[int], actions: np.ndarray) -> np.ndarray:
        return np.stack(
            [
                np.stack([self.cells[row].step(action) for _ in range(HELD)])
                for row, action in zip(rows, actions, strict=True)
            ]
        )


class ModelBackend:
    """A world model that knows the tabletop's actions. A layout becomes a picture by MuJoCo, once."""

    def __init__(self, count: int, world: World, steps: int | None = None) -> None:
        self.count, self.world, self.steps = count, world, steps
        self.artist = Tabletop(SIZE)
        self.rollout: Rollout | None = None
        actions = world.config.actions
        if actions is None or actions.dimensions != ACTIONS or world.config.resolution != (SIZE, SIZE):
            told = "none" if actions is None else f"{actions.dimensions} numbers"
            raise InputError(
                f"model {world.name!r} is no world of the tabletop: it takes actions of {told} at "
                f"{world.config.resolution}; allowed is {ACTIONS} at {(SIZE, SIZE)}, such as 'tabletop'"
            )

    def reset(self, rows: Sequence[int], starts: Sequence[Start]) -> np.ndarray:
        images = [self.artist.reset(s.layout) if s.layout is not None else s.image for s in starts]
        frames = np.stack([image for image in images if image is not None])
        if self.rollout is None:
            blank = np.full((SIZE, SIZE, 3), 128, np.uint8)
            self.rollout = Rollout(self.world, [blank] * self.count, [0] * self.count, steps=self.steps)
            if self.rollout.frames_a_step != HELD:
                raise InputError(f"model {self.world.name!r} moves by {self.rollout.frames_a_step} frames, not {HELD}")
        self.rollout.restart(rows, list(frames), [start.seed for start in starts])
        return frames

    def step(self, rows: Sequence[int], actions: np.ndarray) -> np.ndarray:
        assert self.rollout is not None
        return self.rollout.step(np.repeat(actions[:, None], HELD, axis=1), rows)


@dataclass
class Results:
    """Of one step of all cells; rows that did not move keep their picture, with reward 0.

    images [B, H, W, 3] uint8 and goals [B, 2] float32; rewards [B] float64; terminated (success), truncated [B] bool;
    frames [B, HELD, H, W, 3], what was seen on the way; distances [B], metres from cube to goal as seen.
    """

    images: np.ndarray
    goals: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    distances: np.ndarray
    frames: np.ndarray = field(repr=False, default_factory=lambda: np.empty(0))


class Cells:
    """Copies of the tabletop task: bring the red cube to the goal.

    Args:
        kind: "model" or "truth". count: how many. model: a named model, a folder or a World, for kind "model".
        device: for a model that is loaded here. steps: of its solver, default the model's. max_steps: of an episode.
    """

    def __init__(
        self,
        kind: str,
        count: int,
        model: str | Path | World = "tabletop",
        device: str | None = None,
        steps: int | None = None,
        max_steps: int = MAX_STEPS,
    ) -> None:
        if kind not in ("model", "truth"):
            raise InputError(f"kind is {kind!r}; allowed are 'model', 'truth'")
        if count < 1 or max_steps < 1:
            raise InputError(f"{count} cells with {max_steps} steps; allowed is at least 1 of both")
        self.kind, self.count, self.max_steps = kind, count, max_steps
        self.backend: Backend
        if kind == "truth":
            self.backend = TruthBackend(count)
        else:
            world = model if isinstance(model, World) else load(model, device=device)
            self.backend = ModelBackend(count, world, steps)
        self.images = np.zeros((count, SIZE, SIZE, 3), np.uint8)
        self.goals = np.zeros((count, 2), np.float32)
        self.distances = np.full(count, np.nan)
        self.elapsed = np.zeros(count, int)
        self.running = np.zeros(count, bool)

    def reset(self, rows: Sequence[int], starts: Sequence[Start]) -> None:
        """Begin these cells."""
        self.images[list(rows)] = self.backend.reset(rows, starts)
        for row, start in zip(rows, starts, strict=True):
            self.goals[row] = start.goal
            self.elapsed[row], self.running[row] = 0, True
        self.distances[list(rows)] = np.nan
        self._look(rows)

    def set_goal(self, row: int, goal: Any) -> None:
        """Another goal [2], metres, for one cell: its world goes on as it is, also where the last goal was reached.

        Raises:
            InputError: no such goal. ResetNeeded: the cell has not begun.
        """
        place = np.asarray(goal, dtype=np.float64)
        if place.shape != (2,) or not (np.abs(place) <= 1).all():
            raise InputError(f"goal is {goal!r}; allowed are two metres within -1 to 1")
        if not self.images[row].any():
            raise ResetNeeded("set_goal() of a cell that has not begun; allowed after reset()")
        self.goals[row], self.distances[row] = place, np.nan
        self.elapsed[row], self.running[row] = 0, True
        self._look([row])

    def step(self, actions: Any, rows: Sequence[int]) -> Results:
        """Move these cells by one action each [B, 2], B of all cells.

        Raises:
            ResetNeeded: one of them has not begun, or is over.
            InvalidAction: another shape, not finite, or outside [-1, 1].
        """
        actions = check_actions(actions, self.count)
        rows = list(rows)
        if not self.running[rows].all():
            raise ResetNeeded("step() of an environment that has not begun or is over; allowed after reset()")
        frames = np.repeat(self.images[:, None], HELD, axis=1)
        before = self.distances.copy()
        if rows:
            frames[rows] = self.backend.step(rows, actions[rows])
            self.images[rows] = frames[rows, -1]
            self._look(rows)
            self.elapsed[rows] += 1
        moved = np.zeros(self.count, bool)
        moved[rows] = True
        done = moved & (self.distances < SUCCESS)
        truncated = moved & ~done & (self.elapsed >= self.max_steps)
        rewards = np.where(moved, np.nan_to_num(before - self.distances), 0.0) + BONUS * done
        self.running &= ~(done | truncated)
        return Results(self.images.copy(), self.goals.copy(), rewards, done, truncated, self.distances.copy(), frames)

    def _look(self, rows: Sequence[int]) -> None:
        """Measure; a cube that is not seen is where it was seen last."""
        rows = list(rows)
        cubes = detect_all(self.images[rows])[:, 1]
        found = np.linalg.norm(cubes - self.goals[rows], axis=1)
        self.distances[rows] = np.where(np.isnan(found), self.distances[rows], found)


def check_actions(actions: Any, count: int) -> np.ndarray:
    """Actions [count, 2] float64.

    Raises:
        InvalidAction: another shape, not finite, or outside [-1, 1].
    """
    try:
        values = np.asarray(actions, dtype=np.float64)
    except (TypeError, ValueError):
        raise InvalidAction(f"action is {actions!r}; allowed are numbers [{ACTIONS}]") from None
    if values.shape != (count, ACTIONS):
        raise InvalidAction(f"actions are {list(values.shape)}; allowed is [{count}, {ACTIONS}]")
    if not np.isfinite(values).all():
        raise InvalidAction(f"an action is not finite: {values[~np.isfinite(values).all(1)][0].tolist()}")
    if np.abs(values).max() > 1 + 1e-6:
        raise InvalidAction(f"an action is {values[np.abs(values).max(1).argmax()].tolist()}; allowed is -1 to 1")
    return np.clip(values, -1, 1)


def start_of(rng: np.random.Generator, options: Mapping[str, Any] | None) -> Start:
    """How a cell begins: drawn, or from the options of `reset`.

    options: `image` (pixels, a Pillow image or a path), or `dataset` with `episode` and `frame` (default 0); `goal`
    [2] in metres, default drawn.

    Raises:
        InputError: an unknown option, or one that cannot be.
    """
    options = dict(options or {})
    if unknown := options.keys() - set(OPTIONS):
        raise InputError(f"unknown option {sorted(unknown)[0]!r}; allowed are {', '.join(OPTIONS)}")
    layout, seed = draw_layout(rng), int(rng.integers(2**31))
    image = None
    if options.get("dataset") is not None:
        image = _dataset_frame(options)
    elif options.get("image") is not None:
        image = _pixels(options["image"])
    goal = layout.goal
    if image is not None and not np.isnan(cube := detect(image).cube).any():
        goal = draw_goal(rng, np.clip(cube, [-0.34, -0.3], [0.34, 0.12]))
    if options.get("goal") is not None:
        goal = np.asarray(options["goal"], dtype=np.float64)
        if goal.shape != (2,) or not (np.abs(goal) <= 1).all():
            raise InputError(f"goal is {options['goal']!r}; allowed are two metres within -1 to 1")
    return Start(layout if image is None else None, image, goal, seed)


def _dataset_frame(options: Mapping[str, Any]) -> np.ndarray:
    from orrery.data.episodes import open_episodes

    episodes = open_episodes(Path(options["dataset"]))
    episode, frame = int(options.get("episode", 0)), int(options.get("frame", 0))
    if not 0 <= episode < len(episodes):
        raise InputError(f"episode is {episode}; allowed are 0 to {len(episodes) - 1}")
    frames = episodes.frames(episode)
    if not 0 <= frame < len(frames):
        raise InputError(f"frame is {frame}; allowed are 0 to {len(frames) - 1}")
    return _pixels(frames[frame])


def _pixels(image: Any) -> np.ndarray:
    """Any picture as [SIZE, SIZE, 3] uint8."""
    if isinstance(image, str | Path):
        video = Video.read(image, last=1)
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise InputError(f"image is {list(image.shape)} {image.dtype}; allowed is [H, W, 3] uint8")
        video = Video(image[None], 1.0)
    else:
        video = from_image(image)
    return video.resize(SIZE, SIZE).frames[-1]
