"""Pixel metrics against scikit-image; the two baselines on a square that moves."""

import numpy as np
import pytest

from orrery.eval import copy_last, empty_scene, fit_brightness, psnr, ssim
from orrery.eval.metrics import MOST_PSNR


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (3, 24, 31, 3)).astype(np.uint8)
    b = np.clip(a + rng.normal(0, [[[[5]]], [[[20]]], [[[60]]]], a.shape), 0, 255).astype(np.uint8)
    return a, b


def test_metrics_agree_with_scikit_image(pair):
    reference = pytest.importorskip("skimage.metrics")
    a, b = pair
    options = dict(data_range=255, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
    wanted = [reference.structural_similarity(x, y, **options) for x, y in zip(b, a, strict=True)]
    np.testing.assert_allclose(ssim(b, a), wanted, atol=1e-9)
    wanted = [reference.peak_signal_noise_ratio(x, y, data_range=255) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(psnr(b, a), wanted, atol=1e-9)
    assert psnr(b, a)[0] > psnr(b, a)[2] + 10


def test_an_exact_copy(pair):
    a, _ = pair
    assert (psnr(a, a) == MOST_PSNR).all()
    np.testing.assert_allclose(ssim(a, a), 1)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_metrics_refuse_other_arrays(pair, metric):
    a, b = pair
    with pytest.raises(ValueError, match=r"\[3, 24, 31, 3\] and \[2, 24, 31, 3\]"):
        metric(a, b[:2])
    with pytest.raises(ValueError, match="float32"):
        metric(a.astype(np.float32), b)


def square(places: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """A red square over a grey ramp, its left edge at `places`: frames and where it stands."""
    ramp = np.linspace(60, 180, 32).astype(np.uint8)
    frames = np.broadcast_to(ramp[None, None, :, None], (len(places), 16, 32, 3)).copy()
    taken = np.zeros(frames.shape[:3], bool)
    for t, x in enumerate(places):
        taken[t, 4:10, x : x + 6] = True
    frames[taken] = (220, 20, 20)
    return frames, taken


def test_copy_last_repeats_the_last_given_frame_and_keeps_the_given_ones():
    frames, _ = square([0, 2, 4, 8, 12])
    copied = copy_last(frames, 2)
    np.testing.assert_array_equal(copied[:2], frames[:2])
    assert all(np.array_equal(frame, frames[1]) for frame in copied[2:])
    quality = psnr(copied, frames)
    assert quality[2] > quality[3]  # the square has moved on
    for given in (0, 5):
        with pytest.raises(ValueError, match=f"given is {given}"):
            copy_last(frames, given)


def test_the_empty_scene_has_no_square_even_where_it_mostly_stood():
    a, taken_a = square([10, 10, 10, 10, 20])
    b, taken_b = square([12, 12])
    empty = empty_scene([a, b], [taken_a, taken_b])
    background = np.broadcast_to(np.linspace(60, 180, 32).astype(np.uint8)[None, :, None], (16, 32, 3))
    np.testing.assert_array_equal(empty, background)
    naive = np.median(np.concatenate([a, b]), axis=0)
    assert np.abs(naive - background).max() > 50  # a plain median would show it


def test_brightness_is_fitted_without_minding_the_object():
    frames, taken = square([3])
    empty = empty_scene([frames, square([20])[0]], [taken, square([20])[1]])
    brighter = np.clip(frames[0] * 1.3, 0, 255).astype(np.uint8)
    fitted = fit_brightness(empty, brighter).astype(int)
    free = ~taken[0]
    assert np.abs(fitted[free] - brighter[free]).max() <= 3


def test_empty_scene_wants_as_many_masks_as_clips():
    frames, taken = square([3])
    with pytest.raises(ValueError, match="1 clips and 2 masks"):
        empty_scene([frames], [taken, taken])
