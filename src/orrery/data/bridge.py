"""Folders in the layout of the official action-conditioned code (Bridge): read, and written.

    annotation/{train,val,test}/*.json   state [N, >= 6] (x y z, roll pitch yaw), continuous_gripper_state [N],
                                         videos[camera].video_path (from the folder on), episode_id, texts
    videos/...                           of N frames

An action is the motion from one frame to the next, seen from the end effector before it: R'(p_next - p), then roll,
pitch and yaw of R'R_next, and then the gripper as it is after it. R = Rz(yaw) Ry(pitch) Rx(roll). The factor 20 of the
published model is not in it: that is the model's (`ActionConfig.scale`).
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from orrery.data.episodes import Episodes
from orrery.data.spans import read_span, video_facts
from orrery.errors import InputError, one_line
from orrery.files import atomic_folder
from orrery.jsonfiles import read_text, short
from orrery.video import Video

SPLITS = ("train", "val", "test")
ACTION_NAMES = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
MARK = "orrery.json"  # only a folder that has it, one of ours, is ever replaced
STRAIGHT_UP = 1e-6  # cosine of the pitch below which roll and yaw are one angle


def rotation(rpy: np.ndarray) -> np.ndarray:
    """[..., 3, 3] of roll, pitch and yaw [..., 3] in radians: Rz(yaw) Ry(pitch) Rx(roll)."""
    (sr, sp, sy), (cr, cp, cy) = np.moveaxis(np.sin(rpy), -1, 0), np.moveaxis(np.cos(rpy), -1, 0)
    rows = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def angles(matrix: np.ndarray) -> np.ndarray:
    """Roll, pitch and yaw [..., 3] of rotations [..., 3, 3], the inverse of `rotation`; where the pitch is a right
    angle only the sum or difference of roll and yaw is known, and yaw is taken to be 0."""
    cosine = np.hypot(matrix[..., 0, 0], matrix[..., 1, 0])
    upright = cosine < STRAIGHT_UP
    roll = np.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    roll = np.where(upright, np.arctan2(-matrix[..., 1, 2], matrix[..., 1, 1]), roll)
    yaw = np.where(upright, 0.0, np.arctan2(matrix[..., 1, 0], matrix[..., 0, 0]))
    return np.stack([roll, np.arctan2(-matrix[..., 2, 0], cosine), yaw], -1)


def relative_actions(state: np.ndarray, gripper: np.ndarray) -> np.ndarray:
    """Actions [N - 1, 7] between poses `state` [N, >= 6], with the gripper [N] as it is after each.

    Raises:
        InputError: other shapes, or something that is not finite.
    """
    state, gripper = np.asarray(state, np.float64), np.asarray(gripper, np.float64)
    if state.ndim != 2 or state.shape[1] < 6 or gripper.shape != state.shape[:1]:
        raise InputError(f"state is {list(state.shape)}, gripper {list(gripper.shape)}; allowed are [N, >= 6] and [N]")
    if not (np.isfinite(state[:, :6]).all() and np.isfinite(gripper).all()):
        raise InputError("state or gripper hold NaN or infinity; allowed: finite numbers")
    turned = rotation(state[:, 3:6])
    back = np.swapaxes(turned[:-1], -1, -2)
    moved = (back @ np.diff(state[:, :3], axis=0)[..., None])[..., 0]
    return np.concatenate([moved, angles(back @ turned[1:]), gripper[1:, None]], axis=1)


def integrate(actions: np.ndarray, start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Poses [N, 6] and gripper [N] that have these `relative_actions` [N - 1, 7], from a pose [6] (default: zero) on.

    The gripper's first value is in no action; it is that of the second.
    """
    actions = np.asarray(actions, np.float64)
    if actions.ndim != 2 or actions.shape[1] != 7:
        raise InputError(f"actions are {list(actions.shape)}; allowed: [N - 1, 7]")
    place, turned = np.zeros(3), np.eye(3)
    if start is not None:
        place, turned = np.asarray(start, np.float64)[:3], rotation(np.asarray(start, np.float64)[3:6])
    poses = [np.concatenate([place, angles(turned)])]
    for action in actions:
        place = place + turned @ action[:3]
        turned = turned @ rotation(action[3:6])
        poses.append(np.concatenate([place, angles(turned)]))
    gripper = np.concatenate([actions[:1, 6], actions[:, 6]]) if len(actions) else np.zeros(1)
    return np.array(poses), gripper


