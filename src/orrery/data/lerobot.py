"""LeRobot datasets, read: format v3.0, where many episodes share a file, and v2.1 (and v2.0), where each has its own.

    meta/info.json                       frame rate, features and the patterns of the paths below
    v3.0  meta/tasks.parquet             text -> task_index
          meta/episodes/*/*.parquet      a row an episode: length, tasks, its files and where in them it stands
          data/*/file-XXX.parquet        a row a frame
          videos/KEY/*/file-XXX.mp4      episodes one behind the other; from_timestamp and to_timestamp tell them apart
    v2.1  meta/tasks.jsonl, meta/episodes.jsonl, meta/episodes_stats.jsonl
          data/*/episode_XXXXXX.parquet, videos/*/KEY/episode_XXXXXX.mp4

Row t of LeRobot's `action` is what is done at frame t, T rows for T frames. Here row t acts between frames t and t + 1:
the same rows without the last, whose effect was not filmed. Writing is in `lerobot_write`.
"""

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orrery.data.spans import read_span
from orrery.errors import InputError, one_line
from orrery.jsonfiles import read_text, short

VERSIONS = ("v3.0", "v2.1", "v2.0")
ACTIONS = ("action", "actions")  # the second is how openpi and its descendants call it
STATE = "observation.state"


def arrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        InputError: they are not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"LeRobot datasets need pyarrow: pip install 'orrery[datasets]' ({error})") from error
    return pyarrow, pyarrow.parquet


@dataclass(frozen=True)
class Span:
    """The part of a video file that is one episode: from `start` seconds to `end`, or to the end of the file."""

    path: Path
    start: float = 0.0
    end: float | None = None


@dataclass(frozen=True)
class Row:
    """What the metadata say of one episode. videos: a span a camera."""

    index: int
    length: int
    tasks: tuple[str, ...]
    data: Path
    videos: Mapping[str, Span] = field(default_factory=dict)


@dataclass(frozen=True)
class Info:
    """meta/info.json as far as it matters here. features: by key; episodes: how many there are to be."""

    root: Path
    version: str
    fps: float
    features: Mapping[str, Mapping[str, Any]]
    data_path: str
    video_path: str | None
    chunk: int
    episodes: int | None = None
    frames: int | None = None

    @property
    def cameras(self) -> list[str]:
        """Keys of videos and images, maps of depth last: who names none does not mean those."""
        keys = [key for key, feature in self.features.items() if feature.get("dtype") in ("video", "image")]
        return sorted(keys, key=self.is_depth)

    def is_depth(self, key: str) -> bool:
        """Whether a camera sees depth, not colours."""
        feature = self.features[key]
        more = feature.get("info") or feature.get("video_info") or {}
        return bool(more.get("video.is_depth_map") or more.get("is_depth_map"))

    def action_key(self) -> str:
        """Of the actions.

        Raises:
            InputError: there are none.
        """
        for key in ACTIONS:
            if key in self.features:
                return key
        raise InputError(f"{self.root}: no feature is named action or actions; it has {', '.join(self.features)}")

    def names(self, key: str) -> tuple[str, ...]:
        """Of the numbers of a feature: as the dataset names them; where it does not, KEY_0, KEY_1, ..."""
        feature = self.features[key]
        shape = feature.get("shape") or [1]
        count = int(np.prod(shape))
        told = feature.get("names")
        if isinstance(told, Mapping):
            lists = [value for value in told.values() if isinstance(value, list)]
            told = [name for names in lists for name in names] if lists else list(told)
        if isinstance(told, list) and len(told) == 1 and isinstance(told[0], list):
            told = told[0]
        if isinstance(told, list) and len(told) == count and len(set(map(str, told))) == count:
            return tuple(map(str, told))
        return tuple(f"{key}_{place}" for place in range(count))


