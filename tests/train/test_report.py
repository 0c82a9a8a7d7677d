"""What a run says: the log has each step once, plain lines where there is no terminal, one line for a wrong recipe."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orrery.cli.main import main
from orrery.train.report import Report, duration
from orrery.train.sheets import save_sheet, to_uint8


def test_log_forgets_steps_after_the_checkpoint_it_resumes_from(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (2, 4, 6)] + ['{"step": 8, "lo']
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    with Report(tmp_path, step=4, steps=10) as report:
        report.numbers(6, rate=2.0, left=60.0, values={"loss": 0.5, "grad_norm": 1.0, "lr": 1e-3})
        report.validation(6, {"psnr": 30.0})
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 4, 6, 6]
    assert records[2]["loss"] == 0.5 and records[2]["clips_per_second"] == 2.0 and records[3]["val/psnr"] == 30.0


def test_plain_lines_tell_loss_speed_and_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Report(tmp_path, step=0, steps=10) as report:
        report.numbers(5, rate=12.34, left=3723.0, values={"loss": 0.51234, "grad_norm": 1.0, "lr": 1e-3})
    assert "step 5/10  loss 0.5123  12.3 clips/s  ETA 1:02:03" in capsys.readouterr().err
    assert (duration(59), duration(61), duration(-3)) == ("0:59", "1:01", "0:00")


def test_tensorboard_files_are_written_where_asked(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with Report(tmp_path, step=0, steps=10, tensorboard=True) as report:
        report.validation(6, {"psnr": 30.0})
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_sheet_has_a_row_a_clip_and_every_second_frame(tmp_path: Path) -> None:
    clips = [np.full((5, 8, 8, 3), value, np.uint8) for value in (10, 200)]
    clips[1][2] = 99
    save_sheet(tmp_path / "new" / "sheet.png", clips, every=2, scale=2)
    pixels = np.array(Image.open(tmp_path / "new" / "sheet.png"))
    assert pixels.shape == (2 * 9 * 2, 3 * 8 * 2, 3)
    assert pixels[0, 0, 0] == 10 and pixels[18, 0, 0] == 200 and pixels[18, 16, 0] == 99
    assert to_uint8(np.array([-1.5, -1.0, 0.0, 1.0, 2.0] * 3).reshape(3, 5, 1, 1))[:, 0, 0, 0].tolist() == [
        0,
        0,
        128,
        255,
        255,
    ]


def test_orrery_train_refuses_a_misspelt_key_in_one_line_with_exit_code_2(
    tmp_path: Path, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe("vae", tmp_path / "run", 1, stesp=3)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe)])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert "unknown key stesp = 3; allowed: out, steps" in error and not (tmp_path / "run").exists()


def test_orrery_train_runs_a_recipe(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = write_recipe("vae", tmp_path / "run", 1)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe), "--set", "steps=2"])
    assert caught.value.code in (0, None)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["training"]["step"] == 2
