"""What a transfer is given, looked at before a model is loaded: lengths, frame rates and sizes, out of file headers."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from orrery.control.inputs import ARRAY_SUFFIXES, check_aspect, check_fps, truth_in
from orrery.errors import InputError, note
from orrery.specs import TransferSpec
from orrery.video import IMAGE_SUFFIXES, Video
from orrery.weights import SIZES
from orrery.weights.catalogue import nearest_size

IMAGE_FPS = 1.0  # as `Video.read` has it


@dataclass(frozen=True)
class Extent:
    """frames; fps, None where a file does not say it (an array, an image); size (H, W)."""

    frames: int
    fps: float | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Footage:
    """What is drawn from: the input, or the first control video where there is none.

    total: frames of the file. frames: how many of them, from the first, are needed. size (H, W). drawn: frames of the
    result.
    """

    total: int
    frames: int
    fps: float
    size: tuple[int, int]
    drawn: int


def look(spec: TransferSpec, fps: float | None = None) -> Footage:
    """The extent of a job, whose files have been checked against each other. Nothing is held in memory.

    Args:
        fps: only so many frames of a second are drawn.

    Raises:
        InputError: a file that cannot be read; a control or a mask of another length, frame rate or shape than the
            input; an index or an fps that the input does not have.
    """
    try:
        return _looked(spec, fps)
    except InputError as error:
        raise InputError(f"{spec.source}: {error}") from error


def _looked(spec: TransferSpec, fps: float | None) -> Footage:
    path = spec.video or next((c.path for c in spec.controls if c.path and _is_footage(c.path)), None)
    if path is None:
        raise InputError("give the input video, or a control that is a video: else nothing says how long and how fast")
    whole = extent(path)
    rate = whole.fps or IMAGE_FPS
    if fps is not None and not 0 < fps <= rate:
        raise InputError(f"--fps is {fps:g}; allowed is above 0 to {rate:g}, that of {path}")
    if spec.image_frame is not None and spec.image_frame >= whole.frames:
        raise InputError(
            f"context_frame_index is {spec.image_frame}; {path} has {whole.frames} frames: allowed is 0 to "
            f"{whole.frames - 1}"
        )
    available = whole.frames if fps is None else math.floor((whole.frames - 1) / rate * fps + 1e-6) + 1
    if spec.frames is not None and spec.frames > available:
        note(f"{spec.source}: asked for {spec.frames} frames, {path} gives {available}")
    drawn = min(spec.frames or available, available)
    needed = whole.frames
    if spec.video is not None and spec.frames is not None:  # without an input, the controls are read in full
        needed = min(whole.frames, math.ceil((drawn - 1) * rate / (fps or rate) - 1e-6) + 1)
    footage = Footage(whole.frames, needed, rate, whole.size, drawn)
    for control in spec.controls:
        if control.path is not None and control.path != path:
            _check_control(control.kind, truth_in(control.path, control.kind), path, footage)
        if control.mask is not None:
            _check_mask(f"the mask of {control.kind}", control.mask, path, footage)
    if spec.hold is not None:
        _check_mask("the mask of guided generation", spec.hold, path, footage)
    return footage


def _is_footage(path: Path) -> bool:
    return path.suffix.lower() not in ARRAY_SUFFIXES and not path.is_dir()


def _check_control(kind: str, path: Path, source: Path, footage: Footage) -> None:
    have = extent(path)
    _check_length(f"the {kind} control", path, have, source, footage)
    if footage.frames > 1 and have.fps is not None:
        check_fps(str(path), have.fps, footage.fps)
    # A control video that an earlier transfer wrote has the size that was drawn, a published one of nearly this shape.
    if have.size not in {nearest_size(sizes.values(), footage.size) for sizes in SIZES.values()}:
        check_aspect(str(path), have.size, footage.size)


def _check_mask(what: str, path: Path, source: Path, footage: Footage) -> None:
    have = extent(path)
    still = path.suffix.lower() in IMAGE_SUFFIXES or (have.frames == 1 and have.fps is None)
    if not still:  # which holds for all frames
        _check_length(what, path, have, source, footage)
    try:
        check_aspect(str(path), have.size, footage.size)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _check_length(what: str, path: Path, have: Extent, source: Path, footage: Footage) -> None:
    """Headers can be wrong: what they refuse is counted before it is refused."""
    trim = footage.frames < footage.total
    count, needed = have.frames, footage.frames
    if count < needed or (count > needed and not trim):
        count = _counted(path) if have.fps is not None else count
        needed = min(needed, _counted(source)) if _is_footage(source) else needed
    if count < needed:
        raise InputError(
            f"{what}, {path}, has {count} frame{'s' * (count != 1)}, the input {source} {needed}: give one that is as "
            f"long, or draw only the first {count} with --frames {count} (max_frames)"
        )
    if count > needed and not trim:
        raise InputError(
            f"{what}, {path}, has {count} frames, the input {source} {needed}: cut it to those that belong to the input"
        )


def extent(path: Path) -> Extent:
    """Of a video, an image or an array in a file.

    Raises:
        InputError: it cannot be read, or is none of these.
    """
    if not path.is_file():
        raise InputError(f"cannot read {path}: {'it is a folder' if path.is_dir() else 'no such file'}")
    suffix = path.suffix.lower()
    if suffix in ARRAY_SUFFIXES:
        return _array_extent(path)
    if suffix in IMAGE_SUFFIXES:
        return _image_extent(path)
    return _video_extent(path)


def _image_extent(path: Path) -> Extent:
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            return Extent(1, None, (turned.height, turned.width))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read {path}: it is not an image that can be decoded") from error


def _video_extent(path: Path) -> Extent:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"cannot read {path}: there is no video in it")
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            frames = stream.frames
            first = next(container.decode(stream), None)
        if first is None:
            raise InputError(f"cannot read {path}: there is no frame in it")
        size = (first.height, first.width)
        if round(first.rotation / 90) % 2:
            size = size[::-1]
        if not frames:  # some containers do not say
            with av.open(str(path)) as container:
                frames = sum(1 for packet in container.demux(video=0) if packet.size)
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot read {path}: it is not a video that can be decoded ({error.strerror})") from error
    return Extent(frames, float(rate) if rate else 24.0, size)


def _counted(path: Path) -> int:
    """Frames of a video by decoding all of them, of an image 1."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return 1
    try:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot read {path}: it is not a video that can be decoded ({error.strerror})") from error


def _array_extent(path: Path) -> Extent:
    """Of [T, H, W], [T, H, W, C] or [H, W]."""
    try:
        if path.suffix.lower() == ".npy":
            with open(path, "rb") as file:
                shape = _shape(file)
        else:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
                if len(names) != 1:
                    held = ", ".join(name.removesuffix(".npy") for name in names)
                    raise InputError(f"{path} holds {len(names)} arrays ({held}); give a file that holds one")
                with archive.open(names[0]) as member:
                    shape = _shape(member)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
        raise InputError(f"cannot read {path}: it is not a NumPy file of plain arrays") from error
    if len(shape) not in (2, 3, 4) or min(shape) < 1:
        raise InputError(f"{path} is {list(shape)}; allowed are [T, H, W] and [T, H, W, 3], for one frame [H, W]")
    return Extent(1, None, (shape[0], shape[1])) if len(shape) == 2 else Extent(shape[0], None, (shape[1], shape[2]))


def _shape(file: Any) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return tuple(read(file)[0])


def read_part(path: Path, frames: int | None) -> Video:
    """The first frames of a video or an image; None for all."""
    return Video.read(path, first=frames)
