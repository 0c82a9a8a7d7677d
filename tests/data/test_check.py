"""`check_dataset`: sound datasets have no findings, each fault has its own, and garbage ends no check."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orrery.data.bridge import Trajectory, write_bridge
from orrery.data.check import check_dataset, survey_dataset
from orrery.data.findings import Finding
from orrery.data.lerobot_write import CAMERA, Episode, write_lerobot
from orrery.errors import InputError
from orrery.video import Video

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

FPS, LENGTH, SIZE = 10, 9, (32, 48)


def frames(seed: int, length: int = LENGTH) -> np.ndarray:
    """A video of its own a seed."""
    return np.random.default_rng(seed).integers(0, 255, (length, *SIZE, 3)).astype(np.uint8)


def make_clips(root: Path) -> Path:
    """Two clips as `orrery sim` writes them."""
    for seed in range(2):
        name = f"push-{seed:07d}"
        (root / name).mkdir(parents=True)
        Video(frames(seed), FPS).save(root / name / "rgb.mp4")
        np.save(root / name / "actions.npy", np.random.default_rng(seed).normal(size=(LENGTH, 2)).astype(np.float32))
        np.savez_compressed(root / name / "depth.npz", front=np.zeros((LENGTH, *SIZE), np.float16))
        line = dict(id=name, scene="push", seed=seed, caption="an arm", frames=LENGTH, fps=FPS, action_names=["x", "y"])
        (root / name / "meta.json").write_text(json.dumps(line))
        with open(root / "index.jsonl", "a") as index:
            index.write(json.dumps(line) + "\n")
    return root


def make_lerobot(root: Path) -> Path:
    """Three episodes of LeRobot v3.0 in one file."""
    rows = np.random.default_rng(0).normal(size=(3, LENGTH, 2)).astype(np.float32)
    state = np.random.default_rng(1).normal(size=(3, LENGTH, 2)).astype(np.float32)
    made = [Episode(frames(number), rows[number], f"task {number}", state[number]) for number in range(3)]
    write_lerobot(root, made, FPS, ["x", "y"], state_names=["a", "b"])
    return root


def make_bridge(root: Path) -> Path:
    """Two episodes."""
    rng = np.random.default_rng(0)
    made = [Trajectory(frames(n), rng.normal(size=(LENGTH, 6)), rng.random(LENGTH), f"task {n}") for n in range(2)]
    write_bridge(root, made, FPS)
    return root


def make_captioned(root: Path) -> Path:
    """Two videos, one caption of each kind, and depth beside them."""
    for place in ("videos", "metas", "captions", "depth"):
        (root / place).mkdir(parents=True)
    for name in ("a", "b"):
        Video(frames(0), FPS).save(root / f"videos/{name}.mp4")
        Video(frames(1), FPS).save(root / f"depth/{name}.mp4")
    (root / "metas/a.txt").write_text("a thing moves")
    (root / "captions/b.json").write_text('{"vlm": {"long": "", "short": "a thing moves"}}')
    return root


MAKERS = {"clips": make_clips, "lerobot": make_lerobot, "bridge": make_bridge, "captioned": make_captioned}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("decode", [False, True])
def test_a_sound_dataset_has_no_findings(tmp_path: Path, kind: str, decode: bool) -> None:
    calls: list[tuple[int, int]] = []
    survey = survey_dataset(MAKERS[kind](tmp_path / "set"), LENGTH, decode, lambda *now: calls.append(now))
    assert survey.findings == []
    assert set(survey.lengths) == {LENGTH} and list(survey.fps) == [FPS] and list(survey.sizes) == ["32x48"]
    assert calls and calls[-1][0] == calls[-1][1] and [done for done, _ in calls] == sorted(done for done, _ in calls)
    told = json.loads(json.dumps(survey.as_json()))
    assert told["episodes"] == len(survey.lengths) == len(survey.shots) and told["errors"] == told["warnings"] == 0
    assert told["hours"] == pytest.approx(LENGTH * told["episodes"] / FPS / 3600)
    assert survey.shots[0].take(3).shape == (3, *SIZE, 3)


def test_a_survey_knows_the_actions(tmp_path: Path) -> None:
    make_clips(tmp_path / "set")
    every = np.concatenate([np.load(path) for path in (tmp_path / "set").glob("*/actions.npy")])
    for column, row in enumerate(survey_dataset(tmp_path / "set").as_json()["actions"]):
        assert row["name"] == "xy"[column] and row["mean"] == pytest.approx(every[:, column].mean())
        assert row["min"] == every[:, column].min() and row["max"] == every[:, column].max()


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_table(path: Path, **changes: object) -> None:
    """Columns of a parquet file replaced; None takes one away."""
    table = pq.read_table(path)
    for name, values in changes.items():
        place = table.schema.get_field_index(name)
        table = table.remove_column(place)
        if values is not None:
            table = table.add_column(place, name, pa.array(values))
    pq.write_table(table, path)


def cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])


def caption_of_clips(root: Path) -> None:
    text = (root / "index.jsonl").read_text()
    (root / "index.jsonl").write_text(text.replace("an arm", " ", 1))


CLIP, OTHER = "push-0000000", "push-0000001"
CLIPS: list[tuple[str, Callable[[Path], object], str, str]] = [
    (f"{CLIP}/rgb.mp4", lambda r: (r / CLIP / "rgb.mp4").unlink(), "error", "no such file"),
    (f"{CLIP}/rgb.mp4", lambda r: (r / CLIP / "rgb.mp4").write_text("junk"), "error", "not a video"),
    (f"{CLIP}/rgb.mp4", lambda r: (r / CLIP / "rgb.mp4").write_bytes(b""), "error", "not a video"),
    (f"{CLIP}/rgb.mp4", lambda r: cut(r / CLIP / "rgb.mp4"), "error", "breaks off|decoded"),
    (f"{CLIP}/rgb.mp4", lambda r: Video(frames(0, 7), FPS).save(r / CLIP / "rgb.mp4"), "error", "7 frames, .* says 9"),
    (f"{CLIP}/rgb.mp4", lambda r: Video(frames(0), 5).save(r / CLIP / "rgb.mp4"), "error", "5 frames a second"),
    (".", lambda r: Video(frames(0), 5).save(r / CLIP / "rgb.mp4"), "error", "frames a second differ: "),
    (".", lambda r: Video(frames(0)[:, :16], FPS).save(r / CLIP / "rgb.mp4"), "warning", "sizes differ: .*16x48"),
    (f"{CLIP}/actions.npy", lambda r: np.save(r / CLIP / "actions", np.ones((4, 2))), "error", "4 rows of actions"),
    (f"{CLIP}/actions.npy", lambda r: np.save(r / CLIP / "actions", np.ones((9, 3))), "error", r"are \[9, 3\]"),
    (f"{CLIP}/actions.npy", lambda r: (r / CLIP / "actions.npy").unlink(), "error", "No such file"),
    (f"{CLIP}/actions.npy", lambda r: np.save(r / CLIP / "actions", np.array([{}] * 9)), "error", "allow_pickle"),
    (f"{CLIP}/meta.json", lambda r: (r / CLIP / "meta.json").write_text("[]"), "error", r"holds \[\]"),
    (
        f"{CLIP}/meta.json",
        lambda r: edit_json(r / CLIP / "meta.json", action_names=[]),
        "error",
        "its actions are none",
    ),
    (f"{OTHER}/meta.json", lambda r: edit_json(r / OTHER / "meta.json", action_names=["x", "z"]), "error", "are x, z"),
    (f"{CLIP}/meta.json", lambda r: (r / CLIP / "meta.json").write_text("{"), "error", "cannot be read"),
    (f"{CLIP}/depth.npz", lambda r: (r / CLIP / "depth.npz").write_text("junk"), "error", "cannot be read"),
    ("index.jsonl", caption_of_clips, "warning", "push-0000000 has no text"),
    ("index.jsonl", lambda r: (r / "index.jsonl").write_text((r / "index.jsonl").read_text() * 2), "error", "2 times"),
    (
        "index.jsonl",
        lambda r: (r / "index.jsonl").write_text((r / "index.jsonl").read_text() + '{"id"'),
        "warning",
        "JSON",
    ),
    ("index.jsonl", lambda r: (r / "index.jsonl").write_text("{}\n3\n"), "error", "line 1: a line lacks 'id'"),
    ("index.jsonl", lambda r: (r / "index.jsonl").write_bytes(b"\xff\xfe"), "error", "not text"),
    (OTHER, lambda r: (r / OTHER).rename(r / "elsewhere"), "error", "is listed in index.jsonl and not there"),
    ("index.jsonl", lambda r: (r / OTHER).rename(r / "elsewhere"), "warning", "lists none of 1 folders, such as else"),
]
TABLE, VIDEO = "data/chunk-000/file-000.parquet", f"videos/{CAMERA}/chunk-000/file-000.mp4"
META = "meta/episodes/chunk-000/file-000.parquet"
FLAT = np.random.default_rng(0).normal(size=(27, 2)).astype(np.float32)


def rows(column: int, value: float, row: int | None = None) -> list[list[float]]:
    values = FLAT.copy()
    values[slice(None) if row is None else row, column] = value
    return values.tolist()


LEROBOT: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("meta/info.json", lambda r: (r / "meta/info.json").unlink(), "error", "could not be read"),
    ("meta/info.json", lambda r: (r / "meta/info.json").write_text("{"), "error", "not JSON"),
    ("meta/info.json", lambda r: edit_json(r / "meta/info.json", codebase_version="v9"), "error", "'v9'"),
    ("meta/info.json", lambda r: edit_json(r / "meta/info.json", total_frames=28), "error", "total_frames is 28.* 27"),
    ("meta/stats.json", lambda r: (r / "meta/stats.json").write_text("[1]"), "error", "no statistics"),
    ("meta/stats.json", lambda r: (r / "meta/stats.json").write_text("{}"), "warning", "no statistics of action"),
    ("meta/stats.json", lambda r: edit_table(r / TABLE, action=rows(0, 9, 3)), "error", "max of action x is .* have 9"),
    ("meta/stats.json", lambda r: edit_table(r / TABLE, action=rows(0, 1.5, 3)), "warning", "mean of action x"),
    ("meta/tasks.parquet", lambda r: (r / "meta/tasks.parquet").unlink(), "error", "cannot read"),
    ("meta/episodes", lambda r: (r / META).write_text("junk"), "error", "cannot read"),
    ("meta/episodes", lambda r: edit_table(r / META, length=None), "error", "'length' is missing"),
    ("meta/episodes", lambda r: edit_table(r / META, episode_index=[0, 0, 2]), "error", "episode_index 0 is there 2 t"),
    ("meta/episodes", lambda r: edit_table(r / META, episode_index=[0, 1, 3]), "error", "no episode_index 2"),
    (TABLE, lambda r: edit_table(r / META, length=[9, 9, 10]), "error", "episode 2 has 9 rows, its metadata say 10"),
    (VIDEO, lambda r: edit_table(r / META, length=[9, 9, 10]), "error", "episode 2 has 9 frames from 1.8.* 10 rows"),
    (VIDEO, lambda r: Video(frames(0, 20), FPS).save(r / VIDEO), "error", "episode 2 has 2 frames from 1.800 to 2.7"),
    (VIDEO, lambda r: Video(frames(0, 27), 10.05).save(r / VIDEO), "warning", "is 0.0.* s away from its time"),
    (VIDEO, lambda r: Video(frames(0, 27)[:, :16], FPS).save(r / VIDEO), "error", r"16x48, .*\[32, 48, 3\]"),
    (VIDEO, lambda r: (r / VIDEO).unlink(), "error", "no such file"),
    (TABLE, lambda r: (r / TABLE).write_text("junk"), "error", "cannot read"),
    (TABLE, lambda r: edit_table(r / TABLE, action=None), "error", "lacks the columns action"),
    (
        TABLE,
        lambda r: edit_table(r / TABLE, action=rows(1, np.nan, 11)),
        "error",
        "action y of episode 1 is nan in row 2",
    ),
    (
        TABLE,
        lambda r: edit_table(r / TABLE, action=rows(1, np.inf, 26)),
        "error",
        "action y of episode 2 is inf in row 8",
    ),
    (TABLE, lambda r: edit_table(r / TABLE, action=["up"] * 27), "error", "more than lists of numbers"),
    (TABLE, lambda r: edit_table(r / TABLE, action=[[1.0]] + rows(0, 1)[1:]), "error", "more than lists of numbers"),
    (".", lambda r: edit_table(r / TABLE, action=rows(0, 0.5)), "warning", "action x is 0.5 in every row"),
    (TABLE, lambda r: edit_table(r / TABLE, timestamp=np.zeros(27)), "error", "does not grow after row 0"),
    (TABLE, lambda r: edit_table(r / TABLE, timestamp=np.tile(np.arange(9) / 9, 3)), "warning", "is 0.888889 in row 8"),
    (
        TABLE,
        lambda r: edit_table(r / TABLE, frame_index=np.arange(27)),
        "error",
        "frame_index of episode 1 is 9 in row 0",
    ),
    (TABLE, lambda r: edit_table(r / TABLE, task_index=np.full(27, 7)), "error", "task_index 7, which has no text"),
    (TABLE, lambda r: edit_table(r / META, tasks=[["a"], [""], ["c"]]), "warning", "episode 1 has no text"),
    (".", lambda r: (r / "videos/stray.mp4").write_text(""), "warning", "videos/stray.mp4 belong to no episode"),
]
ZERO, RGB = "annotation/train/0.json", "videos/train/0/rgb.mp4"
BRIDGE: list[tuple[str, Callable[[Path], object], str, str]] = [
    (ZERO, lambda r: (r / ZERO).write_text("{"), "error", "not JSON"),
    (ZERO, lambda r: (r / ZERO).write_text("{}"), "error", "lacks state, continuous_gripper_state, videos"),
    (ZERO, lambda r: edit_json(r / ZERO, continuous_gripper_state=[1.0]), "error", r"continuous_gripper_state \[1\]"),
    (ZERO, lambda r: edit_json(r / ZERO, continuous_gripper_state=[np.nan] * 9), "error", "NaN"),
    (ZERO, lambda r: edit_json(r / ZERO, videos=7), "error", "at least one video_path"),
    ("b.mp4", lambda r: edit_json(r / ZERO, videos=["a.mp4", "b.mp4"]), "error", "no such file"),
    ("annotation/train/1.json", lambda r: edit_json(r / ZERO, episode_id="1"), "error", "is that of 0.json too"),
    (RGB, lambda r: (r / RGB).unlink(), "error", "no such file"),
    (RGB, lambda r: Video(frames(0, 8), FPS).save(r / RGB), "error", "8 frames, 0.json has 9 states"),
    (RGB, lambda r: Video(frames(0, 10), FPS).save(r / RGB), "warning", "10 frames, 0.json has 9 states"),
    (RGB, lambda r: (r / ZERO).unlink(), "warning", "belongs to no annotation"),
    ("annotation", lambda r: (r / "annotation/dev").mkdir(), "warning", "holds dev"),
    (".", lambda r: [(r / f"annotation/train/{n}.json").unlink() for n in (0, 1)], "error", "no episode"),
]
CAPTIONED: list[tuple[str, Callable[[Path], object], str, str]] = [
    ("videos/a.mp4", lambda r: (r / "metas/a.txt").unlink(), "error", "has no caption"),
    ("metas/a.txt", lambda r: (r / "metas/a.txt").write_text(" \n"), "error", "holds no text"),
    ("metas/a.txt", lambda r: (r / "metas/a.txt").write_bytes(b"\xff"), "error", "not text"),
    ("captions/b.json", lambda r: (r / "captions/b.json").write_text("{"), "error", "cannot be read"),
    (
        "captions/b.json",
        lambda r: (r / "captions/b.json").write_text('{"vlm": {"long": ""}}'),
        "error",
        "holds no text",
    ),
    ("captions/b.json", lambda r: (r / "captions/b.json").write_text("[1]"), "error", "is no caption"),
    ("captions/c.json", lambda r: (r / "captions/c.json").write_text("{}"), "warning", "no video of that name"),
    ("depth/a.mp4", lambda r: (r / "depth/a.mp4").unlink(), "error", "no such file"),
    ("depth/a.mp4", lambda r: Video(frames(1, 5), FPS).save(r / "depth/a.mp4"), "error", "5 frames, a.mp4 has 9"),
    ("videos/b.mp4", lambda r: Video(frames(1, 3), FPS).save(r / "videos/b.mp4"), "warning", "b has 3 frames"),
    ("videos", lambda r: [path.unlink() for path in (r / "videos").iterdir()], "error", "holds no .mp4"),
]
CASES = [("clips", *case) for case in CLIPS] + [("lerobot", *case) for case in LEROBOT]
CASES += [("bridge", *case) for case in BRIDGE] + [("captioned", *case) for case in CAPTIONED]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of each kind, to be copied."""
    return {kind: make(tmp_path_factory.mktemp("sound") / kind) for kind, make in MAKERS.items()}


