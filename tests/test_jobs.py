"""Jobs: both layouts of the official inference files read unchanged, overrides, and every kind of wrong file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from orrery.errors import InputError
from orrery.jobs import Job, read_jobs

PROMPT = "A robot arm lifts a cup of tea and puts it on a shelf."
START = {"image2world": "cup.jpg", "video2world": "cup.mp4"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like assets/base: starts and prompts lie beside the files. Job files never look into a start."""
    for name in ("cup.jpg", "cup.png", "cup.webp", "cup.jpeg", "cup.mp4", "cup.avi", "cup2.PNG", "cup2.MP4"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "cup.txt").write_text(f"  {PROMPT}\n\n", encoding="utf-8")
    return tmp_path


def write(path: Path, *trees: Any) -> Path:
    """The trees as a file: one a line in .jsonl, the one there is in .json."""
    path.write_text("\n".join(json.dumps(tree) for tree in trees), encoding="utf-8")
    return path


def tree(kind: str = "text2world", **keys: Any) -> dict[str, Any]:
    start = {"input_path": START[kind]} if kind in START else {}
    return {"inference_type": kind, "name": "cup", "prompt": PROMPT} | start | keys


def read_one(folder: Path, keys: dict[str, Any], **overrides: Any) -> Job:
    (job,) = read_jobs([write(folder / "job.json", keys)], overrides)
    return job


