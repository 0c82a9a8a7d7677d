"""Depth and segmentation by networks, behind two protocols: the defaults are loaded when first called, others plug in.

The published depth is Video-Depth-Anything (small), which `transformers` does not have. The default here is Depth
Anything V2 (small), of the same authors, one frame at a time; each frame is scaled and shifted to agree with the one
before (`depth.aligned`), without which the control would flicker. Segmentation is in `grounded`.
"""

import hashlib
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError

from orrery.control.depth import aligned, still_pixels
from orrery.errors import InputError, note, one_line

DEPTH = "depth-anything/Depth-Anything-V2-Small-hf"
NEAREST = 1e-3  # metres: nothing is nearer, to a metric model


class Progress(Protocol):
    """Told how far a model is."""

    def __call__(self, done: int, total: int, /) -> object: ...


@runtime_checkable
class DepthModel(Protocol):
    """Any callable of this form; to go with a `SignalCache` it also needs a `name`."""

    def __call__(self, frames: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """frames [T, H, W, 3] uint8 -> inverse depth [T, H, W], larger is nearer, in any unit."""
        ...


@runtime_checkable
class SegmentationModel(Protocol):
    """Any callable of this form; to go with a `SignalCache` it also needs a `name`."""

    def __call__(self, frames: np.ndarray, prompt: str, progress: Progress | None = None) -> np.ndarray:
        """frames [T, H, W, 3] uint8, what to look for -> [T, H, W] uint8, 0 none, else which object."""
        ...


def _default_segmentation() -> SegmentationModel:
    from orrery.control.grounded import GroundedSam2

    return GroundedSam2()


@dataclass(frozen=True)
class Models:
    """What `make_signal` uses. The default models cost nothing until they are called."""

    depth: DepthModel = field(default_factory=lambda: DepthAnything())
    segmentation: SegmentationModel = field(default_factory=_default_segmentation)


def model_name(model: object) -> str:
    """What a cache tells a model by.

    Raises:
        InputError: it has no name.
    """
    name = getattr(model, "name", None)
    if not isinstance(name, str) or not name:
        raise InputError(f"{type(model).__name__} has no name (a string): a cache could not tell it from another model")
    return name


class DepthAnything:
    """Depth Anything V2 through `transformers`, frame by frame, made consistent over time.

    Args:
        source: a hub id or a folder that `save_pretrained` wrote, with the image processor's settings.
        device: None is a GPU if there is one.
        align: scale and shift each frame to the one before; False shows what the network says.
    """

    def __init__(self, source: str | PathLike[str] = DEPTH, device: str | None = None, align: bool = True) -> None:
        self.source, self.align = str(source), align
        self.device = pick_device(device)
        self._parts: tuple[Any, Any] | None = None

    @property
    def name(self) -> str:
        """Tells this model from others."""
        return f"{identity(self.source)}{'' if self.align else ' unaligned'}"

    def release(self) -> None:
        """Gives the memory back; the next call loads again."""
        self._parts = None

    def _loaded(self) -> tuple[Any, Any]:
        if self._parts is None:
            transformers = import_transformers()
            give = "give a depth control (a video, or a simulator's depth.npz), or another depth model"
            network = load_part(transformers.DepthAnythingForDepthEstimation, self.source, "depth model", give)
            processor = load_processor(self.source, give)
            self._parts = network.to(self.device), processor
            note(
                f"depth by {self.source}, frame by frame{', aligned over time' * self.align} (the published "
                "Video-Depth-Anything is not in transformers)"
            )
        return self._parts

    @torch.inference_mode()
    def __call__(self, frames: np.ndarray, progress: Progress | None = None) -> np.ndarray:
        """frames [T, H, W, 3] uint8 -> inverse depth [T, H, W] float32.

        Raises:
            InputError: the network cannot be loaded.
        """
        out = np.empty(frames.shape[:3], np.float32)
        for t, frame in enumerate(frames):
            out[t] = self._inverse_depth(frame)
            if self.align and t:
                out[t] = aligned(out[t], out[t - 1], still_pixels(frame, frames[t - 1]))
            if progress is not None:
                progress(t + 1, len(frames))
        return out

    def _inverse_depth(self, frame: np.ndarray) -> np.ndarray:
        network, processor = self._loaded()
        pixels = processor(images=frame, return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        depth = network(pixels.to(self.device)).predicted_depth[:, None].float()
        depth = F.interpolate(depth, frame.shape[:2], mode="bicubic", align_corners=False)[0, 0]
        if network.config.depth_estimation_type == "metric":
            depth = 1 / depth.clamp(min=NEAREST)
        return depth.cpu().numpy()


def pick_device(device: str | None) -> torch.device:
    """The device of that name; None: a GPU if there is one."""
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def import_transformers() -> Any:
    """The module.

    Raises:
        InputError: it is not installed, or cannot be imported.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"depth and seg need transformers: pip install transformers ({error})") from error
    return transformers


T = TypeVar("T")


def load_part(kind: type[T], source: str, what: str, instead: str) -> T:
    """A network of `transformers`, complete, in evaluation mode.

    Args:
        kind: its class. source: a hub id or a folder. what: it is, and instead: what else the user can do, in messages.

    Raises:
        InputError: it cannot be found or read, or weights are missing in it.
    """
    try:
        network, info = kind.from_pretrained(  # type: ignore[attr-defined]
            source, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise InputError(cannot(what, source, error, instead)) from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise InputError(
            f"{source} is no complete {what} ({kind.__name__}): {len(missing)} weights are missing or have another "
            f"shape, such as {', '.join(missing[:3])}"
        )
    return network.eval()


def load_processor(source: str, instead: str) -> Any:
    """The settings of how pictures are prepared. Pillow's way of resizing, whether torchvision is there or not, so that
    one seed is one video everywhere.

    Raises:
        InputError: they cannot be found or read.
    """
    try:
        return import_transformers().AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(cannot("image processor", source, error, instead)) from error


def cannot(what: str, source: str, error: BaseException, instead: str) -> str:
    """The message for a part that cannot be loaded."""
    kept = one_line(error)
    kept = kept if len(kept) <= 160 else kept[:160] + "..."
    return f"cannot load the {what} {source}: {kept} -- download it, name a local folder, or {instead}"


def identity(source: str) -> str:
    """A hub id as it is; of a folder, its name and a fingerprint of what is in it (names, sizes and times)."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    return f"{folder.name} {hashlib.sha256(repr(stats).encode()).hexdigest()[:16]}"
