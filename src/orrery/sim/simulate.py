"""Runs an episode: physics first, checked against its caption, then drawn from the recorded states."""

from importlib import import_module
from typing import Any

import numpy as np

from orrery.errors import InputError, OrreryError
from orrery.sim.clip import Clip, Episode, Thing, Trace
from orrery.sim.looks import LOOKS, Look
from orrery.sim.render import camera_for, import_mujoco

SCENES = ("drop", "push", "drive", "tabletop")
PLAIN = ("tabletop",)  # scenes of one look
FPS, FRAMES, SUBSTEPS = 12.0, 17, 40
VISIBLE_PIXELS = 12  # at 64 x 64: fewer than this over a whole clip is not seen
ATTEMPTS = 60


def simulate(
    scene: str,
    seed: int,
    look: str | None = None,
    size: int = 64,
    frames: int = FRAMES,
    truth: bool = True,
) -> Clip:
    """One clip of a scene. The seed fixes the physics and (look=None) which look; the same seed moves the same in both.

    Args: scene `drop`, `push`, `drive` or `tabletop`; seed >= 0; look `plain`, `real` or None; size in pixels (square,
    16..1024); frames 5..1000; truth False leaves depth and segmentation out of the clip (they are drawn all the same
    where the caption asks what is seen).
    Raises InputError for values outside these, OrreryError if no draw of the seed gives a true caption.
    """
    check_request(scene, seed, look, size, frames)
    build = import_module(f"orrery.sim.{scene}").build
    number = SCENES.index(scene)
    taste = np.random.default_rng([number, seed, 1])
    chosen = "plain" if scene in PLAIN else str(taste.choice(LOOKS))
    drawn = Look.draw(look or chosen, taste)
    for attempt in range(ATTEMPTS):
        rng = np.random.default_rng([number, seed, 0, attempt])
        episode: Episode = build(rng, drawn, frames)
        model = _compile(episode)
        trace = _run(model, episode, frames)
        if episode.describe(trace, np.ones((len(episode.cameras), len(episode.things)), bool)) is None:
            continue
        looked = truth or not episode.blind
        shots = _draw(model, episode, trace, drawn, size, looked)
        seen = _visible(shots["segmentation"], len(episode.things), size) if looked else None
        caption = episode.describe(trace, seen)
        if caption is not None:
            if not truth:
                shots["depth"] = shots["segmentation"] = None
            return Clip(
                scene, seed, drawn.name, caption, FPS, episode.cameras, episode.things,
                actions=trace.actions, action_names=episode.action_names,
                position=trace.position, quaternion=trace.quaternion,
                lanes=episode.lanes, extra={"attempt": attempt, "look": vars(drawn)}, **shots,
            )  # fmt: skip
    raise OrreryError(f"scene {scene} seed {seed}: none of {ATTEMPTS} draws gives a clip that its caption describes")


def check_request(
    scene: str, seed: int, look: str | None = None, size: int = 64, frames: int = FRAMES, truth: bool = True
) -> None:
    """Raises InputError for values that `simulate` refuses."""
    if scene not in SCENES:
        raise InputError(f"unknown scene {scene!r}; the scenes are {', '.join(SCENES)}")
    looks = ("plain",) if scene in PLAIN else LOOKS
    if look not in (None, *looks):
        raise InputError(f"unknown look {look!r}; the looks of {scene} are {', '.join(looks)}")
    for name, value, low, high in (("seed", seed, 0, 2**31), ("size", size, 16, 1024), ("frames", frames, 5, 1000)):
        if not low <= value <= high:
            raise InputError(f"{name} {value} is outside {low}..{high}")


def _compile(episode: Episode) -> Any:
    model = import_mujoco().MjModel.from_xml_string(episode.xml, episode.files)
    model.opt.timestep = 1 / FPS / SUBSTEPS
    return model


