"""Checks of LeRobot datasets: metadata, tables, videos and statistics against each other."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orrery.data import findings
from orrery.data.findings import TOLERANCE, Numbers, Shots, Survey
from orrery.data.lerobot import (
    STATE,
    Info,
    Row,
    Span,
    arrow,
    as_matrix,
    read_columns,
    read_images,
    read_info,
    read_rows,
    read_tasks,
)
from orrery.data.lerobot_stats import read_statistics
from orrery.data.spans import VideoFacts

MOST_NAMED = 3  # files of which a finding about many gives the names


def check_lerobot(survey: Survey, progress: Callable[[int, int], None]) -> None:
    """All checks of a dataset with meta/info.json."""
    arrow()
    root = survey.root
    info: Info | None = survey.tried(root / "meta/info.json", lambda: read_info(root))
    if info is None:
        return
    survey.format, survey.cameras = f"LeRobot {info.version}", info.cameras
    kind = "parquet" if info.version == "v3.0" else "jsonl"
    tasks = survey.tried(root / f"meta/tasks.{kind}", lambda: read_tasks(info))
    episodes = root / ("meta/episodes" if kind == "parquet" else "meta/episodes.jsonl")
    rows: list[Row] = survey.tried(episodes, lambda: read_rows(info)) or []
    key: str | None = survey.tried(root / "meta/info.json", info.action_key)
    survey.action_names = info.names(key) if key else ()
    if not info.cameras:
        survey.error(root / "meta/info.json", "no feature is a video or images", "at least one camera")
    _check_metadata(survey, info, rows, episodes)
    spans = [(camera, row, span) for row in rows for camera, span in row.videos.items()]
    paths = {span.path: camera for camera, _, span in spans}
    facts: dict[Path, VideoFacts | None] = {}
    total = len(paths) + len(rows)
    for path, camera in paths.items():
        facts[path] = _check_file(survey, info, path, camera)
        progress(len(facts), total)
    states = Numbers()
    index = 0
    for done, row in enumerate(rows, 1):
        _check_row(survey, info, row, key, tasks, states, index)
        for camera, span in row.videos.items():
            _check_span(survey, info, row, span, facts[span.path], camera == info.cameras[0])
        index += row.length
        progress(len(paths) + done, total)
    _check_statistics(survey, info, key, states, index)
    _check_strays(survey, {row.data for row in rows} | set(paths))


def _check_metadata(survey: Survey, info: Info, rows: list[Row], path: Path) -> None:
    for number, count in Counter(row.index for row in rows).items():
        if count > 1:
            survey.error(path, f"episode_index {number} is there {count} times", "once")
    numbers = sorted({row.index for row in rows})
    if rows and numbers != list(range(len(numbers))):
        gap = next(place for place, number in enumerate(numbers) if place != number)
        survey.error(path, f"there is no episode_index {gap}", "0, 1, 2, ...: lerobot counts on it")
    known = (("total_episodes", info.episodes, len(rows)), ("total_frames", info.frames, sum(r.length for r in rows)))
    for name, told, found in known:
        if told is not None and told != found:
            survey.error(
                info.root / "meta/info.json", f"{name} is {told}, the episodes' metadata have {found}", "as many"
            )


def _check_file(survey: Survey, info: Info, path: Path, camera: str) -> VideoFacts | None:
    facts = findings.check_video(survey, path, info.fps)
    shape = info.features[camera].get("shape") or []
    if facts and not {facts.height, facts.width} <= set(shape):
        survey.error(path, f"frames are {facts.height}x{facts.width}, info.json has {camera} {list(shape)}", "the same")
    return facts


def _check_span(survey: Survey, info: Info, row: Row, span: Span, facts: VideoFacts | None, first: bool) -> None:
    """Whether an episode's frames are in its file, at their times."""
    if facts is None:
        return
    name, half = f"episode {row.index}", 0.5 / info.fps
    until = np.inf if span.end is None else span.end - half
    times = facts.times[(facts.times >= span.start - half) & (facts.times < until)]
    where = "" if span.end is None else f" from {span.start:.3f} to {span.end:.3f} s"
    if len(times) < row.length:
        survey.error(span.path, f"{name} has {len(times)} frames{where}, its table {row.length} rows", "as many")
        return
    if len(times) > row.length:
        survey.warning(span.path, f"{name} has {len(times)} frames{where}, its table {row.length} rows", "as many")
    away = np.abs(times[: row.length] - span.start - np.arange(row.length) / info.fps)
    if len(away) and away.max() > TOLERANCE:
        place = int(away.argmax())
        message = f"frame {place} of {name} is {away[place]:.4g} s away from its time"
        survey.warning(span.path, message, f"{TOLERANCE:g} s: lerobot refuses it otherwise")
    if first:
        findings.add_shots(survey, name, span.path, info.fps, span.start, row.length)


