"""`drop`: balls, cubes and cylinders fall, bounce, roll, slide and collide in a tray five metres wide.

Lengths are chosen so that a fall takes 6 to 8 frames at 12 fps under true gravity. The caption says what the physics
did, not what was intended: a clip whose motion has no clear word is drawn again.
"""

import math
from collections.abc import Callable

import numpy as np

from orrery.sim.clip import Episode, Thing, Trace
from orrery.sim.looks import COLOURS, PHRASE, Look
from orrery.sim.simulate import describe_thing

HALF_WIDTH, HALF_DEPTH, WALL = 2.5, 1.3, 0.24
GRAVITY = 9.81


def build(rng: np.random.Generator, look: Look, frames: int) -> Episode:
    """Draws one episode: 1 to 3 objects (mostly one), at most two of them moving at the start."""
    n = int(rng.choice([1, 2, 3], p=[0.6, 0.3, 0.1]))
    colours = [str(c) for c in rng.choice(list(COLOURS), n, replace=False)]
    places = rng.permutation([-1.7, 0.0, 1.7])[:n] + rng.uniform(-0.2, 0.2, n)
    bouncy = rng.random() < 0.6
    things, bodies, velocity = [], "", []
    for i in range(n):
        shape = str(rng.choice(["ball", "cube", "cylinder"], p=[0.5, 0.3, 0.2]))
        odds = [0.4, 0.25, 0.35, 0] if i == 0 else [0.25, 0.1, 0.15, 0.5]
        mode = str(rng.choice(["fall", "throw", "push", "rest"], p=odds))
        radius = float(rng.uniform(0.5, 0.64))
        height = {"ball": radius, "cube": 0.85 * radius, "cylinder": radius}[shape]
        x, y = float(places[i]), float(rng.uniform(-0.5, 0.5))
        side = 1.0 if x < 0 else -1.0
        z, v, spin = height + 0.002, (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)
        if mode == "fall":
            z = float(rng.uniform(1.9, 3.0))
        elif mode == "throw":
            z = float(rng.uniform(1.0, 1.9))
            v = (side * float(rng.uniform(1.8, 3.4)), 0.0, float(rng.uniform(0.8, 3.2)))
        elif mode == "push":
            speed = side * float(rng.uniform(2.4, 4.6))
            v, spin = (speed, 0.0, 0.0), (0.0, speed / radius if shape == "ball" else 0.0, 0.0)
        yaw = 0.0 if shape != "cube" else float(rng.uniform(-0.6, 0.6))
        geom = {
            "ball": f'type="sphere" size="{radius}"',
            "cube": f'type="box" size="{height} {height} {height}"',
            "cylinder": f'type="cylinder" size="{0.85 * radius} {height}"',
        }[shape]
        # Sliding boxes need little friction to travel, rolling balls enough not to skid.
        friction = ".5 .01 .001" if shape == "ball" else ".22 .01 .001"
        bodies += (
            f'<body name="thing{i}" pos="{x} {y} {z}" euler="0 0 {math.degrees(yaw)}"><freejoint/>'
            f'<geom {geom} {look.paint(colours[i])} density="300" condim="4" friction="{friction}"/></body>'
        )
        things.append(Thing(f"thing{i}", f"{colours[i]} {shape}", colours[i], shape, radius))
        velocity.append((*v, *spin))

    def start(model, data):
        data.qvel[:] = np.concatenate(velocity)

    assets, files = look.assets()
    xml = _xml(look, assets, bodies, bouncy)
    return Episode(xml, files, tuple(things), ("front",), _describer(things, look), start=start)


