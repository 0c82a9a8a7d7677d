"""What is wrong with a dataset, and what is in it: findings, tallies, and the checks that all formats share."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from orrery.data.spans import VideoFacts, read_span, video_facts
from orrery.errors import InputError, one_line

Severity = Literal["error", "warning"]
SHORTEST = 5  # frames: a window is 4k + 1 frames, and one frame alone has no action
TOLERANCE = 1e-4  # seconds that lerobot lets a frame be away from its time
RANGE = 1e-3  # of a number's range: how far statistics may be off


@dataclass(frozen=True)
class Finding:
    """path: the file, from the dataset on. message: what is wrong, with the value. allowed: what would be right."""

    path: str
    severity: Severity
    message: str
    allowed: str = ""

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f"; allowed: {self.allowed}" if self.allowed else "")


@dataclass
class Numbers:
    """A running account of rows of numbers [N, A]: how many, least, most, sum and sum of squares."""

    count: int = 0
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    sum: Any = 0.0
    square: Any = 0.0

    def add(self, rows: np.ndarray) -> None:
        """Rows that hold something that is not finite are left out."""
        rows = rows[np.isfinite(rows).all(axis=1)]
        if not len(rows) or (self.low is not None and self.low.shape != rows.shape[1:]):
            return
        low, high = rows.min(0), rows.max(0)
        self.low = low if self.low is None else np.minimum(self.low, low)
        self.high = high if self.high is None else np.maximum(self.high, high)
        self.count, self.sum = self.count + len(rows), self.sum + rows.sum(0)
        self.square = self.square + np.square(rows).sum(0)

    @property
    def mean(self) -> np.ndarray:
        """[A]; of at least one row."""
        return self.sum / self.count

    @property
    def std(self) -> np.ndarray:
        """[A]; of at least one row."""
        return np.sqrt(np.maximum(self.square / self.count - np.square(self.mean), 0))


@dataclass(frozen=True)
class Shots:
    """An episode to look at: `take(n)` gives n frames spread over it."""

    id: str
    take: Callable[[int], np.ndarray]


@dataclass
class Survey:
    """A dataset as it was found to be. sizes: "HxW" and how many videos have it; lengths: frames of each episode."""

    root: Path
    format: str
    findings: list[Finding] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    fps: Counter[float] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    cameras: list[str] = field(default_factory=list)
    captions: Counter[str] = field(default_factory=Counter)
    action_names: tuple[str, ...] = ()
    actions: Numbers = field(default_factory=Numbers)
    shots: list[Shots] = field(default_factory=list)
    window: int | None = None
    decode: bool = False

    def error(self, path: Path, message: str, allowed: str = "") -> None:
        """Note what makes the dataset useless, or a part of it."""
        self._note("error", path, message, allowed)

    def warning(self, path: Path, message: str, allowed: str = "") -> None:
        """Note what is likely not meant."""
        self._note("warning", path, message, allowed)

    def _note(self, severity: Severity, path: Path, message: str, allowed: str) -> None:
        name = Path(path)
        name = name.relative_to(self.root) if name.is_relative_to(self.root) else name
        self.findings.append(Finding(name.as_posix(), severity, one_line(message), allowed))

    def tried(self, path: Path, act: Callable[[], Any]) -> Any:
        """What `act` returns; or None, and an error is noted."""
        try:
            return act()
        except InputError as error:
            self.error(path, str(error).replace(f"{self.root}/", ""))
        except Exception as error:  # a dataset of any sort of garbage is checked to its end
            self.error(path, f"cannot be read: {type(error).__name__} {error}")
        return None

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def hours(self) -> float:
        """Of video of one camera, at the commonest frame rate."""
        fps = self.fps.most_common(1)[0][0] if self.fps else 0.0
        return sum(self.lengths) / fps / 3600 if fps else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it but the pictures, as JSON values."""
        known = self.actions.low is not None
        columns = zip(self.action_names, self.actions.low, self.actions.mean, self.actions.high) if known else ()  # type: ignore[arg-type]
        return {
            "root": str(self.root),
            "format": self.format,
            "episodes": len(self.lengths),
            "frames": sum(self.lengths),
            "hours": self.hours,
            "shortest": min(self.lengths, default=0),
            "longest": max(self.lengths, default=0),
            "fps": sorted(self.fps),
            "sizes": dict(self.sizes),
            "cameras": self.cameras,
            "captions": len([caption for caption in self.captions if caption]),
            "actions": [dict(name=n, min=float(a), mean=float(b), max=float(c)) for n, a, b, c in columns],
            "errors": self.errors,
            "warnings": len(self.findings) - self.errors,
            "findings": [vars(finding) for finding in self.findings],
        }


