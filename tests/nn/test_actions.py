"""Actions: against the published scheme written out anew, and that they act where they should and nowhere else."""

import math

import pytest
import torch
import torch.nn.functional as F

from orrery.nn.actions import group
from orrery.nn.dit import Conditions, DiT, DiTConfig

CONFIG = DiTConfig(width=48, depth=2, heads=2, adaln_rank=8, text_dim=16, context_dim=16, actions=12)


@pytest.fixture(scope="module")
def net() -> DiT:
    torch.manual_seed(0)
    network = DiT(CONFIG).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.5 * parameter.shape[-1] ** -0.5)
    return network


def inputs(frames: int = 4, batch: int = 2):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 16, frames, 4, 6, generator=g)
    text, actions = torch.randn(batch, 5, 16, generator=g), torch.randn(batch, frames - 1, 12, generator=g)
    mask = torch.zeros(batch, 1, frames, 4, 6)
    mask[:, :, :1] = 1
    return x, torch.full((batch, frames), 600.0), text, mask, actions


def test_names_and_shapes_are_the_published_ones() -> None:
    with torch.device("meta"):
        published = DiT(DiTConfig(actions=28)).state_dict()
    found = {name: list(value.shape) for name, value in published.items() if name.startswith("action")}
    assert found == {
        "action_embedder_B_D.fc1.weight": [8192, 28], "action_embedder_B_D.fc1.bias": [8192],
        "action_embedder_B_D.fc2.weight": [2048, 8192], "action_embedder_B_D.fc2.bias": [2048],
        "action_embedder_B_3D.fc1.weight": [8192, 28], "action_embedder_B_3D.fc1.bias": [8192],
        "action_embedder_B_3D.fc2.weight": [6144, 8192], "action_embedder_B_3D.fc2.bias": [6144],
    }  # fmt: skip


def test_the_published_scheme_written_out(net: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 4.6, step by step: what every block is handed as embedding and shared modulation."""
    x, t, text, mask, actions = inputs()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    forward = type(net.blocks[0]).forward
    monkeypatch.setattr(
        type(net.blocks[0]), "forward",
        lambda self, x, embedding, shared, *rest: seen.append((embedding, shared)) or forward(
            self, x, embedding, shared, *rest
        ),
    )  # fmt: skip
    net(x, t, Conditions(text, mask, actions=actions))
    weights = net.state_dict()
    half = torch.exp(torch.arange(24) * (-math.log(10000.0) / 24))
    angles = t[..., None] * 0.001 * half
    sinusoid = torch.cat([angles.cos(), angles.sin()], -1)
    time = F.silu(sinusoid @ weights["t_embedder.1.linear_1.weight"].T) @ weights["t_embedder.1.linear_2.weight"].T

    def mlp(name: str) -> torch.Tensor:
        w = {key: weights[f"{name}.{key}"] for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
        inner = actions @ w["fc1.weight"].T + w["fc1.bias"]
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        terms = inner @ w["fc2.weight"].T + w["fc2.bias"]
        whole = torch.zeros(2, 4, terms.shape[-1])
        whole[:, 1:] = terms
        return whole * (1 - mask[:, 0, :, 0, 0, None])

    raw = sinusoid + mlp("action_embedder_B_D")
    normed = raw / (raw.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights["t_embedding_norm.weight"]
    assert len(seen) == 2
    for embedding, shared in seen:
        assert torch.allclose(embedding[:, :, 0, 0], normed, atol=1e-5)
        assert torch.allclose(shared[:, :, 0, 0], time + mlp("action_embedder_B_3D"), atol=1e-5)


def test_without_actions_is_the_network_without_embedders(net: DiT) -> None:
    x, t, text, mask, _ = inputs()
    plain = DiT(DiTConfig(**{**CONFIG.__dict__, "actions": 0})).eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("action")})
    assert torch.equal(net(x, t, Conditions(text, mask)), plain(x, t, Conditions(text, mask)))


def test_actions_of_given_frames_do_not_count_and_others_do(net: DiT) -> None:
    x, t, text, mask, actions = inputs()
    mask[:, :, :2] = 1
    first = net(x, t, Conditions(text, mask, actions=actions))
    other = actions.clone()
    other[:, 0] += 1  # before latent frame 1, which is given
    assert torch.equal(net(x, t, Conditions(text, mask, actions=other)), first)
    other[:, 1] += 1
    changed = (net(x, t, Conditions(text, mask, actions=other)) - first).abs().mean((0, 1, 3, 4))
    assert changed[2] > 2 * changed[1] and changed[2] > 0.01


def test_one_set_of_actions_and_one_time_serve_a_batch(net: DiT) -> None:
    x, _, text, mask, actions = inputs()
    t = torch.tensor([600.0, 600.0])
    one = net(x, t, Conditions(text, mask, actions=actions[:1]))
    both = net(x, t, Conditions(text, mask, actions=actions[:1].expand(2, -1, -1)))
    assert torch.allclose(one, both, atol=1e-6)


def test_group() -> None:
    actions = torch.arange(24.0).reshape(1, 12, 2)
    assert group(actions, 4).shape == (1, 3, 8) and group(actions, 4)[0, 1].tolist() == list(range(8, 16))
    with pytest.raises(ValueError, match=r"N a multiple of 4, got \[1, 10, 2\]"):
        group(actions[:, :10], 4)


def test_refused(net: DiT) -> None:
    x, t, text, mask, actions = inputs()
    for wrong in (actions[:, :2], actions[..., :5], actions[0], torch.cat([actions, actions[:1]])):
        with pytest.raises(ValueError, match=r"actions must be \[2 or 1, 3, 12\]"):
            net(x, t, Conditions(text, mask, actions=wrong))
    plain = DiT(DiTConfig(**{**CONFIG.__dict__, "actions": 0}))
    with pytest.raises(ValueError, match="this network knows no actions"):
        plain(x, t, Conditions(text, mask, actions=actions))
