"""Finds the coloured objects of our worlds in pixels alone: where each one is, how large, and of which shape.

A pixel belongs to a colour by its hue and its saturation (shading keeps both, blur lowers the saturation before it
turns the hue); the pixels of a colour are joined into objects, across gaps as wide as the robot's arm. The shape is a
vote among the most similar of labelled crops, which are fitted on rendered clips. No simulator, no network.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

# Hue windows in degrees (from, to), and the saturation that a pixel needs; wood lies between red and yellow.
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (340.0, 375.0, 0.50),
    "yellow": (39.0, 75.0, 0.48),
    "green": (95.0, 156.0, 0.38),
    "cyan": (165.0, 206.0, 0.40),
    "blue": (212.0, 256.0, 0.42),
    "purple": (260.0, 320.0, 0.36),
}
SHAPES = ("ball", "cube", "cylinder")
LEAST_CHROMA = 0.13  # of 1
LEAST_AREA = 12.0  # pixels at 64 x 64: fewer are no object
LEAST_FILL = 0.3  # of its bounding box: a scatter of coloured pixels is no object
BRIDGE = 3  # pixels at 64 x 64: parts of one colour nearer than twice this are one object, cut by the arm
CROP = 12  # a crop for the shape vote is CROP x CROP
NEIGHBOURS = 9


@dataclass(frozen=True)
class Found:
    """One object in one frame. x, y: centroid in pixels, from the middle of the top left pixel; area in pixels; `crop`
    [CROP, CROP] float32 is what the shape vote looks at."""

    colour: str
    x: float
    y: float
    area: int
    crop: np.ndarray

    @property
    def radius(self) -> float:
        """Of a disc of this area, pixels."""
        return float(np.sqrt(self.area / np.pi))


def scale_of(height: int, width: int) -> float:
    """How many times larger than 64 x 64 a picture is, along a side."""
    return float(np.sqrt(height * width) / 64)


def colour_masks(frames: np.ndarray) -> dict[str, np.ndarray]:
    """Which pixels [T, H, W] bool of frames [T, H, W, 3] uint8 show each colour of `COLOURS`."""
    pixels = frames.astype(np.float32) / 255
    high, low = pixels.max(-1), pixels.min(-1)
    chroma = high - low
    r, g, b = np.moveaxis(pixels, -1, 0)
    safe = np.maximum(chroma, 1e-6)
    hue = np.where(high == r, (g - b) / safe % 6, np.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)) * 60
    saturation = chroma / np.maximum(high, 1e-6)
    masks = {}
    for name, (start, end, least) in COLOURS.items():
        turned = (hue - start) % 360
        masks[name] = _dense((turned <= end - start) & (saturation >= least) & (chroma >= LEAST_CHROMA))
    return masks


def _dense(masks: np.ndarray) -> np.ndarray:
    """masks [T, H, W] bool without the pixels that fewer than 4 of their 3 x 3 neighbourhood support: a corner of a
    square has 4; the bright grain of wood, which is nearly yellow, has fewer."""
    height, width = masks.shape[1:]
    padded = np.pad(masks, [(0, 0), (1, 1), (1, 1)]).astype(np.uint8)
    around = sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3))
    return masks & (around >= 4)


def detect(frames: np.ndarray) -> list[list[Found]]:
    """The objects in each of frames [T, H, W, 3] uint8, largest first within a colour.

    Raises:
        ValueError: another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be [T, H, W, 3] uint8, got {list(frames.shape)} {frames.dtype}")
    scale = scale_of(*frames.shape[1:3])
    found: list[list[Found]] = [[] for _ in frames]
    for colour, masks in colour_masks(frames).items():
        present = np.flatnonzero(masks.sum((1, 2)) >= LEAST_AREA * scale**2)
        if not len(present):
            continue
        labels = components(masks[present], round(BRIDGE * scale))
        for t, label in zip(present, labels, strict=True):
            ids, areas = np.unique(label[label > 0], return_counts=True)
            for which in np.argsort(-areas):
                mask = label == ids[which]
                if areas[which] >= LEAST_AREA * scale**2 and _fill(mask) >= LEAST_FILL:
                    found[t].append(_found(colour, mask, frames[t]))
    return found


