"""`orrery transfer`: what it refuses before anything is loaded, in one line and with nothing touched."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from orrery.cli.inputs import Extent, extent
from orrery.cli.main import main
from orrery.errors import InputError
from orrery.video import Video
from orrery.weights import SIZES
from orrery.weights.catalogue import nearest_size

PROMPT = "a red ball falls and bounces"


def call(*arguments: object) -> int:
    """Exit code of `orrery transfer ARGUMENTS`."""
    with pytest.raises(SystemExit) as end:
        main(["transfer", *(str(argument) for argument in arguments)])
    return int(end.value.code or 0)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The single line that an error printed."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def moving(count: int, height: int = 32, width: int = 48, fps: float = 10) -> Video:
    return Video(np.random.default_rng(3).integers(0, 256, (count, height, width, 3), dtype=np.uint8), fps)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with inputs and controls in `assets`."""
    assets = tmp_path / "assets"
    assets.mkdir()
    for name, video in {
        "in": moving(20), "edge": moving(20), "short": moving(9), "long": moving(30), "fast": moving(20, fps=25),
        "square": moving(20, 48, 48),
    }.items():  # fmt: skip
        video.save(assets / f"{name}.mp4")
    Image.fromarray(moving(1).frames[0]).save(assets / "still.png")
    Image.fromarray(np.full((32, 48), 255, np.uint8)).save(assets / "half.png")
    (assets / "text.mp4").write_text("this is a text\n")
    monkeypatch.chdir(tmp_path)
    return assets


def write(path: Path, *trees: dict[str, Any]) -> Path:
    path.write_text("\n".join(json.dumps(tree) for tree in trees))
    return path


def tree(name: str = "ball", **keys: Any) -> dict[str, Any]:
    return {"name": name, "prompt": PROMPT, "video_path": "assets/in.mp4", "edge": {}} | keys