def refusal(folder: Path, keys: Any, **overrides: Any) -> str:
    """What is said about a file with this tree."""
    with pytest.raises(InputError) as caught:
        read_jobs([write(folder / "job.json", keys)], overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_official_file_in_full(folder: Path) -> None:
    keys = {
        "inference_type": "image2world",
        "name": "cup_on_shelf",
        "prompt_path": "cup.txt",
        "input_path": "cup.jpg",
        "negative_prompt": "blurred",
        "seed": 3,
        "guidance": 7,
        "resolution": "432,768",
        "num_output_frames": 93,
        "num_steps": 20,
        "enable_autoregressive": False,
        "chunk_size": 77,
        "chunk_overlap": 1,
    }
    assert read_one(folder, keys) == Job(
        name="cup_on_shelf",
        prompt=PROMPT,
        negative_prompt="blurred",
        seed=3,
        guidance=7.0,
        steps=20,
        size=(432, 768),
        frames=93,
        start=folder / "cup.jpg",
        start_kind="image",
        chunk_frames=None,
        chunk_overlap=None,
        source=str(folder / "job.json"),
    )


def test_what_a_file_leaves_out_is_left_to_the_model(folder: Path) -> None:
    job = read_one(folder, {"inference_type": "text2world", "name": "cup", "prompt": PROMPT})
    assert job == Job("cup", PROMPT, None, 0, None, None, None, None, None, "none", None, None, job.source)


def test_null_says_the_same_as_no_key(folder: Path) -> None:
    nothing = dict.fromkeys(("prompt_path", "input_path", "negative_prompt", "guidance", "num_steps"))
    assert read_one(folder, tree() | nothing) == read_one(folder, tree())


@pytest.mark.parametrize(
    ("kind", "start", "start_kind"),
    [
        ("text2world", None, "none"),
        ("text2image", None, "none"),
        ("image2world", "cup.png", "image"),
        ("image2world", "cup.jpeg", "image"),
        ("image2world", "cup.webp", "image"),
        ("image2world", "cup.mp4", "image"),  # its last frame
        ("image2world", "cup2.PNG", "image"),
        ("video2world", "cup.mp4", "video"),
        ("video2world", "cup2.MP4", "video"),
    ],
)
def test_what_each_type_begins_with(folder: Path, kind: str, start: str | None, start_kind: str) -> None:
    job = read_one(folder, tree(kind) | ({"input_path": start} if start else {}))
    assert (job.start, job.start_kind) == (start and folder / start, start_kind)


@pytest.mark.parametrize("kind", ["text2world", "text2image"])
def test_types_without_a_start_ignore_input_path(folder: Path, kind: str) -> None:
    job = read_one(folder, tree(kind, input_path="nowhere.gif"))
    assert (job.start, job.start_kind) == (None, "none")


def test_an_image_is_one_frame(folder: Path) -> None:
    assert [read_one(folder, tree("text2image", num_output_frames=frames)).frames for frames in (None, 1)] == [1, 1]


@pytest.mark.parametrize("frames", [1, 10, 77, 93, 200])
def test_a_stated_length_stands_as_it_is(folder: Path, frames: int) -> None:
    assert read_one(folder, tree(num_output_frames=frames)).frames == frames


def test_autoregressive_runs(folder: Path) -> None:
    def length(**keys: Any) -> tuple[Any, ...]:
        job = read_one(folder, tree("image2world", enable_autoregressive=True, **keys))
        return job.frames, job.chunk_frames, job.chunk_overlap

    assert length() == (77, 77, 1)
    assert length(num_output_frames=200, chunk_size=49, chunk_overlap=5) == (200, 49, 5)
    assert length(chunk_size=1, chunk_overlap=0) == (77, 1, 0)


@pytest.mark.parametrize(
    ("text", "size"), [("none", None), ("704,1280", (704, 1280)), (" 64 , 48", (64, 48)), ("1,99999", (1, 99999))]
)
def test_resolution(folder: Path, text: str, size: tuple[int, int] | None) -> None:
    assert read_one(folder, tree(resolution=text)).size == size


def test_guidance_may_be_any_number_from_0(folder: Path) -> None:
    assert [read_one(folder, tree(guidance=number)).guidance for number in (0, 9.5)] == [0, 9.5]


def test_jsonl_has_one_job_a_line_and_blank_lines(folder: Path) -> None:
    file = folder / "cups.jsonl"
    lines = [json.dumps(tree(name="one")), "", json.dumps(tree("video2world", name="two")), " "]
    file.write_bytes("\r\n".join(lines).encode())
    first, second = read_jobs([file])
    assert (first.name, second.name) == ("one", "two")
    assert (first.source, second.source) == (f"{file} line 1", f"{file} line 3")
    assert second.start == folder / "cup.mp4"


def test_jsonl_lines_end_with_newlines_alone(folder: Path) -> None:
    (folder / "a.jsonl").write_text(json.dumps(tree(prompt="Tea.\u2028Hot."), ensure_ascii=False), encoding="utf-8")
    assert read_jobs([folder / "a.jsonl"])[0].prompt == "Tea.\u2028Hot."


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".YAML"])
def test_yaml(folder: Path, suffix: str) -> None:
    file = folder / f"cup{suffix}"
    file.write_text(
        "# the cup\ninference_type: video2world\nname: cup\nprompt_path: cup.txt\ninput_path: cup.mp4\n"
        "resolution: 432,768\nseed: 5\nguidance: 2.5\nenable_autoregressive: true\n"
    )
    (job,) = read_jobs([file])
    assert (job.prompt, job.size, job.seed, job.guidance) == (PROMPT, (432, 768), 5, 2.5)
    assert (job.start, job.start_kind, job.chunk_frames) == (folder / "cup.mp4", "video", 77)


def test_yaml_anchors_and_merges(folder: Path) -> None:
    file = folder / "cups.yaml"
    file.write_text(
        "- &base {inference_type: text2world, name: one, prompt: Tea., seed: 4}\n- {<<: *base, name: two, seed: 5}\n"
    )
    assert [(job.name, job.prompt, job.seed) for job in read_jobs([file])] == [("one", "Tea.", 4), ("two", "Tea.", 5)]


def test_a_list_of_jobs(folder: Path) -> None:
    file = write(folder / "cups.json", [tree(name="one"), tree("image2world", name="two")])
    jobs = read_jobs([file])
    assert [job.name for job in jobs] == ["one", "two"]
    assert [job.source for job in jobs] == [f"{file} item 1", f"{file} item 2"]


