"""`orrery batch`: many generations, from the official inference files."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orrery.cli import options as opt

if TYPE_CHECKING:
    from orrery.jobs import Job
    from orrery.world import Request, World

TOGETHER = 32  # jobs whose prompts are encoded in one visit of the text encoder


def run(
    jobs: Annotated[
        list[Path], typer.Argument(help="Official inference files: .json, .jsonl or .yaml.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for NAME.mp4 of each job.", show_default=False)
    ],
    model: opt.Model = "predict2.5-2b",
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of all jobs, e.g. --set num_steps=10."),
    ] = None,
    again: Annotated[bool, typer.Option(help="Make jobs again whose video is there.")] = False,
    keep_going: Annotated[bool, typer.Option(help="After a job that failed, go on with the next.")] = True,
    scale: Annotated[
        int | None, typer.Option(help="Enlarge so many times.", show_default="so it is easy to see")
    ] = None,
    preset: opt.Preset = None,
    speed: opt.Speeds = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    lora: opt.Loras = None,
    vae: opt.Vae = None,
    text: opt.Text = None,
    like: opt.Like = None,
    conventions: opt.Conventions = None,
    placement: opt.Placement = None,
    embeddings: opt.Embeddings = None,
) -> None:
    """Generate every job of the official inference files, unchanged.

    All files are read and all jobs are checked before the first begins. A job whose video is in the folder already is
    skipped, so the same command goes on where a stopped one was. num_output_frames counts where it is stated (the
    official code always gives 93), to the frame; long videos are chained in latent space.

    Example: orrery batch robot_pouring.json more.jsonl -o videos --model predict2.5-2b
    """
    from orrery.cli.outputs import check_output, generate_to
    from orrery.errors import InputError, OrreryError
    from orrery.jobs import read_jobs

    todo = read_jobs(jobs, _overrides(sets))
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror}") from error
    left = [job for job in todo if again or not _place(output, job).is_file()]
    if not left:
        typer.echo(f"all {len(todo)} videos are in {output} (--again makes them again)")
        return
    for job in left:
        check_output(_place(output, job), job.start, scale)
    sources: dict[str, Any] = dict(vae=vae, text=text, like=like, conventions=conventions)
    sources |= dict(dtype=dtype, placement=placement, embeddings=embeddings)
    world = opt.load_world(model, device, lora, preset, speed, **sources)
    requests = [_checked(world, job) for job in left]
    failed = []
    for number, job in enumerate(left, start=1):
        began = time.perf_counter()
        if number % TOGETHER == 1:
            world.prepare(requests[number - 1 : number - 1 + TOGETHER])
        try:
            generate_to(_place(output, job), world, job.prompt, scale, cut=job.frames, **_settings(world, job))
        except OrreryError as error:
            if not keep_going:
                raise
            failed.append(job.name)
            typer.echo(f"{number}/{len(left)} {job.name} failed: {error}", err=True)
            continue
        typer.echo(f"{number}/{len(left)} {_place(output, job)}, {time.perf_counter() - began:.1f} s")
    skipped = f", {len(todo) - len(left)} were there" if len(todo) > len(left) else ""
    typer.echo(f"{len(left) - len(failed)} videos made{skipped}")
    if failed:
        raise OrreryError(f"{len(failed)} of {len(left)} jobs failed: {', '.join(failed)}")


def _checked(world: "World", job: "Job") -> "Request":
    """What a job asks for; InputError with the job's file where it cannot be."""
    from orrery.errors import InputError

    try:
        return world.request(job.prompt, **_settings(world, job))
    except InputError as error:
        raise InputError(f"{job.source}: {error}") from error


def _overrides(sets: list[str] | None) -> dict[str, str]:
    from orrery.errors import InputError

    found = {}
    for value in sets or []:
        key, equals, text = value.partition("=")
        if not equals:
            raise InputError(f"--set must be KEY=VALUE, got {value!r}")
        found[key] = text
    return found


def _place(output: Path, job: "Job") -> Path:
    return output / f"{job.name}{'.png' if job.frames == 1 else '.mp4'}"


def _settings(world: "World", job: "Job") -> dict[str, Any]:
    """Arguments of `World.generate`. Frames that are not 4k + 1 are drawn up to the next such number, and cut."""
    from orrery.video import VIDEO_SUFFIXES, Video

    start: Any = job.start
    if job.start is not None and job.start_kind == "image" and job.start.suffix.lower() in VIDEO_SUFFIXES:
        start = Video.read(job.start, last=1)
    settings: dict[str, Any] = dict(
        start=start,
        seed=job.seed,
        steps=job.steps,
        guidance=job.guidance,
        negative_prompt=job.negative_prompt,
        size=job.size,
        frames=job.frames,
    )
    if job.frames is not None:
        factor = world.factors.temporal
        settings["frames"] = -(-(job.frames - 1) // factor) * factor + 1
    if job.chunk_overlap is not None:
        settings["overlap"] = min(max(job.chunk_overlap, 1), 2)
    return settings
