"""`drive`: an ego car among other vehicles, seen by cameras to the front, left and right, with lanes and boxes as data.

World axes: x ahead of the start, y to the left, z up, metres; a vehicle's body stands in the middle of its box, nose
towards its own x. The actions are steer (left positive, in units of 0.08 / metre of curvature) and acceleration (in
units of 6 m/s^2), within [-1, 1], one row a frame. The caption tells what the ego car did, read from its path, and
lists the vehicles that the front camera sees with the side on which their lane lay at the start.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from orrery.sim.clip import Episode, Thing, Trace
from orrery.sim.looks import COLOURS, PHRASE, Look
from orrery.sim.road import KINDS, LANE, Road, scenery
from orrery.sim.scenario import Eye, draw
from orrery.sim.simulate import FPS, describe_thing
from orrery.sim.traffic import Plan, Traffic, Vehicle

CAMERAS = {"front": 0.0, "left": 60.0, "right": -60.0}  # degrees to the left of the nose
FOVY, MOUNT, PITCH = 64.0, (1.2, 0.0, 1.6), -4.0
WARM_UP = 1.2  # seconds of traffic before the first frame
STEPS = 5  # a frame is advanced in so many steps
NAMED = 3  # a caption names at most so many vehicles
HOUSES = (".62 .42 .33", ".66 .66 .70", ".80 .70 .52")


def build(rng: np.random.Generator, look: Look, frames: int) -> Episode:
    """Draws one episode: a road of 2 or 3 lanes, 1 to 5 other vehicles, and what the ego driver means to do."""
    seconds = frames / FPS
    road = Road(rng, reach=16.0 * (seconds + WARM_UP))
    speed = float(rng.uniform(6.5, 13))
    plan = _plan(rng, road, speed)
    vehicles = _vehicles(rng, road, plan, speed)
    meshes = scenery(road, rng)
    traffic = Traffic(road, vehicles, plan, speed, time=-WARM_UP)
    dt = 1 / FPS / STEPS
    while traffic.time < -dt / 2:
        traffic.advance(dt, *traffic.act())
    things = [
        Thing(f"thing{i}", f"{v.colour} {v.kind}", v.colour, v.kind, v.size[1] / 2, size=v.size)
        for i, v in enumerate(vehicles)
    ]
    things.append(Thing("ego", "ego car", size=KINDS["car"]))
    action, free = np.zeros(2), [traffic.clear()]

    def control(model, data, frame, substep, substeps):
        if substep % (substeps // STEPS):
            return None
        if frame or substep:
            traffic.advance(dt, *action)
            free[0] &= traffic.clear()
        _place(data, traffic)
        if substep:
            return None
        action[:] = traffic.act()
        return action.copy()

    segments = road.segments()

    def draw_map(model, data, camera, frame, size):
        eye_id = model.camera(camera).id
        eye = Eye(data.cam_xpos[eye_id], data.cam_xmat[eye_id].reshape(3, 3), FOVY, size)
        boxes = []
        for thing, vehicle in zip(things, vehicles, strict=False):  # all but the ego car
            body = model.body(thing.body).id
            boxes.append((vehicle.kind, data.xpos[body], data.xmat[body].reshape(3, 3), vehicle.size))
        return draw(eye, segments, boxes)

    materials, files = look.street()
    assets = materials + "".join(f'<mesh file="{name}" inertia="shell"/>' for name in meshes)
    return Episode(
        _xml(look, assets, vehicles), files | meshes, tuple(things), tuple(CAMERAS),
        _describer(things, look, road, free), ("steer", "acceleration"),
        control=control, draw_map=draw_map, lanes=tuple(road.polylines()),
    )  # fmt: skip


def _plan(rng: np.random.Generator, road: Road, speed: float) -> Plan:
    lane = int(rng.integers(road.lanes))
    plan = Plan(lane, target=speed)
    if rng.random() < 0.45:
        options = [change for change in (-1, 1) if 0 <= lane + change < road.lanes]
        plan.change, plan.swerve = int(rng.choice(options)), float(rng.uniform(-0.8, -0.3))
        plan.duration = float(rng.uniform(2.0, 2.5))
    pedal = str(rng.choice(["steady", "brake", "gas"], p=[0.4, 0.35, 0.25]))
    plan.pedal = float(rng.uniform(-0.2, 0.3))
    if pedal == "brake":
        plan.target, plan.effort = max(0.0, speed - float(rng.uniform(4, 12))), float(rng.uniform(3.5, 5.5))
    elif pedal == "gas":
        plan.target, plan.effort = min(16.0, speed + float(rng.uniform(3, 6))), float(rng.uniform(2.2, 3.5))
    return plan


def _vehicles(rng: np.random.Generator, road: Road, plan: Plan, speed: float) -> list[Vehicle]:
    """Vehicles around the ego car, far enough from each other in every lane; all of different colours."""
    count = int(rng.integers(1, 6))
    colours = [str(c) for c in rng.choice(list(COLOURS), count, replace=False)]
    taken = [(plan.lane, 0.0, KINDS["car"][0]), (plan.lane + plan.change, 0.0, KINDS["car"][0])]
    vehicles: list[Vehicle] = []
    for colour in colours:
        kind = "truck" if rng.random() < 0.25 else "car"
        length = KINDS[kind][0]
        for _ in range(20):
            lane = int(rng.integers(road.lanes))
            s = float(rng.uniform(-12, 30) if rng.random() < 0.8 else rng.uniform(30, 70))
            if all(lane != other or abs(s - at) > (length + size) / 2 + 5.5 for other, at, size in taken):
                taken.append((lane, s, length))
                pace = float(np.clip(speed + rng.uniform(-4, 4), 3, 14))
                halt = float(rng.uniform(-0.5, 0.5)) if rng.random() < 0.15 else math.inf
                desired = min(16.0, pace * float(rng.uniform(0.9, 1.3)))
                vehicles.append(Vehicle(kind, colour, lane, s, pace, desired, halt))
                break
    return vehicles


def _place(data: Any, traffic: Traffic) -> None:
    """Puts the mocap bodies where the traffic is; the ego car's body is the last."""
    poses = []
    for vehicle in traffic.vehicles:
        (x, y), heading = traffic.road.pose(vehicle.s, traffic.road.lane_offset(vehicle.lane))
        poses.append((x, y, vehicle.size[2] / 2, float(heading)))
    poses.append((traffic.x, traffic.y, KINDS["car"][2] / 2, traffic.yaw))
    for k, (x, y, z, yaw) in enumerate(poses):
        data.mocap_pos[k] = x, y, z
        data.mocap_quat[k] = math.cos(yaw / 2), 0, 0, math.sin(yaw / 2)