def test_a_byte_order_mark_is_no_fault(folder: Path) -> None:
    (folder / "job.json").write_text(json.dumps(tree(prompt_path="cup.txt", prompt=None)), encoding="utf-8-sig")
    (folder / "cup.txt").write_text(PROMPT, encoding="utf-8-sig")
    assert read_jobs([folder / "job.json"])[0].prompt == PROMPT


def older(**shared: Any) -> dict[str, Any]:
    samples = {
        "lift": {"prompt_path": "cup.txt", "input_path": "cup.jpg"},
        "pour": {"prompt": "Tea is poured.", "input_path": "cup.png"},
    }
    return {"inference_type": "image2world", "samples": samples} | shared


def test_the_older_layout_is_many_jobs(folder: Path) -> None:
    lift, pour = read_jobs([write(folder / "old.json", older())])
    where = f"{folder / 'old.json'} sample"
    common = (None, 1, None, None, None, None)  # the seed was 1 in that version
    assert lift == Job("lift", PROMPT, *common, folder / "cup.jpg", "image", None, None, f"{where} 'lift'")
    assert pour == Job("pour", "Tea is poured.", *common, folder / "cup.png", "image", None, None, f"{where} 'pour'")


def test_the_older_layout_shares_its_settings(folder: Path) -> None:
    shared = dict(negative_prompt="blurred", seed=8, guidance=3, resolution="64,96", num_output_frames=33)
    for job in read_jobs([write(folder / "old.json", older(**shared))]):
        assert (job.negative_prompt, job.seed, job.guidance) == ("blurred", 8, 3)
        assert (job.size, job.frames) == ((64, 96), 33)


def test_in_the_older_layout_the_file_wins_over_the_prompt(folder: Path) -> None:
    samples = {"cup": {"prompt": "Something else.", "prompt_path": "cup.txt"}}
    assert read_one(folder, {"inference_type": "text2world", "samples": samples}).prompt == PROMPT


def test_faults_of_the_older_layout(folder: Path) -> None:
    assert "job.json: samples = {}; allowed: an object of NAME" in refusal(folder, older(samples={}))
    assert "job.json: samples = ['a']; allowed: an object of NAME" in refusal(folder, older(samples=["a"]))
    assert "job.json sample 'a': 'Tea.'; allowed: an object with prompt," in refusal(
        folder, older(samples={"a": "Tea."})
    )
    message = refusal(folder, older(samples={"a": {"promt": "Tea."}}))
    assert "job.json sample 'a': unknown key 'promt' = 'Tea.' (did you mean prompt?)" in message
    assert "unknown key 'num_steps' = 9 (allowed: inference_type, samples," in refusal(folder, older(num_steps=9))
    assert "unknown key 'name' = 'x'" in refusal(folder, older(name="x"))
    assert "job.json sample 'lift': guidance = -1 (allowed" in refusal(folder, older(guidance=-1))


def test_paths_are_relative_to_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "sub").mkdir()
    for name, start in (("a", "../cup.jpg"), ("b", str(folder / "cup.png")), ("c", "~/cup.mp4")):
        write(folder / "sub" / f"{name}.json", tree("image2world", name=name, input_path=start))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    a, b, c = read_jobs([Path("sub/a.json"), "sub/b.json", "sub/c.json"])
    assert a.start == Path("sub/../cup.jpg")
    assert b.start == folder / "cup.png" and c.start == folder / "cup.mp4"


def test_overrides_win(folder: Path) -> None:
    keys = tree(seed=3, guidance=7, num_steps=35, resolution="64,64", negative_prompt="blurred")
    overrides = dict(seed=4, guidance=2.5, num_steps=9, resolution="none", negative_prompt="", num_output_frames=29)
    job = read_one(folder, keys, **overrides, enable_autoregressive=True, chunk_size=21, chunk_overlap=5)
    assert (job.seed, job.guidance, job.steps, job.size, job.negative_prompt) == (4, 2.5, 9, None, "")
    assert (job.frames, job.chunk_frames, job.chunk_overlap) == (29, 21, 5)


