"""`push`: a two-link robot arm with a peg pushes blocks over a table.

The action is the peg's velocity (x right, y away from the camera) in units of 0.9 m/s, within [-1, 1], one row a frame.
The caption names the block that moved and the way that it moved, both read from the physics.
"""

import math
from collections.abc import Callable

import numpy as np

from orrery.sim.clip import Episode, Thing, Trace
from orrery.sim.looks import COLOURS, PHRASE, Look
from orrery.sim.simulate import FPS, describe_thing

UPPER, FORE = 0.75, 0.65  # link lengths, metres
BASE = np.array([0.0, 0.85])
SPEED = 0.9  # metres a second at action 1
REACH_LOW, REACH_HIGH = np.array([-0.68, -0.62]), np.array([0.68, 0.48])
TABLE = (0.85, 0.78)
MOVED = 0.1  # metres that make a push


def inverse_kinematics(point: np.ndarray, elbow: float) -> np.ndarray:
    """Joint angles [2] that put the peg at `point` [2] metres; `elbow` +1 or -1 picks the side it bends to."""
    offset = point - BASE
    r = float(np.clip(np.linalg.norm(offset), 0.12, UPPER + FORE - 0.01))
    shoulder = math.acos(np.clip((UPPER**2 + r**2 - FORE**2) / (2 * UPPER * r), -1, 1))
    bend = math.acos(np.clip((UPPER**2 + FORE**2 - r**2) / (2 * UPPER * FORE), -1, 1))
    return np.array([math.atan2(offset[1], offset[0]) + elbow * shoulder, elbow * (bend - math.pi)])


def build(rng: np.random.Generator, look: Look, frames: int) -> Episode:
    """Draws one episode: 1 to 3 blocks, a peg that starts behind one of them and pushes it, then sometimes turns."""
    n = int(rng.choice([1, 2, 3], p=[0.55, 0.3, 0.15]))
    colours = [str(c) for c in rng.choice(list(COLOURS), n, replace=False)]
    places = _places(rng, n)
    angle = float(rng.choice([0, 0.5, 1, 1.5])) * math.pi + float(rng.uniform(-0.35, 0.35))
    way = np.array([math.cos(angle), math.sin(angle)])
    peg = np.clip(places[0] - way * rng.uniform(0.24, 0.36), REACH_LOW, REACH_HIGH)
    elbow = float(rng.choice([-1, 1]))
    things, bodies = [], ""
    for i in range(n):
        shape, radius = str(rng.choice(["cube", "cylinder"])), float(rng.uniform(0.11, 0.14))
        geom = f'type="box" size="{radius} {radius} .11"' if shape == "cube" else f'type="cylinder" size="{radius} .11"'
        yaw = float(rng.uniform(-45, 45))
        bodies += (
            f'<body name="thing{i}" pos="{places[i][0]} {places[i][1]} .11" euler="0 0 {yaw}"><freejoint/>'
            f'<geom {geom} {look.paint(colours[i])} density="200" friction=".5 .005 .0001"/></body>'
        )
        things.append(Thing(f"thing{i}", f"{colours[i]} {shape}", colours[i], shape, radius))
    things.append(Thing("arm", "robot arm", movable=False))
    plan = _plan(rng, way, frames)
    tip = peg.copy()

    def start(model, data):
        data.qpos[:2] = data.ctrl[:2] = inverse_kinematics(tip, elbow)

    def control(model, data, frame, substep, substeps):
        tip[:] = np.clip(tip + plan[frame] * SPEED / FPS / substeps, REACH_LOW, REACH_HIGH)
        data.ctrl[:2] = inverse_kinematics(tip, elbow)
        return plan[frame] if substep == 0 else None

    assets, files = look.assets()
    xml = arm_and_table(look, assets, bodies)
    actions = ("peg_velocity_x", "peg_velocity_y")
    return Episode(xml, files, tuple(things), ("front",), _describer(things, look), actions, start, control)


def _places(rng: np.random.Generator, n: int) -> list[np.ndarray]:
    places: list[np.ndarray] = []
    while len(places) < n:
        place = rng.uniform([-0.45, -0.42], [0.45, 0.22])
        if all(np.linalg.norm(place - other) > 0.36 for other in places):
            places.append(place)
    return places