def _check_row(
    survey: Survey,
    info: Info,
    row: Row,
    key: str | None,
    tasks: Mapping[int, str] | None,
    states: Numbers,
    index: int,
) -> None:
    """An episode's rows: how many, actions, counters, times, images. index: that its first row should have."""
    name = f"episode {row.index}"
    findings.check_length(survey, row.data, name, row.length)
    wanted = [key, STATE, "timestamp", "frame_index", "episode_index", "index", "task_index"]
    columns = survey.tried(row.data, lambda: read_columns(info, row, [name for name in wanted if name]))
    if columns is None:
        return
    lacking = [column for column in wanted if column and column != STATE and column not in columns]
    if lacking:
        survey.error(row.data, f"lacks the columns {', '.join(lacking)}", "all that info.json has")
    count = max((len(column) for column in columns.values()), default=0)
    if count != row.length:
        survey.error(row.data, f"{name} has {count} rows, its metadata say {row.length}", "as many")
    if key in columns:
        actions = survey.tried(row.data, lambda: as_matrix(columns[key], str(key)))
        if actions is not None and len(actions):
            findings.check_actions(survey, row.data, name, actions, (count,))
    if STATE in columns and (state := survey.tried(row.data, lambda: as_matrix(columns[STATE], STATE))) is not None:
        if not np.isfinite(state).all():
            survey.error(row.data, f"{STATE} of {name} holds NaN or infinity", "finite numbers")
        states.add(state)
    numbers = _counters(survey, row, {name: columns[name] for name in columns if name not in (key, STATE)})
    if count:
        _check_counters(survey, info, row, numbers, index)
    used = [int(number) for number in np.unique(_finite(numbers.get("task_index")))]
    for number in used:
        if tasks is not None and number not in tasks:
            survey.error(row.data, f"{name} has task_index {number}, which has no text", "one of meta/tasks")
    texts = [(tasks or {}).get(number, "") for number in used]
    findings.check_caption(survey, row.data, name, "; ".join(row.tasks or texts))
    for camera in info.cameras:
        if info.features[camera]["dtype"] == "image":
            _check_images(survey, info, row, camera)


def _counters(survey: Survey, row: Row, columns: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """Columns of one number a row, [N] each; None where there is something else."""

    def numbers(name: str) -> np.ndarray:
        return as_matrix(columns[name], name)[:, 0]

    return {name: survey.tried(row.data, partial(numbers, name)) for name in columns}


def _finite(values: np.ndarray | None) -> np.ndarray:
    return np.zeros(0) if values is None else values[np.isfinite(values)]


def _check_counters(survey: Survey, info: Info, row: Row, numbers: Mapping[str, Any], index: int) -> None:
    """timestamp, frame_index, episode_index and index of an episode."""
    name = f"episode {row.index}"
    times = numbers.get("timestamp")
    if times is not None and len(times):
        steps = np.diff(times)
        away = np.abs(times - np.arange(len(times)) / info.fps)
        if not np.isfinite(times).all() or (steps <= 0).any():
            place = int(np.argmax(~(steps > 0))) if len(steps) else 0
            survey.error(
                row.data, f"timestamp of {name} does not grow after row {place}", f"steps of {1 / info.fps:.4g} s"
            )
        elif away.max() > TOLERANCE + 1e-6 * times.max():
            place = int(away.argmax())
            message = f"timestamp of {name} is {times[place]:.6g} in row {place}"
            survey.warning(row.data, message, f"{place / info.fps:.6g} at {info.fps:g} frames a second")
    count = max((len(column) for column in numbers.values() if column is not None), default=0)
    truth = {
        "frame_index": np.arange(count),
        "episode_index": np.full(count, row.index),
        "index": index + np.arange(count),
    }
    for column, right in truth.items():
        values = numbers.get(column)
        if values is not None and len(values) == count and (values != right).any():
            place = int(np.argmax(values != right))
            note = survey.warning if column == "index" else survey.error
            note(row.data, f"{column} of {name} is {values[place]:g} in row {place}", f"{right[place]}")


def _check_images(survey: Survey, info: Info, row: Row, camera: str) -> None:
    """The first and the last image of an episode (all, if the survey decodes)."""
    last = max(row.length - 1, 0)
    parts = [(0, row.length)] if survey.decode else [(0, 1), (last, last + 1)]
    for start, stop in parts if row.length else ():
        frames = survey.tried(row.data, lambda a=start, b=stop: read_images(info, row, camera, a, b))  # type: ignore[misc]
        if frames is None:
            return
    survey.sizes["x".join(map(str, frames.shape[1:3]))] += 1
    survey.fps[round(info.fps, 3)] += 1
    if camera == info.cameras[0]:

        def take(number: int) -> np.ndarray:
            places = np.linspace(0, row.length - 1, number).round().astype(int)
            return np.concatenate([read_images(info, row, camera, place, place + 1) for place in places])

        survey.shots.append(Shots(f"episode {row.index}", take))


def _check_statistics(survey: Survey, info: Info, key: str | None, states: Numbers, total: int) -> None:
    """Statistics against the rows; not where some of the `total` rows could not be read."""
    path = info.root / ("meta/episodes_stats.jsonl" if info.version == "v2.1" else "meta/stats.json")
    statistics = survey.tried(path, lambda: read_statistics(info))
    if statistics is None:
        return
    for name, found in ((key, survey.actions), (STATE, states)):
        if name and found.count and name not in statistics:
            survey.warning(path, f"there are no statistics of {name}", "min, max, mean and std of every feature")
        elif name and found.count == total:
            findings.check_statistics(survey, path, name, statistics[name], found, info.names(name))


def _check_strays(survey: Survey, known: set[Path]) -> None:
    """Tables and videos that belong to no episode."""
    root = survey.root
    files = [*root.glob("data/**/*.parquet"), *root.glob("videos/**/*.mp4")]
    strays = sorted(path for path in files if path not in known)
    if strays:
        more = f" and {len(strays) - MOST_NAMED} more" if len(strays) > MOST_NAMED else ""
        names = ", ".join(path.relative_to(root).as_posix() for path in strays[:MOST_NAMED])
        survey.warning(root, f"{names}{more} belong to no episode of the metadata", "files of episodes alone")
