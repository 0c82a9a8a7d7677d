"""Control adherence against scikit-image, OpenCV and SciPy on the same input, and what each number must do."""

import cv2
import numpy as np
import pytest

from orrery.errors import InputError
from orrery.eval.control import (
    EdgeScore,
    assign,
    blur_ssim,
    by_phrase,
    comparable,
    depth_si_rmse,
    edge_f1,
    mask_miou,
)


@pytest.fixture(scope="module")
def truth() -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:36, :52]
    out = np.empty((3, 36, 52, 3), np.uint8)
    for t in range(3):
        picture = np.stack([90 + 60 * np.sin(x / 9 + c) * np.cos(y / 11) for c in range(3)], -1)
        picture[8:20, 6 + 4 * t : 22 + 4 * t] = [220, 60, 30]
        out[t] = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255)
    return out


@pytest.fixture(scope="module")
def other(truth) -> np.ndarray:
    """The same scene, lighter, with other noise, its square a little lower."""
    moved = np.roll(truth, 2, axis=1).astype(float) * 1.1 + 10
    return np.clip(moved + np.random.default_rng(1).normal(0, 8, truth.shape), 0, 255).astype(np.uint8)


def test_blur_ssim_agrees_with_scikit_image(truth, other):
    reference = pytest.importorskip("skimage.metrics").structural_similarity
    wanted = []
    for made, real in zip(other, truth):
        made, real = (cv2.bilateralFilter(frame, 30, 150, 100) for frame in (made, real))
        wanted.append(reference(made, real, data_range=int(real.max()) - int(real.min()), channel_axis=-1))
    assert blur_ssim(other, truth) == pytest.approx(np.mean(wanted), abs=1e-9)
    assert 0.2 < np.mean(wanted) < 0.95


def test_blur_ssim_is_one_on_a_copy_and_falls_with_what_blur_keeps(truth, other):
    assert blur_ssim(truth, truth) == pytest.approx(1)
    grain = np.clip(truth + np.random.default_rng(2).normal(0, 6, truth.shape), 0, 255).astype(np.uint8)
    light = np.clip(truth.astype(int) + 80, 0, 255).astype(np.uint8)
    assert blur_ssim(grain, truth) > 0.97 > blur_ssim(light, truth) > blur_ssim(truth[..., ::-1], truth)
    flat = np.full_like(truth, 90)
    assert blur_ssim(flat, flat) == pytest.approx(1) and blur_ssim(truth, flat) < 0.1


def test_edge_f1_agrees_with_opencv_and_scipy(truth, other):
    distance = pytest.importorskip("scipy.spatial.distance")
    table = pytest.importorskip("skimage.metrics").contingency_table
    made, real = (np.stack([cv2.Canny(f, 100, 200) > 0 for f in clip]).ravel() for clip in (other, truth))
    counts = table(real.astype(int), made.astype(int)).toarray()
    score = edge_f1(other, truth)
    assert score.f1 == pytest.approx(1 - distance.dice(made, real))
    assert score.precision == pytest.approx(counts[1, 1] / counts[:, 1].sum())
    assert score.recall == pytest.approx(counts[1, 1] / counts[1].sum())
    assert 0 < score.recall < 1 and score.precision != score.recall
    assert edge_f1(other, truth, (20, 50)) != score


def test_edges_are_pooled_over_the_clip_and_have_no_tolerance(truth):
    assert edge_f1(truth, truth) == EdgeScore(1, 1, 1)
    shifted = np.roll(truth, 1, axis=2)
    assert edge_f1(shifted, truth).f1 < 0.6
    empty = np.full_like(truth, 90)
    half = np.concatenate([truth[:1], empty[:1]])
    pooled = edge_f1(half, truth[:2])
    share = (cv2.Canny(truth[0], 100, 200) > 0).sum() / sum((cv2.Canny(f, 100, 200) > 0).sum() for f in truth[:2])
    assert pooled.precision == 1 and pooled.recall == pytest.approx(share)


