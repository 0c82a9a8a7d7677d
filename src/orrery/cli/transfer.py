"""`orrery transfer`: videos drawn anew after control signals, from the official control-spec files or from flags."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orrery.cli import options as opt

if TYPE_CHECKING:
    from orrery.cli.tasks import Task
    from orrery.control.models import Models
    from orrery.specs import TransferSpec
    from orrery.world import World

TOGETHER = 32  # jobs whose prompts are encoded in one visit of the text encoder
# What a key of a spec is called on the command line.
CALLED = {
    "prompt": "--prompt", "video_path": "--input", "negative_prompt": "--negative-prompt", "seed": "--seed",
    "guidance": "--guidance", "num_steps": "--steps", "resolution": "--resolution", "max_frames": "--frames",
    "num_video_frames_per_chunk": "--chunk", "image_context_path": "--image", "context_frame_index": "--image-frame",
    "sigma_max": "--sigma-max", "guided_generation_mask": "--hold", "guided_generation_step_threshold": "--hold-until",
    "guided_generation_foreground_labels": "--hold-label", "keep_input_resolution": "--keep-size",
    "show_control_condition": "--show-controls", "show_input": "--show-input",
}  # fmt: skip

PANEL = "Controls"
_Controls = typer.Option(
    "--control", metavar="KIND[=FILE][:WEIGHT]", show_default=False,
    help="What is followed: edge, blur, depth or seg. Alone it is made of the input; FILE is one that is there: a "
    "video, or a simulator's .npz. WEIGHT is 0 to 1, or else 1. Repeatable.", rich_help_panel=PANEL,
)  # fmt: skip
_Masks = typer.Option(
    "--mask", metavar="KIND=FILE", show_default=False,
    help="Where that control acts: a video, an image or an .npz, white for yes. Repeatable.", rich_help_panel=PANEL,
)  # fmt: skip
_MaskPrompts = typer.Option(
    "--mask-prompt", metavar="KIND=WORDS", show_default=False,
    help="The same, by what is to be seen there. Repeatable.", rich_help_panel=PANEL,
)  # fmt: skip
_Strengths = typer.Option(
    "--strength", metavar="KIND=PRESET", show_default="medium",
    help="Of edge (the higher, the fewer) and blur (the higher, the softer): very_low to very_high. Repeatable.",
    rich_help_panel=PANEL,
)  # fmt: skip
_Branches = typer.Option(
    "--branch", metavar="KIND=PATH", show_default="the model's",
    help="Take the control branch from elsewhere: a model folder, an official .pt, diffusers. Repeatable.",
    rich_help_panel=PANEL,
)  # fmt: skip
_SegPrompt = typer.Option(help="What seg looks for.", show_default="the prompt", rich_help_panel=PANEL)
_DepthModel = typer.Option(
    help="Makes depth: a folder or a hub name.", show_default="Depth Anything V2 small", rich_help_panel=PANEL
)
_Detector = typer.Option(
    help="Finds what seg and a mask prompt name.", show_default="Grounding DINO", rich_help_panel=PANEL
)
_Tracker = typer.Option(help="Follows it through the video.", show_default="SAM 2", rich_help_panel=PANEL)
Words = list[str] | None


def run(
    specs: Annotated[
        list[Path] | None, typer.Argument(help="Control-spec files: .json, .jsonl or .yaml.", show_default=False)
    ] = None,
    *,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The .mp4 to write, or a folder for NAME.mp4 of each.", show_default=False),
    ],
    model: opt.Model = "mini",
    prompt: Annotated[str | None, typer.Option(help="What there is, what it does, how it looks.")] = None,
    input: Annotated[Path | None, typer.Option(help="The video to draw anew, or an image.")] = None,
    control: Annotated[Words, _Controls] = None,
    mask: Annotated[Words, _Masks] = None,
    mask_prompt: Annotated[Words, _MaskPrompts] = None,
    strength: Annotated[Words, _Strengths] = None,
    seg_prompt: Annotated[str | None, _SegPrompt] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed, another look.", show_default="2025")] = None,
    steps: Annotated[int | None, typer.Option(help="Solver steps.", show_default="the model's")] = None,
    guidance: Annotated[float | None, typer.Option(help="Of the prompt.", show_default="the model's")] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="Lead away from.", show_default="the model's")] = None,
    frames: Annotated[int | None, typer.Option(help="Only the first so many.", show_default="all")] = None,
    fps: Annotated[float | None, typer.Option(help="Only so many of a second.", show_default="the input's")] = None,
    size: opt.Size = None,
    resolution: opt.Resolution = None,
    keep_size: Annotated[
        bool | None, typer.Option("--keep-size/--no-keep-size", help="Give the input's size.", show_default="keep")
    ] = None,
    image: Annotated[Path | None, typer.Option(help="A reference for the look (not with blur).")] = None,
    image_frame: Annotated[int | None, typer.Option(help="The same: this frame of the input, from 0.")] = None,
    hold: Annotated[Path | None, typer.Option(help="Mask of what stays as it is (guided generation).")] = None,
    hold_until: Annotated[int | None, typer.Option(help="To which step, from 0.", show_default="25")] = None,
    hold_label: Annotated[list[int] | None, typer.Option(help="Of an .npz: what stays. Repeatable.")] = None,
    sigma_max: Annotated[
        float | None, typer.Option(help="Begin with the input and so much noise, 0 to 200.", show_default="pure noise")
    ] = None,
    chunk: Annotated[int | None, typer.Option(help="Frames drawn at once, 4k + 1.", show_default="the model's")] = None,
    overlap: Annotated[
        int | None, typer.Option(help="Latents a chunk hands on: 0, 1, 2.", show_default="the file's, or 1")
    ] = None,
    handover: Annotated[
        str | None, typer.Option(help="As latents, or as frames (encoded again).", show_default="latents")
    ] = None,
    show_input: Annotated[bool | None, typer.Option(help="Beside the result, in its video.", show_default="no")] = None,
    show_controls: Annotated[bool | None, typer.Option(help="The same of the controls.", show_default="no")] = None,
    again: Annotated[bool, typer.Option(help="Make videos again that are there.")] = False,
    keep_going: Annotated[bool, typer.Option(help="After a job that failed, go on with the next.")] = True,
    depth_model: Annotated[str | None, _DepthModel] = None,
    detector: Annotated[str | None, _Detector] = None,
    tracker: Annotated[str | None, _Tracker] = None,
    preset: opt.Preset = None,
    speed: opt.Speeds = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    branch: Annotated[Words, _Branches] = None,
    lora: opt.Loras = None,
    vae: opt.Vae = None,
    text: opt.Text = None,
    like: opt.Like = None,
    image_encoder: Annotated[
        str | None, typer.Option(help="Take the encoder of --image from here.", show_default="SigLIP2")
    ] = None,
    conventions: opt.Conventions = None,
    placement: opt.Placement = None,
    embeddings: opt.Embeddings = None,
) -> None:
    """Draw videos anew: control signals hold the structure, the prompt says how it looks (Sim2Real, Real2Real).

    Official control-spec files run unchanged; they were written for --model transfer2.5-2b. The flags do the same
    without a file; with files they change a setting of all jobs, but not their controls. All is checked before the
    first begins. A job whose video is there is skipped, so the same command goes on where a stopped one was.

    Writes of each NAME.mp4 (.png for one frame), and beside it .control-KIND.mp4 (to be given to --control again),
    .beside.mp4 and .sheet.png (input, controls, result) and .json (all settings).

    Example: orrery transfer robot_spec.json -o videos --model transfer2.5-2b

    Example: orrery transfer --prompt "a kitchen at dawn" --input sim.mp4 --control edge:0.5 --control depth=depth.npz
    -o kitchen.mp4 --model transfer2.5-2b
    """
    from orrery.cli.tasks import Drawing, check_outputs, is_done, make_tasks

    wanted = opt.parse_size(size, None)
    if size is not None and resolution is not None:
        opt.parse_size(size, resolution)
    values: tuple[Any, ...] = (
        prompt, input, negative_prompt, seed, guidance, steps, resolution, frames, chunk, image, image_frame, sigma_max,
        hold, hold_until, hold_label or None, keep_size, show_controls, show_input,
    )  # fmt: skip
    blocks = control_blocks(control, mask, mask_prompt, strength, seg_prompt)
    jobs = _asked_for(specs or [], output, dict(zip(CALLED, values, strict=True)), blocks)
    sources: dict[str, Any] = dict(vae=vae, text=text, image=image_encoder, like=like, conventions=conventions)
    branches = _branches(model, jobs, branch)
    choice = dict(model=model, loras=lora or [], dtype=dtype, branches=branches, **sources)
    choice |= dict(depth_model=depth_model, detector=detector, tracker=tracker, preset=preset, speed=speed or [])
    opt.parse_loras(lora)
    tasks = make_tasks(jobs, output, Drawing(wanted, fps, overlap, handover))
    left = [task for task in tasks if again or not is_done(task, choice)]
    if not left:
        typer.echo(f"all {len(tasks)} videos are in {output} (--again makes them again)")
        return
    made = _make_folder(output) if tasks[0].output != output else False
    try:
        check_outputs(left, specs or [])
        models = None
        for part in _alike(model, left, branches, sources):
            began = time.perf_counter()
            needed = {kind: path for kind, path in branches.items() if any(kind in task.spec.kinds for task in part)}
            options = dict(dtype=dtype, placement=placement, embeddings=embeddings, controls=needed, **sources)
            world = opt.load_world(model, device, lora, preset, speed, **options)
            models = models or signal_models(depth_model, detector, tracker, device)
            draw_all(world, part, models, choice, time.perf_counter() - began, keep_going)
            del world
    finally:
        if made:
            with suppress(OSError):
                output.rmdir()  # if nothing came of it
    if len(tasks) > len(left):
        typer.echo(f"{len(tasks) - len(left)} videos were there")


def control_blocks(
    controls: Words, masks: Words, mask_prompts: Words, strengths: Words, seg_prompt: str | None
) -> dict[str, dict[str, Any]]:
    """The control blocks of a spec, from the options.

    Raises:
        InputError: an option that is not of its form, an unknown kind, one that is named twice or is no --control.
    """
    from orrery.errors import InputError

    blocks: dict[str, dict[str, Any]] = {}
    for value in controls or []:
        kind, path, weight = _parse_control(value)
        if kind in blocks:
            raise InputError(f"--control names {kind} twice")
        blocks[kind] = {"control_path": path, "control_weight": weight}
    for option, key, values in (("--mask", "mask_path", masks), ("--mask-prompt", "mask_prompt", mask_prompts)):
        for kind, text in _parse_pairs(option, values, blocks).items():
            blocks[kind][key] = text
    presets = {"edge": "preset_edge_threshold", "blur": "preset_blur_strength"}
    for kind, text in _parse_pairs("--strength", strengths, blocks).items():
        if kind not in presets:
            raise InputError(f"--strength is for edge and blur, got {kind}={text}")
        if blocks[kind]["control_path"] is not None:
            raise InputError(f"--strength {kind}={text} is for a control made of the input; --control gives a file")
        blocks[kind][presets[kind]] = text
    if seg_prompt is not None:
        if "seg" not in blocks or blocks["seg"]["control_path"] is not None:
            raise InputError("--seg-prompt is for --control seg without a file, which makes it of the input")
        blocks["seg"]["control_prompt"] = seg_prompt
    return blocks


def _parse_control(value: str) -> tuple[str, str | None, float]:
    """Kind, file and weight of KIND[=FILE][:WEIGHT]."""
    from orrery.errors import InputError
    from orrery.kinds import control_kind

    name, equals, path = value.partition("=")
    before, colon, number = (path if equals else name).rpartition(":")
    weight = 1.0
    if colon and not (equals and Path(path).exists()):
        try:
            weight = float(number)
        except ValueError:
            raise InputError(f"--control must be KIND[=FILE][:WEIGHT] with a number, got {value!r}") from None
        name, path = (name, before) if equals else (before, "")
    if equals and not path:
        raise InputError(f"--control must be KIND[=FILE][:WEIGHT], got {value!r}")
    return control_kind(name), path or None, weight


def _parse_pairs(option: str, values: Words, blocks: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Kind -> text of each KIND=TEXT; blocks: of the kinds that can be named."""
    from orrery.errors import InputError
    from orrery.kinds import control_kind

    found: dict[str, str] = {}
    for value in values or []:
        name, equals, text = value.partition("=")
        if not (equals and text):
            raise InputError(f"{option} must be KIND=..., such as edge=..., got {value!r}")
        kind = control_kind(name)
        if kind in found:
            raise InputError(f"{option} names {kind} twice")
        if blocks is not None and kind not in blocks:
            raise InputError(f"{option} {value} needs --control {kind}")
        found[kind] = text
    return found


