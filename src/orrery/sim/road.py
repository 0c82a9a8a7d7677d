"""The road of `drive`: its geometry (centreline, lanes) and its scenery, baked into a handful of meshes.

Road coordinates are (s, offset): metres along the centreline and metres to the left of it. Five hundred small geoms a
clip would cost seconds to draw; ten meshes cost milliseconds. `MESHES` names them, the same in every clip, so that one
GL context serves all clips (render.Camera uploads the meshes again for each model).
"""

import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

LANE = 3.5  # metres, width of a lane
SHOULDER = 0.6  # metres of asphalt outside the edge lines
BEHIND, AHEAD = 80.0, 170.0  # metres of road before the start and after the last place that can be reached
DASH, GAP = 3.0, 6.0  # metres, the dashes between lanes
LINE = 0.22  # metres, width of painted lines (wider than life: they must survive 64 pixels)
MESHES = (
    "asphalt",
    "paint",
    "house0",
    "house1",
    "house2",
    "crown",
    "trunk",
    "car",
    "car_dark",
    "truck",
    "truck_dark",
    "lamp",
)
KINDS = {"car": (4.4, 1.8, 1.46), "truck": (8.0, 2.5, 3.3)}  # length, width, height in metres


class Road:
    """A one-way road of 2 or 3 lanes that runs straight and through curves; it never comes near itself.

    lanes: how many; half: metres from the centreline to an edge line; points [N, 2] and yaw [N]: the centreline,
    sampled every metre from s = -BEHIND.
    """

    def __init__(self, rng: np.random.Generator, reach: float):
        self.lanes = int(rng.integers(2, 4))
        self.half = self.lanes * LANE / 2
        count = int(BEHIND + reach + AHEAD)
        curvature = np.zeros(count)
        side = float(rng.choice([-1.0, 1.0]))
        at = BEHIND + float(rng.uniform(-5, 12) if rng.random() < 0.6 else rng.uniform(45, 100))
        while at < count:
            bend, length = float(rng.uniform(0.013, 0.028)), float(rng.uniform(35, 45))
            curvature[int(at) : int(at + length)] = side * bend
            at += length + float(rng.uniform(20, 60))
            side = -side  # bends alternate, so the heading stays within 1.3 rad of the start's
        self.curvature = np.convolve(curvature, np.ones(11) / 11, "same")
        self.yaw = np.cumsum(self.curvature)
        self.yaw -= self.yaw[int(BEHIND)]
        middle = self.yaw - self.curvature / 2
        steps = np.stack([np.cos(middle), np.sin(middle)], -1)
        self.points = np.cumsum(steps, 0)
        self.points -= self.points[int(BEHIND)]
        self.s = np.arange(count) - BEHIND

    def pose(self, s: np.ndarray | float, offset: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        """Points [..., 2] and headings [...] in radians of road coordinates."""
        s = np.asarray(s, float)
        yaw = np.interp(s, self.s, self.yaw)
        x, y = np.interp(s, self.s, self.points[:, 0]), np.interp(s, self.s, self.points[:, 1])
        return np.stack([x - np.sin(yaw) * offset, y + np.cos(yaw) * offset], -1), yaw

    def locate(self, point: np.ndarray) -> tuple[float, float]:
        """Road coordinates (s, offset) of a point [2]."""
        i = int(((self.points - point) ** 2).sum(1).argmin())
        along, left = (
            np.array([np.cos(self.yaw[i]), np.sin(self.yaw[i])]),
            np.array([-np.sin(self.yaw[i]), np.cos(self.yaw[i])]),
        )
        gap = point - self.points[i]
        return float(self.s[i] + along @ gap / max(0.1, 1 - self.curvature[i] * (left @ gap))), float(left @ gap)

    def lane_offset(self, lane: float) -> float:
        """Offset of a lane's middle; lane 0 is the rightmost."""
        return -self.half + (lane + 0.5) * LANE

    def polylines(self) -> list[dict[str, Any]]:
        """The map: lane lines, road boundaries and lane centres from right to left, each {"kind", "style", "offset",
        "points" [n, 3]} in metres; dashed lines have "dash" and "gap" too."""
        out: list[dict[str, Any]] = []

        def add(kind: str, style: str, offset: float, **more: float) -> None:
            points, _ = self.pose(self.s[::2], offset)
            out.append(
                {"kind": kind, "style": style, "offset": offset, "points": np.pad(points, ((0, 0), (0, 1))), **more}
            )

        for k in range(self.lanes + 1):
            edge = k in (0, self.lanes)
            add(
                "lane_line",
                "solid" if edge else "dashed",
                -self.half + k * LANE,
                **({} if edge else {"dash": DASH, "gap": GAP}),
            )
        for side in (-1, 1):
            add("road_boundary", "solid", side * (self.half + SHOULDER))
        for k in range(self.lanes):
            add("lane_centre", "none", self.lane_offset(k))
        return out

    def dashes(self) -> np.ndarray:
        """Start of every dash, metres [m]."""
        return np.arange(-BEHIND, self.s[-1] - DASH, DASH + GAP)

    def segments(self) -> list[tuple[np.ndarray, str]]:
        """The painted lines and the boundaries as pairs of points [n, 2, 3] in metres, each with its kind."""
        out = []
        for line in self.polylines():
            points = line["points"]
            if line["style"] == "solid":
                out.append((np.stack([points[:-1], points[1:]], 1), line["kind"]))
            elif line["style"] == "dashed":
                ends = [self.pose(self.dashes() + d, line["offset"])[0] for d in (0.0, DASH)]
                out.append((np.pad(np.stack(ends, 1), ((0, 0), (0, 0), (0, 1))), line["kind"]))
        return out


@dataclass
class Mesh:
    """Flat-shaded polygons that become one MuJoCo mesh; texture coordinates are in metres."""

    vertices: list[np.ndarray] = field(default_factory=list)
    normals: list[np.ndarray] = field(default_factory=list)
    uv: list[np.ndarray] = field(default_factory=list)
    faces: list[np.ndarray] = field(default_factory=list)
    count: int = 0

    def quads(self, corners: np.ndarray, uv: np.ndarray | None = None) -> None:
        """Adds quads [n, 4, 3], anticlockwise seen from outside; uv [n, 4, 2], default (length, height) of each."""
        n = len(corners)
        normal = np.cross(corners[:, 2] - corners[:, 0], corners[:, 3] - corners[:, 1])
        normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-9)
        if uv is None:
            width = np.linalg.norm(corners[:, 1] - corners[:, 0], axis=1)
            height = np.linalg.norm(corners[:, 3] - corners[:, 0], axis=1)
            zero = np.zeros(n)
            uv = np.stack([zero, zero, width, zero, width, height, zero, height], -1).reshape(n, 4, 2)
        self.vertices.append(corners.reshape(-1, 3))
        self.normals.append(np.repeat(normal, 4, 0))
        self.uv.append(uv.reshape(-1, 2))
        first = self.count + 4 * np.arange(n)[:, None]
        self.faces.append(np.concatenate([first + [0, 1, 2], first + [0, 2, 3]]))
        self.count += 4 * n

    def strip(self, right: np.ndarray, left: np.ndarray) -> None:
        """Adds the flat band between two polylines [n, 3]; its texture lies on the ground in metres."""
        corners = np.stack([right[:-1], right[1:], left[1:], left[:-1]], 1)
        self.quads(corners, corners[..., :2])

    def prism(self, profile: np.ndarray, half_width: float, middle: float = 0.0) -> None:
        """Adds a side view [n, 2] (x, z), convex and anticlockwise seen from the right (-y), extruded along y."""
        n = len(profile)
        right = np.insert(profile, 1, middle - half_width, 1)
        left = np.insert(profile, 1, middle + half_width, 1)
        self.quads(np.stack([right, left, np.roll(left, -1, 0), np.roll(right, -1, 0)], 1))
        for k in range(1, n - 1, 2):  # a fan of quads closes the sides; the last may be a triangle
            last = min(k + 2, n - 1)
            self.quads(right[[0, k, k + 1, last]][None])
            self.quads(left[[0, last, k + 1, k]][None])

    def box(self, low: tuple[float, float, float], high: tuple[float, float, float]) -> None:
        """Adds an axis-aligned box."""
        (x0, y0, z0), (x1, y1, z1) = low, high
        self.prism(np.array([[x0, z0], [x1, z0], [x1, z1], [x0, z1]]), (y1 - y0) / 2, (y0 + y1) / 2)

    def tower(
        self, centre: np.ndarray, yaw: float, size: tuple[float, float], z0: float, z1: float, sides: int, top: float
    ) -> None:
        """Adds an upright pyramid stump: `sides` walls, half sizes `size`, narrowed to `top` times as wide at z1."""
        angle = np.pi * (2 * np.arange(sides) + 1) / sides
        ring = np.stack([np.cos(angle), np.sin(angle)], -1) * (np.array(size) * (np.sqrt(2) if sides == 4 else 1))
        turn = np.array([[np.cos(yaw), np.sin(yaw)], [-np.sin(yaw), np.cos(yaw)]])
        low = np.insert(ring @ turn + centre, 2, z0, 1)
        high = np.insert(top * ring @ turn + centre, 2, z1, 1)
        self.quads(np.stack([low, np.roll(low, -1, 0), np.roll(high, -1, 0), high], 1))
        if top > 0.05 and sides == 4:
            self.quads(high[None], np.zeros((1, 4, 2)))

    def msh(self, texture: float) -> bytes:
        """MuJoCo's binary mesh format; `texture` is how many metres one repeat of the texture covers."""
        vertices, normals = np.concatenate(self.vertices), np.concatenate(self.normals)
        uv, faces = np.concatenate(self.uv) / texture, np.concatenate(self.faces)
        head = struct.pack("<4i", len(vertices), len(normals), len(uv), len(faces))
        return (
            head + b"".join(a.astype("<f4").tobytes() for a in (vertices, normals, uv)) + faces.astype("<i4").tobytes()
        )


