"""`orrery convert`: a model from one format to another."""

from pathlib import Path
from typing import Annotated

import typer

from orrery.cli import options as opt


def run(
    source: Annotated[
        str, typer.Argument(help="A name, a model folder, an official .pt, a diffusers directory.", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(help="The folder or the .pt to write.", show_default=False)],
    to: Annotated[
        str | None,
        typer.Option(help="orrery, diffusers or official.", show_default="official for a .pt, else orrery"),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(help="Of transformer,vae,text, which to write.", show_default="those that lie with the model"),
    ] = None,
    vae: opt.Vae = None,
    text: opt.Text = None,
    like: opt.Like = None,
) -> None:
    """Write SOURCE in another format: official .pt, diffusers directory, or a folder of ours (safetensors).

    Tensors keep their dtype and their bits. An official .pt holds the transformer alone; the VAE and the text encoder
    that all published models share are copied only if --parts names them. With --parts vae, an official file is Wan's.

    Example: orrery convert finetuned.pt finetuned-diffusers --to diffusers
    """
    opt.check_name(source)
    from orrery.weights import convert, find_model

    kind = to or ("official" if destination.suffix in (".pt", ".pth") else "orrery")
    names = None if parts is None else [name for name in parts.split(",") if name]
    files = find_model(source, vae=vae, text=text, like=like)
    written = convert(files, destination, kind, names, report=lambda line: typer.echo(f"  {line}", err=True))
    typer.echo(f"{written}: {source} in the {kind} format")