def read_info(root: Path) -> Info:
    """meta/info.json.

    Raises:
        InputError: it is missing, broken, of another version, or lacks something.
    """
    root = Path(root)
    path = root / "meta/info.json"
    tree = _json(path, read_text(path))
    if not isinstance(tree, dict):
        raise InputError(f"{path} holds no object; allowed: the info of a LeRobot dataset")
    version = str(tree.get("codebase_version"))
    if version not in VERSIONS:
        raise InputError(f"{path}: codebase_version = {short(version)}; allowed are {', '.join(VERSIONS)}")
    fps, features = tree.get("fps"), tree.get("features")
    if not isinstance(fps, int | float) or isinstance(fps, bool) or not 0 < fps < 1e6:
        raise InputError(f"{path}: fps = {short(fps)}; allowed: a number above 0")
    if not isinstance(features, dict) or not all(isinstance(feature, dict) for feature in features.values()):
        raise InputError(f"{path}: features = {short(features)}; allowed: an object of objects, one a column")
    data, video, chunk = tree.get("data_path"), tree.get("video_path"), tree.get("chunks_size", 1000)
    if not isinstance(data, str) or not isinstance(video, str | None) or not isinstance(chunk, int) or chunk < 1:
        raise InputError(
            f"{path}: data_path = {short(data)}, video_path = {short(video)}, chunks_size = {short(chunk)}; allowed "
            "are patterns of paths and a whole number of at least 1"
        )
    counts = [tree.get(key) if isinstance(tree.get(key), int) else None for key in ("total_episodes", "total_frames")]
    return Info(root, version, float(fps), features, data, video, chunk, *counts)


def read_tasks(info: Info) -> dict[int, str]:
    """The texts by task_index.

    Raises:
        InputError: they are missing or broken.
    """
    if info.version != "v3.0":
        path = info.root / "meta/tasks.jsonl"
        return {int(line["task_index"]): str(line["task"]) for line in _lines(path, ("task_index", "task"))}
    path = info.root / "meta/tasks.parquet"
    rows = read_parquet(path).to_pylist()
    names = [key for key in ("task", "__index_level_0__") if rows and key in rows[0]]  # pandas' index, named or not
    if rows and (not names or "task_index" not in rows[0]):
        raise InputError(f"{path} has the columns {', '.join(rows[0])}; needed are task_index and task")
    return {int(row["task_index"]): str(row[names[0]]) for row in rows}


def read_rows(info: Info) -> list[Row]:
    """All episodes, in the order of their index.

    Raises:
        InputError: the metadata of episodes are missing or broken.
    """
    make = _row_v3 if info.version == "v3.0" else _row_v2
    rows = []
    for place, line in _episode_lines(info):
        try:
            rows.append(make(info, line))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise InputError(f"{place}: {one_line(error)} is missing or not what it is to be") from None
    return sorted(rows, key=lambda row: row.index)


def _episode_lines(info: Info) -> Iterable[tuple[str, dict[str, Any]]]:
    if info.version != "v3.0":
        path = info.root / "meta/episodes.jsonl"
        for number, line in enumerate(_lines(path, ("episode_index", "length")), 1):
            yield f"{path} line {number}", line
        return
    paths = sorted((info.root / "meta/episodes").glob("*/*.parquet"))
    if not paths:
        raise InputError(f"{info.root / 'meta/episodes'} holds no chunk-XXX/file-XXX.parquet")
    for path in paths:
        _, parquet = arrow()
        try:
            columns = [name for name in parquet.read_schema(path).names if not name.startswith("stats/")]
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path}: {one_line(error)}") from None
        for number, line in enumerate(read_parquet(path, columns).to_pylist()):
            yield f"{path} row {number}", line


def _row_v3(info: Info, line: dict[str, Any]) -> Row:
    data = info.data_path.format(chunk_index=line["data/chunk_index"], file_index=line["data/file_index"])
    videos = {}
    for key in info.cameras:
        if info.features[key]["dtype"] == "video":
            head = f"videos/{key}/"
            chunk, file = line[head + "chunk_index"], line[head + "file_index"]
            path = (info.video_path or "").format(video_key=key, chunk_index=int(chunk), file_index=int(file))
            start, end = float(line[head + "from_timestamp"]), float(line[head + "to_timestamp"])
            videos[key] = Span(info.root / path, start, end)
    tasks = tuple(map(str, line.get("tasks") or ()))
    return Row(int(line["episode_index"]), int(line["length"]), tasks, info.root / data, videos)


