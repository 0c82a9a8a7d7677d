"""`orrery plan`: what a generation needs of a GPU, before anything is loaded."""

from typing import TYPE_CHECKING, Annotated

import typer

from orrery.cli import options as opt

if TYPE_CHECKING:
    from rich.table import Table

    from orrery.weights import ModelConfig
    from orrery.world.plan import Needs, Plan

CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
GIB = 2**30


def run(
    model: Annotated[str, typer.Argument(help="A name, a folder, a file, OWNER/NAME.", show_default=False)],
    size: opt.Size = None,
    resolution: opt.Resolution = None,
    aspect: opt.Aspect = "16:9",
    frames: Annotated[int | None, typer.Option(help="Length, 4k + 1.", show_default="the model's")] = None,
    memory: Annotated[
        float | None, typer.Option(help="GiB of the GPU to plan for.", show_default="the one at hand, and usual sizes")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    quantise: Annotated[
        str | None, typer.Option(help="Weights of the transformer in 8 bits: int8 or fp8.", show_default="as they are")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="A control branch that acts: edge, blur, depth, seg; for several, again. Default: all.",
        ),
    ] = None,
) -> None:
    """Peak memory of every stage, and how it is placed on GPUs of usual sizes. Nothing is loaded or downloaded.

    The figures come from running the networks on tensors without numbers, so they are of this code at this size; a
    margin of 8 % and 0.6 GiB is kept for the driver, workspaces and fragmentation.

    Example: orrery plan predict2.5-2b --resolution 720 --memory 24
             orrery plan transfer2.5-2b --control edge
             orrery plan predict2.5-14b --memory 24 --quantise int8
    """
    from orrery.errors import InputError

    opt.check_name(model)
    wanted = opt.parse_size(size, resolution, aspect)
    if memory is not None and not memory > 0:
        raise InputError(f"--memory must be above 0 GiB, got {memory}")
    from rich.console import Console

    from orrery.nn.quantise import WAYS
    from orrery.weights import find_model
    from orrery.world.devices import DTYPES
    from orrery.world.plan import Shape, make_plan, measure
    from orrery.world.request import Factors, check_frames, check_size

    if quantise not in (None, *WAYS):
        raise InputError(f"--quantise must be one of {', '.join(WAYS)}, got {quantise!r}")
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    config = find_model(model, controls=control).config
    factors = Factors.of(config)
    height, width = check_size(config, factors, wanted)
    total = check_frames(config, factors, frames, None)
    drawn = min(total, config.frames) if config.any_length else config.frames
    branches, texts = tuple(config.controls.values()), 2 if config.sampling.guidance > 0 else 1
    # A control video is encoded as long as what is drawn at once; a start is 5 frames at most.
    shape = Shape((height, width), drawn, drawn if branches else 5, texts, branches, quantise)
    numbers, vae_numbers = DTYPES[dtype], DTYPES[config.vae_dtype]
    plans = [(label, make_plan(config, shape, size, numbers, vae_numbers)) for label, size in _memories(memory)]
    length = f"{total} frames" + f" in chunks of {drawn}" * (total > drawn)
    controls = f", control by {', '.join(config.controls)}" * bool(branches)
    console = Console()
    numerals = dtype if quantise is None else f"{dtype} and {quantise}"
    console.print(
        f"{model}, {height}x{width}, {length}{controls}, {numerals} (VAE {config.vae_dtype})", highlight=False
    )
    console.print(_told(config), highlight=False)
    console.print(_stages(measure(config, shape, numbers, vae_numbers)), highlight=False)
    console.print()
    console.print(_cards(plans), highlight=False)


def _told(config: "ModelConfig") -> str:
    """A line about the actions of a model that is told them; "" for another."""
    actions = config.actions
    if actions is None:
        return ""
    frames, names = 1 + (actions.window - 1) * config.vae.temporal_factor, ", ".join(actions.names)
    return (
        f"told actions: {actions.dimensions} numbers a frame ({names}), {config.transformer.actions} a latent frame; "
        f"a rollout sees {actions.window} latent frames at once, {frames} frames\n"
    )


def _memories(asked: float | None) -> list[tuple[str, float]]:
    """Names and bytes of the GPUs to plan for."""
    import torch

    from orrery.world.plan import device_bytes

    cards: list[tuple[str, float]] = [(f"{size} GiB", size * GIB) for size in ([asked] if asked else CARDS)]
    if asked is None and torch.cuda.is_available():
        cards.insert(0, (torch.cuda.get_device_name(), device_bytes(torch.device("cuda"))))
    return cards


def _table(*columns: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if "GiB" in column else "left")
    return table


def _stages(needs: "Needs") -> "Table":
    """Weights and peaks, a row a stage."""
    table = _table("stage", "weights GiB", "peak beyond them GiB")
    for name, weights, peak, other in (
        ("text encoder", needs.text, needs.text_peak, ""),
        (
            "transformer",
            needs.transformer,
            needs.transformer_peak,
            f"guidance in one batch: {needs.batch_peak / GIB:.2f}",
        ),
        ("VAE", needs.vae, needs.vae_peak, f"in tiles: {needs.tile_peak / GIB:.2f}"),
    ):
        table.add_row(name, f"{weights / GIB:.2f}", f"{peak / GIB:.2f}" + (f" ({other})" if other else ""))
    return table


def _cards(plans: list[tuple[str, "Plan"]]) -> "Table":
    """Whether and how it fits, a row a GPU."""
    table = _table("GPU", "fits", "peak GiB", "how")
    for label, plan in plans:
        table.add_row(label, "yes" if plan.fits else "no", f"{plan.peak / GIB:.1f}", str(plan).split(";")[0])
    return table
