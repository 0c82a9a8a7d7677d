"""The packages that playing and judging need, which `pip install orrery` alone does not bring."""

from importlib.util import find_spec

from orrery.errors import OrreryError

PLAY = ("fastapi", "uvicorn", "websockets", "gymnasium")


def check_packages(names: tuple[str, ...] = PLAY, verb: str = "play", extra: str = "play") -> None:
    """Refuse, before anything is loaded, where one is missing.

    Raises:
        OrreryError: what is, and how to install it.
    """
    if missing := [name for name in names if find_spec(name) is None]:
        raise OrreryError(f"`orrery {verb}` needs {', '.join(missing)}: pip install 'orrery[{extra}]'")
