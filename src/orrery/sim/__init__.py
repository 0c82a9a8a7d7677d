"""MuJoCo worlds with their ground truth: `drop`, `push`, `drive`, each in a plain and a realistic look."""

from orrery.sim.clip import Clip, Thing
from orrery.sim.looks import COLOURS, LOOKS
from orrery.sim.simulate import FPS, FRAMES, SCENES, simulate

__all__ = ["COLOURS", "FPS", "FRAMES", "LOOKS", "SCENES", "Clip", "Thing", "simulate"]