def test_an_override_that_is_none_is_not_given(folder: Path) -> None:
    assert read_one(folder, tree(seed=3), seed=None, name=None).seed == 3


def test_overrides_can_give_what_the_file_lacks(folder: Path) -> None:
    job = read_one(folder, {"name": "cup"}, inference_type="image2world", prompt=PROMPT, input_path=folder / "cup.jpg")
    assert (job.prompt, job.start, job.start_kind) == (PROMPT, folder / "cup.jpg", "image")


def test_one_type_for_all_files(folder: Path) -> None:
    job = read_one(folder, tree("video2world"), inference_type="text2world")
    assert (job.start, job.start_kind) == (None, "none")


def test_an_override_replaces_the_other_kind_of_prompt(folder: Path) -> None:
    with_path = tree(prompt_path="gone.txt")
    del with_path["prompt"]
    assert read_one(folder, with_path, prompt="Tea.").prompt == "Tea."
    assert read_one(folder, tree(prompt="Tea."), prompt_path=folder / "cup.txt").prompt == PROMPT


def test_paths_of_overrides_are_relative_to_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sub").mkdir()
    file = write(folder / "sub" / "a.json", tree("image2world"))
    monkeypatch.chdir(folder)
    (job,) = read_jobs([file], {"input_path": "cup.png", "prompt_path": "cup.txt"})
    assert (job.start, job.prompt) == (Path("cup.png"), PROMPT)


def test_overrides_apply_to_the_older_layout(folder: Path) -> None:
    jobs = read_jobs([write(folder / "old.json", older(seed=8))], {"seed": 2, "num_steps": 4})
    assert [(job.seed, job.steps) for job in jobs] == [(2, 4), (2, 4)]


