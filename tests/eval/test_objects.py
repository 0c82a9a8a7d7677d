"""The detector on painted discs, and on rendered clips where the simulator knows the answer."""

import numpy as np
import pytest

from orrery.errors import OrreryError
from orrery.eval import ShapeVotes, detect
from orrery.eval.judging import found_track, true_tracks
from orrery.eval.objects import COLOURS


@pytest.mark.parametrize("floor", [(150, 104, 66), (142, 140, 136), (217, 204, 184), (191, 217, 242)])
def test_every_colour_is_found_where_it_is_on_every_floor(paint, floor):
    discs = [(c, 9.3 + 22 * (i % 3), 17.6 + 28 * (i // 3), 6.0) for i, c in enumerate(COLOURS)]
    found = detect(paint([discs], floor=floor))[0]
    assert sorted(item.colour for item in found) == sorted(COLOURS)
    for colour, x, y, radius in discs:
        item = next(f for f in found if f.colour == colour)
        assert np.hypot(item.x - x, item.y - y) < 0.3
        assert item.radius == pytest.approx(radius, abs=0.8)


def test_an_empty_floor_and_a_speck_are_no_objects(paint):
    assert detect(paint([[], [("red", 30, 30, 1.2)]])) == [[], []]


def test_noise_is_no_object():
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3)).astype(np.uint8)
    assert detect(noise) == [[], [], []]


def test_two_of_one_colour_are_two_but_an_arm_across_one_is_not(paint):
    frames = paint([[("blue", 15, 30, 6), ("blue", 45, 30, 7)], [("blue", 30, 30, 8)]])
    frames[1, :, 28:32] = (240, 240, 240)
    found = detect(frames)
    assert [item.colour for item in found[0]] == ["blue", "blue"]
    assert found[0][0].x == pytest.approx(45, abs=0.3)  # the largest first
    assert len(found[1]) == 1


def test_sizes_scale_with_the_picture(paint):
    small = detect(paint([[("green", 40.5, 90.5, 12)]], size=128))[0]
    assert [(item.colour, round(item.x), round(item.y)) for item in small] == [("green", 40, 90)]
    assert detect(paint([[("green", 40, 90, 3)]], size=128)) == [[]]  # a speck at that size


def test_detect_refuses_other_arrays():
    with pytest.raises(ValueError, match="float64"):
        detect(np.zeros((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="square"):
        ShapeVotes.fit([(detect_one(), "square")], 64)
    with pytest.raises(ValueError, match="no example"):
        ShapeVotes.fit([], 64)


def detect_one():
    frame = np.full((1, 64, 64, 3), 200, np.uint8)
    frame[0, 20:32, 20:32] = (217, 31, 26)
    return detect(frame)[0][0]


@pytest.fixture(scope="module")
def rendered():
    """Clips of both scenes, and of both looks."""
    from orrery.sim import simulate
    from orrery.sim.render import import_mujoco

    try:
        import_mujoco()
    except OrreryError as error:
        pytest.skip(str(error))
    wanted = [("drop", 3), ("drop", 4), ("drop", 5), ("push", 3), ("push", 4), ("push", 5)]
    return [simulate(scene, seed, look=("plain", "real")[seed % 2]) for scene, seed in wanted]


def test_rendered_objects_are_found_within_a_pixel(rendered):
    errors = []
    for clip in rendered:
        colours = {i + 1: thing.colour for i, thing in enumerate(clip.things) if thing.colour}
        found = detect(clip.frames[0])
        for colour, truth in true_tracks(clip.segmentation[0], colours).items():
            error = np.linalg.norm(found_track(found, colour).centre - truth.centre, axis=1)
            visible = ~np.isnan(truth.centre[:, 0])
            errors += list(np.nan_to_num(error[visible], nan=99))
        strangers = [item.colour for frame in found for item in frame if item.colour not in colours.values()]
        assert not strangers
    assert len(errors) > 100
    assert np.mean(np.array(errors) < 1) >= 0.95


def test_the_shape_vote_tells_rendered_shapes_apart(rendered):
    examples, asked = [], []
    for clip in rendered:
        shapes = {thing.colour: thing.shape for thing in clip.things if thing.colour}
        for t, frame in enumerate(detect(clip.frames[0])):
            (asked if t % 4 == 2 else examples).extend((item, shapes[item.colour]) for item in frame)
    votes = ShapeVotes.fit(examples, 64)
    right = [shape == ("ball", "cube", "cylinder")[int(votes.vote(item, 64).argmax())] for item, shape in asked]
    assert len({shape for _, shape in asked}) >= 2
    assert np.mean(right) >= 0.9


def test_the_colours_are_those_of_the_worlds():
    from orrery.sim import COLOURS as PAINTS

    assert set(COLOURS) == set(PAINTS)
