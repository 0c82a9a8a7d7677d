"""`orrery sim` as a command."""

import json
from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

from orrery.cli.sim import run
from orrery.errors import InputError

app = typer.Typer()
app.command()(run)


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_one_clip(tmp_path):
    result = invoke("push", "--seed", 7, "--look", "real", "--size", 32, "--frames", 9, "-o", tmp_path / "push7")
    assert result.exit_code == 0, result.output
    files = {p.name for p in (tmp_path / "push7").iterdir()}
    assert files == {
        "rgb.mp4", "depth.npz", "segmentation.npz", "actions.npy", "cameras.json", "poses.npz", "caption.txt",
        "meta.json", "sheet.png",
    }  # fmt: skip
    assert (tmp_path / "push7/caption.txt").read_text().strip() in result.output
    meta = json.loads((tmp_path / "push7/meta.json").read_text())
    assert (meta["seed"], meta["look"], meta["frames"], meta["size"]) == (7, "real", 9, [32, 32])


def test_a_dataset_that_goes_on(tmp_path):
    words = ("drop", "--size", 16, "--frames", 9, "--without", "depth", "-o", tmp_path / "d")
    assert "2 clips made, 0 were there" in invoke(*words, "--clips", 2).output
    assert "1 clips made, 2 were there" in invoke(*words, "--clips", 3).output
    assert len((tmp_path / "d/index.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "d/drop-0000002/segmentation.npz").is_file()
    assert not (tmp_path / "d/drop-0000002/depth.npz").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("fly",), "fly"),
        (("drop", "--look", "shiny"), "shiny"),
        (("drop", "--size", 7), "size 7"),
        (("drop", "--frames", 0), "frames 0"),
        (("drop", "--seed", -4), "seed -4"),
        (("drop", "--clips", 0), "clips 0"),
        (("drop", "--clips", 2, "--without", "smell"), "smell"),
    ],
)
def test_bad_values_are_named_and_nothing_is_written(words, named, tmp_path):
    result = invoke(*words, "-o", tmp_path / "x")
    assert isinstance(result.exception, InputError) and result.exception.exit_code == 2
    assert named in str(result.exception) and "\n" not in str(result.exception)
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_single_clip_can_leave_truth_out(tmp_path):
    assert invoke("drop", "--size", 16, "--frames", 5, "--without", "depth", "-o", tmp_path / "a").exit_code == 0
    assert (tmp_path / "a/segmentation.npz").is_file() and not (tmp_path / "a/depth.npz").exists()


def test_a_place_that_is_taken_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("orrery.sim.simulate"), "simulate", lambda *_: pytest.fail("simulated first"))
    (tmp_path / "file").write_text("x")
    assert isinstance(invoke("drop", "-o", tmp_path / "file").exception, InputError)
