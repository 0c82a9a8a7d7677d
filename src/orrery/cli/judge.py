"""`orrery judge`: robots tried in a world model and in MuJoCo, and whether the model tells the good from the bad."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from orrery.cli.options import Device

MOST_COPIES = 256


def run(
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the report.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(help="A model of the tabletop: a name, or its folder.")] = "tabletop",
    policies: Annotated[
        str, typer.Option(help="Names from --list and sets (final, tuning, all, none), with commas.")
    ] = "final",
    policy: Annotated[
        list[str] | None,
        typer.Option(metavar="PLACE", help="Your own as well: module:attribute, or a stable-baselines3 .zip."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Episodes of each, in each world.")] = 48,
    first_seed: Annotated[
        int | None, typer.Option(help="They count up from it.", show_default="20000; with tuning policies 10000")
    ] = None,
    copies: Annotated[int, typer.Option(help="Episodes that go at once.")] = 16,
    steps: Annotated[int | None, typer.Option(help="Of the solver.", show_default="the model's")] = None,
    device: Device = None,
    listed: Annotated[bool, typer.Option("--list", help="Say which policies there are, and stop.")] = False,
) -> None:
    """Judge policies inside the world model, and the model by MuJoCo.

    Each policy (it sees pixels and gives a peg's velocity) meets the same starts in the model and in MuJoCo; a report
    says how often it succeeds in either and whether the model ranks them as MuJoCo does: Pearson's r, Spearman, MMRV
    with intervals, and how many episodes end alike. The final policies are for a number to report; develop with
    `--policies tuning`.

    Writes results.json, scatter.png, sheet.png, clips/POLICY/SEED.mp4 (model and MuJoCo side by side: where they
    disagree most, and where they agree) and episodes/POLICY.json. The same command goes on where a stopped one was.

    Example: orrery judge -o verdict

    Example: orrery judge -o verdict --policies push,random,noise-0.4 --policy my_robot:Robot --seeds 24
    """
    from orrery.errors import InputError
    from orrery.eval.policies import choose_robots, load_policy

    if listed:
        _print_robots()
        return
    if output is None:
        raise InputError("--output (-o) is missing: a folder for the report")
    chosen = choose_robots(policies)
    from orrery.eval.judgement import MOST_SEEDS, rehearse, report
    from orrery.eval.judgement import first_seed as settle_first

    for name, value, most in (("seeds", seeds, MOST_SEEDS), ("copies", copies, MOST_COPIES), ("steps", steps, 1000)):
        if value is not None and not 1 <= value <= most:
            raise InputError(f"--{name} is {value}; allowed is 1 to {most}")
    first = settle_first(chosen, first_seed)
    own = {place: load_policy(place) for place in policy or ()}
    if not chosen and not own:
        raise InputError("no policy: name some with --policies, or your own with --policy; `--list` says which")
    _check_folder(output)
    from orrery.cli.options import check_name, load_world
    from orrery.env import register
    from orrery.env.optional import check_packages

    check_name(model)
    check_packages(("gymnasium",), "judge", "env")
    register()
    world = load_world(model, device, None)
    with _Bar(len(chosen) + len(own), seeds) as bar:
        trials = rehearse(
            world, chosen, own, range(first, first + seeds), output, copies, steps, bar.progress, bar.teaching
        )
    result = report(trials, world, range(first, first + seeds), output)
    _print_result(result)
    typer.echo(f"{output}/results.json; look at {output}/scatter.png and {output}/sheet.png")


def _check_folder(output: Path) -> None:
    """A folder that is there, or that can be made."""
    from orrery.errors import InputError
    from orrery.files import check_writable

    if output.exists() and not output.is_dir():
        raise InputError(f"cannot write {output}: it is a file, not a folder")
    check_writable(output / "results.json" if output.is_dir() else output)
    output.mkdir(exist_ok=True)


def _print_robots() -> None:
    from rich.console import Console
    from rich.table import Table

    from orrery.eval.policies import FINAL, TUNING

    table = Table("policy", "set", "what it does", box=None, pad_edge=False)
    for kind, robots in (("final", FINAL), ("tuning", TUNING)):
        for name, spec in robots.items():
            table.add_row(name, kind, spec.about)
    Console().print(table)


def _print_result(result: Mapping[str, Any]) -> None:
    """The robots from the best in truth down, and what the model's verdict is worth."""
    from rich.console import Console
    from rich.table import Table

    from orrery.eval.judgement import NAMES, describe

    def rate(world: Mapping[str, Any]) -> str:
        low, high = world["interval"]
        return f"{world['success']:4.0%} [{low:.0%}, {high:.0%}]"

    console = Console()
    table = Table("policy", "MuJoCo", "model", "end alike", box=None, pad_edge=False)
    for each in result["policies"]:
        table.add_row(each["policy"], rate(each["truth"]), rate(each["model"]), f"{each['agreement']:.0%}")
    console.print(table)
    if result["comparison"] is None:
        console.print("One policy: nothing to rank.")
        return
    table = Table("", "", "over trials", "over policies", box=None, pad_edge=False)
    for key, words in NAMES.items():
        table.add_row(*describe(words, result["comparison"][key], 3 if key == "mmrv" else 2))
    console.print()
    console.print(table)


class _Bar:
    """A progress bar on a terminal: all episodes of all policies in both worlds."""

    def __init__(self, policies: int, seeds: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.ended = 0
        self.task = self.bar.add_task("", total=2 * policies * seeds)

    def __enter__(self) -> "_Bar":
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def teaching(self, done: int, total: int) -> None:
        """Demonstrations are made."""
        self.bar.update(self.task, description=f"demonstration {done} of {total}")

    def progress(self, policy: str, world: str, done: int, total: int) -> None:
        """Episodes of one policy in one world are done; each world ends with done = total."""
        self.bar.update(self.task, description=f"{policy}, {world}", completed=self.ended + done)
        if done == total:
            self.ended += total