def test_faulty_overrides(folder: Path) -> None:
    assert "unknown override 'name' = 'x' (allowed: inference_type" in refusal(folder, tree(), name="x")
    assert "unknown override 'sede' = 1 (did you mean seed?) (allowed: inf" in refusal(folder, tree(), sede=1)
    assert "override seed = -1 (allowed: a whole number from 0" in refusal(folder, tree(seed=3), seed=-1)
    assert "override input_path = 'gone.png' (allowed: an existing file" in refusal(
        folder, tree("image2world"), input_path=Path("gone.png")
    )
    assert "prompt and prompt_path" in refusal(folder, tree(), prompt="Tea.", prompt_path=folder / "cup.txt")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"name": ""}, "name = '' (allowed: text that can be a file name: no / or \\, no dot in front"),
        ({"name": "  "}, "name = '  ' (allowed: text that can be a file name"),
        ({"name": "a/b"}, "name = 'a/b' (allowed: text that can be a file name"),
        ({"name": "a\\b"}, "name = 'a\\\\b' (allowed: text that can be a file name"),
        ({"name": ".."}, "name = '..' (allowed: text that can be a file name"),
        ({"name": ".cup"}, "name = '.cup' (allowed: text that can be a file name"),
        ({"name": "a\nb"}, "name = 'a\\nb' (allowed: text that can be a file name"),
        ({"name": "\ud800"}, "name = '\\ud800' (allowed: text that can be a file name"),
        ({"name": 7}, "name = 7 (allowed: text that can be a file name"),
        ({"inference_type": "text2video"}, "inference_type = 'text2video' (allowed: text2world, image2world, video2"),
        ({"prompt": 5}, "prompt = 5 (allowed: text)"),
        ({"prompt": " \n"}, "prompt = ' \\n' (allowed: text that says something)"),
        ({"prompt": "\ud800"}, "prompt = '\\ud800' (allowed: text)"),
        ({"prompt": None}, "missing key prompt (allowed: text, or prompt_path with a text file)"),
        ({"prompt_path": "cup.txt"}, "prompt and prompt_path = 'cup.txt' both given; allowed: one of them"),
        ({"prompt_path": 5}, "prompt_path = 5 (allowed: the path of a text file)"),
        (tree("image2world", input_path=5), "input_path = 5 (allowed: the path of an image or a video)"),
        ({"negative_prompt": 5}, "negative_prompt = 5 (allowed: text)"),
        ({"seed": -1}, "seed = -1 (allowed: a whole number from 0 to 4294967295)"),
        ({"seed": 2**32}, "seed = 4294967296 (allowed: a whole number from 0 to 4294967295)"),
        ({"seed": 1.5}, "seed = 1.5 (allowed: a whole number from 0"),
        ({"seed": True}, "seed = True (allowed: a whole number from 0"),
        ({"seed": None}, "seed = None (allowed: a whole number from 0"),
        ({"guidance": -0.1}, "guidance = -0.1 (allowed: a number of at least 0)"),
        ({"guidance": float("nan")}, "guidance = nan (allowed: a number of at least 0)"),
        ({"guidance": float("inf")}, "guidance = inf (allowed: a number of at least 0)"),
        ({"guidance": True}, "guidance = True (allowed: a number of at least 0)"),
        ({"guidance": "strong"}, "guidance = 'strong' (allowed: a number of at least 0)"),
        ({"resolution": "720"}, 'resolution = \'720\' (allowed: "H,W" in pixels, or "none")'),
        ({"resolution": "0,64"}, "resolution = '0,64' (allowed: \"H,W\""),
        ({"resolution": "64,64,64"}, "resolution = '64,64,64' (allowed: \"H,W\""),
        ({"resolution": "64x64"}, "resolution = '64x64' (allowed: \"H,W\""),
        ({"resolution": [64, 64]}, 'resolution = [64, 64] (allowed: "H,W"'),
        ({"num_output_frames": 0}, "num_output_frames = 0 (allowed: a whole number of at least 1)"),
        ({"num_output_frames": True}, "num_output_frames = True (allowed: a whole number of at least 1)"),
        ({"num_steps": 0}, "num_steps = 0 (allowed: a whole number of at least 1)"),
        ({"enable_autoregressive": "often"}, "enable_autoregressive = 'often' (allowed: true or false)"),
        ({"chunk_size": 0}, "chunk_size = 0 (allowed: a whole number of at least 1)"),
        ({"chunk_overlap": -1}, "chunk_overlap = -1 (allowed: a whole number of at least 0, below chunk_size)"),
        ({"chunk_overlap": -1, "chunk_size": 1}, "chunk_overlap = -1 (allowed: a whole number of at least 0, below"),
        ({"chunk_overlap": 77}, "chunk_overlap = 77 (allowed: 0 to 76, below chunk_size = 77)"),
        ({"chunk_size": 5, "chunk_overlap": 5}, "chunk_overlap = 5 (allowed: 0 to 4, below chunk_size = 5)"),
        ({"promt": "Tea."}, "unknown key 'promt' = 'Tea.' (did you mean prompt?) (allowed: name, inference_type"),
        ({"SEED": 1}, "unknown key 'SEED' = 1 (did you mean seed?)"),
        ({"sample": {}}, "unknown key 'sample' = {} (did you mean samples?)"),
        ({"front_wide": {"video_path": "a.mp4"}}, "unknown key 'front_wide' = {'video_path': 'a.mp4'} (allowed: name,"),
    ],
)
def test_faults_name_the_file_the_key_the_value_and_what_is_allowed(
    folder: Path, keys: dict[str, Any], told: str
) -> None:
    message = refusal(folder, tree() | keys)
    assert message.startswith(f"{folder / 'job.json'}: {told}")
    assert "; " not in message.removeprefix(f"{folder / 'job.json'}: {told}")  # one fault, told once


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (tree("image2world", input_path=None), "missing key input_path, which image2world needs (allowed: a file of"),
        (tree("video2world", input_path=None), "missing key input_path, which video2world needs (allowed: a file of"),
        (tree("image2world", input_path="cup.avi"), "input_path = 'cup.avi' (allowed: for image2world a file of .png"),
        (tree("video2world", input_path="cup.avi"), "(allowed: for video2world a file of .mp4)"),
        (tree("video2world", input_path="cup.jpg"), "; to begin with an image, inference_type is image2world)"),
        (tree("image2world", input_path="gone.png"), "input_path = 'gone.png' (allowed: an existing file; "),
        (tree("image2world", input_path="p" * 300 + ".png"), "no such file"),
        (tree("text2image", num_output_frames=77), "num_output_frames = 77 (allowed: 1 for text2image)"),
        (tree("text2image", enable_autoregressive=True), "enable_autoregressive = True (allowed: false for text2image"),
        (tree(prompt=None, prompt_path="gone.txt"), "prompt_path = 'gone.txt' (allowed: an existing text file; "),
        (tree(prompt=None, prompt_path="."), "is a folder)"),
        (tree(prompt=None, prompt_path=PROMPT * 9), "no such file"),
        (tree(prompt=None, prompt_path="binary.txt"), "is not text; allowed: UTF-8"),
        (tree(prompt=None, prompt_path="empty.txt"), "(allowed: a text file that says something; it is empty)"),
        ({"name": "cup", "prompt": PROMPT}, "job.json: missing key inference_type (allowed: text2world, image2world"),
        ({"inference_type": "text2world", "prompt": PROMPT}, "job.json: missing key name (allowed: text that can be"),
    ],
)
def test_faults_of_keys_together_and_of_files(folder: Path, keys: dict[str, Any], told: str) -> None:
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (folder / "empty.txt").write_text(" \n")
    assert told in refusal(folder, keys)