def _xml(look: Look, assets: str, bodies: str, bouncy: bool) -> str:
    restitution, stiffness = (0.8 if bouncy else 0.25), 6000.0
    ratio = -math.log(restitution) / math.hypot(math.pi, math.log(restitution))
    solref = f"-{stiffness} -{2 * math.sqrt(stiffness) * ratio}"
    w, d, h = HALF_WIDTH, HALF_DEPTH, WALL
    boards = ((-w - 0.12, 0, 0.12, d + 0.24), (w + 0.12, 0, 0.12, d + 0.24), (0, d + 0.12, w, 0.12))
    walls = "".join(
        f'<geom type="box" pos="{x} {y} {h}" size="{a} {b} {h}" rgba=".75 .68 .6 1"/>' for x, y, a, b in boards
    )
    guards = "".join(  # invisible planes keep everything over the tray
        f'<geom type="plane" pos="{x} {y} 0" size="9 9 1" zaxis="{a} {b} 0" rgba="0 0 0 0" friction="0 0 0"/>'
        for x, y, a, b in ((-w, 0, 1, 0), (w, 0, -1, 0), (0, d, 0, -1), (0, -d, 0, 1))
    )
    return f"""<mujoco><option integrator="implicitfast" gravity="0 0 -{GRAVITY}"/><compiler angle="degree"/>
<visual>{look.headlight()}<quality shadowsize="1024" offsamples="0"/><map znear=".02"/>
<global offwidth="2048" offheight="2048"/></visual>
<default><geom solref="{solref}"/></default><asset>{assets}</asset>
<worldbody>{look.lights(8)}
<geom type="box" pos="0 0 -.1" size="{w} {d} .1" {look.surface(".85 .8 .72 1")} friction=".2 .005 .0001"/>
{walls}{guards}{bodies}
<camera name="front" pos="0 -6.4 3.3" xyaxes="1 0 0 0 .3 .954" fovy="42"/></worldbody></mujoco>"""


def _describer(things: list[Thing], look: Look) -> Callable[[Trace, np.ndarray | None], str | None]:
    def describe(trace: Trace, visible: np.ndarray | None) -> str | None:
        assert visible is not None
        verbs = [_verb(trace, i, thing) for i, thing in enumerate(things)]
        if None in verbs or not visible.all() or not _in_view(trace):
            return None
        if all(v == "stands still" for v in verbs):
            return None
        first: dict[tuple[int, int], int] = {}
        for frame, i, j in sorted(trace.contacts):
            first.setdefault((i, j), frame)
        phrases = []
        for i, (thing, verb) in enumerate(zip(things, verbs, strict=True)):
            hits = [j for (a, b), _ in first.items() for j in ((b,) if a == i else (a,) if b == i else ())]
            tail = ""
            if hits and verb not in ("stands still", "is hit"):
                tail = f" and hits the {describe_thing(things[hits[0]])}"
            phrases.append(f"a {describe_thing(thing)} {verb}{tail}")
        return ", ".join(phrases) + ", " + PHRASE[look.name]

    return describe


def _in_view(trace: Trace) -> bool:
    """Every object starts inside the picture and stays over the tray."""
    p = trace.position
    return bool((np.abs(p[..., 0]) < HALF_WIDTH).all() and (p[0, :, 2] < 3.1).all() and (p[..., 2].max() < 3.3))


def _verb(trace: Trace, i: int, thing: Thing) -> str | None:
    """The words for what thing i did, or None when no word is clearly true."""
    p = trace.position[:, i]
    height = p[:, 2] - (0.85 if thing.shape == "cube" else 1.0) * thing.radius
    step = p[1] - p[0]
    sideways, way = abs(step[0]), "right" if step[0] > 0 else "left"
    if height[0] > 0.4:
        low = int(height.argmin())
        rebound = float(height[low:].max() - height[low])
        if sideways > 0.08:
            return f"is thrown to the {way}"
        return "falls and bounces" if rebound > 0.35 else "falls" if rebound < 0.2 else None
    if sideways > 0.1:
        travelled = (p[:, 0] - p[0, 0]) * np.sign(step[0])
        if travelled.max() < 0.6:
            return None
        return f"{'rolls' if thing.shape == 'ball' else 'slides'} to the {way}"
    touched = [f for f, a, b in trace.contacts if i in (a, b)]
    before = p[: min(touched) + 1] if touched else p
    if np.linalg.norm(before - p[0], axis=1).max() > 0.06:
        return None
    return "is hit" if np.linalg.norm(p - p[0], axis=1).max() > 0.15 else "stands still"
