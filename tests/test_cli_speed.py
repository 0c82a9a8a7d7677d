"""Speed on the command line: presets and rungs, what is recorded of them, and looking on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orrery.cli.main import main
from orrery.cli.outputs import PREVIEW_ROWS, Preview
from orrery.video import Video

PROMPT = "a red ball falls and bounces, plain look"


def call(*arguments: object) -> int:
    """Exit code of `orrery ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def record(output: Path) -> dict:
    return json.loads(output.with_suffix(".json").read_text())


def test_the_default_is_exact(tmp_path: Path) -> None:
    assert call("generate", PROMPT, "--steps", 2, "-o", tmp_path / "a.mp4") == 0
    assert record(tmp_path / "a.mp4")["speed"] == {
        "rungs": "exact", "exact": True, "evaluations": 2, "skipped": 0, "error": 0.0,
    }  # fmt: skip


def test_a_preset_and_its_changes_are_done_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--preset", "balanced", "--speed", "cache=0.05", "--speed", "dtype=bfloat16")
    assert call("generate", PROMPT, "-o", tmp_path / "a.mp4", *words) == 0
    printed = capsys.readouterr().out
    kept = record(tmp_path / "a.mp4")
    speed = kept["speed"]
    assert speed["rungs"] == "cache=0.05 dtype=bfloat16" and not speed["exact"] and kept["dtype"] == "bfloat16"
    assert speed["evaluations"] + speed["skipped"] == 20 and speed["skipped"] > 5 and 0 < speed["error"] <= 0.05
    assert f"asked at {speed['evaluations']} of 20 steps, latents off by an estimated" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "quick"), "--preset must be one of exact, balanced, fast, got 'quick'"),
        (("--speed", "turbo"), "speed has no 'turbo'; allowed are attention=KERNEL"),
        (("--speed", "cache=2"), "cache is 2.0; allowed is a relative error from 0"),
        (("--speed", "sparse=2b"), "sparse 2b is for 28 blocks; this network has 7"),
        (("--speed", "attention=flash-attn-3"), "'flash-attn-3' is not available: it needs a CUDA GPU"),
        (("--preview-decoder", "nowhere.pth"), "nowhere.pth"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_file(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("generate", PROMPT, "--device", "cpu", "--steps", 1, "-o", tmp_path / "a.mp4", *words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1] and lines[-1].startswith("orrery: error: ")
    assert not list(tmp_path.iterdir())


def test_other_verbs_take_it_too(tmp_path: Path) -> None:
    video = tmp_path / "in.mp4"
    Video(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8), 12).save(video)
    common = ("--prompt", PROMPT, "--input", video, "--control", "edge", "--steps", 8)
    assert call("transfer", *common, "-o", tmp_path / "t.mp4", "--speed", "cache=0.1") == 0
    assert record(tmp_path / "t.mp4")["speed"]["rungs"] == "cache=0.1"
    assert call("transfer", *common, "-o", tmp_path / "t.mp4", "--speed", "cache=0.1") == 0  # it is there
    assert call("transfer", *common, "-o", tmp_path / "t.mp4") == 2  # but not with these settings
    np.save(tmp_path / "deeds.npy", np.zeros((4, 2), np.float32))
    words = ("--start", video, "--actions", tmp_path / "deeds.npy", "--preset", "fast")
    assert call("rollout", *words, "-o", tmp_path / "r.mp4") == 0
    job = {"inference_type": "text2world", "name": "j", "prompt": PROMPT, "num_steps": 2}
    (tmp_path / "jobs.json").write_text(json.dumps(job))
    words = ("--model", "mini", "--speed", "quantise=int8")
    assert call("batch", tmp_path / "jobs.json", "-o", tmp_path / "out", *words) == 0
    assert record(tmp_path / "out" / "j.mp4")["speed"]["rungs"] == "quantise=int8"


def test_looking_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", PROMPT, "--steps", 3, "--preview", "-o", tmp_path / "a.mp4") == 0
    assert "a.preview.png: what it will be, step by step" in capsys.readouterr().err
    sheet = np.asarray(Image.open(tmp_path / "a.preview.png").convert("RGB"))
    rows = [sheet[20 + i * 148 : 160 + i * 148, 100:] for i in range(3)]
    assert sheet.shape[0] == 20 + 3 * 148 and all(row.std() > 20 for row in rows)
    assert call("generate", PROMPT, "--steps", 3, "-o", tmp_path / "b.mp4") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert not (tmp_path / "b.preview.png").exists()


def test_a_preview_keeps_a_few_rows_and_the_latest(tmp_path: Path) -> None:
    sheet = Preview(tmp_path / "p.png")
    heights = []
    for done in range(1, 36):
        sheet(done, 35, Video(np.full((5, 16, 16, 3), done, np.uint8), 10))
        heights.append(Image.open(sheet.path).height)
    assert heights == sorted(heights) and (heights[-1] - 20) // 148 <= PREVIEW_ROWS + 2
    latest = np.asarray(Image.open(sheet.path).convert("RGB"))[-20:-10, 120:150]
    assert (latest == 35).all()


def test_a_preview_that_cannot_be_written_costs_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    sheet = Preview(folder / "p.png")
    shutil.rmtree(folder)
    sheet(1, 2, Video(np.zeros((5, 16, 16, 3), np.uint8), 10))


def test_plans_know_weights_in_8_bits(capsys: pytest.CaptureFixture[str]) -> None:
    pages = []
    for words in ((), ("--quantise", "int8")):
        assert call("plan", "predict2.5-14b", "--memory", 24, *words) == 0
        pages.append(capsys.readouterr().out)
    assert "int8" in pages[1] and "int8" not in pages[0]
    plain, rounded = (float(page.split("transformer")[1].split()[0]) for page in pages)
    assert 0.5 * plain < rounded < 0.6 * plain
    assert call("plan", "predict2.5-14b", "--quantise", "int3") == 2
