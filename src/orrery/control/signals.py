"""One entry for all kinds of control: a signal made of a video, or read from what a user gives."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from orrery.control.blur import blur_map
from orrery.control.depth import depth_map, inverse_depth_map
from orrery.control.edge import edge_map
from orrery.control.inputs import Source, check_aspect, check_fps, check_length, load, name_of, resized, truth_in
from orrery.control.models import Models, Progress, model_name
from orrery.control.segmentation import seg_map
from orrery.errors import InputError, note
from orrery.files import check_writable
from orrery.kinds import control_kind
from orrery.video import Video

MADE_AS = 1  # to be raised when a kind is made in another way: what caches hold is then not found any more
OWN = {"edge": "uint8 or bool", "blur": "uint8", "depth": "uint8 grey or float metres", "seg": "whole numbers"}
RESIZE = {"edge": "linear", "blur": "area", "depth": "linear", "seg": "nearest"}  # specification of Transfer, section 2


def make_signal(
    kind: str,
    video: Video,
    *,
    strength: str | tuple[int, int] | None = None,
    prompt: str | None = None,
    models: Models | None = None,
    seed: int = 0,
    cache: "SignalCache | None" = None,
    progress: Progress | None = None,
) -> Video:
    """The control video of `video`: its size, length and frame rate.

    Args:
        kind: edge, blur (or vis), depth, seg.
        strength: of edge and blur: a preset's name or its two numbers; None is medium.
        prompt: of seg: what to look for.
        models: of depth and seg; None loads the default ones.
        seed: of the colours of seg.
        cache: looks here first, and keeps here what it had to make.
        progress: called as progress(frames done, frames in all) by depth and seg.

    Raises:
        InputError: an unknown kind, an option that this kind does not have or needs, a model that cannot be loaded.
    """
    kind = control_kind(kind)
    if strength is not None and kind not in ("edge", "blur"):
        raise InputError(f"strength is {strength!r} for {kind}; only edge and blur have one")
    if prompt is not None and kind != "seg":
        raise InputError(f"a prompt was given for {kind}; only seg has one")
    if kind == "seg" and not (prompt and prompt.strip()):
        raise InputError("seg needs a prompt: what to look for in the video, such as 'robot arm. cup. table.'")
    models = models or Models()

    def make() -> Video:
        return Video(_signal(kind, video.frames, strength or "medium", prompt or "", models, seed, progress), video.fps)

    if cache is None:
        return make()
    return cache.get(kind, video, _settings(kind, strength or "medium", prompt, models, seed), make)


def _signal(
    kind: str,
    frames: np.ndarray,
    strength: str | tuple[int, int],
    prompt: str,
    models: Models,
    seed: int,
    progress: Progress | None,
) -> np.ndarray:
    if kind == "edge":
        return edge_map(frames, strength)
    if kind == "blur":
        return blur_map(frames, strength)
    made = models.depth(frames, progress) if kind == "depth" else models.segmentation(frames, prompt, progress)
    if made.shape != frames.shape[:3]:
        raise InputError(f"the {kind} model gave {list(made.shape)} for frames {list(frames.shape)}, not [T, H, W]")
    return inverse_depth_map(made) if kind == "depth" else seg_map(made, seed)


def _settings(
    kind: str, strength: str | tuple[int, int], prompt: str | None, models: Models, seed: int
) -> dict[str, object]:
    """All that the signal depends on, beside the frames."""
    if kind == "depth":
        return {"model": model_name(models.depth)}
    if kind == "seg":
        return {"model": model_name(models.segmentation), "prompt": prompt, "seed": seed}
    return {"strength": strength}


def read_signal(
    source: Source,
    kind: str,
    *,
    size: tuple[int, int],
    frames: int,
    fps: float,
    shape: tuple[int, int] | None = None,
    trim: bool = False,
    camera: str | None = None,
    seed: int = 0,
) -> Video:
    """A control that a user gives, for an input of `frames` frames at `fps`, at `size` (height, width).

    Args:
        source: a path (a video; an image, for an input of one frame; .npz or .npy; the folder of a simulated clip,
            whose exact depth or segmentation is taken), a Video or an array. Arrays are uint8 [T, H, W, 3], the control
            as it is; or [T, H, W] (for one frame also [H, W]): uint8 grey or bool for edge, uint8 grey for blur, for
            depth uint8 grey (near is bright) or float metres, for seg whole numbers, 0 none, else which object.
        shape: of the input (height, width), where it is drawn at another: both are stretched alike. Default `size`.
        trim: of a longer control take the first `frames`.
        camera: which array of an .npz that holds several.
        seed: of the colours of segmentation ids.

    Raises:
        InputError: not readable; another length, frame rate or aspect ratio; an array that this kind cannot be.
    """
    kind = control_kind(kind)
    if not isinstance(source, Video | np.ndarray):
        source = truth_in(Path(source), kind)
    name = name_of(source)
    loaded = load(source, f"{kind} control", camera)
    if isinstance(loaded, np.ndarray) and loaded.ndim == 2:
        loaded = loaded[None]
    check_length(name, len(loaded), frames, trim)
    if isinstance(loaded, Video):
        if frames > 1:
            check_fps(name, loaded.fps, fps)
        pixels = loaded.frames[:frames]
    else:
        pixels = _painted(loaded[:frames], kind, name, seed)
    if pixels.shape[1:3] != tuple(size):
        check_aspect(name, pixels.shape[1:3], size if shape is None else shape)
    return Video(resized(pixels, size, RESIZE[kind]), fps)


def _painted(array: np.ndarray, kind: str, name: str, seed: int) -> np.ndarray:
    """An array as the control's pixels [T, H, W, 3] uint8."""
    if array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3:
        return array
    if array.ndim == 3 and kind == "seg" and array.dtype.kind in "iu":
        return seg_map(array, seed)
    if array.ndim == 3 and kind == "depth" and array.dtype.kind == "f":
        return depth_map(array)
    if array.ndim == 3 and kind == "edge" and array.dtype == bool:
        array = array * np.uint8(255)
    if array.ndim == 3 and kind != "seg" and array.dtype == np.uint8:
        return np.repeat(array[..., None], 3, axis=-1)
    allowed = f"a {kind} control is uint8 [T, H, W, 3] or [T, H, W] of {OWN[kind]}"
    raise InputError(f"{name} is {array.dtype} {list(array.shape)}; {allowed}")


