"""How much memory a computation needs, without doing it: the networks themselves, run on the meta device.

Every tensor that an operation makes is counted while it lives. So a plan is always a plan of the code as it is, at any
size, for a machine that is not at hand. Not counted: a kernel's own workspace and the allocator's fragmentation, for
which the plan keeps a margin.
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _FusedAttention(TorchFunctionMode):
    """Attention as a fused kernel has it: nothing but its output. (On meta it would be spelled out, N x N.)"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            query, value = args[0], args[2]  # [B, heads, N, dim], views of [B, N, heads, dim], as the output is
            batch, heads, tokens = query.shape[:3]
            return query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        return function(*args, **(kwargs or {}))


class _LiveBytes(TorchDispatchMode):
    """Sums the storages that operations make, as long as they live; views count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes alive at once of the tensors that `run` makes, beyond those that it was given.

    `run` computes on meta tensors, without gradients.
    """
    counter = _LiveBytes()
    with torch.no_grad(), _FusedAttention(), counter:
        result = run()
    del result
    return counter.peak


def parameter_bytes(module: torch.nn.Module, dtype: torch.dtype) -> int:
    """Of a network's weights in a dtype; quantised ones as they are."""
    return sum(w.numel() * (1 if w.dtype.itemsize == 1 else dtype.itemsize) for w in module.parameters())