def components(masks: np.ndarray, bridge: int) -> np.ndarray:
    """Labels [T, H, W] int32 of masks [T, H, W] bool: 0 outside, one number for all pixels of a frame that hang
    together once the mask has grown by `bridge` pixels."""
    grown = masks
    for _ in range(bridge):
        grown = _spread(grown.astype(np.int32)) > 0
    labels = np.where(grown, np.arange(1, masks[0].size + 1, dtype=np.int32).reshape(masks.shape[1:]), 0)
    while True:
        spread = np.where(grown, _spread(labels), 0)
        if np.array_equal(spread, labels):
            return np.where(masks, labels, 0)
        labels = spread


def _spread(x: np.ndarray) -> np.ndarray:
    """The largest of each pixel's 3 x 3 neighbourhood, over the last two axes."""
    for axis in (1, 2):
        padded = np.pad(x, [(0, 0) if a != axis else (1, 1) for a in range(3)])
        n = x.shape[axis]
        x = np.maximum(np.maximum(padded.take(range(n), axis), padded.take(range(2, n + 2), axis)), x)
    return x


def _fill(mask: np.ndarray) -> float:
    """The share of its bounding box that a mask fills."""
    y, x = np.nonzero(mask)
    return len(y) / ((np.ptp(y) + 1) * (np.ptp(x) + 1))


def _found(colour: str, mask: np.ndarray, frame: np.ndarray) -> Found:
    y, x = np.nonzero(mask)
    return Found(colour, float(x.mean()), float(y.mean()), len(x), shape_crop(mask, frame))


def shape_crop(mask: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """What a shape looks like, whatever its colour, place and size: [CROP, CROP] float32, 0 outside the object, its
    brightness relative to its own mean inside. mask [H, W] bool, frame [H, W, 3] uint8."""
    y, x = np.nonzero(mask)
    side = max(np.ptp(y), np.ptp(x)) + 1.0
    middle_y, middle_x = (y.min() + y.max()) / 2, (x.min() + x.max()) / 2
    steps = ((np.arange(CROP) + 0.5) / CROP - 0.5) * side
    light = frame.max(-1).astype(np.float32)
    light = np.where(mask, np.clip(light / light[mask].mean(), 0.3, 2.0), 0.0)
    return _sample(light, middle_y + steps, middle_x + steps).astype(np.float32)


def _sample(image: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """image [H, W] at rows x columns, bilinear, 0 outside."""
    padded = np.pad(image, 1)
    rows = np.clip(rows + 1, 0, padded.shape[0] - 1.001)
    columns = np.clip(columns + 1, 0, padded.shape[1] - 1.001)
    r, c = rows.astype(int), columns.astype(int)
    fr, fc = (rows - r)[:, None], (columns - c)[None]
    top = padded[np.ix_(r, c)] * (1 - fc) + padded[np.ix_(r, c + 1)] * fc
    low = padded[np.ix_(r + 1, c)] * (1 - fc) + padded[np.ix_(r + 1, c + 1)] * fc
    return top * (1 - fr) + low * fr


@dataclass(frozen=True)
class ShapeVotes:
    """Labelled crops. crops [n, CROP * CROP + 1] float32, shapes [n] index into SHAPES."""

    crops: np.ndarray
    shapes: np.ndarray

    @staticmethod
    def fit(examples: Iterable[tuple[Found, str]], size: float) -> "ShapeVotes":
        """From found objects and their true shapes, each also mirrored; `size`: side of the pictures in pixels.

        Raises:
            ValueError: no example, or a shape that is not one of `SHAPES`.
        """
        rows, shapes = [], []
        for item, shape in examples:
            if shape not in SHAPES:
                raise ValueError(f"shape {shape!r}; allowed are {', '.join(SHAPES)}")
            for crop in (item.crop, item.crop[:, ::-1]):
                rows.append(_features(crop, item.radius / size))
                shapes.append(SHAPES.index(shape))
        if not rows:
            raise ValueError("no example to fit on")
        return ShapeVotes(np.stack(rows), np.array(shapes))

    def vote(self, found: Found, size: float) -> np.ndarray:
        """The share of each of SHAPES among the nearest labelled crops, [3] float64."""
        distance = ((self.crops - _features(found.crop, found.radius / size)) ** 2).sum(1)
        count = min(NEIGHBOURS, len(distance))
        nearest = np.argpartition(distance, count - 1)[:count]
        return np.bincount(self.shapes[nearest], minlength=len(SHAPES)) / count


def _features(crop: np.ndarray, relative_radius: float) -> np.ndarray:
    """A crop as a row; the size in the picture goes with it: worlds differ in size and in the shapes they hold."""
    return np.append(crop.ravel(), np.float32(20 * relative_radius))