class SignalCache:
    """Control videos that were made before, in a folder: one .mp4 a signal, visually lossless.

    A signal is found again by its frames, its kind and settings and, for depth and seg, the model. What `get` gives was
    always read back from the file, so that the first run and the later ones see the same pixels.
    """

    def __init__(self, folder: str | Path) -> None:
        """Makes the folder if its parent exists.

        Raises:
            InputError: it cannot be made or written.
        """
        self.folder = check_writable(folder)
        try:
            self.folder.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror or error}") from error

    def path(self, kind: str, video: Video, settings: dict[str, object]) -> Path:
        """Where that signal is, or would be."""
        digest = hashlib.sha256(
            json.dumps([MADE_AS, kind, settings, list(video.frames.shape)], sort_keys=True).encode()
        )
        for frame in video.frames:
            digest.update(frame)
        return self.folder / f"{kind}-{digest.hexdigest()[:24]}.mp4"

    def get(self, kind: str, video: Video, settings: dict[str, object], make: Callable[[], Video]) -> Video:
        """The signal out of the folder, or made by `make` and put there."""
        path = self.path(kind, video, settings)
        if path.is_file():
            try:
                return self._read(path, video)
            except InputError as error:
                note(f"made {kind} again: {error}")
        make().save(path, crf=0, pixel_format="yuv444p")
        return self._read(path, video)

    def _read(self, path: Path, video: Video) -> Video:
        found = Video.read(path)
        if found.frames.shape != video.frames.shape:
            raise InputError(f"{path} holds {list(found.frames.shape)}, not {list(video.frames.shape)}")
        return Video(found.frames, video.fps)
