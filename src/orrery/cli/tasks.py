"""The work of `orrery transfer`: a spec with its place on disk, what is there already, and what the engine is asked."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from orrery.cli.inputs import Footage, look, read_part
from orrery.cli.outputs import describe_drawing, describe_model, is_image, sha256, transfer_files
from orrery.errors import InputError, note
from orrery.files import check_writable
from orrery.specs import ControlSpec, TransferSpec
from orrery.video import VIDEO_SUFFIXES, Video
from orrery.weights import SIZES
from orrery.weights.catalogue import nearest_size

if TYPE_CHECKING:
    from orrery.control.models import Models
    from orrery.world import Signal, Transferred, TransferRequest, World


@dataclass(frozen=True)
class Drawing:
    """What the command line says of all jobs and no file can. latents: that a chunk hands on, in place of the spec's
    overlap; handover: None is latents, but for independent chunks. None of the others: as the job has it."""

    size: tuple[int, int] | None = None
    fps: float | None = None
    latents: int | None = None
    handover: str | None = None


@dataclass(frozen=True)
class Task:
    """A spec, where its result goes, and what is known of its input."""

    spec: TransferSpec
    output: Path
    footage: Footage
    drawing: Drawing

    @property
    def weights(self) -> dict[str, float]:
        """Of the controls that act, by kind."""
        return {control.kind: control.weight for control in self.spec.acting}

    @property
    def files(self) -> list[Path]:
        """All that it writes."""
        return list(transfer_files(self.output, list(self.weights)).values())

    @property
    def inputs(self) -> list[Path]:
        """All that it reads."""
        spec = self.spec
        read = [spec.video, spec.image, spec.hold]
        return [path for path in (*read, *(p for c in spec.controls for p in (c.path, c.mask))) if path is not None]

    def asked(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        """All that the result depends on, as JSON values: a video that was made with other settings is not this job's.

        choice: of the model, as the command line says it; what does not concern this job is left out.
        """
        spec, kinds = dataclasses.asdict(self.spec), self.spec.kinds
        del spec["source"]
        made = [control.kind for control in self.spec.controls if control.path is None]
        others = set() if "depth" in made else {"depth_model"}
        if "seg" not in made and not any(control.mask_prompt for control in self.spec.controls):
            others |= {"detector", "tracker"}
        chosen = {key: value for key, value in choice.items() if key not in others}
        chosen["branches"] = {kind: path for kind, path in choice["branches"].items() if path and kind in kinds}
        spec |= {**dataclasses.asdict(self.drawing), **chosen}
        return json.loads(json.dumps(spec, default=os.path.abspath))


def make_tasks(specs: Sequence[TransferSpec], output: Path, drawing: Drawing) -> list[Task]:
    """A task a spec; their files are looked at.

    Raises:
        InputError: a place that fits no or not all results; an input that cannot be used.
    """
    folder = is_folder(output)
    if not folder and len(specs) > 1:
        raise InputError(f"cannot write {len(specs)} videos to {output}: give a folder with -o")
    tasks = []
    for spec in specs:
        if not folder and is_image(output) and spec.frames is None:
            spec = dataclasses.replace(spec, frames=1)
        footage = look(spec, drawing.fps)
        still = footage.drawn == 1
        place = output / f"{spec.name}{'.png' if still else '.mp4'}" if folder else output
        if is_image(place) and not still:
            raise InputError(
                f"cannot write {footage.drawn} frames to {place}: a picture holds one; use .mp4, or --frames 1"
            )
        tasks.append(Task(spec, place, footage, drawing))
    return tasks


def is_folder(output: Path) -> bool:
    """Whether -o names the folder of the results, and not the one result."""
    suffix = output.suffix.lower()
    if output.is_dir() or not (suffix in VIDEO_SUFFIXES or suffix == ".gif" or is_image(output)):
        return True
    if suffix != ".mp4" and not is_image(output):
        raise InputError(
            f"cannot write {output}: its suffix is {output.suffix!r}, allowed is .mp4 (or .png for one frame), or a "
            "folder"
        )
    return False


def is_done(task: Task, model: Mapping[str, Any]) -> bool:
    """Whether the result is there, made with the same settings.

    Raises:
        InputError: another result is there.
    """
    if not os.path.lexists(task.output):
        return False
    instead = "--again makes it again; or choose another output"
    try:
        text = transfer_files(task.output, ())["record"].read_text(encoding="utf-8")
        made = json.loads(text)["asked"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{task.output} is there, without a record that says how it was made: {instead}") from None
    asked = task.asked(model)
    if other := [key for key, value in asked.items() if key not in made or made[key] != value]:
        raise InputError(f"{task.output} is there and was made with another {', '.join(other)}: {instead}")
    return True


def check_outputs(tasks: Sequence[Task], specs: Sequence[Path]) -> None:
    """Refuse before the work what could not be written after it, or would destroy something.

    Raises:
        InputError: a place that cannot be written; a file that one of the jobs reads, or a spec; two jobs that would
            write the same file.
    """
    read = {path.resolve(): "a spec file" for path in specs}
    for task in tasks:
        read |= {path.resolve(): f"which {task.spec.name} reads" for path in task.inputs}
    writers: dict[Path, Task] = {}
    for task in tasks:
        for path in task.files:
            check_writable(path)
            if path.is_dir():
                raise InputError(f"cannot write {path}: it is a folder")
            if what := read.get(path.resolve()):
                raise InputError(f"{task.spec.name} would overwrite {path}, {what}; choose another output")
            other = writers.setdefault(path.resolve(), task)
            if other is not task:
                raise InputError(
                    f"{task.spec.source} and {other.spec.source} would both write {path}; change the name of one"
                )


def trial(world: "World", task: Task) -> "TransferRequest":
    """The request with one black frame in place of every file: all that needs the model is checked, at next to no cost.

    Raises:
        InputError: with the job's file where it cannot be.
    """
    from orrery.world import Signal

    spec, footage = task.spec, task.footage
    black = Video(np.zeros((1, *footage.size, 3), np.uint8), footage.fps)
    controls = {control.kind: Signal(black, control.weight) for control in spec.acting}
    image = black.frames[0] if spec.image is not None or spec.image_frame is not None else None
    hold = None if spec.hold is None else np.zeros((1, *footage.size), np.float32)
    try:
        request = world.transfer_request(
            spec.prompt, black if spec.video else None, controls, image=image, hold=hold, **_options(task)
        )
    except InputError as error:
        raise InputError(f"{spec.source}: {error}") from error
    factor = world.factors.temporal
    frames = -(-(footage.drawn - 1) // factor) * factor + 1
    return dataclasses.replace(request, base=dataclasses.replace(request.base, frames=frames))


def real_request(world: "World", task: Task, models: "Models") -> "TransferRequest":
    """The request with its files read and its control videos made; models: of depth and segmentation.

    Raises:
        InputError: with the job's file where it cannot be.
    """
    from orrery.control.masks import read_guidance

    spec, footage = task.spec, task.footage
    trim = footage.frames < footage.total
    try:
        source = None if spec.video is None else read_part(spec.video, footage.frames if trim else None)
        length = footage.frames if source is None else len(source)
        image: Any = spec.image
        if spec.image_frame is not None and spec.video is not None:
            image = _frame(spec.video, spec.image_frame, source)
        hold = None
        if spec.hold is not None:
            hold = read_guidance(spec.hold, footage.size, length, labels=spec.hold_labels, trim=trim)
        controls = {each.kind: _signal(task, each, source, length, models) for each in spec.acting}
        request = world.transfer_request(
            spec.prompt, source, controls, image=image, hold=hold, frames=spec.frames, **_options(task)
        )
    except InputError as error:
        raise InputError(f"{spec.source}: {error}") from error
    finally:
        for model in (models.depth, models.segmentation):  # the transformer needs the room
            getattr(model, "release", lambda: None)()
    return request


def _signal(task: Task, control: ControlSpec, source: Video | None, length: int, models: "Models") -> "Signal":
    """A control as the engine takes it; length: of the input in frames."""
    from orrery.control.grounded import mask_from_prompt
    from orrery.control.masks import read_mask
    from orrery.world import Signal

    footage = task.footage
    trim = footage.frames < footage.total
    mask = None
    if control.mask is not None:
        mask = read_mask(control.mask, footage.size, length, trim=trim)
    elif control.mask_prompt and source is not None:
        mask = mask_from_prompt(source, control.mask_prompt, models.segmentation)
    if control.path is not None:
        if control.strength not in (None, "medium"):
            note(
                f"{task.spec.source}: the preset {control.strength!r} of {control.kind} is not used: {control.path} is"
            )
        return Signal(control.path, control.weight, mask, trim=trim)
    prompt = (control.prompt or task.spec.prompt) if control.kind == "seg" else None
    return Signal(None, control.weight, mask, control.strength, prompt, models)


def _frame(video: Path, index: int, source: Video | None) -> np.ndarray:
    """A frame of the input [H, W, 3], which may lie beyond the part that is drawn."""
    if source is not None and index < len(source):
        return source.frames[index]
    return read_part(video, index + 1).frames[index]


def _options(task: Task) -> dict[str, Any]:
    """Arguments of `World.transfer_request`, but for those that are files."""
    spec, drawing = task.spec, task.drawing
    size = drawing.size
    if size is None and spec.resolution is not None:
        size = nearest_size(SIZES[spec.resolution].values(), task.footage.size)
    overlap = spec.overlap if drawing.latents is None else drawing.latents
    return dict(
        seed=spec.seed,
        steps=spec.steps,
        guidance=spec.guidance,
        negative_prompt=spec.negative_prompt,
        size=size,
        keep_size=spec.keep_size,
        fps=drawing.fps,
        chunk=None if spec.chunk == task.footage.drawn == 1 else spec.chunk,  # a picture is one frame in any chunk
        overlap=overlap,
        handover=drawing.handover or ("latents" if overlap else "frames"),
        hold_until=spec.hold_until,
        sigma_max=spec.sigma_max,
    )


def describe_transfer(
    world: "World",
    task: Task,
    request: "TransferRequest",
    result: "Transferred",
    models: "Models",
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Every setting that the result depends on, as JSON values."""
    from orrery.control.masks import normalised

    spec, video = task.spec, result.video
    effective = dict(zip(task.weights, normalised(list(task.weights.values()))))
    return {
        "name": spec.name,
        "spec": spec.source,
        "prompt": request.base.prompt,
        "negative_prompt": request.base.negative_prompt,
        "input": _file(spec.video),
        "controls": {
            control.kind: _describe_control(world, spec, control, models, effective.get(control.kind, 0.0))
            for control in spec.controls
        },
        "image": _file(spec.image) if spec.image_frame is None else {"frame": spec.image_frame},
        "guided_generation": None
        if spec.hold is None
        else {**(_file(spec.hold) or {}), "labels": spec.hold_labels, "until_step": spec.hold_until},
        "sigma_max": spec.sigma_max,
        **describe_drawing(request.base),
        "chunk": request.chunk,
        "frames": len(video),
        "fps": video.fps,
        "size": [video.height, video.width],
        "size_drawn": list(request.base.size),
        "shown_beside": {"input": spec.show_input, "controls": spec.show_controls},
        **describe_model(world),
        "seconds": dict(seconds),
        "files": {what: path.name for what, path in transfer_files(task.output, list(task.weights)).items()},
    }


def _describe_control(
    world: "World", spec: TransferSpec, control: ControlSpec, models: "Models", effective: float
) -> dict[str, Any]:
    """A control: where it came from, how much it counted, which branch obeyed it."""
    from orrery.weights import part_hash

    made: dict[str, Any] = {"file": None, "made_of": "the input"}
    if control.path is not None:
        made = _file(control.path) or {}
    elif control.kind in ("edge", "blur"):
        made["strength"] = control.strength
    elif control.kind == "depth":
        made["model"] = getattr(models.depth, "name", None)
    else:
        made |= {"model": getattr(models.segmentation, "name", None), "prompt": control.prompt or spec.prompt}
    mask = _file(control.mask)
    if control.mask_prompt:
        mask = {"prompt": control.mask_prompt, "model": getattr(models.segmentation, "name", None)}
    return {
        **made,
        "weight": control.weight,
        "weight_after_normalising": effective,
        "mask": mask,
        "branch_hash": part_hash(world.files, f"control-{control.kind}") if control.weight else None,
    }


def _file(path: Path | None) -> dict[str, Any] | None:
    return None if path is None else {"file": str(path), "sha256": sha256(path)}