def _plan(rng: np.random.Generator, way: np.ndarray, frames: int) -> np.ndarray:
    """Actions [frames, 2] in [-1, 1]: along `way` with smooth noise, then perhaps another way."""
    turn, other, speed = int(rng.integers(9, 30)), float(rng.uniform(0, 2 * math.pi)), float(rng.uniform(0.6, 1.0))
    plan, drift = np.zeros((frames, 2)), np.zeros(2)
    for t in range(frames):
        drift = 0.8 * drift + rng.normal(0, 0.06, 2)
        heading = way if t < turn else np.array([math.cos(other), math.sin(other)])
        plan[t] = np.clip(heading * speed + drift, -1, 1)
    return plan


def arm_and_table(
    look: Look, assets: str, bodies: str, peg: str = ".12 .12 .14 1", up: str = "0 .82 .572", fovy: float = 42
) -> str:
    """MJCF of the table, the arm over it with a peg of that RGBA, the camera `front` (its upward axis, its field of
    view in degrees), and `bodies`."""
    link = 'rgba=".95 .95 .95 1" contype="0" conaffinity="0"'
    return f"""<mujoco><option integrator="implicitfast"/><compiler angle="degree"/>
<visual>{look.headlight()}<quality shadowsize="1024" offsamples="0"/><map znear=".02"/>
<global offwidth="2048" offheight="2048"/></visual><asset>{assets}</asset>
<worldbody>{look.lights(3)}
<geom type="plane" pos="0 0 -.6" size="6 6 .1" rgba=".42 .44 .48 1"/>
<geom type="box" pos="0 0 -.05" size="{TABLE[0]} {TABLE[1]} .05" {look.surface(".6 .58 .53 1")}/>
<body name="arm" pos="{BASE[0]} {BASE[1]} .38"><geom type="cylinder" pos="0 0 -.23" size=".13 .2" rgba=".25 .25 .28 1"/>
 <body name="upper"><joint name="shoulder" axis="0 0 1" damping="2"/>
  <geom type="capsule" fromto="0 0 0 {UPPER} 0 0" size=".045" {link}/>
  <body name="fore" pos="{UPPER} 0 0"><joint name="elbow" axis="0 0 1" damping="2"/>
   <geom type="sphere" size=".065" rgba=".3 .3 .35 1" contype="0" conaffinity="0"/>
   <geom type="capsule" fromto="0 0 0 {FORE} 0 0" size=".038" {link}/>
   <geom type="cylinder" fromto="{FORE} 0 .02 {FORE} 0 -.34" size=".05" rgba="{peg}"/></body></body></body>
<camera name="front" pos="0 -1.45 2.05" xyaxes="1 0 0 {up}" fovy="{fovy:g}"/>{bodies}</worldbody>
<actuator><position joint="shoulder" kp="400"/><position joint="elbow" kp="400"/></actuator></mujoco>"""


def _describer(things: list[Thing], look: Look) -> Callable[[Trace, np.ndarray | None], str | None]:
    def describe(trace: Trace, visible: np.ndarray | None) -> str | None:
        assert visible is not None
        blocks = range(len(things) - 1)
        move = trace.position[-1, :-1] - trace.position[0, :-1]
        place = trace.position[:, :-1]
        on_table = (np.abs(place[..., :2]) < np.array(TABLE)).all() and (place[..., 2] > 0.05).all()
        x, y = move[0, :2]
        if math.hypot(x, y) < MOVED or not visible.all() or not on_table:
            return None
        if min(abs(x), abs(y)) > 0.6 * max(abs(x), abs(y)):
            return None  # diagonal: no single word is true
        way = ("to the right" if x > 0 else "to the left") if abs(x) > abs(y) else ("away" if y > 0 else "closer")
        text = f"a robot arm pushes the {describe_thing(things[0])} {way}"
        hit = [i for i in blocks if i and np.linalg.norm(move[i]) > 0.03]
        rest = [i for i in blocks if i and np.linalg.norm(move[i]) <= 0.03]
        text += "".join(f" into the {describe_thing(things[i])}" for i in hit)
        text += "".join(f", a {describe_thing(things[i])} stands still" for i in rest)
        return f"{text}, {PHRASE[look.name]}"

    return describe
