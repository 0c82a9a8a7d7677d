"""Depth and segmentation out of exact truth; scale and shift taken out of depth that was found frame by frame."""

import numpy as np
import pytest

from orrery.control.depth import aligned, depth_map, inverse_depth_map, still_pixels
from orrery.control.segmentation import colours, seg_map
from orrery.errors import InputError


def test_depth_is_grey_near_is_bright_over_the_range_of_the_clip():
    metres = np.full((3, 4, 5), 4.0, np.float32)
    metres[0, 0, 0], metres[1, 1, 1], metres[2] = 1.0, np.inf, 2.0
    made = depth_map(metres)
    assert made.shape == (3, 4, 5, 3) and made.dtype == np.uint8 and (made[..., :1] == made).all()
    assert made[0, 0, 0, 0] == 255 and made[1, 1, 1, 0] == 0  # 1 m, the sky
    assert made[0, 1, 1, 0] == 64 and (made[2] == 128).all()  # 255 / 4, 255 / 2
    np.testing.assert_array_equal(depth_map(metres.astype(np.float16)), made)
    np.testing.assert_array_equal(inverse_depth_map(7 / metres + 3), made)  # any unit, any offset


def test_depth_at_one_distance_is_black():
    assert (depth_map(np.full((2, 3, 3), 5.0)) == 0).all()


@pytest.mark.parametrize(
    "wrong", [np.ones((3, 3)), np.zeros((1, 3, 3)), np.full((1, 3, 3), np.nan), np.ones((1, 3, 3), np.uint16)]
)
def test_what_is_no_depth_is_refused(wrong):
    with pytest.raises(InputError, match=r"\[T, H, W\] float metres above 0"):
        depth_map(wrong)


def test_what_is_no_inverse_depth_is_refused():
    for wrong in (np.ones((3, 3)), np.full((1, 3, 3), np.inf), np.ones((0, 3, 3))):
        with pytest.raises(InputError, match="finite"):
            inverse_depth_map(wrong)


def moving_scene(frames: int, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures, true inverse depth, and what a model says that chooses scale and shift anew in each frame."""
    rng = np.random.default_rng(5)
    y, x = np.mgrid[:32, :40]
    truth = np.repeat((0.2 + y / 32 + 0.1 * np.sin(x / 5))[None], frames, 0)
    pictures = np.full((frames, 32, 40, 3), 90, np.uint8)
    for t in range(frames):
        place = np.s_[t, 8:18, 2 + t % 25 : 12 + t % 25]
        truth[place], pictures[place] = 2.0, (220, 30, 30)
    said = truth * rng.uniform(0.5, 2, (frames, 1, 1)) + rng.uniform(-0.3, 0.3, (frames, 1, 1))
    return pictures, truth, (said + rng.normal(0, noise, truth.shape)).astype(np.float32)


def chained(pictures: np.ndarray, said: np.ndarray) -> np.ndarray:
    out = said.copy()
    for t in range(1, len(out)):
        out[t] = aligned(out[t], out[t - 1], still_pixels(pictures[t], pictures[t - 1]))
    return out


def test_alignment_takes_out_what_each_frame_chose():
    pictures, truth, said = moving_scene(20)
    out = chained(pictures, said)
    scale, shift = np.polyfit(truth[0].ravel(), said[0].ravel(), 1)
    np.testing.assert_allclose(out, scale * truth + shift, atol=1e-4)  # the first frame's choice, everywhere
    assert np.abs(said - (scale * truth + shift)).max() > 0.3  # it was not so before


def test_alignment_does_not_fade_over_a_long_noisy_clip():
    """A least-squares slope is too small whenever there is noise: in a hundred frames nothing would be left."""
    pictures, truth, said = moving_scene(100, noise=0.08)
    out = chained(pictures, said)

    def slope(t):
        return np.polyfit(truth[t].ravel(), out[t].ravel(), 1)[0]

    assert 0.8 < slope(99) / slope(0) < 1.25

    faded = said.copy()
    for t in range(1, 100):
        faded[t] = np.polyval(np.polyfit(faded[t].ravel(), faded[t - 1].ravel(), 1), faded[t])
    assert np.polyfit(truth[99].ravel(), faded[99].ravel(), 1)[0] / slope(0) < 0.5


def test_still_pixels_differ_by_less_than_eight_in_every_colour():
    frame = np.array([[[9, 9, 9], [16, 9, 9], [17, 9, 9], [9, 9, 1], [255, 9, 9]]], np.uint8)
    before = np.full((1, 5, 3), 9, np.uint8)
    before[0, 4] = (1, 9, 9)  # 254 apart, 2 in bytes that wrap
    np.testing.assert_array_equal(still_pixels(frame, before), [[True, True, False, False, False]])


def test_what_moved_does_not_count_in_the_alignment():
    rng = np.random.default_rng(6)
    previous = rng.uniform(1, 5, (20, 20)).astype(np.float32)
    current = 0.5 * previous - 1
    still = np.ones((20, 20), bool)
    still[:12] = False
    current[:12] = rng.uniform(-9, 9, (12, 20))
    np.testing.assert_allclose(aligned(current, previous, still)[12:], previous[12:], atol=1e-4)


def test_alignment_under_a_sky_of_one_value():
    """Most of the picture is 0 in what the network says, as Depth Anything's sky; the rest must be aligned still."""
    rng = np.random.default_rng(2)
    previous = rng.uniform(1, 5, (40, 40)).astype(np.float32)
    previous[:30] = 0
    still = np.ones((40, 40), bool)
    current = 1.7 * previous
    moved = np.zeros((40, 40), bool)
    moved[32:36, :10] = True
    current[moved] = 9
    out = aligned(current, previous, still)
    np.testing.assert_allclose(out[~moved], previous[~moved], atol=0.02)


def test_alignment_stays_finite_on_flat_depth_and_when_everything_moves():
    flat = np.full((8, 8), 3.0, np.float32)
    ramp = np.arange(64, dtype=np.float32).reshape(8, 8)
    nothing = np.zeros((8, 8), bool)
    np.testing.assert_allclose(aligned(flat, ramp, nothing), np.full((8, 8), ramp.mean()))
    np.testing.assert_allclose(aligned(2 * ramp + 1, ramp, nothing), ramp, atol=1e-4)


def test_an_object_keeps_its_colour_and_black_is_nothing():
    ids = np.zeros((2, 3, 4), np.uint8)
    ids[0, 0, 0] = ids[1, 2, 3] = 7
    ids[1, 0, 0] = 8
    made = seg_map(ids, seed=4)
    assert made.shape == (2, 3, 4, 3) and made.dtype == np.uint8
    np.testing.assert_array_equal((made > 0).any(-1), ids > 0)
    np.testing.assert_array_equal(made[0, 0, 0], made[1, 2, 3])
    assert (made[0, 0, 0] != made[1, 0, 0]).any()
    np.testing.assert_array_equal(seg_map(ids, seed=4), made)
    assert (seg_map(ids, seed=5) != made).any()
    assert colours(255).max(1).min() >= 51  # value from 0.2: never near black


@pytest.mark.parametrize(
    "wrong", [np.zeros((3, 3), int), np.zeros((1, 3, 3)), np.full((1, 3, 3), 256), np.full((1, 3, 3), -1)]
)
def test_what_is_no_segmentation_is_refused(wrong):
    with pytest.raises(InputError, match="whole numbers from 0 to 255"):
        seg_map(wrong)
