"""Clips and datasets on disk: what is written can be read back, and an interrupted dataset goes on where it stopped."""

import json
import os
import signal
import subprocess
import sys
import time

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
    stale = tmp_path / ".drop-0000002.999.partial"
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


def test_workers_make_the_same_clips(tmp_path):
    store.write_dataset(tmp_path / "one", "drop", range(2), **SMALL)
    store.write_dataset(tmp_path / "two", "drop", range(2), workers=2, **SMALL)
    for name in ("drop-0000000", "drop-0000001"):
        a, b = (Video.read(tmp_path / root / name / "rgb.mp4").frames for root in ("one", "two"))
        np.testing.assert_array_equal(a, b)
    with pytest.raises(InputError, match="size 5"):
        store.write_dataset(tmp_path / "bad", "drop", range(1), size=5)