def test_a_missing_start_says_where_it_was_looked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "sub").mkdir()
    with pytest.raises(InputError, match=r"input_path = 'gone.mp4' .*; 'sub/gone.mp4' is no such file\)$"):
        read_jobs([write(Path("sub/a.json"), tree("video2world", input_path="gone.mp4"))])


def test_a_name_leaves_room_for_suffixes(folder: Path) -> None:
    assert read_one(folder, tree(name="\u6c34" * 66)).name == "\u6c34" * 66  # 3 bytes each
    assert "at most 200 bytes)" in refusal(folder, tree(name="\u6c34" * 67))


def test_all_faults_of_a_job_are_one_line(folder: Path) -> None:
    keys = {"seeed": 1, "seed": -1, "guidance": "x", "chunk_overlap": 99, "inference_type": "video2world"}
    message = refusal(folder, keys)
    assert message.count("job.json") == 1
    for told in (
        "unknown key 'seeed'", "missing key name", "missing key prompt", "missing key input_path", "seed = -1",
        "guidance = 'x'", "chunk_overlap = 99",
    ):  # fmt: skip
        assert message.count(told) == 1, told


def test_the_line_is_named_and_other_faulty_jobs_are_counted(folder: Path) -> None:
    lines = [tree(name="a"), tree(name="b", seed=-2), tree(name="c", seed=-3), tree(name="d", seed=-4)]
    with pytest.raises(InputError, match=r"a\.jsonl line 2: seed = -2 .*; 2 more of the 4 jobs have faults$"):
        read_jobs([write(folder / "a.jsonl", *lines)])
    with pytest.raises(InputError, match=r"b\.json item 2: seed = -2 \(allowed: [^;]*\)$"):
        read_jobs([write(folder / "b.json", lines[:2])])


def test_values_are_shortened(folder: Path) -> None:
    message = refusal(folder, tree(name="/" + "very" * 1000, seed=list(range(9999))))
    assert "name = '/very" in message and "seed = [0, 1" in message
    assert len(message) < 600
    assert f"input_path = '{'p' * 60}' (" in refusal(folder, tree("image2world", input_path="p" * 60))


def test_names_are_unique_over_all_files(folder: Path) -> None:
    one = write(folder / "one.json", tree(name="cup"))
    two = write(folder / "two.jsonl", tree(name="tea"), tree(name="cup"))
    with pytest.raises(InputError, match=r"'cup' is used twice, in \S*one\.json and in \S*two\.jsonl line 2; allowed"):
        read_jobs([one, two])
    with pytest.raises(InputError, match=r"'cup' is used twice, in \S*one\.json and in \S*one\.json; allowed"):
        read_jobs([one, one])
    assert [job.name for job in read_jobs([one])] == ["cup"]


