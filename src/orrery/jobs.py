"""Jobs: the inference files of Cosmos-Predict2.5, read as they stand, into what a world model is asked to generate.

Layouts: one job an object (.json, .jsonl with one a line, .yaml; ours: a list of them too), and the older one, in which
`samples` maps names to prompts that share the other keys. Paths are relative to the file. Two differences: `guidance`
may be any number of at least 0, and `num_output_frames` is obeyed where a file states it (the official code always
gives the model's native length unless `enable_autoregressive` is true).
"""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orrery.errors import InputError
from orrery.jsonfiles import (
    COUNT,
    IMAGE_SUFFIXES,
    Count,
    Draft,
    Guidance,
    Name,
    Seed,
    Text,
    absent,
    existing_files,
    no_bool,
    read_objects,
    says,
    settle_drafts,
    short,
    unknown,
)

VIDEO_SUFFIXES = (".mp4",)
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


class _Keys(BaseModel):
    """The keys of one job. A description says what is allowed; `name` and `inference_type` have to be there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = ""
    inference_type: Annotated[Kind, says("text2world, image2world, video2world, text2image")] = "text2world"
    prompt: Annotated[Text | None, says("text")] = None
    prompt_path: Annotated[Path | None, says("the path of a text file")] = None
    input_path: Annotated[Path | None, says("the path of an image or a video")] = None
    negative_prompt: Annotated[Text | None, says("text")] = None
    seed: Seed = 0
    guidance: Guidance = None
    resolution: Annotated[
        str, Field(pattern=r"^(none| *[1-9][0-9]{0,4} *, *[1-9][0-9]{0,4} *)$"), says('"H,W" in pixels, or "none"')
    ] = "none"
    num_output_frames: Annotated[Count | None, says(COUNT)] = None
    num_steps: Annotated[Count | None, says(COUNT)] = None
    enable_autoregressive: Annotated[bool, says("true or false")] = False
    chunk_size: Annotated[Count, says(COUNT)] = 77
    chunk_overlap: Annotated[
        int, BeforeValidator(no_bool), Field(ge=0), says("a whole number of at least 0, below chunk_size")
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
    if faults := unknown(overrides, [key for key in KEYS if key != "name"], "override"):
        raise InputError("; ".join(faults))
    drafts = [draft for file in existing_files(paths) for draft in _drafts(file, overrides)]
    return settle_drafts(drafts, _Draft.job)


def _drafts(file: Path, overrides: Mapping[str, Any]) -> Iterator["_Draft"]:
    """What a file asks for, one draft a job."""
    for source, tree in read_objects(file):
        if "samples" in tree:
            yield from _samples(tree, file.parent, source, overrides)
        else:
            yield _Draft(tree, file.parent, source, overrides, unknown(tree, (*KEYS, "samples")))


def _samples(tree: dict[str, Any], folder: Path, source: str, overrides: Mapping[str, Any]) -> Iterator["_Draft"]:
    """The older layout: one draft a sample. If a sample has both kinds of prompt, the file's wins, as it did."""
    samples = tree["samples"]
    if not isinstance(samples, dict) or not samples:
        raise InputError(f"{source}: samples = {short(samples)}; allowed: an object of NAME: {{prompt: ...}}")
    shared = {"seed": OLDER_SEED} | {key: value for key, value in tree.items() if key != "samples"}
    for name, sample in samples.items():
        where = f"{source} sample {short(name)}"
        if not isinstance(sample, dict):
            raise InputError(f"{where}: {short(sample)}; allowed: an object with {', '.join(SAMPLE_KEYS)}")
        faults = unknown(tree, SHARED_KEYS) + unknown(sample, SAMPLE_KEYS)
        if sample.get("prompt_path") is not None:
            sample = {key: value for key, value in sample.items() if key != "prompt"}
        yield _Draft({"name": name} | shared | sample, folder, where, overrides, faults)


class _Draft(Draft):
    def job(self) -> Job:
        """The job.

        Raises:
            InputError: everything that is wrong with it, in one line.
        """
        keys, wrong = self.checked(_Keys, ("name", "inference_type"), [("prompt", "prompt_path")])
        prompt = self.prompt(keys.prompt, keys.prompt_path, wrong)
        start = self._start(keys, wrong)
        self._check_length(keys, wrong)
        self.refuse()
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

    def _start(self, keys: _Keys, wrong: Collection[str]) -> Path | None:
        """The file that a job begins with, if its type has one."""
        if keys.inference_type not in _STARTS or "input_path" in wrong:
            return None
        suffixes = IMAGE_SUFFIXES + VIDEO_SUFFIXES if _STARTS[keys.inference_type] == "image" else VIDEO_SUFFIXES
        allowed = f"a file of {' '.join(suffixes)}"
        if keys.input_path is None:
            self.faults.append(f"missing key input_path, which {keys.inference_type} needs (allowed: {allowed})")
            return None
        path = self.place("input_path", keys.input_path)
        suffix = path.suffix.lower()
        if suffix not in suffixes:
            hint = "; to begin with an image, inference_type is image2world" if suffix in IMAGE_SUFFIXES else ""
            self.fault("input_path", keys.input_path, f"for {keys.inference_type} {allowed}{hint}")
        if not os.path.isfile(path):
            self.fault("input_path", keys.input_path, f"an existing file; {short(path)} is {absent(path)}")
        return path

    def _check_length(self, keys: _Keys, wrong: Collection[str]) -> None:
        """Keys about length that are right one by one and do not go together."""
        if not {"chunk_size", "chunk_overlap"} & set(wrong) and keys.chunk_overlap >= keys.chunk_size:
            allowed = f"0 to {keys.chunk_size - 1}, below chunk_size = {keys.chunk_size}"
            self.fault("chunk_overlap", keys.chunk_overlap, allowed)
        if keys.inference_type == "text2image":
            if keys.num_output_frames not in (None, 1):
                self.fault("num_output_frames", keys.num_output_frames, "1 for text2image")
            if keys.enable_autoregressive:
                self.fault("enable_autoregressive", True, "false for text2image")


def _size(resolution: str) -> tuple[int, int] | None:
    """(H, W) of "H,W", None of "none". The place for names of sizes, should there be any."""
    if resolution == "none":
        return None
    height, width = resolution.split(",")
    return int(height), int(width)
