"""Video: uint8 frames [T, H, W, 3] and a frame rate; reading, writing, resizing, contact sheets.

Files go through PyAV (H.264 in MP4) and Pillow. Colours are BT.709, limited range, and are tagged as such, so that
browsers, players and our own reader agree. torch is imported only by the methods that need it.
"""

import math
from collections import deque
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, ImageOps, UnidentifiedImageError

from orrery.errors import InputError
from orrery.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
PIXEL_FORMATS = ("yuv420p", "yuv444p")
BT709 = 1  # the code of BT.709 for matrix, primaries and transfer alike (ITU-T H.273)
SMALL = 256 * 256  # pixels a frame up to which starting threads costs more than they save


@dataclass(frozen=True, eq=False)
class Video:
    """A clip in memory.

    Args:
        frames: [T, H, W, 3] uint8, RGB, T at least 1.
        fps: frames per second, above 0.

    Raises:
        InputError: another shape or dtype, no frame, or an fps that is not a positive number.

    `len(video)` is T; `video[2:7]` is the Video of frames 2..6, `video[::2]` every second frame at half the rate,
    `video[-1]` the last frame as a 1-frame Video.
    """

    frames: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        frames = np.asarray(self.frames)
        if frames.ndim != 4 or frames.shape[-1] != 3 or min(frames.shape) < 1:
            raise InputError(f"frames must be [T, H, W, 3] with at least 1 frame, got shape {list(frames.shape)}")
        if frames.dtype != np.uint8:
            raise InputError(f"frames must be uint8 (0..255), got {frames.dtype}")
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise InputError(f"fps must be a number above 0, got {self.fps}")
        object.__setattr__(self, "frames", np.require(frames, requirements=["C", "W"]))
        object.__setattr__(self, "fps", float(self.fps))

    def __len__(self) -> int:
        return self.frames.shape[0]

    def __repr__(self) -> str:
        return f"Video({len(self)} frames, {self.height}x{self.width}, {self.fps:g} fps)"

    def __getitem__(self, index: int | slice) -> "Video":
        if isinstance(index, slice):
            return Video(self.frames[index], self.fps / abs(index.step or 1))
        return Video(self.frames[index][None], self.fps)

    @property
    def height(self) -> int:
        """H in pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """W in pixels."""
        return self.frames.shape[2]

    @staticmethod
    def read(path: str | PathLike[str], last: int | None = None, first: int | None = None) -> "Video":
        """Read a video, or an image as a 1-frame Video (fps 1). The suffix says which it is.

        Args:
            path: .mp4 .mov .mkv .webm .avi, or .png .jpg .jpeg .webp .bmp; rotation tags are obeyed.
            last: keep only the last so many frames (the whole file is decoded, but not held).
            first: read no more than so many frames.

        Raises:
            InputError: no such file, another suffix, not the content its suffix promises, no frame in it.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
            allowed = " ".join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)
            raise InputError(
                f"cannot read {path}: its suffix is {repr(suffix) if suffix else 'missing'}, allowed are {allowed}"
            )
        if not path.is_file():
            raise InputError(f"cannot read {path}: {'it is a folder' if path.is_dir() else 'no such file'}")
        return _read_image(path) if suffix in IMAGE_SUFFIXES else _read_video(path, last, first)

    def save(self, path: str | PathLike[str], scale: int = 1, crf: int = 16, pixel_format: str = "yuv420p") -> Path:
        """Write H.264 into an .mp4 (or a 1-frame Video into an image), whole or not at all.

        Args:
            path: ends in .mp4; or, for a 1-frame Video, in one of the image suffixes.
            scale: enlarge this many times (Lanczos), for small models and human eyes.
            crf: x264 quality, 0 (lossless) to 51; 16 is visually lossless.
            pixel_format: "yuv420p" plays everywhere and needs even sizes; "yuv444p" keeps colour at full resolution.

        Returns:
            The path.

        Raises:
            InputError: an unknown suffix, a number out of range, odd sizes with yuv420p, a place that cannot be
                written to, a full disk.
        """
        path = Path(path)
        if not (isinstance(scale, int) and 1 <= scale <= 64):
            raise InputError(f"scale must be a whole number from 1 to 64, got {scale}")
        suffix = path.suffix.lower()
        if suffix in IMAGE_SUFFIXES:
            if len(self) != 1:
                raise InputError(f"cannot write {len(self)} frames to {path}: an image holds one; use .mp4")
            with atomic_file(path) as partial:
                _enlarged(self.frames[0], scale).save(partial)
            return path
        if suffix != ".mp4":
            raise InputError(
                f"cannot write {path}: its suffix is {repr(suffix) if suffix else 'missing'}, allowed is .mp4"
            )
        if not 0 <= crf <= 51:
            raise InputError(f"crf must be 0 to 51, got {crf}")
        if pixel_format not in PIXEL_FORMATS:
            raise InputError(f"pixel_format must be one of {' '.join(PIXEL_FORMATS)}, got {pixel_format!r}")
        height, width = self.height * scale, self.width * scale
        if pixel_format == "yuv420p" and (height % 2 or width % 2):
            raise InputError(f"yuv420p needs even sizes, got {height}x{width}; use pixel_format='yuv444p' or resize")
        with atomic_file(path) as partial:
            self._encode(partial, scale, crf, pixel_format)
        return path

    def _encode(self, path: Path, scale: int, crf: int, pixel_format: str) -> None:
        """H.264 in MP4 with the index in front, so that a browser can start before it has everything."""
        rate = Fraction(self.fps).limit_denominator(1001)
        options = {"movflags": "+faststart"}
        # Without lookahead: with it x264's fast paths now and then made another file of the same frames, most of all in
        # a process that had drawn with OpenGL, and the same seed is to be the same file.
        codec = {"crf": str(crf), "preset": "medium", "rc-lookahead": "0"}
        try:
            with av.open(str(path), "w", format="mp4", options=options) as container:
                stream = container.add_stream("libx264", rate=rate, options=codec)
                stream.height, stream.width = self.height * scale, self.width * scale
                stream.pix_fmt = pixel_format
                context = stream.codec_context
                context.colorspace = context.color_primaries = context.color_trc = BT709
                context.color_range = ColorRange.MPEG
                context.thread_count = 1  # with more, the same frames now and then made another file
                for pixels in self.frames:
                    picture = np.asarray(_enlarged(pixels, scale)) if scale > 1 else pixels
                    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                        format=pixel_format,
                        dst_colorspace=Colorspace.ITU709,
                        dst_color_range=ColorRange.MPEG,
                        threads=1,
                    )
                    container.mux(stream.encode(frame))
                container.mux(stream.encode())
        except av.FFmpegError as error:
            raise OSError(error.errno, error.strerror) from error

    def resize(self, height: int, width: int, crop: bool = True) -> "Video":
        """This clip at height x width: bilinear, antialiased, in float and then rounded.

        Args:
            height, width: pixels, at least 1.
            crop: keep the aspect ratio, cover the target and cut the middle out; False stretches.
        """
        if height < 1 or width < 1:
            raise InputError(f"a size must be at least 1x1, got {height}x{width}")
        if (self.height, self.width) == (height, width):
            return self
        import torch
        from torch.nn.functional import interpolate

        size = (height, width)
        if crop:
            factor = max(height / self.height, width / self.width)
            size = (math.ceil(factor * self.height - 1e-6), math.ceil(factor * self.width - 1e-6))
        top, left = round((size[0] - height) / 2), round((size[1] - width) / 2)
        out = np.empty((len(self), height, width, 3), np.uint8)
        for index, pixels in enumerate(self.frames):
            image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
            image = interpolate(image, size=size, mode="bilinear", antialias=True, align_corners=False)
            image = image[0, :, top : top + height, left : left + width].round().clamp(0, 255).to(torch.uint8)
            out[index] = image.permute(1, 2, 0).numpy()
        return Video(out, self.fps)

    def to_tensor(self) -> "Tensor":
        """[1, 3, T, H, W] float32 in [-1, 1]: pixel / 127.5 - 1."""
        import torch

        return torch.from_numpy(self.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1

    @staticmethod
    def from_tensor(tensor: "Tensor", fps: float) -> "Video":
        """A Video of [1, 3, T, H, W] or [3, T, H, W] in [-1, 1]; values outside are clamped, then rounded."""
        if tensor.ndim == 5 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.ndim != 4 or tensor.shape[0] != 3:
            raise InputError(f"a video tensor is [1, 3, T, H, W] or [3, T, H, W], got {list(tensor.shape)}")
        return Video(to_frames(tensor), fps)

    def contact_sheet(
        self, path: str | PathLike[str], columns: int = 6, frames: int = 18, scale: int = 1, gap: int = 4
    ) -> Path:
        """Write a PNG that shows `frames` frames, evenly spread from the first to the last, in rows of `columns`.

        Raises:
            InputError: a count below 1, another suffix than .png, a place that cannot be written to.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise InputError(f"cannot write {path}: a contact sheet is a .png")
        if min(columns, frames, scale) < 1:
            raise InputError(f"columns, frames and scale must be at least 1, got {columns}, {frames}, {scale}")
        count = min(frames, len(self))
        chosen = [round(i) for i in np.linspace(0, len(self) - 1, count)]
        columns = min(columns, count)
        rows = -(-count // columns)
        height, width = self.height * scale, self.width * scale
        sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
        for place, index in enumerate(chosen):
            row, column = divmod(place, columns)
            corner = (gap + column * (width + gap), gap + row * (height + gap))
            sheet.paste(_enlarged(self.frames[index], scale), corner)
        with atomic_file(path) as partial:
            sheet.save(partial)
        return path


def to_pixels(frames: np.ndarray) -> "Tensor":
    """[B, T, H, W, 3] uint8 -> [B, 3, T, H, W] float32 in [-1, 1]."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 4, 1, 2, 3))).float() / 127.5 - 1


def to_frames(pixels: "Tensor") -> np.ndarray:
    """[..., 3, T, H, W] in [-1, 1] -> [..., T, H, W, 3] uint8; values outside are clamped, then rounded."""
    import torch

    levels = ((pixels.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(-4, -1).cpu().numpy()


def _enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
    """One frame [H, W, 3] as a Pillow image, `scale` times as large."""
    image = Image.fromarray(pixels)
    if scale == 1:
        return image
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)


def from_image(image: Image.Image, fps: float = 1.0) -> Video:
    """A Pillow image as a 1-frame Video; transparency is laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return Video(np.asarray(image.convert("RGB"))[None], fps)


def _read_image(path: Path) -> Video:
    try:
        with Image.open(path) as image:
            return from_image(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read {path}: it is not an image that can be decoded") from error


def _read_video(path: Path, last: int | None, first: int | None) -> Video:
    for name, count in (("last", last), ("first", first)):
        if count is not None and count < 1:
            raise InputError(f"{name} must be at least 1, got {count}")
    frames: deque[Any] = deque(maxlen=last)
    fps = None
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InputError(f"cannot read {path}: there is no video in it")
            stream = container.streams.video[0]
            small = stream.width * stream.height <= SMALL
            stream.thread_type = "NONE" if small else "AUTO"
            fps = stream.average_rate or stream.guessed_rate
            for frame in islice(container.decode(stream), first):
                frames.append(_rgb(frame, small) if last is None else frame)
            decoded = [frame if isinstance(frame, np.ndarray) else _rgb(frame, small) for frame in frames]
    except (av.FFmpegError, OSError) as error:
        raise InputError(f"cannot read {path}: it is not a video that can be decoded ({error.strerror})") from error
    if not decoded:
        raise InputError(f"cannot read {path}: there is no frame in it")
    return Video(np.stack(decoded), float(fps) if fps else 24.0)


def _rgb(frame: av.VideoFrame, small: bool) -> np.ndarray:
    """A decoded frame as [H, W, 3] uint8, upright. small: one thread converts it (0: as many as there are cores)."""
    pixels = frame.to_ndarray(format="rgb24", threads=1 if small else 0)
    quarter_turns = round(frame.rotation / 90) % 4
    return np.rot90(pixels, quarter_turns) if quarter_turns else pixels
