"""`tabletop`: the robot cell of the interactive environments. An arm's peg pushes a red cube about a table.

The scene of `push` with one fixed camera, one look, a peg that a camera can find (magenta), a red cube and sometimes a
cylinder of another colour. The action is the peg's velocity (x right, y away from the camera) in units of `SPEED`,
within [-1, 1], one row a frame; the peg stays within `REACH`. Clips of this scene are what robots of mixed skill leave
behind: random motion, pushes to a goal with every amount of noise, and failures.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from orrery.sim.clip import Episode, Thing
from orrery.sim.looks import Look
from orrery.sim.push import FORE, arm_and_table, inverse_kinematics
from orrery.sim.render import Camera, camera_for, import_mujoco
from orrery.sim.simulate import FPS, SUBSTEPS

SPEED = 0.6  # metres a second at action 1
REACH = (np.array([-0.56, -0.52]), np.array([0.56, 0.34]))  # where the peg may be, metres
HALF, HEIGHT, PEG = 0.11, 0.22, 0.05  # half the cube's side and the cylinder's radius; their height; the peg's radius
TARGET, OTHERS = "red", ("blue", "green", "yellow")
PEG_COLOUR = (0.95, 0.1, 0.8)
ELBOW = 1.0
CAMERA, UP, FOVY = (0.0, -1.45, 2.05), (0.0, 0.777, 0.629), 38.0  # of the fixed camera
HELD = 4  # frames that an action of the environments lasts: one latent frame
TRAVEL = SPEED * HELD / FPS  # metres that the peg is told to go by an action of 1 in that time
CAPTION = "a robot arm pushes a red cube on a table, plain look"


@dataclass(frozen=True)
class Layout:
    """Where things stand: peg [2], cube [2] metres and its yaw (degrees); the other block's place [2], or None, and its
    colour; the goal [2] of the cube."""

    peg: np.ndarray
    cube: np.ndarray
    yaw: float
    goal: np.ndarray
    other: np.ndarray | None = None
    colour: str = ""


def draw_layout(rng: np.random.Generator) -> Layout:
    """A layout in which nothing touches, whose goal is 0.22 to 0.42 m from the cube."""
    cube = rng.uniform([-0.34, -0.3], [0.34, 0.12])
    goal = draw_goal(rng, cube)
    other, colour = None, ""
    if rng.random() < 0.5:
        colour = str(rng.choice(OTHERS))
        other = _apart(rng, [-0.45, -0.42], [0.45, 0.24], [cube, goal], 0.32)
    peg = _apart(rng, *REACH, [cube] if other is None else [cube, other], 0.26)
    return Layout(peg, cube, float(rng.uniform(-45, 45)), goal, other, colour)


def draw_goal(rng: np.random.Generator, centre: np.ndarray, low: float = 0.22, high: float = 0.42) -> np.ndarray:
    """A goal [2] on the table, `low` to `high` metres from `centre`, which is itself well on it."""
    while True:
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(low, high)
        place = centre + distance * np.array([np.cos(angle), np.sin(angle)])
        if (np.abs(place) < [0.42, 0.38]).all() and place[1] < 0.2:
            return place


def _apart(rng: np.random.Generator, low: Any, high: Any, others: list[np.ndarray], distance: float) -> np.ndarray:
    while True:
        place = rng.uniform(low, high)
        if all(np.linalg.norm(place - other) > distance for other in others):
            return place


def model_xml(layout: Layout, look: Look) -> tuple[str, dict[str, bytes]]:
    """MJCF of a layout, and its files. Bodies `cube` and, where there is one, `other`."""
    x, y = layout.cube
    bodies = (
        f'<body name="cube" pos="{x} {y} {HEIGHT / 2}" euler="0 0 {layout.yaw}"><freejoint/>'
        f'<geom type="box" size="{HALF} {HALF} {HEIGHT / 2}" {look.paint(TARGET)} density="200" '
        'friction=".5 .005 .0001"/></body>'
    )
    if layout.other is not None:
        x, y = layout.other
        bodies += (
            f'<body name="other" pos="{x} {y} {HEIGHT / 2}"><freejoint/>'
            f'<geom type="cylinder" size="{HALF} {HEIGHT / 2}" {look.paint(layout.colour)} density="200" '
            'friction=".5 .005 .0001"/></body>'
        )
    assets, files = look.assets()
    peg = "{:g} {:g} {:g} 1".format(*PEG_COLOUR)
    return arm_and_table(look, assets, bodies, peg, "{:g} {:g} {:g}".format(*UP), FOVY), files


class Arm:
    """Moves the peg of a MuJoCo model of `model_xml` as actions say."""

    def __init__(self, model: Any, data: Any, peg: np.ndarray) -> None:
        self.model, self.data, self.tip = model, data, np.array(peg, float)
        data.qpos[:2] = data.ctrl[:2] = inverse_kinematics(self.tip, ELBOW)

    def advance(self, action: np.ndarray, seconds: float) -> None:
        """Set the arm's targets for the next `seconds` of an action [2] in [-1, 1]."""
        self.tip[:] = np.clip(self.tip + action * SPEED * seconds, *REACH)
        self.data.ctrl[:2] = inverse_kinematics(self.tip, ELBOW)


