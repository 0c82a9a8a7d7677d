"""Segmentation as a control video: each object in one colour throughout the clip, black where there is none.

Out of a simulator's exact segmentation or of a model's masks. Specification of Transfer, section 2; there colours are
drawn without a seed and no two runs agree, here they follow from one.
"""

import colorsys

import numpy as np

from orrery.errors import InputError

MOST_OBJECTS = 255


def colours(count: int, seed: int = 0) -> np.ndarray:
    """[count, 3] uint8: hue 0 to 1, saturation from 0.1, value from 0.2, as in training of the published model."""
    rng = np.random.default_rng([seed, 7])
    drawn = [colorsys.hsv_to_rgb(*rng.uniform((0, 0.1, 0.2), 1)) for _ in range(count)]
    return np.rint(np.array(drawn).reshape(count, 3) * 255).astype(np.uint8)


def seg_map(ids: np.ndarray, seed: int = 0) -> np.ndarray:
    """[T, H, W] whole numbers, 0 for none, else which object -> [T, H, W, 3] uint8. An id has the same colour in every
    clip that is painted with the same seed.

    Raises:
        InputError: ids of another shape or kind, or outside 0 to 255.
    """
    ids = np.asarray(ids)
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or (ids.size and not 0 <= ids.min() <= ids.max() <= MOST_OBJECTS):
        raise InputError(
            f"a segmentation must be [T, H, W] whole numbers from 0 to {MOST_OBJECTS}; got {ids.dtype} "
            f"{list(ids.shape)}" + (f" from {ids.min()} to {ids.max()}" if ids.size else "")
        )
    palette = np.concatenate([np.zeros((1, 3), np.uint8), colours(MOST_OBJECTS, seed)])
    return palette[ids]
