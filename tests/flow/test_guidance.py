"""Guidance convention: g = 0 is the conditional velocity."""

import torch

from orrery.flow import guided


def test_guidance_starts_at_the_conditional_velocity_and_moves_away_from_the_other():
    conditional, unconditional = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    assert torch.equal(guided(conditional, unconditional, 0.0), conditional)
    assert torch.equal(guided(conditional, unconditional, -1.0), unconditional)
    assert torch.equal(guided(conditional, unconditional, 7.0), torch.tensor([4.5, -23.0]))
