"""Where things are on the tabletop, read from pixels alone: the same eyes for the simulator and for a world model.

Colours say what is what: the peg is magenta, the cube red, the other block blue, green or yellow. The middle of the
pixels of a colour, weighted by how much they are of it, is a ray of the scene's fixed camera; where the ray meets the
height at which the middle of the visible surface lies, there the thing stands.
"""

from dataclasses import dataclass

import numpy as np

from orrery.errors import InputError
from orrery.sim.tabletop import CAMERA, FOVY, UP, Layout

SEEN = 4.0  # pixels' worth of colour, at 64 x 64, below which a thing is not seen
NEAR = 0.13  # of the picture's width: pixels further from the densest spot of a colour are of something else
CUBE_HEIGHT, PEG_HEIGHT = 0.12, 0.22  # metres at which the middle of the visible surface lies


@dataclass(frozen=True)
class Seen:
    """What one picture shows: places [2] in metres, NaN where nothing is seen."""

    peg: np.ndarray
    cube: np.ndarray
    other: np.ndarray


def detect(frame: np.ndarray) -> Seen:
    """Peg, cube and other block in a picture of the tabletop [H, W, 3] uint8, H = W."""
    peg, cube, other = detect_all(frame[None])[0]
    return Seen(peg, cube, other)


def detect_all(frames: np.ndarray) -> np.ndarray:
    """Places [N, 3, 2] float64 in metres of peg, cube and other block in pictures [N, H, W, 3] uint8; NaN if unseen."""
    if frames.ndim != 4 or frames.shape[1] != frames.shape[2] or frames.shape[3] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be [N, H, H, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    red, green, blue = np.moveaxis(frames.astype(np.float32) / 255, 3, 0)
    magenta = np.minimum(red, blue) - green
    shares = {
        "peg": magenta,
        "cube": red - np.maximum(green, blue),
        "other": np.maximum.reduce(
            [blue - np.maximum(red, green), green - np.maximum(red, blue), np.minimum(red, green) - blue]
        ),
    }
    out = np.empty((len(frames), 3, 2))
    for column, (name, share) in enumerate(shares.items()):
        weight = np.clip((share - 0.2) / 0.25, 0, 1)
        out[:, column] = _ground(_middle(weight), frames.shape[1], PEG_HEIGHT if name == "peg" else CUBE_HEIGHT)
    return out


def _middle(weight: np.ndarray) -> np.ndarray:
    """The middle (x, y) [N, 2] in pixels of weights [N, H, W], near where they are densest; NaN where they are few."""
    count, size, _ = weight.shape
    index = np.arange(size)
    least = SEEN * (size / 64) ** 2
    out = np.full((count, 2), np.nan)
    for n in np.flatnonzero(weight.sum((1, 2)) >= least):
        w = weight[n]
        columns, rows = w.sum(0), w.sum(1)
        place = np.array([np.average(index, weights=columns), np.average(index, weights=rows)])
        for _ in range(4):
            far = np.hypot(index[None] - place[0], index[:, None] - place[1]) > NEAR * size
            near = np.where(far, 0, w)
            if near.sum() < least:
                break
            moved = np.array([np.average(index, weights=near.sum(0)), np.average(index, weights=near.sum(1))])
            if np.abs(moved - place).max() < 0.01:
                break
            place = moved
        out[n] = place
    return out


def _ground(pixels: np.ndarray, size: int, height: float) -> np.ndarray:
    """Where the camera's rays through pixels [N, 2] (middles of pixels are whole numbers) meet a height: [N, 2] m."""
    up = np.array(UP) / np.linalg.norm(UP)
    right = np.array([1.0, 0.0, 0.0])
    ahead = np.cross(up, right)
    focal = 0.5 * size / np.tan(np.radians(FOVY) / 2)
    x, y = ((pixels + 0.5 - size / 2) / focal).T
    rays = ahead + x[:, None] * right - y[:, None] * up
    reach = (height - CAMERA[2]) / rays[:, 2:]
    return (np.array(CAMERA) + reach * rays)[:, :2]


def to_pixels(places: np.ndarray, size: int, height: float = 0.0) -> np.ndarray:
    """The inverse: pixels (x, y) [N, 2] of places [N, 2] in metres at a height, for drawing goals."""
    up = np.array(UP) / np.linalg.norm(UP)
    ahead = np.cross(up, [1.0, 0.0, 0.0])
    focal = 0.5 * size / np.tan(np.radians(FOVY) / 2)
    offset = np.column_stack([places, np.full(len(places), height)]) - CAMERA
    depth = offset @ ahead
    return np.column_stack([offset[:, 0], -(offset @ up)]) / depth[:, None] * focal + size / 2 - 0.5


def layout_of(frame: np.ndarray, goal: np.ndarray) -> Layout:
    """A layout that looks like a picture [H, W, 3] uint8: places as seen, the cube's yaw unknown and so 0.

    Raises:
        InputError: no peg or no red cube is seen.
    """
    seen = detect(frame)
    for name, place in (("magenta peg", seen.peg), ("red cube", seen.cube)):
        if np.isnan(place).any():
            raise InputError(f"the picture shows no {name}; allowed is a picture of the tabletop")
    if np.isnan(seen.other).any():
        return Layout(seen.peg, seen.cube, 0.0, goal)
    red, green, blue = np.moveaxis(frame.astype(np.float32), 2, 0)
    shares = {"blue": blue - np.maximum(red, green), "green": green - np.maximum(red, blue)}
    shares["yellow"] = np.minimum(red, green) - blue
    colour = max(shares, key=lambda name: float(np.clip(shares[name] - 50, 0, None).sum()))
    return Layout(seen.peg, seen.cube, 0.0, goal, seen.other, colour)
