"""Guidance convention: g = 0 is the conditional velocity; within an interval of noise levels only, where asked."""

import pytest
import torch

from orrery.flow import (
    FrameCondition,
    guidance_jumps,
    guided,
    guided_velocity,
    karras_schedule,
    one_by_one,
    shift_schedule,
    side_by_side,
)


def test_guidance_starts_at_the_conditional_velocity_and_moves_away_from_the_other():
    conditional, unconditional = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.0])
    assert torch.equal(guided(conditional, unconditional, 0.0), conditional)
    assert torch.equal(guided(conditional, unconditional, -1.0), unconditional)
    assert torch.equal(guided(conditional, unconditional, 7.0), torch.tensor([4.5, -23.0]))


def test_guided_velocity_puts_given_frames_in_place_and_leads_away_from_the_second_network() -> None:
    torch.manual_seed(0)
    latents, noise, x = (torch.randn(1, 2, 3, 2, 2) for _ in range(3))
    given = FrameCondition(latents, 1, 0.0)
    seen = []

    def network(scale: float):
        def v(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            seen.append((x, times))
            return scale * x

        return v

    v = guided_velocity(one_by_one([network(2.0), network(1.0)]), given, noise, 3.0)(x, 700.0)
    assert torch.allclose(v[:, :, 1:], 5 * x[:, :, 1:])  # 2 + 3 (2 - 1)
    assert torch.allclose(v[:, :, :1], (noise - latents)[:, :, :1], atol=1e-6)
    assert len(seen) == 2 and all(torch.equal(a[:, :, :1], latents[:, :, :1]) for a, _ in seen)
    assert seen[0][1].tolist() == [[0.0, 700.0, 700.0]]
    alone = guided_velocity(one_by_one([network(2.0)]), given, noise, 3.0)(x, 700.0)
    assert torch.allclose(alone[:, :, 1:], 2 * x[:, :, 1:])


def test_predictions_side_by_side_are_those_one_by_one() -> None:
    torch.manual_seed(0)
    x, times, texts = torch.randn(2, 3, 4), torch.tensor([[0.1, 1.0], [0.2, 2.0]]), torch.tensor([3.0, 5.0])

    def batched(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        assert x.shape == (4, 3, 4) and times.shape == (4, 2)
        return x * times[:, :1, None] + texts.repeat_interleave(2)[:, None, None]

    singly = one_by_one([lambda x, times, text=text: x * times[:, :1, None] + text for text in texts])(x, times)
    together = side_by_side(batched, 2)(x, times)
    assert len(together) == 2 and all(torch.equal(a, b) for a, b in zip(singly, together, strict=True))


@pytest.fixture
def pair():
    """Start, two networks that count their calls, and those calls by network."""
    torch.manual_seed(0)
    latents, noise, x = (torch.randn(1, 2, 3, 2, 2) for _ in range(3))
    calls: list[int] = []

    def network(number: int):
        def v(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
            calls.append(number)
            return x * times.reshape(-1)[-1] / (number + 1) + number

        return v

    return FrameCondition(latents, 1, 0.0), noise, x, [network(0), network(1)], calls


def test_outside_the_interval_the_conditional_prediction_is_made_alone(pair) -> None:
    given, noise, x, networks, calls = pair
    everywhere = guided_velocity(one_by_one(networks), given, noise, 3.0)
    alone = guided_velocity(one_by_one(networks[:1]), given, noise, 3.0)
    within = guided_velocity(one_by_one(networks), given, noise, 3.0, interval=(0.3, 0.8))
    for time, inside in ((999.0, False), (801.0, False), (800.0, True), (500.0, True), (300.0, True), (299.0, False)):
        expected = (everywhere if inside else alone)(x, time)
        calls.clear()
        assert torch.equal(within(x, time), expected)
        assert calls == ([0, 1] if inside else [0])


@pytest.mark.parametrize("interval", [None, (0.0, 1.0), (0, 1)])
def test_the_whole_interval_changes_no_bit_and_asks_as_before(pair, interval) -> None:
    given, noise, x, networks, _ = pair

    def plain(x: torch.Tensor, times: torch.Tensor) -> list[torch.Tensor]:  # knows no count
        return [network(x, times) for network in networks]

    before, now = (guided_velocity(plain, given, noise, 2.0, i) for i in (None, interval))
    for schedule in (shift_schedule(35), karras_schedule(35), karras_schedule(35, exact_times=True)):
        for time in schedule.timesteps.tolist():
            assert torch.equal(before(x, time), now(x, time))


def test_one_network_needs_no_guidance_and_an_interval_changes_nothing(pair) -> None:
    given, noise, x, networks, _ = pair
    a, b = (guided_velocity(one_by_one(networks[:1]), given, noise, 2.0, i) for i in (None, (0.4, 0.6)))
    assert all(torch.equal(a(x, time), b(x, time)) for time in (900.0, 500.0, 100.0))


def test_the_first_alone_beside_a_batch_is_the_first_of_the_batch(pair) -> None:
    x, times = torch.randn(2, 3, 4), torch.tensor([1.0, 2.0])
    texts = torch.tensor([3.0, 5.0])

    def batched(x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return x * times[:, None, None] + texts.repeat_interleave(2)[:, None, None]

    predict = side_by_side(batched, 2, lambda x, times: x * times[:, None, None] + texts[0])
    assert torch.equal(predict(x, times, 1)[0], predict(x, times)[0]) and len(predict(x, times, 1)) == 1
    assert len(predict(x, times, 2)) == 2
    with pytest.raises(ValueError, match="1 of 2 predictions asked"):
        side_by_side(batched, 2)(x, times, 1)


def test_jumps_are_the_first_steps_after_an_edge() -> None:
    schedule = shift_schedule(10)
    levels = schedule.sigmas[:-1]
    expected = [int((levels > 0.9).sum()), int((levels >= 0.5).sum())]
    assert guidance_jumps(schedule, (0.5, 0.9)) == expected
    assert guidance_jumps(schedule, (0.0, 1.0)) == guidance_jumps(schedule, None) == []
    assert guidance_jumps(schedule, (0.5, 1.0)) == expected[1:]


@pytest.mark.parametrize("exact", [True, False])
def test_a_level_that_is_the_edge_is_inside(exact: bool) -> None:
    schedule = shift_schedule(35, exact_times=exact)
    for step in range(5, 34):  # float32 of the level, as a user would read it off the schedule
        level = float(schedule.sigmas[step])
        assert guidance_jumps(schedule, (0.0, level))[0] == step


@pytest.mark.parametrize("interval", [(0.5, 0.5), (0.8, 0.2), (-0.1, 0.5), (0.2, 1.1), (float("nan"), 1.0)])
def test_intervals_that_are_none_are_refused(pair, interval) -> None:
    given, noise, _, networks, _ = pair
    with pytest.raises(ValueError, match="interval is .*0 <= low < high <= 1"):
        guided_velocity(one_by_one(networks), given, noise, 1.0, interval)
    with pytest.raises(ValueError, match="interval is"):
        guidance_jumps(shift_schedule(4), interval)
