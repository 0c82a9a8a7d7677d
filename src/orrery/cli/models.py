"""`orrery models`: what there is to generate with."""

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from orrery.cli.convert import Controls, parse_controls
from orrery.cli.options import check_name

if TYPE_CHECKING:
    from orrery.weights import ModelConfig, ModelFiles


def run(
    model: Annotated[
        str | None, typer.Argument(help="A name, a folder, a file, OWNER/NAME: describe this one.", show_default=False)
    ] = None,
    control: Controls = None,
) -> None:
    """List the models with size and state, or describe one: networks, controls, actions, sampling, where its weights
    lie.

    Nothing is downloaded here, but for a hub repository's small files.

    Example: orrery models predict2.5-2b
    """
    if model is not None:
        describe(model, parse_controls(control))
        return
    from rich.console import Console
    from rich.table import Table

    from orrery.weights import CATALOGUE

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("GB", justify="right")
    table.add_column("state", no_wrap=True)
    table.add_column("what it is")
    for entry in CATALOGUE.values():
        controls = f"; controls: {', '.join(entry.kinds)}" if entry.kinds else ""
        actions = f"; actions: {', '.join(entry.action_names)}" if entry.action_names else ""
        table.add_row(entry.name, f"{entry.size / 1e9:.3g}", entry.state, entry.summary + controls + actions)
    Console().print(table)
    typer.echo(
        "\nA model folder, an official .pt, a diffusers directory and OWNER/NAME of a hub repository are models too."
    )
    typer.echo("The published ones share a VAE (0.5 GB) and a text encoder (16.6 GB), downloaded once.")
    typer.echo("`orrery models NAME` says more; `orrery plan NAME` what it needs of a GPU.")


def describe(model: str, controls: dict[str, str | None] | None = None) -> None:
    """Print what is known about a model without reading its weights.

    controls: as `find_model` takes them.
    """
    check_name(model)
    from orrery.weights import CATALOGUE, find_model
    from orrery.weights.sources import PARTS

    files = find_model(model, controls=controls)
    config, sampling = files.config, files.config.sampling
    height, width = config.resolution
    typer.echo(f"{model}: {CATALOGUE[model].summary if model in CATALOGUE else files.name}")
    typer.echo(f"  native size    {height}x{width}, {config.frames} frames at {config.fps:g} a second")
    for name, count in _parameters(config).items():
        typer.echo(f"  {name:13}  {count / 1e6:,.2f} M parameters")
    for line in (*_branches(model, files), *_actions(config)):
        typer.echo(line)
    typer.echo(
        f"  sampling       {sampling.solver}, {sampling.schedule} schedule, {sampling.steps} steps, "
        f"guidance {sampling.guidance:g}"
    )
    given = sampling.conditional_timestep
    typer.echo(f"  given frames are told {'the time of the others' if given is None else f'time {given:g} of 1000'}")
    for name in sorted(files.parts, key=lambda name: PARTS.index(name) if name in PARTS else len(PARTS)):
        typer.echo(f"  {name:13}  {files.parts[name].layout} layout, {files.parts[name].identity}")
    if files.folder is None:
        return
    from orrery.nn.text import PromptReader
    from orrery.weights import model_hash
    from orrery.weights.store import load_tokenizer

    typer.echo(f"  hash           {model_hash(files)}")
    reader = PromptReader(config.text, load_tokenizer(files.tokenizer()))
    if reader.unknown_words("\N{REPLACEMENT CHARACTER}"):  # it reads a closed list of words
        words = sorted(word for word in reader.tokenizer.get_vocab() if word.isalnum())
        typer.echo(f"  words          {' '.join(words)}")
    typer.echo(f"  model card     {files.folder / 'README.md'}")


def _branches(model: str, files: "ModelFiles") -> list[str]:
    """A line for each control branch: parameters, the base blocks that it acts on, channels of its latents, size."""
    config = files.config
    if not config.controls:
        return []
    from orrery.nn.control import ControlBranch
    from orrery.nn.empty import shapes_only

    lines = []
    for kind, control in config.controls.items():
        with shapes_only():
            count = sum(weight.numel() for weight in ControlBranch(config.transformer, control).parameters())
        places = ", ".join(map(str, control.places))
        size = _size(model, files, kind)
        what = f"{count / 1e6:,.2f} M parameters, after blocks {places}, {control.channels} channels{size}"
        lines.append(f"  {kind + ' branch':13}  {what}")
    return lines


def _actions(config: "ModelConfig") -> list[str]:
    """Of a model that is told actions: what their numbers are, how they are told, and its window."""
    actions = config.actions
    if actions is None:
        return []
    frames, latents = config.vae.temporal_factor, actions.window
    covered = 1 + (latents - 1) * frames
    onward = "latents as they are" if actions.handover == "latents" else "frame, encoded anew"
    lines = [
        f"  actions        {actions.dimensions} numbers a frame, those of {frames} frames before a latent frame "
        f"({config.transformer.actions}): {', '.join(actions.names)}",
        f"  window         {latents} latent frames ({covered} frames), at most {actions.given} given; a rollout goes "
        f"on from the latest {onward}",
    ]
    rows = (("scale", actions.scale), ("mean", actions.mean), ("deviation", actions.std))
    plain = {"scale": 1.0, "mean": 0.0, "deviation": 1.0}
    told = [f"{name} {_numbers(row)}" for name, row in rows if set(row) - {plain[name]}]
    lines.append(f"  told with      {'; '.join(told) or 'no scale, mean 0, deviation 1'}")
    if actions.low or actions.high:
        lines.append(f"  action range   {_numbers(actions.low) or 'any'} to {_numbers(actions.high) or 'any'}")
    empty = {"zeros": "zeros in place of the text", "encoded": "what the text encoder makes of no words"}
    lines.append(f"  no prompt is   {empty[actions.empty_prompt]}")
    return lines


def _numbers(row: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in row)


def _size(model: str, files: "ModelFiles", kind: str) -> str:
    """Of the file that holds a branch: published, base and all, or in a folder of ours."""
    from orrery.weights import CATALOGUE

    entry = CATALOGUE.get(model)
    if entry is not None and kind in entry.controls:
        return f"; {entry.controls[kind].size / 1e9:.2f} GB with the base"
    own = files.folder / f"control-{kind}.safetensors" if files.folder is not None else None
    return f"; {own.stat().st_size / 1e6:.2f} MB" if own is not None and own.is_file() else ""


def _parameters(config: "ModelConfig") -> dict[str, int]:
    """Of each network."""
    from orrery.nn.dit import DiT
    from orrery.nn.empty import shapes_only
    from orrery.nn.text import PAD, TextEncoder, word_tokenizer
    from orrery.nn.vae import VAE

    text = dataclasses.replace(config.text, pad_token=PAD)
    with shapes_only():
        networks = {
            "transformer": DiT(config.transformer),
            "vae": VAE(config.vae),
            "text": TextEncoder(text, word_tokenizer(["word"])),
        }
    return {name: sum(weight.numel() for weight in network.parameters()) for name, network in networks.items()}
