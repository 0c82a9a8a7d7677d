"""Optimizers of a recipe: which parameter goes to Muon and which to AdamW, the schedule, the clipped step.

Peak learning rates are explicit; the schedule is a factor in 0..1 and is defined past the end (it stays at its last
value). Weight decay is for matrices only, never for norms, biases and embeddings (training.md 12.5).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from orrery.train.muon import Muon
from orrery.train.recipe import OptimizerRecipe


def schedule(step: int, steps: int, recipe: OptimizerRecipe) -> float:
    """The factor on the peak learning rate at `step` (0-based) of `steps`."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    if recipe.decay == "none":
        return 1.0
    start = recipe.warmup + recipe.hold * max(steps - recipe.warmup, 0)
    progress = min(max((step - start) / max(steps - start, 1), 0.0), 1.0)
    return 1 - progress if recipe.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def is_matrix(parameter: Tensor) -> bool:
    """Whether a parameter is a real matrix when reshaped to [out, -1] (a norm's scale [C, 1, 1, 1] is not)."""
    return parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) > 1


class Optimizers:
    """One or two torch optimizers, stepped together after the global gradient norm was clipped.

    Args:
        model: its parameters that require a gradient.
        plain: `plain(name)` says that a matrix belongs to AdamW all the same (embeddings, first and last layers).
        recipe: names, rates, schedule.
        steps: length of the run, for the schedule.
        bf16: whether Muon may compute in bfloat16.
    """

    def __init__(
        self,
        model: nn.Module,
        plain: Callable[[str], bool],
        recipe: OptimizerRecipe,
        steps: int,
        bf16: bool = False,
    ) -> None:
        self.recipe, self.steps = recipe, steps
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.params = [p for _, p in named]
        matrices = [p for name, p in named if is_matrix(p) and not plain(name)]
        plain_matrices = [p for name, p in named if is_matrix(p) and plain(name)]
        vectors = [p for _, p in named if not is_matrix(p)]
        muon = recipe.name == "muon"
        decayed = plain_matrices if muon else matrices + plain_matrices
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        self.all: list[torch.optim.Optimizer] = []
        if groups:
            self.all.append(torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, foreach=True))
        if muon and matrices:
            assert recipe.matrix_lr is not None
            self.all.append(Muon(matrices, recipe.matrix_lr, recipe.momentum, recipe.weight_decay, bf16))
        self._peaks = [(recipe.matrix_lr if isinstance(o, Muon) else None) or recipe.lr for o in self.all]

    def step(self, step: int, loss: Tensor) -> tuple[bool, float]:
        """Clip, and update unless the loss or a gradient is not finite. Gradients are freed.

        Returns:
            (whether the weights moved, the gradient norm before clipping).
        """
        grads = [p.grad for p in self.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        value, total = torch.stack([loss.detach().float(), norm.float()]).tolist()
        finite = math.isfinite(value) and math.isfinite(total)
        if finite:
            torch.nn.utils.clip_grads_with_norm_(self.params, self.recipe.clip, norm, foreach=True)
            factor = schedule(step, self.steps, self.recipe)
            for optimizer, peak in zip(self.all, self._peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * factor
                optimizer.step()
        for p in self.params:
            p.grad = None
        return finite, total

    def state(self) -> list[dict[str, Any]]:
        """The optimizers' states, in order."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state(self, states: list[dict[str, Any]]) -> None:
        """Restore `state()`."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


class EMA:
    """An exponential moving average of a model's weights, as a second model of the same class.

    The decay is min(decay, (1 + n) / (10 + n)) after n updates, so that the average is useful from the first steps on.
    """

    def __init__(self, model: nn.Module, copy: nn.Module, decay: float) -> None:
        self.model, self.decay, self.updates = copy.eval().requires_grad_(False), decay, 0
        self._averages: list[Tensor] = list(copy.parameters())
        self._weights: list[Tensor] = [p.detach() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the model's weights of now."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._weights, 1 - decay)
