"""The verbs around published models: plan, convert, batch, and generate's options for them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orrery.cli.main import main
from orrery.nn.control import ControlBranch, ControlConfig
from orrery.video import Video
from orrery.weights import find_model, save_control
from orrery.weights.store import load_part
from orrery.weights.tensors import read_tensors

PROMPT = "a red ball falls and bounces"


def call(*arguments: object) -> int:
    """Exit code of `orrery ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return int(end.value.code or 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Two official jobs: one from words, one from a video."""
    Video(np.random.default_rng(0).integers(0, 256, (7, 32, 48, 3), dtype=np.uint8), 10).save(tmp_path / "start.mp4")
    (tmp_path / "words.txt").write_text("a blue cube rolls to the left\n")
    lines = [
        {"inference_type": "text2world", "name": "words", "prompt_path": "words.txt", "num_steps": 2, "seed": 3},
        {"inference_type": "video2world", "name": "video", "prompt": PROMPT, "input_path": "start.mp4", "num_steps": 2,
         "num_output_frames": 20, "guidance": 1, "resolution": "48,32"},
    ]  # fmt: skip
    path = tmp_path / "jobs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_batch_makes_every_job_and_goes_on_where_it_stopped(
    jobs: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call("batch", jobs, "-o", out, "--model", tiny_folder) == 0
    assert "2 videos made" in capsys.readouterr().out
    names = {f"{name}{end}" for name in ("words", "video") for end in (".mp4", ".sheet.png", ".json")}
    assert {file.name for file in out.iterdir()} == names
    words, video = (json.loads((out / f"{name}.json").read_text()) for name in ("words", "video"))
    assert words["prompt"] == "a blue cube rolls to the left" and words["seed"] == 3 and words["frames"] == 17
    assert video["frames"] == 20 and len(Video.read(out / "video.mp4")) == 20  # 21 drawn, the last one cut
    assert video["size"] == [48, 32] and video["guidance"] == 1 and video["given_frames"] == 5
    before = (out / "words.mp4").read_bytes()
    (out / "video.mp4").unlink()
    assert call("batch", jobs, "-o", out, "--model", tiny_folder) == 0
    assert "1 videos made, 1 were there" in capsys.readouterr().out
    assert (out / "words.mp4").read_bytes() == before
    assert call("batch", jobs, "-o", out, "--model", tiny_folder) == 0
    assert "all 2 videos are in" in capsys.readouterr().out


def test_batch_checks_everything_first(jobs: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert call("batch", jobs, "-o", out, "--model", tiny_folder, "--set", "resolution=40,32") == 2
    assert "jobs.jsonl line 1: height must be a multiple of 16, got 40" in last_line(capsys)
    assert list(out.iterdir()) == []
    assert call("batch", jobs, "-o", out, "--model", tiny_folder, "--set", "num_step=3") == 2
    assert "num_step" in last_line(capsys)
    assert call("batch", jobs, "-o", out, "--model", tiny_folder, "--set", "seed") == 2
    assert "--set must be KEY=VALUE, got 'seed'" in last_line(capsys)


def test_batch_draws_pictures(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"inference_type": "text2image", "name": "a", "prompt": PROMPT}))
    assert (
        call("batch", tmp_path / "a.json", "-o", tmp_path / "out", "--model", tiny_folder, "--set", "num_steps=1") == 0
    )
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.height / image.width == 32 / 48


def test_batch_goes_on_after_a_failure(jobs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    from orrery.errors import OrreryError
    from orrery.world import World

    run = World.run

    def failing(self, request, *others):
        if request.seed == 3:
            raise OrreryError("no memory")
        return run(self, request, *others)

    monkeypatch.setattr(World, "run", failing)
    out = tmp_path / "out"
    assert call("batch", jobs, "-o", out, "--model", tiny_folder) == 1
    assert "1 of 2 jobs failed: words" in last_line(capsys) and (out / "video.mp4").is_file()
    assert call("batch", jobs, "-o", out, "--model", tiny_folder, "--again", "--no-keep-going") == 1
    assert last_line(capsys) == "orrery: error: no memory"


def test_generate_draws_a_picture(tiny_folder: Path, tmp_path: Path, capsys) -> None:
    assert call("generate", PROMPT, "--model", tiny_folder, "--steps", "1", "-o", tmp_path / "a.png") == 0
    assert json.loads((tmp_path / "a.json").read_text())["frames"] == 1
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (48 * 16, 32 * 16)
    capsys.readouterr()
    assert call("generate", PROMPT, "--model", tiny_folder, "--frames", "17", "-o", tmp_path / "b.png") == 2
    assert "a picture holds one" in last_line(capsys) and not (tmp_path / "b.png").exists()


def test_generate_with_other_sampling_is_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    options = (
        "--solver",
        "euler",
        "--schedule",
        "karras",
        "--steps",
        "3",
        "--dtype",
        "bfloat16",
        "--handover",
        "frames",
        "--overlap",
        "1",
    )
    assert call("generate", PROMPT, "--model", tiny_folder, *options, "-o", tmp_path / "a.mp4") == 0
    record = json.loads((tmp_path / "a.json").read_text())
    assert record["sampling"]["solver"] == "euler" and record["sampling"]["schedule"] == "karras"
    assert record["dtype"] == "bfloat16" and record["loras"] == []
    assert record["handover"] == "frames" and record["overlap"] == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (("--size", "64x64", "--resolution", "720"), "both say a size"),
        (("--resolution", "721"), "resolution is '721'; allowed are 256, 480"),
        (("--resolution", "720", "--aspect", "2:1"), "aspect is '2:1'; allowed are"),
        (("--lora", "a.safetensors:strong"), "--lora must be FILE or FILE:SCALE with a number"),
        (("--solver", "heun"), "solver is 'heun'; allowed are unipc, euler"),
        (("--solver", "renoise"), "do not go together"),
        (("--dtype", "int4"), "dtype is 'int4'; allowed are float32"),
        (("--conventions", "ours"), "conventions is 'ours'; allowed are official, diffusers"),
        (("--placement", "cloud"), "placement is 'cloud'; allowed are resident, stages, blocks"),
        (("--handover", "tapes"), "handover is 'tapes'; allowed are latents, frames"),
        (("--overlap", "3"), "overlap must be a whole number from 1 to 2, got 3"),
        (("--vae", "nowhere"), "nowhere holds no VAE"),
        (("--text", "nowhere"), "nowhere holds no text encoder"),
        (("--shift", "-1"), "shift"),
    ],
)
def test_wrong_options_are_one_line(words, message, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    assert call("generate", PROMPT, "--model", tiny_folder, "--steps", "1", *words, "-o", tmp_path / "a.mp4") == 2
    assert message in last_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_generate_by_resolution(tiny_folder: Path, tmp_path: Path) -> None:
    words = ("--resolution", "256", "--aspect", "16:9", "--steps", "1", "--frames", "5")
    assert call("generate", PROMPT, "--model", tiny_folder, *words, "-o", tmp_path / "a.mp4") == 2  # too wide for it
    assert call("generate", PROMPT, "--model", tiny_folder, "--resolution", "256", "--aspect", "1:1", "--steps", "1",
                "--scale", "1", "-o", tmp_path / "a.mp4") == 0  # fmt: skip
    assert json.loads((tmp_path / "a.json").read_text())["size"] == [256, 256]


def test_plan_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "predict2.5-2b", "--resolution", "720") == 0
    text = capsys.readouterr().out
    assert "704x1280, 93 frames" in text and "text encoder" in text and "13.17" in text
    rows = {line.split()[0]: line.split()[2] for line in text.splitlines() if " GiB" in line and line[0].isdigit()}
    assert rows["8"] == rows["80"] == "yes"
    assert call("plan", "predict2.5-14b", "--memory", "8") == 0
    assert " no " in capsys.readouterr().out
    assert call("plan", "predict2.5-2b", "--frames", "181") == 0
    assert "181 frames in chunks of 93" in capsys.readouterr().out
    for words, message in (
        (("--memory", "-3"), "--memory must be above 0"),
        (("--size", "700x1280"), "height must be a multiple of 16, got 700"),
        (("--dtype", "fp8"), "dtype is 'fp8'"),
    ):
        assert call("plan", "predict2.5-2b", *words) == 2
        assert message in last_line(capsys)
    assert call("plan", "predict2.5-2b-gr00t") == 2
    assert "needs a causal rollout, latent after latent" in last_line(capsys)


def test_models_describes_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models", "predict2.5-2b-distilled") == 0
    text = capsys.readouterr().out
    assert "2,059.17 M parameters" in text and "126.89 M" in text and "renoise, distilled schedule, 4 steps" in text


def test_convert_there_and_back(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("convert", tiny_folder, tmp_path / "tiny.pt") == 0
    assert "in the official format" in capsys.readouterr().out
    again = ("--vae", tiny_folder, "--text", tiny_folder, "--like", "predict2.5-2b-pretrained")
    assert call("convert", tmp_path / "tiny.pt", tmp_path / "again", *again) == 0
    one, two = (load_part(find_model(path), "transformer", dtype=None) for path in (tiny_folder, tmp_path / "again"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert call("convert", tiny_folder, tmp_path / "x", "--to", "gguf") == 2
    assert "the format is 'gguf'; allowed are orrery, diffusers, official" in last_line(capsys)
    assert call("convert", "nope", tmp_path / "x") == 2
    assert "unknown model 'nope'" in last_line(capsys)


@pytest.fixture
def with_edge(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a random branch for edges."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "with-edge"))
    torch.manual_seed(0)
    branch = ControlBranch(find_model(folder).config.transformer, ControlConfig(blocks=2, every=1, channels=16))
    with torch.no_grad():
        for parameter in branch.parameters():
            parameter.normal_(std=0.2)
    save_control(folder, "edge", branch, {"steps": 3})
    return folder


def test_models_tells_of_controls(with_edge: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert call("models") == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert "22.1" in rows["transfer2.5-2b"] and "controls: edge, blur, depth, seg" in rows["transfer2.5-2b"]
    assert rows["transfer2.5-2b-edge-distilled"].rstrip().endswith("controls: edge")
    assert "controls" not in rows["predict2.5-2b"] and "not supported yet" in rows["transfer2.5-2b-multiview"]
    assert call("models", "transfer2.5-2b", "--control", "vis") == 0
    text = capsys.readouterr().out
    assert "blur branch    349.21 M parameters, after blocks 0, 7, 14, 21, 128 channels; 5.53 GB" in text
    assert "2,413.86 M" in text and "edge branch" not in text and "google/siglip2-so400m-patch16-naflex" in text
    assert call("models", "transfer2.5-2b") == 0
    told = capsys.readouterr()
    assert told.out.count("298.87 M parameters") == 4 and "without image context" in told.err
    assert call("models", with_edge) == 0
    text = capsys.readouterr().out
    file = with_edge / "control-edge.safetensors"
    count, size = sum(value.numel() for value in read_tensors(file).values()) / 1e6, file.stat().st_size / 1e6
    assert f"edge branch    {count:.2f} M parameters, after blocks 0, 1, 16 channels; {size:.2f} MB" in text
    assert "control-edge.safetensors" in text
    assert call("models", with_edge, "--control", "seg") == 2
    assert "has no control seg; it has edge" in last_line(capsys)
    assert call("models", "mini", "--control", "smell") == 2
    assert "the control is 'smell'; allowed are edge, blur, depth, seg" in last_line(capsys)


def test_convert_with_a_control_branch(with_edge: Path, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    assert call("convert", with_edge, tmp_path / "edge.pt") == 0
    assert call("convert", tmp_path / "edge.pt", tmp_path / "again") == 2
    assert "does not say of what: name its kind" in last_line(capsys)
    parts = ("--vae", tiny_folder, "--text", tiny_folder, "--control", "seg")
    assert call("convert", tmp_path / "edge.pt", tmp_path / "again", *parts) == 0
    one, two = (
        load_part(find_model(tmp_path / name), f"control-{kind}", dtype=None).state_dict()
        for name, kind in (("with-edge", "edge"), ("again", "seg"))
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    both = ("--control", "edge", "--control", f"seg={tmp_path / 'again'}")
    assert call("convert", with_edge, tmp_path / "both", *both) == 0
    assert list(find_model(tmp_path / "both").config.controls) == ["edge", "seg"]
    assert call("convert", with_edge, tmp_path / "none", "--control", "none") == 0
    assert find_model(tmp_path / "none").config.controls == {}
    assert call("convert", tmp_path / "both", tmp_path / "both.pt") == 2
    assert "the format official holds one control branch, here are edge, seg" in last_line(capsys)


def test_batch_loads_the_text_encoder_once_where_networks_take_turns(
    jobs: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orrery.world.networks as networks

    loaded: list[str] = []
    load = networks.load_part
    monkeypatch.setattr(
        networks, "load_part", lambda files, name, *more: (loaded.append(name), load(files, name, *more))[1]
    )
    resident = tmp_path / "resident"
    assert call("batch", jobs, "-o", resident, "--model", tiny_folder) == 0
    assert sorted(loaded) == ["text", "transformer", "vae"]
    loaded.clear()
    assert call("batch", jobs, "-o", tmp_path / "turns", "--model", tiny_folder, "--placement", "stages") == 0
    assert loaded.count("text") == 1 and loaded.count("transformer") == 2
    for name in ("words.mp4", "video.mp4"):
        assert (tmp_path / "turns" / name).read_bytes() == (resident / name).read_bytes()
