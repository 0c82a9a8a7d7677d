"""Controls made of a video and read from what users give; each refusal says what was given and what is needed."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from orrery.control.blur import blur_map
from orrery.control.depth import depth_map, inverse_depth_map
from orrery.control.edge import edge_map
from orrery.control.models import Models
from orrery.control.segmentation import seg_map
from orrery.control.signals import SignalCache, make_signal, read_signal
from orrery.errors import InputError
from orrery.kinds import control_kind
from orrery.video import Video


class Brightness:
    """A depth model: bright is near. Counts its calls."""

    name = "brightness"
    calls = 0

    def __call__(self, frames, progress=None):
        self.calls += 1
        return frames.mean(-1)


class Red:
    """A segmentation model: object 1 is what is red."""

    name = "red"
    prompts: list[str]

    def __init__(self):
        self.prompts = []

    def __call__(self, frames, prompt, progress=None):
        self.prompts.append(prompt)
        return (frames[..., 0] > 150).astype(np.uint8)


@pytest.fixture
def models() -> Models:
    return Models(depth=Brightness(), segmentation=Red())


def read(source, kind, clip, **options):
    return read_signal(source, kind, size=(48, 80), frames=len(clip), fps=clip.fps, **options)


def test_kinds_and_the_published_alias():
    assert [control_kind(name) for name in ("edge", "blur", "depth", "seg")] == ["edge", "blur", "depth", "seg"]
    assert control_kind("vis") == "blur"
    with pytest.raises(InputError, match=r"'lidar'; allowed are edge, blur, depth, seg \(vis is another"):
        control_kind("lidar")


def test_signals_of_a_video(clip, models):
    np.testing.assert_array_equal(make_signal("edge", clip, strength="low").frames, edge_map(clip.frames, "low"))
    np.testing.assert_array_equal(make_signal("vis", clip).frames, blur_map(clip.frames, "medium"))
    depth = make_signal("depth", clip, models=models)
    np.testing.assert_array_equal(depth.frames, inverse_depth_map(clip.frames.mean(-1)))
    seg = make_signal("seg", clip, prompt="red square", models=models, seed=3)
    np.testing.assert_array_equal(seg.frames, seg_map((clip.frames[..., 0] > 150).astype(np.uint8), seed=3))
    assert models.segmentation.prompts == ["red square"] and depth.fps == seg.fps == clip.fps


def test_options_of_other_kinds_are_refused(clip, models):
    with pytest.raises(InputError, match="strength is 'low' for depth"):
        make_signal("depth", clip, strength="low", models=models)
    with pytest.raises(InputError, match="prompt was given for edge"):
        make_signal("edge", clip, prompt="cup")
    for prompt in (None, " "):
        with pytest.raises(InputError, match="seg needs a prompt"):
            make_signal("seg", clip, prompt=prompt, models=models)


def test_a_model_of_ones_own_that_gives_another_shape_is_refused(clip, models):
    with pytest.raises(InputError, match=r"depth model gave \[6\] .* not \[T, H, W\]"):
        make_signal("depth", clip, models=Models(lambda frames, progress: frames.mean((1, 2, 3)), models.segmentation))


def test_a_control_video_is_read_as_it_is(clip, tmp_path):
    edge = make_signal("edge", clip)
    path = edge.save(tmp_path / "edge.mp4", crf=0, pixel_format="yuv444p")
    np.testing.assert_array_equal(read(path, "edge", clip).frames, edge.frames)
    np.testing.assert_array_equal(read(str(path), "edge", clip).frames, edge.frames)
    np.testing.assert_array_equal(read(edge, "edge", clip).frames, edge.frames)
    np.testing.assert_array_equal(read(edge.frames, "edge", clip).frames, edge.frames)


@pytest.mark.parametrize(
    "kind, how",
    [("edge", cv2.INTER_LINEAR), ("vis", cv2.INTER_AREA), ("depth", cv2.INTER_LINEAR), ("seg", cv2.INTER_NEAREST)],
)
@pytest.mark.parametrize("size", [(24, 40), (96, 160), (30, 50)])
def test_another_size_is_resized_the_published_way(clip, kind, how, size):
    made = read_signal(clip, kind, size=size, frames=len(clip), fps=10)
    wanted = [cv2.resize(frame, size[::-1], interpolation=how) for frame in clip.frames]
    np.testing.assert_array_equal(made.frames, wanted)


def test_resizing_of_ids_makes_no_new_colours(clip):
    ids = (clip.frames[..., 0] > 150).astype(np.uint8) + 2 * (clip.frames[..., 2] > 180).astype(np.uint8)
    made = read_signal(ids, "seg", size=(30, 50), frames=len(clip), fps=10, seed=2)
    allowed = {tuple(colour) for colour in seg_map(ids, 2).reshape(-1, 3)}
    assert {tuple(colour) for colour in made.frames.reshape(-1, 3)} <= allowed


def test_another_length_is_refused_and_trim_is_the_way_out(clip):
    with pytest.raises(InputError, match="has 5 frames, the input 6: .*as long, or use only the first 5"):
        read(clip[:5], "edge", clip)
    with pytest.raises(InputError, match="has 5 frames, the input 6"):
        read(clip[:5], "edge", clip, trim=True)
    with pytest.raises(InputError, match="has 6 frames, the input 4: .*trim=True"):
        read(clip, "edge", clip[:4])
    np.testing.assert_array_equal(read(clip, "edge", clip[:4], trim=True).frames, clip.frames[:4])


def test_another_frame_rate_is_refused(clip):
    read(Video(clip.frames, 10.1), "blur", clip)  # within 2 %
    with pytest.raises(InputError, match="runs at 24 frames per second, the input at 10"):
        read(Video(clip.frames, 24), "blur", clip)


def test_another_aspect_ratio_is_refused(clip):
    read_signal(clip, "blur", size=(48, 81), frames=6, fps=10)  # within 2 %
    with pytest.raises(InputError, match="is 48x80, the output 48x64: .*same ratio"):
        read_signal(clip, "blur", size=(48, 64), frames=6, fps=10)


def test_an_image_is_a_control_of_one_frame(clip, tmp_path):
    path = tmp_path / "depth.png"
    Image.fromarray(clip.frames[0]).save(path)
    one = read_signal(path, "depth", size=(48, 80), frames=1, fps=16)
    np.testing.assert_array_equal(one.frames, clip.frames[:1])
    assert one.fps == 16
    with pytest.raises(InputError, match="has 1 frame, the input 6"):
        read(path, "depth", clip)


@pytest.fixture
def truth(tmp_path) -> tuple[Path, np.ndarray, np.ndarray]:
    """A simulated clip's folder, as sim.store writes it: its depth and its segmentation."""
    rng = np.random.default_rng(0)
    metres = rng.uniform(0.5, 9, (6, 24, 40)).astype(np.float16)
    metres[:, :3] = np.inf
    ids = rng.integers(0, 4, (6, 24, 40)).astype(np.uint8)
    np.savez_compressed(tmp_path / "depth.npz", main=metres)
    np.savez_compressed(tmp_path / "segmentation.npz", main=ids)
    return tmp_path, metres, ids


