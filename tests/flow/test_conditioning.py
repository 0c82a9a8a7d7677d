"""Given frames: mask, input, times, output (base_model.md section 4.4, training.md section 13)."""

import pytest
import torch

from orrery.flow import FrameCondition, frame_mask, interpolate, sample_counts, velocity_target

B, C, T, H, W = 2, 4, 6, 3, 2


def latents(seed):
    return torch.randn(B, C, T, H, W, generator=torch.Generator().manual_seed(seed))


def test_mask_marks_the_first_frames():
    mask = frame_mask(2, T, H, W, batch=B)
    assert mask.shape == (B, 1, T, H, W) and mask.dtype == torch.float32
    assert (mask[:, :, :2] == 1).all() and (mask[:, :, 2:] == 0).all()
    assert frame_mask(1, T, H, W).shape == (1, 1, T, H, W)


def test_mask_with_a_count_per_sample():
    for counts in ([0, 3], torch.tensor([0, 3])):
        mask = frame_mask(counts, T, H, W)
        assert mask.sum(dim=(1, 3, 4)).tolist() == [[0] * T, [H * W] * 3 + [0] * 3]


def test_an_image_ignores_its_count():
    assert frame_mask(1, 1, H, W).sum() == 0
    assert frame_mask([2, 1], 1, H, W).shape == (2, 1, 1, H, W)


@pytest.mark.parametrize("count", [-1, T + 1, [0, T + 1]])
def test_impossible_counts_are_refused(count):
    with pytest.raises(ValueError, match=f"allowed is 0 to {T}"):
        frame_mask(count, T, H, W)


def test_counts_must_fit_the_batch():
    with pytest.raises(ValueError, match="one for each of 3 samples"):
        frame_mask([0, 1], T, H, W, batch=3)
    with pytest.raises(ValueError, match="whole number"):
        frame_mask(1.5, T, H, W)


def test_input_and_output_are_replaced_on_given_frames_only():
    given, x, v, noise = latents(0), latents(1), latents(2), latents(3)
    condition = FrameCondition(given, 2)
    replaced = condition.replace(x)
    assert torch.equal(replaced[:, :, :2], given[:, :, :2]) and torch.equal(replaced[:, :, 2:], x[:, :, 2:])
    out = condition.velocity(v, noise)
    assert torch.equal(out[:, :, :2], (noise - given)[:, :, :2]) and torch.equal(out[:, :, 2:], v[:, :, 2:])


def test_no_given_frames_changes_nothing():
    condition, x = FrameCondition(torch.full((B, C, T, H, W), float("nan")), 0), latents(1)
    assert torch.equal(condition.replace(x), x) and torch.equal(condition.velocity(x, latents(2)), x)


def test_any_frames_can_be_given_through_a_mask():
    mask = torch.zeros(B, 1, T, H, W)
    mask[:, :, -1] = 1
    condition = FrameCondition(latents(0), mask=mask, conditional_timestep=0.1)
    assert torch.equal(condition.replace(latents(1))[:, :, -1], latents(0)[:, :, -1])
    assert condition.timesteps(500.0).tolist()[0] == pytest.approx([500.0] * (T - 1) + [0.1])
    with pytest.raises(ValueError, match="mask must be"):
        FrameCondition(latents(0), mask=mask[:1])


def test_times_are_shared_or_per_frame():
    t = torch.tensor([900.0, 300.0])
    assert torch.equal(FrameCondition(latents(0), 2).timesteps(t), t)
    assert FrameCondition(latents(0), 2).timesteps(7).tolist() == [7.0, 7.0]
    own = FrameCondition(latents(0), torch.tensor([2, 0]), conditional_timestep=0.1).timesteps(t)
    assert own.dtype == torch.float32
    assert torch.equal(own, torch.tensor([[0.1, 0.1, 900, 900, 900, 900], [300.0] * T]))
    with pytest.raises(ValueError, match="conditional_timestep is -1"):
        FrameCondition(latents(0), 2, conditional_timestep=-1)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_given_frames_get_no_gradient_and_stay_in_the_denominator(count):
    x0, noise = latents(0), latents(1)
    condition = FrameCondition(x0, count)
    v = latents(2).requires_grad_()
    target = velocity_target(x0, noise)
    loss = (condition.velocity(v, noise) - target).square().mean()
    loss.backward()
    assert (v.grad[:, :, :count] == 0).all() and (v.grad[:, :, count:] != 0).all()
    generated = (v.detach() - target)[:, :, count:].square().mean()
    assert loss.item() == pytest.approx(generated.item() * (T - count) / T, rel=1e-5)


def test_given_frames_do_not_see_the_noise():
    condition = FrameCondition(latents(0), 1)
    inputs = [condition.replace(interpolate(latents(0), latents(seed), 0.9)) for seed in (1, 2)]
    assert torch.equal(inputs[0][:, :, 0], inputs[1][:, :, 0]) and not torch.equal(*inputs)


def test_counts_are_drawn_with_their_probabilities():
    counts = sample_counts(10_000, (0.5, 0.25, 0.25), torch.Generator().manual_seed(0))
    shares = counts.bincount(minlength=3) / 10_000
    assert torch.allclose(shares, torch.tensor([0.5, 0.25, 0.25]), atol=0.02)
    assert set(sample_counts(100, (0, 1.0)).tolist()) == {1}
    with pytest.raises(ValueError, match="sum to 1"):
        sample_counts(1, (0.5, 0.4))
