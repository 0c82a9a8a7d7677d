"""Edge and blur against OpenCV and torch called here, step by step as the specification has them."""

import tracemalloc

import cv2
import numpy as np
import pytest
import torch

from orrery.control.blur import BLUR_PRESETS, blur_map
from orrery.control.edge import EDGE_PRESETS, edge_map, edges
from orrery.errors import InputError

PUBLISHED_EDGES = {
    "very_low": (20, 50),
    "low": (50, 100),
    "medium": (100, 200),
    "high": (200, 300),
    "very_high": (300, 400),
}
PUBLISHED_BLURS = {"very_low": (1, 4), "low": (4, 4), "medium": (2, 10), "high": (1, 16), "very_high": (4, 16)}


def test_presets_are_the_published_ones():
    assert EDGE_PRESETS == PUBLISHED_EDGES | {"none": (20, 50)}
    assert BLUR_PRESETS == PUBLISHED_BLURS | {"none": None}


@pytest.mark.parametrize("name, thresholds", PUBLISHED_EDGES.items())
def test_edges_are_cannys_of_each_rgb_frame(clip, name, thresholds):
    made = edge_map(clip.frames, name)
    assert made.shape == clip.frames.shape and made.dtype == np.uint8
    for frame, edge in zip(clip.frames, made, strict=True):
        wanted = cv2.Canny(np.ascontiguousarray(frame), *thresholds)
        assert (wanted > 0).any()
        for channel in range(3):
            np.testing.assert_array_equal(edge[..., channel], wanted)


def test_edge_presets_go_from_many_to_few_and_none_is_the_lowest(clip):
    counts = [int(edges(clip.frames, *EDGE_PRESETS[name]).sum()) for name in PUBLISHED_EDGES]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 5
    np.testing.assert_array_equal(edge_map(clip.frames, "none"), edge_map(clip.frames, "very_low"))
    np.testing.assert_array_equal(edge_map(clip.frames), edge_map(clip.frames, (100, 200)))


def published_blur(frame: np.ndarray, f: int, g: int) -> np.ndarray:
    height, width = frame.shape[:2]
    if f > 1:
        frame = cv2.resize(frame, (width // f, height // f), interpolation=cv2.INTER_AREA)
    frame = cv2.bilateralFilter(frame, d=30, sigmaColor=150, sigmaSpace=100)
    if f > 1:
        frame = cv2.resize(frame, (width, height), interpolation=cv2.INTER_LINEAR)
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].double()
    for size in ((height // g, width // g), (height, width)):
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        pixels = pixels.clamp(0, 255).round()
    return pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("name, factors", PUBLISHED_BLURS.items())
@pytest.mark.parametrize("size", [(48, 80), (47, 77)])
def test_blur_follows_the_published_steps(clip, name, factors, size):
    frames = clip.frames[:2, : size[0], : size[1]]
    made = blur_map(frames, name)
    assert made.shape == frames.shape and made.dtype == np.uint8
    wanted = np.stack([published_blur(np.ascontiguousarray(frame), *factors) for frame in frames])
    difference = np.abs(made - wanted)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.01  # ties that float32 and float64 round apart


def test_blur_takes_the_texture_and_leaves_the_light(clip):
    def texture(frames):
        return np.abs(np.diff(frames.astype(float), axis=2)).mean()

    for name in PUBLISHED_BLURS:
        assert texture(blur_map(clip.frames[:1], name)) < texture(clip.frames[:1]) / 3
    assert abs(blur_map(clip.frames[:1]).mean() - clip.frames[:1].mean()) < 2
    np.testing.assert_array_equal(blur_map(clip.frames, "none"), clip.frames)


@pytest.mark.parametrize("make, word", [(edge_map, "edge strength"), (blur_map, "blur strength")])
def test_other_strengths_are_refused(clip, make, word):
    with pytest.raises(InputError, match=f"{word} is 'strong'; allowed are .*very_low, low, medium, high, very_high"):
        make(clip.frames, "strong")
    for wrong in ((1, 2, 3), (-1, 4), (1.5, 4), 7):
        with pytest.raises(InputError, match=word):
            make(clip.frames, wrong)
    with pytest.raises(InputError, match="low threshold"):
        edge_map(clip.frames, (200, 100))


@pytest.mark.parametrize("make", [edge_map, blur_map])
def test_a_long_clip_is_held_once_more_and_no_more(make):
    frames = np.zeros((400, 32, 32, 3), np.uint8)
    make(frames[:1])  # imports
    tracemalloc.start()
    make(frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * frames.nbytes
