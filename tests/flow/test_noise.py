"""Noise is a frozen function of seed and shape."""

import pytest
import torch

from orrery.flow import numpy_noise


def test_noise_is_the_frozen_legacy_stream():
    # First numbers of MT19937 Gaussians for seed 0, as known since NumPy 1.0.
    noise = numpy_noise(0, (1, 2, 2))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    expected = torch.tensor([[[1.764052345967664, 0.4001572083672233], [0.9787379841057392, 2.240893199201458]]])
    assert torch.equal(noise, expected)


def test_seeds_differ_and_global_state_is_untouched():
    state = torch.random.get_rng_state()
    assert not torch.equal(numpy_noise(1, (8,)), numpy_noise(2, (8,)))
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_impossible_seeds_are_refused(seed):
    with pytest.raises(ValueError, match=f"seed is {seed}"):
        numpy_noise(seed, (1,))
