"""The step cache: bit for bit nothing at budget 0, within its budget elsewhere, and careful where it cannot foresee."""

import pytest
import torch

import orrery
from orrery.flow import (
    FrameCondition,
    Schedule,
    StepCache,
    guided_velocity,
    karras_schedule,
    numpy_noise,
    one_by_one,
    shift_schedule,
    solve,
)
from orrery.nn.dit import Conditions, DiT, DiTConfig, TextContext

SHAPE = (1, 4, 3, 4, 4)
MEAN, STD = 0.7, 0.4
SCHEDULES = pytest.mark.parametrize("schedule", [shift_schedule(35), karras_schedule(35)], ids=["shift", "karras"])


def smooth(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """E[noise - x0 | x_t = x] for x0 ~ N(MEAN, STD^2)."""
    t = timestep / 1000
    return -MEAN + (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * MEAN)


def rough(x: torch.Tensor, timestep: float) -> torch.Tensor:
    """Another direction at every time."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(int(timestep * 1000)))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """rms of the difference over rms of b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


class Counted:
    """A velocity that counts its calls."""

    def __init__(self, velocity):
        self.velocity, self.times = velocity, []

    def __call__(self, x, timestep):
        self.times.append(timestep)
        return self.velocity(x, timestep)


@pytest.fixture(scope="module")
def network_velocity():
    """Guided velocity of a random transformer, nothing at zero."""
    torch.manual_seed(0)
    config = DiTConfig(width=64, depth=3, heads=2, adaln_rank=8, text_dim=24, context_dim=24, padding_mask=False)
    network = DiT(config).eval().requires_grad_(False)
    for layer in network.zero_initialised():
        torch.nn.init.normal_(layer.weight, std=0.2)
    texts = [network.encode_text(torch.randn(1, 6, 24)) for _ in range(2)]
    noise = numpy_noise(3, (1, 16, 2, 8, 8))
    given = FrameCondition(numpy_noise(4, noise.shape), 1, 0.0)
    conditions = [Conditions(text, frame_mask=given.mask) for text in texts]
    networks = [lambda x, times, told=each: network(x, times, told) for each in conditions]
    return guided_velocity(one_by_one(networks), given, noise, 3.0), noise


@SCHEDULES
@pytest.mark.parametrize("solver", ["unipc", "euler"])
def test_without_a_budget_no_bit_changes(schedule: Schedule, solver: str) -> None:
    noise, counted = numpy_noise(0, SHAPE), Counted(smooth)
    cache = StepCache(counted, schedule, 0.0)
    assert torch.equal(solve(cache, noise, schedule, solver), solve(smooth, noise, schedule, solver))
    assert counted.times == schedule.timesteps.tolist()
    assert (cache.evaluations, cache.skipped, cache.estimated_error) == (len(schedule), 0, 0.0)


@SCHEDULES
@pytest.mark.parametrize("solver", ["unipc", "euler"])
@pytest.mark.parametrize("budget", [0.005, 0.02, 0.1])
def test_a_smooth_flow_stays_within_the_budget(schedule: Schedule, solver: str, budget: float) -> None:
    noise, counted = numpy_noise(0, SHAPE), Counted(smooth)
    cache = StepCache(counted, schedule, budget)
    latents = solve(cache, noise, schedule, solver)
    assert relative(latents, solve(smooth, noise, schedule, solver)) <= budget
    assert 0 < cache.estimated_error <= budget
    assert cache.evaluations == len(counted.times) == cache.pattern.count("x") <= 0.8 * len(schedule)
    assert cache.skipped == cache.pattern.count(".") == len(schedule) - cache.evaluations
    assert cache.pattern.startswith("xxx") and cache.pattern.endswith("x")
    assert f"{cache.skipped} of {len(schedule)}" in str(cache) and cache.pattern in str(cache)


def test_more_budget_costs_fewer_evaluations() -> None:
    schedule, noise = shift_schedule(35), numpy_noise(0, SHAPE)
    evaluations = []
    for budget in (0.001, 0.01, 0.1):
        cache = StepCache(smooth, schedule, budget)
        solve(cache, noise, schedule)
        evaluations.append(cache.evaluations)
    assert evaluations[0] > evaluations[1] > evaluations[2]


def test_a_velocity_linear_in_the_noise_level_is_forecast_exactly() -> None:
    schedule, direction = shift_schedule(20, exact_times=True), numpy_noise(1, SHAPE)
    noise = numpy_noise(0, SHAPE)

    def velocity(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return direction * (0.5 + timestep / 1000)

    cache = StepCache(velocity, schedule, 0.001)
    assert relative(solve(cache, noise, schedule, "euler"), solve(velocity, noise, schedule, "euler")) < 1e-5
    assert cache.skipped >= 10


def test_a_velocity_that_cannot_be_foreseen_is_always_evaluated() -> None:
    schedule = shift_schedule(20)
    cache = StepCache(rough, schedule, 0.02)
    solve(cache, numpy_noise(0, SHAPE), schedule)
    assert cache.pattern == "x" * 20
    cache = StepCache(lambda x, t: x * float("nan"), schedule, 0.5)
    solve(cache, numpy_noise(0, SHAPE), schedule)
    assert cache.skipped == 0


def test_the_worst_sample_of_a_batch_decides() -> None:
    schedule, noise = shift_schedule(20), numpy_noise(0, (6, *SHAPE[1:]))

    def mixed(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return torch.cat([smooth(x[:5], timestep), rough(x[5:], timestep)])

    cache = StepCache(mixed, schedule, 0.02)
    solve(cache, noise, schedule)
    assert cache.skipped == 0
    alone = StepCache(smooth, schedule, 0.02)
    solve(alone, noise, schedule)
    assert alone.skipped > 5


def test_at_a_jump_it_looks_again() -> None:
    schedule, noise = shift_schedule(30), numpy_noise(0, SHAPE)
    edge = float(schedule.timesteps[12])

    def jumping(x: torch.Tensor, timestep: float) -> torch.Tensor:
        return smooth(x, timestep) + 0.8 * (timestep > edge)

    told, untold = (StepCache(jumping, schedule, 0.02, jumps) for jumps in ([12], []))
    reference = solve(jumping, noise, schedule)
    assert relative(solve(told, noise, schedule), reference) <= 0.02
    assert told.pattern[12:15] == "xxx" and "." in told.pattern[15:]
    solve(untold, noise, schedule)
    assert untold.pattern[12] == "."  # which is why it must be told


@SCHEDULES
def test_a_random_transformer_stays_within_the_budget(network_velocity, schedule: Schedule) -> None:
    velocity, noise = network_velocity
    reference = solve(velocity, noise, schedule)
    for budget in (0.005, 0.03):
        cache = StepCache(velocity, schedule, budget)
        latents = solve(cache, noise, schedule)
        assert relative(latents, reference) <= budget
        assert cache.skipped > 0


def test_mini_is_closer_with_a_cache_than_with_as_few_steps() -> None:
    world = orrery.load("mini", "cpu")
    network, reader = world.model.transformer, world.model.text
    schedule = shift_schedule(20, world.config.sampling.shift, exact_times=True)
    noise = numpy_noise(5, (1, 16, 2, 16, 16))
    with torch.no_grad():
        text = reader.encode(["a red ball falls and bounces"])
        texts = TextContext.batched([network.encode_text(each) for each in (text, torch.zeros_like(text))])
        given = FrameCondition(torch.zeros_like(noise), 0, 0.0)
        conditions = Conditions(texts, frame_mask=given.mask)

        def pair(x: torch.Tensor, times: torch.Tensor, count: int | None = None):
            return network(x.repeat(2, 1, 1, 1, 1), times.repeat(2, 1), conditions).chunk(2)

        velocity = guided_velocity(pair, given, noise, world.config.sampling.guidance)
        reference = solve(velocity, noise, schedule)
        cache = StepCache(velocity, schedule, 0.05)
        error = relative(solve(cache, noise, schedule), reference)
        fewer = shift_schedule(cache.evaluations, world.config.sampling.shift, exact_times=True)
        assert cache.evaluations <= 14 and error <= 0.05
        assert error < relative(solve(velocity, noise, fewer), reference) / 2


def test_what_is_refused() -> None:
    schedule = shift_schedule(4)
    for budget in (-0.01, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"budget is .*allowed is 0 to below 1"):
            StepCache(smooth, schedule, budget)
    cache = StepCache(smooth, schedule, 0.02)
    solve(cache, numpy_noise(0, SHAPE), schedule)
    with pytest.raises(ValueError, match="step 5 asked of a schedule with 4 steps"):
        cache(numpy_noise(0, SHAPE), 1.0)
    short = shift_schedule(3)  # nothing can be skipped, whatever the budget
    cache = StepCache(smooth, short, 0.9)
    solve(cache, numpy_noise(0, SHAPE), short)
    assert cache.pattern == "xxx"