def test_clips_without_edges(truth):
    empty = np.full_like(truth, 90)
    assert edge_f1(empty, empty) == EdgeScore(1, 1, 1)
    assert edge_f1(empty, truth) == edge_f1(truth, empty) == EdgeScore(0, 0, 0)


def depths() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    real = rng.uniform(0.5, 9, (4, 12, 15))
    made = real * np.exp(rng.normal(0, 0.2, real.shape)) * 3
    made[0, 0], real[1, 1], made[2, 2, 2], real[3, 3, 3] = 0, -1, np.nan, np.inf
    return made, real


def test_depth_error_agrees_with_scikit_image():
    reference = pytest.importorskip("skimage.metrics").mean_squared_error
    made, real = depths()
    wanted = []
    for t in range(4):
        pairs = [(m, r) for m, r in zip(made[t].ravel(), real[t].ravel()) if 0 < m < np.inf and 0 < r < np.inf]
        m, r = np.array(pairs).T
        wanted.append(reference(r, m * np.median(r) / np.median(m)) ** 0.5)
    assert depth_si_rmse(made, real) == pytest.approx(np.mean(wanted), rel=1e-12)
    assert depth_si_rmse(made, real) > 0.3


def test_depth_error_forgives_a_factor_and_no_offset():
    _, real = depths()
    real = np.abs(real)
    real[3, 3, 3] = 1
    assert depth_si_rmse(real, real) == 0
    assert depth_si_rmse(7.5 * real, real) == pytest.approx(0, abs=1e-12)
    factors = np.array([0.1, 2, 3, 50])[:, None, None]  # another in each frame
    assert depth_si_rmse(factors * real, real) == pytest.approx(0, abs=1e-12)
    assert depth_si_rmse(real + 2, real) > 0.3
    assert depth_si_rmse(real.astype(np.float16), real) < 0.01


def test_depth_without_pixels_that_count():
    _, real = depths()
    real = np.abs(real)
    worse = real + 2
    everything = depth_si_rmse(worse, real)
    first = depth_si_rmse(worse[:1], real[:1])
    worse[0] = 0
    assert depth_si_rmse(worse, real) == pytest.approx(everything - first / 4)  # that frame adds 0
    with pytest.raises(InputError, match="in no frame"):
        depth_si_rmse(np.zeros_like(real), real)


