"""`orrery models`: what there is to generate with."""

from typing import Annotated

import typer


def run(
    model: Annotated[
        str | None, typer.Argument(help="A name or a folder: describe this one.", show_default=False)
    ] = None,
) -> None:
    """List the models, or describe one: sizes, sampling, the words it knows, where its weights lie.

    Example: orrery models mini
    """
    from orrery.weights import CATALOGUE

    if model is not None:
        describe(model)
        return
    for entry in CATALOGUE.values():
        typer.echo(f"{entry.name:8} {entry.summary}{'' if entry.available else ' (weights missing)'}")
    typer.echo("A folder that holds a model's config.json is a model too; `orrery models NAME` says more.")


def describe(model: str) -> None:
    """Print what a model's folder says about it."""
    from orrery.weights import find_model

    folder = find_model(model)  # a wrong name is told before torch is imported
    from orrery.weights import load_model, model_hash

    loaded = load_model(folder)
    config, sampling = loaded.config, loaded.config.sampling
    height, width = config.resolution
    typer.echo(f"{model}: {folder}")
    typer.echo(f"  hash         {model_hash(folder)}")
    typer.echo(f"  native size  {height}x{width}, {config.frames} frames at {config.fps:g} a second")
    for name in ("transformer", "vae", "text"):
        count = sum(weight.numel() for weight in getattr(loaded, name).parameters())
        typer.echo(f"  {name:11}  {count / 1e6:.2f} M parameters")
    typer.echo(f"  sampling     {sampling.solver}, {sampling.steps} steps, guidance {sampling.guidance:g}")
    if loaded.text.unknown_words("\N{REPLACEMENT CHARACTER}"):  # it reads a closed list of words
        words = sorted(word for word in loaded.text.tokenizer.get_vocab() if word.isalnum())
        typer.echo(f"  words        {' '.join(words)}")
    typer.echo(f"  model card   {folder / 'README.md'}")
