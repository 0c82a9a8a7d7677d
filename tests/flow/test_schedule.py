"""The two published schedules against the numbers that base_model.md section 4.2 prints."""

import pytest
import torch

from orrery.flow import Schedule, distilled_schedule, karras_schedule, shift_schedule


def test_shift_schedule_has_the_published_numbers():
    schedule = shift_schedule(35, shift=5.0)
    sigmas = schedule.sigmas.tolist()
    assert len(schedule) == 35 and sigmas[-1] == 0.0
    assert [round(s, 5) for s in sigmas[:3]] == [0.99980, 0.99395, 0.98782]
    assert [round(s, 5) for s in sigmas[-3:-1]] == [0.23237, 0.12809]
    times = schedule.timesteps.tolist()
    assert times[:5] == [999, 993, 987, 981, 974] and times[-3:] == [318, 232, 128]


def test_karras_schedule_has_the_published_numbers():
    schedule = karras_schedule()
    times = schedule.timesteps.tolist()
    assert len(schedule) == 36
    assert times[:6] == [995, 994, 993, 992, 990, 988] and times[-3:] == [30, 17, 9]
    assert schedule.sigmas[0].item() == pytest.approx(200 / 201, abs=1e-7)
    assert schedule.sigmas[-2].item() == pytest.approx(0.01 / 1.01, abs=1e-8)
    assert schedule.sigmas[-1].item() == 0


@pytest.mark.parametrize("make", [shift_schedule, karras_schedule])
def test_truncated_times_differ_from_exact_ones_by_less_than_one(make):
    truncated, exact = make(20), make(20, exact_times=True)
    assert torch.equal(truncated.sigmas, exact.sigmas)
    lost = exact.timesteps - truncated.timesteps
    assert lost.min() >= 0 and lost.max() < 1 and lost.max() > 0.1
    assert torch.equal(truncated.timesteps, truncated.timesteps.trunc())
    assert torch.allclose(exact.timesteps, 1000 * exact.sigmas[:-1])


def test_thirds_are_not_truncated_below_themselves():
    assert shift_schedule(3, shift=1.0).timesteps.tolist() == [999, 666, 333]


def test_shift_one_is_linear():
    sigmas = shift_schedule(4, shift=1.0).sigmas
    assert torch.allclose(sigmas, torch.tensor([0.999, 0.74925, 0.4995, 0.24975, 0.0]), atol=1e-7)


@pytest.mark.parametrize("make, count", [(shift_schedule, 1), (karras_schedule, 2), (distilled_schedule, 1)])
def test_one_step(make, count):
    assert len(make(1)) == count


def test_dtypes_are_float32():
    schedule = karras_schedule(5)
    assert schedule.sigmas.dtype == schedule.timesteps.dtype == torch.float32


def test_distilled_schedule_is_the_published_four_steps():
    schedule = distilled_schedule()
    assert schedule.sigmas.tolist() == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0], abs=1e-7)
    assert schedule.timesteps.tolist() == pytest.approx([1000, 937.5, 2500 / 3, 625])
    assert distilled_schedule(2).sigmas.tolist() == pytest.approx([1, 15 / 16, 0], abs=1e-7)  # the first of the four
    assert distilled_schedule(5).sigmas.tolist() == pytest.approx([1, 20 / 21, 15 / 17, 10 / 13, 5 / 9, 0], abs=1e-7)
    assert distilled_schedule(4, exact_times=False).timesteps.tolist() == [1000, 937, 833, 625]


def test_impossible_schedules_are_refused():
    with pytest.raises(ValueError, match="steps is 0"):
        shift_schedule(0)
    with pytest.raises(ValueError, match="steps is -3"):
        karras_schedule(-3)
    with pytest.raises(ValueError, match="shift is -1"):
        shift_schedule(5, shift=-1)
    with pytest.raises(ValueError, match="sigma_min is 3.0 and sigma_max 2.0"):
        karras_schedule(5, sigma_max=2.0, sigma_min=3.0)
    with pytest.raises(ValueError, match="fall strictly"):
        Schedule(torch.tensor([0.5, 0.6, 0.0]), torch.tensor([500.0, 600.0]))
    with pytest.raises(ValueError, match="fall strictly"):
        Schedule(torch.tensor([0.5, 0.1]), torch.tensor([500.0]))
    with pytest.raises(ValueError, match="N >= 1"):
        Schedule(torch.tensor([0.5, 0.0]), torch.tensor([500.0, 0.0]))
