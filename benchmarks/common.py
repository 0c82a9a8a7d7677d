"""What every benchmark script needs: where a number was made, what the machine can do at most, fair timing, results.

    from common import matmul_ceiling, paired, provenance, write_results

Also the transformers that several scripts measure, with random weights.

`python benchmarks/NAME.py` finds this module because it lies beside the script.
"""

import argparse
import ctypes
import dataclasses
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import orrery
from orrery.errors import InputError
from orrery.files import atomic_file
from orrery.nn.dit import PRESETS, DiT, DiTConfig

Clock = Callable[[], float]
RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# The 2B's architecture with 36M parameters: what two cores can run (specification of the base model, section 8).
SMALL = DiTConfig(width=512, depth=8, heads=8, adaln_rank=64, text_dim=512, context_dim=256)


def machine() -> dict[str, Any]:
    """The CPU, its cores, torch's threads, the memory in GiB, and the first GPU (or None) and its memory."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        named = (line for line in info.read_text().splitlines() if line.startswith("model name"))
        cpu = next(named, f":{cpu}").split(":", 1)[1].strip()
    about: dict[str, Any] = {"cpu": cpu, "cores": os.cpu_count(), "gpu": None, "threads": torch.get_num_threads()}
    with suppress(ValueError, OSError):
        about["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        about["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    return about


def device_name(device: str | torch.device) -> str:
    """The name of the GPU or CPU that `device` is."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else machine()["cpu"]


