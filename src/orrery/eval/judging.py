"""Judges a clip by its objects: where they are against truth, and whether what the caption names is there and moves so.

A caption names each object by one of six colours, once, so objects are matched by colour. Frames that were given to the
model are never counted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orrery.eval.objects import COLOURS, LEAST_AREA, SHAPES, Found, ShapeVotes, detect, scale_of

_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_MOVES = re.compile(
    rf"\b({'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)}) "
    r"(?:(?P<falls>falls)|(?:is thrown |rolls |slides )?to the (?P<side>left|right)|(?P<depth>away|closer))\b"
)
STARTED = 2.0  # pixels at 64 x 64: a sideways move has begun
FALLEN = 3.0  # pixels down that are a fall
SHIFTED = 1.0  # pixels up or down from first to last frame: pushed away or closer
MOVED = 3.0  # pixels that an object of the truth must travel for its direction to be asked about
WITHIN = np.cos(np.radians(45))


@dataclass(frozen=True)
class Phrase:
    """An object that a caption names. way: left, right, down, away, closer, or None where no direction is told."""

    colour: str
    shape: str
    way: str | None


@dataclass(frozen=True)
class Track:
    """One object over a clip: centre [T, 2] (x, y) pixels, nan where it is not seen; area [T] pixels."""

    centre: np.ndarray
    area: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """What the generated frames of one clip are worth; n objects, G generated frames.

    error [n, G] pixels between the centroids, or None without truth: nan where the truth does not show the object, half
    the picture's width where the truth shows it and the clip does not. radius [n, G] of the true object, pixels (of a
    disc of the area seen). count_right [G] bool: each object of the truth (without truth: of the caption) is there once
    and no other. count_kept: so over the clip, each colour by its most frequent number. colour_right, shape_right [n]
    bool. told: for each direction that the caption tells, whether the object goes there. went: for each object that
    moves in truth after the given frames, whether it goes within 45 degrees of there; empty without truth.
    """

    error: np.ndarray | None
    radius: np.ndarray | None
    count_right: np.ndarray
    count_kept: bool
    colour_right: np.ndarray
    shape_right: np.ndarray
    told: tuple[bool, ...]
    went: tuple[bool, ...]


def parse_caption(caption: str) -> tuple[Phrase, ...]:
    """The objects that a caption names, each once, in its order.

    >>> parse_caption("a red ball is thrown to the left and hits the blue cube, a blue cube is hit, plain look")
    (Phrase(colour='red', shape='ball', way='left'), Phrase(colour='blue', shape='cube', way=None))
    """
    ways = {m[1]: "down" if m["falls"] else m["side"] or m["depth"] for m in reversed([*_MOVES.finditer(caption)])}
    shapes = {m[1]: m[2] for m in _NAMED.finditer(caption)}
    return tuple(Phrase(colour, shape, ways.get(colour)) for colour, shape in shapes.items())


def true_tracks(segmentation: np.ndarray, colours: Mapping[int, str]) -> dict[str, Track]:
    """The tracks of objects by colour. segmentation [T, H, W]; colours: segmentation id -> colour. So few pixels that a
    detector may miss them count as not seen."""
    least = 2 * LEAST_AREA * scale_of(*segmentation.shape[1:]) ** 2
    y, x = np.indices(segmentation.shape[1:])
    tracks = {}
    for number, colour in colours.items():
        mask = segmentation == number
        area = mask.sum((1, 2))
        some = np.maximum(area, 1)
        centre = np.stack([(mask * x).sum((1, 2)) / some, (mask * y).sum((1, 2)) / some], -1)
        centre[area < least] = np.nan
        tracks[colour] = Track(centre, area)
    return tracks


def found_track(found: list[list[Found]], colour: str) -> Track:
    """The track of the largest object of a colour."""
    centre, area = np.full((len(found), 2), np.nan), np.zeros(len(found), int)
    for t, frame in enumerate(found):
        if first := next((item for item in frame if item.colour == colour), None):
            centre[t], area[t] = (first.x, first.y), first.area
    return Track(centre, area)


def judge(
    frames: np.ndarray, caption: str, votes: ShapeVotes, given: int = 0, truth: Mapping[str, Track] | None = None
) -> Verdict:
    """The verdict on a clip.

    Args:
        frames: [T, H, W, 3] uint8, the given ones first.
        caption: names objects in the words of our worlds.
        given: how many frames at the start were given.
        truth: tracks of T frames by colour for every object that the caption names (`true_tracks`), or None where the
            clip has no truth, as for text alone.

    Raises:
        ValueError: a caption without objects, a truth of other colours or of another length, no generated frame.
    """
    phrases, count = parse_caption(caption), len(frames)
    if not phrases:
        raise ValueError(f"the caption {caption!r} names no object; known are {', '.join(COLOURS)} {', '.join(SHAPES)}")
    if not 0 <= given < count:
        raise ValueError(f"given is {given} frames of {count}; allowed is 0 to {count - 1}")
    names = [phrase.colour for phrase in phrases]
    if truth is not None and (set(truth) != set(names) or any(len(track.area) != count for track in truth.values())):
        raise ValueError(f"truth has {sorted(truth)}, the caption {sorted(names)}; both need tracks of {count} frames")
    found = detect(frames)
    scale = scale_of(*frames.shape[1:3])
    tracks = {name: found_track(found, name) for name in names}
    seen = {name: _seen(truth[name], scale) if truth else np.ones((2, count), bool) for name in names}
    numbers = {c: np.array([sum(item.colour == c for item in frame) for frame in found])[given:] for c in COLOURS}
    colour_right = [bool(_most(numbers[n], seen[n][1, given:]) >= 1) for n in names]
    shape_right = [_shape(found[given:], p, votes, frames.shape[2]) for p in phrases]
    error = radius = None
    if truth is not None:
        error = np.stack([_distance(tracks[n], truth[n], frames.shape[2] / 2)[given:] for n in names])
        radius = np.stack([np.sqrt(truth[n].area[given:] / np.pi) for n in names])
    told = [_goes(tracks[p.colour].centre[max(given - 1, 0) :], p.way, scale) for p in phrases if p.way]
    went = [_follows(tracks[n], truth[n], given, scale) for n in names] if truth and given else []
    return Verdict(
        error=error,
        radius=radius,
        count_right=_count_right(numbers, seen, given),
        count_kept=all(
            _most(numbers[c], seen[c][1, given:]) == 1 if c in names else _most(numbers[c]) == 0 for c in COLOURS
        ),
        colour_right=np.array(colour_right),
        shape_right=np.array(shape_right),
        told=tuple(told),
        went=tuple(answer for answer in went if answer is not None),
    )


def _seen(track: Track, scale: float) -> np.ndarray:
    """[2, T] bool: may be seen (enough of it that a detector could tell), and must be seen (twice that)."""
    least = LEAST_AREA * scale**2
    return np.stack([track.area >= least / 2, track.area >= 2 * least])


def _count_right(numbers: dict[str, np.ndarray], seen: dict[str, np.ndarray], given: int) -> np.ndarray:
    right = np.ones(len(next(iter(numbers.values()))), bool)
    for colour, number in numbers.items():
        if colour in seen:
            may, must = seen[colour][:, given:]
            right &= (number == 1) & may | (number == 0) & ~must
        else:
            right &= number == 0
    return right


def _most(numbers: np.ndarray, where: np.ndarray | None = None) -> int:
    """The most frequent number, of the frames `where` if there are any."""
    chosen = numbers[where] if where is not None and where.any() else numbers
    return int(np.bincount(chosen).argmax())


def _shape(found: list[list[Found]], phrase: Phrase, votes: ShapeVotes, size: int) -> bool:
    """Whether the largest object of the phrase's colour has, over all frames, its shape."""
    firsts = [next((item for item in frame if item.colour == phrase.colour), None) for frame in found]
    shares = [votes.vote(item, size) for item in firsts if item is not None]
    return bool(shares) and SHAPES[int(np.sum(shares, axis=0).argmax())] == phrase.shape


