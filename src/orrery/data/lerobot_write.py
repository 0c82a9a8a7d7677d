"""LeRobot datasets, written: format v3.0, which LeRobotDataset of lerobot 0.4 and later loads as it stands.

The layout is that of `lerobot`. Videos are H.264 with a keyframe every second frame, as LeRobot encodes them: whoever
trains a policy draws single frames. Where lerobot joins finished files, an episode here is encoded straight behind the
one before, with a keyframe at its first frame. The matrix of the colours is BT.601, unlike that of `Video.save`, and
tagged so: LeRobot's own files have it, and of its decoders one obeys tags and one takes BT.601 whatever they say.

Rows of `action`: LeRobot wants one a frame, the last too, where an episode of ours has one a step between frames. The
last is written twice. Zeros would be wrong as often as not: for a gripper or a joint that is told where to go, 0 is a
place to go to, and it would pull the statistics there.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace

from orrery.data import lerobot_stats
from orrery.data.episodes import Episodes
from orrery.data.lerobot import STATE, arrow
from orrery.errors import InputError
from orrery.files import atomic_folder
from orrery.video import BT709

CAMERA = "observation.images.main"
MARK = "meta/orrery.json"  # only a dataset that has it, one of ours, is ever replaced
FILES = "chunk-{chunk_index:03d}/file-{file_index:03d}"
SMALL = 128  # pixels: shorter sides keep colour at full resolution, at half they would lose things that are seen
BT601 = 6  # the code of its matrix (ITU-T H.273)
CHUNK, DATA_MB, VIDEO_MB = 1000, 100, 200  # files a chunk and megabytes a file, as lerobot has them
EPISODES_AT_ONCE = 500  # rows of metadata held in memory
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
CONVENTION = "row t of action is done at frame t; of an episode of T - 1 actions the last is repeated as row T"


@dataclass(frozen=True)
class Episode:
    """What is written of an episode.

    frames: [T, H, W, 3] uint8, or such a video a camera, by its key. actions: [T - 1, A], row t between frames t and
    t + 1; or [T, A]. text: what it is about. state: [T, S] of the robot at each frame.
    """

    frames: np.ndarray | Mapping[str, np.ndarray]
    actions: np.ndarray
    text: str = ""
    state: np.ndarray | None = None


class _VideoFiles:
    """The files of one camera; `add` encodes an episode and says where it stands."""

    def __init__(self, root: Path, key: str, fps: float, size: tuple[int, int], crf: int, limit: float) -> None:
        self.root, self.key, self.fps, self.size, self.limit = root, key, fps, size, limit
        plain = size[0] % 2 == 0 and size[1] % 2 == 0 and min(size) >= SMALL
        self.pixel_format = "yuv420p" if plain else "yuv444p"
        self.options = {
            "crf": str(crf),
            "preset": "medium",
            "g": "2",
            "bf": "0",
            "forced-idr": "1",
            "rc-lookahead": "0",
        }
        self.number, self.frames, self.bytes = -1, 0, 0
        self._container: Any = None
        self._stream: Any = None

    def add(self, frames: np.ndarray) -> dict[str, Any]:
        """Encode an episode; the columns that the metadata have for it."""
        if self._container is None or self.bytes >= self.limit:
            self.close()
            self._open()
        head, start = f"videos/{self.key}/", self.frames
        for place, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format=self.pixel_format, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
            )
            frame.pts, frame.time_base = self.frames, 1 / self._stream.codec_context.framerate
            frame.pict_type = PictureType.I if place == 0 else PictureType.NONE
            self._mux(self._stream.encode(frame))
            self.frames += 1
        where = {head + "chunk_index": self.number // CHUNK, head + "file_index": self.number % CHUNK}
        return where | {head + "from_timestamp": start / self.fps, head + "to_timestamp": self.frames / self.fps}

    def _mux(self, packets: list[Any]) -> None:
        self.bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def _open(self) -> None:
        self.number, self.frames, self.bytes = self.number + 1, 0, 0
        path = self.root / "videos" / self.key / (_file(self.number) + ".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"})
        rate = Fraction(self.fps).limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=rate, options=self.options)
        self._stream.height, self._stream.width = self.size
        self._stream.pix_fmt = self.pixel_format
        context = self._stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = BT601, BT709, BT709
        context.color_range = ColorRange.MPEG
        context.thread_count = 1  # with more, the same frames now and then made another file

    def close(self) -> None:
        """Finish the file that is being written."""
        if self._container is not None:
            self._mux(self._stream.encode())
            self._container.close()
            self._container = None

    def feature(self) -> dict[str, Any]:
        """What info.json says of this camera."""
        told = {"height": self.size[0], "width": self.size[1], "codec": "h264", "pix_fmt": self.pixel_format}
        info = {f"video.{name}": value for name, value in told.items()}
        info |= {"video.is_depth_map": False, "video.fps": round(self.fps), "video.channels": 3, "has_audio": False}
        return {"dtype": "video", "shape": [*self.size, 3], "names": ["height", "width", "channels"], "info": info}


class _Tables:
    """Parquet files of one kind; `add` appends a table to the one that is being written, a row group of its own."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit, self.number, self.size = folder, limit, -1, 0
        self._writer: Any = None

    def add(self, table: Any) -> int:
        """Append; the number of the file that it went into."""
        _, parquet = arrow()
        if self._writer is None or self.size >= self.limit:
            self.close()
            self.number, self.size = self.number + 1, 0
            path = self.folder / (_file(self.number) + ".parquet")
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = parquet.ParquetWriter(path, table.schema)
        self._writer.write_table(table)
        self.size += table.nbytes
        return self.number

    def close(self) -> None:
        """Finish the file that is being written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _file(number: int) -> str:
    return FILES.format(chunk_index=number // CHUNK, file_index=number % CHUNK)


class LeRobotWriter:
    """Writes episodes into a folder one by one: `add` each, then `finish`. `write_lerobot` does it whole or not at all.

    Args:
        root: an empty folder.
        fps: frames a second. action_names, state_names: of the numbers. robot_type: as LeRobot's users call it.
        crf: x264 quality, 0 to 51. data_mb, video_mb: a file that has reached that is followed by a new one.
    """

    def __init__(
        self,
        root: Path,
        fps: float,
        action_names: Sequence[str],
        robot_type: str = "unknown",
        state_names: Sequence[str] = (),
        crf: int = 18,
        data_mb: float = DATA_MB,
        video_mb: float = VIDEO_MB,
    ) -> None:
        if not 0 < fps < 1e6 or not action_names or not 0 <= crf <= 51:
            raise InputError(f"fps {fps}, crf {crf}, {len(action_names)} action names; allowed: above 0, 0 to 51, some")
        self.root, self.fps, self.robot_type, self.crf, self.video_mb = (
            Path(root),
            float(fps),
            robot_type,
            crf,
            video_mb,
        )
        self.names = {"action": list(action_names)} | ({STATE: list(state_names)} if state_names else {})
        self.tasks: dict[str, int] = {}
        self.episodes = self.frames = 0
        self._cameras: dict[str, _VideoFiles] = {}
        self._data = _Tables(self.root / "data", data_mb * 1e6)
        self._meta = _Tables(self.root / "meta/episodes", float("inf"))
        self._lines: list[dict[str, Any]] = []
        self._pool = lerobot_stats.Pool()

    def add(self, episode: Episode) -> None:
        """Write one more episode.

        Raises:
            InputError: lengths or sizes that do not agree, or not with the episodes before.
        """
        videos = episode.frames if isinstance(episode.frames, Mapping) else {CAMERA: episode.frames}
        length = self._check(videos)
        columns = {"action": self._rows(episode.actions, "action", length, (length, length - 1))}
        if STATE in self.names:
            columns[STATE] = self._rows(episode.state, STATE, length, (length,))
        task = self.tasks.setdefault(episode.text, len(self.tasks))
        place = np.arange(length)
        counters = (place / self.fps, place, np.full(length, self.episodes), self.frames + place, np.full(length, task))
        columns |= dict(zip(COUNTERS, counters, strict=True))
        statistics = {key: lerobot_stats.of_rows(rows) for key, rows in columns.items()}
        statistics |= {key: lerobot_stats.of_images(frames) for key, frames in videos.items()}
        line: dict[str, Any] = {"episode_index": self.episodes, "tasks": [episode.text], "length": length}
        file = self._data.add(self._table(columns))
        line |= {"data/chunk_index": file // CHUNK, "data/file_index": file % CHUNK}
        line |= {"dataset_from_index": self.frames, "dataset_to_index": self.frames + length}
        for key, frames in videos.items():
            line |= self._cameras[key].add(frames)
        line |= {f"stats/{key}/{name}": v.tolist() for key, one in statistics.items() for name, v in one.items()}
        self._lines.append(line | {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0})
        self._pool.add(statistics)
        self.episodes, self.frames = self.episodes + 1, self.frames + length
        if len(self._lines) == EPISODES_AT_ONCE:
            self._write_lines()

    def _check(self, videos: Mapping[str, np.ndarray]) -> int:
        """The number of frames."""
        for key, frames in videos.items():
            if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or min(frames.shape) < 1:
                raise InputError(f"{key}: frames are {frames.dtype} {list(frames.shape)}; allowed: uint8 [T, H, W, 3]")
            if "/" in key or not key:
                raise InputError(f"a camera is called {key!r}; allowed: a name without /")
        if not self._cameras:
            limit = self.video_mb * 1e6
            for key, frames in videos.items():
                self._cameras[key] = _VideoFiles(self.root, key, self.fps, frames.shape[1:3], self.crf, limit)
        sizes = {key: frames.shape[1:3] for key, frames in videos.items()}
        known = {key: camera.size for key, camera in self._cameras.items()}
        lengths = {len(frames) for frames in videos.values()}
        if sizes != known or len(lengths) != 1:
            raise InputError(
                f"episode {self.episodes} has {sizes} and {sorted(lengths)} frames; allowed: one length, and cameras "
                f"and sizes of the first episode, {known}"
            )
        return lengths.pop()

    def _rows(self, rows: np.ndarray | None, key: str, length: int, allowed: tuple[int, ...]) -> np.ndarray:
        """[T, A] float32."""
        width = len(self.names[key])
        values = np.zeros((0, 0), np.float32) if rows is None else np.asarray(rows, np.float32)
        if values.ndim != 2 or len(values) not in allowed or (values.shape[1] != width and len(values)):
            wanted = " or ".join(f"[{count}, {width}]" for count in allowed)
            raise InputError(f"episode {self.episodes}: {key} is {list(values.shape)}; allowed: {wanted}")
        if not np.isfinite(values).all():
            raise InputError(f"episode {self.episodes}: {key} holds NaN or infinity; allowed: finite numbers")
        if len(values) == length:
            return values
        return np.concatenate([values, values[-1:]]) if len(values) else np.zeros((length, width), np.float32)

    def _table(self, columns: Mapping[str, np.ndarray]) -> Any:
        pyarrow, _ = arrow()
        found = {}
        for key, values in columns.items():
            if values.ndim == 1:
                found[key] = pyarrow.array(values.astype(np.float32 if key == "timestamp" else np.int64))
            elif values.shape[1] == 1:  # lerobot has one number as a number, not as a list of one
                found[key] = pyarrow.array(values[:, 0])
            else:
                found[key] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1)), values.shape[1])
        return pyarrow.table(found)

    def _write_lines(self) -> None:
        if self._lines:
            pyarrow, _ = arrow()
            self._meta.add(pyarrow.Table.from_pylist(self._lines))
            self._lines = []

    def finish(self) -> None:
        """Close all files and write what is known only now.

        Raises:
            InputError: no episode was added.
        """
        if not self.episodes:
            raise InputError("no episodes to write; allowed: at least one")
        self._write_lines()
        self.close()
        self._write_tasks()
        features: dict[str, Any] = {key: camera.feature() for key, camera in self._cameras.items()}
        for key, names in sorted(self.names.items(), reverse=True):
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": names}
        for key in COUNTERS:
            dtype = "float32" if key == "timestamp" else "int64"
            features[key] = {"dtype": dtype, "shape": [1], "names": None}
        info = {
            "codebase_version": "v3.0",
            "robot_type": self.robot_type,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self.tasks),
            "chunks_size": CHUNK,
            "data_files_size_in_mb": DATA_MB,
            "video_files_size_in_mb": VIDEO_MB,
            "fps": int(self.fps) if self.fps == int(self.fps) else self.fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": f"data/{FILES}.parquet",
            "video_path": f"videos/{{video_key}}/{FILES}.mp4",
            "features": features,
        }
        statistics = self._pool.result()
        tree = {key: {name: v.tolist() for name, v in one.items()} for key, one in statistics.items()}
        for name, content in (("meta/info.json", info), ("meta/stats.json", tree), (MARK, {"action": CONVENTION})):
            (self.root / name).write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")

    def _write_tasks(self) -> None:
        """tasks.parquet is a pandas table whose index are the texts; which column that is, pandas' own metadata say."""
        pyarrow, parquet = arrow()
        table = pyarrow.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        kinds = (("task_index", "int64", "int64"), ("task", "unicode", "object"))
        columns = [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, kind, numpy in kinds
        ]
        pandas = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
        (self.root / "meta").mkdir(exist_ok=True)
        table = table.replace_schema_metadata({"pandas": json.dumps(pandas)})
        parquet.write_table(table, self.root / "meta/tasks.parquet")

    def close(self) -> None:
        """Close what is open."""
        for camera in self._cameras.values():
            camera.close()
        self._data.close()
        self._meta.close()


def write_lerobot(
    root: Path,
    episodes: Iterable[Episode],
    fps: float,
    action_names: Sequence[str],
    robot_type: str = "unknown",
    state_names: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> int:
    """Write a dataset, whole or not at all; returns how many episodes. `options` go to LeRobotWriter.

    Raises:
        InputError: no episode, some that do not fit each other, something that is not ours at `root`, a full disk.
    """
    arrow()
    with atomic_folder(root, MARK) as partial:
        writer = LeRobotWriter(partial, fps, action_names, robot_type, state_names, **options)
        try:
            for count, episode in enumerate(episodes, 1):
                writer.add(episode)
                if progress:
                    progress(count)
            writer.finish()
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error
        finally:
            writer.close()
    return writer.episodes


def to_write(episodes: Episodes, camera: str = CAMERA) -> Iterator[Episode]:
    """The episodes of a dataset one by one, with states, and an action for the last frame, where it has them."""
    state, actions = getattr(episodes, "state", None), getattr(episodes, "all_actions", episodes.actions)
    for index in range(len(episodes)):
        frames = {camera: episodes.frames(index)}
        yield Episode(frames, actions(index), episodes.text(index), state(index) if state else None)
