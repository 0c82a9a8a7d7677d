"""The mathematics of rectified flow: path, times, schedules, solvers, guidance, frame conditioning, noise.

Pure functions on tensors (and two small stateful solvers). No networks, no files, no prompts.
"""

from .conditioning import FrameCondition, frame_mask, sample_counts
from .guidance import guided, guided_velocity
from .noise import numpy_noise
from .path import interpolate, noise_from_velocity, sample_times, shift_times, velocity_target, x0_from_velocity
from .schedule import Schedule, karras_schedule, shift_schedule
from .solvers import SOLVERS, Euler, UniPC, solve

__all__ = [
    "SOLVERS",
    "Euler",
    "FrameCondition",
    "Schedule",
    "UniPC",
    "frame_mask",
    "guided",
    "guided_velocity",
    "interpolate",
    "karras_schedule",
    "noise_from_velocity",
    "numpy_noise",
    "sample_counts",
    "sample_times",
    "shift_schedule",
    "shift_times",
    "solve",
    "velocity_target",
    "x0_from_velocity",
]
