"""Perceiver and look classifier on a tiny world: a coloured square above a ramp, near where it is low."""

import numpy as np
import pytest
import torch

from orrery.eval.objects import COLOURS
from orrery.eval.perception import (
    CLASSES,
    LookClassifier,
    Perceiver,
    centroid_errors,
    class_iou,
    class_map,
    inverse_depth,
    looks_real,
    perceive,
    train_look_classifier,
    train_perceiver,
)

PAINT = {"red": (220, 30, 25), "blue": (25, 60, 230), "arm": (240, 240, 240)}


def world(count: int, seed: int, texture: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(frames [N, 32, 32, 3], classes, inverse depth) of squares in three paints, `texture` in grey levels."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(60, 180, 32)[None, :, None, None]
    frames = np.broadcast_to(ramp + rng.normal(0, texture, (count, 32, 32, 1)), (count, 32, 32, 3)).astype(np.uint8)
    classes, inverse = np.zeros((count, 32, 32), np.uint8), np.empty((count, 32, 32), np.float32)
    inverse[:] = np.linspace(0.1, 0.2, 32)[None, :, None]
    for i in range(count):
        name = str(rng.choice(list(PAINT)))
        y, x = rng.integers(0, 22, 2)
        where = np.s_[i, y : y + 10, x : x + 10]
        frames[where], classes[where], inverse[where] = PAINT[name], CLASSES.index(name), 0.25
    return frames, classes, inverse


@pytest.fixture(scope="module")
def perceiver() -> Perceiver:
    return train_perceiver(*world(96, 0), seed=1, steps=120, width=16)


def test_it_learns_what_is_where_and_how_near(perceiver):
    frames, classes, inverse = world(32, 7)
    seen = perceive(perceiver, frames)
    assert seen.classes.shape == seen.inverse.shape == classes.shape
    assert seen.classes.dtype == np.uint8 and seen.inverse.dtype == np.float32
    iou = class_iou(seen.classes, classes)
    assert all(iou[CLASSES.index(name)] > 0.6 for name in PAINT)
    assert centroid_errors(seen.classes, classes).mean() < 2
    constant = np.abs(inverse - np.median(inverse)).mean()
    assert np.abs(seen.inverse - inverse).mean() < constant / 2


def test_a_seed_is_one_network_whatever_else_was_drawn(perceiver):
    torch.rand(3)
    before = torch.random.get_rng_state()
    again = train_perceiver(*world(96, 0), seed=1, steps=120, width=16)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(perceiver.state_dict().values(), again.state_dict().values()))
    other = train_perceiver(*world(96, 0), seed=2, steps=1, width=16)
    assert not torch.equal(other.head.weight, perceiver.head.weight)


def test_it_trains_without_depth_and_inside_no_grad():
    frames, classes, _ = world(20, 3)
    with torch.no_grad():
        net = train_perceiver(frames, classes, steps=2, width=8)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert perceive(net, frames[:1]).classes.shape == (1, 32, 32)


def test_a_picture_is_seen_alike_alone_and_among_others(perceiver):
    frames, _, _ = world(130, 5)
    together = perceive(perceiver, frames)
    alone = perceive(perceiver, frames[129:])
    np.testing.assert_allclose(together.inverse[129:], alone.inverse, atol=1e-5)


def test_mirroring_turns_truth_as_it_turns_pictures():
    # a world that is lit from the left: right if labels stay with their pixels, hopeless if they do not
    frames, classes, inverse = world(64, 9)
    left = np.zeros_like(classes)
    left[:, :, :16] = CLASSES.index("arm")
    frames[:, :, :16] = 250
    net = train_perceiver(frames, left, seed=0, steps=100, width=16)
    for turn in (1, -1):
        assert (perceive(net, frames[:, :, ::turn].copy()).classes == left[:, :, ::turn]).mean() > 0.95


def test_the_look_classifier_tells_texture_from_none():
    frames = np.concatenate([world(48, 1)[0], world(48, 2, texture=30)[0]])
    real = np.arange(96) >= 48
    net = train_look_classifier(frames, real, seed=0, steps=100, width=16)
    assert isinstance(net, LookClassifier)
    shares = [looks_real(net, world(24, 5, texture=each)[0]) for each in (0, 30)]
    assert all(share.shape == (24,) and share.min() >= 0 and share.max() <= 1 for share in shares)
    assert shares[0].mean() < 0.2 and shares[1].mean() > 0.8


def test_classes_of_a_segmentation():
    segmentation = np.array([[[0, 1], [2, 2]]], np.uint8)
    found = class_map(segmentation, {1: "blue", 2: "arm"})
    np.testing.assert_array_equal(found, [[[0, 1 + list(COLOURS).index("blue")], [7, 7]]])
    with pytest.raises(ValueError, match=r"ids \[2\]"):
        class_map(segmentation, {1: "blue"})
    with pytest.raises(ValueError, match="thing 1 is 'pink'"):
        class_map(segmentation, {1: "pink", 2: "arm"})


def test_inverse_depth_of_the_sky_is_0():
    np.testing.assert_array_equal(inverse_depth(np.array([[[2.0, np.inf]]], np.float32)), [[[0.5, 0.0]]])


def test_iou_by_class():
    truth = np.array([[[0, 0, 1, 1]]], np.uint8)
    iou = class_iou(np.array([[[0, 1, 1, 1]]], np.uint8), truth)
    np.testing.assert_allclose(iou[:2], [1 / 2, 2 / 3])
    assert np.isnan(iou[2:]).all()
    assert class_iou(truth, truth)[1] == 1
    with pytest.raises(ValueError, match=r"\[1, 1, 4\] and \[1, 1, 3\]"):
        class_iou(truth, truth[..., :3])


def test_centroid_errors_count_the_missing_as_half_a_picture():
    truth = np.zeros((2, 32, 32), np.uint8)
    truth[:, 8:16, 8:16] = 1
    seen = np.zeros_like(truth)
    seen[0, 8:16, 11:19] = 1
    np.testing.assert_allclose(centroid_errors(seen, truth), [3, 16])
    assert centroid_errors(seen, np.zeros_like(truth)).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": np.zeros((4, 32, 32, 3), np.float32)}, "float32"),
        ({"frames": np.zeros((4, 30, 32, 3), np.uint8)}, "30x32"),
        ({"classes": np.zeros((4, 32, 31), np.uint8)}, r"\[4, 32, 31\]"),
        ({"classes": np.full((4, 32, 32), 8, np.uint8)}, "up to 8"),
        ({"inverse": np.zeros((3, 32, 32), np.float32)}, r"\[3, 32, 32\]"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_training_refuses_what_does_not_fit(change, message):
    frames, classes, inverse = world(4, 0)
    asked = {"frames": frames, "classes": classes, "inverse": inverse, "steps": 1, "width": 8} | change
    with pytest.raises(ValueError, match=message):
        train_perceiver(**asked)


def test_a_look_classifier_needs_both_looks():
    with pytest.raises(ValueError, match="some of either"):
        train_look_classifier(world(4, 0)[0], np.ones(4, bool))
    with pytest.raises(ValueError, match=r"\[0, 32, 32, 3\]"):
        looks_real(LookClassifier(8), np.zeros((0, 32, 32, 3), np.uint8))