def _row_v2(info: Info, line: dict[str, Any]) -> Row:
    index = int(line["episode_index"])
    where = {"episode_chunk": index // info.chunk, "episode_index": index}
    cameras = [key for key in info.cameras if info.features[key]["dtype"] == "video"]
    videos = {key: Span(info.root / (info.video_path or "").format(video_key=key, **where)) for key in cameras}
    data = info.root / info.data_path.format(**where)
    return Row(index, int(line["length"]), tuple(map(str, line.get("tasks") or ())), data, videos)


def read_columns(info: Info, row: Row, columns: Iterable[str] | None = None) -> dict[str, Any]:
    """Columns of an episode's frames as arrow columns; of those that are asked for, the ones that are there.

    Raises:
        InputError: the file is missing or broken.
    """
    _, parquet = arrow()
    try:
        there = parquet.read_schema(row.data).names
        chosen = list(there if columns is None else [name for name in columns if name in there])
        only = [("episode_index", "==", row.index)] if "episode_index" in there and info.version == "v3.0" else None
        table = parquet.read_table(row.data, columns=chosen, filters=only)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {row.data}: {one_line(error)}") from None
    return {name: table.column(name) for name in chosen}


def as_matrix(column: Any, name: str) -> np.ndarray:
    """A column of numbers, or of lists of them of one length, as [N, A] float64.

    Raises:
        InputError: something else is in it.
    """
    try:
        values = column.to_numpy(zero_copy_only=False)
        if values.dtype == object:
            values = np.stack([np.asarray(cell, np.float64) for cell in values]) if len(values) else np.zeros((0, 1))
        values = values.astype(np.float64)
    except (TypeError, ValueError):
        raise InputError(f"column {name} ({column.type}) holds more than lists of numbers of one length") from None
    return values.reshape(len(values), -1)


def read_images(info: Info, row: Row, camera: str, start: int, stop: int) -> np.ndarray:
    """Frames `start` to `stop` of a camera whose images are in the table, [T, H, W, 3] uint8.

    Raises:
        InputError: too few of them, or one that cannot be decoded.
    """
    from PIL import Image

    column = read_columns(info, row, [camera]).get(camera)
    cells = [] if column is None else column.slice(start, stop - start).to_pylist()
    frames = []
    for place, cell in enumerate(cells, start):
        try:
            source = io.BytesIO(cell["bytes"]) if cell["bytes"] else info.root / cell["path"]
            with Image.open(source) as image:
                frames.append(np.asarray(image.convert("RGB")))
        except (OSError, ValueError, TypeError, KeyError, SyntaxError) as error:
            raise InputError(f"{row.data}: image {place} of {camera}: {one_line(error)}") from None
    if len(frames) < stop - start:
        raise InputError(f"{row.data}: {len(frames)} images of {camera}; needed are {stop - start}")
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"{row.data}: images of {camera} differ in size")
    return np.stack(frames)


def read_parquet(path: Path, columns: list[str] | None = None) -> Any:
    """A whole parquet file as an arrow table.

    Raises:
        InputError: it is missing or broken.
    """
    _, parquet = arrow()
    try:
        return parquet.read_table(path, columns=columns)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {one_line(error)}") from None


