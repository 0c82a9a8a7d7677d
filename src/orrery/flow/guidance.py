"""Classifier-free guidance in the convention of the published Video2World models."""

from torch import Tensor


def guided(v_cond: Tensor, v_uncond: Tensor, g: float) -> Tensor:
    """v = v_c + g (v_c - v_u), elementwise on tensors of one shape.

    g = 0 is the plain conditional velocity, so g is the usual guidance scale minus 1 (their g = 7 is scale 8).
    v_u comes from the negative prompt and sees the same given frames as v_c.
    """
    return v_cond + g * (v_cond - v_uncond)