def _asked_for(
    files: Sequence[Path], output: Path, overrides: Mapping[str, Any], blocks: Mapping[str, Any]
) -> "list[TransferSpec]":
    """The specs of the files, or the one of the flags."""
    from orrery.errors import InputError
    from orrery.specs import make_spec, read_specs

    if files:
        if blocks:
            raise InputError(f"--control {next(iter(blocks))} does not go with spec files: controls stand in them")
        return read_specs(files, overrides, CALLED)
    if not blocks:
        raise InputError(
            "there is no control: name a spec file, or --prompt, --input and at least one of --control edge, blur, "
            "depth, seg"
        )
    from orrery.cli.tasks import is_folder

    named = overrides["video_path"] if is_folder(output) else output
    return [make_spec({"name": named.stem if named else "video", **blocks}, overrides, CALLED)]


def _branches(model: str, jobs: "Sequence[TransferSpec]", given: Words) -> dict[str, str | None]:
    """Where the control branches are that the jobs need together; None: with the model.

    Raises:
        InputError: a named model does not have them.
    """
    from orrery.errors import InputError
    from orrery.kinds import KINDS
    from orrery.weights import CATALOGUE

    asked = {kind for job in jobs for kind in job.kinds}
    elsewhere = _parse_pairs("--branch", given)
    if unused := [kind for kind in elsewhere if kind not in asked]:
        raise InputError(f"--branch names {', '.join(unused)}, which no job asks for")
    needed = {kind: elsewhere.get(kind) for kind in KINDS if kind in asked}
    if (entry := CATALOGUE.get(model)) is not None and not entry.unsupported:
        own = entry.kinds
        if lacking := [kind for kind, path in needed.items() if path is None and kind not in own]:
            able = [name for name, each in CATALOGUE.items() if set(lacking) <= set(each.kinds)]
            raise InputError(
                f"model {model!r} has no control branch for {', '.join(lacking)}; it has: {', '.join(own) or 'none'}. "
                f"Models that do: {', '.join(able) or 'none'}"
            )
    return needed


