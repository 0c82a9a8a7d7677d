"""Captions say what happened: every word is held against the poses and the segmentation, scene code unseen."""

import numpy as np
import pytest

from orrery.sim.looks import PHRASE

SEEN = 12  # pixels of 64 x 64


def test_a_caption_names_the_look_and_only_seen_things(sample):
    *body, phrase = sample.caption.split(", ")
    assert phrase == PHRASE[sample.look]
    pixels = [(sample.segmentation[0] == i + 1).sum((1, 2)).max() for i in range(len(sample.things))]
    named = [thing.colour != "" and f"{thing.colour} {thing.shape}" in sample.caption for thing in sample.things]
    for thing, count, word in zip(sample.things, pixels, named, strict=True):
        if thing.colour:
            assert word == (count >= SEEN), (sample.caption, thing.name, count)
    assert len(sample.caption.replace(",", " ,").split()) <= 40  # the small model's text length


@pytest.mark.parametrize("seed", range(10))
def test_drop_directions(clip, seed):
    shot = clip("drop", seed, "plain", 96 if seed < 8 else 64)
    for i, phrase in enumerate(shot.caption.split(", ")[:-1]):
        assert f"a {shot.things[i].colour} {shot.things[i].shape} " in phrase
        way = shot.position[:, i] - shot.position[0, i]
        if "to the" in phrase:
            assert np.sign(way[2, 0]) == (1 if "right" in phrase else -1)
        if "falls" in phrase:
            low = way[:, 2].argmin()
            assert way[low, 2] < -0.4
            assert (way[low:, 2].max() - way[low, 2] > 0.25) == ("bounces" in phrase)
        if "stands still" in phrase:
            assert np.linalg.norm(way, axis=1).max() <= 0.15  # a nudge of a quarter radius


@pytest.mark.parametrize("seed", range(4))
def test_push_directions(clip, seed):
    shot = clip("push", seed, ("plain", "real")[seed % 2])
    head = shot.caption.split(", ")[0]
    move = shot.position[-1] - shot.position[0]
    pushed = next(i for i, t in enumerate(shot.things) if f"pushes the {t.colour} {t.shape}" in head)
    axis = 0 if "to the" in head else 1
    sign = 1 if ("right" in head or "away" in head) else -1
    assert np.sign(move[pushed, axis]) == sign and abs(move[pushed, axis]) > abs(move[pushed, 1 - axis])
    for i, thing in enumerate(shot.things[:-1]):
        if f"a {thing.colour} {thing.shape} stands still" in shot.caption:
            assert np.linalg.norm(move[i]) < 0.05


@pytest.mark.parametrize("seed", range(8))
def test_drive_manoeuvres(clip, seed):
    shot = clip("drive", seed, ("plain", "real")[seed % 2])
    head = shot.caption.split(", ")[0]
    centres = [np.asarray(line["points"])[:, :2] for line in shot.lanes if line["kind"] == "lane_centre"]

    def lane(thing, frame):  # from right to left
        gaps = [np.linalg.norm(c - shot.position[frame, thing, :2], axis=1).min() for c in centres]
        return int(np.argmin(gaps))

    ego = len(shot.things) - 1
    change = lane(ego, -1) - lane(ego, 0)
    assert change == (1 if "lane to the left" in head else -1 if "lane to the right" in head else 0), head
    w, _, _, z = shot.quaternion[:, ego].T
    yaw = np.unwrap(2 * np.arctan2(z, w))
    if "curve" in head and not change:
        assert np.sign(yaw[-1] - yaw[0]) == (1 if "curve to the left" in head else -1)
    if "straight" in head:
        assert np.ptp(yaw) < 0.1
    speed = np.linalg.norm(np.diff(shot.position[:, ego, :2], axis=0), axis=1) * shot.fps
    gain = speed[-1] - speed[0]
    assert (gain < -1) == ("brakes" in head or "stops" in head) and (gain > 1) == ("speeds up" in head)
    for i, thing in enumerate(shot.things[:-1]):
        side = {0: "ahead", 1: "on the left", -1: "on the right"}[int(np.sign(lane(i, 0) - lane(ego, 0)))]
        if thing.name in shot.caption:
            assert f"a {thing.name} {side}" in shot.caption