class Tabletop:
    """The tabletop in MuJoCo, live.

    Args:
        size: width and height of its pictures, pixels.
    """

    def __init__(self, size: int = 64) -> None:
        self.size, self.look = size, Look.draw("plain", np.random.default_rng(0))
        self.model: Any = None
        self.camera: Camera | None = None

    def reset(self, layout: Layout) -> np.ndarray:
        """Stand things up; the first picture [size, size, 3] uint8."""
        mj = import_mujoco()
        self.model = mj.MjModel.from_xml_string(*model_xml(layout, self.look))
        self.model.opt.timestep = 1 / FPS / SUBSTEPS
        self.data = mj.MjData(self.model)
        self.arm = Arm(self.model, self.data, layout.peg)
        mj.mj_forward(self.model, self.data)
        return self.picture()

    def step(self, action: np.ndarray) -> np.ndarray:
        """Act for one frame of 1/12 s; the picture after it [size, size, 3] uint8."""
        mj = import_mujoco()
        for _ in range(SUBSTEPS):
            self.arm.advance(action, 1 / FPS / SUBSTEPS)
            mj.mj_step(self.model, self.data)
        mj.mj_forward(self.model, self.data)
        return self.picture()

    def picture(self) -> np.ndarray:
        """What the camera sees now [size, size, 3] uint8."""
        if self.camera is None or self.camera.model is not self.model:  # others draw with it too
            self.camera = camera_for(self.model, self.size)
        colour, _, _ = self.camera.shoot(self.data, "front", truth=False)
        return self.look.develop(colour[None])[0]

    def places(self) -> dict[str, np.ndarray]:
        """Where peg, cube and the other block are, [2] metres; one that fell off the table is where it fell. The peg
        runs after what it is told by some centimetres."""
        fore = self.data.body("fore")
        peg = fore.xpos[:2] + fore.xmat.reshape(3, 3)[:2, 0] * FORE
        found = {"peg": peg, "cube": self.data.body("cube").xpos[:2].copy()}
        if self.model.nbody > 5:
            found["other"] = self.data.body("other").xpos[:2].copy()
        return found


class Manner(NamedTuple):
    """How `push_towards` goes about it."""

    clearance: float = 0.08  # metres between block and peg on the way round
    aim: float = 0.6  # radians off the line through block and goal at which it pushes all the same
    offset: float = 0.08  # metres off that line at which it does
    steer: float = 1.0  # how much it steers back to the line while it pushes
    around: float = 0.8  # radians that it goes round in one step
    push: float = 0.6  # steps' worth of travel beyond touching
    ease: float = 1.0  # the most that it pushes beyond touching, in shares of the block's way to the goal


PROVEN = Manner()


