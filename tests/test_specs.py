"""Specs: official control-spec files read unchanged, overrides, and every kind of wrong file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orrery import specs
from orrery.errors import InputError
from orrery.specs import ControlSpec, TransferSpec, make_spec, read_specs

PROMPT = "A robot arm tidies a workshop at dusk."
FILES = (
    "arm.mp4", "arm.mov", "arm.webm", "arm.png", "edges.mp4", "mask.mp4", "mask.png", "labels.npz", "look.jpg",
    "depth.npz", "ARM.MP4",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like assets: inputs and controls lie beside the specs. Specs never look into them."""
    for name in FILES:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "arm.txt").write_text(f"  {PROMPT}\n\n", encoding="utf-8")
    (tmp_path / "clip").mkdir()
    return tmp_path


def write(path: Path, *trees: Any) -> Path:
    """The trees as a file: one a line in .jsonl, the one there is in .json."""
    path.write_text("\n".join(json.dumps(tree) for tree in trees), encoding="utf-8")
    return path


def tree(**keys: Any) -> dict[str, Any]:
    return {"name": "arm", "prompt": PROMPT, "video_path": "arm.mp4", "edge": {}} | keys


def read_one(folder: Path, keys: dict[str, Any], **overrides: Any) -> TransferSpec:
    (spec,) = read_specs([write(folder / "spec.json", keys)], overrides)
    return spec