def check_video(survey: Survey, path: Path, fps: float | None = None) -> VideoFacts | None:
    """Whether a video file can be read: its head, its packets, its first and last frame (all, if the survey decodes).

    Args:
        fps: which the dataset says it has.
    """
    facts: VideoFacts | None = survey.tried(path, lambda: video_facts(path))
    if facts is None:
        return None
    count = len(facts.times)
    survey.sizes[f"{facts.height}x{facts.width}"] += 1
    survey.fps[round(facts.fps, 3)] += 1
    if facts.promised and count < facts.promised:
        survey.error(path, f"breaks off: {count} frames of {facts.promised} that its head announces", "a whole file")
        return facts
    if not count:
        survey.error(path, "has no frame", "at least one")
        return None
    if fps and abs(facts.fps - fps) > 0.01 * fps:
        survey.error(path, f"has {facts.fps:g} frames a second, the dataset says {fps:g}", "the same")
    if facts.rotation % 360:
        survey.warning(path, f"is tagged to be turned by {facts.rotation} degrees", "upright frames: not all obey tags")
    gaps = np.diff(facts.times)
    if len(gaps) and facts.fps and np.abs(gaps - 1 / facts.fps).max() > 0.5 / facts.fps:
        worst = int(np.abs(gaps - 1 / facts.fps).argmax())
        survey.warning(path, f"frames {worst} and {worst + 1} are {gaps[worst]:.4g} s apart", f"{1 / facts.fps:.4g} s")
    if survey.decode:
        found = survey.tried(path, lambda: _decoded(path))
        if found is not None and found < count:
            survey.error(path, f"{found} of {count} frames can be decoded", "all")
    else:
        last = survey.tried(path, lambda: read_span(path, facts.fps or 1.0, float(facts.times[-1]), 1))
        if last is not None and not len(last):
            survey.error(path, "its last frame cannot be decoded", "a whole file")
    return facts


def _decoded(path: Path) -> int:
    import av

    try:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(container.streams.video[0]))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot be decoded to its end: {error.strerror}") from None


def add_shots(survey: Survey, name: str, path: Path, fps: float, start: float, count: int) -> None:
    """Remember an episode of `count` frames from `start` seconds on, to look at."""

    def take(number: int) -> np.ndarray:
        places = np.linspace(0, count - 1, number).round()
        found = [read_span(path, fps, start + place / fps, 1) for place in places]
        if not all(len(frame) for frame in found):
            raise InputError(f"{path}: a frame of {name} is missing")
        return np.concatenate(found)

    if count:
        survey.shots.append(Shots(name, take))


def check_length(survey: Survey, path: Path, name: str, frames: int) -> None:
    """Count an episode; whether it is too short to train on."""
    survey.lengths.append(frames)
    least = survey.window or SHORTEST
    if frames < least:
        survey.warning(path, f"{name} has {frames} frames", f"at least {least}, one window of 4k + 1")


def check_actions(survey: Survey, path: Path, name: str, rows: np.ndarray, counts: Sequence[int]) -> None:
    """Whether the actions [N, A] of an episode are finite, as wide as their names and as many as one of `counts`."""
    names = survey.action_names
    if rows.ndim != 2 or rows.shape[1] != len(names):
        survey.error(
            path, f"actions of {name} are {list(rows.shape)}", f"{len(names)} numbers a row: {', '.join(names)}"
        )
        return
    if len(rows) not in counts:
        survey.error(path, f"{name} has {len(rows)} rows of actions", " or ".join(map(str, counts)))
    if not np.isfinite(rows).all():
        row, column = np.argwhere(~np.isfinite(rows))[0]
        message = f"action {names[column]} of {name} is {rows[row, column]} in row {row}"
        more = int((~np.isfinite(rows)).sum()) - 1
        survey.error(path, message + (f", and {more} more" if more else ""), "finite numbers")
    survey.actions.add(rows.astype(np.float64))


def check_caption(survey: Survey, path: Path, name: str, caption: str) -> None:
    """Count a caption; whether it says something."""
    survey.captions[caption.strip()] += 1
    if not caption.strip():
        survey.warning(
            path, f"{name} has no text", "a sentence about it; without one a model learns from actions alone"
        )


def check_whole(survey: Survey) -> None:
    """What only the whole dataset shows: frame rates and sizes that differ, numbers of actions that never change."""
    root = survey.root
    if len(survey.fps) > 1:
        told = ", ".join(f"{rate:g} ({count} videos)" for rate, count in survey.fps.most_common(5))
        survey.error(root, f"frames a second differ: {told}", "one frame rate")
    if len(survey.sizes) > 1 and len(survey.cameras) < 2:
        told = ", ".join(f"{size} ({count} videos)" for size, count in survey.sizes.most_common(5))
        survey.warning(root, f"sizes differ: {told}", "one size; others are scaled to the model's")
    low, high = survey.actions.low, survey.actions.high
    if low is not None and high is not None and survey.actions.count > 1:
        for name, value in [(n, a) for n, a, b in zip(survey.action_names, low, high) if a == b]:
            survey.warning(root, f"action {name} is {value:g} in every row", "a number that changes, or none")
    if not survey.lengths:
        survey.error(root, "has no episode that can be read", "at least one")


def check_statistics(
    survey: Survey, path: Path, key: str, told: Mapping[str, np.ndarray], found: Numbers, names: Sequence[str]
) -> None:
    """Whether statistics of a dataset are those of its rows."""
    if found.low is None or found.high is None:
        return
    truth = {"min": found.low, "max": found.high, "mean": found.mean, "std": found.std}
    room = RANGE * np.maximum(found.high - found.low, 1e-6 + RANGE * np.abs(found.high))
    for name, values in truth.items():
        if told[name].reshape(-1).shape != values.shape:
            survey.error(path, f"{name} of {key} has {told[name].size} values", f"{len(values)}, one a number")
            continue
        off = np.abs(told[name].reshape(-1) - values) > room
        if off.any():
            place = int(np.argmax(off))
            message = (
                f"{name} of {key} {names[place]} is {told[name].reshape(-1)[place]:g}, its rows have {values[place]:g}"
            )
            (survey.error if name in ("min", "max") else survey.warning)(path, message, "statistics of these rows")
    if "count" in told and int(told["count"].sum()) != found.count:
        survey.warning(path, f"count of {key} is {int(told['count'].sum())}, there are {found.count} rows", "as many")
