"""Gymnasium environments in which a world model is the world, and their twins in MuJoCo.

`import orrery.env` makes them known; `gymnasium.make("orrery.env:orrery/Tabletop-v0")` imports that by itself.
"""

from importlib.util import find_spec
from typing import Any

MODEL, TRUTH = "orrery/Tabletop-v0", "orrery/TabletopTruth-v0"


def register() -> None:
    """Make the environments known to Gymnasium; a second time changes nothing."""
    import gymnasium

    for name, kind in ((MODEL, "model"), (TRUTH, "truth")):
        if name not in gymnasium.registry:
            gymnasium.register(
                name,
                entry_point="orrery.env.tabletop:TabletopEnv",
                vector_entry_point="orrery.env.vector:TabletopVectorEnv",
                kwargs={"kind": kind},
                order_enforce=True,
            )


def __getattr__(name: str) -> Any:
    if name == "TabletopEnv":
        from orrery.env.tabletop import TabletopEnv

        return TabletopEnv
    if name == "TabletopVectorEnv":
        from orrery.env.vector import TabletopVectorEnv

        return TabletopVectorEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if find_spec("gymnasium") is not None:
    register()
