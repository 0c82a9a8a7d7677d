"""The errors a user can meet. A message is one line that names the value and what is allowed."""


class OrreryError(Exception):
    """Something Orrery cannot go on with. The command line prints the message alone and exits with `exit_code`."""

    exit_code = 1


class InputError(OrreryError, ValueError):
    """Something the user gave is wrong: a prompt, a file, a number, a place to write to. Exit code 2."""

    exit_code = 2
