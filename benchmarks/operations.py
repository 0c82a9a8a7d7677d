"""What an operation costs at least, and what was dispatched: the counting behind `floor.py`.

with Operations(ceilings, network, part) as seen:
    network(x)
print(seen.total().least)
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from common import CPU_ATTENTION, Clock, attention_flop, copy_ceiling, matmul_ceiling, synchronise, timed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from orrery.errors import InputError

OVERHEAD = 3  # times the least time: above that neither ceiling explains what is measured
COPIES = {"cpu": (1, 8, 64, 256), "cuda": (1, 8, 64, 2048)}  # MiB: what fits into a cache moves faster


@dataclass
class Row:
    """Sums over the operations of a part: FLOP, bytes, operations, seconds at the ceilings, seconds measured."""

    flop: float = 0
    moved: float = 0
    calls: int = 0
    arithmetic: float = 0
    memory: float = 0
    least: float = 0
    by_arithmetic: float = 0  # seconds of `least` in operations that arithmetic bounds
    seconds: float = 0

    def add(self, other: "Row") -> None:
        """Sum this and another row."""
        for each in fields(Row):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def bound(self, measured: float | None) -> str:
        """What the time is spent on."""
        if measured is not None and measured > OVERHEAD * self.least:
            return "overhead"
        return "arithmetic" if 2 * self.by_arithmetic >= self.least else "memory"


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s by dtype, and (bytes, bytes/s) of copies from small to large."""

    flops: dict[torch.dtype, float]
    copies: tuple[tuple[float, float], ...]

    @staticmethod
    def measured(device: str, dtypes: Sequence[torch.dtype], clock: Clock) -> "Ceilings":
        """Of this machine, now."""
        kind = torch.device(device).type
        best = {dtype: max(matmul_ceiling(device, dtype, clock=clock) for _ in range(3)) for dtype in dtypes}
        flops = {dtype: 1e12 * value for dtype, value in best.items()}
        copies = tuple((2.0 * n * 2**20, 1e9 * copy_ceiling(device, n, clock)) for n in COPIES[kind])
        return Ceilings(flops, copies)

    @staticmethod
    def told(text: str) -> "Ceilings":
        """Out of TFLOP/s:GB/s or TFLOP/s:GB/s:TFLOP/s in float32."""
        try:
            numbers = [float(number) for number in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3) or min(numbers) <= 0:
            raise InputError(f"--ceilings must be TFLOP/s:GB/s[:TFLOP/s in float32], above 0, got {text}")
        half, single = 1e12 * numbers[0], 1e12 * numbers[2 if len(numbers) == 3 else 0]
        flops = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
        return Ceilings(flops, ((0.0, 1e9 * numbers[1]),))

    def times(self, flop: float, moved: float, dtype: torch.dtype) -> tuple[float, float]:
        """Least seconds of an operation: of its arithmetic, of its bytes (at the speed of a copy of that size)."""
        fitting = [speed for size, speed in self.copies if size <= moved]
        speed = fitting[-1] if fitting else max(speed for _, speed in self.copies)
        return flop / self.flops[dtype] if flop else 0.0, moved / speed

    def __str__(self) -> str:
        arithmetic = ", ".join(f"{value / 1e12:.3g} TFLOP/s in {str(kind)[6:]}" for kind, value in self.flops.items())
        copies = ", ".join(
            f"{speed / 1e9:.3g} GB/s" + (f" from {size / 2**20:,.0f} MiB on" if len(self.copies) > 1 else "")
            for size, speed in self.copies
        )
        return f"Ceilings: {arithmetic}; moving {copies}."


