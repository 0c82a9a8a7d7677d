"""The ground truth of a clip agrees with itself, with geometry, and with MuJoCo's own renderer."""

import colorsys
import importlib

import numpy as np
import pytest

from orrery.sim import COLOURS, SCENES, render, simulate
from orrery.sim.looks import Look
from orrery.sim.render import camera_for, import_mujoco

engine = importlib.import_module("orrery.sim.simulate")  # the package's name `simulate` is the function


def project(clip, view, frame, points):
    """World points [n, 3] to pixels [n, 2] and depth [n], as cameras.json is documented (OpenCV)."""
    seen = np.c_[points, np.ones(len(points))] @ clip.extrinsics[view, frame].T
    pixels = seen[:, :3] @ clip.intrinsics[view].T
    return pixels[:, :2] / pixels[:, 2:], seen[:, 2]


def corners(clip, thing, frame):
    """The eight corners [8, 3] of a thing's box."""
    w, x, y, z = clip.quaternion[frame, thing]
    turn = np.array(
        [[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
         [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
         [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]]
    )  # fmt: skip
    signs = np.array([[i, j, k] for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)]) / 2
    return clip.position[frame, thing] + (signs * clip.things[thing].size) @ turn.T


@pytest.mark.parametrize("scene", [scene for scene in SCENES if scene not in engine.PLAIN])
def test_a_seed_is_one_motion_in_both_looks_and_every_time(scene, clip):
    plain, real, again = clip(scene, 2, "plain"), clip(scene, 2, "real"), simulate(scene, 2, "plain")
    for other in (real, again):
        np.testing.assert_array_equal(plain.position, other.position)
        np.testing.assert_array_equal(plain.quaternion, other.quaternion)
        np.testing.assert_array_equal(plain.actions, other.actions)
        np.testing.assert_array_equal(plain.segmentation, other.segmentation)
    np.testing.assert_array_equal(plain.frames, again.frames)
    assert np.abs(plain.frames.astype(int) - real.frames).mean() > 3
    assert not np.array_equal(plain.position, simulate(scene, 1002, "plain", truth=False).position)


@pytest.mark.parametrize("look", ["plain", "real"])
def test_pixels_do_not_depend_on_what_was_drawn_before(look, monkeypatch):
    def draw(*order):  # in fresh GL contexts, which the scenes then share
        monkeypatch.setattr(render, "_CAMERAS", {})
        return {job: simulate(*job, look, 32).frames for job in order}

    jobs = [("drop", 5), ("push", 5), ("drive", 6), ("drive", 5)]
    there, back = draw(*jobs), draw(*jobs[::-1])
    for job in jobs:
        np.testing.assert_array_equal(there[job], back[job])


def test_shapes_and_ranges(sample):
    v, t, n = len(sample.cameras), 17, len(sample.things)
    assert sample.frames.shape == (v, t, 64, 64, 3) and sample.frames.dtype == np.uint8
    assert sample.depth.shape == sample.segmentation.shape == (v, t, 64, 64)
    assert sample.position.shape == (t, n, 3) and sample.quaternion.shape == (t, n, 4)
    assert sample.actions.shape == (t, len(sample.action_names)) and np.abs(sample.actions).max(initial=0) <= 1
    assert sample.segmentation.max() <= n and sample.depth.min() > 0.1
    assert np.isinf(sample.depth[sample.segmentation == 0]).any() == np.isinf(sample.depth).any()
    assert np.isfinite(sample.depth[sample.segmentation > 0]).all()
    np.testing.assert_allclose(np.linalg.norm(sample.quaternion, axis=-1), 1, atol=1e-6)


def test_colours_in_the_segmentation_are_those_of_the_things(sample):
    checked = 0
    for i, thing in enumerate(sample.things):
        mask = sample.segmentation == i + 1
        view, frame = np.unravel_index(mask.sum((2, 3)).argmax(), mask.shape[:2])
        pixels = sample.frames[view, frame][mask[view, frame]] / 255
        hsv = np.array([colorsys.rgb_to_hsv(*p) for p in pixels])
        vivid = hsv[(hsv[:, 1] > 0.45) & (hsv[:, 2] > 0.2)][:, 0] if len(hsv) else hsv
        if not thing.colour or len(vivid) < 15:
            continue
        mean = np.angle(np.exp(2j * np.pi * vivid).mean()) / (2 * np.pi)
        gap = {c: abs((mean - colorsys.rgb_to_hsv(*rgb)[0] + 0.5) % 1 - 0.5) for c, rgb in COLOURS.items()}
        assert min(gap, key=gap.get) == thing.colour, (thing, gap)
        checked += 1
    assert checked or sample.scene == "drive"


def test_a_ball_is_where_the_cameras_say(clip):
    gaps = []
    for seed in range(12):
        shot = clip("drop", seed, "plain", 96)
        ball = shot.things[0]
        if len(shot.things) > 1 or ball.shape != "ball":
            continue
        for frame in range(17):
            mask = shot.segmentation[0, frame] == 1
            if not mask.any() or mask[[0, -1]].any() or mask[:, [0, -1]].any():
                continue
            _, (z,) = project(shot, 0, frame, shot.position[frame, :1])
            x, y = (shot.extrinsics[0, frame] @ [*shot.position[frame, 0], 1])[:2]
            off_axis = np.array([x, y, 0]) * z / (z * z - ball.radius**2)  # the middle of a sphere's outline
            u, v, _ = shot.intrinsics[0] @ (off_axis + [0, 0, 1])
            rows, columns = np.nonzero(mask)
            gaps.append((columns.mean() + 0.5 - u, rows.mean() + 0.5 - v))
            assert shot.depth[0, frame][mask].min() == pytest.approx(z - ball.radius, abs=0.02)
            area = np.pi * (shot.intrinsics[0, 0, 0] * ball.radius / z) ** 2
            assert mask.sum() == pytest.approx(area, rel=0.12)
    assert len(gaps) > 30
    assert np.abs(gaps).max() < 0.4 and np.abs(np.mean(gaps, 0)).max() < 0.1  # pixels


def test_vehicles_stay_within_their_boxes_in_all_cameras(clip):
    pixels, views = 0, set()
    for seed in range(8):
        shot = clip("drive", seed, ("plain", "real")[seed % 2])
        for view in range(3):
            for frame in range(0, 17, 4):
                for i in range(len(shot.things) - 1):
                    mask = shot.segmentation[view, frame] == i + 1
                    if not mask.any():
                        continue
                    uv, z = project(shot, view, frame, corners(shot, i, frame))
                    depth = shot.depth[view, frame][mask]
                    assert depth.max() < z.max() + 0.05 and depth.min() > z.min() - 0.05
                    if z.min() > 0.3:  # otherwise a corner lies behind the camera and has no pixel
                        rows, columns = np.nonzero(mask)
                        low, high = uv.min(0) - 1, uv.max(0)
                        assert low[0] <= columns.min() and columns.max() <= high[0]
                        assert low[1] <= rows.min() and rows.max() <= high[1]
                        if mask.sum() > 60 and uv.min() > 1 and uv.max() < 63:  # nor is the box much too large
                            assert np.ptp(columns) + 1 > 0.7 * np.ptp(uv[:, 0])
                    pixels += mask.sum()
                    views.add(view)
    assert pixels > 2000 and views == {0, 1, 2}


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("look", ["plain", "real"])
def test_depth_and_segmentation_equal_mujocos_renderer(scene, look):
    mj, size, attempt = import_mujoco(), 48, 0
    drawn = Look.draw(look, np.random.default_rng(0))
    episode = importlib.import_module(f"orrery.sim.{scene}").build(np.random.default_rng(3), drawn, 17)
    model = engine._compile(episode)
    trace = engine._run(model, episode, 9)
    data = mj.MjData(model)
    mj.mj_setState(model, data, trace.states[-1], mj.mjtState.mjSTATE_INTEGRATION)
    mj.mj_forward(model, data)
    with mj.Renderer(model, size, size, max_geom=2000) as oracle:
        for name in episode.cameras:
            _, depth, geoms = camera_for(model, size).shoot(data, name, truth=True)
            oracle._gl_context.make_current()
            oracle.update_scene(data, name)
            oracle.enable_depth_rendering()
            expected = oracle.render().copy()
            oracle.disable_depth_rendering()
            oracle.enable_segmentation_rendering()
            ids = oracle.render().copy()
            oracle.disable_segmentation_rendering()
            expected_geoms = np.where(ids[..., 1] == mj.mjtObj.mjOBJ_GEOM, ids[..., 0], -1)
            np.testing.assert_array_equal(geoms, expected_geoms)
            sky = np.isinf(depth)
            np.testing.assert_array_equal(sky, expected_geoms < 0)
            np.testing.assert_allclose(depth[~sky], expected[~sky], rtol=2e-3)
            attempt += (~sky).sum()
    assert attempt > size * size / 4


def test_numbers_that_are_not_allowed_are_named():
    for arguments, words in (
        (("fly", 0), ["fly", "drop, push, drive"]),
        (("drop", -1), ["seed -1", "0.."]),
        (("drop", 0, "shiny"), ["shiny", "plain, real"]),
        (("drop", 0, None, 8), ["size 8", "16..1024"]),
        (("drop", 0, None, 64, 2), ["frames 2", "5..1000"]),
    ):
        with pytest.raises(ValueError) as caught:
            simulate(*arguments)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