def _xml(look: Look, assets: str, vehicles: list[Vehicle]) -> str:
    static = 'type="mesh" contype="0" conaffinity="0"'
    colours = {"asphalt": ".34 .34 .37", "paint": ".95 .95 .93", "crown": ".16 .42 .17", "trunk": ".33 .24 .17"}
    colours |= {f"house{k}": colour for k, colour in enumerate(HOUSES)}
    material = {"asphalt": "asphalt", "paint": "grass", "crown": "grass", "trunk": "lacquer"}
    scene = "".join(
        f'<geom {static} mesh="{name}" rgba="{rgba} 1" material="{material.get(name, "facade")}"/>'
        for name, rgba in colours.items()
    )
    bodies = ""
    for i, vehicle in enumerate(vehicles):
        half = KINDS[vehicle.kind][2] / 2
        paint = "{:g} {:g} {:g} 1".format(*COLOURS[vehicle.colour])
        lift = f'{static} pos="0 0 {-half}"'
        lamp = f'<geom {lift} mesh="lamp" rgba=".75 .08 .06 1"/>' if vehicle.kind == "car" else ""
        bodies += (
            f'<body name="thing{i}" mocap="true"><geom {lift} mesh="{vehicle.kind}" material="lacquer" rgba="{paint}"/>'
            f'<geom {lift} mesh="{vehicle.kind}_dark" material="lacquer" rgba=".1 .11 .13 1"/>{lamp}</body>'
        )
    x, y, z = MOUNT
    cameras = ""
    for name, degrees in CAMERAS.items():
        yaw, pitch = math.radians(degrees), math.radians(PITCH)
        right = f"{math.sin(yaw):.9f} {-math.cos(yaw):.9f} 0"
        up = f"{-math.cos(yaw) * math.sin(pitch):.9f} {-math.sin(yaw) * math.sin(pitch):.9f} {math.cos(pitch):.9f}"
        place = f"{x} {y} {z - KINDS['car'][2] / 2}"
        cameras += f'<camera name="{name}" pos="{place}" xyaxes="{right} {up}" fovy="{FOVY}"/>'
    return f"""<mujoco><compiler angle="degree"/><option gravity="0 0 0"/><statistic extent="1" center="0 0 0"/>
<visual>{look.headlight()}<quality shadowsize="1024" offsamples="0"/><map znear=".3" zfar="500" shadowclip="40"/>
<global offwidth="2048" offheight="2048"/></visual><asset>{assets}</asset>
<worldbody>
<geom type="plane" size="0 0 1" pos="0 0 -.06" rgba=".38 .58 .30 1" material="grass" contype="0" conaffinity="0"/>
{scene}{bodies}<body name="ego" mocap="true">{look.sun()}{cameras}</body></worldbody></mujoco>"""


