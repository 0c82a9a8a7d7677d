"""World-scenario maps: lanes and 3D boxes as a camera would see them, the control signal of a multi-view world model.

Colours follow the published scheme (version 3) of the Cosmos-Transfer multi-view models: road boundaries magenta, lane
lines white, cars blue and trucks orange, darker at the front than at the rear, with grey edges.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SUPERSAMPLE = 4
NEAR, FAR = 0.3, 90.0  # metres from the camera
BOUNDARY, LINE, EDGE = (253, 1, 232), (255, 255, 255), (200, 200, 200)
FRONT_TO_REAR = {"car": ((0, 46, 136), (126, 206, 255)), "truck": ((204, 55, 0), (255, 192, 64))}
SLICES = 4  # a box is shaded in so many steps along its length
CORNERS = np.array([[x, y, z] for x in (1, -1) for y in (1, -1) for z in (-1, 1)]) / 2  # front four, then rear four
# Front, rear, left, right, top, bottom, each anticlockwise seen from outside.
FACES = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (1, 5, 7, 3), (0, 2, 6, 4))
EDGES = ((0, 1), (2, 3), (0, 2), (1, 3), (4, 5), (6, 7), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7))
Box = tuple[str, np.ndarray, np.ndarray, tuple[float, float, float]]  # kind, centre [3], rotation [3, 3], metres


class Eye:
    """A pinhole camera: world to pixels. rotation [3, 3] has the camera's axes (right, up, back) as columns."""

    def __init__(self, position: np.ndarray, rotation: np.ndarray, fovy: float, size: int):
        self.position, self.rotation, self.fovy, self.size = position, rotation, fovy, size
        self.focal = 0.5 * size / math.tan(math.radians(fovy) / 2)

    def see(self, points: np.ndarray) -> np.ndarray:
        """World points [n, 3] to camera axes [n, 3]: x right, y down, z forward."""
        return (points - self.position) @ self.rotation * np.array([1.0, -1.0, -1.0])

    def pixels(self, seen: np.ndarray) -> np.ndarray:
        """Camera points [n, 3] with z > 0 to pixels [n, 2]."""
        return self.size / 2 + self.focal * seen[:, :2] / seen[:, 2:]


def draw(eye: Eye, lines: Sequence[tuple[np.ndarray, str]], boxes: Sequence[Box]) -> np.ndarray:
    """The map [size, size, 3] uint8. A box's last entry is its length, width, height."""
    from PIL import Image, ImageDraw

    big = Eye(eye.position, eye.rotation, eye.fovy, eye.size * SUPERSAMPLE)
    image = Image.new("RGB", (big.size, big.size))
    brush = ImageDraw.Draw(image)
    for pairs, kind in lines:
        near = np.linalg.norm(pairs[:, 0] - big.position, axis=1) < FAR
        a, b = (big.see(end) for end in pairs[near].transpose(1, 0, 2))
        _draw_segments(brush, big, a, b, BOUNDARY if kind == "road_boundary" else LINE)
    for kind, centre, rotation, size in sorted(boxes, key=lambda box: -np.linalg.norm(box[1] - big.position)):
        if np.linalg.norm(centre - big.position) < FAR:
            _draw_box(brush, big, centre, rotation, np.array(size), FRONT_TO_REAR[kind])
    return np.asarray(image.resize((eye.size, eye.size), Image.Resampling.BOX))


def _draw_segments(brush: Any, eye: Eye, a: np.ndarray, b: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Lines between camera-space points a and b [n, 3], cut at the near plane."""
    keep = (a[:, 2] > NEAR) | (b[:, 2] > NEAR)
    a, b = a[keep], b[keep]
    for p, q in ((a, b), (b, a)):  # moves the end that lies behind the near plane onto it
        behind = p[:, 2] < NEAR
        share = (NEAR - p[behind, 2]) / (q[behind, 2] - p[behind, 2])
        p[behind] += (q - p)[behind] * share[:, None]
    width = max(1, round(eye.size / 50))
    for start, end in zip(eye.pixels(a), eye.pixels(b), strict=True):
        if np.minimum(start, end).max() < eye.size and np.maximum(start, end).min() > 0:
            brush.line([*start, *end], fill=colour, width=width)


def _draw_box(brush: Any, eye: Eye, centre: np.ndarray, rotation: np.ndarray, size: np.ndarray, shade: tuple) -> None:
    front, rear = np.array(shade, float)
    corners = eye.see(centre + (CORNERS * size) @ rotation.T)
    if corners[:, 2].max() < NEAR:
        return
    shown: set[int] = set()
    for index, face in enumerate(FACES):
        p = corners[list(face)]
        if np.cross(p[1] - p[0], p[2] - p[0]) @ p[0] >= 0:
            continue  # turned away from the camera
        shown.update(k for k, edge in enumerate(EDGES) if edge[0] in face and edge[1] in face)
        if index < 2:
            _fill(brush, eye, p, front if index == 0 else rear)
            continue
        ends = [k for k in range(4) if face[k] < 4]  # this face's corners at the front, in order
        first, second = (ends[0], ends[1]) if (ends[1] - ends[0]) == 1 else (ends[1], ends[0])
        back_second, back_first = p[(second + 1) % 4], p[(second + 2) % 4]
        for k in range(SLICES):
            u, v = k / SLICES, (k + 1) / SLICES
            piece = [p[first] + (back_first - p[first]) * u, p[second] + (back_second - p[second]) * u]
            piece += [p[second] + (back_second - p[second]) * v, p[first] + (back_first - p[first]) * v]
            _fill(brush, eye, np.array(piece), front + (rear - front) * (u + v) / 2)
    if shown:
        tips = np.array(EDGES)[sorted(shown)]
        _draw_segments(brush, eye, corners[tips[:, 0]], corners[tips[:, 1]], EDGE)


def _fill(brush: Any, eye: Eye, polygon: np.ndarray, colour: np.ndarray) -> None:
    """Fills a camera-space polygon [n, 3], cut at the near plane."""
    cut = []
    for p, q in zip(polygon, np.roll(polygon, -1, 0), strict=True):
        if p[2] >= NEAR:
            cut.append(p)
        if (p[2] >= NEAR) != (q[2] >= NEAR):
            cut.append(p + (q - p) * (NEAR - p[2]) / (q[2] - p[2]))
    if len(cut) > 2:
        brush.polygon([tuple(xy) for xy in eye.pixels(np.array(cut))], fill=tuple(int(c) for c in colour))
