"""Solvers on a flow whose answer is known: Gaussian data, where the velocity and its trajectory are closed forms."""

import math

import pytest
import torch

from orrery.flow import (
    SOLVERS,
    Euler,
    FrameCondition,
    Renoise,
    Schedule,
    UniPC,
    distilled_schedule,
    karras_schedule,
    numpy_noise,
    shift_schedule,
    solve,
)

MEAN, STD = 0.7, 0.4
SHAPE = (1, 4, 3, 4, 4)


def gaussian_velocity(x, timestep):
    """E[noise - x0 | x_t = x] for x0 ~ N(MEAN, STD^2)."""
    t = timestep / 1000
    variance = (1 - t) ** 2 * STD**2 + t**2
    return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


def exact(x, sigma, to):
    """Where the trajectory through x at time sigma passes time `to`: it stays on its quantile."""
    spread, spread_to = (((1 - s) ** 2 * STD**2 + s**2) ** 0.5 for s in (sigma, to))
    return (1 - to) * MEAN + spread_to / spread * (x - (1 - sigma) * MEAN)


def error(solver, steps):
    """Largest error on the way from sigma 0.95 to 0.05 in `steps` steps of equal length in lambda."""
    sigmas = torch.linspace(math.log(0.05 / 0.95), math.log(0.95 / 0.05), steps + 1).neg().sigmoid()
    schedule = Schedule(torch.cat([sigmas, torch.zeros(1)]), 1000 * sigmas)
    states = []
    noise = numpy_noise(0, SHAPE)
    solve(gaussian_velocity, noise, schedule, solver, callback=lambda done, total, x: states.append(x))
    return (states[steps - 1] - exact(noise, 0.95, 0.05)).abs().max().item()


def test_euler_is_first_order():
    assert 1.8 < error("euler", 40) / error("euler", 80) < 2.2


def test_unipc_is_second_order_and_better():
    assert 3.5 < error("unipc", 20) / error("unipc", 40)
    assert 3.5 < error("unipc", 40) / error("unipc", 80)
    assert error("unipc", 20) < error("euler", 20) / 10


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"renoise"}))
@pytest.mark.parametrize("schedule", [shift_schedule(35), karras_schedule(35)], ids=["shift", "karras"])
def test_published_schedules_bring_gaussian_noise_to_gaussian_data(solver, schedule):
    noise = numpy_noise(0, SHAPE)
    ends = solve(gaussian_velocity, noise, schedule, solver)
    distance = (ends - exact(noise, schedule.sigmas[0].item(), 0.0)).abs().max().item()
    assert distance < {"euler": 0.2, "unipc": 0.06}[solver]  # against a spread of 0.4; the last, long step costs most


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"renoise"}))
@pytest.mark.parametrize("schedule", [shift_schedule(7), karras_schedule(7)], ids=["shift", "karras"])
def test_a_straight_flow_is_solved_exactly(solver, schedule):
    noise, target = numpy_noise(1, SHAPE), numpy_noise(2, SHAPE)
    ends = solve(lambda x, t: noise - target, noise, schedule, solver)
    # Schedules start a little below 1 but from pure noise, so the path ends that little short of the target.
    short = 1 - schedule.sigmas[0].item()
    assert torch.allclose(ends, target + short * (noise - target), atol=1e-5)


@pytest.mark.parametrize("solver", sorted(SOLVERS.keys() - {"renoise"}))
@pytest.mark.parametrize("schedule", [shift_schedule(12), karras_schedule(12)], ids=["shift", "karras"])
def test_given_frames_walk_straight_to_the_given_latents(solver, schedule):
    given = FrameCondition(numpy_noise(5, SHAPE), count=2, conditional_timestep=0.1)
    noise = numpy_noise(6, SHAPE)

    def velocity(x, t):
        return given.velocity(gaussian_velocity(given.replace(x), t), noise)

    ends = solve(velocity, noise, schedule, solver)
    short = 1 - schedule.sigmas[0].item()  # as in the test above
    expected = given.latents + short * (noise - given.latents)
    assert torch.allclose(ends[:, :, :2], expected[:, :, :2], atol=1e-5)
    assert torch.equal(given.replace(ends)[:, :, :2], given.latents[:, :, :2])
    free = solve(gaussian_velocity, noise, schedule, solver)
    assert torch.allclose(ends[:, :, 2:], free[:, :, 2:], atol=1e-6)


def test_last_unipc_step_returns_the_data_prediction():
    schedule = Schedule(torch.tensor([0.4, 0.0]), torch.tensor([400.0]))
    x, v = numpy_noise(1, SHAPE), numpy_noise(2, SHAPE)
    assert torch.equal(UniPC(schedule).step(v, x), x - schedule.sigmas[0].item() * v)