def _alike(
    model: str, tasks: "Sequence[Task]", branches: Mapping[str, str | None], sources: Mapping[str, Any]
) -> "list[list[Task]]":
    """The tasks that one loaded model can draw: all; or those with the same kinds, where a job with one control has
    image context, which published models drop for several: no result may depend on the jobs beside it."""
    from orrery.weights.sources import find_model

    together: dict[tuple[str, ...], list[Task]] = {}
    for task in tasks:
        together.setdefault(tuple(sorted(task.spec.kinds)), []).append(task)
    alone = next((kinds for kinds in together if len(kinds) == 1), None)
    if alone is None or len(together) == 1:
        return [list(tasks)]
    files = find_model(model, controls={kind: branches[kind] for kind in alone}, **sources)
    return list(together.values()) if files.config.transformer.image_context else [list(tasks)]


def _make_folder(folder: Path) -> bool:
    """Whether it had to be made."""
    from orrery.errors import InputError

    there = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from error
    return not there


def signal_models(depth: str | None, detector: str | None, tracker: str | None, device: str | None) -> "Models":
    """What makes depth and segmentation; nothing is loaded before it is needed."""
    from orrery.control.grounded import DETECTOR, TRACKER, GroundedSam2
    from orrery.control.models import DEPTH, DepthAnything, Models

    segmentation = GroundedSam2(detector or DETECTOR, tracker or TRACKER, device)
    return Models(DepthAnything(depth or DEPTH, device), segmentation)


