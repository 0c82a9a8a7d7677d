"""Jobs: the inference files of Cosmos-Predict2.5, read as they stand, into what a world model is asked to generate.

Layouts: one job an object (.json, .jsonl with one a line, .yaml; ours: a list of them too), and the older one, in which
`samples` maps names to prompts that share the other keys. Paths are relative to the file. Two differences: `guidance`
may be any number of at least 0, and `num_output_frames` is obeyed where a file states it (the official code always
gives the model's native length unless `enable_autoregressive` is true).
"""

import difflib
import json
import os
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from orrery.errors import InputError

FILE_SUFFIXES = (".json", ".jsonl", ".yaml", ".yml")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4",)
LONGEST_NAME = 200  # bytes; a file system allows 255, and suffixes follow
AUTOREGRESSIVE_FRAMES = 77  # where enable_autoregressive is true and num_output_frames is not stated
OLDER_SEED = 1

SHARED_KEYS = ("inference_type", "samples", "negative_prompt", "seed", "guidance", "resolution", "num_output_frames")
SAMPLE_KEYS = ("prompt", "prompt_path", "input_path")

Kind = Literal["text2world", "image2world", "video2world", "text2image"]
StartKind = Literal["none", "image", "video"]
_STARTS: dict[Kind, StartKind] = {"image2world": "image", "video2world": "video"}


@dataclass(frozen=True)
class Job:
    """One video to generate, checked as far as it can be without a model. None: what the model asks for.

    Args:
        name: unique among the jobs read together; can be a file name.
        prompt: not empty.
        seed: 0 to 2**32 - 1.
        size: (H, W), each above 0.
        frames: as stated, at least 1; not always 4k + 1.
        start: an existing file; None where start_kind is "none".
        start_kind: "image": one frame is given, of an .mp4 its last; "video": the last frames of an .mp4 are.
        chunk_frames, chunk_overlap: of an autoregressive run, else None: pixel frames a chunk, and how many of them
            repeat the chunk before; 0 <= chunk_overlap < chunk_frames.
        source: where it was read, for messages: "jobs.jsonl line 3".
    """

    name: str
    prompt: str
    negative_prompt: str | None
    seed: int
    guidance: float | None
    steps: int | None
    size: tuple[int, int] | None
    frames: int | None
    start: Path | None
    start_kind: StartKind
    chunk_frames: int | None
    chunk_overlap: int | None
    source: str


def _file_name(name: str) -> str:
    wrong = not name.strip() or name.startswith(".") or re.search(r"[/\\]", name) or not name.isprintable()
    if wrong or len(name.encode()) > LONGEST_NAME:
        raise ValueError("not a file name")
    return name


def _number(value: Any) -> Any:
    if isinstance(value, bool):  # which pydantic takes for 0 or 1
        raise ValueError("not a number")
    return value


def _text(text: str) -> str:
    text.encode()  # JSON can hold halves of a surrogate pair, which nothing can write or read
    return text


def _says(allowed: str) -> Any:
    return Field(description=allowed)


Text = Annotated[str, AfterValidator(_text)]
Count = Annotated[int, BeforeValidator(_number), Field(ge=1)]
_FILE_NAME = f"text that can be a file name: no / or \\, no dot in front, at most {LONGEST_NAME} bytes"
_COUNT = "a whole number of at least 1"