def test_the_simulators_truth(clip, truth):
    folder, metres, ids = truth
    want = dict(size=(24, 40), frames=6, fps=10)
    for source in (folder, folder / "depth.npz", metres):
        np.testing.assert_array_equal(read_signal(source, "depth", **want).frames, depth_map(metres))
    for source in (folder, folder / "segmentation.npz", ids, ids.astype(np.int64)):
        np.testing.assert_array_equal(read_signal(source, "seg", **want, seed=1).frames, seg_map(ids, 1))
    larger = read(folder, "depth", clip)
    wanted = [cv2.resize(frame, (80, 48), interpolation=cv2.INTER_LINEAR) for frame in depth_map(metres)]
    np.testing.assert_array_equal(larger.frames, wanted)
    part = read_signal(folder, "depth", size=(24, 40), frames=2, fps=10, trim=True)
    np.testing.assert_array_equal(part.frames, depth_map(metres[:2]))  # the range is that of what is used
    with pytest.raises(InputError, match="a simulated clip gives depth and seg"):
        read(folder, "edge", clip)


def test_grey_and_bool_arrays(clip):
    grey = clip.frames[..., 0]
    for kind in ("edge", "blur", "depth"):
        np.testing.assert_array_equal(read(grey, kind, clip).frames, np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(read(grey > 99, "edge", clip).frames[..., 1], 255 * (grey > 99))
    one = read_signal(grey[0], "depth", size=(48, 80), frames=1, fps=10)
    np.testing.assert_array_equal(one.frames[0, ..., 2], grey[0])


def test_several_cameras_in_one_file(clip, tmp_path):
    ids = (clip.frames[..., 0] > 99).astype(np.uint8)
    np.savez(tmp_path / "both.npz", front=ids, left=1 - ids)
    with pytest.raises(InputError, match=r"holds 2 arrays \(front, left\): say which one"):
        read(tmp_path / "both.npz", "seg", clip)
    with pytest.raises(InputError, match="no 'rear'; it holds front, left"):
        read(tmp_path / "both.npz", "seg", clip, camera="rear")
    np.testing.assert_array_equal(read(tmp_path / "both.npz", "seg", clip, camera="left").frames, seg_map(1 - ids))


@pytest.mark.parametrize(
    "kind, dtype, shape, word",
    [
        ("edge", np.float32, (6, 48, 80), "float32"),
        ("depth", np.int32, (6, 48, 80), "uint8 grey or float metres"),
        ("seg", np.float32, (6, 48, 80), "whole numbers"),
        ("blur", np.uint8, (6, 48, 80, 4), r"\[6, 48, 80, 4\]"),
    ],
)
def test_arrays_that_are_no_control(clip, kind, dtype, shape, word):
    with pytest.raises(InputError, match=word):
        read(np.ones(shape, dtype), kind, clip)


def test_files_that_are_no_control(clip, tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "text.npy").write_text("depth")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("broken.npz", "text.npy", "objects.npy", "none.npz", "none.mp4", "depth.exr"):
        with pytest.raises(InputError, match=name):
            read(tmp_path / name, "depth", clip)


def test_the_cache_gives_the_same_pixels_and_asks_the_model_once(clip, models, tmp_path):
    cache = SignalCache(tmp_path / "controls")
    first = make_signal("depth", clip, models=models, cache=cache)
    again = make_signal("depth", clip, models=models, cache=cache)
    assert models.depth.calls == 1 and again.fps == clip.fps
    np.testing.assert_array_equal(first.frames, again.frames)
    plain = make_signal("depth", clip, models=models).frames
    assert np.abs(first.frames.astype(int) - plain).max() <= 2  # 4:4:4 video, one step of its rounding
    edge = make_signal("edge", clip, cache=cache)
    np.testing.assert_array_equal(edge.frames, edge_map(clip.frames))
    assert len(list((tmp_path / "controls").iterdir())) == 2


def test_the_cache_tells_apart_what_differs(clip, models, tmp_path):
    cache = SignalCache(tmp_path / "controls")
    other = Video(clip.frames[::-1], clip.fps)
    named = Brightness()
    named.name = "other"
    made = [
        make_signal("edge", clip, cache=cache),
        make_signal("edge", clip, strength="low", cache=cache),
        make_signal("edge", other, cache=cache),
        make_signal("blur", clip, cache=cache),
        make_signal("depth", clip, models=models, cache=cache),
        make_signal("depth", clip, models=Models(named, models.segmentation), cache=cache),
        make_signal("seg", clip, prompt="a", models=models, cache=cache),
        make_signal("seg", clip, prompt="b", models=models, cache=cache),
        make_signal("seg", clip, prompt="b", models=models, cache=cache, seed=1),
    ]
    assert len(list((tmp_path / "controls").iterdir())) == len(made)
    with pytest.raises(InputError, match="function has no name"):
        make_signal("depth", clip, models=Models(lambda frames, progress: None, models.segmentation), cache=cache)


def test_a_broken_file_in_the_cache_is_made_again(clip, models, tmp_path, capsys):
    cache = SignalCache(tmp_path / "controls")
    first = make_signal("depth", clip, models=models, cache=cache)
    next((tmp_path / "controls").iterdir()).write_bytes(b"cut short")
    np.testing.assert_array_equal(make_signal("depth", clip, models=models, cache=cache).frames, first.frames)
    assert models.depth.calls == 2 and "made depth again" in capsys.readouterr().err


def test_a_cache_needs_a_place(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        SignalCache(tmp_path / "no" / "where")
