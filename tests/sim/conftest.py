"""Simulated clips that several tests look at; everything here needs MuJoCo and a headless OpenGL."""

from functools import cache

import pytest


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
