"""`orrery generate`: a video, a contact sheet, and a record of everything that made them."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from orrery.cli import options as opt


def run(
    prompt: Annotated[str, typer.Argument(help="What there is and what it does.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The .mp4 to write; a .png for one frame.", show_default=False)
    ],
    start: Annotated[
        Path | None, typer.Option(help="How it begins: an image, or a video whose last 5 frames are continued.")
    ] = None,
    model: opt.Model = "mini",
    seed: Annotated[int, typer.Option(help="Another seed, another video; the same seed, the same video.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Solver steps.", show_default="the model's")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How hard to follow the prompt; 0: not beyond it.", show_default="the model's")
    ] = None,
    frames: Annotated[
        int | None, typer.Option(help="Length, 4k + 1; 1 draws a picture.", show_default="the model's")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to lead away from.", show_default="the model's")
    ] = None,
    size: opt.Size = None,
    resolution: opt.Resolution = None,
    aspect: opt.Aspect = "16:9",
    scale: Annotated[
        int | None, typer.Option(help="Enlarge so many times for the eye.", show_default="so that it is easy to see")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="unipc or euler.", show_default="the model's")] = None,
    schedule: Annotated[str | None, typer.Option(help="shift or karras.", show_default="the model's")] = None,
    shift: Annotated[float | None, typer.Option(help="Of the schedule shift.", show_default="the model's")] = None,
    handover: Annotated[
        str, typer.Option(help="What a chunk of a long video hands on: latents, or frames (encoded again).")
    ] = "latents",
    overlap: Annotated[int, typer.Option(help="How many latents a chunk of a long video hands on: 1 or 2.")] = 2,
    preset: opt.Preset = None,
    speed: opt.Speeds = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show where it leads while it is drawn: OUTPUT's name with .preview.png.")
    ] = False,
    preview_decoder: Annotated[
        Path | None,
        typer.Option(help="For --preview: another decoder, such as taew2_1.pth.", show_default="the model's"),
    ] = None,
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
    """Simulate what happens next.

    Writes OUTPUT (H.264, plays in a browser), beside it OUTPUT's name with .sheet.png (a contact sheet) and with .json
    (all settings). Many at once, from files of jobs: `orrery batch`.

    Example: orrery generate "a red ball falls and bounces" --seed 1 -o ball.mp4
    """
    from orrery.cli.outputs import Preview, check_output, companions, generate_to, is_image

    wanted = opt.parse_size(size, resolution, aspect)
    check_output(output, start, scale)
    if is_image(output) and frames is None:
        frames = 1
    settings: dict[str, Any] = dict(
        start=start, seed=seed, steps=steps, guidance=guidance, frames=frames, size=wanted, solver=solver
    )
    settings |= dict(schedule=schedule, shift=shift, negative_prompt=negative_prompt)
    settings |= dict(handover=handover, overlap=overlap)
    began = time.perf_counter()
    sources: dict[str, Any] = dict(vae=vae, text=text, like=like, conventions=conventions)
    sources |= dict(dtype=dtype, placement=placement, embeddings=embeddings)
    world = opt.load_world(model, device, lora, preset, speed, **sources)
    sketches = None
    if preview or preview_decoder is not None:
        world.use_preview(preview_decoder)
        sketches = Preview(output.with_suffix(".preview.png"))
        typer.echo(f"{sketches.path}: what it will be, step by step", err=True)
    loading = time.perf_counter() - began
    video = generate_to(output, world, prompt, scale, loading, show=sketches, **settings)
    sheet, log = companions(output)
    typer.echo(f"{output}: {len(video)} frames at {video.fps:g} a second, by {world.name} on {world.device}")
    typer.echo(f"{sheet}: contact sheet; {log}: all settings; {time.perf_counter() - began:.1f} s in all")
    if not world.speed.exact:
        typer.echo(f"speed: {world.speed}; {world.spent}")
