"""Whether a dataset can be trained on, and if not, what is wrong with it, file by file.

Formats: clips of `orrery sim` (index.jsonl); LeRobot v3.0 and v2.1 (meta/info.json); Bridge folders of the official
action-conditioned code (annotation/); videos with captions as the official post-training reads them (videos/*.mp4 with
metas/*.txt or captions/*.json, and depth/ and seg/ for Transfer). A broken file is a finding and never ends the check.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from orrery.data import findings
from orrery.data.bridge import ACTION_NAMES, SPLITS, Annotation, annotation_files, read_annotation, relative_actions
from orrery.data.check_lerobot import check_lerobot
from orrery.data.clips import ClipEntry, entry_from_json
from orrery.data.findings import Finding, Survey
from orrery.errors import InputError
from orrery.jsonfiles import read_text, short

Progress = Callable[[int, int], None]
CONTROLS = ("depth", "seg")  # of Transfer, a video beside each


def check_dataset(root: Path, **options: Any) -> list[Finding]:
    """Everything that is wrong with a dataset; `options` as of `survey_dataset`."""
    return survey_dataset(root, **options).findings


def survey_dataset(
    root: Path, window: int | None = None, decode: bool = False, progress: Progress | None = None
) -> Survey:
    """What is in a dataset, and what is wrong with it.

    Args:
        window: frames that training takes of an episode, 4k + 1; shorter episodes are told.
        decode: decode every frame, not the first and the last of each file alone.
        progress: called with how many files of how many are done.

    Raises:
        InputError: no folder, none of the formats, another window.
    """
    root = Path(root)
    if window is not None and (window < 1 or window % 4 != 1):
        raise InputError(f"a window of {window} frames; allowed: 4k + 1, such as 13, 17 or 93")
    if not root.is_dir():
        raise InputError(f"cannot check {root}: {'it is a file' if root.exists() else 'no such folder'}")
    if (root / "index.jsonl").exists():
        form, check = "clips", _check_clips
    elif (root / "meta").is_dir():
        form, check = "LeRobot", check_lerobot
    elif (root / "annotation").is_dir():
        form, check = "Bridge", _check_bridge
    elif (root / "videos").is_dir():
        form, check = "videos with captions", _check_captioned
    else:
        raise InputError(
            f"{root} is no dataset that is known; allowed are a folder with index.jsonl (`orrery sim`), meta/info.json "
            "(LeRobot), annotation/ (Bridge), or videos/ beside metas/ or captions/"
        )
    survey = Survey(root, form, window=window, decode=decode)
    check(survey, progress or (lambda done, total: None))
    findings.check_whole(survey)
    return survey


def _check_clips(survey: Survey, progress: Progress) -> None:
    path = survey.root / "index.jsonl"
    text = survey.tried(path, lambda: read_text(path)) or ""
    entries = list(_index(survey, path, text))
    for name, count in Counter(entry.id for entry in entries).items():
        if count > 1:
            survey.error(path, f"id {name} is there {count} times", "once")
    listed = {entry.id: entry for entry in entries}
    names = {name: _action_names(survey, survey.root / name / "meta.json") for name in listed}
    survey.action_names = next(iter(Counter(one for one in names.values() if one).most_common(1)), ((), 0))[0]
    for done, entry in enumerate(listed.values(), 1):
        _check_clip(survey, entry, names[entry.id])
        progress(done, len(listed))
    folders = {folder.parent.name for folder in survey.root.glob("*/meta.json")}
    if lost := sorted(name for name in folders - set(listed) if not name.startswith(".")):
        survey.warning(path, f"lists none of {len(lost)} folders, such as {lost[0]}", "`orrery sim` again mends it")


def _index(survey: Survey, path: Path, text: str) -> Iterator[ClipEntry]:
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            tree = json.loads(line)
        except (ValueError, RecursionError):
            note = survey.warning if number == len(lines) else survey.error
            note(path, f"line {number} is not JSON", "one object a line" if number < len(lines) else "a whole line")
            continue
        try:
            yield entry_from_json(tree)
        except (InputError, TypeError) as error:
            survey.error(path, f"line {number}: {str(error).removeprefix('index.jsonl: ')}")


def _action_names(survey: Survey, path: Path) -> tuple[str, ...] | None:
    """Of a clip; () where it has no actions, None where that cannot be known."""
    if not path.parent.is_dir():
        return None
    tree = survey.tried(path, lambda: json.loads(read_text(path)))
    told = tree.get("action_names", []) if isinstance(tree, dict) else None
    if tree is not None and not isinstance(told, list):
        survey.error(path, f"holds {short(tree)}", "what `orrery sim` writes of a clip")
    return tuple(map(str, told)) if isinstance(told, list) else None


def _check_clip(survey: Survey, entry: ClipEntry, names: tuple[str, ...] | None) -> None:
    folder = survey.root / entry.id
    path = folder / "rgb.mp4"
    if not folder.is_dir():
        survey.error(folder, "is listed in index.jsonl and not there", "a folder a clip")
        return
    findings.check_length(survey, path, entry.id, entry.frames)
    findings.check_caption(survey, survey.root / "index.jsonl", entry.id, entry.caption)
    for video in [path, *sorted(folder.glob("rgb.*.mp4"))]:
        facts = findings.check_video(survey, video, entry.fps)
        if facts and len(facts.times) != entry.frames:
            survey.error(video, f"has {len(facts.times)} frames, index.jsonl says {entry.frames}", "as many")
        if facts and video == path:
            findings.add_shots(survey, entry.id, video, facts.fps, 0.0, len(facts.times))
    for archive in sorted(folder.glob("*.npz")):
        survey.tried(archive, lambda archive=archive: _archive(archive, survey.decode))  # type: ignore[misc]
    if names is not None and names != survey.action_names:
        told = ", ".join(survey.action_names)
        survey.error(
            folder / "meta.json", f"its actions are {', '.join(names) or 'none'}", f"{told}, as in other clips"
        )
    elif names:
        actions = survey.tried(folder / "actions.npy", lambda: np.load(folder / "actions.npy", allow_pickle=False))
        if actions is not None:
            counts = (entry.frames, entry.frames - 1)
            findings.check_actions(survey, folder / "actions.npy", entry.id, actions, counts)


def _archive(path: Path, whole: bool) -> None:
    with np.load(path, allow_pickle=False) as archive:
        for name in archive.files if whole else ():
            _ = archive[name]


def _check_bridge(survey: Survey, progress: Progress) -> None:
    files = [(split, path) for split in SPLITS for path in annotation_files(survey.root, split)]
    if strange := sorted(p.name for p in (survey.root / "annotation").iterdir() if p.name not in SPLITS):
        message = f"holds {', '.join(strange[:3])}, which no split is read from"
        survey.warning(survey.root / "annotation", message, ", ".join(SPLITS))
    survey.action_names = ACTION_NAMES
    seen: dict[tuple[str, str], Path] = {}
    used: set[Path] = set()
    for done, (split, path) in enumerate(files, 1):
        annotation: Annotation | None = survey.tried(path, lambda path=path: read_annotation(path, survey.root))  # type: ignore[misc]
        if annotation is not None:
            first = seen.setdefault((split, annotation.id), path)
            if first is not path:
                survey.error(path, f"episode_id {annotation.id} is that of {first.name} too", "another one a file")
            _check_trajectory(survey, annotation, f"{split}/{path.stem}")
            used |= set(annotation.videos.values())
        progress(done, len(files))
    strays = sorted(set(survey.root.glob("videos/**/*.mp4")) - used)
    if strays:
        survey.warning(strays[0], f"belongs to no annotation{f', as {len(strays) - 1} more' if strays[1:] else ''}")


def _check_trajectory(survey: Survey, annotation: Annotation, name: str) -> None:
    path, count = annotation.path, len(annotation.state)
    findings.check_length(survey, path, name, count)
    survey.captions[annotation.text.strip()] += 1  # may be empty: the published model is trained without
    survey.cameras = survey.cameras or list(annotation.videos)
    if list(annotation.videos) != survey.cameras:
        survey.error(path, f"its cameras are {', '.join(annotation.videos)}", ", ".join(survey.cameras))
    for place, video in enumerate(annotation.videos.values()):
        facts = findings.check_video(survey, video)
        if facts and len(facts.times) != count:
            note = survey.error if len(facts.times) < count else survey.warning
            note(video, f"has {len(facts.times)} frames, {path.name} has {count} states", "as many")
        elif facts and place == 0:
            findings.add_shots(survey, name, video, facts.fps, 0.0, count)
    actions = survey.tried(path, lambda: relative_actions(annotation.state, annotation.gripper))
    if actions is not None:
        findings.check_actions(survey, path, name, actions, (count - 1,))


def _check_captioned(survey: Survey, progress: Progress) -> None:
    root = survey.root
    videos = sorted(path for path in (root / "videos").glob("*.mp4"))
    if not videos:
        survey.error(root / "videos", "holds no .mp4", "videos/NAME.mp4 beside metas/NAME.txt or captions/NAME.json")
    controls = [name for name in CONTROLS if (root / name).is_dir()]
    for done, path in enumerate(videos, 1):
        facts = findings.check_video(survey, path)
        if facts:
            findings.check_length(survey, path, path.stem, len(facts.times))
            findings.add_shots(survey, path.stem, path, facts.fps, 0.0, len(facts.times))
        for name in controls:
            control = findings.check_video(survey, root / name / path.name)
            if facts and control and len(control.times) != len(facts.times):
                message = f"has {len(control.times)} frames, {path.name} has {len(facts.times)}"
                survey.error(root / name / path.name, message, "as many")
        _check_caption(survey, path)
        progress(done, len(videos))
    stems = {path.stem for path in videos}
    for path in [*sorted((root / "metas").glob("*.txt")), *sorted((root / "captions").glob("*.json"))]:
        if path.stem not in stems:
            survey.warning(path, "there is no video of that name", f"videos/{path.stem}.mp4")


def _check_caption(survey: Survey, video: Path) -> None:
    """The caption of a video: captions/NAME.json, which the official code takes first, or metas/NAME.txt."""
    plain = survey.root / "metas" / f"{video.stem}.txt"
    rich = survey.root / "captions" / f"{video.stem}.json"
    if not plain.is_file() and not rich.is_file():
        survey.error(video, "has no caption", f"metas/{plain.name} or captions/{rich.name}")
        return
    path = rich if rich.is_file() else plain
    found = survey.tried(path, lambda: _texts(json.loads(read_text(rich))) if path is rich else [read_text(plain)])
    if found is not None:
        text = next((text.strip() for text in found if text.strip()), "")
        survey.captions[text] += 1
        if not text:
            survey.error(
                path, "holds no text", "what is to be seen in the video; the official code reads on without a word"
            )


def _texts(tree: Any) -> list[str]:
    """All texts of a caption file: {"caption": text}, or {captioner: {"long": text, ...}}."""
    if isinstance(tree, str):
        return [tree]
    if isinstance(tree, dict):
        return [text for value in tree.values() for text in _texts(value)]
    raise InputError(f"{short(tree)} is no caption; allowed: text, or an object of texts")
