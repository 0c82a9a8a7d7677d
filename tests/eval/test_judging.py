"""Verdicts on painted clips, where every answer is known."""

import numpy as np
import pytest

from orrery.eval import Phrase, ShapeVotes, detect, judge, parse_caption
from orrery.eval.judging import Track

CAPTION = "a red ball rolls to the right, plain look"


@pytest.fixture
def votes(paint):
    """Knows one shape only: what is asked of it here is colour and motion."""
    return ShapeVotes.fit([(detect(paint([[("red", 30, 30, 6)]]))[0][0], "ball")], 64)


def roll(steps, colour="red", y=40.0):
    return [[(colour, 12 + step, y, 6.0)] for step in steps]


def track(steps, y=40.0, area=113):
    return Track(np.array([[12 + step, y] for step in steps], float), np.full(len(steps), area))


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        (
            "a red cube is thrown to the left and hits the yellow ball, a yellow ball is hit, plain look",
            [("red", "cube", "left"), ("yellow", "ball", None)],
        ),
        ("a cyan ball falls and bounces, a blue cube stands still", [("cyan", "ball", "down"), ("blue", "cube", None)]),
        ("a green cube slides to the right, realistic look", [("green", "cube", "right")]),
        (
            "a robot arm pushes the purple cylinder to the left into the yellow cylinder, realistic look",
            [("purple", "cylinder", "left"), ("yellow", "cylinder", None)],
        ),
        ("a robot arm pushes the red cube away, a blue cube", [("red", "cube", "away"), ("blue", "cube", None)]),
        ("a robot arm pushes the red cube closer, plain look", [("red", "cube", "closer")]),
        ("a dog barks", []),
    ],
)
def test_captions(caption, phrases):
    assert parse_caption(caption) == tuple(Phrase(*phrase) for phrase in phrases)


def test_a_true_clip_is_right_in_everything(paint, votes):
    steps = np.arange(9) * 4
    verdict = judge(paint(roll(steps)), CAPTION, votes, given=5, truth={"red": track(steps)})
    assert verdict.error.shape == verdict.radius.shape == (1, 4)
    assert verdict.error.max() < 0.2
    assert verdict.count_right.tolist() == [True] * 4
    assert verdict.count_kept and verdict.colour_right.all() and verdict.shape_right.all()
    assert verdict.told == verdict.went == (True,)


def test_errors_are_in_pixels_and_given_frames_do_not_count(paint, votes):
    steps = np.arange(9.0) * 4
    off = steps.copy()
    off[:5] += 9
    off[5:] += 3
    verdict = judge(paint(roll(off)), CAPTION, votes, given=5, truth={"red": track(steps)})
    np.testing.assert_allclose(verdict.error, 3, atol=0.2)


def test_an_object_that_vanishes_counts_as_half_the_picture(paint, votes):
    steps = np.arange(9) * 4
    discs = roll(steps[:7]) + [[], []]
    verdict = judge(paint(discs), CAPTION, votes, given=5, truth={"red": track(steps)})
    np.testing.assert_allclose(verdict.error[0, 2:], 32)
    assert verdict.count_right.tolist() == [True, True, False, False]


def test_where_truth_hides_the_object_nothing_is_asked(paint, votes):
    steps = np.arange(9) * 4
    truth = track(steps)
    truth.centre[7:], truth.area[7:] = np.nan, 0
    verdict = judge(paint(roll(steps[:7]) + [[], []]), CAPTION, votes, given=5, truth={"red": truth})
    assert np.isnan(verdict.error[0, 2:]).all()
    assert verdict.count_right.all() and verdict.count_kept


@pytest.mark.parametrize("extra", [("blue", 50, 12, 6.0), ("red", 50, 12, 6.0)])
def test_one_object_too_many(paint, votes, extra):
    discs = [[*items, extra] for items in roll(np.arange(9) * 2)]
    verdict = judge(paint(discs), CAPTION, votes)
    assert not verdict.count_right.any() and not verdict.count_kept
    assert verdict.colour_right.all()  # the named one is there


def test_another_colour_is_wrong(paint, votes):
    verdict = judge(paint(roll(np.arange(9) * 4, "cyan")), CAPTION, votes)
    assert not verdict.colour_right.any() and not verdict.count_kept and not verdict.shape_right.any()
    assert verdict.told == (False,)
    assert verdict.error is None and verdict.went == ()


def test_directions(paint, votes):
    still, right = np.zeros(9), np.arange(9) * 4
    assert judge(paint(roll(right)), CAPTION, votes).told == (True,)
    assert judge(paint(roll(still)), CAPTION, votes).told == (False,)
    assert judge(paint(roll(right)), CAPTION.replace("right", "left"), votes).told == (False,)
    fall = [[("red", 30, 10 + 4 * t, 6.0)] for t in range(9)]
    for caption, wanted in (("falls", True), ("is thrown to the right", False)):
        assert judge(paint(fall), f"a red ball {caption}", votes).told == (wanted,)
    for caption, wanted in (("away", False), ("closer", True)):
        assert judge(paint(fall), f"a robot arm pushes the red ball {caption}", votes).told == (wanted,)


def test_going_where_the_truth_goes(paint, votes):
    steps = np.arange(9) * 4
    truth = {"red": track(steps)}
    back = np.concatenate([steps[:5], steps[4] - np.arange(1, 5) * 2])
    assert judge(paint(roll(back)), CAPTION, votes, given=5, truth=truth).went == (False,)
    assert judge(paint(roll(steps)), CAPTION, votes, given=5, truth={"red": track(np.zeros(9))}).went == ()


def test_bad_questions_are_refused(paint, votes):
    frames = paint(roll(range(3)))
    with pytest.raises(ValueError, match="names no object"):
        judge(frames, "a dog barks", votes)
    with pytest.raises(ValueError, match="given is 3"):
        judge(frames, CAPTION, votes, given=3)
    with pytest.raises(ValueError, match="3 frames"):
        judge(frames, CAPTION, votes, truth={"red": track([0, 1])})
