"""Clips and datasets on disk: what is written can be read back, and an interrupted dataset goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from orrery.errors import InputError
from orrery.sim import store
from orrery.video import Video

SMALL = {"size": 16, "frames": 9}


def ids(root):
    return [json.loads(line)["id"] for line in (root / "index.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("scene", ["drop", "push", "drive"])
def test_a_clip_on_disk_is_the_clip(scene, clip, tmp_path):
    shot = clip(scene, 3, "real")  # the look with camera noise, the harder one
    store.write_clip(shot, tmp_path / "a")
    folder = tmp_path / "a"
    for v, name in enumerate(shot.cameras):
        video = Video.read(folder / (f"rgb.{name}.mp4" if v else "rgb.mp4"))
        assert video.fps == shot.fps
        error = ((video.frames.astype(float) - shot.frames[v]) ** 2).mean((1, 2, 3))
        assert (10 * np.log10(255**2 / error)).min() >= 38
    depth, segmentation = np.load(folder / "depth.npz"), np.load(folder / "segmentation.npz")
    poses, cameras = np.load(folder / "poses.npz"), json.loads((folder / "cameras.json").read_text())
    assert [c["name"] for c in cameras] == list(shot.cameras) == list(depth) == list(segmentation)
    for v, camera in enumerate(cameras):
        np.testing.assert_allclose(depth[camera["name"]], shot.depth[v], rtol=1e-3)
        np.testing.assert_array_equal(segmentation[camera["name"]], shot.segmentation[v])
        np.testing.assert_allclose(camera["world_to_camera"], shot.extrinsics[v], atol=1e-6)
        np.testing.assert_allclose(camera["intrinsics"], shot.intrinsics[v])
    np.testing.assert_array_equal(poses["position"], shot.position)
    np.testing.assert_array_equal(np.load(folder / "actions.npy"), shot.actions)
    assert (folder / "caption.txt").read_text() == shot.caption + "\n"
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["seed"] == 3 and [o["name"] for o in meta["objects"]] == [t.name for t in shot.things]
    assert (folder / "sheet.png").stat().st_size > 1000
    assert (folder / "map.json").is_file() == (folder / "boxes.json").is_file() == (scene == "drive")


def test_lanes_and_boxes_on_disk(clip, tmp_path):
    shot = clip("drive", 3, "real")
    store.write_clip(shot, tmp_path / "a", sheet=False)
    lines = json.loads((tmp_path / "a/map.json").read_text())["lines"]
    boxes = json.loads((tmp_path / "a/boxes.json").read_text())["boxes"]
    assert {line["kind"] for line in lines} == {"lane_line", "road_boundary", "lane_centre"}
    assert all(np.shape(line["points"])[1:] == (3,) for line in lines)
    assert [box["id"] for box in boxes] == list(range(1, len(shot.things) + 1)) and boxes[-1]["kind"] == "ego"
    for i, box in enumerate(boxes):
        centre, yaw = np.array(box["centre"]), np.array(box["yaw"])
        np.testing.assert_allclose(centre, shot.position[:, i], atol=1e-4)
        np.testing.assert_allclose(centre[:, 2], box["size"][2] / 2, atol=1e-4)  # they stand on the road
        step = np.diff(centre[:, :2], axis=0)
        going = np.linalg.norm(step, axis=1) > 0.1
        nose = np.stack([np.cos(yaw), np.sin(yaw)], -1)[:-1]
        assert ((step * nose).sum(1)[going] > 0.98 * np.linalg.norm(step, axis=1)[going]).all()  # and drive nose first
    assert (tmp_path / "a/map.left.mp4").is_file()


def test_something_else_is_never_overwritten(clip, tmp_path):
    shot = clip("drop", 0, "plain")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/diary.txt").write_text("dear diary")
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(InputError, match=name):
            store.write_clip(shot, tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["diary.txt", "file", "mine"]
    with pytest.raises(InputError, match="cannot write"):
        store.write_clip(shot, tmp_path / "file/below")


def test_a_dataset_resumes_and_mends_its_index(tmp_path):
    calls = []

    def stop(done, total):
        calls.append((done, total))
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_dataset(tmp_path, "drop", range(4), progress=stop, **SMALL)
    assert calls == [(0, 4), (1, 4), (2, 4)] and ids(tmp_path) == ["drop-0000000", "drop-0000001"]
    first = (tmp_path / "drop-0000000/rgb.mp4").stat().st_mtime_ns
    index = tmp_path / "index.jsonl"
    lines = index.read_text().splitlines(keepends=True)
    index.write_text(lines[0] + lines[1][:40])  # the last line was cut off in the middle
    stale = tmp_path / ".drop-0000002.99999999.partial"
    stale.mkdir()
    assert store.write_dataset(tmp_path, "drop", range(4), **SMALL) == 2
    assert sorted(ids(tmp_path)) == [f"drop-{i:07d}" for i in range(4)] and not stale.exists()
    assert (tmp_path / "drop-0000000/rgb.mp4").stat().st_mtime_ns == first
    index.unlink()
    assert store.write_dataset(tmp_path, "drop", range(4), **SMALL) == 0
    assert sorted(ids(tmp_path)) == [f"drop-{i:07d}" for i in range(4)]
    again = {line["id"]: line for line in map(json.loads, index.read_text().splitlines())}
    assert again["drop-0000001"] == json.loads(lines[1])


def test_a_killed_dataset_resumes(tmp_path):
    program = (
        "from orrery.sim.store import write_dataset\n"
        f"write_dataset({str(tmp_path)!r}, 'drop', range(500), truth=(), size=16, frames=9)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("drop-*"))) < 3:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    there = len(list(tmp_path.glob("drop-*")))
    assert store.write_dataset(tmp_path, "drop", range(there + 1), truth=(), **SMALL) == 1
    assert sorted(ids(tmp_path)) == [f"drop-{i:07d}" for i in range(there + 1)]
    assert not list(tmp_path.glob(".*partial")) and not (tmp_path / "drop-0000000/depth.npz").exists()
    for name in ids(tmp_path):
        assert len(Video.read(tmp_path / name / "rgb.mp4")) == 9


def test_the_same_clip_is_the_same_file(tmp_path):
    """x264's lookahead once gave other files for equal frames in processes that had rendered."""
    for root in ("one", "two"):
        store.write_dataset(tmp_path / root, "drop", range(6), workers=2, truth=())
    for seed in range(6):
        one, two = ((tmp_path / root / f"drop-{seed:07d}/rgb.mp4").read_bytes() for root in ("one", "two"))
        assert one == two, seed


