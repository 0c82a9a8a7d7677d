"""`orrery check-data`: what is in a dataset, and what is wrong with it, file by file."""

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from orrery.data.findings import Survey

MOST_FILES = 40  # that are printed; --json has all
SHEET_EPISODES, SHEET_FRAMES = 6, 8


def run(
    data: Annotated[Path, typer.Argument(metavar="DIR", help="The dataset.", show_default=False)],
    frames: Annotated[
        int | None, typer.Option(help="Frames that training takes of an episode, 4k + 1: shorter ones are told.")
    ] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every frame, not a video's first and last.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
    sheet: Annotated[Path | None, typer.Option(metavar="PNG", help="Also draw some episodes, one a row.")] = None,
) -> None:
    """Check DIR: clips of `orrery sim`, LeRobot v3.0 or v2.1, a Bridge folder, or videos/ with metas/ or captions/.
    Exit code 0, or 1 where there are errors; warnings alone are 0.

    Example: orrery check-data my-robot --frames 13 --sheet my-robot.png
    """
    import json

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from orrery.data.check import survey_dataset
    from orrery.files import check_writable

    if sheet is not None:
        check_writable(sheet)
    columns = (TextColumn("checking"), BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeRemainingColumn())
    stderr = Console(stderr=True)
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("checking", total=None)
        survey = survey_dataset(data, frames, decode, lambda done, total: bar.update(task, completed=done, total=total))
    if as_json:
        typer.echo(json.dumps(survey.as_json(), indent=2, ensure_ascii=False))
    else:
        _print(survey, Console(soft_wrap=True, highlight=False))
    if sheet is not None:
        _draw(survey, sheet)
        if not as_json:
            typer.echo(f"look at {sheet}")
    if survey.errors:
        raise typer.Exit(1)


def _print(survey: "Survey", console: "Console") -> None:
    from rich.markup import escape
    from rich.table import Table

    told = survey.as_json()
    table = Table(title=f"{escape(str(survey.root))}: {told['format']}", show_header=False, title_justify="left")
    shortest, longest = told["shortest"], told["longest"]
    lengths = f"{told['frames']:,}, {shortest} to {longest} an episode" if told["episodes"] else "0"
    if shortest:
        lengths += f"; {(shortest - 1) // 4 * 4 + 1} is the largest window 4k + 1 that all have"
    table.add_row("episodes", f"{told['episodes']:,}")
    table.add_row("frames", lengths)
    table.add_row("hours", f"{told['hours']:.3g}")
    table.add_row("fps", ", ".join(f"{rate:g}" for rate in told["fps"]))
    table.add_row("sizes", ", ".join(f"{size} ({count})" for size, count in survey.sizes.most_common(5)))
    if told["cameras"]:
        table.add_row("cameras", escape(", ".join(told["cameras"])))
    table.add_row("texts", f"{told['captions']:,} different")
    console.print(table)
    if told["actions"]:
        table = Table("action", "min", "mean", "max")
        for row in told["actions"]:
            table.add_row(escape(row["name"]), *(f"{row[key]:.4g}" for key in ("min", "mean", "max")))
        console.print(table)
    files = [(path, list(found)) for path, found in groupby(_by_file(survey), key=lambda finding: finding.path)]
    for path, found in files[:MOST_FILES]:
        console.print(escape("the whole dataset" if path == "." else path), style="bold")
        for finding in found:
            allowed = f" (allowed: {finding.allowed})" if finding.allowed else ""
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(f"  [{colour}]{finding.severity}[/] {escape(finding.message + allowed)}")
    if len(files) > MOST_FILES:
        console.print(f"and {len(files) - MOST_FILES} more files; --json has all")
    console.print(f"{told['errors']} errors, {told['warnings']} warnings")


def _by_file(survey: "Survey") -> list:
    """Findings, those of a file together; files with errors first."""
    wrong = {finding.path for finding in survey.findings if finding.severity == "error"}
    return sorted(survey.findings, key=lambda finding: (finding.path not in wrong, finding.path))


def _draw(survey: "Survey", path: Path) -> None:
    """A contact sheet: an episode a row, from all over the dataset."""
    import numpy as np

    from orrery.errors import InputError, note
    from orrery.video import Video

    count = min(SHEET_EPISODES, len(survey.shots))
    rows: list[Video] = []
    for place in np.linspace(0, len(survey.shots) - 1, count).round().astype(int) if count else ():
        try:
            rows.append(Video(survey.shots[place].take(SHEET_FRAMES), 1.0))
        except InputError as error:
            note(f"not on the sheet: {error}")
    if not rows:
        raise InputError(f"cannot draw {path}: no episode of {survey.root} can be shown")
    height, width = rows[0].height, rows[0].width
    frames = np.concatenate([row.resize(height, width, crop=False).frames for row in rows])
    Video(frames, 1.0).contact_sheet(path, columns=SHEET_FRAMES, frames=len(frames))