def scenery(road: Road, rng: np.random.Generator) -> dict[str, bytes]:
    """The meshes of a road and what stands beside it, and of the vehicles, by name."""
    out = {name: Mesh() for name in MESHES}
    _lay(road, out["asphalt"], out["paint"])
    _line(road, rng, out)
    _make_car(out["car"], out["car_dark"], out["lamp"])
    _make_truck(out["truck"], out["truck_dark"])
    texture = {"asphalt": 4.0, "house0": 6.0, "house1": 6.0, "house2": 6.0}
    return {f"{name}.msh": mesh.msh(texture.get(name, 1.0)) for name, mesh in out.items()}


def _lay(road: Road, asphalt: Mesh, paint: Mesh) -> None:
    def edge(s: np.ndarray, offset: float, z: float) -> np.ndarray:
        return np.insert(road.pose(s, offset)[0], 2, z, 1)

    s, w = road.s[::2], road.half + SHOULDER
    asphalt.strip(edge(s, -w, 0.0), edge(s, w, 0.0))
    for side in (-1, 1):
        paint.strip(edge(s, side * road.half - LINE / 2, 0.02), edge(s, side * road.half + LINE / 2, 0.02))
    starts = road.dashes()
    for k in range(1, road.lanes):
        offset = -road.half + k * LANE
        ends = [edge(starts + d, offset + e * LINE / 2, 0.02) for d, e in ((0, -1), (DASH, -1), (DASH, 1), (0, 1))]
        corners = np.stack(ends, 1)
        paint.quads(corners, corners[..., :2])


