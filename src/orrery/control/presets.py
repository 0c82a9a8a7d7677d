"""Presets by name."""

from collections.abc import Mapping
from typing import TypeVar

from orrery.errors import InputError

T = TypeVar("T")


def preset(what: str, name: str, presets: Mapping[str, T]) -> T:
    """The preset of that name.

    Raises:
        InputError: there is none; the message names those there are.
    """
    if name not in presets:
        raise InputError(f"{what} is {name!r}; allowed are {', '.join(presets)}")
    return presets[name]


def whole_pair(what: str, given: object, names: str, lowest: int) -> tuple[int, int]:
    """Two whole numbers that a user gave in place of a preset.

    Raises:
        InputError: anything else.
    """
    pair = tuple(given) if isinstance(given, tuple | list) else ()
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < lowest for n in pair):
        raise InputError(f"{what} is {given!r}; allowed are a preset's name and {names}: whole numbers from {lowest}")
    return pair[0], pair[1]
