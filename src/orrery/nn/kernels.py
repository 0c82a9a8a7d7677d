"""One function in front of every attention kernel; which one serves it, by what measurement.

`attention` runs torch's scaled_dot_product_attention (SDPA), the reference, until `using` names another
kernel: plain matrix products, SDPA held to one of its own kernels, FlashAttention 2 (arXiv 2307.08691), 3 (arXiv
2407.08608) or 4 (arXiv 2603.05451), or SageAttention (arXiv 2411.10958), whose 8-bit operands make it inexact. `choose`
times the exact ones on the shape at hand. Packages are imported when they are asked for, and only then.
"""

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from orrery.errors import note, one_line

HALF = (torch.float16, torch.bfloat16)
CALLS = 3  # timed, after one that is not
SAMPLE = (1, 4096, 8, 128)  # tensors on which the error of an inexact kernel is stated
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}  # between exact kernels, relative
MARGIN = 0.98  # a kernel replaces the reference only where it takes less than this share of the reference's time


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The reference. The arguments stand by position: who counts memory or arithmetic looks for them there."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Two matrix products and the softmax in float32 between them, with all Nq x Nk scores in memory."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return (scores.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _held_to(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return run


@functools.cache  # of what was found: a failed import is tried again
def _function(modules: tuple[str, ...], name: str) -> Callable[..., Any]:
    """The function of the first of `modules` that can be imported; ImportError names why none can."""
    problem = ""
    for module in modules:
        try:
            return getattr(import_module(module), name)
        except Exception as error:  # a package built for another torch or CUDA fails in its own ways
            absent = isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")
            if not absent:
                problem = f"the package {module} cannot be used: {one_line(error)}"
            problem = problem or f"the package {module} is not installed"
    raise ImportError(problem)


@dataclass(frozen=True)
class Package:
    """A function of a package that others wrote, for q, k, v [B, N, heads, dim]; modules: where it may live, in order
    of preference. It returns the answer, or a tuple that begins with it."""

    modules: tuple[str, ...]
    function: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _function(self.modules, self.function)(q, k, v, **dict(self.options))
        return out[0] if isinstance(out, tuple) else out

    def problem(self) -> str:
        """Why it cannot be imported, or an empty string."""
        try:
            _function(self.modules, self.function)
        except ImportError as error:
            return str(error)
        return ""


@dataclass(frozen=True)
class Kernel:
    """A way to compute attention.

    exact: it differs from the reference by rounding alone. run: q [B, Nq, heads, dim], k and v [B, Nk, heads, dim] ->
    [B, Nq, heads, dim]. capabilities: the major compute capabilities of the CUDA GPUs that it runs on; None for
    any device. scores: it holds all Nq x Nk scores in memory, so it is for short sequences; `choose` passes it over.
    """

    name: str
    exact: bool
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    dtypes: tuple[torch.dtype, ...] | None = HALF
    capabilities: tuple[int, ...] | None = (8, 9, 10, 11, 12)
    scores: bool = False

    def unavailable(self, dtype: torch.dtype, device: str | torch.device) -> str:
        """Why it cannot serve tensors of a dtype on a device, or an empty string."""
        device = torch.device(device)
        if self.capabilities is not None:
            if device.type != "cuda" or not torch.cuda.is_available():
                return f"it needs a CUDA GPU, the tensors are on {device.type}"
            major, minor = torch.cuda.get_device_capability(device)
            if major not in self.capabilities:
                needed = ", ".join(f"{one}.x" for one in self.capabilities)
                return f"it is built for compute capability {needed}, this GPU has {major}.{minor}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it takes {', '.join(str(one) for one in self.dtypes)}, not {dtype}"
        return self.run.problem() if isinstance(self.run, Package) else ""


KERNELS = {
    kernel.name: kernel
    for kernel in (
        Kernel("sdpa", True, _sdpa, None, None),
        Kernel("products", True, _products, None, None, scores=True),
        Kernel("sdpa-cudnn", True, _held_to(SDPBackend.CUDNN_ATTENTION)),
        Kernel("sdpa-flash", True, _held_to(SDPBackend.FLASH_ATTENTION)),
        Kernel("sdpa-efficient", True, _held_to(SDPBackend.EFFICIENT_ATTENTION), (*HALF, torch.float32)),
        Kernel("flash-attn-2", True, Package(("flash_attn",), "flash_attn_func")),
        Kernel(
            "flash-attn-3", True,
            Package(("flash_attn_interface", "flash_attn_3.flash_attn_interface"), "flash_attn_func"),
            capabilities=(9,),
        ),
        Kernel("flash-attn-4", True, Package(("flash_attn.cute",), "flash_attn_func")),
        Kernel(
            "sage-attention", False, Package(("sageattention",), "sageattn", (("tensor_layout", "NHD"),)),
            capabilities=(8, 9, 12),
        ),
    )
}  # fmt: skip

# Process-wide, and a plain module variable: torch.compile guards on it without a graph break, which it does not do for
# a ContextVar (it cannot trace one) or a threading.local (it goes on with the value that it saw first).
_current: Kernel = KERNELS["sdpa"]
_asked_for: list[tuple[object, Kernel]] = [(None, KERNELS["sdpa"])]


@torch.library.custom_op("orrery::packaged_attention", mutates_args=())
def _opaque(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    """A package's kernel as one operation, which torch.compile does not look into."""
    return KERNELS[name].run(q, k, v).contiguous()


@_opaque.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, name: str) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full bidirectional attention, scaled by 1/sqrt(dim), by the kernel that `using` named.

    q [B, Nq, heads, dim], k and v [B, Nk, heads, dim], one dtype and one device -> [B, Nq, heads, dim].
    A k and v of batch 1 serve every item of the batch. On the meta device it is always SDPA. ValueError where the
    named kernel cannot serve these tensors: it is never replaced silently.
    """
    shared = k.shape[0] == 1 and q.shape[0] > 1
    if shared:
        k, v = k.expand(q.shape[0], -1, -1, -1), v.expand(q.shape[0], -1, -1, -1)
    kernel = _current
    if kernel.name == "sdpa" or q.device.type == "meta":
        return _sdpa(q, k, v)
    _check(kernel, q)
    if shared:  # not every kernel knows a stride of 0
        k, v = k.contiguous(), v.contiguous()
    if not isinstance(kernel.run, Package):
        return kernel.run(q, k, v)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        if not kernel.exact:
            raise ValueError(f"kernel is {kernel.name!r}, which has no gradients; allowed in training are {_exact()}")
        return kernel.run(q, k, v)
    return _opaque(q, k, v, kernel.name)


def _check(kernel: Kernel, q: Tensor) -> None:
    """What can differ from call to call; `find_kernel` has looked at the rest."""
    if kernel.capabilities is not None and q.device.type != "cuda":
        raise ValueError(f"kernel {kernel.name!r} needs a CUDA GPU, the tensors are on {q.device.type}")
    if kernel.dtypes is not None and q.dtype not in kernel.dtypes:
        raise ValueError(f"kernel {kernel.name!r} takes {kernel.dtypes}, got {q.dtype}")


def _exact() -> str:
    return ", ".join(name for name, kernel in KERNELS.items() if kernel.exact)


def find_kernel(name: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device | None = None) -> Kernel:
    """A kernel by name, able to serve tensors of a dtype on a device (None: the GPU where there is one, else the CPU).

    ValueError for a name that is not known or a kernel that is not available, with the names allowed and the reasons.
    """
    device = device or _default_device()
    if name in KERNELS and not KERNELS[name].unavailable(dtype, device):
        return KERNELS[name]
    reasons = {one: kernel.unavailable(dtype, device) for one, kernel in KERNELS.items()}
    available = ", ".join(one for one, reason in reasons.items() if not reason)
    if name in KERNELS:
        raise ValueError(f"kernel {name!r} is not available: {reasons[name]}; available are {available}")
    others = _grouped({one: reason for one, reason in reasons.items() if reason})
    raise ValueError(f"kernel is {name!r}; allowed are {available}{f'; not available are {others}' if others else ''}")


def _default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _grouped(reasons: Mapping[str, str]) -> str:
    """Each reason once, after the names that share it."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(group)} ({reason})" for reason, group in names.items())


def current_kernel() -> str:
    """The name of the kernel that `attention` runs now."""
    return _current.name


def _apply() -> None:
    global _current
    _current = _asked_for[-1][1]


@contextmanager
def using(name: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device | None = None) -> Iterator[Kernel]:
    """Let `attention` run a kernel within the block. See `find_kernel` for the arguments and errors.

    The kernel is that of the whole process: of two threads whose blocks overlap, the last to enter decides, and when
    both have left, what was set before them holds again.
    """
    mine = (object(), _announced(name, dtype, device))
    _asked_for.append(mine)
    _apply()
    try:
        yield mine[1]
    finally:
        _asked_for.remove(mine)
        _apply()


def _announced(name: str, dtype: torch.dtype, device: str | torch.device | None) -> Kernel:
    """The kernel; an inexact one with a line that says how far from the reference it was just found to be."""
    kernel = find_kernel(name, dtype, device)
    if not kernel.exact:
        device = torch.device(device or _default_device())
        error = kernel_error(name, *random_qkv(SAMPLE, SAMPLE, dtype, device))
        note(
            f"attention runs {name}, which is inexact (8-bit operands): on normal queries, keys and values of "
            f"{list(SAMPLE)} it is {error:.2%} away from SDPA (relative root mean square)"
        )
    return kernel


@torch.no_grad()
def kernel_error(name: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """How far a kernel's answer is from the reference's: the root mean square of the difference over that of the
    reference. q [B, Nq, heads, dim], k and v [B, Nk, heads, dim]."""
    return relative_error(find_kernel(name, q.dtype, q.device).run(q, k, v), _sdpa(q, k, v))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Root mean square of found - expected over that of expected, [B, N, heads, dim] both; in fp32, by pieces."""
    difference = size = 0.0
    for a, b in zip(found.split(8192, dim=1), expected.split(8192, dim=1), strict=True):
        difference += float((a.float() - b.float()).square().sum())
        size += float(b.float().square().sum())
    return (difference / size) ** 0.5


@dataclass
class Measured:
    """Milliseconds of the candidates that ran, why the others did not, and the name of the winner."""

    milliseconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    best: str = ""

    def __str__(self) -> str:
        times = ", ".join(f"{name} {ms:.3g} ms" for name, ms in sorted(self.milliseconds.items(), key=lambda x: x[1]))
        return f"{times}{f'; left out: {_grouped(self.refused)}' if self.refused else ''}"


@torch.no_grad()
def measure(candidates: Mapping[str, Callable[[], Tensor]], device: torch.device) -> Measured:
    """Time what computes one thing in several ways; the first is the reference.

    Each runs once untimed and CALLS times timed, of which the best counts. One that raises, or whose answer is further
    from the reference's than rounding explains (TOLERANCE), is out. Errors of the reference itself are raised.
    """
    result, reference, first = Measured(), None, next(iter(candidates))
    for name, run in candidates.items():
        try:
            out = run()
            if reference is None:
                reference = out
            elif not (gap := relative_error(out, reference)) <= TOLERANCE[out.dtype]:  # nan is out, too
                result.refused[name] = f"its answer is {gap:.1e} away from that of {first}"
                continue
            del out
            result.milliseconds[name] = min(_milliseconds(run, device) for _ in range(CALLS))
        except Exception as error:  # packages raise what they like; the reason is printed
            if name == first:
                raise
            result.refused[name] = one_line(error)[:160]
    times = result.milliseconds
    fastest = min(times, key=lambda name: times[name])
    result.best = fastest if times[fastest] < MARGIN * times[first] else first
    return result


def _milliseconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - began)
    with torch.cuda.device(device):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def random_qkv(
    q_shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries, keys and values from a generator of their own: measuring leaves torch's global seeds alone."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(s, generator=generator, dtype=dtype, device=device) for s in (q_shape, kv_shape, kv_shape))
    return q, k, v


_choices: dict[tuple[Any, ...], str] = {}


def choose(
    q_shape: tuple[int, int, int, int],
    kv_shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str | torch.device,
) -> str:
    """The name of the fastest exact kernel for q [B, Nq, heads, dim] and k, v [B, Nk, heads, dim] on a device.

    On a GPU every available one is timed on that very shape, once a process for shapes whose lengths have the same
    power of two, and one line says what was chosen and why. On other devices it is "sdpa", without a line: there is
    nothing to choose from.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return "sdpa"
    key = (device, dtype, *(s[0] for s in (q_shape, kv_shape)), *(s[1].bit_length() for s in (q_shape, kv_shape)))
    key = (*key, *q_shape[2:])
    if key not in _choices:
        _choices[key] = _measured_choice(q_shape, kv_shape, dtype, device)
    return _choices[key]


def _measured_choice(
    q_shape: tuple[int, ...], kv_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> str:
    about = f"attention {list(q_shape)} x {list(kv_shape)} {dtype} on {torch.cuda.get_device_name(device)}"
    tried = {name: kernel for name, kernel in KERNELS.items() if kernel.exact and not kernel.scores}
    reasons = {name: kernel.unavailable(dtype, device) for name, kernel in tried.items()}
    try:
        q, k, v = random_qkv(q_shape, kv_shape, dtype, device)
        runs = {name: functools.partial(KERNELS[name].run, q, k, v) for name, reason in reasons.items() if not reason}
        result = measure(runs, device)
    except torch.cuda.OutOfMemoryError:
        note(f"{about}: sdpa, unmeasured, for want of memory to measure in")
        return "sdpa"
    result.refused = {name: reason for name, reason in reasons.items() if reason} | result.refused
    note(f"{about}: {result.best}, as measured: {result}")
    return result.best