def test_missing_files_are_all_named(folder: Path) -> None:
    good = write(folder / "good.json", tree())
    (folder / "dir.json").mkdir()
    with pytest.raises(InputError) as caught:
        read_jobs([folder / "x.json", good, folder / "dir.json", folder / "y.yaml"])
    assert str(caught.value) == (
        f"cannot read jobs from {folder}/x.json (no such file), {folder}/dir.json (a folder), "
        f"{folder}/y.yaml (no such file)"
    )


def test_no_files_and_other_files() -> None:
    with pytest.raises(InputError, match="no job files given; allowed are .json .jsonl .yaml .yml"):
        read_jobs([])
    with pytest.raises(InputError, match=r"cannot read jobs from a\.toml: allowed suffixes are \.json \.jsonl"):
        read_jobs(["a.toml"])


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", '{\n  "name": "cup",\n  "seed" 3\n}', r"a\.json is not JSON: line 3, column 10: Expecting ':'"),
        ("a.json", "{} {}", r"a\.json is not JSON: line 1, column 4: Extra data"),
        ("a.jsonl", '\n\n{"name": "cup" "seed": 3}', r"a\.jsonl is not JSON: line 3, column 16: Expecting ','"),
        ("a.json", '{"seed": 1, "seed": 2}', r"from \S*a\.json: the key 'seed' is there twice in one object"),
        ("a.jsonl", '\n{"seed": 1, "seed": 2}', r"from \S*a\.jsonl line 2: the key 'seed' is there twice"),
        ("a.json", '{"samples": {"a": {}, "a": {}}}', r"from \S*a\.json: the key 'a' is there twice"),
        ("a.json", '{"seed": ' + "1" * 5000 + "}", r"cannot read jobs from \S*a\.json: Exceeds the limit"),
        ("a.json", "[" * 200_000, r"cannot read jobs from \S*a\.json: maximum recursion"),
        ("a.yaml", "name: cup\nseed: [1\n", r"a\.yaml is not YAML: line 3, column 1: "),
        ("a.yaml", "name: cup\nseed: 1\nseed: 2\n", r"from \S*a\.yaml: the key 'seed' is there twice"),
        ("a.yaml", "name: !!python/name:os.system\n", r"a\.yaml is not YAML: line 1, column 7: could not determine"),
        ("a.yaml", "name: 2025-99-99\n", r"cannot read jobs from \S*a\.yaml: month must be"),
        ("a.yaml", "name: \x07\n", r"cannot read jobs from \S*a\.yaml: unacceptable character"),
        ("a.json", "", r"a\.json holds no jobs; allowed: at least one object"),
        ("a.json", " \n", r"a\.json holds no jobs"),
        ("a.json", "[]", r"a\.json holds no jobs"),
        ("a.jsonl", "\n \n", r"a\.jsonl holds no jobs"),
        ("a.yaml", "", r"a\.yaml holds no jobs"),
        ("a.json", "3", r"a\.json: 3 is no job; allowed: an object with the keys of a job"),
        ("a.json", "[3]", r"a\.json item 1: 3 is no job"),
        ("a.jsonl", "[{}]", r"a\.jsonl line 1: \[\{\}\] is no job"),
        ("a.yaml", "# nothing\n", r"a\.yaml: None is no job"),
        ("a.yaml", "1: x\nname: a\n", r"a\.yaml: unknown key 1 = 'x' \(allowed"),
    ],
)
def test_files_that_hold_no_jobs(folder: Path, name: str, text: str, told: str) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=told) as caught:
        read_jobs([folder / name])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text(folder: Path) -> None:
    (folder / "a.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"a\.json is not text; allowed: UTF-8"):
        read_jobs([folder / "a.json"])


def test_reading_jobs_waits_for_neither_torch_nor_yaml() -> None:
    code = "import sys, orrery.jobs; print([name for name in ('torch', 'yaml', 'av') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