def draw_all(
    world: "World",
    tasks: "Sequence[Task]",
    models: "Models",
    choice: Mapping[str, Any],
    loading: float,
    keep_going: bool,
) -> None:
    """Draw the tasks, one after the other; what is finished stays, whatever happens then.

    Raises:
        InputError: before the first is drawn, something that cannot be.
        OrreryError: after the last, which jobs failed.
    """
    from orrery.cli.tasks import trial
    from orrery.errors import OrreryError

    trials = [trial(world, task) for task in tasks]
    failed = []
    for number, task in enumerate(tasks):
        if number % TOGETHER == 0:
            world.prepare([each.base for each in trials[number : number + TOGETHER]])
        began = time.perf_counter()
        where = f"{number + 1}/{len(tasks)}"
        try:
            draw(world, task, models, choice, loading if number == 0 else 0.0, f"{where} {task.spec.name}")
        except OrreryError as error:
            if not keep_going or len(tasks) == 1:
                raise
            failed.append(task.spec.name)
            typer.echo(f"{where} {task.spec.name} failed: {error}", err=True)
            continue
        seconds = time.perf_counter() - began
        frames = f"{task.footage.drawn} frame{'s' * (task.footage.drawn != 1)}"
        typer.echo(f"{where} {task.output}: {frames} after {', '.join(task.weights)}, {seconds:.1f} s")
    if failed:
        raise OrreryError(f"{len(failed)} of {len(tasks)} jobs failed: {', '.join(failed)}")


def draw(world: "World", task: "Task", models: "Models", choice: Mapping[str, Any], loading: float, title: str) -> None:
    """One task: its controls made, the video drawn, with a progress bar, and all its files written."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orrery.cli.outputs import write_transfer
    from orrery.cli.tasks import describe_transfer, real_request

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    began = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        row = bar.add_task(f"{title}: controls", total=None)
        request = real_request(world, task, models)
        ready = time.perf_counter()
        bar.update(row, description=title)
        result = world.run_transfer(request, lambda done, total: bar.update(row, completed=done, total=total))
        drawn = time.perf_counter()
        bar.update(row, description=f"{title}: writing")
        seconds = {"loading": loading, "controls": ready - began, "drawing": drawn - ready}
        seconds = {what: round(value, 2) for what, value in seconds.items()}
        record = describe_transfer(world, task, request, result, models, seconds)
        record |= {"asked": task.asked(choice)}
        write_transfer(task.output, result, task.weights, record, task.spec.show_input, task.spec.show_controls)
