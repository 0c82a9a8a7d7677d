"""`drive`: the map lines up with the pixels, the actions with the motion, and nobody drives through anybody."""

import numpy as np
import pytest

from orrery.sim.looks import Look
from orrery.sim.road import LANE, Road
from orrery.sim.scenario import BOUNDARY, Eye, draw
from orrery.sim.traffic import MAX_ACCELERATION, MAX_CURVATURE, follow

SEEDS = range(4)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_ego_car_moves_as_its_actions_say(clip, seed):
    shot = clip("drive", seed, ("plain", "real")[seed % 2])
    ego = len(shot.things) - 1
    path, (w, _, _, z) = shot.position[:, ego, :2], shot.quaternion[:, ego].T
    yaw = np.unwrap(2 * np.arctan2(z, w))
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    steer, pedal = shot.actions[:-1].T
    np.testing.assert_allclose(np.diff(yaw), steer * MAX_CURVATURE * steps, atol=2e-4)
    speed = steps * shot.fps
    moving = speed[1:] > 0.6
    mean_pedal = (pedal[1:] + pedal[:-1]) / 2
    np.testing.assert_allclose(np.diff(speed)[moving], (mean_pedal * MAX_ACCELERATION / shot.fps)[moving], atol=0.08)


@pytest.mark.parametrize("seed", SEEDS)
def test_vehicles_keep_apart(clip, seed):
    shot = clip("drive", seed, ("plain", "real")[seed % 2])
    for i, a in enumerate(shot.things):
        for j, b in enumerate(shot.things[:i]):
            gap = np.linalg.norm(shot.position[:, i, :2] - shot.position[:, j, :2], axis=1)
            assert gap.min() > (a.size[1] + b.size[1]) / 2, (a.name, b.name)


def test_map_lines_lie_on_painted_lines(clip):
    """Moved by a few pixels the map's lines cover less paint than where they are, in every camera."""
    score = np.zeros((3, 7))
    for seed in (0, 2):
        shot = clip("drive", seed, "plain")
        lines = (shot.map.min(-1) > 170) & (shot.segmentation == 0)
        lines[:, :, :36] = lines[:, :, -4:] = False  # near road, and room to move
        light = shot.frames.astype(float).mean(-1)
        for k, shift in enumerate(range(-3, 4)):
            moved = np.roll(light, shift, axis=2)
            score[:, k] += [moved[v][lines[v]].sum() for v in range(3)]
    assert (score.argmax(1) == 3).all(), score.round()


def test_map_boxes_cover_the_vehicles(clip):
    covered = total = 0
    for seed in SEEDS:
        shot = clip("drive", seed, ("plain", "real")[seed % 2])
        mask = (shot.segmentation > 0) & (shot.depth < 60)
        drawn = shot.map.max(-1) > 60
        covered, total = covered + (mask & drawn).sum(), total + mask.sum()
    assert total > 1000 and covered > 0.97 * total


def test_a_box_is_cut_at_the_camera_and_not_drawn_behind_it():
    looking_ahead = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])  # right -y, up z, back -x
    eye = Eye(np.array([0, 0, 1.6]), looking_ahead, 64.0, 64)
    box = (4.0, 2.0, 1.5)
    behind = draw(eye, [], [("car", np.array([-8.0, 0, 0.75]), np.eye(3), box)])
    ahead = draw(eye, [], [("car", np.array([12.0, 0, 0.75]), np.eye(3), box)])
    beside = draw(eye, [], [("truck", np.array([1.0, 2.5, 0.75]), np.eye(3), box)])
    line = draw(eye, [(np.array([[[-20.0, 1, 0], [20.0, 1, 0]]]), "road_boundary")], [])
    assert not behind.any() and ahead.any() and beside.any()
    rows, columns = np.nonzero(ahead.max(-1))
    focal, near = 32 / np.tan(np.radians(32)), 10.0  # the rear face is nearest
    assert columns.mean() == pytest.approx(31.5, abs=0.5)
    assert np.ptp(columns) + 1 == pytest.approx(focal * 2 / near, abs=2.5)
    assert rows.max() == pytest.approx(32 + focal * 1.6 / near, abs=1.5)
    assert np.nonzero(beside.max(-1))[1].max() < 32  # to the left of the nose is left in the picture
    assert np.nonzero(line.max(-1))[1].max() <= 33
    assert tuple(line.reshape(-1, 3)[line.sum(-1).argmax()]) == BOUNDARY


def test_a_box_ahead_shows_its_light_rear():
    looking_ahead = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])
    eye = Eye(np.array([0, 0, 0.7]), looking_ahead, 64.0, 64)
    same_way = draw(eye, [], [("car", np.array([8.0, 0, 0.7]), np.eye(3), (4.0, 2.0, 1.4))])
    oncoming = draw(eye, [], [("car", np.array([8.0, 0, 0.7]), np.diag([-1.0, -1, 1]), (4.0, 2.0, 1.4))])
    assert tuple(same_way[32, 32]) == (126, 206, 255) and tuple(oncoming[32, 32]) == (0, 46, 136)


@pytest.mark.parametrize("seed", range(6))
def test_road_coordinates_go_both_ways(seed):
    rng = np.random.default_rng(seed)
    road = Road(rng, reach=60)
    s, offset = rng.uniform(-60, 150, 40), rng.uniform(-road.half, road.half, 40)
    points, yaw = road.pose(s, offset)
    back = np.array([road.locate(p) for p in points])
    np.testing.assert_allclose(back, np.stack([s, offset], -1), atol=0.02)
    ahead, _ = road.pose(s + 0.01, offset)
    np.testing.assert_allclose(
        (ahead - points) @ [1, 0], np.linalg.norm(ahead - points, axis=1) * np.cos(yaw), atol=5e-4
    )
    edges = [line for line in road.polylines() if line["kind"] == "lane_line"]
    gaps = [np.linalg.norm(a["points"] - b["points"], axis=1) for a, b in zip(edges, edges[1:], strict=False)]
    np.testing.assert_allclose(gaps, LANE, atol=0.01)
    assert [line["style"] == "solid" for line in edges] == [True, *[False] * (road.lanes - 1), True]


def test_the_driver_model():
    assert follow(10, 10, np.inf, 0) == pytest.approx(0)  # at the wished speed, alone: steady
    assert follow(5, 10, np.inf, 0) > 1.5 and follow(12, 10, np.inf, 0) < -1
    assert follow(10, 12, 8, 0) == -6.0  # a standing vehicle 8 m ahead: as hard as the tyres give
    assert follow(10, 12, 60, 10) > follow(10, 12, 12, 10)
    gap, speed, leader = 30.0, 12.0, 6.0
    for _ in range(600):  # catches up and settles behind the leader at its speed
        speed = max(0.0, speed + follow(speed, 14, gap, leader) / 30)
        gap += (leader - speed) / 30
        assert gap > 2
    assert speed == pytest.approx(leader, abs=0.1) and 6 < gap < 14


def test_the_plain_street_has_the_materials_of_the_real_one():
    plain, real = Look("plain").street(), Look.draw("real", np.random.default_rng(0)).street()
    assert not plain[1] and set(real[1]) == {"asphalt.png", "grass.png", "facade.png"}
    for material in ("asphalt", "grass", "facade", "lacquer"):
        assert f'material name="{material}"' in plain[0] and f'material name="{material}"' in real[0]
