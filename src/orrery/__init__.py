"""Orrery: a world foundation model for physical AI. What a user types first.

>>> import orrery
>>> world = orrery.load("mini")
>>> video = world.generate("a red ball falls and bounces", seed=1)
>>> video.save("out.mp4")

The names below are imported on first use, so that `import orrery` and `orrery --help` do not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orrery.errors import InputError, OrreryError
    from orrery.video import Video
    from orrery.world import World, load

__version__ = "0.1.0"
__all__ = ["InputError", "OrreryError", "Video", "World", "__version__", "load"]

_HOMES = {
    "InputError": "orrery.errors",
    "OrreryError": "orrery.errors",
    "Video": "orrery.video",
    "World": "orrery.world",
    "load": "orrery.world",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'orrery' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