def _run(model: Any, episode: Episode, frames: int) -> Trace:
    mj = import_mujoco()
    data = mj.MjData(model)
    if episode.start:
        episode.start(model, data)
    mj.mj_forward(model, data)
    bodies = [model.body(thing.body).id for thing in episode.things]
    owner = {int(g): i for i, b in enumerate(bodies) for g in np.flatnonzero(model.geom_bodyid == b)}
    kind = mj.mjtState.mjSTATE_INTEGRATION
    states, position, quaternion, actions, contacts = [], [], [], [], set()
    for frame in range(frames):
        action = episode.control(model, data, frame, 0, SUBSTEPS) if episode.control else None
        mj.mj_forward(model, data)
        state = np.empty(mj.mj_stateSize(model, kind))
        mj.mj_getState(model, data, state, kind)
        states.append(state)
        position.append(data.xpos[bodies].copy())
        quaternion.append(data.xquat[bodies].copy())
        actions.append(np.zeros(0) if action is None else action)
        for substep in range(SUBSTEPS):
            if substep and episode.control:
                episode.control(model, data, frame, substep, SUBSTEPS)
            mj.mj_step(model, data)
            for a, b in data.contact.geom[: data.ncon]:
                pair = sorted((owner.get(int(a), -1), owner.get(int(b), -1)))
                if pair[0] >= 0 and pair[0] != pair[1]:
                    contacts.add((frame, pair[0], pair[1]))
    return Trace(np.array(position), np.array(quaternion), contacts, states, np.array(actions, np.float32))


def _draw(model: Any, episode: Episode, trace: Trace, look: Look, size: int, truth: bool) -> dict[str, Any]:
    mj = import_mujoco()
    data = mj.MjData(model)
    camera = camera_for(model, size)
    thing_of = np.zeros(model.ngeom + 1, np.uint8)  # the last entry answers for -1, "nothing"
    for i, thing in enumerate(episode.things):
        thing_of[:-1][_under(model, model.body(thing.body).id)] = i + 1
    names = episode.cameras
    shape = (len(names), len(trace.states), size, size)
    colour, depth = np.empty((*shape, 3), np.float32), np.empty(shape, np.float32)
    segmentation, extrinsics = np.empty(shape, np.uint8), np.empty((*shape[:2], 4, 4))
    maps = np.empty((*shape, 3), np.uint8) if episode.draw_map else None
    for t, state in enumerate(trace.states):
        mj.mj_setState(model, data, state, mj.mjtState.mjSTATE_INTEGRATION)
        mj.mj_forward(model, data)
        for v, name in enumerate(names):
            colour[v, t], d, geoms = camera.shoot(data, name, truth)
            if d is not None and geoms is not None:
                depth[v, t], segmentation[v, t] = d, thing_of[geoms]
            extrinsics[v, t] = _extrinsics(data, model.camera(name).id)
            if maps is not None and episode.draw_map:
                maps[v, t] = episode.draw_map(model, data, name, t, size)
    focal = [0.5 * size / np.tan(np.radians(model.cam_fovy[model.camera(n).id]) / 2) for n in names]
    return {
        "frames": np.stack([look.develop(c) for c in colour]),
        "depth": depth,
        "segmentation": segmentation,
        "intrinsics": np.array([[[f, 0, size / 2], [0, f, size / 2], [0, 0, 1]] for f in focal]),
        "extrinsics": extrinsics,
        "map": maps,
    }


def _under(model: Any, body: int) -> np.ndarray:
    """Geoms [ngeom] bool of a body and of all bodies that hang on it."""
    inside = np.zeros(model.nbody, bool)
    inside[body] = True
    for child in range(body + 1, model.nbody):  # parents come before children
        inside[child] |= inside[model.body_parentid[child]]
    return inside[model.geom_bodyid]


def _extrinsics(data: Any, camera: int) -> np.ndarray:
    """World to camera [4, 4]; MuJoCo cameras look along -z with y up, OpenCV's along +z with y down."""
    to_world = data.cam_xmat[camera].reshape(3, 3) * np.array([1.0, -1.0, -1.0])
    out = np.eye(4)
    out[:3, :3] = to_world.T
    out[:3, 3] = -to_world.T @ data.cam_xpos[camera]
    return out


def _visible(segmentation: np.ndarray, things: int, size: int) -> np.ndarray:
    """Which things each camera sees well in at least one frame, [V, n] bool."""
    least = max(1, round(VISIBLE_PIXELS * (size / 64) ** 2))
    per_frame = np.stack([(segmentation == i + 1).sum((2, 3)) for i in range(things)], -1)  # [V, T, n]
    return per_frame.max(1) >= least


def describe_thing(thing: Thing) -> str:
    """`the red ball`'s name without its article."""
    return f"{thing.colour} {thing.shape}".strip() or thing.name