@dataclass(frozen=True)
class Annotation:
    """One file of annotation/. state: [N, >= 6]; gripper: [N]; videos: path by camera."""

    path: Path
    id: str
    state: np.ndarray
    gripper: np.ndarray
    videos: Mapping[str, Path]
    text: str


def read_annotation(path: Path, root: Path) -> Annotation:
    """Raises:
    InputError: no JSON, a key is missing, or something is not what it is to be.
    """
    text = read_text(path)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {one_line(error)}") from None
    needed = ("state", "continuous_gripper_state", "videos")
    if not isinstance(tree, dict) or any(key not in tree for key in needed):
        lacking = [key for key in needed if not isinstance(tree, dict) or key not in tree]
        raise InputError(f"{path} lacks {', '.join(lacking)}; needed are {', '.join(needed)}")
    try:
        state = np.asarray(tree["state"], np.float64)
        gripper = np.asarray(tree["continuous_gripper_state"], np.float64)
        gripper = gripper[:, 0] if gripper.ndim == 2 and gripper.shape[1] == 1 else gripper
    except (TypeError, ValueError):
        raise InputError(f"{path}: state or continuous_gripper_state are no numbers, a row a frame") from None
    if state.ndim != 2 or state.shape[1] < 6 or gripper.shape != state.shape[:1] or not len(state):
        raise InputError(
            f"{path}: state is {list(state.shape)}, continuous_gripper_state {list(gripper.shape)}; allowed are "
            "[N, >= 6] and [N]"
        )
    told = tree.get("texts", tree.get("text", ""))
    told = told[0] if isinstance(told, list) and told else told
    name = tree.get("episode_id", path.stem)
    return Annotation(path, str(name), state, gripper, _videos(tree["videos"], path, root), str(told or ""))


def _videos(told: Any, path: Path, root: Path) -> dict[str, Path]:
    """By camera: the number in the list, or the key."""
    pairs = told.items() if isinstance(told, dict) else enumerate(told) if isinstance(told, list) else ()
    videos = {}
    for name, video in pairs:
        place = video.get("video_path") if isinstance(video, dict) else video
        if not isinstance(place, str):
            raise InputError(f"{path}: videos[{name!r}] = {short(video)}; needed is video_path, a path from {root} on")
        videos[str(name)] = root / place
    if not videos:
        raise InputError(f"{path}: videos = {short(told)}; allowed: at least one video_path")
    return videos


def annotation_files(root: Path, split: str) -> list[Path]:
    """The files of a split; episode 2 comes before episode 10."""
    return sorted((Path(root) / "annotation" / split).glob("*.json"), key=lambda path: (len(path.stem), path.stem))


class BridgeEpisodes:
    """A Bridge folder as `Episodes`.

    Args:
        root: the folder that holds annotation/.
        split: train, val or test; default: the first that is there.
        camera: number, or name, of the video in each annotation; may be left out where there is one.

    Raises:
        InputError: no such split, or camera; no annotation that can be read.
    """

    action_names: tuple[str, ...] = ACTION_NAMES
    state_names: tuple[str, ...] = ACTION_NAMES

    def __init__(self, root: Path, split: str | None = None, camera: str | int | None = None) -> None:
        self.root = Path(root)
        if split is not None and split not in SPLITS:
            raise InputError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
        there = [name for name in SPLITS if annotation_files(self.root, name)]
        if not there or split not in (None, *there):
            raise InputError(
                f"{self.root / 'annotation'} has no {split or 'split'}; there: {', '.join(there) or 'none'}"
            )
        self.split = split or there[0]
        self.files = annotation_files(self.root, self.split)
        first = read_annotation(self.files[0], self.root)
        if camera is None and len(first.videos) > 1:
            raise InputError(f"{self.root}: no camera chosen; allowed are {', '.join(first.videos)}")
        self.camera = next(iter(first.videos)) if camera is None else str(camera)
        self.fps = video_facts(self._video(first)).fps
        self.ids = [path.stem for path in self.files]

    def _video(self, annotation: Annotation) -> Path:
        if self.camera not in annotation.videos:
            raise InputError(f"{annotation.path}: no camera {self.camera}; allowed are {', '.join(annotation.videos)}")
        return annotation.videos[self.camera]

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, index: int) -> Annotation:
        return read_annotation(self.files[index], self.root)

    def frames(self, index: int) -> np.ndarray:
        """[T, H, W, 3] uint8.

        Raises:
            InputError: the video is missing, broken, or shorter than the states.
        """
        annotation = self._read(index)
        path, count = self._video(annotation), len(annotation.state)
        frames = read_span(path, self.fps, count=count)
        if len(frames) < count:
            raise InputError(f"{path} has {len(frames)} frames, {annotation.path} has {count} states; allowed: as many")
        return frames

    def actions(self, index: int) -> np.ndarray:
        """[T - 1, 7] float32; see `relative_actions`."""
        annotation = self._read(index)
        try:
            return relative_actions(annotation.state, annotation.gripper).astype(np.float32)
        except InputError as error:
            raise InputError(f"{annotation.path}: {error}") from None

    def state(self, index: int) -> np.ndarray:
        """[T, 7] float32: pose and gripper."""
        annotation = self._read(index)
        return np.concatenate([annotation.state[:, :6], annotation.gripper[:, None]], axis=1).astype(np.float32)

    def text(self, index: int) -> str:
        """What the annotation says of it; the published ones may say nothing."""
        return self._read(index).text


