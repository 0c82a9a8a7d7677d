"""Simulated clips that several tests look at; everything here needs MuJoCo and a headless OpenGL."""

from functools import cache

import pytest


def _reason() -> str:
    """Why nothing can be simulated here, or an empty string."""
    from orrery.errors import OrreryError
    from orrery.sim.render import import_mujoco

    try:
        mujoco = import_mujoco()
    except OrreryError as error:
        return str(error)
    try:
        mujoco.GLContext(16, 16).free()
    except Exception as error:  # each backend raises its own
        return f"no headless OpenGL context: {error}"
    return ""


def pytest_collection_modifyitems(items):
    ours = [item for item in items if item.path.parent.name == "sim"]
    if ours and (reason := _reason()):
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@cache
def _clip(scene, seed, look, size):
    from orrery.sim import simulate

    return simulate(scene, seed, look, size)


@pytest.fixture
def clip():
    """clip(scene, seed, look, size=64): a clip of 17 frames with all its truth, simulated once a session."""
    return lambda scene, seed, look, size=64: _clip(scene, seed, look, size)


SAMPLE = [(s, seed, ("plain", "real")[seed % 2]) for s in ("drop", "push", "drive") for seed in range(4)]


@pytest.fixture(params=SAMPLE, ids=lambda p: "-".join(map(str, p)))
def sample(request, clip):
    """A dozen clips of all scenes, in both looks."""
    return clip(*request.param)
