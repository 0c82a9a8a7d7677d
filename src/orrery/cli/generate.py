"""`orrery generate`: a video, a contact sheet, and a record of everything that made them."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from orrery.errors import InputError


def run(
    prompt: Annotated[str, typer.Argument(help="What there is and what it does.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .mp4 to write.", show_default=False)],
    start: Annotated[
        Path | None, typer.Option(help="How it begins: an image, or a video whose last 5 frames are continued.")
    ] = None,
    model: Annotated[str, typer.Option(help="A name from `orrery models`, or the folder of a model.")] = "mini",
    seed: Annotated[int, typer.Option(help="Another seed, another video; the same seed, the same video.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Solver steps.", show_default="the model's")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="How hard to follow the prompt; 0: not beyond it.", show_default="the model's")
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Length, 4k + 1.", show_default="the model's")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to lead away from.", show_default="the model's")
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="HxW", help="Size.", show_default="the model's")] = None,
    scale: Annotated[
        int | None, typer.Option(help="Enlarge so many times for the eye.", show_default="so that it is easy to see")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if any")] = None,
) -> None:
    """Simulate what happens next.

    Writes OUTPUT (H.264, plays in a browser), beside it OUTPUT's name with .sheet.png (a contact sheet) and with .json
    (all settings).

    Example: orrery generate "a red ball falls and bounces" --seed 1 -o ball.mp4
    """
    from orrery.cli.outputs import check_output, companions, generate_to
    from orrery.weights import find_model

    check_output(output, start, scale)
    find_model(model)
    options: dict[str, Any] = dict(
        start=start, seed=seed, steps=steps, guidance=guidance, frames=frames, size=_size(size)
    )
    began = time.perf_counter()
    import orrery

    world = orrery.load(model, device)
    loading = time.perf_counter() - began
    video = generate_to(output, world, prompt, scale, loading, negative_prompt=negative_prompt, **options)
    sheet, log = companions(output)
    typer.echo(f"{output}: {len(video)} frames at {video.fps:g} a second, by {world.name} on {world.device}")
    typer.echo(f"{sheet}: contact sheet; {log}: all settings; {time.perf_counter() - began:.1f} s in all")


def _size(text: str | None) -> tuple[int, int] | None:
    """(H, W) of "HxW"."""
    if text is None:
        return None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--size must be HEIGHTxWIDTH, such as 128x128, got {text!r}")
    return int(height), int(width)