def _line(road: Road, rng: np.random.Generator, out: dict[str, Mesh]) -> None:
    """Lines the road with houses and trees, none nearer to any stretch of it than two metres."""
    for side in (-1, 1):
        s, turn = -BEHIND + float(rng.uniform(0, 8)), int(rng.integers(3))
        while s < road.s[-1]:
            width, depth, height = rng.uniform(3, 5.5), rng.uniform(2.5, 4.5), rng.uniform(3.5, 8.5)
            offset = road.half + SHOULDER + float(rng.uniform(4, 9)) + depth
            centre, yaw = road.pose(s + width, side * offset)
            if np.linalg.norm(road.points - centre, axis=1).min() > road.half + 2.5 + depth:
                if rng.random() < 0.6:
                    out[f"house{turn % 3}"].tower(centre, float(yaw), (width, depth), -0.2, height, 4, 1.0)
                else:
                    top, r = float(rng.uniform(4, 7)), float(rng.uniform(1.3, 2.0))
                    out["trunk"].tower(centre, 0.0, (0.25, 0.25), -0.2, 1.6, 4, 1.0)
                    out["crown"].tower(centre, 0.0, (r, r), 1.3, top, 7, 0.0)
            turn += 1
            s += 2 * width + float(rng.uniform(2, 9))
    for k, name in enumerate(("house0", "house1", "house2", "crown", "trunk")):
        if not out[name].count:  # every mesh must hold something: a stone beside the very end of the road
            out[name].tower(road.pose(road.s[-1], road.half + 4.0 + k)[0], 0.0, (0.2, 0.2), -0.2, 0.3, 4, 1.0)


def _wheels(dark: Mesh, places: tuple[float, ...], track: float, radius: float) -> None:
    angle = np.pi * np.arange(8) / 4
    ring = np.stack([np.cos(angle), np.sin(angle)], -1) * radius + [0, radius]
    for x in places:
        for side in (-1, 1):
            dark.prism(ring + [x, 0], 0.13, side * (track - 0.12))


def _make_car(body: Mesh, dark: Mesh, lamp: Mesh) -> None:
    """4.4 m long, 1.8 m wide, 1.46 m high, standing on z = 0, nose towards +x."""
    body.prism(np.array([[-2.2, 0.28], [2.2, 0.28], [2.2, 0.68], [1.1, 0.92], [-2.05, 0.96], [-2.2, 0.8]]), 0.9)
    dark.prism(np.array([[1.1, 0.9], [0.35, 1.4], [-1.25, 1.4], [-1.95, 0.94]]), 0.8)
    body.prism(np.array([[0.4, 1.38], [0.35, 1.46], [-1.3, 1.46], [-1.35, 1.38]]), 0.79)
    _wheels(dark, (1.35, -1.3), 0.9, 0.33)
    for y in (-0.86, 0.5):
        lamp.box((-2.21, y, 0.62), (-2.15, y + 0.36, 0.78))


def _make_truck(body: Mesh, dark: Mesh) -> None:
    """8 m long, 2.5 m wide, 3.3 m high: a box of the named colour behind a cab of the same colour."""
    body.box((-4.0, -1.25, 0.95), (1.9, 1.25, 3.3))
    body.prism(np.array([[2.1, 0.5], [4.0, 0.5], [4.0, 1.5], [3.7, 2.7], [2.1, 2.7]]), 1.2)
    dark.prism(np.array([[3.9, 1.6], [4.02, 1.6], [3.77, 2.6], [3.65, 2.6]]), 1.05)
    dark.box((-3.9, -0.9, 0.5), (2.2, 0.9, 0.95))
    _wheels(dark, (3.1, -1.6, -2.9), 1.25, 0.5)
