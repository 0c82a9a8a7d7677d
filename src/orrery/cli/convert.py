"""`orrery convert`: a model from one format to another."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from orrery.cli import options as opt

Controls = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND[=PATH]", help="Control branch: edge, blur, depth or seg, from PATH if given. Repeatable.",
        show_default="all that the model has",
    ),
]  # fmt: skip


def parse_controls(values: list[str] | None) -> dict[str, str | None] | None:
    """Kind -> path, or None for the model's own, of each KIND or KIND=PATH; "none" alone for no branch.

    Raises:
        InputError: an unknown kind.
    """
    if not values:
        return None
    from orrery.kinds import control_kind

    if values == ["none"]:
        return {}
    pairs = [value.partition("=") for value in values]
    return {control_kind(name): path or None for name, _, path in pairs}


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
        typer.Option(
            help="Of transformer,vae,text,control-KIND, which to write.", show_default="those that lie with the model"
        ),
    ] = None,
    control: Controls = None,
    vae: opt.Vae = None,
    text: opt.Text = None,
    like: opt.Like = None,
    lora: opt.Loras = None,
) -> None:
    """Write SOURCE in another format: official .pt, diffusers directory, or a folder of ours (safetensors).

    Tensors keep their dtype and their bits. An official .pt holds the transformer, with one control branch or none; the
    VAE and the text encoder that all published models share are copied only if --parts names them. With --parts vae, an
    official file is Wan's. LoRAs that are named are merged into the transformer.

    Example: orrery convert finetuned.pt finetuned-diffusers --to diffusers
    """
    opt.check_name(source)
    pairs = opt.parse_loras(lora)
    from orrery.weights import convert, find_model, read_lora
    from orrery.weights.sources import transformer_shapes

    kind = to or ("official" if destination.suffix in (".pt", ".pth") else "orrery")
    names = None if parts is None else [name for name in parts.split(",") if name]
    files = find_model(source, vae=vae, text=text, like=like, controls=parse_controls(control))
    shapes = transformer_shapes(files.config.transformer)
    loras = [read_lora(path, shapes, scale) for path, scale in pairs]
    written = convert(files, destination, kind, names, partial(typer.echo, err=True), loras)
    typer.echo(f"{written}: {source} in the {kind} format")
