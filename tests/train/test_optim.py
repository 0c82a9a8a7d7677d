"""Muon's orthogonal updates, parameter groups, the schedule, EMA, and steps that must not happen."""

import copy

import pytest
import torch
from torch import Tensor, nn

from orrery.train.muon import Muon, orthogonalise
from orrery.train.optim import EMA, Optimizers, is_matrix, schedule
from orrery.train.recipe import OptimizerRecipe


@pytest.mark.parametrize("shape", [(16, 64), (64, 16), (24, 24)])
def test_orthogonalise_keeps_the_singular_vectors_and_levels_the_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    values = torch.linspace(1, 0.02, min(shape))
    result = orthogonalise((u * values) @ vh.unsqueeze(0))[0]
    core = u.mT @ result @ vh.mT
    assert torch.allclose(core, torch.diag(core.diagonal()), atol=2e-3), "the singular vectors moved"
    assert core.diagonal().min() > 0.6 and core.diagonal().max() < 1.3


def test_gram_form_equals_the_plain_iteration() -> None:
    torch.manual_seed(1)
    x = torch.randn(3, 12, 40)
    plain = x / (x.norm(dim=(1, 2), keepdim=True) * 1.01 + 1e-7)
    for _ in range(5):
        gram = plain @ plain.mT
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ plain
    assert torch.allclose(orthogonalise(x), plain, atol=1e-4)


def test_muon_update_has_adams_size_and_goes_downhill() -> None:
    torch.manual_seed(2)
    target = torch.randn(20, 3, 2, 3)
    weight = nn.Parameter(torch.zeros(20, 3, 2, 3))
    optimizer = Muon([weight], lr=0.05)
    losses = []
    for step in range(120):
        loss = (weight - target).square().mean()
        loss.backward()
        before = weight.detach().clone()
        optimizer.step()
        if step == 0:
            # 18 singular values near 1 in a 20x18 matrix: rms = sqrt(18 / 360) = 0.22, times 0.2 sqrt(20) = 0.2
            assert 0.12 < float((weight.detach() - before).square().mean().sqrt()) / 0.05 < 0.26
        weight.grad = None
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.hidden = nn.Linear(8, 8)
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.first(x)) * self.gamma[:, 0, 0]


def optimizers(model: nn.Module, **more: object) -> Optimizers:
    recipe = OptimizerRecipe(**({"name": "muon", "lr": 0.01, "matrix_lr": 0.02, "warmup": 0} | more))  # type: ignore[arg-type]
    return Optimizers(model, lambda name: name.startswith("first"), recipe, steps=10)


def test_only_hidden_matrices_go_to_muon_and_only_matrices_decay() -> None:
    model = Small()
    assert not is_matrix(model.gamma) and is_matrix(model.hidden.weight)
    adamw, muon = optimizers(model, weight_decay=0.1).all
    assert [p is model.hidden.weight for p in muon.param_groups[0]["params"]] == [True]
    decayed, free = adamw.param_groups
    assert [p is model.first.weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 0.1
    assert len(free["params"]) == 3 and free["weight_decay"] == 0
    assert len(optimizers(model, name="adamw", matrix_lr=None).all) == 1


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(fault: str) -> None:
    torch.manual_seed(0)
    model = Small()
    both = optimizers(model)
    x = torch.randn(5, 4)
    for step in range(2):
        loss = model(x).square().mean()
        loss.backward()
        assert both.step(step, loss)[0]
    weights, states = copy.deepcopy(model.state_dict()), copy.deepcopy(both.state())
    if fault == "loss":
        loss = model(x).mean() * float("nan")
    else:
        loss = (model.gamma - model.gamma).abs().sqrt().sum() + model(x).sum()  # finite, with a gradient that is not
        assert torch.isfinite(loss)
    loss.backward()
    moved, norm = both.step(2, loss)
    assert not moved and norm != norm or norm == float("inf")
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    for before, after in zip(states, both.state(), strict=True):
        for index, values in before["state"].items():
            assert all(torch.equal(v, after["state"][index][k]) for k, v in values.items())


def test_gradients_are_clipped_to_the_global_norm() -> None:
    torch.manual_seed(0)
    model = Small()
    both = optimizers(model, name="adamw", matrix_lr=None, clip=0.5)
    seen: list[float] = []
    both.all[0].register_step_pre_hook(
        lambda *_: seen.append(
            float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
        )
    )
    loss = 100 * model(torch.randn(5, 4)).square().mean()
    loss.backward()
    _, norm = both.step(0, loss)
    assert norm > 5 and seen[0] == pytest.approx(0.5, rel=1e-4)


def test_schedule_warms_up_holds_decays_and_is_defined_past_the_end() -> None:
    recipe = OptimizerRecipe(warmup=10, hold=0.5, decay="linear")
    values = [schedule(step, 110, recipe) for step in (0, 4, 9, 10, 59, 85, 109, 110, 500)]
    assert values == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.02, 0, 0])
    cosine = OptimizerRecipe(warmup=0, decay="cosine")
    assert [schedule(s, 100, cosine) for s in (0, 50, 100)] == pytest.approx([1, 0.5, 0])
    assert schedule(999, 10, OptimizerRecipe(warmup=5, decay="none")) == 1


def test_ema_follows_its_formula() -> None:
    model = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
    ema = EMA(model, copy.deepcopy(model), decay=0.5)
    expected, n = 1.0, 0
    for value in (2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 3.0, 5.0):
        with torch.no_grad():
            model.weight.fill_(value)
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected, n = decay * expected + (1 - decay) * value, n + 1
        assert float(ema.model.weight[0, 0]) == pytest.approx(expected, rel=1e-5)
    assert not ema.model.weight.requires_grad and decay == 0.5