def _distance(track: Track, truth: Track, missing: float) -> np.ndarray:
    """[T] pixels between the centres; `missing` where only the truth has one."""
    distance = np.linalg.norm(track.centre - truth.centre, axis=1)
    lost = np.isnan(track.centre[:, 0]) & ~np.isnan(truth.centre[:, 0])
    return np.where(lost, missing, distance)


def _goes(centre: np.ndarray, way: str, scale: float) -> bool:
    """Whether a track [T, 2] goes the way that a caption tells: left and right by where a sideways move begins, down by
    the lowest point, away and closer by the last."""
    centre = centre[~np.isnan(centre[:, 0])]
    if len(centre) < 2:
        return False
    x, y = (centre - centre[0]).T
    if way in ("left", "right"):
        begun = np.flatnonzero(np.abs(x) >= STARTED * scale)
        return bool(len(begun)) and bool((x[begun[0]] > 0) == (way == "right"))
    if way == "down":
        return bool(y.max() >= FALLEN * scale)
    return bool(y[-1] * (1 if way == "closer" else -1) >= SHIFTED * scale)


def _follows(track: Track, truth: Track, given: int, scale: float) -> bool | None:
    """Whether an object goes where the true one goes, asked where that is farthest from its last given place; None if
    that one stays, or is hidden then."""
    start = truth.centre[given - 1]
    path = truth.centre[given:] - start
    length = np.linalg.norm(path, axis=1)
    if np.isnan(length).all() or np.nanmax(length) < MOVED * scale:
        return None
    far = int(np.nanargmax(length))
    moved = track.centre[given + far] - start
    if np.isnan(moved).any() or not moved.any():
        return False
    return bool(moved @ path[far] >= WITHIN * np.linalg.norm(moved) * length[far])