def test_unipc_first_step_by_hand():
    # The first step is DDIM in data prediction: x <- s'/s x + (1 - s' - s'/s (1 - s)) x0.
    schedule = Schedule(torch.tensor([0.8, 0.5, 0.0]), torch.tensor([800.0, 500.0]))
    x, v = numpy_noise(1, SHAPE), numpy_noise(2, SHAPE)
    expected = 0.625 * x + (0.5 - 0.625 * 0.2) * (x - 0.8 * v)
    assert torch.allclose(UniPC(schedule).step(v, x), expected, atol=1e-6)


def test_solve_tells_the_network_the_schedules_times_and_reports_each_step():
    schedule = shift_schedule(4)
    heard, reported = [], []

    def velocity(x, timestep):
        assert x.dtype == torch.float32 and isinstance(timestep, float)
        heard.append(timestep)
        return x

    ends = solve(velocity, numpy_noise(0, SHAPE), schedule, callback=lambda *report: reported.append(report))
    assert heard == schedule.timesteps.tolist()
    assert [report[:2] for report in reported] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert torch.equal(reported[-1][2], ends)


def test_latents_stay_float32_whatever_the_network_returns():
    ends = solve(lambda x, t: x.bfloat16(), numpy_noise(0, SHAPE).bfloat16(), shift_schedule(3))
    assert ends.dtype == torch.float32


def test_same_noise_same_latents():
    runs = [solve(gaussian_velocity, numpy_noise(4, SHAPE), karras_schedule(9)) for _ in range(2)]
    assert torch.equal(*runs)


def test_misuse_is_refused():
    schedule = shift_schedule(1)
    x = numpy_noise(0, SHAPE)
    for solver in (Euler(schedule), UniPC(schedule)):
        solver.step(x, x)
        with pytest.raises(ValueError, match="step 2 asked of a schedule with 1 steps"):
            solver.step(x, x)
        assert solver.index == 1
    with pytest.raises(ValueError, match=r"\(1, 4, 2, 4, 4\)"):
        Euler(schedule).step(x[:, :, :2], x)
    with pytest.raises(ValueError, match="'heun'.*unipc, euler"):
        solve(gaussian_velocity, x, schedule, solver="heun")
    from_pure_noise = Schedule(torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1000.0, 500.0]))
    with pytest.raises(ValueError, match="first sigma is 1.0"):
        UniPC(from_pure_noise)
    assert torch.allclose(solve(lambda v, t: x, x, from_pure_noise, "euler"), torch.zeros(()), atol=1e-6)


def trigflow(network, noise, angles):
    """Section 4.8 in TrigFlow's own terms and float64: sigma_data 1, the same noise at every step."""
    x = noise.double()
    for angle, following in zip(angles, [*angles[1:], 0.0]):
        total = math.cos(angle) + math.sin(angle)
        velocity = network(x / total, math.sin(angle) / total)
        x0 = x / total - math.sin(angle) / total * velocity
        x = math.cos(following) * x0 + math.sin(following) * noise
    return x


def test_renoising_is_the_trigflow_sampler_of_the_distilled_model():
    def network(x, t):
        return torch.tanh(1.3 * x + math.sin(7 * t)) + 0.3 * x.roll(1, -1)

    noise, asked = numpy_noise(7, SHAPE), []

    def velocity(x, timestep):
        asked.append(timestep)
        return network(x.double(), timestep / 1000).float()

    ends = solve(velocity, noise, distilled_schedule(4), "renoise")
    expected = trigflow(network, noise, [math.pi / 2, math.atan(15), math.atan(5), math.atan(5 / 3)])
    assert (ends - expected).abs().max() < 1e-5 and (ends - noise).abs().max() > 0.5
    assert asked == pytest.approx([1000, 937.5, 2500 / 3, 625])


def test_renoising_ends_exactly_at_the_given_latents():
    given, noise = FrameCondition(numpy_noise(5, SHAPE), count=2, conditional_timestep=0.1), numpy_noise(6, SHAPE)
    ends = solve(
        lambda x, t: given.velocity(torch.tanh(given.replace(x)), noise), noise, distilled_schedule(4), "renoise"
    )
    assert torch.allclose(ends[:, :, :2], given.latents[:, :, :2], atol=1e-5)


def test_renoising_begins_at_pure_noise():
    with pytest.raises(ValueError, match="first sigma is 0.99"):
        Renoise(shift_schedule(4))
