"""A network's frozen config out of a recipe."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from orrery.errors import InputError


def configure(presets: Mapping[str, Any], preset: str, override: Mapping[str, Any], what: str) -> Any:
    """A preset's config with some fields replaced (lists become tuples).

    Args:
        presets: the network's presets by name. override: field -> value. what: the recipe's table, for messages.

    Raises:
        InputError: unknown preset or field, or a value that the config refuses.
    """
    if preset not in presets:
        raise InputError(f"{what}.preset = {preset!r}; allowed: {', '.join(presets)}")
    config = presets[preset]
    known = [field.name for field in fields(config)]
    for key, value in override.items():
        if key not in known:
            raise InputError(f"{what}.override: unknown key {key} = {value!r}; allowed: {', '.join(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in override.items()}
    try:
        return replace(config, **values)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}.override: {error}") from None
