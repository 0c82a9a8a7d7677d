"""How good a generated clip is: pixels against truth, objects against the caption. Nothing here asks a simulator."""

from orrery.eval.judging import Phrase, Verdict, judge, parse_caption
from orrery.eval.metrics import copy_last, empty_scene, fit_brightness, psnr, ssim
from orrery.eval.objects import Found, ShapeVotes, detect

__all__ = [
    "Found",
    "Phrase",
    "ShapeVotes",
    "Verdict",
    "copy_last",
    "detect",
    "empty_scene",
    "fit_brightness",
    "judge",
    "parse_caption",
    "psnr",
    "ssim",
]
