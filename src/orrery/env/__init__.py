"""Gymnasium environments in which a world model is the world, and their twins in MuJoCo.

`gymnasium.make("orrery/Tabletop-v0")` finds them without an import (the package registers itself as a plugin); where it
was not installed by pip, `import orrery.env; orrery.env.register()` does the same.
"""

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
