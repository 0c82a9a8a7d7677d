"""Masks as users give them; weight maps against the published arithmetic, written out in loops."""

import math

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from orrery.control.masks import guidance_mask, normalised, read_guidance, read_mask, weight_maps
from orrery.errors import InputError
from orrery.video import Video

SIZE, FRAMES = (16, 24), 9


@pytest.fixture
def soft() -> np.ndarray:
    return np.random.default_rng(0).random((FRAMES, *SIZE)).astype(np.float32)


def grey(mask: np.ndarray) -> Video:
    return Video(np.repeat(np.rint(mask * 255).astype(np.uint8)[..., None], 3, -1), 10)


def test_arrays_keep_their_soft_values(soft, tmp_path):
    np.testing.assert_array_equal(read_mask(soft, SIZE, FRAMES), soft)
    np.save(tmp_path / "mask.npy", soft)
    np.savez(tmp_path / "mask.npz", soft)
    for name in ("mask.npy", "mask.npz"):
        np.testing.assert_array_equal(read_mask(tmp_path / name, SIZE, FRAMES), soft)
    bytes_ = np.rint(soft * 255).astype(np.uint8)
    np.testing.assert_allclose(read_mask(bytes_, SIZE, FRAMES), bytes_ / 255, atol=1e-7)
    hard = soft > 0.5
    for kind in (bool, np.uint8, np.int64, np.float64):
        made = read_mask(hard.astype(kind), SIZE, FRAMES)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, hard)


def test_one_picture_is_a_mask_for_all_frames(soft, tmp_path):
    np.testing.assert_array_equal(read_mask(soft[0], SIZE, 3), soft[[0, 0, 0]])
    picture = grey(soft[:1])
    Image.fromarray(picture.frames[0]).save(tmp_path / "mask.png")
    made = read_mask(tmp_path / "mask.png", SIZE, 3)
    np.testing.assert_allclose(made, picture.frames[[0, 0, 0], ..., 0] / 255, atol=1e-7)


def test_a_mask_video_is_resized_and_then_cut_at_half(soft, tmp_path):
    video = grey(soft)
    path = video.save(tmp_path / "mask.mp4", crf=0, pixel_format="yuv444p")
    decoded = Video.read(path).frames
    made = read_mask(path, (40, 60), FRAMES)
    larger = np.stack([cv2.resize(frame[..., 0], (60, 40), interpolation=cv2.INTER_LINEAR) for frame in decoded])
    np.testing.assert_array_equal(made, larger > 127.5)
    assert 0.1 < made.mean() < 0.9
    cut_first = cv2.resize((decoded[0, ..., 0] > 127.5).astype(np.float32), (60, 40)) > 0.5
    assert (made[0] != cut_first).any()  # the order matters
    red = np.zeros((1, *SIZE, 3), np.uint8)
    red[:, 4:8, :, 2] = 255
    assert read_mask(Video(red, 10), SIZE, 1).sum() == 4 * SIZE[1]  # a mask in any colour


def test_soft_arrays_are_resized_linearly(soft):
    made = read_mask(soft, (32, 48), FRAMES)
    np.testing.assert_allclose(made[3], cv2.resize(soft[3], (48, 32), interpolation=cv2.INTER_LINEAR), atol=1e-6)


@pytest.mark.parametrize(
    "mask, word",
    [
        (np.full((FRAMES, *SIZE), 1.5), "floats in 0..1"),
        (np.full((FRAMES, *SIZE), -0.1), "floats in 0..1"),
        (np.full((FRAMES, *SIZE), np.nan), "floats in 0..1"),
        (np.full((FRAMES, *SIZE), 256), "whole numbers in 0..255"),
        (np.full((FRAMES, *SIZE), "x"), "floats in 0..1"),
        (np.ones((FRAMES, *SIZE, 3), np.float32), r"a mask is \[T, H, W\], or \[H, W\] for all frames"),
        (np.ones((FRAMES - 1, *SIZE)), f"has {FRAMES - 1} frames, the input {FRAMES}"),
        (np.ones((FRAMES + 1, *SIZE)), "trim=True"),
        (np.ones((FRAMES, 16, 16)), "same ratio"),
    ],
)
def test_what_is_no_mask_is_refused(mask, word):
    with pytest.raises(InputError, match=word):
        read_mask(mask, SIZE, FRAMES)


def test_a_longer_mask_can_be_trimmed(soft):
    np.testing.assert_array_equal(read_mask(soft, SIZE, 5, trim=True), soft[:5])


def linear(values: np.ndarray, size: int) -> np.ndarray:
    """values [n, ...] at `size` places along the first axis: centres on centres, clamped at the ends."""
    n = len(values)
    out = []
    for i in range(size):
        place = max((i + 0.5) * n / size - 0.5, 0.0)
        low = min(math.floor(place), n - 1)
        part = place - low
        out.append((1 - part) * values[low] + part * values[min(low + 1, n - 1)])
    return np.stack(out)


def trilinear(mask: np.ndarray, grid: tuple[int, int, int]) -> np.ndarray:
    for axis, size in enumerate(grid):
        mask = np.moveaxis(linear(np.moveaxis(mask.astype(np.float64), axis, 0), size), 0, axis)
    return mask


