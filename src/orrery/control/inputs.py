"""What a user gives as a control or a mask, checked against the input that it is for: its length, shape and frame rate.

Nothing is cut, stretched or resampled silently; each error says what was given, what is needed and what to do.
"""

import math
from os import PathLike
from pathlib import Path

import numpy as np

from orrery.control.optional import opencv
from orrery.errors import InputError
from orrery.video import IMAGE_SUFFIXES, VIDEO_SUFFIXES, Video

ARRAY_SUFFIXES = (".npz", ".npy")
SAME = 0.02  # by how much two aspect ratios or frame rates may differ
TRUTH = {"depth": "depth.npz", "seg": "segmentation.npz"}  # in the folder of a simulated clip
RESAMPLING = {"linear": "INTER_LINEAR", "area": "INTER_AREA", "nearest": "INTER_NEAREST"}  # OpenCV's names

Source = str | PathLike[str] | Video | np.ndarray


def truth_in(path: Path, kind: str) -> Path:
    """Of the folder of a simulated clip, the file that holds the truth of this kind; any other path as it is.

    Raises:
        InputError: a folder that holds none, or of which this kind is not the truth.
    """
    if not path.is_dir():
        return path
    if kind not in TRUTH:
        raise InputError(f"{path} is a folder; a simulated clip gives depth and seg, {kind} is made of its video")
    if not (path / TRUTH[kind]).is_file():
        raise InputError(f"{path} is no folder of a simulated clip with {kind}: there is no {TRUTH[kind]} in it")
    return path / TRUTH[kind]


def name_of(source: Source) -> str:
    """A source in a message: its path, or what it is."""
    if isinstance(source, Video):
        return f"the given {source!r}"
    return f"the given array {list(source.shape)}" if isinstance(source, np.ndarray) else str(source)


def load(source: Source, what: str, camera: str | None = None) -> Video | np.ndarray:
    """The source, read if it is a path: a Video of a video or an image, an array of .npz or .npy.

    Args:
        what: it is to be, for messages. camera: which array of an .npz that holds several.

    Raises:
        InputError: no such file, a kind of file that holds neither, or content that cannot be read.
    """
    if isinstance(source, Video | np.ndarray):
        return source
    path = Path(source)
    if path.suffix.lower() in ARRAY_SUFFIXES:
        return _load_array(path, camera)
    if path.suffix.lower() not in VIDEO_SUFFIXES + IMAGE_SUFFIXES:
        allowed = " ".join(VIDEO_SUFFIXES + IMAGE_SUFFIXES + ARRAY_SUFFIXES)
        raise InputError(f"cannot read {path} as {what}: allowed are files {allowed}")
    return Video.read(path)


def is_image(source: Source) -> bool:
    """Whether the source is the path of an image."""
    return not isinstance(source, Video | np.ndarray) and Path(source).suffix.lower() in IMAGE_SUFFIXES


def _load_array(path: Path, camera: str | None) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded as archive:
            names = archive.files
            if camera is None and len(names) != 1:
                raise InputError(f"{path} holds {len(names)} arrays ({', '.join(names)}): say which one (camera)")
            if camera is not None and camera not in names:
                raise InputError(f"{path} holds no {camera!r}; it holds {', '.join(names)}")
            return archive[names[0] if camera is None else camera]
    except FileNotFoundError:
        raise InputError(f"cannot read {path}: no such file") from None
    except InputError:
        raise
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: it is not a NumPy file of plain arrays") from error
    except Exception as error:  # zipfile and zlib have errors of their own
        raise InputError(f"cannot read {path}: {error}") from error


def check_length(name: str, have: int, frames: int, trim: bool) -> None:
    """Raises:
    InputError: `have` frames are not the `frames` of the input (with `trim`: are fewer).
    """
    if frames < 1:
        raise InputError(f"frames is {frames}; allowed is at least 1")
    if have < frames:
        raise InputError(
            f"{name} has {have} frame{'s' * (have != 1)}, the input {frames}: give one that is as long, or use only "
            f"the first {have} of the input"
        )
    if have > frames and not trim:
        raise InputError(
            f"{name} has {have} frames, the input {frames}: cut it to what belongs to the input, or pass trim=True to "
            f"take its first {frames}"
        )


def check_fps(name: str, have: float, fps: float) -> None:
    """Raises:
    InputError: two frame rates that differ by more than `SAME`.
    """
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"fps is {fps}; allowed is a number above 0")
    if abs(have / fps - 1) > SAME:
        raise InputError(
            f"{name} runs at {have:g} frames per second, the input at {fps:g}: frame i of the one would not be frame i "
            "of the other; resample one of them"
        )


def check_aspect(name: str, have: tuple[int, int], size: tuple[int, int]) -> None:
    """Raises:
    InputError: (height, width) of another shape than `size`, by more than `SAME`.
    """
    if len(size) != 2 or min(size) < 1:
        raise InputError(f"size is {tuple(size)}; allowed are (height, width), each at least 1")
    if abs(have[1] / have[0] / (size[1] / size[0]) - 1) > SAME:
        raise InputError(
            f"{name} is {have[0]}x{have[1]}, the output {size[0]}x{size[1]}: height and width must have the same ratio "
            f"(within {SAME:.0%}); crop or pad it the way the input was"
        )


def resized(frames: np.ndarray, size: tuple[int, int], how: str) -> np.ndarray:
    """frames [T, H, W] or [T, H, W, C], uint8 or float32, each at `size` (height, width); how: a key of `RESAMPLING`.

    Raises:
        InputError: OpenCV is needed and not installed.
    """
    if frames.shape[1:3] == tuple(size):
        return frames
    cv2 = opencv()
    out = np.empty((len(frames), *size, *frames.shape[3:]), frames.dtype)
    for t, frame in enumerate(frames):
        frame = cv2.resize(np.ascontiguousarray(frame), size[::-1], interpolation=getattr(cv2, RESAMPLING[how]))
        out[t] = frame.reshape(out.shape[1:])
    return out
