"""`orrery train RECIPE`: run a training recipe, or continue it."""

from pathlib import Path
from typing import Annotated

import typer


def run(
    recipe: Annotated[
        Path, typer.Argument(help="The recipe, a TOML file such as recipes/mini-vae.toml.", show_default=False)
    ],
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, e.g. --set optimizer.lr=0.001."),
    ] = None,
    max_seconds: Annotated[float | None, typer.Option(min=1, help="Stop and save after so many seconds.")] = None,
    refresh_data: Annotated[bool, typer.Option(help="Take up clips added to the dataset since the run began.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Train nothing: write the newest checkpoint's EMA weights to DIR."),
    ] = None,
) -> None:
    """Train the VAE or the transformer. The same command continues a run that was stopped or killed, bit for bit."""
    from orrery.train.start import train

    train(recipe, sets or (), max_seconds, refresh_data, export)