# Options after a prompt, an input and a place to write to, or (with a file in front) all there is.
REFUSED = {
    "--control edges": "control is 'edges'; allowed are edge, blur, depth, seg (vis",
    "--control edge:x": "--control must be KIND[=FILE][:WEIGHT] with a number, got 'edge:x'",
    "--control edge=": "--control must be KIND[=FILE][:WEIGHT], got 'edge='",
    "--control edge:2": "edge.control_weight = 2.0 (allowed: a number from 0 to 1)",
    "--control edge:-1": "edge.control_weight = -1.0 (allowed: a number from 0 to 1)",
    "--control edge:0": "control_weight is 0 for edge (allowed: at least one above 0)",
    "--control vis --control blur": "--control names blur twice",
    "--control edge --mask seg=assets/half.png": "--mask seg=assets/half.png needs --control seg",
    "--control edge --mask edge": "--mask must be KIND=..., such as edge=..., got 'edge'",
    "--control edge --strength edge=x": "edge.preset_edge_threshold = 'x' (allowed: none, very_low",
    "--control seg --strength seg=low": "--strength is for edge and blur, got seg=low",
    "--control edge=assets/edge.mp4 --strength edge=low": "--strength edge=low is for a control made of the input",
    "--control edge --seg-prompt x": "--seg-prompt is for --control seg without a file",
    "--control edge --steps 0": "--steps = 0 (allowed: a whole number of at least 1)",
    "--control edge --resolution 9": "--resolution = '9' (allowed: 256, 480",
    "--control edge --size 9": "--size must be HEIGHTxWIDTH",
    "--control edge --size 32x48 --resolution 256": "--size 32x48 and --resolution 256 both say a size; give one",
    "--control edge --image assets/still.png --image-frame 1": "--image and --image-frame both given; allowed: one",
    "--control edge --image-frame 20": "context_frame_index is 20; assets/in.mp4 has 20 frames: allowed is 0 to 19",
    "--control edge --fps 11": "--fps is 11; allowed is above 0 to 10, that of assets/in.mp4",
    "--control edge=gone.mp4": "edge.control_path = 'gone.mp4' (allowed: an existing file",
    "--control edge=assets/short.mp4:0.5": "the edge control, assets/short.mp4, has 9 frames, the input assets/in.mp4 "
    "20: give one that is as long, or draw only the first 9 with --frames 9",
    "--control edge=assets/long.mp4": "the edge control, assets/long.mp4, has 30 frames, the input assets/in.mp4 20: ",
    "--control edge=assets/fast.mp4": "assets/fast.mp4 runs at 25 frames per second, the input at 10",
    "--control edge=assets/square.mp4": "assets/square.mp4 is 48x48, the output 32x48: height and width must have the",
    "--control edge=assets/text.mp4": "text.mp4: it is not a video that can be decoded",
    "--control edge=assets": "assets is a folder; a simulated clip gives depth and seg",
    "--control seg=assets": "no folder of a simulated clip with seg: there is no segmentation.npz in it",
    "--control edge --mask edge=assets/square.mp4": "the mask of edge: assets/square.mp4 is 48x48, the output 32x48",
    "--control edge --mask edge=assets/short.mp4": "the mask of edge, assets/short.mp4, has 9 frames, the input assets",
    "--control edge --hold assets/short.mp4": "the mask of guided generation, assets/short.mp4, has 9 frames",
    "--control edge -o a.mov": "cannot write a.mov: its suffix is '.mov', allowed is .mp4 (or",
    "--control edge -o no/a.mp4": "cannot write no/a.mp4: no does not exist",
    "--control edge --frames 3 -o a.png": "cannot write 3 frames to a.png: a picture holds one",
    "--control edge -o assets/in.mp4 --again": "in would overwrite assets/in.mp4, which in reads",
    "--control edge --model mega": "unknown model 'mega'",
    "--control edge --model predict2.5-2b": "'predict2.5-2b' has no control branch for edge; it has: none. Models that",
    "--control edge --branch seg=x": "--branch names seg, which no job asks for",
    "--control edge --lora a:b": "--lora must be FILE or FILE:SCALE with a number",
    "": "there is no control: name a spec file, or --prompt, --input and at least one",
    "spec.json --control edge": "--control edge does not go with spec files",
    "gone.json": "cannot read jobs from gone.json (no such file)",
    "spec.json -o spec.mp4": "ball would overwrite spec.json, a spec file; choose another output",
    "two.jsonl": "cannot write 2 videos to a.mp4: give a folder with -o",
    "two.jsonl -o out": "two.jsonl line 2 and two.jsonl line 1 would both write out/a.beside.mp4; change the na",
    "twice.jsonl -o out": "name = 'ball' is used twice, in twice.jsonl line 1 and in twice.jsonl line 2",
    "none.json -o out": "none.json: no control (allowed: at least one of edge, vis, depth, seg, such as",
    "dir.json -o out": "dir.json: output_dir = 'x' is no key of a job: where results go is -o of",
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_refusals_before_anything_is_loaded(
    words: str, folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(Path("spec.json"), tree())
    write(Path("two.jsonl"), tree("a"), tree("a.beside"))
    write(Path("twice.jsonl"), tree(), tree())
    write(Path("none.json"), tree(edge=None))
    write(Path("dir.json"), tree(output_dir="x"))
    before = {path: path.read_bytes() for path in (*Path().iterdir(), *folder.iterdir()) if path.is_file()}
    if "mega" not in words:
        monkeypatch.setattr("orrery.cli.options.load_world", None)
    own = (
        () if words.partition(" ")[0].endswith(("json", "jsonl")) else ("--prompt", PROMPT, "--input", "assets/in.mp4")
    )
    assert call(*own, "-o", "a.mp4", "--model", tiny_folder, *words.split()) == 2
    assert REFUSED[words] in one_line(capsys)
    after = {path: path.read_bytes() for path in (*Path().iterdir(), *folder.iterdir()) if path.is_file()}
    assert after == before and not Path("out").exists()


def test_what_is_missing_is_called_by_its_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--control", "edge", "-o", "a.mp4") == 2
    line = one_line(capsys)
    assert "missing --prompt (allowed: text" in line and "missing --input, which edge needs" in line


def test_sizes_by_name_follow_the_shape_of_the_input() -> None:
    def nearest(resolution: str, shape: tuple[int, int]) -> tuple[int, int]:
        return nearest_size(SIZES[resolution].values(), shape)

    assert nearest("720", (1080, 1920)) == (704, 1280) and nearest("720", (480, 640)) == (704, 960)
    assert nearest("480", (500, 500)) == (480, 480) and nearest("256", (1920, 1080)) == (320, 192)
    assert nearest("720", (100, 157)) == (704, 1280) and nearest("720", (100, 154)) == (704, 960)  # 16:9 and 4:3 meet
    assert nearest_size([(64, 64), (64, 128)], (10, 19)) == (64, 128)  # sizes that were not published


def test_extents_are_read_off_headers(tmp_path: Path) -> None:
    moving(7, fps=12.5).save(tmp_path / "a.mp4")
    assert extent(tmp_path / "a.mp4") == Extent(7, 12.5, (32, 48))
    with av.open(str(tmp_path / "a.mkv"), "w") as container:  # whose header does not count frames
        stream = container.add_stream("libx264", rate=5)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for pixels in moving(9).frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert extent(tmp_path / "a.mkv") == Extent(9, 5, (32, 48))
    np.save(tmp_path / "a.npy", np.zeros((3, 4, 5, 3), np.uint8))
    np.savez_compressed(tmp_path / "a.npz", np.zeros((4, 5)))
    assert [extent(tmp_path / f"a.{end}").frames for end in ("npy", "npz")] == [3, 1]
    np.savez(tmp_path / "two.npz", front=np.zeros((4, 5)), left=np.zeros((4, 5)))
    (tmp_path / "bad.npz").write_text("text")
    for name, message in (("two.npz", "holds 2 arrays .front, left."), ("bad.npz", "is not a NumPy file")):
        with pytest.raises(InputError, match=message):
            extent(tmp_path / name)


def test_help_and_refusals_do_not_wait_for_torch(folder: Path) -> None:
    code = (
        "import sys\nfrom orrery.cli.main import main\n"
        "for words in (['--help'], ['gone.json', '-o', 'a.mp4'], ['-o', 'a.mp4']):\n"
        "    try: main(['transfer', *words])\n"
        "    except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_large_videos_are_shown_smaller_beside_each_other(tmp_path: Path) -> None:
    from orrery.cli.outputs import WIDEST, write_transfer
    from orrery.world import Transferred

    large = Video(np.zeros((2, 704, 1280, 3), np.uint8), 16)
    write_transfer(tmp_path / "a.mp4", Transferred(large, {"edge": large[:2]}, large), {"edge": 1.0}, {}, True)
    assert Video.read(tmp_path / "a.mp4").frames.shape == (2, 704, 2 * 1280, 3)  # as it is, input to the left
    shown = Video.read(tmp_path / "a.beside.mp4")
    assert WIDEST - 8 <= shown.width <= WIDEST and shown.height == round(704 * 638 / 1280) // 2 * 2
    odd = Video(np.zeros((2, 33, 47, 3), np.uint8), 16)
    write_transfer(tmp_path / "b.mp4", Transferred(odd, {"edge": odd}, None), {"edge": 1.0}, {})
    assert Video.read(tmp_path / "b.mp4").frames.shape == (2, 33, 47, 3)