def _json(where: object, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {one_line(error)}") from None


def _lines(path: Path, needed: Iterable[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that have these keys."""
    found = []
    for number, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            line = _json(f"{path} line {number}", text)
            if not isinstance(line, dict) or any(key not in line for key in needed):
                raise InputError(f"{path} line {number}: {short(line)}; needed are the keys {', '.join(needed)}")
            found.append(line)
    return found


def choose_camera(info: Info, camera: str | None) -> str:
    """The key of a camera: the only one, or the one that is named by its key or the end of it (`front`).

    Raises:
        InputError: no camera, several and none named, or no such one.
    """
    cameras = info.cameras
    if camera is None:
        colours = [key for key in cameras if not info.is_depth(key)]
        found = colours if len(colours) == 1 else []
    else:
        found = [key for key in cameras if key == camera] or [key for key in cameras if key.endswith(f".{camera}")]
    if len(found) != 1:
        asked = "no camera chosen" if camera is None else f"no single camera {camera!r}"
        raise InputError(f"{info.root}: {asked}; allowed are {', '.join(cameras) or 'none, for it has none'}")
    return found[0]


class LeRobotEpisodes:
    """A LeRobot dataset on disk as `Episodes`.

    Args:
        root: the folder that holds meta/info.json.
        camera: the key of a video or image feature, or its last part; may be left out where there is one.

    statistics: of each feature, {"min", "max", "mean", "std", "count", ...}; empty where the dataset has none.

    Raises:
        InputError: no dataset of a version that is known, broken metadata, no such camera, no actions.
    """

    def __init__(self, root: Path, camera: str | None = None) -> None:
        from orrery.data.lerobot_stats import read_statistics

        self.root = Path(root)
        self.info = read_info(self.root)
        self.camera = choose_camera(self.info, camera)
        self.action_key = self.info.action_key()
        self.action_names = self.info.names(self.action_key)
        self.state_names = self.info.names(STATE) if STATE in self.info.features else ()
        self.fps = self.info.fps
        self.rows = read_rows(self.info)
        if not self.rows:
            raise InputError(f"{self.root} has no episode")
        self.tasks = read_tasks(self.info)
        self.statistics = read_statistics(self.info)
        self.ids = [f"episode_{row.index:06d}" for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def frames(self, index: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Frames `start` to `stop` of an episode (default all), [T, H, W, 3] uint8; nothing else is decoded, save what
        stands between the keyframe before and the first of them.

        Raises:
            InputError: the file is missing, broken, or shorter than the metadata say.
        """
        row = self.rows[index]
        stop = row.length if stop is None else min(stop, row.length)
        if not 0 <= start < stop:
            raise InputError(f"frames {start} to {stop} of {row.length}; allowed: at least one of them")
        if self.info.features[self.camera]["dtype"] == "image":
            return read_images(self.info, row, self.camera, start, stop)
        span = row.videos[self.camera]
        frames = read_span(span.path, self.fps, span.start + start / self.fps, stop - start, span.end)
        if len(frames) < stop - start:
            raise InputError(
                f"{span.path}: {self.ids[index]} is to have {row.length} frames from {span.start:g} s on; "
                f"of {stop - start} that were asked for there are {len(frames)}"
            )
        return frames

    def actions(self, index: int) -> np.ndarray:
        """[T - 1, A] float32; the row of the last frame, whose effect was not filmed, is left out."""
        return self.all_actions(index)[:-1]

    def all_actions(self, index: int) -> np.ndarray:
        """[T, A] float32, as the dataset has them."""
        return self._matrix(index, self.action_key, len(self.action_names))

    def state(self, index: int) -> np.ndarray | None:
        """[T, S] float32, `observation.state`; None where the dataset has none."""
        return self._matrix(index, STATE, len(self.state_names)) if self.state_names else None

    def _matrix(self, index: int, key: str, width: int) -> np.ndarray:
        row = self.rows[index]
        columns = read_columns(self.info, row, [key])
        if key not in columns:
            raise InputError(f"{row.data} has no column {key}")
        try:
            values = as_matrix(columns[key], key)
        except InputError as error:
            raise InputError(f"{row.data}: {error}") from None
        if values.shape != (row.length, width):
            raise InputError(
                f"{row.data}: {key} of {self.ids[index]} is {list(values.shape)}; by the metadata it is to be "
                f"{[row.length, width]}"
            )
        return values.astype(np.float32)

    def text(self, index: int) -> str:
        """The episode's tasks, "; " between them."""
        row = self.rows[index]
        if row.tasks:
            return "; ".join(row.tasks)
        column = read_columns(self.info, row, ["task_index"]).get("task_index")
        numbers = dict.fromkeys([] if column is None else column.to_pylist())
        return "; ".join(self.tasks[number] for number in numbers if number in self.tasks)