class _Keys(BaseModel):
    """The keys of one job. A description says what is allowed; `name` and `inference_type` have to be there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(_file_name), _says(_FILE_NAME)] = ""
    inference_type: Annotated[Kind, _says("text2world, image2world, video2world, text2image")] = "text2world"
    prompt: Annotated[Text | None, _says("text")] = None
    prompt_path: Annotated[Path | None, _says("the path of a text file")] = None
    input_path: Annotated[Path | None, _says("the path of an image or a video")] = None
    negative_prompt: Annotated[Text | None, _says("text")] = None
    seed: Annotated[
        int, BeforeValidator(_number), Field(ge=0, lt=2**32), _says(f"a whole number from 0 to {2**32 - 1}")
    ] = 0
    guidance: Annotated[
        Annotated[float, BeforeValidator(_number), Field(ge=0, allow_inf_nan=False)] | None,
        _says("a number of at least 0"),
    ] = None
    resolution: Annotated[
        str, Field(pattern=r"^(none| *[1-9][0-9]{0,4} *, *[1-9][0-9]{0,4} *)$"), _says('"H,W" in pixels, or "none"')
    ] = "none"
    num_output_frames: Annotated[Count | None, _says(_COUNT)] = None
    num_steps: Annotated[Count | None, _says(_COUNT)] = None
    enable_autoregressive: Annotated[bool, _says("true or false")] = False
    chunk_size: Annotated[Count, _says(_COUNT)] = 77
    chunk_overlap: Annotated[
        int, BeforeValidator(_number), Field(ge=0), _says("a whole number of at least 0, below chunk_size")
    ] = 1


KEYS = tuple(_Keys.model_fields)


def read_jobs(paths: Sequence[str | os.PathLike[str]], overrides: Mapping[str, Any] = {}) -> list[Job]:
    """Read and check job files; nothing is returned unless everything is right.

    Args:
        paths: .json, .jsonl, .yaml or .yml files.
        overrides: keys of a job (all but `name`) that win over the files; None: not given. A prompt replaces the
            prompt_path of a file, and the other way round. Their paths are relative to the working directory.

    Returns:
        The jobs in the order of the files.

    Raises:
        InputError: a file that is missing or no JSON or YAML, an unknown key, an impossible value, a name used twice.
            All faults of the first faulty job are named, with what is allowed, and how many other jobs have faults.
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if faults := _unknown(overrides, [key for key in KEYS if key != "name"], "override"):
        raise InputError("; ".join(faults))
    files = [Path(path) for path in paths]
    if not files:
        raise InputError(f"no job files given; allowed are {' '.join(FILE_SUFFIXES)}")
    for file in files:
        if file.suffix.lower() not in FILE_SUFFIXES:
            raise InputError(f"cannot read jobs from {file}: allowed suffixes are {' '.join(FILE_SUFFIXES)}")
    if missing := [f"{file} ({_absent(file)})" for file in files if not os.path.isfile(file)]:
        raise InputError(f"cannot read jobs from {', '.join(missing)}")
    drafts = [draft for file in files for draft in _drafts(file, overrides)]
    jobs, wrong = [], []
    for draft in drafts:
        try:
            jobs.append(draft.job())
        except InputError as error:
            wrong.append(str(error))
    if wrong:
        more = f"; {len(wrong) - 1} more of the {len(drafts)} jobs have faults" if len(wrong) > 1 else ""
        raise InputError(wrong[0] + more)
    _check_unique(jobs)
    return jobs


def _check_unique(jobs: list[Job]) -> None:
    first: dict[str, Job] = {}
    for job in jobs:
        other = first.setdefault(job.name, job)
        if other is not job:
            raise InputError(
                f"name = {job.name!r} is used twice, in {other.source} and in {job.source}; allowed: once in all files"
            )


def _drafts(file: Path, overrides: Mapping[str, Any]) -> Iterator["_Draft"]:
    """What a file asks for, one draft a job."""
    found = list(_objects(file, _read_text(file)))
    if not found:
        raise InputError(f"{file} holds no jobs; allowed: at least one object with the keys of a job")
    for source, tree in found:
        if not isinstance(tree, dict):
            raise InputError(f"{source}: {_short(tree)} is no job; allowed: an object with the keys of a job")
        if "samples" in tree:
            yield from _samples(tree, file.parent, source, overrides)
        else:
            yield _Draft(tree, file.parent, source, overrides, _unknown(tree, (*KEYS, "samples")))


def _samples(tree: dict[str, Any], folder: Path, source: str, overrides: Mapping[str, Any]) -> Iterator["_Draft"]:
    """The older layout: one draft a sample. If a sample has both kinds of prompt, the file's wins, as it did."""
    samples = tree["samples"]
    if not isinstance(samples, dict) or not samples:
        raise InputError(f"{source}: samples = {_short(samples)}; allowed: an object of NAME: {{prompt: ...}}")
    shared = {"seed": OLDER_SEED} | {key: value for key, value in tree.items() if key != "samples"}
    for name, sample in samples.items():
        where = f"{source} sample {_short(name)}"
        if not isinstance(sample, dict):
            raise InputError(f"{where}: {_short(sample)}; allowed: an object with {', '.join(SAMPLE_KEYS)}")
        faults = _unknown(tree, SHARED_KEYS) + _unknown(sample, SAMPLE_KEYS)
        if sample.get("prompt_path") is not None:
            sample = {key: value for key, value in sample.items() if key != "prompt"}
        yield _Draft({"name": name} | shared | sample, folder, where, overrides, faults)


