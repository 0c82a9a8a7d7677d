"""Guidance convention: g = 0 is the conditional velocity."""

import torch

from orrery.flow import FrameCondition, guided, guided_velocity, one_by_one, side_by_side


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
