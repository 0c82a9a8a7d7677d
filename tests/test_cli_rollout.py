"""`orrery rollout`: from files and from datasets; what it writes, what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orrery.cli.main import main
from orrery.cli.rollout import read_actions
from orrery.errors import InputError
from orrery.video import Video


def call(*words: object) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def start(tmp_path: Path) -> Path:
    path = tmp_path / "start.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    return path


def test_actions_from_a_file(tmp_path: Path, start: Path, acting_folder: Path) -> None:
    np.save(tmp_path / "deeds.npy", np.random.default_rng(1).uniform(-1, 1, (8, 2)))
    out = tmp_path / "out.mp4"
    words = ("--start", start, "--actions", tmp_path / "deeds.npy", "--model", acting_folder, "--seed", 3)
    assert call("rollout", *words, "-o", out) == 0
    assert len(Video.read(out)) == 9
    record = json.loads(out.with_suffix(".json").read_text())
    assert (record["seed"], record["steps"], record["frames"]) == (3, 3, 9)
    assert out.with_suffix(".sheet.png").is_file()


def test_an_episode_of_a_dataset_with_its_truth_beside(tmp_path: Path, acting_folder: Path) -> None:
    folder = tmp_path / "clips" / "push-0000000"
    folder.mkdir(parents=True)
    frames = np.random.default_rng(0).integers(0, 255, (13, 64, 64, 3)).astype(np.uint8)
    Video(frames, 12).save(folder / "rgb.mp4", crf=1, pixel_format="yuv444p")
    np.save(folder / "actions.npy", np.zeros((13, 2), np.float32))
    (folder / "meta.json").write_text(json.dumps({"action_names": ["x", "y"]}))
    line = {"id": folder.name, "scene": "push", "seed": 0, "caption": "-", "frames": 13, "fps": 12.0}
    (tmp_path / "clips" / "index.jsonl").write_text(json.dumps(line) + "\n")
    out = tmp_path / "out.mp4"
    words = ("--dataset", tmp_path / "clips", "--frame", 4, "--model", acting_folder, "--scale", 1)
    assert call("rollout", *words, "-o", out) == 0
    video = Video.read(out)
    assert len(video) == 9 and (video.height, video.width) == (64, 128)
    assert call("rollout", "--dataset", tmp_path / "clips", "--episode", 1, "-o", out) == 2


def test_actions_in_every_format(tmp_path: Path) -> None:
    wanted = np.array([[0.5, -1.0], [0.25, 1e-3]], np.float32)
    np.save(tmp_path / "a.npy", wanted)
    (tmp_path / "b.csv").write_text("x,y\n0.5,-1\n0.25,1e-3\n")
    (tmp_path / "c.csv").write_text("0.5,-1\n0.25,1e-3\n")
    (tmp_path / "d.json").write_text(json.dumps(wanted.tolist()))
    for name in ("a.npy", "b.csv", "c.csv", "d.json"):
        assert np.allclose(read_actions(tmp_path / name), wanted), name
    (tmp_path / "e.csv").write_text("left,right\n")
    (tmp_path / "f.json").write_text("[1, 2]")
    (tmp_path / "g.txt").write_text("1")
    for name, message in (("e.csv", "e.csv"), ("f.json", "allowed is a table"), ("g.txt", "allowed are .npy")):
        with pytest.raises(InputError, match=message):
            read_actions(tmp_path / name)


def test_says_what_is_missing(tmp_path: Path, start: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ((), ("--start", start), ("--actions", "a.npy"), ("--start", start, "--dataset", tmp_path)):
        assert call("rollout", *words, "-o", tmp_path / "out.mp4") == 2
        assert "allowed are --start with --actions" in capsys.readouterr().err
