"""Control branches: weights, masks, several at once, and that nothing changes where nothing is asked for."""

import pytest
import torch

from orrery.nn.control import ActiveControl, ControlBranch, ControlConfig
from orrery.nn.dit import Conditions, DiT, DiTConfig

BASE = DiTConfig(width=48, depth=5, heads=2, adaln_rank=8, text_dim=16, context_dim=16)
CONTROL = ControlConfig(blocks=2, every=2, channels=48)


def randomised(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.4 * parameter.shape[-1] ** -0.5)


@pytest.fixture(scope="module")
def net() -> DiT:
    torch.manual_seed(0)
    network = DiT(BASE).eval().requires_grad_(False)
    randomised(network)
    return network


def branch(seed: int) -> ControlBranch:
    torch.manual_seed(seed)
    made = ControlBranch(BASE, CONTROL).eval().requires_grad_(False)
    randomised(made)
    return made


def velocity(net: DiT, *controls: ActiveControl) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 16, 3, 4, 6, generator=g), torch.randn(2, 5, 16, generator=g)
    mask = torch.zeros(2, 1, 3, 4, 6)
    mask[:, :, :1] = 1
    return net(x, torch.tensor([700.0, 300.0]), Conditions(text, mask, controls=controls))


def signal(seed: int, channels: int = 16) -> torch.Tensor:
    return torch.randn(2, channels, 3, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_weight_zero_is_the_base_bit_for_bit(net: DiT) -> None:
    plain = velocity(net)
    assert torch.equal(velocity(net, ActiveControl(branch(2), signal(3), 0)), plain)
    assert torch.equal(velocity(net, ActiveControl(branch(2), signal(3), torch.zeros(1, 3, 2, 3))), plain)
    assert (velocity(net, ActiveControl(branch(2), signal(3), 0.5)) - plain).abs().max() > 0.01


def test_a_new_branch_adds_nothing_and_begins_as_the_base(net: DiT) -> None:
    new = ControlBranch(BASE, CONTROL).initialise(net).eval()
    assert torch.equal(velocity(net, ActiveControl(new, signal(3))), velocity(net))
    mine, theirs = new.control_blocks[1].state_dict(), net.blocks[1].state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    assert len(new.zero_initialised()) == 3  # one before, two after


def residuals(net: DiT, *controls: ActiveControl) -> dict[int, torch.Tensor]:
    """The sum of what controls add, as the base sees it at its first tokens."""
    found: dict[int, torch.Tensor] = {}

    class Spy(ActiveControl):
        def residuals(self, state):
            for place, value in super().residuals(state):
                found[place] = found.get(place, 0) + value
            return []

    velocity(net, *(Spy(c.branch, c.latents, c.weight) for c in controls))
    return found


def test_two_branches_are_the_sum_of_their_residuals_in_any_order(net: DiT) -> None:
    one, two = ActiveControl(branch(2), signal(3), 0.3), ActiveControl(branch(4), signal(5), 0.6)
    alone = [residuals(net, ActiveControl(c.branch, c.latents, 1.0)) for c in (one, two)]
    both = residuals(net, one, two)
    assert sorted(both) == [0, 2]
    for place, value in both.items():
        assert torch.allclose(value, 0.3 * alone[0][place] + 0.6 * alone[1][place], atol=1e-6)
    assert torch.allclose(velocity(net, one, two), velocity(net, two, one), atol=1e-5)


def test_a_map_weighs_place_by_place(net: DiT) -> None:
    weight = torch.zeros(1, 3, 2, 3)
    weight[:, 1, :, 2] = 0.5
    whole = residuals(net, ActiveControl(branch(2), signal(3), 1.0))
    part = residuals(net, ActiveControl(branch(2), signal(3), weight))
    for place, value in part.items():
        assert torch.allclose(value, weight[..., None] * whole[place], atol=1e-6)
    uniform = velocity(net, ActiveControl(branch(2), signal(3), torch.full((2, 3, 2, 3), 0.7)))
    assert torch.allclose(uniform, velocity(net, ActiveControl(branch(2), signal(3), 0.7)), atol=1e-6)


def test_fewer_channels_are_padded(net: DiT) -> None:
    padded = torch.cat([signal(3), torch.zeros(2, 32, 3, 4, 6)], dim=1)
    made = branch(2)
    assert torch.equal(velocity(net, ActiveControl(made, padded)), velocity(net, ActiveControl(made, signal(3))))


def test_published_shapes() -> None:
    """Specification of Transfer, section 1.5: four blocks at 0, 7, 14, 21 and a patch of 520 numbers."""
    with torch.device("meta"):
        state = ControlBranch(DiTConfig(image_context=1152), ControlConfig()).state_dict()
    assert ControlConfig().places == (0, 7, 14, 21)
    assert state["control_embedder.proj.1.weight"].shape == (2048, 520)
    assert state["control_blocks.0.before_proj.weight"].shape == (2048, 2048)
    assert "control_blocks.1.before_proj.weight" not in state
    assert all(state[f"control_blocks.{i}.after_proj.bias"].shape == (2048,) for i in range(4))
    for name in ("q_img", "k_img", "v_img"):
        assert state[f"control_blocks.3.cross_attn.{name}.weight"].shape == (2048, 2048)
    assert state["control_blocks.3.cross_attn.k_img_norm.weight"].shape == (128,)


def test_wrong_signals_and_maps_are_refused(net: DiT) -> None:
    made = branch(2)
    for latents, message in (
        (signal(3)[:, :, :2], "control latents must be"),
        (signal(3, channels=64), "64 channels, this branch takes at most 48"),
    ):
        with pytest.raises(ValueError, match=message):
            velocity(net, ActiveControl(made, latents))
    with pytest.raises(ValueError, match="a weight map must be"):
        velocity(net, ActiveControl(made, signal(3), torch.ones(1, 3, 4, 6)))
    with pytest.raises(ValueError, match="needs a deeper base than 5"):
        ControlBranch(BASE, ControlConfig())
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        ControlConfig(every=0)
