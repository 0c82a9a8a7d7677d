"""Starting noise that depends on the seed and the shape, and on nothing else."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def numpy_noise(seed: int, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise [*shape], float32, on the CPU.

    Drawn by NumPy's legacy RandomState, whose stream is frozen, as the official sampler does: one seed is one video
    on every device, architecture and version. Seeds are whole numbers from 0 to 2**32 - 1, else ValueError.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; allowed is 0 to {2**32 - 1}")
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(tuple(shape)).astype(np.float32))