def _objects(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Where each object of a file stands, and the object."""
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield f"{file} line {number}", _parse_json(file, line, number)
        return
    if not text.strip():
        return
    tree = _parse_json(file, text) if file.suffix.lower() == ".json" else _parse_yaml(file, text)
    if isinstance(tree, list):
        yield from ((f"{file} item {number}", item) for number, item in enumerate(tree, 1))
    else:
        yield str(file), tree


def _parse_json(file: Path, text: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_pairs)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(f"{file} is not JSON: line {line}, column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        where = f"{file} line {first_line}" if file.suffix.lower() == ".jsonl" else file
        raise InputError(f"cannot read jobs from {where}: {error}") from None


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _check_once([key for key, _ in pairs])
    return dict(pairs)


def _check_once(keys: list[Any]) -> None:
    """The parsers keep the last of two equal keys and say nothing: a sample would be lost."""
    if len(keys) > len(set(keys)):
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise ValueError(f"the key {twice!r} is there twice in one object; allowed: once")


def _parse_yaml(file: Path, text: str) -> Any:
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            _check_once([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return node

    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        raise InputError(f"{file} is not YAML: line {mark.line + 1}, column {mark.column + 1}: {problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read jobs from {file}: {' '.join(str(error).split())}") from None


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} could not be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{file} is not text; allowed: UTF-8") from None


def _absent(path: Path) -> str:
    return "a folder" if os.path.isdir(path) else "no such file"


@dataclass
class _Draft:
    """The keys of one job as they were read, and the faults found in them so far."""

    tree: dict[str, Any]
    folder: Path
    source: str
    overrides: Mapping[str, Any]
    faults: list[str]

    def job(self) -> Job:
        """The job.

        Raises:
            InputError: everything that is wrong with it, in one line.
        """
        keys, wrong = self._checked()
        prompt = self._prompt(keys, wrong)
        start = self._start(keys, wrong)
        self._check_length(keys, wrong)
        if self.faults:
            raise InputError(f"{self.source}: {'; '.join(self.faults)}")
        frames = keys.num_output_frames
        if keys.inference_type == "text2image":
            frames = 1
        elif keys.enable_autoregressive:
            frames = frames or AUTOREGRESSIVE_FRAMES
        return Job(
            name=keys.name,
            prompt=prompt,
            negative_prompt=keys.negative_prompt,
            seed=keys.seed,
            guidance=keys.guidance,
            steps=keys.num_steps,
            size=_size(keys.resolution),
            frames=frames,
            start=start,
            start_kind=_STARTS.get(keys.inference_type, "none"),
            chunk_frames=keys.chunk_size if keys.enable_autoregressive else None,
            chunk_overlap=keys.chunk_overlap if keys.enable_autoregressive else None,
            source=self.source,
        )

    def _checked(self) -> tuple[_Keys, Collection[str]]:
        """The keys with overrides in place; and those whose values are impossible, for which defaults stand in."""
        replaced = {"prompt", "prompt_path"} if self.overrides.keys() & {"prompt", "prompt_path"} else set()
        tree = {key: value for key, value in self.tree.items() if key in KEYS and key not in replaced}
        tree |= self.overrides
        for key in ("name", "inference_type"):
            if key not in tree:
                self.faults.append(f"missing key {key} (allowed: {_Keys.model_fields[key].description})")
        try:
            return _Keys.model_validate(tree), ()
        except ValidationError as error:
            wrong = dict.fromkeys(str(fault["loc"][0]) for fault in error.errors(include_url=False))
        for key in wrong:
            self._fault(key, tree[key], _Keys.model_fields[key].description or "")
        return _Keys.model_validate({key: value for key, value in tree.items() if key not in wrong}), wrong

    def _prompt(self, keys: _Keys, wrong: Collection[str]) -> str:
        """The prompt, or "" and a fault."""
        if keys.prompt is not None and keys.prompt_path is not None:
            self.faults.append(f"prompt and prompt_path = {_short(keys.prompt_path)} both given; allowed: one of them")
        elif keys.prompt is not None:
            if keys.prompt.strip():
                return keys.prompt
            self._fault("prompt", keys.prompt, "text that says something")
        elif keys.prompt_path is not None:
            return self._prompt_in(keys.prompt_path)
        elif not {"prompt", "prompt_path"} & set(wrong):
            self.faults.append("missing key prompt (allowed: text, or prompt_path with a text file)")
        return ""

    def _prompt_in(self, told: Path) -> str:
        path = self._place("prompt_path", told)
        if not os.path.isfile(path):
            self._fault("prompt_path", told, f"an existing text file; {_short(path)} is {_absent(path)}")
            return ""
        try:
            prompt = _read_text(path).strip()
        except InputError as error:
            self._fault("prompt_path", told, f"a text file; {error}")
            return ""
        if not prompt:
            self._fault("prompt_path", told, "a text file that says something; it is empty")
        return prompt

    def _start(self, keys: _Keys, wrong: Collection[str]) -> Path | None:
        """The file that a job begins with, if its type has one."""
        if keys.inference_type not in _STARTS or "input_path" in wrong:
            return None
        suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES if _STARTS[keys.inference_type] == "image" else VIDEO_SUFFIXES
        allowed = f"a file of {' '.join(suffixes)}"
        if keys.input_path is None:
            self.faults.append(f"missing key input_path, which {keys.inference_type} needs (allowed: {allowed})")
            return None
        path = self._place("input_path", keys.input_path)
        suffix = path.suffix.lower()
        if suffix not in suffixes:
            hint = "; to begin with an image, inference_type is image2world" if suffix in IMAGE_SUFFIXES else ""
            self._fault("input_path", keys.input_path, f"for {keys.inference_type} {allowed}{hint}")
        if not os.path.isfile(path):
            self._fault("input_path", keys.input_path, f"an existing file; {_short(path)} is {_absent(path)}")
        return path

    def _check_length(self, keys: _Keys, wrong: Collection[str]) -> None:
        """Keys about length that are right one by one and do not go together."""
        if not {"chunk_size", "chunk_overlap"} & set(wrong) and keys.chunk_overlap >= keys.chunk_size:
            allowed = f"0 to {keys.chunk_size - 1}, below chunk_size = {keys.chunk_size}"
            self._fault("chunk_overlap", keys.chunk_overlap, allowed)
        if keys.inference_type == "text2image":
            if keys.num_output_frames not in (None, 1):
                self._fault("num_output_frames", keys.num_output_frames, "1 for text2image")
            if keys.enable_autoregressive:
                self._fault("enable_autoregressive", True, "false for text2image")

    def _place(self, key: str, path: Path) -> Path:
        """A path of a file is relative to that file, one of an override to the working directory."""
        return (Path() if key in self.overrides else self.folder) / os.path.expanduser(path)

    def _fault(self, key: str, value: Any, allowed: str) -> None:
        self.faults.append(f"{'override ' * (key in self.overrides)}{key} = {_short(value)} (allowed: {allowed})")


def _unknown(tree: Mapping[Any, Any], allowed: Sequence[str], what: str = "key") -> list[str]:
    """One fault that names all keys that are not allowed, each with the one that was probably meant; or none."""
    found = []
    for key, value in tree.items():
        if key not in allowed:
            close = difflib.get_close_matches(str(key).lower(), allowed, 1)
            found.append(f"{_short(key)} = {_short(value)}" + (f" (did you mean {close[0]}?)" if close else ""))
    return [f"unknown {what} {', '.join(found)} (allowed: {', '.join(allowed)})"] if found else []


def _size(resolution: str) -> tuple[int, int] | None:
    """(H, W) of "H,W", None of "none". The place for names of sizes, should there be any."""
    if resolution == "none":
        return None
    height, width = resolution.split(",")
    return int(height), int(width)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 80
_REPR.maxlevel = 3


def _short(value: Any) -> str:
    """A value for a message: one line, not too long, however much a file holds."""
    return _REPR.repr(str(value) if isinstance(value, os.PathLike) else value)
