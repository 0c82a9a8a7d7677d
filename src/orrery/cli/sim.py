"""`orrery sim`: a simulated clip with all its ground truth, or a dataset of them."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    scene: Annotated[
        str,
        typer.Argument(
            help="drop (objects fall), push (an arm), drive (three cameras), tabletop (robots of mixed skill)"
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")],
    seed: Annotated[int, typer.Option(help="first seed; the same seed gives the same physics in both looks")] = 0,
    look: Annotated[str | None, typer.Option(help="plain or real; default: drawn from the seed")] = None,
    size: Annotated[int, typer.Option(help="width and height in pixels")] = 64,
    frames: Annotated[int, typer.Option(help="frames a clip, 12 a second")] = 17,
    clips: Annotated[int | None, typer.Option(help="write a dataset of so many clips, seeds counting up")] = None,
    workers: Annotated[int, typer.Option(help="processes that make a dataset")] = 1,
    without: Annotated[str, typer.Option(help="ground truth to leave out: depth,segmentation")] = "",
) -> None:
    """Simulate SCENE with MuJoCo. One clip: OUTPUT/rgb.mp4, depth, segmentation, actions, cameras, poses, caption.txt
    (drive: map and boxes too) and a contact sheet. With --clips, a dataset: one such folder a clip and index.jsonl; run
    again, it goes on where it stopped.

    Example: orrery sim push --seed 7 -o push7
    """
    from orrery.errors import InputError
    from orrery.sim.simulate import simulate
    from orrery.sim.store import check_place, leave_out, write_clip, write_dataset

    dropped = {word for word in without.split(",") if word}
    if unknown := dropped - {"depth", "segmentation"}:
        raise InputError(f"--without {','.join(sorted(unknown))}: allowed are depth and segmentation")
    if clips is None:
        check_place(output)
        clip = leave_out(simulate(scene, seed, look, size, frames), dropped)
        write_clip(clip, output)
        typer.echo(f"{clip.caption}\n{output}/rgb.mp4 and its ground truth; look at {output}/sheet.png")
        return
    if clips < 1 or workers < 1:
        raise InputError(f"--clips {clips} --workers {workers}: both must be at least 1")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(scene), BarColumn(), MofNCompleteColumn(), TextColumn("clips"), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(scene, total=clips)
        made = write_dataset(
            output, scene, range(seed, seed + clips), workers, {"depth", "segmentation"} - dropped,
            lambda done, _: bar.update(task, completed=done), look=look, size=size, frames=frames,
        )  # fmt: skip
    typer.echo(f"{made} clips made, {clips - made} were there; {output}/index.jsonl")