def test_workers_make_the_same_clips(tmp_path):
    store.write_dataset(tmp_path / "one", "drop", range(2), **SMALL)
    store.write_dataset(tmp_path / "two", "drop", range(2), workers=2, **SMALL)
    for name in ("drop-0000000", "drop-0000001"):
        a, b = (Video.read(tmp_path / root / name / "rgb.mp4").frames for root in ("one", "two"))
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="size 5"):
        store.write_dataset(tmp_path / "bad", "drop", range(1), size=5)


def running(group):
    """The processes of a group that are more than zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
            found += [path.parent.name] if int(pgrp) == group and state != "Z" else []
    return found


@pytest.mark.parametrize("pause", [0.0, 1.0])  # while the workers start; while they work
def test_ctrl_c_ends_all_workers_at_once(tmp_path, pause):
    folder = str(tmp_path / "d")
    program = (
        "from orrery.cli.main import main\n"
        "if __name__ == '__main__':\n"
        f"    main(['sim', 'drop', '--clips', '300', '--workers', '2', '--size', '16', '-o', {folder!r}])\n"
    )
    (tmp_path / "run.py").write_text(program)
    child = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 120
        while not (list((tmp_path / "d").glob("drop-*")) if pause else (tmp_path / "d").is_dir()):
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(pause)
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the parent and to its workers
        error = child.communicate(timeout=60)[1]
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    assert (child.returncode, error.strip()) == (130, "orrery: error: stopped")
    deadline = time.monotonic() + 20  # Python's own resource tracker takes a moment
    while left := running(child.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
    assert not list((tmp_path / "d").glob(".*partial"))


def test_what_another_command_is_writing_is_left_alone(tmp_path):
    ours, dead = tmp_path / f".drop-0000009.{os.getpid()}.partial", tmp_path / ".drop-0000008.99999999.partial"
    ours.mkdir()
    dead.mkdir()
    store.write_dataset(tmp_path, "drop", range(1), **SMALL)
    assert ours.is_dir() and not dead.exists()


@pytest.mark.parametrize("other", [{"size": 32, "frames": 9}, {"size": 16, "frames": 13}, SMALL | {"look": "real"}])
def test_clips_of_another_kind_are_not_taken_for_those_asked_for(tmp_path, other):
    store.write_dataset(tmp_path, "drop", range(1), look="plain", **SMALL)
    with pytest.raises(InputError, match="drop-0000000 is there already with"):
        store.write_dataset(tmp_path, "drop", range(2), **other)
    assert store.write_dataset(tmp_path, "drop", range(1), look="plain", **SMALL) == 0
    assert ids(tmp_path) == ["drop-0000000"]


def test_bad_options_make_no_folder(tmp_path):
    for options in ({"look": "ugly"}, {"size": 5}, {"frames": 1}):
        with pytest.raises(InputError):
            store.write_dataset(tmp_path / "d", "drop", range(2), **options)
    assert not list(tmp_path.iterdir())


def test_the_place_of_a_clip_may_be_the_working_directory(clip, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store.write_clip(clip("drop", 0, "plain"), ".", sheet=False)
    assert (tmp_path / "here/rgb.mp4").is_file() and [p.name for p in tmp_path.iterdir()] == ["here"]
