"""Rolling on from given latents."""

import pytest
import torch

from orrery.flow.conditioning import FrameCondition
from orrery.flow.rolling import roll_on
from orrery.flow.schedule import shift_schedule
from orrery.flow.solvers import solve


def test_what_is_new_depends_on_the_past_and_the_past_stays() -> None:
    seen = []

    def network(x, times, mask):
        seen.append((x.clone(), times.clone(), mask.clone()))
        return 0.3 * x + x[:, :, :2].mean() * (1 - mask)

    past, noise = torch.randn(2, 4, 2, 3, 3), torch.randn(2, 4, 1, 3, 3)
    schedule = shift_schedule(5, 3.0, exact_times=True)
    new = roll_on(network, past, noise, schedule, 0.0)
    assert new.shape == noise.shape
    for x, times, mask in seen:
        assert torch.equal(x[:, :, :2], past)
        assert torch.equal(times[:, :2], torch.zeros(2, 2)) and bool((times[:, 2] > 0).all())
        assert mask[:, :, :2].min() == 1 and mask[:, :, 2:].max() == 0
    other = roll_on(network, past + 1, noise, schedule, 0.0)
    assert (other - new).abs().max() > 1e-3


def test_equals_the_general_solver_with_a_frame_condition() -> None:
    def network(x, times, mask):
        return torch.tanh(x * (1 + times[:, None, :, None, None] / 1000)) + 0.1 * x.flip(2)

    past, noise = torch.randn(1, 4, 3, 2, 2), torch.randn(1, 4, 2, 2, 2)
    schedule = shift_schedule(4, 5.0, exact_times=True)
    condition = FrameCondition(torch.cat([past, torch.zeros(1, 4, 2, 2, 2)], 2), 3, 0.1)
    start = torch.cat([torch.randn_like(past), noise], 2)  # whatever the given frames begin as

    def velocity(x, t):
        return condition.velocity(network(condition.replace(x), condition.timesteps(t), condition.mask), start)

    whole = solve(velocity, start, schedule)
    assert torch.allclose(roll_on(network, past, noise, schedule, 0.1), whole[:, :, 3:], atol=1e-6)


@pytest.mark.parametrize("past", [torch.zeros(1, 4, 0, 2, 2), torch.zeros(1, 3, 1, 2, 2), torch.zeros(2, 4, 1, 2, 2)])
def test_refuses_a_past_that_does_not_fit(past: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="k >= 1"):
        roll_on(lambda x, t, m: x, past, torch.zeros(1, 4, 1, 2, 2), shift_schedule(2))
