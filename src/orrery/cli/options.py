"""Options that several verbs share: which model, on what, and what size."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orrery.errors import InputError

Model = Annotated[
    str, typer.Option(help="A name from `orrery models`, a model folder, an official .pt, a diffusers directory.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...", show_default="a GPU if any")]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="bfloat16 on a GPU, else float32")
]
Vae = Annotated[Path | None, typer.Option(help="Take the VAE from this file or folder.", show_default="the model's")]
Text = Annotated[Path | None, typer.Option(help="Take the text encoder from this folder.", show_default="the model's")]
Like = Annotated[
    str | None, typer.Option(help="For an official .pt: sample like this named model.", show_default="by its size")
]
Conventions = Annotated[
    str | None, typer.Option(help="Numerics: official or diffusers.", show_default="those of the source")
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", metavar="FILE[:SCALE]", help="Merge a LoRA (PEFT, diffusers or official). Repeatable."),
]
Placement = Annotated[
    str | None,
    typer.Option(help="Where networks live: resident, stages or blocks.", show_default="what fits, see `orrery plan`"),
]
Embeddings = Annotated[
    Path | None,
    typer.Option(
        envvar="ORRERY_EMBEDDINGS", help="Keep text embeddings in this folder: a prompt is encoded once.",
        show_default="not kept",
    ),
]  # fmt: skip
Preset = Annotated[
    str | None,
    typer.Option(
        help="How fast: exact (nothing but rounding), balanced or fast (with a stated error).",
        show_default="exact", rich_help_panel="Speed",
    ),
]  # fmt: skip
Speeds = Annotated[
    list[str] | None,
    typer.Option(
        "--speed", metavar="KEY[=VALUE]",
        help="One rung of it. Exact: attention=KERNEL, compile. Inexact: cache=ERROR (steps left out, up to that "
        "relative error), interval=LOW:HIGH (noise levels with guidance), steps=N, dtype=bfloat16, quantise=int8|fp8, "
        "sparse=2b|14b. Repeatable; docs/fast.md says what each costs.",
        rich_help_panel="Speed",
    ),
]  # fmt: skip
Size = Annotated[str | None, typer.Option(metavar="HxW", help="Size.", show_default="the model's")]
Resolution = Annotated[
    str | None, typer.Option(help="Size by name: 256, 480, 480p, 512, 720, 720p, 1024, 1080.", show_default=False)
]
Aspect = Annotated[str, typer.Option(help="With --resolution: 16:9, 9:16, 4:3, 3:4 or 1:1 (width to height).")]


def parse_size(size: str | None, resolution: str | None = None, aspect: str = "16:9") -> tuple[int, int] | None:
    """(H, W) of "HxW", or of a resolution and an aspect ratio; None for neither.

    Raises:
        InputError: both, or not of that form.
    """
    if size is not None and resolution is not None:
        raise InputError(f"--size {size} and --resolution {resolution} both say a size; give one")
    if resolution is not None:
        from orrery.weights import size_of

        return size_of(resolution, aspect)
    if size is None:
        return None
    height, _, width = size.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--size must be HEIGHTxWIDTH, such as 128x128, got {size!r}")
    return int(height), int(width)


def parse_loras(values: list[str] | None) -> list[tuple[str, float]]:
    """(path, scale) of each FILE[:SCALE].

    Raises:
        InputError: the scale is no number.
    """
    found = []
    for value in values or []:
        path, colon, scale = value.rpartition(":")
        if not colon or Path(value).exists():
            path, scale = value, "1"
        try:
            found.append((path, float(scale)))
        except ValueError:
            raise InputError(f"--lora must be FILE or FILE:SCALE with a number, got {value!r}") from None
    return found


def check_name(model: str) -> None:
    """Refuse, before torch is imported, what can be no model."""
    from orrery.weights import CATALOGUE, find_entry

    if model in CATALOGUE or not (Path(model).exists() or "/" in model):
        find_entry(model)


def load_world(
    model: str,
    device: str | None,
    loras: list[str] | None,
    preset: str | None = None,
    speeds: list[str] | None = None,
    **options: Any,
) -> Any:
    """`orrery.load` with the options of the command line.

    Raises:
        InputError: what `orrery.load` refuses; a preset that is none.
    """
    check_name(model)
    pairs = parse_loras(loras)
    import orrery
    from orrery.world.speed import PRESETS

    if preset is not None and preset not in PRESETS:
        raise InputError(f"--preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    speed = " ".join([preset or "exact", *(speeds or [])])
    return orrery.load(model, device, loras=pairs, speed=speed, **options)
