"""The errors a user can meet, and the notes: what was chosen for the user, and why. Each is one line."""

import sys


class OrreryError(Exception):
    """Something Orrery cannot go on with. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class InputError(OrreryError, ValueError):
    """Something the user gave is wrong: a prompt, a file, a number, a place to write to. Exit code 2."""

    exit_code = 2


def one_line(error: BaseException | str) -> str:
    """The text of an error without its line breaks."""
    return " ".join(str(error).split())


def note(message: str) -> None:
    """Tell on stderr what was chosen and why: nothing falls back silently."""
    print(f"orrery: {message}", file=sys.stderr, flush=True)