def push_towards(peg: np.ndarray, block: np.ndarray, goal: np.ndarray, how: Manner = PROVEN) -> np.ndarray:
    """A scripted robot: the action [2] in [-1, 1], to be held for `HELD` frames, that brings the block to the goal.

    Go round the block to the side away from the goal, then push along the line to the goal, slower near it. Places are
    [2] metres.
    """
    left = float(np.linalg.norm(goal - block))
    if left < 0.02:
        return np.zeros(2)
    way, offset = (goal - block) / left, peg - block
    distance = float(np.linalg.norm(offset))
    gap = HALF + PEG
    here, wanted = np.arctan2(offset[1], offset[0]), np.arctan2(-way[1], -way[0])
    turn = float((wanted - here + np.pi) % (2 * np.pi) - np.pi)
    side = float(way[0] * offset[1] - way[1] * offset[0])
    if abs(turn) < how.aim and abs(side) < how.offset:  # behind it: push, and steer back to the line
        travel = max(0.0, distance - gap) + min(how.ease * left, how.push * TRAVEL)
        move = way * travel - np.array([-way[1], way[0]]) * side * how.steer
    else:  # round it on a circle, no nearer than that
        circle = gap + how.clearance
        angle = here + np.clip(turn, -how.around, how.around)
        point = np.clip(block + circle * np.array([np.cos(angle), np.sin(angle)]), *REACH)
        out = max(0.0, circle - 0.03 - distance) * offset / max(distance, 1e-6)
        move = out if out.any() else point - peg
    return np.clip(move / max(TRAVEL, float(np.abs(move).max())), -1, 1)


def build(rng: np.random.Generator, look: Look, frames: int) -> Episode:
    """Draws one episode: a layout, and a robot that moves at random or pushes something somewhere, well or badly."""
    layout = draw_layout(rng)
    things = [Thing("cube", "red cube", TARGET, "cube", HALF)]
    if layout.other is not None:
        things.append(Thing("other", f"{layout.colour} cylinder", layout.colour, "cylinder", HALF))
    things.append(Thing("arm", "robot arm", movable=False))
    robot = _Robot(rng, layout)
    arm: list[Arm] = []

    def start(model: Any, data: Any) -> None:
        arm[:] = [Arm(model, data, layout.peg)]

    def control(model: Any, data: Any, frame: int, substep: int, substeps: int) -> np.ndarray | None:
        if substep == 0:
            robot.decide(arm[0], data, frame)
        arm[0].advance(robot.action, 1 / FPS / substeps)
        return robot.action.copy() if substep == 0 else None

    xml, files = model_xml(layout, look)
    actions = ("peg_velocity_x", "peg_velocity_y")
    return Episode(
        xml, files, tuple(things), ("front",), lambda trace, visible: CAPTION, actions, start, control, blind=True
    )


class _Robot:
    """Whoever made a clip: what it wants, how often it decides anew, how noisy and how wrong it is."""

    def __init__(self, rng: np.random.Generator, layout: Layout) -> None:
        self.rng, self.action, self.drift = rng, np.zeros(2), np.zeros(2)
        self.held = HELD if rng.random() < 0.7 else 1
        self.kind = str(rng.choice(["random", "wander", "push"], p=[0.2, 0.15, 0.65]))
        self.noise = float(rng.choice([0.0, 0.15, 0.4, 0.8]))
        self.pushed = "other" if layout.other is not None and rng.random() < 0.3 else "cube"
        self.goal = draw_goal(rng, layout.cube if layout.other is None else layout.other, 0.2, 0.7)

    def decide(self, arm: Arm, data: Any, frame: int) -> None:
        """Set `action` for this frame."""
        if frame % self.held:
            return
        if self.kind == "random":
            self.action = self.rng.uniform(-1, 1, 2)
            return
        self.drift = 0.8 * self.drift + self.rng.normal(0, 0.35, 2)
        if self.kind == "wander":
            self.action = np.clip(self.drift, -1, 1)
            return
        block = data.body(self.pushed).xpos[:2]
        if np.linalg.norm(block - self.goal) < 0.06:
            self.goal = draw_goal(self.rng, np.clip(block, [-0.3, -0.3], [0.3, 0.15]), 0.2, 0.7)
        wanted = push_towards(arm.tip, block, self.goal)
        self.action = np.clip(wanted + self.rng.normal(0, 1, 2) * self.noise, -1, 1)
