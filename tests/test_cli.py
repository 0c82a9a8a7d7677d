"""The command line: quick, thin, one line for every wrong input, all files or none."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from orrery import __version__
from orrery.cli.main import VERBS, main, others_compute
from orrery.video import Video

PROMPT = "a red ball falls and bounces"


def call(*arguments: object) -> int:
    """Exit code of `orrery ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that an error printed."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_lists_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    text = capsys.readouterr().out
    assert all(f" {verb} " in text for verb in VERBS if verb != "demo") and " demo " not in text


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 0
    printed = capsys.readouterr()
    assert "generate" in printed.out + printed.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.strip() == f"orrery {__version__}"


@pytest.mark.parametrize("verb", list(VERBS))
def test_each_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(verb, "--help") == 0
    text = capsys.readouterr().out
    assert f"orrery {verb}" in text and "--help" in text


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = (
        "import sys\nfrom orrery.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'av', 'transformers', 'mujoco', 'orrery.world'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], ["generate", "--help"]):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
        after = os.times()
        assert done.returncode == 0, done.stderr
        # seconds of one core, not of the clock: the machine may be busy with something else
        took = after.children_user + after.children_system - before.children_user - before.children_system
        assert took < 1, f"orrery {' '.join(arguments)} took {took:.2f} s"


def generate(folder: Path, output: Path, prompt: str, options: str = "") -> int:
    """Exit code of `orrery generate`, on the CPU and quickly."""
    return call("generate", prompt, "--model", folder, "--device", "cpu", "-o", output, "--steps", 2, *options.split())


def test_generate_writes_three_files(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.full((40, 60, 3), (200, 40, 40), np.uint8)).save(tmp_path / "start.png")
    output = tmp_path / "out.mp4"
    options = f"--seed 3 --guidance 0.5 --frames 21 --start {tmp_path / 'start.png'}"
    assert generate(tiny_folder, output, PROMPT, options) == 0
    assert sorted(os.listdir(tmp_path)) == ["out.json", "out.mp4", "out.sheet.png", "start.png"]
    video = Video.read(output)
    assert (len(video), video.height, video.width, video.fps) == (21, 512, 768, 10)  # 32 x 48 times 16
    record = json.loads((tmp_path / "out.json").read_text())
    expected = {"prompt": PROMPT, "seed": 3, "steps": 2, "guidance": 0.5, "frames": 21, "fps": 10, "size": [32, 48]}
    assert {key: record[key] for key in expected} == expected
    assert record["given_frames"] == 1 and record["start"] == str(tmp_path / "start.png")
    assert len(record["model_hash"]) == 16 and record["versions"]["orrery"] == __version__
    assert record["seconds"]["generating"] > 0
    assert str(output) in capsys.readouterr().out


def test_the_same_call_is_the_same_file(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        assert generate(tiny_folder, tmp_path / name, PROMPT, "--seed 5 --scale 2") == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["", "-o", "a.mp4"], "the prompt is ''"),
        ([PROMPT, "-o", "a.gif"], "its suffix is '.gif', allowed is .mp4"),
        ([PROMPT, "-o", "a"], "its suffix is missing, allowed is .mp4"),
        ([PROMPT, "-o", "nowhere/a.mp4"], "cannot write nowhere/a.mp4: nowhere does not exist"),
        ([PROMPT, "-o", "text.png/a.mp4"], "text.png is not a folder"),
        ([PROMPT, "-o", "a.mp4", "--frames", "16"], "frames must be 4k + 1, got 16"),
        ([PROMPT, "-o", "a.mp4", "--size", "40x48"], "height must be a multiple of 16, got 40"),
        ([PROMPT, "-o", "a.mp4", "--size", "big"], "--size must be HEIGHTxWIDTH, such as 128x128, got 'big'"),
        ([PROMPT, "-o", "a.mp4", "--start", "text.png"], "cannot read text.png: it is not an image"),
        ([PROMPT, "-o", "a.mp4", "--start", "dot.png"], "the start is 1x1 pixels; each side must be at least 16"),
        (
            [PROMPT, "-o", "a.mp4", "--start", "short.mp4"],
            "the start has 3 frames; allowed are 1 (an image) or at least 5",
        ),
        ([PROMPT, "-o", "a.mp4", "--start", "none.png"], "none.png: no such file"),
        ([PROMPT, "-o", "short.mp4", "--start", "short.mp4"], "would overwrite the start"),
        ([PROMPT, "-o", "a.mp4", "--model", "maxi"], "unknown model 'maxi'"),
        ([PROMPT, "-o", "a.mp4", "--steps", "0"], "steps must be a whole number from 1 to 1000, got 0"),
        ([PROMPT, "-o", "a.mp4", "--scale", "0"], "scale must be a whole number from 1 to 64, got 0"),
        ([PROMPT, "-o", "a.mp4", "--seed", "one"], "Invalid value for '--seed'"),
        ([PROMPT, "-o", "a.mp4", "--sede", "1"], "No such option: --sede"),
        ([PROMPT], "Missing option '--output'"),
    ],
)
def test_bad_input(
    arguments: list[str],
    message: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.png").write_text("this is a text\n")
    Image.new("RGB", (1, 1)).save("dot.png")
    Video(np.zeros((3, 32, 32, 3), np.uint8), 10).save("short.mp4")
    before = sorted(os.listdir())
    short = Path("short.mp4").read_bytes()
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(tiny_folder)]
    assert call("generate", *arguments) == 2
    assert message in one_line(capsys)
    assert sorted(os.listdir()) == before and Path("short.mp4").read_bytes() == short


@pytest.mark.parametrize("moment", ["save", "contact_sheet"])
def test_a_full_disk_leaves_nothing(
    moment: str,
    tiny_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    full_disk,
) -> None:
    original = getattr(Video, moment)

    def on_a_full_disk(*arguments, **options):
        with full_disk(300):
            return original(*arguments, **options)

    monkeypatch.setattr(Video, moment, on_a_full_disk)
    assert generate(tiny_folder, tmp_path / "a.mp4", PROMPT, "--scale 2") == 2
    assert "File too large" in capsys.readouterr().err.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_unknown_words_are_one_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tiny_folder, tmp_path / "a.mp4", "a red elephant", "--scale 1") == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 1 and "does not know: 'elephant'" in warnings[0]


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("genrate") == 2
    assert "genrate" in one_line(capsys)


def test_models(tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models") == 0
    listed = capsys.readouterr().out
    assert "mini" in listed and "in the package" in listed
    assert "predict2.5-14b-pretrained" in listed and "28.7" in listed and "not downloaded" in listed
    assert "predict2.5-2b-action" in listed and "not supported yet" in listed
    assert call("models", tiny_folder) == 0
    text = capsys.readouterr().out
    assert "32x48, 17 frames at 10 a second" in text and "ball" in text and "bounces" in text
    assert call("models", "maxi") == 2


@pytest.mark.parametrize("words", [("--frames", "5x"), ("--seed=many",), ("--guidance", "strong")])
def test_a_value_that_is_no_number_is_named(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", PROMPT, "-o", "a.mp4", *words) == 2
    assert f"got {words[-1].rpartition('=')[2]!r}" in one_line(capsys)


def test_ctrl_c_says_stopped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orrery.cli.models.describe", interrupted)
    assert call("models", "mini") == 130
    assert one_line(capsys) == "orrery: error: stopped"


def test_models_and_a_wrong_model_do_not_wait_for_torch() -> None:
    code = (
        "import sys\nfrom orrery.cli.main import main\n"
        "for words in (['models'], ['models', 'nope'], ['generate', 'a ball', '--model', 'nope', '-o', 'a.mp4']):\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("words", [("--model", "nope"), ("--seed", "-1")])
def test_a_refused_demo_leaves_no_folder(
    words: tuple[str, str], tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = () if words[0] == "--model" else ("--model", tiny_folder)
    assert call("demo", *model, *words, "-o", tmp_path / "out") == 2
    assert words[1] in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/loadavg").is_file(), reason="looks into /proc")
def test_threads_spin_only_where_nobody_else_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own count, with and without company; an idle moment of any look means that nobody does."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        time.sleep(0.5)
        assert others_compute()
    finally:
        for process in busy:
            process.kill()
            process.wait()
    texts = iter(["0.5 0.4 0.3 3/200 77", "0.5 0.4 0.3 1/200 77"])
    monkeypatch.setattr(Path, "read_text", lambda self: next(texts))
    assert not others_compute()
    monkeypatch.setattr(Path, "read_text", lambda self: "unreadable")
    assert not others_compute()
