"""The path's identities and the law of training times (training.md section 13)."""

import math

import pytest
import torch

from orrery.flow import (
    interpolate,
    noise_from_velocity,
    sample_times,
    shift_times,
    velocity_target,
    x0_from_velocity,
)


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, 5, 2, 2)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))


def test_path_runs_from_data_to_noise(pair):
    x0, noise = pair
    assert torch.equal(interpolate(x0, noise, 0.0), x0)
    assert torch.equal(interpolate(x0, noise, 1.0), noise)
    x_t = interpolate(x0, noise, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[2], noise[2])
    assert torch.allclose(x_t[1], 0.75 * x0[1] + 0.25 * noise[1], atol=1e-15)


def test_velocity_is_the_derivative_of_the_path(pair):
    x0, noise = pair
    difference = (interpolate(x0, noise, 0.6) - interpolate(x0, noise, 0.2)) / 0.4
    assert torch.allclose(velocity_target(x0, noise), difference, atol=1e-12)


@pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.5, 0.9]), torch.rand(3, 5)])
def test_both_ends_come_back_from_velocity(pair, t):
    x0, noise = pair
    t = t.double() if isinstance(t, torch.Tensor) else t
    x_t, v = interpolate(x0, noise, t), velocity_target(x0, noise)
    assert torch.allclose(x0_from_velocity(x_t, v, t), x0, atol=1e-10)
    assert torch.allclose(noise_from_velocity(x_t, v, t), noise, atol=1e-10)


def test_per_frame_times_move_each_frame_alone(pair):
    x0, noise = pair
    t = torch.zeros(3, 5, dtype=torch.float64)
    t[1, 2] = 1
    x_t = interpolate(x0, noise, t)
    assert torch.equal(x_t[1, :, 2], noise[1, :, 2])
    assert torch.equal(x_t[1, :, 3], x0[1, :, 3]) and torch.equal(x_t[0], x0[0])


def test_edm_weighted_x0_error_is_velocity_error(pair):
    x0, noise = pair
    for sigma in (0.02, 1.0, 80.0):
        t = sigma / (1 + sigma)
        x_t = interpolate(x0, noise, t)
        guess = velocity_target(x0, noise) + 0.1 * x0.cos()
        velocity_error = (guess - velocity_target(x0, noise)).square().mean()
        x0_error = (x0_from_velocity(x_t, guess, t) - x0).square().mean()
        assert abs((1 + sigma) ** 2 / sigma**2 * x0_error / velocity_error - 1) < 1e-10


def test_wrong_shapes_are_named(pair):
    x0, noise = pair
    with pytest.raises(ValueError, match=r"\(2,\).*\(3, 4, 5, 2, 2\)"):
        interpolate(x0, noise, torch.rand(2))
    with pytest.raises(ValueError, match="same shape"):
        interpolate(x0, noise[:1], 0.5)


def test_shift_moves_times_towards_noise():
    u = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(shift_times(u, 5.0), torch.tensor([0.0, 5 / 6, 1.0], dtype=torch.float64))
    assert torch.equal(shift_times(u, 1.0), u)


def draw(n=400_000, **options):
    return sample_times(n, generator=torch.Generator().manual_seed(7), **options)


def test_median_of_times():
    assert abs(draw(high_noise_fraction=0).median().item() - 5 / 6) < 2e-3
    assert abs(draw(shift=1.0, high_noise_fraction=0).median().item() - 0.5) < 3e-3


def test_logit_of_unshifted_times_is_unit_normal():
    logits = draw(shift=1.0, high_noise_fraction=0).double().logit()
    assert abs(logits.mean()) < 0.01 and abs(logits.std() - 1) < 0.01


def test_high_noise_tail_holds_its_share():
    # t >= .98 needs u >= .98 / (5 - 4 * .98) = .9074 at shift 5.
    natural = 0.5 * math.erfc(math.log(0.98 / (5 - 4 * 0.98) / (1 - 0.98 / (5 - 4 * 0.98))) / math.sqrt(2))
    assert abs(natural - 0.0112) < 1e-4
    assert abs((draw(high_noise_fraction=0) >= 0.98).float().mean().item() - natural) < 1e-3
    assert abs((draw() >= 0.98).float().mean().item() - (0.05 + 0.95 * natural)) < 2e-3


def test_tail_is_flat_in_t():
    tail = draw(high_noise_fraction=1.0).double()
    assert tail.min() >= 0.98 and tail.max() < 1
    quarters = torch.histc(tail, 4, 0.98, 1.0) / len(tail)
    assert torch.allclose(quarters, torch.full((4,), 0.25, dtype=torch.float64), atol=5e-3)


def test_uniform_times():
    t = draw(shift=1.0, distribution="uniform", high_noise_fraction=0)
    assert torch.allclose(torch.histc(t, 5, 0, 1) / len(t), torch.full((5,), 0.2), atol=5e-3)


def test_times_are_repeatable_open_and_float32():
    t = draw(1000)
    assert torch.equal(t, draw(1000)) and t.dtype == torch.float32 and t.shape == (1000,)
    for distribution in ("uniform", "logit_normal"):
        t = draw(1_000_000, shift=1000.0, distribution=distribution)
        assert t.min() > 0 and t.max() < 1


@pytest.mark.parametrize(
    "options, named",
    [
        ({"batch": 0}, "batch is 0"),
        ({"batch": 1, "shift": 0.0}, "shift is 0.0"),
        ({"batch": 1, "distribution": "normal"}, "'normal'.*logit_normal"),
        ({"batch": 1, "high_noise_fraction": 1.5}, "high_noise_fraction is 1.5"),
        ({"batch": 1, "high_noise_width": 0.0}, "high_noise_width is 0.0"),
    ],
)
def test_impossible_laws_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        sample_times(**options)
