"""UniPC against diffusers' UniPCMultistepScheduler at equal sigmas: at most 1e-6 apart over the whole trajectory."""

import math

import pytest
import torch

from orrery.flow import UniPC, karras_schedule, numpy_noise, shift_schedule

diffusers = pytest.importorskip("diffusers")

SCHEDULES = {
    "shift-35": shift_schedule(35),
    "shift-10": shift_schedule(10, shift=3.0),
    "shift-2": shift_schedule(2),
    "shift-1": shift_schedule(1),
    "karras-35": karras_schedule(35),
    "karras-10": karras_schedule(10, exact_times=True),
}


def network(x, timestep):
    """A stand-in that bends in x and in time and mixes neighbours, of the size that velocities have."""
    return torch.tanh(1.3 * x + math.sin(timestep / 150)) + 0.3 * x.roll(1, -1) * math.cos(timestep / 300)


def oracle(**options):
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        solver_order=2,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        **options,
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_trajectories_agree(name):
    schedule = SCHEDULES[name]
    scheduler = oracle()
    scheduler.set_timesteps(len(schedule))
    scheduler.sigmas, scheduler.timesteps = schedule.sigmas.clone(), schedule.timesteps.clone()
    scheduler.set_begin_index(0)
    ours = UniPC(schedule)
    x = y = numpy_noise(3, (1, 16, 5, 8, 8))
    for timestep in schedule.timesteps.tolist():
        x = ours.step(network(x, timestep), x)
        y = scheduler.step(network(y, timestep), timestep, y).prev_sample
        assert (x - y).abs().max().item() <= 1e-6
    assert (x - numpy_noise(3, x.shape)).abs().max() > 0.5  # it did go somewhere


def test_karras_schedule_is_the_one_of_diffusers():
    scheduler = oracle(use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01)
    scheduler.set_timesteps(36)
    schedule = karras_schedule(35)
    assert torch.equal(scheduler.sigmas, schedule.sigmas)
    assert torch.equal(scheduler.timesteps.float(), schedule.timesteps)


def test_trajectories_agree_from_start_to_end_under_the_schedulers_own_karras():
    scheduler = oracle(use_karras_sigmas=True, sigma_max=200.0, sigma_min=0.01)
    scheduler.set_timesteps(21)
    scheduler.set_begin_index(0)
    schedule = karras_schedule(20)
    ours = UniPC(schedule)
    x = y = numpy_noise(4, (2, 4, 3, 6, 6))
    for timestep, told in zip(schedule.timesteps.tolist(), scheduler.timesteps, strict=True):
        x = ours.step(network(x, timestep), x)
        y = scheduler.step(network(y, float(told)), told, y).prev_sample
    assert (x - y).abs().max().item() <= 1e-6
