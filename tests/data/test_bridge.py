"""Bridge folders: actions against scipy's rotations, poses out of actions, reading and writing."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from orrery.data.bridge import (
    ACTION_NAMES,
    BridgeEpisodes,
    Trajectory,
    angles,
    integrate,
    relative_actions,
    rotation,
    to_write,
    write_bridge,
)
from orrery.data.episodes import open_episodes
from orrery.data.lerobot import LeRobotEpisodes
from orrery.data.lerobot_write import to_write as to_lerobot
from orrery.data.lerobot_write import write_lerobot
from orrery.errors import InputError


def trajectory(seed: int, length: int = 6) -> Trajectory:
    """A hand that wanders; the whole circle of angles."""
    rng = np.random.default_rng(seed)
    frames = np.full((length, 16, 24, 3), 20 * seed, np.uint8) + np.arange(length, dtype=np.uint8)[:, None, None, None]
    state = np.concatenate([rng.normal(size=(length, 3)), rng.uniform(-3, 3, (length, 3))], axis=1)
    return Trajectory(frames, state, rng.random(length), f"move {seed}", f"ep-{seed}")


def test_rotations_are_scipys() -> None:
    rpy = np.random.default_rng(0).uniform(-np.pi, np.pi, (200, 3))
    matrices = Rotation.from_euler("xyz", rpy).as_matrix()
    assert np.allclose(rotation(rpy), matrices, atol=1e-12)
    assert np.allclose(angles(matrices), Rotation.from_matrix(matrices).as_euler("xyz"), atol=1e-9)
    assert angles(rotation(rpy.reshape(2, 100, 3))).shape == (2, 100, 3)


@pytest.mark.parametrize("pitch", [np.pi / 2, -np.pi / 2])
def test_angles_of_a_hand_that_points_straight_up_or_down(pitch: float) -> None:
    matrix = rotation(np.array([0.3, pitch, -0.4]))
    assert np.allclose(rotation(angles(matrix)), matrix, atol=1e-7) and angles(matrix)[2] == 0


def test_actions_are_the_published_ones() -> None:
    """Motion in the frame of the hand before it: by scipy, pose by pose."""
    one = trajectory(1)
    actions = relative_actions(one.state, one.gripper)
    assert actions.shape == (5, 7)
    for t in range(5):
        before, after = (Rotation.from_euler("xyz", one.state[t + k, 3:6]) for k in (0, 1))
        assert np.allclose(actions[t, :3], before.inv().apply(one.state[t + 1, :3] - one.state[t, :3]))
        assert np.allclose(actions[t, 3:6], (before.inv() * after).as_euler("xyz"))
        assert actions[t, 6] == one.gripper[t + 1]


def test_a_hand_turned_by_a_quarter_sees_world_x_as_its_right() -> None:
    state = np.array([[0, 0, 0, 0, 0, np.pi / 2], [1, 0, 0, 0, 0, np.pi / 2]])
    assert np.allclose(relative_actions(state, np.array([0.0, 1.0])), [[0, -1, 0, 0, 0, 0, 1]])


def test_poses_out_of_actions() -> None:
    one = trajectory(2, 40)
    actions = relative_actions(one.state, one.gripper)
    poses, gripper = integrate(actions, one.state[0])
    assert np.allclose(poses[:, :3], one.state[:, :3]) and np.allclose(gripper[1:], one.gripper[1:])
    assert np.allclose(rotation(poses[:, 3:]), rotation(one.state[:, 3:]))
    assert np.allclose(relative_actions(*integrate(actions)), actions)  # from any start


@pytest.mark.parametrize(
    ("state", "gripper"),
    [(np.zeros((4, 5)), np.zeros(4)), (np.zeros((4, 6)), np.zeros(3)), (np.full((4, 6), np.nan), np.zeros(4))],
)
def test_wrong_states_are_refused(state: np.ndarray, gripper: np.ndarray) -> None:
    with pytest.raises(InputError, match="allowed"):
        relative_actions(state, gripper)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = [trajectory(seed) for seed in range(11)]
    assert write_bridge(tmp_path / "set", made, 5) == 11
    read = open_episodes(tmp_path / "set")
    assert isinstance(read, BridgeEpisodes) and read.fps == 5 and read.action_names == ACTION_NAMES
    assert read.ids == [str(number) for number in range(11)]  # 2 before 10
    for index, one in enumerate(made):
        assert np.allclose(read.actions(index), relative_actions(one.state, one.gripper), atol=1e-6)
        assert read.actions(index).dtype == np.float32 and read.text(index) == one.text
        assert np.abs(read.frames(index).astype(int) - one.frames).max() <= 3
        assert np.allclose(read.state(index)[:, :6], one.state, atol=1e-6)
    tree = json.loads((tmp_path / "set/annotation/train/3.json").read_text())
    assert tree["episode_id"] == "ep-3" and len(tree["state"]) == len(tree["continuous_gripper_state"]) == 6
    assert (tmp_path / "set" / tree["videos"][0]["video_path"]).is_file()


def annotate(root: Path, split: str = "train", **changes: object) -> Path:
    """The first annotation with other keys, in some split; None takes a key away."""
    tree = json.loads((root / "annotation/train/0.json").read_text()) | changes
    path = root / "annotation" / split / "0.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not None}))
    return path


def test_published_folders_have_more_and_less(tmp_path: Path) -> None:
    """States with more than a pose, several cameras, no text; splits."""
    write_bridge(tmp_path / "set", [trajectory(0)], 5)
    videos = [{"video_path": "videos/train/0/rgb.mp4"}, "videos/train/0/rgb.mp4"]
    state = np.concatenate([trajectory(0).state, np.ones((6, 2))], axis=1).tolist()
    gripper = [[value] for value in trajectory(0).gripper]
    annotate(tmp_path / "set", "test", videos=videos, state=state, continuous_gripper_state=gripper, texts=None)
    assert len(BridgeEpisodes(tmp_path / "set", "train")) == 1
    with pytest.raises(InputError, match="no camera chosen; allowed are 0, 1"):
        BridgeEpisodes(tmp_path / "set", "test")
    read = BridgeEpisodes(tmp_path / "set", "test", camera=1)
    assert read.text(0) == "" and len(read.frames(0)) == 6
    assert np.allclose(read.actions(0), BridgeEpisodes(tmp_path / "set").actions(0))
    with pytest.raises(InputError, match="no camera 2; allowed are 0, 1"):
        BridgeEpisodes(tmp_path / "set", "test", camera=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state": None}, "lacks state; needed are state, continuous_gripper_state, videos"),
        ({"state": [[0.0] * 6] * 5}, r"state is \[5, 6\], continuous_gripper_state \[6\]"),
        ({"state": [[0.0] * 6, [0.0]]}, "are no numbers, a row a frame"),
        ({"videos": []}, "at least one video_path"),
        ({"videos": [{"path": "x"}]}, "needed is video_path"),
        ({"videos": [{"video_path": "videos/gone.mp4"}]}, "no such file"),
    ],
)
def test_errors_name_the_file(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_bridge(tmp_path / "set", [trajectory(0)], 5)
    annotate(tmp_path / "set", **changes)
    with pytest.raises(InputError, match=message):
        BridgeEpisodes(tmp_path / "set")


def test_errors_of_splits_and_of_short_videos(tmp_path: Path) -> None:
    write_bridge(tmp_path / "set", [trajectory(0)], 5)
    with pytest.raises(InputError, match="has no val; there: train"):
        BridgeEpisodes(tmp_path / "set", "val")
    with pytest.raises(InputError, match="allowed are train, val, test"):
        BridgeEpisodes(tmp_path / "set", "dev")
    annotate(tmp_path / "set", state=[[0.0] * 6] * 9, continuous_gripper_state=[0.0] * 9)
    with pytest.raises(InputError, match=r"rgb\.mp4 has 6 frames, .*0\.json has 9 states"):
        BridgeEpisodes(tmp_path / "set").frames(0)
    with pytest.raises(InputError, match="6 frames, 5 states"):
        one = trajectory(0)
        write_bridge(tmp_path / "other", [Trajectory(one.frames, one.state[:5], one.gripper[:5])], 5)
    assert not (tmp_path / "other").exists()


def test_to_lerobot_and_back(tmp_path: Path) -> None:
    made = [trajectory(seed) for seed in range(3)]
    write_bridge(tmp_path / "one", made, 5)
    one = BridgeEpisodes(tmp_path / "one")
    write_lerobot(tmp_path / "two", to_lerobot(one), one.fps, one.action_names, state_names=one.state_names)
    two = LeRobotEpisodes(tmp_path / "two")
    write_bridge(tmp_path / "three", to_write(two), two.fps)
    three = BridgeEpisodes(tmp_path / "three")
    for index, true in enumerate(made):
        assert np.array_equal(two.actions(index), one.actions(index)) and two.text(index) == true.text
        assert np.allclose(three.actions(index), one.actions(index), atol=1e-5)
        assert np.allclose(three.state(index), one.state(index))
        assert np.abs(three.frames(index).astype(int) - true.frames).max() <= 6


def test_without_states_poses_come_from_the_actions(tmp_path: Path) -> None:
    one = trajectory(0)
    write_bridge(tmp_path / "one", [one], 5)
    read = BridgeEpisodes(tmp_path / "one")
    write_lerobot(tmp_path / "two", to_lerobot(read), 5, read.action_names)
    write_bridge(tmp_path / "three", to_write(LeRobotEpisodes(tmp_path / "two")), 5)
    assert np.allclose(BridgeEpisodes(tmp_path / "three").actions(0), read.actions(0), atol=1e-5)


def test_other_actions_are_no_bridge(tmp_path: Path) -> None:
    one = trajectory(0)
    write_bridge(tmp_path / "one", [one], 5)
    read = BridgeEpisodes(tmp_path / "one")
    write_lerobot(tmp_path / "two", to_lerobot(read), 5, ["a", "b", "c", "d", "e", "f", "g"])
    with pytest.raises(InputError, match="the actions are a, b, c, d, e, f, g; a Bridge folder takes x, y, z"):
        list(to_write(LeRobotEpisodes(tmp_path / "two")))
