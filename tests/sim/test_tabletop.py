"""The tabletop: what it is, what its robot does, and what the detector reads of it."""

import numpy as np
import pytest

from orrery.errors import InputError
from orrery.sim.detect import detect, detect_all, layout_of, to_pixels
from orrery.sim.simulate import simulate
from orrery.sim.tabletop import HALF, HELD, PEG, REACH, Tabletop, draw_layout, push_towards


@pytest.fixture(scope="module")
def table() -> Tabletop:
    return Tabletop()


def test_layouts_are_drawn_apart_and_goals_in_reach() -> None:
    with_other = 0
    for seed in range(200):
        layout = draw_layout(np.random.default_rng(seed))
        blocks = [layout.cube] + ([] if layout.other is None else [layout.other])
        assert all(np.linalg.norm(layout.peg - block) > HALF + PEG for block in blocks)
        assert (layout.peg >= REACH[0]).all() and (layout.peg <= REACH[1]).all()
        assert 0.22 <= np.linalg.norm(layout.goal - layout.cube) <= 0.42
        with_other += layout.other is not None
    assert 60 < with_other < 140


def test_the_detector_finds_everything_to_a_centimetre_or_two(table: Tabletop) -> None:
    """Against the simulator's own places, in motion: medians far below a pixel (2.5 cm), a tail where the arm hides."""
    errors: dict[str, list[float]] = {"peg": [], "cube": [], "other": []}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        layout = draw_layout(rng)
        frames, places = [table.reset(layout)], [table.places()]
        for _ in range(6):
            action = push_towards(places[-1]["peg"], places[-1]["cube"], layout.goal) + rng.normal(0, 0.3, 2)
            for _ in range(HELD):
                frame = table.step(np.clip(action, -1, 1))
            frames.append(frame)
            places.append(table.places())
        found = detect_all(np.stack(frames))
        for column, name in enumerate(errors):
            if name in places[0]:
                errors[name] += [float(np.linalg.norm(f[column] - p[name])) for f, p in zip(found, places, strict=True)]
            else:
                assert np.isnan(found[:, column]).all()
    for name, values in errors.items():
        assert np.median(values) < 0.012, name
        assert np.percentile(values, 90) < 0.05, name


def test_larger_pictures_are_read_alike() -> None:
    large = Tabletop(128)
    layout = draw_layout(np.random.default_rng(3))
    seen = detect(large.reset(layout))
    assert np.linalg.norm(seen.cube - layout.cube) < 0.015
    assert np.linalg.norm(seen.peg - layout.peg) < 0.02


def test_nothing_is_seen_where_nothing_is() -> None:
    seen = detect(np.full((64, 64, 3), 150, np.uint8))
    assert np.isnan(np.concatenate([seen.peg, seen.cube, seen.other])).all()
    with pytest.raises(ValueError, match="uint8"):
        detect_all(np.zeros((1, 64, 64, 3)))
    with pytest.raises(InputError, match="shows no magenta peg"):
        layout_of(np.full((64, 64, 3), 150, np.uint8), np.zeros(2))


def test_places_become_pixels_and_come_back(table: Tabletop) -> None:
    """A red pixel of the cube's footprint is where `to_pixels` says."""
    layout = draw_layout(np.random.default_rng(1))
    frame = table.reset(layout)
    x, y = to_pixels(layout.cube[None], 64, 0.12)[0]
    red, green, blue = frame[round(y), round(x)].astype(int)
    assert red > 120 and green < 90 and blue < 90


def test_a_picture_becomes_a_layout_that_looks_like_it(table: Tabletop) -> None:
    layout = next(
        each for each in (draw_layout(np.random.default_rng(seed)) for seed in range(50)) if each.colour == "green"
    )
    again = layout_of(table.reset(layout), layout.goal)
    assert again.colour == "green" and again.other is not None and layout.other is not None
    for name in ("peg", "cube", "other"):
        assert np.linalg.norm(getattr(again, name) - getattr(layout, name)) < 0.025


def test_the_scripted_robot_does_the_task_and_a_still_one_does_not(table: Tabletop) -> None:
    done = 0
    for seed in range(12):
        layout = draw_layout(np.random.default_rng(100 + seed))
        table.reset(layout)
        start = table.places()["cube"]
        for _ in range(24):
            places = table.places()
            if np.linalg.norm(places["cube"] - layout.goal) < 0.07:
                done += 1
                break
            action = push_towards(places["peg"], places["cube"], layout.goal)
            assert np.abs(action).max() <= 1
            for _ in range(HELD):
                table.step(action)
        table.reset(layout)
        for _ in range(4):
            table.step(np.zeros(2))
        assert np.linalg.norm(table.places()["cube"] - start) < 0.003
    assert done >= 7


def test_clips_hold_what_was_done(table: Tabletop) -> None:
    clip = simulate("tabletop", 4, frames=9, truth=False)
    assert clip.actions.shape == (9, 2) and np.abs(clip.actions).max() <= 1
    assert clip.depth is None and clip.segmentation is None and clip.look == "plain"
    assert (simulate("tabletop", 4, frames=9).frames == clip.frames).all()  # with truth: the same clip
    with pytest.raises(InputError, match="looks of tabletop are plain"):
        simulate("tabletop", 4, look="real")