def _describer(
    things: list[Thing], look: Look, road: Road, free: list[bool]
) -> Callable[[Trace, np.ndarray | None], str | None]:
    def describe(trace: Trace, visible: np.ndarray | None) -> str | None:
        assert visible is not None
        places = np.array([[road.locate(p[:2]) for p in row] for row in trace.position[[0, -1]]])
        deed = _deed(road, trace.position[:, -1, :2], places[:, -1])
        if deed is None or not free[0]:
            return None
        lane = np.floor((places[0, :, 1] + road.half) / LANE).astype(int)
        seen = [i for i in range(len(things) - 1) if visible[0, i]]  # by the front camera
        if visible.all():  # only the physics is asked about
            seen = seen[:NAMED]
        if len(seen) > NAMED:
            return None
        where = {0: "ahead", 1: "on the left", -1: "on the right"}
        text = f"the ego car {deed}"
        for i in seen:
            text += f", a {describe_thing(things[i])} {where[int(np.sign(lane[i] - lane[-1]))]}"
        return f"{text}, {PHRASE[look.name]}"

    return describe


def _deed(road: Road, path: np.ndarray, ends: np.ndarray) -> str | None:
    """What the ego car did on `path` [T, 2], from road coordinates `ends` [2, 2]; None if no words are clearly true."""
    (s0, offset0), (s1, offset1) = ends
    lanes = np.floor((ends[:, 1] + road.half) / LANE)
    moved = offset1 - offset0
    passed = np.interp(np.linspace(s0, s1, 50), road.s, road.yaw)
    turn, swing = passed[-1] - passed[0], passed.max() - passed.min()
    if abs(turn) < 0.05 and swing < 0.05:
        bend = ""
    elif swing > abs(turn) + 0.1:
        bend = "a winding road"
    elif abs(turn) > 0.13:
        bend = "a curve to the left" if turn > 0 else "a curve to the right"
    else:
        return None
    if lanes[0] != lanes[1] and abs(moved) > 0.45 * LANE:
        deed = f"changes lane to the {'left' if moved > 0 else 'right'}{f' on {bend}' if bend else ''}"
    elif lanes[0] == lanes[1] and abs(moved) < 0.2 * LANE:
        deed = f"follows {bend}" if bend else "drives straight"
    else:
        return None
    speed = np.linalg.norm(np.diff(path, axis=0), axis=1) * FPS
    gain = speed[-1] - speed[0]
    if speed[-1] < 0.3 and speed[0] > 1.5:
        return f"{deed} and stops"
    if abs(gain) < 0.7:
        return deed
    return f"{deed} and {'speeds up' if gain > 0 else 'brakes'}" if abs(gain) > 1.1 else None
