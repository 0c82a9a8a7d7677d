"""`orrery check-data` and `orrery convert-data`."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orrery.cli.main import main
from orrery.data.bridge import Trajectory, write_bridge
from orrery.data.episodes import open_episodes

pytest.importorskip("pyarrow")


def call(*arguments: object) -> int:
    """Exit code of `orrery ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def bridge(tmp_path: Path) -> Path:
    """Three episodes of 9 frames."""
    rng = np.random.default_rng(0)
    made = [
        Trajectory(np.full((9, 32, 48, 3), 60 * n, np.uint8), rng.normal(size=(9, 6)), rng.random(9), f"task {n}")
        for n in range(3)
    ]
    write_bridge(tmp_path / "bridge", made, 5)
    return tmp_path / "bridge"


def test_a_sound_dataset(bridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check-data", bridge, "--frames", 9, "--sheet", tmp_path / "sheet.png") == 0
    text = capsys.readouterr().out
    for word in ("Bridge", "episodes", "27, 9 to 9 an episode", "32x48 (3)", "gripper", "0 errors, 0 warnings"):
        assert word in text, text
    assert Image.open(tmp_path / "sheet.png").size == (8 * 52 + 4, 3 * 36 + 4)


def test_faults_are_printed_by_file_and_errors_exit_with_1(bridge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check-data", bridge, "--frames", 13) == 0  # warnings alone
    assert "0 errors, 3 warnings" in capsys.readouterr().out
    (bridge / "annotation/train/1.json").write_text("{")
    assert call("check-data", bridge) == 1
    out = capsys.readouterr().out
    assert "annotation/train/1.json\n  error" in out and "is not JSON" in out and "1 errors, 1 warnings" in out


def test_json_is_json_alone(bridge: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (bridge / "videos/train/2/rgb.mp4").unlink()
    assert call("check-data", bridge, "--json") == 1
    told = json.loads(capsys.readouterr().out)
    assert told["episodes"] == 3 and told["fps"] == [5] and told["errors"] == 1
    assert told["findings"][0]["path"] == "videos/train/2/rgb.mp4"


def test_a_sheet_of_nothing_is_refused(bridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in bridge.rglob("rgb.mp4"):
        path.unlink()
    assert call("check-data", bridge, "--sheet", tmp_path / "sheet.png") == 2
    assert "no episode" in capsys.readouterr().err and not (tmp_path / "sheet.png").exists()
    assert call("check-data", bridge, "--sheet", tmp_path / "no/sheet.png") == 2


def test_what_is_no_dataset_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("check-data", tmp_path) == 2
    assert "is no dataset that is known" in capsys.readouterr().err
    assert call("convert-data", tmp_path, tmp_path / "out", "--to", "lerobot") == 2
    assert "no episodes at" in capsys.readouterr().err


def test_there_and_back(bridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert-data", bridge, tmp_path / "lerobot", "--to", "lerobot", "--robot", "widowx") == 0
    assert call("check-data", tmp_path / "lerobot") == 0
    assert json.loads((tmp_path / "lerobot/meta/info.json").read_text())["robot_type"] == "widowx"
    assert call("convert-data", tmp_path / "lerobot", tmp_path / "back", "--to", "bridge") == 0
    assert "3 episodes" in capsys.readouterr().out
    first, last = open_episodes(bridge), open_episodes(tmp_path / "back")
    for index in range(3):
        assert np.allclose(first.actions(index), last.actions(index), atol=1e-5)
        assert first.text(index) == last.text(index) == f"task {index}"
        assert np.abs(first.frames(index).astype(int) - last.frames(index)).max() <= 6


def test_conversions_that_are_refused(bridge: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert-data", bridge, tmp_path / "x", "--to", "rlds") == 2
    assert "allowed are lerobot and bridge" in capsys.readouterr().err
    assert call("convert-data", bridge, bridge, "--to", "lerobot") == 2
    assert "is in it; choose another folder" in capsys.readouterr().err
    assert call("convert-data", bridge, tmp_path / "x", "--to", "lerobot", "--camera", "wrist") == 2
    assert "no camera wrist; allowed are 0" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
