"""`orrery VERB ...`. A verb's module is imported when that verb is called, so that `orrery --help` waits for nothing.

Adding a verb: a module `orrery/cli/VERB.py` (a dash becomes an underscore) with a function `run`, its parameters
annotated for typer and its docstring the help text; and one line in VERBS.
"""

import os
import sys
import time
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from orrery import __version__
from orrery.errors import OrreryError

VERBS = {
    "generate": "Simulate what happens next, as video: from words, an image or a video.",
    "batch": "Generate every job of the official inference files.",
    "transfer": "Draw videos anew after control signals: Sim2Real, Real2Real.",
    "rollout": "Predict what a robot's actions do.",
    "models": "List the models, or describe one.",
    "plan": "What a generation needs of a GPU, before anything is loaded.",
    "convert": "A model from one format to another: official .pt, diffusers, ours.",
    "sim": "Make clips with MuJoCo, with all their ground truth.",
    "check-data": "What is in a dataset, and what is wrong with it, file by file.",
    "convert-data": "Episodes of a robot from one format to another: LeRobot, Bridge.",
    "train": "Train the VAE or the transformer by a recipe.",
    "play": "Drive a robot in a page: the world model beside MuJoCo, frame by frame.",
    "judge": "Try robots in a world model and in MuJoCo: does it tell the good from the bad?",
    "demo": "Three generated worlds, the last beside what MuJoCo really did.",
}
HIDDEN = {"demo"}  # part of `make demo`


class LazyCommand(TyperCommand):
    """Stands for a verb in the list of verbs; becomes the real command when it is called."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        verb = typer.Typer(add_completion=False)
        verb.command(self.name)(import_module(f"orrery.cli.{str(self.name).replace('-', '_')}").run)
        return typer.main.get_command(verb).make_context(info_name, args, parent=parent, **extra)


class Verbs(TyperGroup):
    """The group of all verbs, in the order of VERBS."""

    def __init__(self, **settings: Any) -> None:
        commands = {name: LazyCommand(name, help=text, hidden=name in HIDDEN) for name, text in VERBS.items()}
        super().__init__(**settings | {"commands": commands})

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)


app = typer.Typer(cls=Verbs, no_args_is_help=True, add_completion=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"orrery {__version__}")
        raise typer.Exit


@app.callback()
def orrery(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A world foundation model for physical AI: from words, an image or a video, what happens next, as video.

    Begin with: orrery generate "a red ball falls and bounces" -o ball.mp4
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 0; or one line on stderr and 2 for a wrong input, 1 for another error we know, 130 for
    Ctrl-C."""
    # Before torch starts its threads. Where nobody else computes, threads that spin while they wait make orrery-mini
    # twice as fast; where somebody does, they cost several times the work itself.
    if others_compute():
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    warnings.showwarning = _show_warning
    command = typer.main.get_command(app)
    try:
        code = command.main(None if arguments is None else list(arguments), prog_name="orrery", standalone_mode=False)
    except OrreryError as error:
        _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail("stopped", 130)
    except Exception as error:
        usage = _usage_error(error, sys.argv[1:] if arguments is None else list(arguments))
        if usage is None:
            raise
        _fail(*usage)
    if code == 130:  # what newer versions of typer make of Ctrl-C
        _fail("stopped", 130)
    sys.exit(code if isinstance(code, int) else 0)


def others_compute(looks: int = 5, pause: float = 0.003) -> bool:
    """Whether another process keeps a core of this machine busy: runs in each of a few looks. False where there is no
    /proc to look into."""
    for look in range(looks):
        if look:
            time.sleep(pause)
        try:
            running = int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        if running <= 1:  # this one
            return False
    return True


def _usage_error(error: Exception, arguments: list[str]) -> tuple[str, int] | None:
    """Message and exit code of an error of the argument parser (whose classes have no public home in typer)."""
    if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):
        return None
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()  # type: ignore[attr-defined]
        sys.exit(0)
    context = getattr(error, "ctx", None)
    where = f" (see `{context.command_path} --help`)" if context is not None else ""
    value = _value_given(getattr(error, "param", None), arguments)
    got = f", got {value!r}" if type(error).__name__ == "BadParameter" and value is not None else ""
    return f"{error.format_message().rstrip('.')}{got}{where}", error.exit_code


def _value_given(option: Any, arguments: list[str]) -> str | None:
    """What the command line gives an option: the parser's message may name the option alone."""
    for name in getattr(option, "opts", ()):
        for place, word in enumerate(arguments):
            if word == name and place + 1 < len(arguments):
                return arguments[place + 1]
            if word.startswith(f"{name}="):
                return word.partition("=")[2]
    return None


def _fail(message: str, code: int) -> None:
    print(f"orrery: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Our own warnings as one line; those of libraries are not for the user of a command."""
    if category is UserWarning and "orrery" in str(where[0]):
        print(f"orrery: warning: {message}", file=sys.stderr)