def refusal(folder: Path, keys: Any, **overrides: Any) -> str:
    """What is said about a file with this tree."""
    with pytest.raises(InputError) as caught:
        read_specs([write(folder / "spec.json", keys)], overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_official_file_in_full(folder: Path) -> None:
    keys = {
        "name": "robot_multicontrol",
        "prompt_path": "arm.txt",
        "video_path": "arm.mp4",
        "negative_prompt": "cartoon",
        "seed": 5,
        "guidance": 7,
        "num_steps": 20,
        "resolution": "480",
        "max_frames": 200,
        "num_video_frames_per_chunk": 93,
        "num_conditional_frames": 2,
        "context_frame_index": 0,
        "image_context_path": None,
        "sigma_max": "80",
        "show_control_condition": True,
        "show_input": True,
        "keep_input_resolution": False,
        "guided_generation_mask": "labels.npz",
        "guided_generation_step_threshold": 12,
        "guided_generation_foreground_labels": [1, 4],
        "seg": {"control_weight": 0.3, "control_prompt": "robot arm. table."},
        "depth": {"control_path": "depth.npz", "mask_prompt": "robot arm"},
        "edge": {
            "control_path": "edges.mp4",
            "control_weight": 0.25,
            "mask_path": "mask.mp4",
            "preset_edge_threshold": "high",
        },
    }
    assert read_one(folder, keys) == TransferSpec(
        name="robot_multicontrol",
        prompt=PROMPT,
        video=folder / "arm.mp4",
        controls=(
            ControlSpec("edge", folder / "edges.mp4", 0.25, folder / "mask.mp4", None, "high", None),
            ControlSpec("depth", folder / "depth.npz", 1.0, None, "robot arm", None, None),
            ControlSpec("seg", None, 0.3, None, None, None, "robot arm. table."),
        ),
        negative_prompt="cartoon",
        seed=5,
        guidance=7.0,
        steps=20,
        resolution="480",
        frames=200,
        chunk=93,
        overlap=1,
        image=None,
        image_frame=0,
        sigma_max=80.0,
        hold=folder / "labels.npz",
        hold_labels=(1, 4),
        hold_until=12,
        keep_size=False,
        show_input=True,
        show_controls=True,
        source=str(folder / "spec.json"),
    )


def test_what_a_file_leaves_out(folder: Path) -> None:
    """As published; but what a model has an opinion on is left to the model."""
    spec = read_one(folder, {"name": "arm", "prompt": PROMPT, "video_path": "arm.mp4", "vis": {}})
    expected = TransferSpec("arm", PROMPT, folder / "arm.mp4", (ControlSpec("blur", strength="medium"),))
    assert spec == TransferSpec(**vars(expected) | {"source": spec.source})
    assert (spec.seed, spec.overlap, spec.hold_until, spec.keep_size) == (2025, 1, 25, True)
    assert (spec.guidance, spec.steps, spec.resolution, spec.negative_prompt, spec.chunk) == (None,) * 5
    assert spec.controls[0].weight == 1 and not spec.show_input and not spec.show_controls


def test_null_says_the_same_as_no_key(folder: Path) -> None:
    absent = ("prompt_path", "negative_prompt", "guidance", "num_steps", "resolution", "max_frames", "sigma_max")
    absent += ("num_video_frames_per_chunk", "context_frame_index", "image_context_path", "guided_generation_mask")
    absent += ("guided_generation_foreground_labels", "vis", "depth", "seg")
    block = {"edge": dict.fromkeys(("control_path", "mask_path", "mask_prompt", "preset_edge_threshold"))}
    assert read_one(folder, tree(**dict.fromkeys(absent)) | block) == read_one(folder, tree())


@pytest.mark.parametrize("key", ["vis", "blur"])
def test_vis_is_blur(folder: Path, key: str) -> None:
    spec = read_one(folder, tree(edge=None) | {key: {"preset_blur_strength": "very_low", "control_weight": 1}})
    assert spec.controls == (ControlSpec("blur", strength="very_low"),) and spec.kinds == ("blur",)


def test_controls_come_in_the_published_order(folder: Path) -> None:
    keys = {key: {} for key in ("seg", "depth", "vis", "edge")}
    assert read_one(folder, {"name": "a", "prompt": "b", "video_path": "arm.mp4"} | keys).kinds == (
        "edge", "blur", "depth", "seg",
    )  # fmt: skip


@pytest.mark.parametrize("strength", specs.STRENGTHS)
def test_presets(folder: Path, strength: str) -> None:
    blocks = {"edge": {"preset_edge_threshold": strength}, "vis": {"preset_blur_strength": strength}, "depth": {}}
    edge, blur, depth = read_one(folder, tree(**blocks)).controls
    assert (edge.strength, blur.strength, depth.strength) == (strength, strength, None)


def test_names_that_stand_here_are_those_obeyed_above() -> None:
    from orrery.control.blur import BLUR_PRESETS
    from orrery.control.edge import EDGE_PRESETS
    from orrery.kinds import KINDS
    from orrery.weights import SIZES

    assert set(specs.STRENGTHS) == set(EDGE_PRESETS) == set(BLUR_PRESETS)
    assert set(specs.RESOLUTIONS) == set(SIZES) and tuple(dict.fromkeys(specs.BLOCKS.values())) == KINDS


@pytest.mark.parametrize(("told", "sigma"), [("80", 80.0), ("0.5", 0.5), (200, 200.0), (1.5, 1.5), ("0", None)])
def test_sigma_max_is_text_or_a_number(folder: Path, told: Any, sigma: float | None) -> None:
    assert read_one(folder, tree(sigma_max=told)).sigma_max == sigma


@pytest.mark.parametrize(("told", "overlap"), [(0, 0), (1, 1), (2, 1)])
def test_conditional_frames_are_latents_here(folder: Path, told: int, overlap: int) -> None:
    assert read_one(folder, tree(num_conditional_frames=told)).overlap == overlap


def test_pictures(folder: Path) -> None:
    spec = read_one(folder, tree(video_path="arm.png", max_frames=1, num_video_frames_per_chunk=1))
    assert (spec.video, spec.frames, spec.chunk) == (folder / "arm.png", 1, 1)


def test_reference_images(folder: Path) -> None:
    assert read_one(folder, tree(image_context_path="look.jpg")).image == folder / "look.jpg"
    assert read_one(folder, tree(context_frame_index=7)).image_frame == 7


def test_a_mask_file_wins_over_a_mask_prompt(folder: Path) -> None:
    (edge,) = read_one(folder, tree(edge={"mask_path": "mask.png", "mask_prompt": "arm"})).controls
    assert (edge.mask, edge.mask_prompt) == (folder / "mask.png", None)
    assert read_one(folder, tree(edge={"mask_prompt": "arm"})).controls[0].mask_prompt == "arm"


def test_a_control_can_be_the_folder_of_a_simulated_clip(folder: Path) -> None:
    assert read_one(folder, tree(depth={"control_path": "clip"})).controls[1].path == folder / "clip"


def test_the_input_can_be_left_out_where_all_controls_are_there(folder: Path) -> None:
    keys = tree(edge={"control_path": "edges.mp4"}, depth={"control_path": "depth.npz"})
    del keys["video_path"]
    assert read_one(folder, keys).video is None
    needing = {
        "edge": {"edge": {}},
        "edge.mask_prompt": {"edge": {"control_path": "edges.mp4", "mask_prompt": "arm"}},
        "context_frame_index": {"context_frame_index": 0},
        "guided_generation_mask": {"guided_generation_mask": "mask.mp4"},
        "sigma_max": {"sigma_max": 3},
        "show_input": {"show_input": True},
    }
    for key, change in needing.items():
        assert f"missing key video_path, which {key} needs (allowed: a video or an image; none where every" in refusal(
            folder, keys | change
        )
    assert "which edge, sigma_max need (" in refusal(folder, keys | {"edge": {}, "sigma_max": 1})


def test_jsonl_lists_and_yaml(folder: Path) -> None:
    lines = write(folder / "arms.jsonl", tree(name="one"), tree(name="two", seed=3))
    both = write(folder / "arms.json", [tree(name="three"), tree(name="four")])
    (folder / "arm.yaml").write_text(
        "name: five\nprompt_path: arm.txt\nvideo_path: arm.mov\nresolution: 720\nsigma_max: 2\nvis:\n"
        "  preset_blur_strength: low\nedge: {control_weight: 0.5}\n"
    )
    found = read_specs([lines, both, folder / "arm.yaml"])
    assert [spec.name for spec in found] == ["one", "two", "three", "four", "five"]
    assert [spec.source for spec in found[1:4]] == [f"{lines} line 2", f"{both} item 1", f"{both} item 2"]
    assert (found[1].seed, found[4].prompt, found[4].resolution, found[4].sigma_max) == (3, PROMPT, "720", 2)
    assert found[4].controls == (
        ControlSpec("edge", weight=0.5, strength="medium"),
        ControlSpec("blur", strength="low"),
    )


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    keys = tree(
        video_path="../arm.mp4",
        image_context_path=str(folder / "look.jpg"),
        guided_generation_mask="~/mask.mp4",
        edge={"control_path": "../edges.mp4", "mask_path": "../mask.png"},
        prompt_path="../arm.txt",
        prompt=None,
    )
    write(folder / "sub" / "a.json", keys)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    (spec,) = read_specs(["sub/a.json"])
    assert spec.video == Path("sub/../arm.mp4") and spec.image == folder / "look.jpg" and spec.prompt == PROMPT
    assert spec.hold == folder / "mask.mp4" and spec.controls[0].path == Path("sub/../edges.mp4")
    assert spec.controls[0].mask == Path("sub/../mask.png")


def test_overrides_win(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "sub").mkdir()
    keys = tree(video_path="../arm.mp4", seed=1, guidance=2, num_steps=3, image_context_path="../look.jpg")
    file = write(folder / "sub" / "spec.json", keys)
    overrides = dict(
        prompt_path="arm.txt", video_path=Path("arm.mov"), seed=9, guidance=0.5, num_steps=4, negative_prompt="",
        resolution="256", max_frames=5, num_video_frames_per_chunk=29, num_conditional_frames=0,
        context_frame_index=3, sigma_max=1, guided_generation_mask="labels.npz", guided_generation_step_threshold=2,
        guided_generation_foreground_labels=[2], keep_input_resolution=False, show_input=True,
        show_control_condition=True, name=None,
    )  # fmt: skip
    assert set(overrides) | {"prompt", "image_context_path", "name"} == {*specs.OVERRIDES, "name"}  # all of them
    (spec,) = read_specs([file], overrides)
    assert spec == TransferSpec(
        "arm", PROMPT, Path("arm.mov"), (ControlSpec("edge", strength="medium"),), "", 9, 0.5, 4, "256", 5, 29, 0,
        None, 3, 1.0, Path("labels.npz"), (2,), 2, False, True, True, str(Path(file)),
    )  # fmt: skip
    assert read_one(folder, tree(context_frame_index=3), image_context_path="look.jpg").image_frame is None


def test_faulty_overrides(folder: Path) -> None:
    assert "unknown override 'name' = 'x' (" in refusal(folder, tree(), name="x")
    assert "unknown override 'edge' = {} (" in refusal(folder, tree(), edge={})
    assert "override seed = -1 (allowed: a whole number from 0" in refusal(folder, tree(), seed=-1)
    with pytest.raises(InputError, match=r"spec\.json: --seed = -1 \(allowed: a whole"):
        read_specs([write(folder / "spec.json", tree())], {"seed": -1}, {"seed": "--seed"})


def test_a_spec_without_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    spec = make_spec({"name": "arm", "blur": {"control_weight": 0.5}}, {"prompt": PROMPT, "video_path": "arm.mp4"})
    assert spec.controls == (ControlSpec("blur", weight=0.5, strength="medium"),) and spec.video == Path("arm.mp4")
    with pytest.raises(InputError, match=r"override guided_\w+ = 3 \(allowed: with a guided_generation_mask\)"):
        make_spec(
            {"name": "arm", "edge": {}},
            {"prompt": PROMPT, "video_path": "arm.mp4", "guided_generation_step_threshold": 3},
        )
    with pytest.raises(InputError) as caught:
        make_spec({"name": "arm", "edge": {}}, {"num_steps": 0}, {"num_steps": "--steps", "video_path": "--input",
                                                                  "prompt": "--prompt"})  # fmt: skip
    assert str(caught.value) == (
        "--steps = 0 (allowed: a whole number of at least 1); missing --prompt (allowed: text, or prompt_path with a "
        "text file); missing --input, which edge needs (allowed: a video or an image; none where every control has a "
        "control_path)"
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"name": "a/b"}, "name = 'a/b' (allowed: text that can be a file name"),
        ({"name": 7}, "name = 7 (allowed: text that can be a file name"),
        ({"prompt": 5}, "prompt = 5 (allowed: text)"),
        ({"prompt": " "}, "prompt = ' ' (allowed: text that says something)"),
        ({"prompt": None}, "missing key prompt (allowed: text, or prompt_path with a text file)"),
        ({"prompt_path": "arm.txt"}, "prompt and prompt_path = 'arm.txt' both given; allowed: one of them"),
        ({"video_path": 5}, "video_path = 5 (allowed: the path of a video or an image)"),
        ({"video_path": "gone.mp4"}, "video_path = 'gone.mp4' (allowed: an existing file; "),
        ({"video_path": "depth.npz"}, "video_path = 'depth.npz' (allowed: a file of .mp4 .mov .mkv .webm .avi .png"),
        ({"video_path": "clip"}, "video_path = 'clip' (allowed: a file of .mp4"),
        ({"negative_prompt": 5}, "negative_prompt = 5 (allowed: text)"),
        ({"seed": True}, "seed = True (allowed: a whole number from 0 to 4294967295)"),
        ({"seed": 2**32}, "seed = 4294967296 (allowed: a whole number from 0"),
        ({"guidance": -1}, "guidance = -1 (allowed: a number of at least 0)"),
        ({"num_steps": 0}, "num_steps = 0 (allowed: a whole number of at least 1)"),
        ({"resolution": "721"}, "resolution = '721' (allowed: 256, 480, 480p, 512, 720, 720p, 1024, 1080)"),
        ({"resolution": True}, "resolution = True (allowed: 256"),
        ({"max_frames": 0}, "max_frames = 0 (allowed: a whole number of at least 1)"),
        ({"num_video_frames_per_chunk": 0}, "num_video_frames_per_chunk = 0 (allowed: a whole number of at least 1)"),
        ({"num_conditional_frames": 3}, "num_conditional_frames = 3 (allowed: 0, 1 or 2)"),
        ({"num_conditional_frames": True}, "num_conditional_frames = True (allowed: 0, 1 or 2)"),
        ({"context_frame_index": -1}, "context_frame_index = -1 (allowed: a whole number of at least 0)"),
        ({"image_context_path": "arm.mp4"}, "image_context_path = 'arm.mp4' (allowed: a file of .png .jpg"),
        ({"image_context_path": "gone.png"}, "image_context_path = 'gone.png' (allowed: an existing file; "),
        ({"sigma_max": "201"}, "sigma_max = '201' (allowed: a number from 0 to 200)"),
        ({"sigma_max": "much"}, "sigma_max = 'much' (allowed: a number from 0 to 200)"),
        ({"sigma_max": float("nan")}, "sigma_max = nan (allowed: a number from 0 to 200)"),
        ({"guided_generation_mask": "gone.mp4"}, "guided_generation_mask = 'gone.mp4' (allowed: an existing file; "),
        ({"guided_generation_step_threshold": -1}, "guided_generation_step_threshold = -1 (allowed: a whole number"),
        ({"guided_generation_foreground_labels": []}, "guided_generation_foreground_labels = [] (allowed: a list of"),
        ({"guided_generation_foreground_labels": ["x"]}, "guided_generation_foreground_labels = ['x'] (allowed: a li"),
        (
            {"guided_generation_foreground_labels": [1], "guided_generation_mask": "mask.mp4"},
            "guided_generation_foreground_labels = [1] (allowed: with a guided_generation_mask of .npz .npy; it is ",
        ),
        ({"keep_input_resolution": "often"}, "keep_input_resolution = 'often' (allowed: true or false)"),
        ({"show_input": 3}, "show_input = 3 (allowed: true or false)"),
        ({"show_control_condition": "x"}, "show_control_condition = 'x' (allowed: true or false)"),
        ({"edge": None}, "no control (allowed: at least one of edge, vis, depth, seg, such as \"edge\": {})"),
        ({"edge": 1}, "edge = 1 (allowed: an object, such as {} or {\"control_weight\": 0.5})"),
        ({"edge": {"control_weight": 0}}, "control_weight is 0 for edge (allowed: at least one above 0)"),
        ({"edge": {"control_weight": 1.5}}, "edge.control_weight = 1.5 (allowed: a number from 0 to 1)"),
        ({"edge": {"control_weight": -0.1}}, "edge.control_weight = -0.1 (allowed: a number from 0 to 1)"),
        ({"edge": {"control_weight": True}}, "edge.control_weight = True (allowed: a number from 0 to 1)"),
        ({"edge": {"control_path": "gone.mp4"}}, "edge.control_path = 'gone.mp4' (allowed: an existing file; "),
        ({"edge": {"control_path": "arm.txt"}}, "edge.control_path = 'arm.txt' (allowed: a file of .mp4"),
        ({"edge": {"mask_path": "gone.png"}}, "edge.mask_path = 'gone.png' (allowed: an existing file; "),
        ({"edge": {"mask_path": "clip"}}, "edge.mask_path = 'clip' (allowed: a file of"),
        ({"edge": {"mask_prompt": " "}}, "edge.mask_prompt = ' ' (allowed: text that says something)"),
        ({"seg": {"control_prompt": 4}}, "seg.control_prompt = 4 (allowed: text)"),
        ({"edge": {"preset_edge_threshold": "strong"}}, "edge.preset_edge_threshold = 'strong' (allowed: none, very_"),
        ({"vis": {"preset_blur_strength": 3}}, "vis.preset_blur_strength = 3 (allowed: none, very_low"),
        ({"vis": {}, "blur": {}}, "vis and blur both given; allowed: one of them, they are the same control"),
        (
            {"image_context_path": "look.jpg", "context_frame_index": 0},
            "image_context_path and context_frame_index both given; allowed: one of them",
        ),
        (
            {"context_frame_index": 0, "vis": {}},
            "context_frame_index = 0 (allowed: no reference image with vis, which keeps the colours of the input)",
        ),
        ({"promt": "x"}, "unknown key 'promt' = 'x' (did you mean prompt?) (allowed: name, prompt"),
        ({"input_path": "x"}, "unknown key 'input_path' = 'x' (did you mean video_path?)"),
        ({"control_weight": 1}, "unknown key 'control_weight' = 1 (it belongs into a control's block, such as edge."),
        ({"Depth": {}}, "unknown key 'Depth' = {} (did you mean depth?)"),
        ({"front_wide": {}}, "unknown key 'front_wide' = {} (allowed: name"),
        ({"edge": {"weight": 1}}, "unknown key 'edge.weight' = 1 (did you mean edge.control_weight?) (allowed: con"),
        ({"edge": {"control_wieght": 1}}, "unknown key 'edge.control_wieght' = 1 (did you mean edge.control_weight?)"),
        ({"seg": {"prompt": "x"}}, "unknown key 'seg.prompt' = 'x' (did you mean seg.control_prompt or seg.mask_"),
        ({"edge": {"control_prompt": "x"}}, "unknown key 'edge.control_prompt' = 'x' (it belongs to seg) (allowed: "),
        ({"vis": {"preset_edge_threshold": "low"}}, "unknown key 'vis.preset_edge_threshold' = 'low' (it belongs to e"),
        ({"edge": {"seed": 1}}, "unknown key 'edge.seed' = 1 (it belongs to the job, outside edge)"),
        ({"output_dir": "out"}, "output_dir = 'out' is no key of a job: where results go is -o of `orrery transfer`"),
        ({"model": "edge"}, "model = 'edge' is no key of a job: the model is --model of `orrery transfer`"),
        ({"disable_guardrails": True}, "disable_guardrails = True is no key of a job: it belongs to the official comm"),
    ],
)  # fmt: skip
def test_faults_name_the_file_the_key_the_value_and_what_is_allowed(
    folder: Path, keys: dict[str, Any], told: str
) -> None:
    message = refusal(folder, tree() | keys)
    assert message.startswith(f"{folder / 'spec.json'}: {told}")
    assert "; " not in message.removeprefix(f"{folder / 'spec.json'}: {told}")  # one fault, told once


