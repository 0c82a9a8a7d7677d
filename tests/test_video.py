"""Video: slices, files, sizes, colours, and what it refuses."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from orrery.errors import InputError
from orrery.video import Video


def smooth(count: int = 9, height: int = 64, width: int = 96) -> Video:
    """Moving gradients with three saturated squares."""
    t, y, x = np.mgrid[0:count, 0:height, 0:width]
    frames = np.stack([x * 2, y * 3, (x + y + 5 * t) % 200], axis=-1).clip(0, 255).astype(np.uint8)
    frames[:, 8:24, 8:24], frames[:, 8:24, 32:48], frames[:, 8:24, 56:72] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    return Video(frames, 10)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


def test_slices() -> None:
    video = smooth(9)
    assert len(video) == 9 and (video.height, video.width, video.fps) == (64, 96, 10.0)
    assert np.array_equal(video[2:5].frames, video.frames[2:5])
    assert len(video[-1]) == 1 and np.array_equal(video[-1].frames[0], video.frames[-1])
    assert video[::2].fps == 5.0 and len(video[::2]) == 5
    assert [len(frame) for frame in video] == [1] * 9
    with pytest.raises(IndexError):
        video[9]


@pytest.mark.parametrize(
    "frames, message",
    [
        (np.zeros((4, 8, 8), np.uint8), r"\[T, H, W, 3\].*\[4, 8, 8\]"),
        (np.zeros((4, 8, 8, 4), np.uint8), r"\[4, 8, 8, 4\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), "at least 1 frame"),
        (np.zeros((4, 8, 8, 3), np.float32), "uint8.*float32"),
    ],
)
def test_refuses_other_arrays(frames: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Video(frames, 10)


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf")])
def test_refuses_other_rates(fps: float) -> None:
    with pytest.raises(InputError, match="fps"):
        Video(np.zeros((1, 8, 8, 3), np.uint8), fps)


def test_lossless_round_trip_keeps_colours(tmp_path: Path) -> None:
    video = smooth()
    back = Video.read(video.save(tmp_path / "a.mp4", crf=0, pixel_format="yuv444p"))
    assert back.frames.shape == video.frames.shape and back.fps == 10
    difference = np.abs(back.frames.astype(int) - video.frames)
    assert difference.max() <= 3 and difference.mean() < 0.7


def test_what_browsers_play(tmp_path: Path) -> None:
    video = smooth()
    path = video.save(tmp_path / "a.mp4", scale=3)
    back = Video.read(path)
    assert (back.height, back.width, len(back)) == (192, 288, 9)
    assert psnr(back.resize(64, 96).frames, video.frames) > 28  # chroma is halved
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert stream.codec_context.colorspace == 1  # tagged BT.709
    blob = path.read_bytes()
    assert blob.index(b"moov") < blob.index(b"mdat")


def test_same_frames_same_file(tmp_path: Path) -> None:
    video = smooth()
    assert video.save(tmp_path / "a.mp4").read_bytes() == video.save(tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("fps", [10, 16, 23.976, 29.97, 12.5])
def test_frame_rates_survive(tmp_path: Path, fps: float) -> None:
    back = Video.read(Video(smooth(5).frames, fps).save(tmp_path / "a.mp4"))
    assert back.fps == pytest.approx(fps, rel=1e-4) and len(back) == 5


def test_read_last(tmp_path: Path) -> None:
    path = smooth(12).save(tmp_path / "a.mp4")
    whole = Video.read(path)
    assert np.array_equal(Video.read(path, last=5).frames, whole.frames[-5:])
    assert len(Video.read(path, last=50)) == 12
    assert np.array_equal(Video.read(path, first=5).frames, whole.frames[:5])
    assert len(Video.read(path, first=50)) == 12
    with pytest.raises(InputError, match="first must be at least 1, got 0"):
        Video.read(path, first=0)


def test_images(tmp_path: Path) -> None:
    frame = smooth(1)
    back = Video.read(frame.save(tmp_path / "a.png"))
    assert np.array_equal(back.frames, frame.frames)
    Image.fromarray(np.full((20, 30, 4), (255, 0, 0, 0), np.uint8)).save(tmp_path / "clear.png")
    assert (Video.read(tmp_path / "clear.png").frames == 255).all()  # transparent on white
    Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30)).save(tmp_path / "grey.png")
    assert Video.read(tmp_path / "grey.png").frames.shape == (1, 20, 30, 3)
    with pytest.raises(InputError, match="an image holds one"):
        smooth(2).save(tmp_path / "b.png")


def test_refuses_files_that_are_not_what_they_say(tmp_path: Path) -> None:
    for name in ("note.png", "note.jpg", "note.mp4"):
        (tmp_path / name).write_text("a text, not a picture\n" * 30)
        with pytest.raises(InputError, match=f"{name}: it is not"):
            Video.read(tmp_path / name)
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(InputError, match="empty.mp4"):
        Video.read(tmp_path / "empty.mp4")
    whole = smooth(1).save(tmp_path / "a.png").read_bytes()
    (tmp_path / "torn.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="torn.png"):
        Video.read(tmp_path / "torn.png")


def test_refuses_other_paths(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        Video.read(tmp_path / "none.mp4")
    with pytest.raises(InputError, match=r"suffix is '\.txt', allowed are .*\.mp4"):
        Video.read(tmp_path / "a.txt")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InputError, match="folder"):
        Video.read(tmp_path / "folder.mp4")
    with pytest.raises(InputError, match="folder"):
        smooth().save(tmp_path / "folder.mp4")
    with pytest.raises(InputError, match=r"suffix is '\.avi', allowed is \.mp4"):
        smooth().save(tmp_path / "a.avi")
    with pytest.raises(InputError, match="missing"):
        smooth().save(tmp_path / "a")
    with pytest.raises(InputError, match="even sizes, got 63x96"):
        smooth(height=63).save(tmp_path / "a.mp4")
    with pytest.raises(InputError, match="crf must be 0 to 51, got 52"):
        smooth().save(tmp_path / "a.mp4", crf=52)
    assert os.listdir(tmp_path) == ["folder.mp4"]


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full_disk) -> None:
    noise = Video(np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), dtype=np.uint8), 10)
    path = smooth().save(tmp_path / "a.mp4")
    before = path.read_bytes()
    size = len(noise.save(tmp_path / "b.mp4").read_bytes())
    os.remove(tmp_path / "b.mp4")
    for limit in (100, size // 2, size - 1):  # in the header, in the pictures, while the index moves to the front
        with full_disk(limit), pytest.raises(InputError, match=r"a\.mp4: File too large"):
            noise.save(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.mp4"]
    with full_disk(1000), pytest.raises(InputError, match=r"s\.png"):
        noise.contact_sheet(tmp_path / "s.png")
    assert os.listdir(tmp_path) == ["a.mp4"]


def test_tensor_round_trip() -> None:
    video = smooth(5)
    tensor = video.to_tensor()
    assert tensor.shape == (1, 3, 5, 64, 96) and tensor.dtype == torch.float32
    assert tensor.min() >= -1 and tensor.max() == 1
    assert np.array_equal(Video.from_tensor(tensor, 10).frames, video.frames)
    wild = torch.tensor([-7.0, 7.0]).view(1, 1, 2, 1, 1).expand(1, 3, 2, 2, 2)
    assert Video.from_tensor(wild, 10).frames[:, 0, 0, 0].tolist() == [0, 255]


def test_resize_crops_the_middle() -> None:
    frames = np.zeros((2, 40, 80, 3), np.uint8)
    frames[:, :, 20:60] = 200  # exactly the middle square
    assert (Video(frames, 10).resize(40, 40).frames == 200).all()
    squeezed = Video(frames, 10).resize(40, 40, crop=False).frames
    assert squeezed[0, 0, 0, 0] == 0 and squeezed[0, 0, 20, 0] == 200


def test_resize_is_antialiased() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    small = Video(stripes, 10).resize(16, 16).frames[0, 4:12, 4:12]
    assert np.abs(small.astype(int) - 127).max() < 12  # without: 0 or 255


@pytest.mark.parametrize("height, width", [(704, 1280), (31, 47), (1, 5), (128, 100)])
def test_resize_always_reaches_the_size(height: int, width: int) -> None:
    for target in ((32, 32), (48, 80), (7, 3)):
        assert smooth(1, height, width).resize(*target).frames.shape == (1, *target, 3)


def test_contact_sheet(tmp_path: Path) -> None:
    video = smooth(9, 20, 30)
    sheet = np.asarray(Image.open(video.contact_sheet(tmp_path / "s.png", columns=3, frames=5, gap=2)))
    assert sheet.shape == (2 * 22 + 2, 3 * 32 + 2, 3)
    assert np.array_equal(sheet[2:22, 2:32], video.frames[0])
    assert np.array_equal(sheet[24:44, 34:64], video.frames[8])
    with pytest.raises(InputError, match=r"a contact sheet is a \.png"):
        video.contact_sheet(tmp_path / "s.gif")