@pytest.mark.parametrize(("kind", "path", "spoil", "severity", "message"), CASES)
def test_each_fault_is_found_where_it_is(
    tmp_path: Path,
    sound: dict[str, Path],
    kind: str,
    path: str,
    spoil: Callable[[Path], object],
    severity: str,
    message: str,
) -> None:
    import re
    import shutil

    root = Path(shutil.copytree(sound[kind], tmp_path / "set"))
    spoil(root)
    found = check_dataset(root)
    fits = [one for one in found if one.path == path and one.severity == severity and re.search(message, one.message)]
    assert fits, "\n".join(map(str, found))
    assert all(isinstance(one, Finding) and "\n" not in str(one) for one in found)


@pytest.mark.parametrize("kind", MAKERS)
def test_no_garbage_ends_a_check(tmp_path: Path, sound: dict[str, Path], kind: str) -> None:
    """Each file in turn is emptied, cut, and filled with noise."""
    import shutil

    junk = np.random.default_rng(0).bytes(3000)
    files = sorted(path.relative_to(sound[kind]) for path in sound[kind].rglob("*") if path.is_file())
    for name in files:
        if name.name == "orrery.json":
            continue  # our own mark, which nobody reads
        whole = (sound[kind] / name).read_bytes()
        for content in (b"", junk) if name.suffix == ".txt" else (b"", whole[: len(whole) // 2], junk):
            root = Path(shutil.copytree(sound[kind], tmp_path / "set"))
            (root / name).write_bytes(content)
            assert check_dataset(root), (name, content[:20])
            shutil.rmtree(root)


def test_frames_that_cannot_be_decoded_are_found_by_decoding(tmp_path: Path) -> None:
    """Zeros in the middle of a file: its head, its first and its last frame are sound."""
    root = make_lerobot(tmp_path / "set")
    data = bytearray((root / VIDEO).read_bytes())
    start = data.index(b"mdat")
    middle = start + (len(data) - start) // 2
    data[middle : middle + (len(data) - start) // 4] = bytes((len(data) - start) // 4)
    (root / VIDEO).write_bytes(data)
    assert check_dataset(root) == []
    found = check_dataset(root, decode=True)
    assert [one.path for one in found] == [VIDEO] and found[0].severity == "error" and "decoded" in found[0].message


def test_episodes_shorter_than_the_window(tmp_path: Path) -> None:
    root = make_lerobot(tmp_path / "set")
    assert check_dataset(root, window=9) == []
    found = check_dataset(root, window=13)
    assert len(found) == 3 and all("has 9 frames" in one.message and "13" in one.allowed for one in found)
    with pytest.raises(InputError, match=r"a window of 12 frames; allowed: 4k \+ 1"):
        check_dataset(root, window=12)


def test_what_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        check_dataset(tmp_path / "gone")
    with pytest.raises(InputError, match="is no dataset that is known; allowed are"):
        check_dataset(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="it is a file"):
        check_dataset(tmp_path / "file")