def test_all_faults_of_a_job_are_one_line(folder: Path) -> None:
    keys = {"seeed": 1, "seed": -1, "output_dir": "x", "edge": {"weight": 1, "control_weight": 3}, "sigma_max": "x"}
    message = refusal(folder, keys)
    assert message.count("spec.json") == 1
    for told in (
        "unknown key 'seeed'", "missing key name", "missing key prompt", "missing key video_path", "seed = -1",
        "output_dir = 'x'", "'edge.weight'", "edge.control_weight = 3", "sigma_max = 'x'",
    ):  # fmt: skip
        assert message.count(told) == 1, told


def test_other_faulty_jobs_are_counted_and_names_are_unique(folder: Path) -> None:
    lines = [tree(name="a"), tree(name="b", seed=-2), tree(name="c", edge={"x": 1})]
    with pytest.raises(InputError, match=r"a\.jsonl line 2: seed = -2 .*; 1 more of the 3 jobs have faults$"):
        read_specs([write(folder / "a.jsonl", *lines)])
    one, two = write(folder / "one.json", tree()), write(folder / "two.json", tree())
    with pytest.raises(InputError, match=r"'arm' is used twice, in \S*one\.json and in \S*two\.json; allowed"):
        read_specs([one, two])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", '{"edge": {"control_weight": 1, "control_weight": 0}}', r"the key 'control_weight' is there twice"),
        ("a.yaml", "edge:\n  control_weight: 1\n  control_weight: 0\n", r"the key 'control_weight' is there twice"),
        ("a.json", '{"name": "arm" "edge": {}}', r"a\.json is not JSON: line 1, column 16"),
        ("a.json", "[]", r"a\.json holds no jobs"),
        ("a.json", "3", r"a\.json: 3 is no job"),
        ("a.yaml", "edge: {1: 2}\nname: a\nprompt: b\nvideo_path: arm.mp4\n", r"unknown key 'edge\.1' = 2"),
        ("a.toml", "", r"allowed suffixes are \.json \.jsonl \.yaml \.yml"),
    ],
)
def test_files_that_hold_no_specs(folder: Path, name: str, text: str, told: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told) as caught:
        read_specs([folder / name])
    assert "\n" not in str(caught.value)


def test_reading_specs_waits_for_neither_torch_nor_yaml() -> None:
    code = "import sys, orrery.specs; print([name for name in ('torch', 'yaml', 'av') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