def boxes(*places: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """Masks [2, 20, 30]: name i is a square of that side at (top, left)."""
    out = {}
    for index, (top, left, side) in enumerate(places):
        mask = np.zeros((2, 20, 30), bool)
        mask[:, top : top + side, left : left + side] = True
        out[f"thing {index}"] = mask
    return out


def test_mask_iou_and_matching_agree_with_scipy():
    distance = pytest.importorskip("scipy.spatial.distance")
    solve = pytest.importorskip("scipy.optimize").linear_sum_assignment
    made = boxes((1, 1, 8), (2, 10, 6), (3, 19, 7), (0, 0, 3))
    real = boxes((2, 20, 7), (2, 2, 8), (3, 9, 9))
    ious = np.array([[1 - distance.jaccard(m.ravel(), r.ravel()) for r in real.values()] for m in made.values()])
    rows, columns = solve(ious, maximize=True)
    matched = ious[rows, columns]
    score = mask_miou(made, real)
    assert score.miou == pytest.approx(matched[matched > 0.1].mean())
    assert score.recall == pytest.approx((matched > 0.1).sum() / 3) == 1
    wanted = [(f"thing {r}", f"thing {c}", pytest.approx(ious[r, c])) for r, c in zip(rows, columns)]
    assert list(score.matches) == wanted


def test_assignment_is_as_good_as_scipys():
    solve = pytest.importorskip("scipy.optimize").linear_sum_assignment
    rng = np.random.default_rng(7)
    for trial in range(300):
        gain = rng.random(rng.integers(1, 9, 2))
        if trial % 3 == 0:
            gain = np.round(gain * 3) / 3  # ties
        pairs = assign(gain)
        assert len(pairs) == min(gain.shape) == len({r for r, _ in pairs}) == len({c for _, c in pairs})
        rows, columns = solve(gain, maximize=True)
        assert sum(gain[pair] for pair in pairs) == pytest.approx(gain[rows, columns].sum())
    assert assign(np.zeros((0, 3))) == assign(np.zeros((3, 0))) == []


def test_greedy_matching_would_be_worse():
    gain = np.array([[0.9, 0.8], [0.8, 0.1]])
    assert assign(gain) == [(0, 1), (1, 0)]


def test_misses_lower_recall_only_and_what_is_too_much_nothing():
    real = boxes((1, 1, 8), (2, 12, 6))
    exact = mask_miou(real, real)
    assert exact.miou == exact.recall == 1
    extra = mask_miou(real | {"more": boxes((14, 24, 5))["thing 0"]}, real)
    assert (extra.miou, extra.recall) == (1, 1)
    missed = mask_miou(real, real | {"more": boxes((14, 24, 5))["thing 0"]})
    assert (missed.miou, missed.recall) == (1, pytest.approx(2 / 3))
    renamed = {f"other {name}": mask for name, mask in real.items()}
    assert mask_miou(renamed, real).recall == 1


def test_a_match_needs_more_than_a_tenth():
    real = boxes((0, 0, 10))
    barely = mask_miou(boxes((0, 0, 4)), real)  # 16 of 100
    assert (barely.miou, barely.recall) == (pytest.approx(0.16), 1)
    under = mask_miou(boxes((0, 0, 3)), real)  # 9 of 100
    assert (under.miou, under.recall) == (0, 0) and under.matches[0][2] == pytest.approx(0.09)
    nothing = mask_miou({}, real)
    assert (nothing.miou, nothing.recall, nothing.matches) == (0, 0, ())


def test_overlap_is_over_space_and_time():
    real = boxes((0, 0, 10))
    half = {"thing": real["thing 0"].copy()}
    half["thing"][1] = False  # right in one of two frames
    assert mask_miou(half, real).miou == pytest.approx(0.5)


def test_things_of_one_name_are_one_mask():
    ids = np.array([[[0, 1, 2], [3, 3, 0]]], np.uint8)
    masks = by_phrase(ids, ("cup", "table", "cup"))
    assert list(masks) == ["cup", "table"]
    np.testing.assert_array_equal(masks["cup"], [[[0, 1, 0], [1, 1, 0]]])
    np.testing.assert_array_equal(masks["table"], [[[0, 0, 1], [0, 0, 0]]])
    with pytest.raises(InputError, match="from 0 to 3; allowed are 0 to 2"):
        by_phrase(ids, ("cup", "table"))


def test_comparable_takes_the_size_of_the_truth_and_the_shorter_length(truth):
    large = np.repeat(np.repeat(truth, 2, 1), 2, 2)
    made, real = comparable(large, truth[:2])
    assert made.shape == real.shape == (2, 36, 52, 3)
    np.testing.assert_array_equal(made, truth[:2])  # area: the mean of each 2 x 2
    made, real = comparable(truth[:1], large)
    assert made.shape == real.shape == (1, 72, 104, 3)
    np.testing.assert_array_equal(made[0], cv2.resize(truth[0], (104, 72), interpolation=cv2.INTER_LINEAR))


def test_other_arrays_are_refused(truth):
    for metric in (blur_ssim, edge_f1):
        with pytest.raises(InputError, match=r"\[3, 36, 52, 3\] and \[2, 36, 52, 3\]"):
            metric(truth, truth[:2])
        with pytest.raises(InputError, match="float64"):
            metric(truth.astype(float), truth)
    with pytest.raises(InputError, match="at least 7x7"):
        blur_ssim(truth[:, :6], truth[:, :6])
    with pytest.raises(InputError, match="one shape"):
        depth_si_rmse(truth[..., 0], truth[:2, ..., 0])
    with pytest.raises(InputError, match="got 0 true"):
        mask_miou(boxes((0, 0, 3)), {})
    with pytest.raises(InputError, match="of one shape"):
        mask_miou(boxes((0, 0, 3)), {"a": np.zeros((3, 20, 30), bool)})
