"""LeRobot datasets: v3.0 written and read, v2.1 read; both proven with lerobot itself in an environment of its own."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orrery.data.episodes import open_episodes
from orrery.data.lerobot import LeRobotEpisodes, read_info
from orrery.data.lerobot_write import CAMERA, Episode, to_write, write_lerobot
from orrery.errors import InputError
from orrery.video import Video

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

SIZE = (32, 48)


def episode(number: int, length: int, noise: int = 0) -> Episode:
    """Each frame is one colour that tells episode and frame; or noise of so many levels, which makes large files."""
    rng = np.random.default_rng(number)
    frames = np.zeros((length, *SIZE, 3), np.uint8)
    for t in range(length):
        frames[t] = (30 + 40 * number, 20 + 9 * t, 200 - 7 * t)
    frames += rng.integers(0, noise + 1, frames.shape).astype(np.uint8)
    actions, state = rng.normal(size=(length - 1, 2)), rng.normal(size=(length, 3))
    return Episode(frames, actions.astype(np.float32), f"task {number % 2}", state.astype(np.float32))


def write(root: Path, lengths: tuple[int, ...] = (9, 6, 11), noise: int = 0, **options: float) -> list[Episode]:
    """A dataset of ours."""
    made = [episode(number, length, noise) for number, length in enumerate(lengths)]
    assert write_lerobot(root, made, 12, ["x", "y"], "toy", ["a", "b", "c"], **options) == len(lengths)
    return made


def write_v21(root: Path, lengths: tuple[int, ...] = (9, 6), **changes: object) -> list[np.ndarray]:
    """A dataset in the layout of v2.1, by hand; the actions of its episodes. changes: of info.json."""
    (root / "meta").mkdir(parents=True)
    feature = {"dtype": "video", "shape": [3, *SIZE], "names": ["channel", "height", "width"]}
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 1,  # a chunk an episode
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {
            "observation.images.top": feature,
            "action": {"dtype": "float32", "shape": [2], "names": {"motors": ["x", "y"]}},
        },
    }
    (root / "meta/info.json").write_text(json.dumps(info | changes))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "push"}\n{"task_index": 1, "task": "pull"}\n')
    made, first = [], 0
    episodes, statistics = [], []
    for number, length in enumerate(lengths):
        rows = np.random.default_rng(number).normal(size=(length, 2)).astype(np.float32)
        columns = {"action": pa.array(list(rows)), "timestamp": pa.array(np.arange(length, dtype=np.float32) / 10)}
        columns |= {"frame_index": np.arange(length), "episode_index": np.full(length, number)}
        columns |= {"index": first + np.arange(length), "task_index": np.full(length, number)}
        path = root / f"data/chunk-{number:03d}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(columns), path)
        video = root / f"videos/chunk-{number:03d}/observation.images.top/episode_{number:06d}.mp4"
        video.parent.mkdir(parents=True)
        Video(episode(number, length).frames, 10).save(video)
        episodes.append({"episode_index": number, "tasks": [("push", "pull")[number]], "length": length})
        moments = {"min": rows.min(0), "max": rows.max(0), "mean": rows.mean(0), "std": rows.std(0)}
        told = {name: value.tolist() for name, value in moments.items()} | {"count": [length]}
        statistics.append({"episode_index": number, "stats": {"action": told}})
        made.append(rows)
        first += length
    for name, lines in (("episodes", episodes), ("episodes_stats", statistics)):
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


def close(found: np.ndarray, wanted: np.ndarray, levels: int = 6) -> bool:
    """Whether frames agree but for what a codec loses."""
    return found.shape == wanted.shape and np.abs(found.astype(int) - wanted).max() <= levels


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    made = write(tmp_path / "set")
    read = open_episodes(tmp_path / "set")
    assert isinstance(read, LeRobotEpisodes) and len(read) == 3 and read.fps == 12 and read.action_names == ("x", "y")
    assert read.ids == ["episode_000000", "episode_000001", "episode_000002"]
    for index, one in enumerate(made):
        assert np.array_equal(read.actions(index), one.actions) and read.actions(index).dtype == np.float32
        assert np.array_equal(read.state(index), one.state) and read.text(index) == one.text
        assert close(read.frames(index), one.frames)


def test_the_last_row_of_actions_is_written_twice(tmp_path: Path) -> None:
    made = write(tmp_path / "set")
    rows = np.array(pq.read_table(tmp_path / "set/data/chunk-000/file-000.parquet")["action"].to_pylist(), np.float32)
    assert (
        len(rows) == 26 and np.array_equal(rows[:8], made[0].actions) and np.array_equal(rows[8], made[0].actions[-1])
    )
    kept = np.ones((3, 2), np.float32)
    write_lerobot(tmp_path / "all", [Episode(made[0].frames[:3], kept)], 12, ["x", "y"])
    assert np.array_equal(LeRobotEpisodes(tmp_path / "all").all_actions(0), kept)


def test_a_part_of_an_episode_is_that_part(tmp_path: Path) -> None:
    write(tmp_path / "set")
    read = LeRobotEpisodes(tmp_path / "set")
    whole = read.frames(2)
    assert np.array_equal(read.frames(2, 3, 7), whole[3:7]) and np.array_equal(read.frames(2, 10), whole[10:])
    with pytest.raises(InputError, match="frames 5 to 5 of 11"):
        read.frames(2, 5, 5)


def test_an_episode_is_decoded_without_those_before_it(tmp_path: Path) -> None:
    """Junk in place of the first episodes' pixels: only a reader that begins at the right keyframe sees none of it."""
    made = write(tmp_path / "set", (12, 12, 12), noise=40)
    path = tmp_path / f"set/videos/{CAMERA}/chunk-000/file-000.mp4"
    before = LeRobotEpisodes(tmp_path / "set").frames(2)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 2000
    data[start : start + (len(data) - start) // 2] = bytes((len(data) - start) // 2)
    path.write_bytes(data)
    assert np.array_equal(LeRobotEpisodes(tmp_path / "set").frames(2), before) and len(before) == len(made[2].frames)


def test_rare_keyframes_and_frames_out_of_order(tmp_path: Path) -> None:
    """As other encoders write them: one keyframe a file, and B-frames."""
    made = write(tmp_path / "set")
    path = tmp_path / f"set/videos/{CAMERA}/chunk-000/file-000.mp4"
    Video(np.concatenate([one.frames for one in made]), 12).save(path)
    read = LeRobotEpisodes(tmp_path / "set")
    assert all(close(read.frames(index), one.frames) for index, one in enumerate(made))
    assert close(read.frames(1, 2, 4), made[1].frames[2:4])


def test_large_files_are_followed_by_new_ones(tmp_path: Path) -> None:
    made = write(tmp_path / "set", (12, 12, 12), noise=90, video_mb=0.001, data_mb=0.0001)
    files = sorted(path.relative_to(tmp_path / "set").as_posix() for path in tmp_path.rglob("file-*"))
    assert f"videos/{CAMERA}/chunk-000/file-002.mp4" in files and "data/chunk-000/file-002.parquet" in files
    read = LeRobotEpisodes(tmp_path / "set")
    assert [row.videos[CAMERA].start for row in read.rows] == [0, 0, 0]
    assert all(np.array_equal(read.actions(i), made[i].actions) for i in range(3)) and len(read.frames(2)) == 12


@pytest.mark.parametrize(("size", "kept"), [((128, 160), "yuv420p"), ((126, 160), "yuv444p"), ((128, 161), "yuv444p")])
def test_small_and_odd_frames_keep_their_colours(tmp_path: Path, size: tuple[int, int], kept: str) -> None:
    colours = np.random.default_rng(0).integers(0, 255, (2, *size, 3)).astype(np.uint8)
    write_lerobot(tmp_path / "set", [Episode(colours, np.ones((1, 2)))], 12, ["x", "y"], crf=0)
    read = LeRobotEpisodes(tmp_path / "set")
    assert read.info.features[CAMERA]["info"]["video.pix_fmt"] == kept and read.frames(0).shape == colours.shape
    assert close(read.frames(0), colours) == (kept == "yuv444p")


def test_statistics_are_those_of_all_rows(tmp_path: Path) -> None:
    made = write(tmp_path / "set")
    rows = np.concatenate([np.concatenate([one.actions, one.actions[-1:]]) for one in made])
    statistics = LeRobotEpisodes(tmp_path / "set").statistics
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(statistics["action"][name], getattr(rows, name)(0), atol=1e-6), name
    assert statistics["action"]["count"] == [26] and {"q01", "q99"} <= set(statistics["action"])
    pixels = np.concatenate([one.frames for one in made]).reshape(-1, 3) / 255
    assert statistics[CAMERA]["mean"].shape == (3, 1, 1)
    assert np.allclose(statistics[CAMERA]["mean"].ravel(), pixels.mean(0), atol=1e-6)
    assert np.allclose(statistics[CAMERA]["std"].ravel(), pixels.std(0), atol=1e-6)


def test_several_cameras(tmp_path: Path) -> None:
    one, two = episode(0, 5), episode(1, 5)
    videos = {"observation.images.front": one.frames, "observation.images.wrist": two.frames[:, :, :33]}  # odd width
    write_lerobot(tmp_path / "set", [Episode(videos, one.actions)], 12, ["x", "y"])
    with pytest.raises(InputError, match=r"no camera chosen; allowed are observation\.images\.front, observation"):
        LeRobotEpisodes(tmp_path / "set")
    with pytest.raises(InputError, match="no single camera 'top'"):
        open_episodes(tmp_path / "set", camera="top")
    assert close(LeRobotEpisodes(tmp_path / "set", "wrist").frames(0), two.frames[:, :, :33])
    assert close(LeRobotEpisodes(tmp_path / "set", "observation.images.front").frames(0), one.frames)


def test_version_2_1(tmp_path: Path) -> None:
    rows = write_v21(tmp_path / "set")
    read = open_episodes(tmp_path / "set")
    assert isinstance(read, LeRobotEpisodes)
    assert read.action_names == ("x", "y") and read.fps == 10 and read.camera == "observation.images.top"
    assert [read.text(index) for index in range(2)] == ["push", "pull"] and read.state(0) is None
    for index, one in enumerate(rows):
        assert np.array_equal(read.actions(index), one[:-1])
        assert close(read.frames(index), episode(index, len(one)).frames)
    every = np.concatenate(rows)
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(read.statistics["action"][name], getattr(every, name)(0), atol=1e-5), name


def test_version_2_1_becomes_3_0(tmp_path: Path) -> None:
    rows = write_v21(tmp_path / "old")
    old = LeRobotEpisodes(tmp_path / "old")
    write_lerobot(tmp_path / "new", to_write(old, old.camera), old.fps, old.action_names)
    new = LeRobotEpisodes(tmp_path / "new")
    assert new.info.version == "v3.0" and new.text(1) == "pull"
    assert all(np.array_equal(new.all_actions(index), one) for index, one in enumerate(rows))
    assert close(new.frames(1), old.frames(1))


def test_text_of_the_rows_where_the_metadata_have_none(tmp_path: Path) -> None:
    write_v21(tmp_path / "set")
    (tmp_path / "set/meta/episodes.jsonl").write_text('{"episode_index": 1, "length": 6}\n')
    assert LeRobotEpisodes(tmp_path / "set").text(0) == "pull"


@pytest.mark.parametrize(
    ("told", "names"),
    [(None, ("action_0", "action_1")), (["motors"], ("action_0", "action_1")), ([["a", "b"]], ("a", "b"))]
    + [
        ({"a": 0, "b": 1}, ("a", "b")),
        ({"left": ["a"], "right": ["b"]}, ("a", "b")),
        (["a", "a"], ("action_0", "action_1")),
    ],
)
def test_names_of_actions(tmp_path: Path, told: object, names: tuple[str, ...]) -> None:
    write_v21(tmp_path / "set")
    path = tmp_path / "set/meta/info.json"
    info = json.loads(path.read_text())
    info["features"]["action"]["names"] = told
    path.write_text(json.dumps(info))
    assert read_info(tmp_path / "set").names("action") == names


def test_one_number_an_action(tmp_path: Path) -> None:
    one = episode(0, 4)
    write_lerobot(tmp_path / "set", [Episode(one.frames, one.actions[:, :1])], 12.5, ["speed"])
    assert pa.types.is_float32(pq.read_schema(tmp_path / "set/data/chunk-000/file-000.parquet").field("action").type)
    read = LeRobotEpisodes(tmp_path / "set")
    assert read.fps == 12.5 and np.array_equal(read.actions(0), one.actions[:, :1]) and len(read.frames(0)) == 4


def test_images_in_the_table(tmp_path: Path) -> None:
    feature = {"dtype": "image", "shape": [*SIZE, 3], "names": ["height", "width", "channel"]}
    action = {"dtype": "float32", "shape": [2], "names": None}
    write_v21(tmp_path / "set", (5,), features={"observation.image": feature, "action": action})
    cells = []
    for place, pixels in enumerate(episode(3, 5).frames):
        Image.fromarray(pixels).save(tmp_path / f"set/{place}.png")
        inside = (tmp_path / f"set/{place}.png").read_bytes() if place % 2 else None
        cells.append({"bytes": inside, "path": f"{place}.png"})
    path = tmp_path / "set/data/chunk-000/episode_000000.parquet"
    pq.write_table(pq.read_table(path).append_column("observation.image", pa.array(cells)), path)
    assert np.array_equal(LeRobotEpisodes(tmp_path / "set").frames(0), episode(3, 5).frames)
    (tmp_path / "set/4.png").write_text("junk")
    with pytest.raises(InputError, match="image 4 of observation.image"):
        LeRobotEpisodes(tmp_path / "set").frames(0)


def test_errors_of_reading_name_the_file(tmp_path: Path) -> None:
    write(tmp_path / "set")
    read = LeRobotEpisodes(tmp_path / "set")
    video = tmp_path / f"set/videos/{CAMERA}/chunk-000/file-000.mp4"
    Video(episode(0, 12).frames, 12).save(video)
    with pytest.raises(InputError, match=r"file-000\.mp4: episode_000001 is to have 6 frames from 0\.75 s on.* are 3"):
        read.frames(1)
    video.unlink()
    with pytest.raises(InputError, match=r"file-000\.mp4: no such file"):
        read.frames(1)
    (tmp_path / "set/data/chunk-000/file-000.parquet").write_text("junk")
    with pytest.raises(InputError, match=r"cannot read .*file-000\.parquet"):
        read.actions(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebase_version": "v1.6"}, "codebase_version = 'v1.6'; allowed are v3.0, v2.1, v2.0"),
        ({"fps": 0}, "fps = 0; allowed: a number above 0"),
        ({"features": []}, "features = "),
        ({"features": {"state": {}}}, "no camera chosen; allowed are none"),
        ({"features": {"observation.image": {"dtype": "image"}}}, "no feature is named action or actions"),
        ({"data_path": None}, "data_path = None"),
        ({"data_path": "{nothing}"}, "'nothing' is missing"),
    ],
)
def test_errors_of_info(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    write_v21(tmp_path / "set", (5,), **changes)
    with pytest.raises(InputError, match=message):
        LeRobotEpisodes(tmp_path / "set")


def test_nothing_is_left_of_a_dataset_that_could_not_be_written(tmp_path: Path) -> None:
    def breaks_off():  # type: ignore[no-untyped-def]
        yield episode(0, 5)
        raise InputError("the source is gone")

    with pytest.raises(InputError, match="the source is gone"):
        write_lerobot(tmp_path / "set", breaks_off(), 12, ["x", "y"])
    with pytest.raises(InputError, match="no episodes to write"):
        write_lerobot(tmp_path / "set", [], 12, ["x", "y"])
    assert not list(tmp_path.iterdir())


def test_only_datasets_of_ours_are_replaced(tmp_path: Path) -> None:
    write(tmp_path / "set")
    write(tmp_path / "set", (5,))
    assert len(LeRobotEpisodes(tmp_path / "set")) == 1
    write_v21(tmp_path / "recorded")
    with pytest.raises(InputError, match="cannot replace"):
        write(tmp_path / "recorded")
    assert len(LeRobotEpisodes(tmp_path / "recorded")) == 2


def test_errors_of_writing(tmp_path: Path) -> None:
    one = episode(0, 5)
    cases = [
        (Episode(one.frames, one.actions[:2]), r"action is \[2, 2\]; allowed: \[5, 2\] or \[4, 2\]"),
        (Episode(one.frames, one.actions * np.nan), "holds NaN"),
        (Episode(one.frames.astype(np.float32), one.actions), "frames are float32"),
        (Episode({"a/b": one.frames}, one.actions), "without /"),
    ]
    for wrong, message in cases:
        with pytest.raises(InputError, match=message):
            write_lerobot(tmp_path / "set", [wrong], 12, ["x", "y"])
    with pytest.raises(InputError, match="sizes of the first episode"):
        write_lerobot(tmp_path / "set", [one, Episode(one.frames[:, :16], one.actions)], 12, ["x", "y"])


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'orrery\[datasets\]'"):
        LeRobotEpisodes(tmp_path / "set")


LOAD = """
import json, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
set_ = LeRobotDataset("orrery/set", root=sys.argv[1], video_backend="pyav")
key = "observation.images.main"
rows = [set_[i] for i in range(len(set_))]
window = LeRobotDataset("orrery/set", root=sys.argv[1], video_backend="pyav",
                        delta_timestamps={key: [-1 / 12, 0.0], "action": [0.0, 1 / 12]})[12]
np.savez(sys.argv[2], frames=np.stack([row[key].numpy() for row in rows]),
         actions=np.stack([row["action"].numpy() for row in rows]),
         state=np.stack([row["observation.state"].numpy() for row in rows]),
         episode=[int(row["episode_index"]) for row in rows], window=window[key].numpy(),
         **{f"stats_{k}": np.asarray(v) for k, v in set_.meta.stats["action"].items()})
print(json.dumps({"tasks": [row["task"] for row in rows], "fps": set_.fps, "robot": set_.meta.robot_type,
                  "names": set_.meta.names["action"]}))
"""

SAVE = """
import inspect, sys
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset
given = np.load(sys.argv[1])
video = {"dtype": "video", "shape": given["frames"].shape[1:], "names": ["height", "width", "channels"]}
features = {"observation.images.main": video, "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}}
set_ = LeRobotDataset.create("orrery/set", 12, features, root=sys.argv[2], robot_type="toy")
apart = "task" in inspect.signature(set_.add_frame).parameters
for number in np.unique(given["episode"]):
    for place in np.flatnonzero(given["episode"] == number):
        frame = {"observation.images.main": given["frames"][place], "action": given["actions"][place]}
        task = f"task {number % 2}"
        set_.add_frame(frame, task=task) if apart else set_.add_frame(frame | {"task": task})
    set_.save_episode()
getattr(set_, "finalize", lambda: None)()
"""

NEWER, OLDER = "lerobot==0.4.4", "lerobot==0.3.3"  # the second is the last that writes v2.1


@pytest.mark.slow
@pytest.mark.skipif("ORRERY_LEROBOT" not in os.environ, reason="ORRERY_LEROBOT=FOLDER installs lerobot there (9 GB)")
def test_lerobot_itself(tmp_path: Path) -> None:
    """lerobot loads what we write, frame for frame, and what it writes, as v3.0 and as v2.1, we read.

    lerobot pins another torch, so it gets an environment of its own in the folder that ORRERY_LEROBOT names; a second
    time it is there. Of the older version the package alone is needed, beside the dependencies of the newer.
    """
    place = Path(os.environ["ORRERY_LEROBOT"])
    python, old = place / "venv/bin/python", place / "v21"
    if not python.exists():
        venv.create(place / "venv", with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "-q", NEWER], check=True)
    if not old.exists():
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--target", old, OLDER], check=True)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": ""}

    def run(script: str, *arguments: Path, path: str = "") -> str:
        command = [str(python), "-c", script, *map(str, arguments)]
        done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    made = write(tmp_path / "ours", (9, 12, 11), noise=3)
    told = json.loads(run(LOAD, tmp_path / "ours", tmp_path / "loaded.npz").splitlines()[-1])
    loaded = np.load(tmp_path / "loaded.npz")
    assert told["tasks"] == ["task 0"] * 9 + ["task 1"] * 12 + ["task 0"] * 11
    assert told["fps"] == 12 and told["robot"] == "toy" and told["names"] == ["x", "y"]
    frames = np.concatenate([one.frames for one in made])
    pixels = np.round(loaded["frames"].transpose(0, 2, 3, 1) * 255).astype(int)
    assert close(pixels, frames, 12) and np.abs(pixels - frames).mean() < 2
    assert np.array_equal(loaded["window"], loaded["frames"][11:13])
    rows = np.concatenate([np.concatenate([one.actions, one.actions[-1:]]) for one in made])
    assert np.array_equal(loaded["actions"], rows) and np.allclose(loaded["stats_std"], rows.std(0), atol=1e-6)
    assert np.array_equal(loaded["state"], np.concatenate([one.state for one in made]))

    large = Episode(made[0].frames.repeat(4, 1).repeat(4, 2), made[0].actions, "large", made[0].state)
    write_lerobot(tmp_path / "large", [large, large], 12, ["x", "y"], state_names=["a", "b", "c"])  # 4:2:0
    run(LOAD, tmp_path / "large", tmp_path / "large.npz")
    pixels = np.round(np.load(tmp_path / "large.npz")["frames"].transpose(0, 2, 3, 1) * 255)
    assert np.abs(pixels - np.concatenate([large.frames] * 2)).mean() < 2

    np.savez(tmp_path / "given.npz", frames=frames, actions=rows, episode=loaded["episode"])
    for name, path, version in (("theirs", "", "v3.0"), ("theirs21", str(old), "v2.1")):
        run(SAVE, tmp_path / "given.npz", tmp_path / name, path=path)
        read = LeRobotEpisodes(tmp_path / name)
        assert read.info.version == version and read.action_names == ("x", "y") and len(read) == 3
        for index, one in enumerate(made):
            assert np.array_equal(read.actions(index), one.actions) and read.text(index) == one.text
            assert np.abs(read.frames(index).astype(int) - one.frames).mean() < 3, name  # AV1, at a coarse setting
        assert np.allclose(read.statistics["action"]["std"], rows.std(0), atol=1e-5)
