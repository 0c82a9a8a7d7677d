"""The mathematics of rectified flow: path, times, schedules, solvers, guidance, caching, frames, noise.

Pure functions on tensors (and small stateful solvers and a cache). No networks, no files, no prompts.
"""

from .caching import StepCache
from .conditioning import FrameCondition, frame_mask, sample_counts
from .editing import held, watched
from .guidance import Interval, Predict, guidance_jumps, guided, guided_velocity, one_by_one, side_by_side
from .noise import numpy_noise
from .path import interpolate, noise_from_velocity, sample_times, shift_times, velocity_target, x0_from_velocity
from .schedule import Schedule, distilled_schedule, karras_schedule, shift_schedule, start_at
from .solvers import SOLVERS, Euler, Renoise, UniPC, solve

__all__ = [
    "SOLVERS",
    "Euler",
    "FrameCondition",
    "Interval",
    "Predict",
    "Renoise",
    "Schedule",
    "StepCache",
    "UniPC",
    "distilled_schedule",
    "frame_mask",
    "guidance_jumps",
    "guided",
    "guided_velocity",
    "held",
    "interpolate",
    "karras_schedule",
    "noise_from_velocity",
    "numpy_noise",
    "one_by_one",
    "sample_counts",
    "sample_times",
    "shift_schedule",
    "shift_times",
    "side_by_side",
    "solve",
    "start_at",
    "velocity_target",
    "watched",
    "x0_from_velocity",
]