def published(masks, weights, grid):
    """First frame to (1, H', W'), the rest to (T' - 1, H', W'), weighted, then over max(1, sum)."""
    maps = []
    for mask, weight in zip(masks, weights):
        mask = np.ones((FRAMES, *SIZE)) if mask is None else mask
        first = trilinear(mask[:1], (1, *grid[1:]))
        maps.append(weight * np.concatenate([first, trilinear(mask[1:], (grid[0] - 1, *grid[1:]))]))
    total = np.maximum(1, np.sum(maps, 0))
    return np.stack([each / total for each in maps])[:, None]


@pytest.mark.parametrize("grid", [(3, 4, 6), (3, 8, 12), (2, 5, 7)])
def test_weight_maps_are_the_published_arithmetic(soft, grid):
    masks, weights = [soft, None, soft[::-1]], [0.8, 0.6, 1.0]
    made = weight_maps(masks, weights, grid)
    assert made.shape == (3, 1, *grid) and made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), published(masks, weights, grid), atol=1e-6)
    assert made.sum(0).max() < 1 + 1e-6


def test_the_first_latent_frame_sees_the_first_frame_only(soft):
    mask = np.zeros_like(soft)
    mask[0] = 1
    made = weight_maps([mask], [1.0], (3, 4, 6))[0, 0]
    assert (made[0] == 1).all() and (made[1:] == 0).all()


def test_a_sum_below_one_is_left_alone_and_the_maps_are_scaled_once(soft):
    low = weight_maps([soft, soft], [0.2, 0.1], (3, 4, 6))
    np.testing.assert_allclose(low[0], 2 * low[1], rtol=1e-5)
    assert low.sum(0).max() < 0.31 and low.sum(0).min() > 0
    full = weight_maps([None, None], [1.0, 0.5], (3, 4, 6))
    np.testing.assert_allclose(full[:, 0, 0, 0, 0], [2 / 3, 1 / 3], rtol=1e-6)


def test_one_frame(soft):
    made = weight_maps([soft[:1]], [1.0], (1, 4, 6))
    np.testing.assert_allclose(made[0, 0].numpy(), trilinear(soft[:1], (1, 4, 6)), atol=1e-6)


def test_scalars_without_masks_are_capped_at_one_in_sum():
    assert normalised([0.3, 0.5]) == [0.3, 0.5]
    assert normalised([1.0]) == [1.0]
    assert normalised([1.0, 1.0, 0.0]) == [0.5, 0.5, 0.0]
    np.testing.assert_allclose(normalised([1.0, 0.6]), [0.625, 0.375])
    maps = weight_maps([None, None], [1.0, 0.6], (2, 2, 2))
    np.testing.assert_allclose(maps[:, 0, 0, 0, 0], normalised([1.0, 0.6]), rtol=1e-6)  # both paths agree


@pytest.mark.parametrize("weights", [[-0.1, 1.0], [0.0, 0.0], [math.nan], [math.inf, 1.0], []])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(InputError, match=r"weights"):
        normalised(weights)
    with pytest.raises(InputError, match=r"weights"):
        weight_maps([None] * len(weights), weights, (2, 2, 2))


def test_maps_of_other_shapes_are_refused(soft):
    with pytest.raises(InputError, match="1 masks for 2 weights"):
        weight_maps([soft], [1.0, 1.0], (3, 4, 6))
    with pytest.raises(InputError, match=r"\[T, H, W\] with values in 0..1"):
        weight_maps([soft * 2], [1.0], (3, 4, 6))
    with pytest.raises(InputError, match=r"\[T, H, W\] with values in 0..1"):
        weight_maps([soft[0]], [1.0], (3, 4, 6))
    for frames, latents in ((1, 3), (9, 1), (2, 3)):
        with pytest.raises(InputError, match=f"mask of {frames} frames does not go onto a grid of {latents}"):
            weight_maps([soft[:frames]], [1.0], (latents, 4, 6))


def test_guidance_is_soft_in_videos_and_by_label_in_arrays(soft, tmp_path):
    video = grey(soft)
    video.frames[..., 1:] = 255 - video.frames[..., 1:]  # the first colour alone counts
    np.testing.assert_allclose(read_guidance(video, SIZE, FRAMES), video.frames[..., 0] / 255, atol=1e-7)
    ids = np.random.default_rng(1).integers(0, 5, (FRAMES, *SIZE))
    np.savez(tmp_path / "labels.npz", ids)  # arr_0, as published
    made = read_guidance(tmp_path / "labels.npz", SIZE, FRAMES, labels=[2, 4])
    np.testing.assert_array_equal(made, (ids == 2) | (ids == 4))
    assert set(np.unique(read_guidance(ids, (32, 48), FRAMES, labels=[2]))) == {0, 1}
    np.testing.assert_array_equal(read_guidance(soft, SIZE, FRAMES), soft)
    with pytest.raises(InputError, match="labels .* a picture"):
        read_guidance(video, SIZE, FRAMES, labels=[1])
    with pytest.raises(InputError, match="need whole numbers"):
        read_guidance(soft, SIZE, FRAMES, labels=[1])
    with pytest.raises(InputError, match="say which of them count"):
        read_guidance(ids + 300, SIZE, FRAMES)


def test_guidance_over_latents_takes_frames_in_groups_of_four(soft):
    made = guidance_mask(soft, (3, 2, 3))
    assert made.shape == (1, 1, 3, 2, 3)
    groups = [trilinear(part, (1, 2, 3)) for part in (soft[:1], soft[1:5], soft[5:9])]
    np.testing.assert_allclose(made[0, 0].numpy(), np.concatenate(groups), atol=1e-6)