def slug(text: str) -> str:
    """`text` as a part of a file name: "Intel(R) Xeon(R) Processor" -> "intel-xeon-processor"."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


def git(*words: str) -> str | None:
    """What a git command prints in this repository; None outside of one or without git."""
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def dirty() -> bool | None:
    """Whether the working tree differs from the commit, results aside; None if that cannot be told."""
    status = git("status", "--porcelain", "--", ":/", f":(exclude){RESULTS}")
    return None if status is None else bool(status)


def commit() -> str:
    """The commit of the working tree, and whether the tree differs from it; "unknown" outside a repository."""
    return (git("rev-parse", "HEAD") or "unknown") + (" with uncommitted changes" if dirty() else "")


def provenance(*packages: str) -> dict[str, Any]:
    """Where, when, at which commit and by which command a result was made; versions of torch and of `packages`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "dirty": dirty(),
        "machine": machine(),
        "versions": {"orrery": orrery.__version__, "torch": torch.__version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def installed(package: str) -> bool:
    """Whether a package is there; says so in one line if not."""
    try:
        version(package)
    except PackageNotFoundError:
        print(f"{package} is not installed: what needs it is left out", file=sys.stderr, flush=True)
        return False
    return True


def load_average() -> list[float]:
    """Processes that wanted a core in the last 1, 5 and 15 minutes: how busy the machine was. [] where unknown."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (AttributeError, OSError):
        return []


def busy_line(before: Sequence[float], after: Sequence[float]) -> str:
    """How busy the machine was when a run began and ended, as a sentence of Markdown."""
    if not before or not after:
        return "How busy the machine was is unknown."
    return (
        f"Load average when the run began: {before[0]:g} (1 minute), {before[1]:g} (5 minutes); at its end: "
        f"{after[0]:g}, {after[1]:g}, its own threads included."
    )


def made_line(about: Mapping[str, Any]) -> str:
    """`provenance()` as one sentence of Markdown."""
    where = about["machine"]
    changed = " with uncommitted changes" if about["dirty"] else ""
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    return (
        f"{about['date']}; commit {about['commit']}{changed}; {where['gpu'] or where['cpu']}, {where['cores']} cores, "
        f"{where['threads']} threads; {versions}; `{about['command']}`."
    )


class CPUNoise:
    """How much of this machine's CPU others have used since this object was made; Linux only, 0 elsewhere."""

    def __init__(self) -> None:
        self._busy, self._own, self._began = _busy_seconds(), _own_seconds(), time.perf_counter()

    def share(self) -> float:
        """The share of all cores' time, 0 to 1, in which somebody else was running."""
        others = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(0.0, others / (time.perf_counter() - self._began) / (os.cpu_count() or 1))


def _own_seconds() -> float:
    """CPU seconds of this process and of the children that it has waited for."""
    return sum(os.times()[:4])


def _busy_seconds() -> float:
    """CPU seconds of everybody since the machine started."""
    try:
        numbers = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    idle = numbers[3] + numbers[4]
    return (sum(numbers) - idle) / os.sysconf("SC_CLK_TCK")


def synchronise() -> None:
    """Wait until the GPU, if one is in use, has done what it was told."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def timed(function: Callable[[], Any], clock: Clock = time.perf_counter) -> float:
    """Seconds of one call, the GPU's work included."""
    synchronise()
    began = clock()
    function()
    synchronise()
    return clock() - began


def paired(
    functions: Mapping[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 1,
    tolerated: float | None = None,
    report: Callable[[str], Any] = print,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each function, interleaved: what disturbs the machine meets all of them alike.

    Each is first called `warmup` times untimed. Every second round runs in the opposite order. The i-th numbers of two
    functions belong together: a ratio is the median of the ratios of pairs (`ratio`).

    tolerated: for a CPU that others use too, the share of it that they may take during a round. Noisier rounds are
        repeated, up to 4 * repeats rounds in all; the quietest are kept, and a line to `report` says how quiet.
    clock: time.process_time with one thread is the way out on a CPU that is never quiet.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    most = repeats if tolerated is None else 4 * repeats
    rounds: list[tuple[float, dict[str, float]]] = []
    while len(rounds) < most and sum(share <= (tolerated or 0) for share, _ in rounds) < repeats:
        noise, seconds = CPUNoise(), {}
        for name in list(functions)[:: -1 if len(rounds) % 2 else 1]:
            seconds[name] = timed(functions[name], clock)
        rounds.append((noise.share() if tolerated is not None else 0.0, seconds))
    kept = sorted(rounds, key=lambda one: one[0])[:repeats]
    if tolerated is not None:
        chosen = f"the {repeats} quietest of {len(rounds)} rounds" if len(rounds) > repeats else f"{repeats} rounds"
        report(f"{chosen}, in which others took up to {kept[-1][0]:.0%} of the CPU")
    return {name: [seconds[name] for _, seconds in kept] for name in functions}


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Median over the rounds of `paired` of time `over` / time `under`."""
    return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))


def _best(function: Callable[[], Any], calls: int, rounds: int, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call in the best of `rounds` rounds of `calls` calls."""

    def several() -> None:
        for _ in range(calls):
            function()

    several()
    return min(timed(several, clock) for _ in range(rounds)) / calls


CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def attention_flop(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Operations of attention, in full, from the shapes [B, heads, N, dim]."""
    batch, heads, queries, dim = query
    return 2 * batch * heads * queries * key[2] * (dim + value[3])


def counted(function: Callable[[], Any]) -> tuple[float, Any]:
    """TFLOP of one call, counted by torch (FlopCounterMode) with the CPU's attention, which it leaves out; the result.

    Two operations a multiplication with addition; elementwise operations are not counted.
    """
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flop}) as counter:
        result = function()
    return counter.get_total_flops() / 1e12, result


def matmul_ceiling(
    device: str | torch.device, dtype: torch.dtype, size: int | None = None, clock: Clock = time.perf_counter
) -> float:
    """TFLOP/s of the best run of a square matrix product: what this machine can do at most in `dtype`, here and now.

    size: side of the matrices (None = 8192 on a GPU, 2048 on a CPU). float32 uses what torch is set to (TF32 is off
    unless the script turned it on).
    """
    gpu = torch.device(device).type == "cuda"
    n = size or (8192 if gpu else 2048)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.mm(a, b, out=out), 10 if gpu else 1, 5, clock) / 1e12


def copy_ceiling(device: str | torch.device, mebibytes: int | None = None, clock: Clock = time.perf_counter) -> float:
    """GB/s (bytes read plus bytes written) of the best run of copying a large array within the memory of `device`.

    mebibytes: size of the array (None = 2048 on a GPU, 256 on a CPU).
    """
    gpu = torch.device(device).type == "cuda"
    source = torch.ones((mebibytes or (2048 if gpu else 256)) * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), 10 if gpu else 2, 5, clock) / 1e9


def status_kib(key: str) -> int:
    """A number such as VmRSS of this process out of /proc, in KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


@dataclass
class Peak:
    """Bytes by which the memory in use rose at the highest moment; and all that was in use then."""

    grown: int = 0
    whole: int = 0


@contextmanager
def watched_memory(device: str | torch.device) -> Iterator[Peak]:
    """The memory that the block takes at most; the numbers are there when it ends.

    On a GPU: torch.cuda.max_memory_allocated. On a CPU: the resident memory of this process (Linux only), looked at
    every millisecond; best in a process of its own (`in_child`), before anything else has filled and freed memory.
    """
    gc.collect()
    peak = Peak()
    if torch.device(device).type == "cuda":
        torch.cuda.init()
        synchronise()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        synchronise()
        peak.whole = torch.cuda.max_memory_allocated(device)
        peak.grown = peak.whole - before
        return
    with suppress(OSError, AttributeError):  # glibc only: give freed memory back, so that it is not filled unseen
        ctypes.CDLL(None).malloc_trim(0)
    before = highest = status_kib("VmRSS")
    done = threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.001):
            highest = max(highest, status_kib("VmRSS"))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
    highest = max(highest, status_kib("VmRSS"))
    peak.whole, peak.grown = highest * 1024, (highest - before) * 1024


def peak_memory(function: Callable[[], Any], device: str | torch.device) -> int:
    """Bytes by which one call of `function` raised the memory in use, at the highest moment; what it returns counts.

    See `watched_memory`.
    """
    with watched_memory(device) as peak:
        result = function()
    del result
    return peak.grown


class _Positional(TorchFunctionMode):
    """Attention with its arguments by position: the tracer looks for them there, and diffusers names them."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is nn.functional.scaled_dot_product_attention and not args:
            args = tuple(kwargs.pop(key) for key in ("query", "key", "value"))
        return function(*args, **kwargs)


def traced_peak(run: Callable[[], Any]) -> int | None:
    """Peak bytes of what `run` makes on the meta device; diffusers has its default attention meanwhile.

    None, and a line, where orrery.world cannot be imported, for want of a package that only videos need.
    """
    try:
        from orrery.world.memory import peak_bytes
    except ImportError as problem:
        print(f"traced memory is left out: {problem}", file=sys.stderr, flush=True)
        return None
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    with nullcontext() if dispatch is None else dispatch.attention_backend("native"):

        def positional() -> Any:
            with _Positional():
                return run()

        return peak_bytes(positional)


def in_child(arguments: list[str]) -> Any:
    """Run this script again in a process of its own with `arguments`; what its last line says, read as JSON.

    There glibc gives every freed block of 128 KiB or more back at once, so that resident memory is what is in use.
    """
    words, environment = [sys.executable, sys.argv[0], *arguments], os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def cold_compiler() -> Iterator[None]:
    """torch.compile finds nothing that an earlier process left on disk: what it takes is counted in full."""
    with tempfile.TemporaryDirectory(prefix="orrery-compiled-", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("TORCHINDUCTOR_CACHE_DIR")
            if before is not None:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def dit_config(name: str) -> DiTConfig:
    """A transformer by name: "small", a preset ("2b", "14b", "mini") or a model of the catalogue."""
    if name == "small":
        return SMALL
    if name in PRESETS:
        return PRESETS[name]
    from orrery.weights import CATALOGUE, find_entry

    if name not in CATALOGUE:
        raise InputError(f"preset is {name!r}; allowed are {', '.join(dict.fromkeys(['small', *PRESETS, *CATALOGUE]))}")
    entry = find_entry(name)
    return dataclasses.replace(PRESETS[entry.network], **entry.network_options)


def fill(module: nn.Module, weight: Callable[[str, Tensor], None], device: str | torch.device) -> None:
    """Put a module that is on the meta device onto `device`, and let `weight(name, tensor)` fill each parameter."""
    module.to_empty(device=device).eval().requires_grad_(False)
    for name, tensor in module.named_parameters():
        weight(name, tensor)


def draw_linear(name: str, weight: Tensor) -> None:
    """Weights with which a linear layer keeps the size of what it is given; for `fill`."""
    nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)


def random_dit(config: DiTConfig, device: str | torch.device, dtype: torch.dtype, seed: int = 0) -> DiT:
    """A transformer with random weights, none of them zero: what a new one starts at zero is drawn too."""
    with torch.device("meta"):
        net = DiT(config).to(dtype)
    zeros = {id(layer) for layer in net.zero_initialised()}
    halved = {f"{name}.weight" for name, module in net.named_modules() if id(module) in zeros}
    generator = torch.Generator(device).manual_seed(seed)

    def draw(name: str, tensor: Tensor) -> None:
        if name.endswith("norm.weight"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            spread = tensor.shape[-1] ** -0.5
            tensor.normal_(std=spread / 2 if name in halved else spread, generator=generator)

    fill(net, draw, device)
    return net


def shared_with_diffusers(ours: DiT) -> nn.Module:
    """diffusers' transformer whose weights are ours."""
    from diffusers.models.transformers import transformer_cosmos
    from diffusers.utils import logging

    from orrery.weights.layouts import diffusers_transformer_key
    from orrery.weights.pipeline_dir import transformer_json

    logging.set_verbosity_error()
    if not hasattr(transformer_cosmos, "transforms"):  # torchvision resizes the padding mask, and is not here

        def resize(x: Tensor, size: list[int], interpolation: str) -> Tensor:
            return nn.functional.interpolate(x, size=size, mode=interpolation)

        functional, modes = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
    words = {key: value for key, value in transformer_json(ours.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        theirs = transformer_cosmos.CosmosTransformer3DModel(**words)
    weights = {diffusers_transformer_key(name): value for name, value in ours.state_dict().items()}
    theirs.load_state_dict(weights, strict=True, assign=True)
    return theirs.eval().requires_grad_(False)


def height_width(text: str) -> tuple[int, int]:
    """Height and width out of HxW; a type for argparse."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise argparse.ArgumentTypeError(f"must be HxW such as 96x160, got {text}")
    return int(match[1]), int(match[2])


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def write_results(name: str, data: Mapping[str, Any], markdown: str, folder: Path = RESULTS) -> list[Path]:
    """Write folder/name.json and folder/name.md, each whole or not at all; returns the two paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {".json": json.dumps(data, indent=1) + "\n", ".md": markdown.rstrip("\n") + "\n"}
    paths = []
    for suffix, text in texts.items():
        paths.append(folder / f"{name}{suffix}")
        with atomic_file(paths[-1]) as partial:
            partial.write_text(text, encoding="utf-8")
    return paths