class AsOnGPU(TorchFunctionMode):
    """The meta device as a GPU has it: attention and RMSNorm are one kernel each, not spelled out; and a question about
    numbers (transformers asks whether sequences are not packed) is answered with yes."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            told = dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args)) | kwargs
            words = {"attn_mask": told.get("attn_mask"), "is_causal": told.get("is_causal", False)}
            return CPU_ATTENTION.default(told["query"], told["key"], told["value"], **words)[0]
        if function in (F.rms_norm, torch.rms_norm):
            told = dict(zip(("input", "normalized_shape", "weight", "eps"), args)) | kwargs
            norm = torch.ops.aten._fused_rms_norm.default
            return norm(told["input"], told["normalized_shape"], told.get("weight"), told.get("eps"))[0]
        if function is Tensor.__bool__ and args[0].is_meta:
            return True
        return function(*args, **kwargs)


class Operations(TorchDispatchMode):
    """Sums what is dispatched while it is active, by part.

    Args:
        network: whose modules and weights name the operations; None for none.
        part: (name of the module or weight, "self", "cross", "matmul" or "other") -> the part.
        clock: times every operation; None for none. On a GPU events do.
    """

    def __init__(
        self,
        ceilings: Ceilings,
        network: nn.Module | None = None,
        part: Callable[[str, str], str] = lambda name, kind: "all",
        clock: Clock | None = None,
        cuda: bool = False,
    ) -> None:
        super().__init__()
        self.rows: dict[str, Row] = defaultdict(Row)
        self.uncounted: set[str] = set()
        self._ceilings, self._part, self._clock, self._cuda = ceilings, part, clock, cuda
        self._network, self._stack, self._hooks = network, [""], ExitStack()
        self._events: list[tuple[Row, Any, Any]] = []
        self._writes: dict[Any, tuple[set[str], bool]] = {}
        self._weights: dict[int, str] = {}
        shared: set[int] = set()
        for name, weight in [] if network is None else network.named_parameters():
            storage = weight.untyped_storage()._cdata
            shared |= {storage} & self._weights.keys()
            self._weights[storage] = name
        for storage in shared:  # of a file that is one piece of memory: its name says nothing
            del self._weights[storage]

    def __enter__(self) -> "Operations":
        for name, module in [] if self._network is None else self._network.named_modules():
            before = module.register_forward_pre_hook(lambda *_, name=name: self._stack.append(name))
            after = module.register_forward_hook(lambda *_: (self._stack.pop(), None)[1], always_call=True)
            self._hooks.callback(before.remove)
            self._hooks.callback(after.remove)
        return super().__enter__()

    def __exit__(self, *problem: Any) -> None:
        super().__exit__(*problem)
        self._hooks.close()
        if self._events:
            synchronise()
        for row, began, ended in self._events:
            row.seconds += began.elapsed_time(ended) / 1e3
        self._events.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result, seconds, events = self._run(function, args, kwargs)
        moved = self._moved(function, args, kwargs, result)
        if moved is None:
            return result
        row = self._row(function, args, kwargs, result, moved)
        row.seconds += seconds
        if events is not None:
            self._events.append((row, *events))
        return result

    def _run(self, function: Any, args: Any, kwargs: Any) -> tuple[Any, float, tuple[Any, Any] | None]:
        """The operation's result, its seconds, and the events around it that will tell them on a GPU."""
        if self._clock is None:
            return function(*args, **kwargs), 0.0, None
        if self._cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            result = function(*args, **kwargs)
            events[1].record()
            return result, 0.0, events
        began = self._clock()
        result = function(*args, **kwargs)
        return result, self._clock() - began, None

    def _moved(self, function: Any, args: Any, kwargs: Any, result: Any) -> float | None:
        """Bytes read and written; None of a view, and of what only makes room."""
        if function not in self._writes:
            written = {each.name for each in function._schema.arguments if each.alias_info and each.alias_info.is_write}
            name = function._schema.name.split("::")[1]
            blind = name in ("copy_", "fill_", "zero_", "normal_", "uniform_") or "out" in written
            self._writes[function] = written, blind
        written, blind = self._writes[function]
        named = dict(zip((each.name for each in function._schema.arguments), args)) | kwargs
        read = [t for key, value in named.items() if not (blind and key in written) for t in _tensors(value)]
        outputs = [t for key in written for t in _tensors(named.get(key))] if written else _tensors(result)
        held = {tensor.untyped_storage()._cdata for tensor in read}
        fresh = outputs if written else [t for t in outputs if t.untyped_storage()._cdata not in held]
        packet = str(function._overloadpacket).split(".")[-1]
        if not fresh or packet.startswith(("empty", "new_empty")):
            return None
        if packet in ("embedding", "index_select", "gather", "index"):  # read the rows that they give, not all
            return 2.0 * sum(map(_bytes, fresh))
        return float(sum(map(_bytes, read)) + sum(map(_bytes, fresh)))

    def _row(self, function: Any, args: Any, kwargs: Any, result: Any, moved: float) -> Row:
        """The part's row, with this operation added."""
        packet, flop, kind = function._overloadpacket, 0.0, "other"
        name, inputs = self._stack[-1], _tensors((args, kwargs))
        formula = attention_flop if packet is CPU_ATTENTION else flop_registry.get(packet)
        if formula is not None:
            flop, kind = float(_flop(formula, packet, args, kwargs, result)), "matmul"
            weights = (self._weights.get(tensor.untyped_storage()._cdata) for tensor in inputs)
            name = next((weight for weight in weights if weight), name)
        elif function.namespace not in ("aten", "prim", "prims"):
            self.uncounted.add(str(packet))
        if "attention" in str(packet):
            kind = "self" if args[0].shape[2] == args[1].shape[2] else "cross"
        dtype = next((tensor.dtype for tensor in inputs if tensor.is_floating_point()), torch.float32)
        arithmetic, memory = self._ceilings.times(flop, moved, dtype)
        bounded = arithmetic if arithmetic >= memory else 0.0
        row = self.rows[self._part(name, kind)]
        row.add(Row(flop, moved, 1, arithmetic, memory, max(arithmetic, memory), bounded))
        return row

    def total(self) -> Row:
        """Of all parts."""
        whole = Row()
        for row in self.rows.values():
            whole.add(row)
        return whole


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, what `expand` repeats counted once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride or not size else 1
    return count * tensor.element_size()


def _flop(formula: Callable[..., int], packet: Any, args: Any, kwargs: Any, result: Any) -> int:
    if packet is CPU_ATTENTION:
        return formula(*(tensor.shape for tensor in args[:3]))
    return formula(*args, **kwargs, out_val=result)


def timing_cost(device: str, clock: Clock) -> tuple[float, float]:
    """Seconds that timing an operation adds to it, and seconds of the smallest operation, launch included."""
    x, count = torch.ones(1, device=device), 3000

    def several() -> None:
        for _ in range(count):
            x.add_(1)

    several()
    plain = min(timed(several, clock) for _ in range(3)) / count
    if torch.device(device).type == "cuda":
        return 0.0, plain  # events are part of the stream
    watched = []
    for _ in range(3):
        with Operations(Ceilings({torch.float32: 1e12}, ((0.0, 1e12),)), clock=clock) as seen:
            several()
        watched.append(seen.total().seconds / count)
    return max(0.0, min(watched) - plain), plain
