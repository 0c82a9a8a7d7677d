"""The kinds of control: one list for files, weights and signals."""

from orrery.errors import InputError

KINDS = ("edge", "blur", "depth", "seg")  # in the published order
ALIASES = {"vis": "blur"}  # what the official code calls it


def control_kind(name: str) -> str:
    """The kind of that name: one of KINDS; "vis", as the official code says, is "blur".

    Raises:
        InputError: no such kind.
    """
    kind = ALIASES.get(name, name)
    if kind not in KINDS:
        raise InputError(f"the control is {name!r}; allowed are {', '.join(KINDS)} (vis is another name of blur)")
    return kind
