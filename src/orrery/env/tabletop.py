"""The tabletop as a Gymnasium environment: one cell.

`orrery/Tabletop-v0` is the world model, `orrery/TabletopTruth-v0` is MuJoCo: same spaces, same task, same reset seeds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded

from orrery.env.cells import ACTIONS, MAX_STEPS, SIZE, SUCCESS, Cells, Results, start_of
from orrery.errors import InputError
from orrery.sim.detect import to_pixels
from orrery.sim.simulate import FPS
from orrery.sim.tabletop import HELD
from orrery.world import World

Observation = dict[str, np.ndarray]
RENDER_SCALE = 4


def observation_space() -> spaces.Dict:
    """image [64, 64, 3] uint8; goal [2] float32, where the cube is to be, metres (x right, y away from the camera)."""
    return spaces.Dict(
        image=spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8), goal=spaces.Box(-1.0, 1.0, (2,), np.float32)
    )


def action_space() -> spaces.Box:
    """[2] float32 in [-1, 1]: the peg's velocity, x right and y away from the camera, in units of 0.6 m/s, held for
    four frames (a third of a second)."""
    return spaces.Box(-1.0, 1.0, (ACTIONS,), np.float32)


class TabletopEnv(gymnasium.Env[Observation, np.ndarray]):
    """Push the red cube to the goal.

    Observations and actions: see `observation_space` and `action_space`. Reward: the metres that the cube came nearer
    to the goal, and 1 when it is within 7 cm of it, which ends the episode; all read from pixels. `info` has
    `distance` (metres), `success`, and `frames` [4, 64, 64, 3], what was seen during the step.

    Args:
        kind: "model" or "truth". model: a named model, a folder or a World. device, steps: for a model that is loaded
        here. max_steps: of an episode. render_mode: "rgb_array" or None.

    `reset(options=...)`: `image` (pixels, Pillow image or path) or `dataset` with `episode` and `frame` to begin with a
    picture, which MuJoCo rebuilds as the detector sees it; `goal` [2].
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(FPS / HELD)}

    def __init__(
        self,
        kind: str = "model",
        model: str | Path | World = "tabletop",
        device: str | None = None,
        steps: int | None = None,
        max_steps: int = MAX_STEPS,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise InputError(f"render_mode is {render_mode!r}; allowed are None, 'rgb_array'")
        self.cells = Cells(kind, 1, model, device, steps, max_steps)
        self.observation_space: spaces.Space[Any] = observation_space()
        self.action_space: spaces.Space[Any] = action_space()
        self.render_mode = render_mode

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin an episode: the same seed begins with the same picture and goal, in the model and in MuJoCo."""
        super().reset(seed=seed)
        self.cells.reset([0], [start_of(self.np_random, options)])
        info = {"distance": float(self.cells.distances[0]), "success": False}
        return observed(self.cells, 0), info

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Hold an action for four frames."""
        if not self.cells.running[0]:
            raise ResetNeeded("step() of an environment that has not begun or is over; call reset() first")
        results = self.cells.step(np.asarray(action)[None] if np.ndim(action) == 1 else action, [0])
        info = info_of(results, 0)
        end = bool(results.terminated[0]), bool(results.truncated[0])
        return observed(self.cells, 0), float(results.rewards[0]), *end, info

    def render(self) -> Any:
        """The picture now, enlarged, with the goal: [256, 256, 3] uint8."""
        return draw(self.cells.images[0], self.cells.goals[0]) if self.render_mode else None


def observed(cells: Cells, row: int) -> Observation:
    """The observation of one cell."""
    return {"image": cells.images[row].copy(), "goal": cells.goals[row].copy()}


def info_of(results: Results, row: int) -> dict[str, Any]:
    """`info` of one cell after a step."""
    return {
        "distance": float(results.distances[row]),
        "success": bool(results.terminated[row]),
        "frames": results.frames[row],
    }


def draw(image: np.ndarray, goal: np.ndarray, scale: int = RENDER_SCALE) -> np.ndarray:
    """A picture [H, W, 3] uint8 enlarged, the goal's circle of success drawn on the table."""
    from PIL import Image, ImageDraw

    size = image.shape[0]
    angles = np.linspace(0, 2 * np.pi, 33)
    ring = np.asarray(goal, float) + SUCCESS * np.column_stack([np.cos(angles), np.sin(angles)])
    points = (to_pixels(ring, size) + 0.5) * scale
    picture = Image.fromarray(image).resize((size * scale, size * scale), Image.Resampling.BICUBIC)
    ImageDraw.Draw(picture).line([tuple(point) for point in points], fill=(255, 255, 255), width=max(1, scale // 2))
    return np.asarray(picture)
