"""Frames of a part of a video file, by time; and what a video file is, found out without decoding all of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from orrery.errors import InputError


@dataclass(frozen=True)
class VideoFacts:
    """times: seconds of each frame from the first one on, in order. promised: frames that the file's head announces, 0
    if it does not. rotation: degrees that a player turns it by."""

    times: np.ndarray
    promised: int
    fps: float
    height: int
    width: int
    rotation: int


def read_span(
    path: Path, fps: float, start: float = 0.0, count: int | None = None, end: float | None = None
) -> np.ndarray:
    """Frames [T, H, W, 3] uint8 from `start` seconds on: `count` of them, or up to `end` seconds, or to the last.

    Decoding begins at the keyframe before `start`. Fewer frames come back where the file has no more; a frame counts as
    at a time if it is within half a frame of it.

    Raises:
        InputError: no such file, or no video that can be decoded.
    """
    if not Path(path).is_file():
        raise InputError(f"cannot read {path}: no such file")
    try:
        frames = list(_decode(path, fps, start, count, end, seek=start > 0))
        if not frames and start > 0:  # a file whose index leads astray: from its beginning on, then
            frames = list(_decode(path, fps, start, count, end, seek=False))
    except (av.FFmpegError, OSError, IndexError) as error:
        raise InputError(f"cannot read {path}: it is not a video that can be decoded ({_why(error)})") from None
    if len({frame.shape for frame in frames}) > 1:
        raise InputError(f"cannot read {path}: its frames differ in size")
    return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)


def _why(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _decode(
    path: Path, fps: float, start: float, count: int | None, end: float | None, seek: bool
) -> Iterator[np.ndarray]:
    half, found = 0.5 / fps, 0
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        base, zero = stream.time_base or 1, stream.start_time or 0
        if seek:
            container.seek(max(0, int(start / base) + zero), stream=stream)
        for number, frame in enumerate(container.decode(stream)):
            time = number / fps if frame.pts is None else float((frame.pts - zero) * base)
            if time < start - half:
                continue
            if (seek and not found and time > start + half) or (end is not None and time > end - half):
                return
            yield frame.to_ndarray(format="rgb24")
            found += 1
            if found == count:
                return


def video_facts(path: Path) -> VideoFacts:
    """What a video file is; its packets are counted, its first frame alone is decoded.

    Raises:
        InputError: no such file, no video, or it breaks off in a way that cannot be read over.
    """
    if not Path(path).is_file():
        raise InputError(f"cannot read {path}: no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"cannot read {path}: there is no video in it")
            stream = container.streams.video[0]
            base, zero = stream.time_base or 1, stream.start_time or 0
            stamps = [packet.pts for packet in container.demux(stream) if packet.size]
            rate = stream.average_rate or stream.guessed_rate
            times = [float((stamp - zero) * base) for stamp in stamps if stamp is not None]
            if len(times) < len(stamps):  # no timestamps in it
                times = [number / float(rate or 1) for number in range(len(stamps))]
            container.seek(0)
            first = next(container.decode(stream), None)
            turned = round(first.rotation) if first is not None else 0
            seconds = np.sort(np.array(times, np.float64))
            return VideoFacts(seconds, stream.frames, float(rate or 0), stream.height, stream.width, turned)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot read {path}: it is not a video that can be decoded ({_why(error)})") from None
