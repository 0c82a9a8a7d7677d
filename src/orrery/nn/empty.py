"""Networks without numbers: every shape, no memory, no time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

DRAWING = frozenset((Tensor.normal_, Tensor.uniform_, init.normal_, init.uniform_, init.kaiming_uniform_))


class _Unfilled(TorchFunctionMode):
    """Random numbers are not drawn for tensors that hold none. (torch would ask its compiler's tables how to, and
    spend most of a second on importing them.)"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in DRAWING:
            tensor = args[0] if args else kwargs["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks that are made within the block are on the meta device.

    >>> with shapes_only():
    ...     net = DiT(PRESETS["14b"])
    """
    with torch.device("meta"), _Unfilled():
        yield
