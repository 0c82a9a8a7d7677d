"""`orrery transfer`: official specs and flags alike, all files or none, going on where it stopped."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import orrery
from orrery.cli import transfer
from orrery.cli.main import main
from orrery.control.models import Models
from orrery.errors import OrreryError
from orrery.video import Video
from orrery.world import Transferred, World

PROMPT = "a red ball falls and bounces"
KINDS = ("edge", "blur", "depth", "seg")


def call(*arguments: object) -> int:
    """Exit code of `orrery transfer ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        main(["transfer", *(str(argument) for argument in arguments)])
    return int(end.value.code or 0)


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture
def model(controlled_folder: Path) -> Path:
    return controlled_folder


def moving(count: int, height: int = 32, width: int = 48, seed: int = 3, fps: float = 10) -> Video:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)
    return Video(coarse.repeat(height // 4, axis=1).repeat(width // 6, axis=2), fps)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with inputs and controls in `assets`."""
    assets = tmp_path / "assets"
    assets.mkdir()
    for name, video in {"in": moving(20), "edge": moving(20, seed=5), "one": moving(1)}.items():
        video.save(assets / f"{name}.mp4")
    Image.fromarray(moving(1).frames[0]).save(assets / "still.png")
    white = np.zeros((32, 48), np.uint8)
    white[:, :24] = 255
    Image.fromarray(white).save(assets / "half.png")
    np.savez(assets / "labels.npz", np.ones((20, 32, 48), np.uint8))
    np.savez(assets / "depth.npz", np.full((20, 32, 48), 2.0, np.float32) + np.arange(48, dtype=np.float32))
    monkeypatch.chdir(tmp_path)
    return assets


def write(path: Path, *trees: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(tree) for tree in trees))
    return path


def tree(name: str = "ball", **keys: Any) -> dict[str, Any]:
    return {"name": name, "prompt": PROMPT, "video_path": "in.mp4", "num_steps": 2, "edge": {}} | keys


def flags(*more: object) -> tuple[object, ...]:
    return ("--prompt", PROMPT, "--input", "assets/in.mp4", "--steps", 2, *more)


def record(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text())


def files_of(name: str, *kinds: str, end: str = ".mp4") -> set[str]:
    controls = {f"{name}.control-{kind}{end}" for kind in kinds}
    return {f"{name}{end}", f"{name}.beside{end}", f"{name}.sheet.png", f"{name}.json"} | controls


def listed(path: Path) -> set[str]:
    return set(os.listdir(path))


def test_a_spec_writes_all_its_files(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = tree(
        vis={"preset_blur_strength": "low", "control_weight": 0.5},
        depth={"control_path": "depth.npz", "mask_path": "half.png", "control_weight": 0.3},
        seg={"control_path": "edge.mp4", "control_weight": 0},
        guidance=0.5,
    )
    spec = write(folder / "spec.json", keys)
    assert call(spec, "-o", "out", "--model", model) == 0
    assert listed(Path("out")) == files_of("ball", "edge", "blur", "depth")  # seg has no weight
    result = Video.read("out/ball.mp4")
    assert (len(result), result.height, result.width, result.fps) == (20, 32, 48, 10)
    for kind in ("edge", "blur", "depth"):
        assert Video.read(f"out/ball.control-{kind}.mp4").frames.shape == (20, 32, 48, 3)
    beside = Video.read("out/ball.beside.mp4")
    times = round(768 / (5 * 48 + 4 * 2))  # input, three controls, result, white lines between
    assert (len(beside), beside.fps, beside.height) == (20, 10, 32 * times)
    assert beside.width == times * (5 * 48 + 4 * 2)
    with Image.open("out/ball.sheet.png") as sheet:
        assert sheet.size == (96 + 8 * (144 * 48 // 32 + 4), 20 + 5 * 148)
    said = record(Path("out/ball.mp4"))
    expected = {"name": "ball", "spec": str(spec), "prompt": PROMPT, "seed": 2025, "steps": 2, "guidance": 0.5}
    expected |= {"overlap": 1, "handover": "latents", "frames": 20, "fps": 10, "size": [32, 48]}
    assert {key: said[key] for key in expected} == expected
    assert said["model"] == str(model) and len(said["model_hash"]) == 16 and len(said["input"]["sha256"]) == 64
    assert list(said["controls"]) == list(KINDS)
    assert said["controls"]["blur"]["strength"] == "low" and said["controls"]["blur"]["weight"] == 0.5
    assert said["controls"]["blur"]["weight_after_normalising"] == pytest.approx(0.5 / 1.8)
    assert said["controls"]["depth"]["file"] == str(folder / "depth.npz")
    assert len(said["controls"]["depth"]["mask"]["sha256"]) == len(said["controls"]["depth"]["sha256"]) == 64
    assert len({said["controls"][kind]["branch_hash"] for kind in KINDS}) == 4
    assert said["seconds"]["drawing"] > 0 and said["versions"]["orrery"] == orrery.__version__
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("1/1 out/ball.mp4: 20 frames after edge, blur, depth, ")


def test_flags_do_the_same_as_a_file(folder: Path, model: Path) -> None:
    keys = tree(
        negative_prompt="a blue cube", guidance=0.5, max_frames=13, seed=7, keep_input_resolution=False,
        edge={"control_weight": 0.5, "preset_edge_threshold": "low", "mask_path": "half.png"},
        vis={"control_path": "edge.mp4", "control_weight": 0.25},
        sigma_max=3, guided_generation_mask="labels.npz", guided_generation_foreground_labels=[1],
        guided_generation_step_threshold=0, num_video_frames_per_chunk=17,
    )  # fmt: skip
    assert call(write(folder / "spec.json", keys), "-o", "out", "--model", model) == 0
    more = "--negative-prompt", "a blue cube", "--guidance", 0.5, "--frames", 13, "--seed", 7, "--no-keep-size"
    more += "--control", "edge:0.5", "--strength", "edge=low", "--mask", "edge=assets/half.png"
    more += "--control", "vis=assets/edge.mp4:0.25", "--sigma-max", 3, "--hold", "assets/labels.npz"
    more += "--hold-label", 1, "--hold-until", 0, "--chunk", 17
    assert call(*flags(*more), "-o", "flags.mp4", "--model", model) == 0
    assert Path("flags.mp4").read_bytes() == Path("out/ball.mp4").read_bytes()
    a, b = record(Path("out/ball.mp4"))["asked"], record(Path("flags.mp4"))["asked"]
    assert {key for key in a if a[key] != b[key]} == {"name"}


def test_a_control_that_was_written_can_be_given_again(folder: Path, model: Path) -> None:
    assert call(*flags("--control", "edge"), "-o", "first.mp4", "--model", model) == 0
    again = "--control", "edge=first.control-edge.mp4"
    assert call(*flags(*again), "-o", "second.mp4", "--model", model) == 0
    first, second = (Video.read(f"{name}.control-edge.mp4").frames.astype(int) for name in ("first", "second"))
    assert np.abs(first - second).max() <= 2 and set(np.unique(first)) <= {0, 1, 2, 253, 254, 255}
    a, b = (Video.read(f"{name}.mp4").frames.astype(int) for name in ("first", "second"))
    assert np.abs(a - b).mean() < 1
    assert call(*flags("--control", "edge=assets/edge.mp4"), "-o", "third.mp4", "--model", model) == 0
    assert np.abs(a - Video.read("third.mp4").frames).mean() > 3


def test_several_specs_and_overrides(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(folder / "one.jsonl", tree("a", seed=1), tree("b", seed=2, max_frames=5))
    two = write(folder / "two.json", tree("c", edge={"control_path": "edge.mp4"}))
    assert call(one, two, "-o", "out", "--model", model, "--seed", 9, "--show-input", "--show-controls") == 0
    assert listed(Path("out")) == files_of("a", "edge") | files_of("b", "edge") | files_of("c", "edge")
    assert [record(Path(f"out/{name}.mp4"))["seed"] for name in "abc"] == [9, 9, 9]
    shown = Video.read("out/a.mp4")
    assert (shown.height, shown.width) == (32, 3 * 48)
    assert np.abs(shown.frames[:, :, :48].astype(int) - moving(20).frames).mean() < 12  # the input, compressed twice
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["1/3 out/a.mp4", "2/3 out/b.mp4", "3/3 out/c.mp4"]
    assert "5 frames after edge" in lines[1]


def test_pictures(folder: Path, model: Path) -> None:
    specs = tree("still", video_path="still.png"), tree("one", video_path="one.mp4"), tree("first", max_frames=1)
    chunked = tree("chunk", max_frames=1, num_video_frames_per_chunk=1)
    assert call(write(folder / "spec.jsonl", *specs, chunked), "-o", "out", "--model", model) == 0
    names = [files_of(name, "edge", end=".png") for name in ("still", "one", "first", "chunk")]
    assert listed(Path("out")) == set().union(*names)
    with Image.open("out/still.png") as image:
        assert image.size == (48, 32)
    assert call(*flags("--control", "edge"), "-o", "shot.png", "--model", model) == 0  # one frame, as in generate
    assert record(Path("shot.png"))["frames"] == 1
    assert call(*flags("--control", "edge", "--frames", 1), "-o", "shot.jpg", "--model", model) == 0
    assert Path("shot.control-edge.png").is_file() and Path("shot.jpg").is_file()


def test_it_goes_on_where_it_stopped(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = write(folder / "spec.jsonl", tree("a"), tree("b"), tree("c"))
    command = spec, "-o", "out", "--model", model
    run, count = World.run_transfer, 0

    def interrupted(self: World, *arguments: Any) -> Transferred:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(World, "run_transfer", interrupted)
    assert call(*command) == 130
    assert last_line(capsys) == "orrery: error: stopped"
    assert listed(Path("out")) == files_of("a", "edge")
    before = Path("out/a.mp4").stat().st_mtime_ns
    assert call(*command) == 0 and count == 4
    assert capsys.readouterr().out.splitlines()[-1] == "1 videos were there"
    assert Path("out/a.mp4").stat().st_mtime_ns == before
    monkeypatch.setattr(orrery, "load", None)  # nothing is left, so nothing is loaded
    assert call(*command) == 0
    assert capsys.readouterr().out == "all 3 videos are in out (--again makes them again)\n"


def test_a_video_made_with_other_settings_is_not_taken_for_this_one(
    folder: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = *flags("--control", "edge"), "-o", "a.mp4", "--model", model
    assert call(*command) == 0
    made = Path("a.mp4").read_bytes()
    assert call(*command, "--seed", 4, "--overlap", 2) == 2
    assert "a.mp4 is there and was made with another seed, latents: --again makes" in last_line(capsys)
    assert Path("a.mp4").read_bytes() == made
    assert call(*command, "--detector", "elsewhere") == 0  # which an edge does not ask for
    assert call(*command, "--seed", 4, "--again") == 0
    assert Path("a.mp4").read_bytes() != made and record(Path("a.mp4"))["seed"] == 4
    Path("a.json").unlink()
    assert call(*command) == 2
    assert "a.mp4 is there, without a record that says how it was made: --again makes" in last_line(capsys)
    Path("a.mp4").unlink()
    assert call(*command) == 0


def test_after_a_failure_the_others_are_made(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = World.run_transfer

    def failing(self: World, request: Any, *arguments: Any) -> Transferred:
        if request.base.seed == 3:
            raise OrreryError("no memory")
        return run(self, request, *arguments)

    monkeypatch.setattr(World, "run_transfer", failing)
    spec = write(folder / "spec.jsonl", tree("a", seed=3), tree("b"))
    assert call(spec, "-o", "out", "--model", model) == 1
    err = capsys.readouterr().err.splitlines()
    assert err[-2:] == ["1/2 a failed: no memory", "orrery: error: 1 of 2 jobs failed: a"]
    assert listed(Path("out")) == files_of("b", "edge")
    assert call(spec, "-o", "other", "--model", model, "--no-keep-going") == 1
    assert last_line(capsys) == "orrery: error: no memory" and not Path("other").exists()


def test_every_job_is_tried_before_the_first_is_drawn_and_its_maps_are_made_when_it_is_due(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    settle, run = World.transfer_request, World.run_transfer

    def settled(self: World, prompt: str, video: Video, *arguments: Any, **options: Any) -> Any:
        seen.append(f"settle {len(video)}")
        return settle(self, prompt, video, *arguments, **options)

    def ran(self: World, request: Any, *arguments: Any) -> Transferred:
        seen.append(f"draw {request.length}")
        return run(self, request, *arguments)

    monkeypatch.setattr(World, "transfer_request", settled)
    monkeypatch.setattr(World, "run_transfer", ran)
    assert call(write(folder / "s.jsonl", tree("a"), tree("b", max_frames=6)), "-o", "out", "--model", model) == 0
    assert seen == ["settle 1", "settle 1", "settle 20", "draw 20", "settle 6", "draw 6"]


def test_what_is_cut_and_what_is_asked_of_the_engine(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """max_frames cuts controls and masks too; a frame beyond it can be the reference; fps counts first."""
    requests: list[Any] = []
    run, settle = World.run_transfer, World.transfer_request
    images: list[Any] = []

    def ran(self: World, request: Any, *arguments: Any) -> Transferred:
        requests.append(request)
        return run(self, request, *arguments)

    def settled(self: World, *arguments: Any, image: Any = None, **options: Any) -> Any:
        images.append(image)
        return settle(self, *arguments, **options)

    monkeypatch.setattr(World, "run_transfer", ran)
    monkeypatch.setattr(World, "transfer_request", settled)
    block = {"control_path": "edge.mp4", "mask_path": "edge.mp4"}
    keys = tree(edge=block, max_frames=6, context_frame_index=15, guided_generation_mask="labels.npz",
                guided_generation_foreground_labels=[1])  # fmt: skip
    assert call(write(folder / "a.json", keys), "-o", "out", "--model", model) == 0
    (request,) = requests
    edge = Video.read(folder / "edge.mp4")
    assert np.array_equal(request.signals[0].video.frames, edge.frames[:6])
    assert request.signals[0].mask.shape == (6, 32, 48) and request.hold.shape == (6, 32, 48)
    assert np.array_equal(images[-1], Video.read(folder / "in.mp4").frames[15])
    assert call(write(folder / "b.json", tree("b")), "-o", "out", "--model", model, "--fps", 5, "--frames", 4) == 0
    source = Video.read(folder / "in.mp4")
    assert np.array_equal(requests[1].source.frames, source.frames[:8:2]) and requests[1].fps == 5
    keys = tree("c", num_conditional_frames=0, max_frames=None)
    assert call(write(folder / "c.json", keys), "-o", "out", "--model", model) == 0
    assert (requests[2].base.overlap, requests[2].base.handover) == (0, "frames")
    assert call(write(folder / "d.json", tree("d")), "-o", "out", "--model", model, "--overlap", 2) == 0
    assert (requests[3].base.overlap, requests[3].base.handover) == (2, "latents")


def test_without_an_input(folder: Path, model: Path) -> None:
    spec = tree(edge={"control_path": "edge.mp4"}, depth={"control_path": "depth.npz"}, max_frames=7)
    del spec["video_path"]
    assert call(write(folder / "s.json", spec), "-o", "out", "--model", model) == 0
    assert len(Video.read("out/ball.mp4")) == 7 and record(Path("out/ball.mp4"))["input"] is None
    with Image.open("out/ball.sheet.png") as sheet:
        assert sheet.size[1] == 20 + 3 * 148


@dataclasses.dataclass
class Standin:
    """Models of depth and segmentation that look at nothing."""

    name: str
    asked: list[str] = dataclasses.field(default_factory=list)
    released: int = 0

    def __call__(self, frames: np.ndarray, *prompt: Any) -> np.ndarray:
        self.asked += [word for word in prompt if isinstance(word, str)]
        found = np.zeros(frames.shape[:3], np.uint8)
        found[:, :, : frames.shape[2] // 2] = 1
        return found

    def release(self) -> None:
        self.released += 1


def test_depth_seg_and_mask_prompts_ask_their_models(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    depth, seg = Standin("depths"), Standin("segments")
    given: list[Any] = []

    def models(*arguments: Any) -> Models:
        given.append(arguments)
        return Models(depth, seg)

    monkeypatch.setattr(transfer, "signal_models", models)
    one = tree("one", depth={"mask_prompt": "ball"}, seg={}, edge=None)
    two = tree("two", seg={"control_prompt": "cube. table."}, edge=None)
    names = "--depth-model", "d", "--detector", "e", "--tracker", "f", "--device", "cpu"
    assert call(write(folder / "s.jsonl", one, two), "-o", "out", "--model", model, *names) == 0
    assert seg.asked == ["ball", PROMPT, "cube. table."] and depth.released == seg.released == 2
    assert given == [("d", "e", "f", "cpu")]
    said = record(Path("out/one.mp4"))["controls"]
    assert said["depth"]["model"] == "depths" and said["depth"]["mask"] == {"prompt": "ball", "model": "segments"}
    assert said["seg"] | {"prompt": PROMPT, "model": "segments"} == said["seg"]


def test_a_missing_model_says_what_to_do(
    folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "empty").mkdir()
    command = *flags("--control", "depth"), "-o", "a.mp4", "--model", model, "--depth-model", folder / "empty"
    assert call(*command) == 2
    assert "a: cannot load the depth model" in (line := last_line(capsys)) and "give a depth control" in line
    assert listed(Path()) == {"assets"}


def test_a_branch_from_elsewhere(folder: Path, model: Path, tiny_folder: Path) -> None:
    branch = "--branch", f"edge={model}"
    assert call(*flags("--control", "edge"), "-o", "a.mp4", "--model", model) == 0
    assert call(*flags("--control", "edge"), "-o", "b.mp4", "--model", tiny_folder, *branch) == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_the_result_gets_its_name_last(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that where it is, everything is, whenever the power fails."""
    named: list[str] = []
    replace = os.replace

    def replaced(old: Any, new: Any) -> None:
        named.append(Path(new).name)
        replace(old, new)

    monkeypatch.setattr(os, "replace", replaced)
    assert call(*flags("--control", "edge"), "-o", "a.mp4", "--model", model) == 0
    final = [name for name in named if "partial" not in name]
    assert final[-1] == "a.mp4" and set(final) == files_of("a", "edge")


def test_into_a_folder_without_a_file(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after the input; and a preset that has no use is told of."""
    assert call(*flags("--control", "edge"), "-o", "out", "--model", model) == 0
    assert listed(Path("out")) == files_of("in", "edge")
    block = {"control_path": "edge.mp4", "preset_edge_threshold": "high"}
    spec = write(folder / "s.json", tree(edge=block, max_frames=99))
    assert call(spec, "-o", "out", "--model", model) == 0
    err = capsys.readouterr().err
    assert f"orrery: {spec}: the preset 'high' of edge is not used: {folder / 'edge.mp4'} is\n" in err
    assert f"orrery: {spec}: asked for 99 frames, {folder / 'in.mp4'} gives 20\n" in err


@pytest.mark.parametrize("moment", ["save", "sheet", "beside", "control"])
def test_all_files_or_none(
    moment: str,
    folder: Path,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    full_disk: Callable[[int], Any],
    capsys: Any,
) -> None:
    """On a disk that is full at one moment or another."""
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    name = "labelled_sheet" if moment == "sheet" else None
    original: Any = getattr(orrery.cli.outputs, name) if name else Video.save
    wanted = {"save": "a.mp4", "beside": ".beside.", "control": ".control-edge."}

    def on_a_full_disk(self: Any, path: Path, *arguments: Any, **options: Any) -> Any:
        if name or wanted[moment] in str(path).replace(".a.", "a.").replace(f".{os.getpid()}.partial", ""):
            with full_disk(300):
                return original(self, path, *arguments, **options)
        return original(self, path, *arguments, **options)

    monkeypatch.setattr(*((orrery.cli.outputs, name) if name else (Video, "save")), on_a_full_disk)
    assert call(*flags("--control", "edge"), "-o", "a.mp4", "--model", model) == 2
    assert "File too large" in last_line(capsys)
    assert listed(Path()) == {"assets"} and {file.name: file.read_bytes() for file in folder.iterdir()} == before


BY_THE_MODEL = {
    "--chunk 18": "in: chunk must be a whole number from 1 to 17, got 18",
    "--chunk 16": "in: chunk is 16; allowed is 4k + 1 from 5 to 17",
    "--size 40x48": "in: height must be a multiple of 16, got 40",
    "--handover post": "in: handover is 'post'; allowed are latents, frames",
    "--overlap 3": "in: overlap is 3; allowed are 1 and 2, and 0 with handover 'frames'",
    "--overlap 0 --handover latents": "in: overlap is 0; allowed are 1 and 2",
    "--image assets/still.png": "takes no reference image here",
    "--hold assets/labels.npz --hold-until 2000": "in: guided steps must be a whole number from 0 to 1000",
    "--device abacus": "device 'abacus' is not available",
    "--model tiny": "has no control edge; it has none",
}


@pytest.mark.parametrize("words", BY_THE_MODEL)
def test_refusals_of_the_model_come_before_the_first_is_drawn(
    words: str,
    folder: Path,
    model: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(World, "run_transfer", None)
    os.symlink(tiny_folder, "tiny")
    assert call(*flags("--control", "edge"), "-o", "b", "--model", model, *words.split()) == 2
    assert BY_THE_MODEL[words] in last_line(capsys)
    assert listed(Path()) == {"assets", "tiny"}


def test_the_source_of_a_wrong_job_is_named(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = write(folder / "spec.jsonl", tree("a"), tree("b", num_video_frames_per_chunk=93))
    assert call(spec, "-o", "out", "--model", model) == 2
    assert f"{spec} line 2: chunk must be a whole number from 1 to 17, got 93" in last_line(capsys)
    assert not Path("out").exists()
