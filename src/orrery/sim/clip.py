"""What a simulated clip is: pixels and everything that is true about them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Thing:
    """Something that a caption can name. Its segmentation id is its place in `Episode.things` plus one. `size`: length,
    width and height in metres where the body is the middle of a box that the clip's data should tell of."""

    body: str
    name: str
    colour: str = ""
    shape: str = ""
    radius: float = 0.0
    movable: bool = True
    size: tuple[float, float, float] | None = None


@dataclass
class Trace:
    """What the physics did. position [T, n, 3] metres, quaternion [T, n, 4] (w first), one row a thing; `contacts`
    holds (frame, i, j) for things i < j that touched between that frame and the next; `states` the full simulator
    state."""

    position: np.ndarray
    quaternion: np.ndarray
    contacts: set[tuple[int, int, int]]
    states: list[np.ndarray]
    actions: np.ndarray


@dataclass
class Episode:
    """One draw of a scene, before it has run.

    control(model, data, frame, substep, substeps) is called before every physics step and may return the frame's
    action. describe(trace, visible) gives the caption, or None to reject this draw: visible [V, n] bool says which
    things each camera saw (all True when only the physics is asked about; None if `blind`, which says that the caption
    does not depend on it, and nothing was drawn but colour). draw_map(model, data, camera, frame, size)
    draws the world-scenario map [size, size, 3] uint8; `lanes` are its polylines (see Road.polylines).
    """

    xml: str
    files: dict[str, bytes]
    things: tuple[Thing, ...]
    cameras: tuple[str, ...]
    describe: Callable[[Trace, np.ndarray | None], str | None]
    action_names: tuple[str, ...] = ()
    start: Callable[[Any, Any], None] | None = None
    control: Callable[[Any, Any, int, int, int], np.ndarray | None] | None = None
    draw_map: Callable[[Any, Any, str, int, int], np.ndarray] | None = None
    lanes: tuple[dict[str, Any], ...] = ()
    blind: bool = False


@dataclass(frozen=True)
class Clip:
    """A simulated clip with its ground truth; V cameras, T frames, n things.

    frames [V, T, H, W, 3] uint8; depth [V, T, H, W] float32 metres (inf: sky); segmentation [V, T, H, W] uint8 (0:
    none, else 1 + index into `things`); actions [T, A] float32, row t acts between frames t and t + 1; position
    [T, n, 3] and quaternion [T, n, 4]; intrinsics [V, 3, 3] pixels; extrinsics [V, T, 4, 4] world to camera, OpenCV
    axes (x right, y down, z forward); map [V, T, H, W, 3] uint8 or None (lanes and boxes as the cameras would see
    them); lanes: the map's polylines in world metres.
    """

    scene: str
    seed: int
    look: str
    caption: str
    fps: float
    cameras: tuple[str, ...]
    things: tuple[Thing, ...]
    frames: np.ndarray
    actions: np.ndarray
    action_names: tuple[str, ...]
    position: np.ndarray
    quaternion: np.ndarray
    intrinsics: np.ndarray
    extrinsics: np.ndarray
    depth: np.ndarray | None = None
    segmentation: np.ndarray | None = None
    map: np.ndarray | None = None
    lanes: tuple[dict[str, Any], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
