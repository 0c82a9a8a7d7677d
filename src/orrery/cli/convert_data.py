"""`orrery convert-data`: episodes of a robot from one format to another."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The dataset to read.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.", show_default=False)],
    to: Annotated[str, typer.Option(help="lerobot (v3.0) or bridge", show_default=False)],
    camera: Annotated[str | None, typer.Option(help="Which camera of IN, where it has several.")] = None,
    robot: Annotated[str, typer.Option(help="What LeRobot is told the robot is.")] = "unknown",
) -> None:
    """Write the episodes of IN, one camera with actions, states and texts, to OUT. IN: clips of `orrery sim`, LeRobot
    v3.0 or v2.1, a Bridge folder. OUT is made whole or not at all; only a dataset that Orrery wrote is replaced.

    Example: orrery convert-data data/tabletop tabletop-lerobot --to lerobot
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orrery.data import bridge, lerobot_write
    from orrery.data.episodes import open_episodes
    from orrery.errors import InputError

    if to not in ("lerobot", "bridge"):
        raise InputError(f"--to {to}: allowed are lerobot and bridge")
    if target.resolve() in (source.resolve(), *source.resolve().parents):
        raise InputError(f"cannot write {target}: {source} is in it; choose another folder")
    episodes = open_episodes(source, camera)
    columns = (TextColumn("converting"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("converting", total=len(episodes))

        def progress(done: int) -> None:
            bar.update(task, completed=done)

        if to == "bridge":
            count = bridge.write_bridge(target, bridge.to_write(episodes), episodes.fps, progress=progress)
        else:
            key = getattr(episodes, "camera", "")
            key = key if str(key).startswith("observation.") else lerobot_write.CAMERA
            count = lerobot_write.write_lerobot(
                target, lerobot_write.to_write(episodes, key), episodes.fps, episodes.action_names, robot,
                getattr(episodes, "state_names", ()), progress,
            )  # fmt: skip
    typer.echo(f"{count} episodes; look at them with `orrery check-data {target} --sheet {target.name}.png`")