@dataclass(frozen=True)
class Trajectory:
    """What is written of an episode: frames [T, H, W, 3] uint8, poses [T, 6], gripper [T], text and a name."""

    frames: np.ndarray
    state: np.ndarray
    gripper: np.ndarray
    text: str = ""
    name: str = ""


def write_bridge(
    root: Path,
    episodes: Iterable[Trajectory],
    fps: float,
    split: str = "train",
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write a folder with one split, whole or not at all; returns how many episodes.

    Raises:
        InputError: no episode, lengths that do not agree, something that is not ours at `root`, a full disk.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; allowed are {', '.join(SPLITS)}")
    count = 0
    with atomic_folder(root, MARK) as folder:
        (folder / "annotation" / split).mkdir(parents=True)
        for episode in episodes:
            actions = relative_actions(episode.state, episode.gripper)
            if len(episode.frames) != len(episode.state):
                raise InputError(
                    f"episode {count}: {len(episode.frames)} frames, {len(episode.state)} states; allowed: as many"
                )
            video = Path("videos") / split / str(count) / "rgb.mp4"
            (folder / video).parent.mkdir(parents=True)
            even = episode.frames.shape[1] % 2 == 0 and episode.frames.shape[2] % 2 == 0
            Video(episode.frames, fps).save(folder / video, pixel_format="yuv420p" if even else "yuv444p")
            tree = {
                "task": "robot_trajectory_prediction",
                "texts": [episode.text],
                "videos": [{"video_path": video.as_posix()}],
                "action": actions.tolist(),
                "state": np.asarray(episode.state, np.float64)[:, :6].tolist(),
                "continuous_gripper_state": np.asarray(episode.gripper, np.float64).tolist(),
                "episode_id": episode.name or str(count),
            }
            path = folder / "annotation" / split / f"{count}.json"
            path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
            count += 1
            if progress:
                progress(count)
        if not count:
            raise InputError("no episodes to write; allowed: at least one")
        (folder / MARK).write_text(json.dumps({"format": "bridge", "fps": fps}) + "\n", encoding="utf-8")
    return count


def to_write(episodes: Episodes) -> Iterator[Trajectory]:
    """The episodes of a dataset whose actions are those of this format, one by one. Where it has no states of pose and
    gripper, they are put together out of the actions, from zero on.

    Raises:
        InputError: its actions are others.
    """
    if tuple(episodes.action_names) != ACTION_NAMES:
        raise InputError(
            f"the actions are {', '.join(episodes.action_names)}; a Bridge folder takes {', '.join(ACTION_NAMES)}, "
            "motion of the end effector in its own frame before it; for others there is LeRobot's format"
        )
    names: Sequence[str] = getattr(episodes, "state_names", ())
    for index in range(len(episodes)):
        if tuple(names) == ACTION_NAMES:
            told = np.asarray(episodes.state(index), np.float64)  # type: ignore[attr-defined]
            state, gripper = told[:, :6], told[:, 6]
        else:
            state, gripper = integrate(episodes.actions(index))
        yield Trajectory(episodes.frames(index), state, gripper, episodes.text(index), episodes.ids[index])
