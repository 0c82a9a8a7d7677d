"""One forward of the transformer beside diffusers' with the same weights: `python benchmarks/transformer.py`.

Our DiT and diffusers' CosmosTransformer3DModel share one set of random weights (none of them zero) and one set of
inputs, and run in turns. Arithmetic is counted by torch, compared with a formula, and set against the best matrix
product of this machine in the same run. Every attention kernel that either of the two can be told to use is tried on
two of the blocks first; diffusers then runs with the fastest exact one. Also: memory, measured and traced; how far the
two outputs, and each of them and ours in float32, are apart. `--device meta` counts and traces alone, at any size and
without a GPU. Writes results/transformer_MACHINE.json and .md.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    RESULTS,
    busy_line,
    cold_compiler,
    copy_ceiling,
    counted,
    device_name,
    dit_config,
    height_width,
    in_child,
    installed,
    load_average,
    made_line,
    matmul_ceiling,
    paired,
    peak_memory,
    provenance,
    random_dit,
    ratio,
    shared_with_diffusers,
    slug,
    table,
    traced_peak,
    write_results,
)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from orrery.errors import InputError, OrreryError, one_line
from orrery.nn.dit import Conditions, DiT, DiTConfig
from orrery.nn.rope import cached_rope_table
from orrery.world.speed import Speed, check_compiler, prepare

TIMES = {"per-frame": "a time for each latent frame", "shared": "one time for all frames"}
_LARGE = {"preset": "2b", "size": (704, 1280), "frames": 93, "dtype": "bfloat16", "repeats": 3}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"preset": "small", "size": (192, 320), "frames": 17, "dtype": "float32", "repeats": 5, "times": [*TIMES]},
    "cuda": _LARGE | {"times": ["per-frame"]},
    "meta": _LARGE | {"times": [*TIMES]},
}
OURS, CACHED, COMPILED, THEIRS = "ours", "ours, text cached", "ours, text cached, compiled", "diffusers"
GIVEN = 2  # latent frames that are given, as in Video2World
TRIAL_BLOCKS = 2
REFERENCE_FRAMES = 17  # of the comparison with float32
# Attention of diffusers 0.42. Not tried: what is fetched from the hub, made for other hardware, for padded batches, or
# quadratic in memory unless compiled (flex). Sage rounds queries and keys to 8 bits: timed, never "the best".
EXACT = (
    "native",
    "_native_flash",
    "_native_cudnn",
    "_native_efficient",
    "_native_math",
    "flash",
    "_flash_3",
    "xformers",
)
ROUNDED = ("sage", "_sage_qk_int8_pv_fp16_cuda", "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90")
OUR_KERNELS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
PLAN_GIB = (24, 48, 80, 140)
COUNTED = (
    "`TFLOP`: counted by torch, two operations a multiplication with addition, attention in full. `traced`: peak "
    "memory beyond weights and inputs, counted on the meta device, where a fused attention kernel needs nothing but "
    "its output (of diffusers with its default attention). `text cached`: the text's keys and values of all blocks "
    "are there before, as in sampling; the other rows project the text anew, as diffusers does at every step. "
    "`compiled`: its blocks through torch.compile, which took the seconds given below the table. A time "
    "for each latent frame: diffusers modulates token by token, which is arithmetic and memory that ours does not "
    "need."
)
MEASURED = (
    "`s`: median of the runs; `best`: the shortest, of which are the rates. `speed`: diffusers' time over this time, "
    "median over interleaved pairs. `of ceiling`: TFLOP/s over those of the best square matrix product in the same "
    "run and dtype. `peak`: as `traced`, measured. `max`, `relative`: largest difference from diffusers' output, and "
    "root mean square of the difference over that of the output."
)
MEMORY = {
    "cpu": "Memory is the growth of resident memory in a process of its own, one run, looked at every millisecond.",
    "cuda": "Memory is torch.cuda.max_memory_allocated less what was allocated before.",
}
Contenders = dict[str, Callable[[], Tensor]]


def latent_size(options: argparse.Namespace, frames: int | None = None) -> tuple[int, int, int]:
    """T, H, W of the latents."""
    height, width = options.size
    return ((frames or options.frames) - 1) // 4 + 1, height // 8, width // 8


def configured(options: argparse.Namespace) -> DiTConfig:
    """The preset, with rotary exponents as they are: diffusers knows no rounded ones."""
    return dataclasses.replace(dit_config(options.preset), rope_bf16=False)


def build(options: argparse.Namespace, theirs: bool) -> tuple[DiT, Any]:
    """Our DiT and diffusers' (None unless `theirs`); the weights are in memory once."""
    config, dtype = configured(options), DTYPES[options.dtype]
    if options.kind == "meta":
        with torch.device("meta"):
            ours = DiT(config).to(dtype).eval().requires_grad_(False)
    else:
        ours = random_dit(config, options.device, dtype)
    return ours, shared_with_diffusers(ours) if theirs else None


def inputs(
    config: DiTConfig, options: argparse.Namespace, times: str, batch: int, frames: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents [B, 16, T, H, W] float32, times in 0..1000 ([B] or [B, T]), text [B, L, D], frame mask [1, 1, T, H, W].

    With a batch of 2 both see the same latents and each its own text, as guidance asks for.
    """
    size = latent_size(options, frames)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, config.latent_channels, *size, generator=generator).expand(batch, -1, -1, -1, -1)
    text = torch.randn(batch, options.length, config.text_width, generator=generator)
    mask = torch.zeros(1, 1, *size)
    mask[:, :, : min(GIVEN, size[0] - 1)] = 1
    moments = torch.full((batch,), 700.0)
    if times == "per-frame":
        moments = torch.where(mask[0, :, :, 0, 0] > 0, 0.1, moments[:, None])
    latents, moments, text, mask = (x.contiguous().to(options.device) for x in (latents, moments, text, mask))
    return latents, moments, text.to(DTYPES[options.dtype]), mask


def contenders(
    ours: DiT, theirs: Any, options: argparse.Namespace, times: str, batch: int, frames: int | None = None
) -> Contenders:
    """What is measured: functions without arguments that give a velocity."""
    latents, moments, text, mask = inputs(ours.config, options, times, batch, frames)
    context = ours.encode_text(text)
    made: Contenders = {
        OURS: lambda: ours(latents, moments, Conditions(text, mask)),
        CACHED: lambda: ours(latents, moments, Conditions(context, mask)),
    }
    if theirs is None:
        return made
    scaled = moments * ours.config.timestep_scale  # theirs embeds the time as it comes
    scaled = scaled[:, None, :, None, None] if scaled.ndim == 2 else scaled
    padding = torch.zeros(1, 1, *options.size, device=options.device, dtype=text.dtype)
    masks = mask.expand(batch, -1, -1, -1, -1).to(text.dtype)

    def diffusers() -> Tensor:
        x = latents.to(text.dtype)
        return theirs(x, scaled, text, condition_mask=masks, padding_mask=padding, return_dict=False)[0]

    return made | {THEIRS: diffusers}


def formula(config: DiTConfig, options: argparse.Namespace, times: str, batch: int, name: str) -> float:
    """TFLOP of a forward, from the shapes: 28 N D² a block (MLP of ratio 4), 4 N² D for attention, and the rest."""
    width, length = config.width, options.length
    size = [n // p for n, p in zip(latent_size(options), config.patch, strict=True)]
    tokens, volume = math.prod(size), math.prod(config.patch)
    hidden, rank = int(width * config.mlp_ratio), config.adaln_rank or 0
    moments = size[0] if times == "per-frame" else 1
    modulated = tokens if name == THEIRS and times == "per-frame" else moments
    block = tokens * width * (6 * width + 2 * hidden)  # self-attention 4, cross-attention 2
    block += 2 * tokens**2 * width + 2 * tokens * length * width
    block += 3 * modulated * (width * rank + rank * 3 * width)
    text = config.depth * 2 * length * config.context_dim * width
    if config.text_projection:
        text += length * config.text_dim * config.context_dim
    rest = tokens * width * volume * (config.input_channels + config.latent_channels) + moments * 4 * width**2
    rest += modulated * (width * rank + rank * 2 * width)
    return 2 * batch * (config.depth * block + rest + (0 if name == CACHED else text)) / 1e12


def compiled(ours: DiT) -> DiT:
    """Another network with the same weights in memory, its blocks compiled anew."""
    torch._dynamo.reset()
    with torch.device("meta"):
        net = DiT(ours.config).eval().requires_grad_(False)
    net.load_state_dict(ours.state_dict(), assign=True)
    prepare(net, Speed(compile=True), torch.device(next(ours.parameters()).device))
    return net


def traced(options: argparse.Namespace, times: str, batch: int, name: str) -> int | None:
    """Peak bytes beyond weights and inputs, counted on meta; None where orrery.world cannot be imported."""
    on_meta = argparse.Namespace(**vars(options) | {"device": "meta", "kind": "meta"})
    ours, theirs = build(on_meta, theirs=name == THEIRS)
    with torch.device("meta"):
        run = contenders(ours, theirs, on_meta, times, batch)[name]
        cached_rope_table.cache_clear()
        return traced_peak(run)


def memory_of(case: str, options: argparse.Namespace) -> int:
    """Peak bytes of one case, "shared/1/ours", in this process."""
    times, batch, name = case.split("/")
    ours, theirs = build(options, theirs=name == THEIRS)
    if theirs is not None:
        theirs.set_attention_backend(options.attention)
    run = contenders(ours, theirs, options, times, int(batch))[name]
    cached_rope_table.cache_clear()
    return peak_memory(run, options.device)


def memory(case: str, run: Callable[[], Any], options: argparse.Namespace, attention: str) -> int:
    """Peak bytes of `run`; on a CPU in a new process, where no earlier run has left memory to fill again."""
    if options.kind == "cuda":
        cached_rope_table.cache_clear()  # diffusers makes its table anew each time: ours counts too
        return peak_memory(run, options.device)
    return in_child([*options.words, "--memory", case, "--attention", attention])


@contextlib.contextmanager
def first_blocks(network: nn.Module, name: str) -> Iterator[None]:
    """The network with its first blocks alone."""
    blocks = getattr(network, name)
    setattr(network, name, nn.ModuleList(list(blocks)[:TRIAL_BLOCKS]))
    try:
        yield
    finally:
        setattr(network, name, blocks)


def tried(functions: dict[str, Callable[[], Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each, or in a line why it does not run."""
    results: dict[str, Any] = {}
    for name, function in functions.items():
        try:
            function()
        except Exception as problem:  # whatever a kernel or a missing package raises
            results[name] = one_line(problem)[:70] or type(problem).__name__
    fitting = {name: function for name, function in functions.items() if name not in results}
    seconds = paired(fitting, max(3, options.repeats), clock=options.clock)
    return {name: results.get(name) or statistics.median(seconds[name]) for name in functions}


def try_kernels(ours: DiT, theirs: Any, options: argparse.Namespace, times: str) -> dict[str, dict[str, Any]]:
    """Seconds of a forward with two blocks under each attention kernel; leaves diffusers with its fastest exact one."""
    runs = contenders(ours, theirs, options, times, 1)
    found: dict[str, dict[str, Any]] = {}

    def with_kernel(backend: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return runs[OURS]()

        return run

    backends = {name: with_kernel(getattr(SDPBackend, name)) for name in OUR_KERNELS}
    with first_blocks(ours, "blocks"):
        found[OURS] = tried({"default": runs[OURS]} | backends, options)
    if theirs is None:
        return found

    def with_backend(name: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            theirs.set_attention_backend(name)
            return runs[THEIRS]()

        return run

    with first_blocks(theirs, "transformer_blocks"):
        found[THEIRS] = tried({name: with_backend(name) for name in (*EXACT, *ROUNDED)}, options)
    theirs.set_attention_backend(fastest(found[THEIRS], EXACT))
    return found


def fastest(seconds: dict[str, Any], allowed: tuple[str, ...]) -> str:
    """The first of the names, which is the default; another where it is faster by more than the noise (3 %)."""
    fitting = [name for name in allowed if isinstance(seconds.get(name), float)]
    if not fitting:
        raise OrreryError(f"no attention kernel runs: {seconds}; take a smaller --size or --frames")
    best = min(fitting, key=lambda name: seconds[name])
    return best if best not in allowed[:1] and seconds[best] < 0.97 * seconds[fitting[0]] else fitting[0]


def difference(a: Tensor, b: Tensor) -> dict[str, float]:
    """Largest and root mean square difference, and the latter over the root mean square of `b`."""
    apart = (a - b).square().mean().item() ** 0.5
    return {"max": (a - b).abs().amax().item(), "rms": apart, "relative": apart / b.square().mean().item() ** 0.5}


def to_float32(ours: DiT, theirs: Any, options: argparse.Namespace, times: str) -> dict[str, Any]:
    """Differences from our network in float32 with the same weights, on a short clip of the same picture."""
    frames = min(options.frames, REFERENCE_FRAMES)
    runs = contenders(ours, theirs, options, times, 1, frames)
    outputs = {name: runs[name]().float() for name in (OURS, THEIRS) if name in runs}
    try:
        wide = copy.deepcopy(ours).float()
        latents, moments, text, mask = inputs(ours.config, options, times, 1, frames)
        exact = wide(latents, moments, Conditions(text.float(), mask))
    except torch.OutOfMemoryError:
        print("float32 does not fit into this GPU's memory: no comparison with it", file=sys.stderr, flush=True)
        return {}
    del wide
    return {"frames": frames} | {name: difference(output, exact) for name, output in outputs.items()}


def group(
    ours: DiT, theirs: Any, options: argparse.Namespace, times: str, batch: int, kernels: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """One table: all contenders with one kind of times and one batch."""
    print(f"{times} times, batch of {batch}", file=sys.stderr, flush=True)
    functions = contenders(ours, theirs, options, times, batch)
    names = dict.fromkeys(functions)
    best = fastest(kernels[OURS], ("default", *OUR_KERNELS))
    if best != "default":
        backend, run = getattr(SDPBackend, best), functions[CACHED]

        def faster() -> Tensor:
            with sdpa_kernel(backend):
                return run()

        functions[f"{CACHED}, {best}"] = faster
    if options.compile:
        functions[COMPILED] = contenders(compiled(ours), None, options, times, batch)[CACHED]
    work, outputs, notes = {}, {}, []
    for name, function in functions.items():  # also the warm-up
        try:
            if name == COMPILED:  # the counter does not look into it
                began = time.perf_counter()
                work[name], output = work[CACHED], function()
                notes.append(f"torch.compile, {time.perf_counter() - began:.3g} s were taken by the first forward")
            else:
                work[name], output = counted(function)
            outputs[name] = output.float().cpu()
        except torch.OutOfMemoryError:
            print(f"{name}, batch of {batch}: does not fit into this GPU's memory and is left out", flush=True)
            torch.cuda.empty_cache()
    fitting = {name: functions[name] for name in work}
    quiet = 0.1 if options.kind == "cpu" and not options.cpu_seconds else None
    seconds = paired(fitting, options.repeats, 0, quiet, notes.append, options.clock)
    rows: dict[str, dict[str, Any]] = {}
    for name in work:
        median = statistics.median(seconds[name])
        best_run = min(seconds[name])
        row = {"seconds": seconds[name], "median": median, "best": best_run}
        row |= {"tflop": work[name], "tflops": work[name] / best_run}
        row["formula"] = formula(ours.config, options, times, batch, name if name in names else CACHED)
        if THEIRS in work:
            row["speed"] = ratio(seconds, THEIRS, name)
            row["difference"] = difference(outputs[name], outputs[THEIRS])
        if name in names:
            attention = fastest(kernels[THEIRS], EXACT) if THEIRS in kernels else EXACT[0]
            row["peak"] = memory(f"{times}/{batch}/{name}", functions[name], options, attention)
            row["traced"] = traced(options, times, batch, name)
        rows[name] = row
    return {"times": times, "batch": batch, "rows": rows, "notes": notes}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every number on a CPU or a GPU."""
    ours, theirs = build(options, options.diffusers)
    dtype = DTYPES[options.dtype]
    ceilings = [matmul_ceiling(options.device, dtype, clock=options.clock)]
    print("attention kernels", file=sys.stderr, flush=True)
    kernels = try_kernels(ours, theirs, options, options.times[0])
    result: dict[str, Any] = {"kernels": kernels, "groups": [], "to_float32": {}}
    if theirs is not None:
        result["diffusers_attention"] = fastest(kernels[THEIRS], EXACT)
    for times in options.times:
        for batch in options.batch:
            result["groups"].append(group(ours, theirs, options, times, batch, kernels))
    if options.dtype != "float32":
        result["to_float32"] = to_float32(ours, theirs, options, options.times[0])
    ceilings.append(matmul_ceiling(options.device, dtype, clock=options.clock))
    result |= {"matmul_tflops": max(ceilings), "copy_gbs": copy_ceiling(options.device)}
    for each in result["groups"]:
        for row in each["rows"].values():
            row["of_ceiling"] = row["tflops"] / result["matmul_tflops"]
    return result | weights_of(ours)


def weights_of(ours: DiT) -> dict[str, int]:
    """How many parameters there are, and their bytes."""
    parameters = sum(weight.numel() for weight in ours.parameters())
    return {"parameters": parameters, "weight_bytes": parameters * ours.dtype.itemsize}


def count(options: argparse.Namespace) -> dict[str, Any]:
    """What the meta device tells: arithmetic, memory, and how the published model of this size would be placed."""
    ours, theirs = build(options, options.diffusers)
    groups = []
    with torch.device("meta"):
        for times in options.times:
            for batch in options.batch:
                rows = {}
                for name, function in contenders(ours, theirs, options, times, batch).items():
                    print(f"{times} times, batch of {batch}: {name}", file=sys.stderr, flush=True)
                    rows[name] = {
                        "tflop": counted(function)[0],
                        "formula": formula(ours.config, options, times, batch, name),
                        "traced": traced(options, times, batch, name),
                    }
                groups.append({"times": times, "batch": batch, "rows": rows})
    return {"groups": groups, "plans": plans(options)} | weights_of(ours)


def plans(options: argparse.Namespace) -> dict[str, str]:
    """The memory plan of the published model by GiB of a GPU; {} for a preset that is none."""
    from orrery.weights import CATALOGUE, find_model
    from orrery.world.plan import GIB, Shape, make_plan

    name = options.preset if options.preset in CATALOGUE else f"predict2.5-{options.preset}"
    if name not in CATALOGUE:
        return {}
    config = find_model(name).config
    shape, dtype = Shape(options.size, options.frames, given=4 * GIVEN - 3), DTYPES[options.dtype]
    return {str(gib): str(make_plan(config, shape, gib * GIB, dtype, torch.bfloat16)) for gib in PLAN_GIB}


def gib(value: int | None) -> str:
    return "" if value is None else f"{value / 2**30:.3g}"


def markdown(result: dict[str, Any]) -> str:
    """The result as a page with tables."""
    about = result["options"]
    size, latents = "x".join(map(str, about["size"])), "x".join(map(str, result["latents"]))
    what = (
        f"{about['preset']}: {result['parameters'] / 1e6:,.1f}M random parameters ({gib(result['weight_bytes'])} GiB), "
        f"latents of {latents} ({about['frames']} frames of {size}, {result['tokens']:,} tokens, {GIVEN} latent frames "
        f"given), text of {about['length']} tokens, {about['dtype']}."
    )
    lines = [f"# Transformer on {result['device']}", "", made_line(result["made"]), "", what]
    if result["device"] == "meta":
        lines += ["", "Counted and traced without computing: no time is measured here."]
    else:
        lines[-1] += (
            f" {about['repeats']} interleaved runs. This machine multiplies matrices at {result['matmul_tflops']:.3g} "
            f"TFLOP/s and copies at {result['copy_gbs']:.3g} GB/s in this run."
        )
        if "diffusers_attention" in result:
            lines[-1] += f" diffusers runs with its attention `{result['diffusers_attention']}`."
        lines += ["", busy_line(result["load_average"]["before"], result["load_average"]["after"])]
        lines[-1] += " Seconds are CPU seconds of one thread: others used this machine too." * about["cpu_seconds"]
    where = torch.device(about["device"]).type
    lines += ["", COUNTED if where == "meta" else f"{MEASURED} {COUNTED} {MEMORY[where]}"]
    for each in result["groups"]:
        title = "One forward" if each["batch"] == 1 else f"A batch of {each['batch']}, as guidance asks for"
        lines += ["", f"## {title}: {TIMES[each['times']]}", "", *_rows(each["rows"], result["device"] == "meta")]
        lines += [line for note in each.get("notes", []) for line in ("", f"Of {note}.")]
    worst = max(abs(r["tflop"] / r["formula"] - 1) for each in result["groups"] for r in each["rows"].values())
    lines += ["", f"The counts differ from the formula of the shapes by at most {worst:.1e} of themselves."]
    if result.get("plans"):
        lines += ["", "## The published model of this size on a GPU of", ""]
        lines += table(["GiB", "plan"], [[f"{size}", plan] for size, plan in result["plans"].items()])
    if result.get("kernels"):
        lines += ["", "## Attention kernels", "", f"Seconds of a forward with {TRIAL_BLOCKS} blocks, median.", ""]
        rows, failed = [], []
        for who, found in result["kernels"].items():
            for name, value in found.items():
                label = f"`{name}`" + (" (8 bits)" if name in ROUNDED else "")
                if isinstance(value, float):
                    rows.append([who, label, f"{value:.4g}"])
                else:
                    failed.append(f"{who} {label}")
        lines += table(["", "attention", "s"], rows)
        lines += ["", f"Do not run here (the JSON says why): {', '.join(failed)}."] * bool(failed)
    if found := result.get("to_float32"):
        lines += ["", "## To float32", ""]
        lines += [f"Outputs against ours in float32 with the same weights, first {found['frames']} frames.", ""]
        rows = [
            [name, f"{found[name]['max']:.1e}", f"{found[name]['relative']:.1e}"] for name in found if name != "frames"
        ]
        lines += table(["", "max", "relative"], rows)
    return "\n".join(lines)


def _rows(rows: dict[str, dict[str, Any]], meta: bool) -> list[str]:
    if meta:
        cells = [
            [name, f"{row['tflop']:,.1f}", f"{row['formula']:,.1f}", gib(row["traced"])] for name, row in rows.items()
        ]
        return table(["", "TFLOP", "formula", "traced GiB"], cells)
    heads = ["", "s", "best", "speed", "TFLOP", "TFLOP/s", "of ceiling", "peak GiB", "traced GiB", "max", "relative"]
    cells = []
    for name, row in rows.items():
        apart = row.get("difference", {})
        cells.append(
            [name, f"{row['median']:.3g}", f"{row['best']:.3g}", f"{row['speed']:.2f}x" if "speed" in row else ""]
            + [f"{row['tflop']:.4g}", f"{row['tflops']:.3g}", f"{row['of_ceiling']:.0%}"]
            + [gib(row.get("peak")), gib(row.get("traced"))]
            + [f"{apart[key]:.1e}" if apart and name != THEIRS else "" for key in ("max", "relative")]
        )
    return table(heads, cells)


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given depends on the device (DEFAULTS)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", help="2b, 14b, small, mini or a model of the catalogue; small on a CPU, else 2b")
    parser.add_argument("--size", type=height_width, help="pixels, HxW: 192x320 on a CPU, else 704x1280")
    parser.add_argument("--frames", type=int, help="4k + 1: 17 on a CPU, else 93")
    parser.add_argument("--length", type=int, help="tokens of the text: 512 (mini: 40)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or meta")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, help="5 on a CPU, else 3")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2], help="batches; 2 is guidance (default: 1 2)")
    for times, what in TIMES.items():
        default = "" if times == "shared" else "; the default on a GPU, both elsewhere"
        parser.add_argument(f"--{times}-times", dest="times", action="append_const", const=times, help=what + default)
    parser.add_argument("--no-diffusers", dest="diffusers", action="store_false")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, on a CPU that others use too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # print the peak memory of one case and stop
    parser.add_argument("--attention", default=EXACT[0], help=argparse.SUPPRESS)  # of diffusers, in that case
    options = parser.parse_args(words)
    if options.preset == "14b" and options.device == "cpu":
        print("14b on a CPU: on the meta device (arithmetic, memory, plan)", file=sys.stderr)
        options.device = "meta"
    options.kind = torch.device(options.device).type
    for name, value in DEFAULTS[options.kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.length = options.length or (40 if options.preset == "mini" else 512)
    if options.frames < 5 or options.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1 and at least 5, got {options.frames}")
    if min(options.size) < 16 or options.size[0] % 16 or options.size[1] % 16:
        raise InputError(f"--size must be positive multiples of 16, got {options.size[0]}x{options.size[1]}")
    if min(options.repeats, options.length, *options.batch) < 1:
        raise InputError("--repeats, --length and --batch must be at least 1")
    if options.cpu_seconds:
        if options.kind != "cpu":
            raise InputError(f"--cpu-seconds needs --device cpu, got {options.device}")
        torch.set_num_threads(1)
    options.clock = time.process_time if options.cpu_seconds else time.perf_counter
    options.words = words
    return options


def main() -> int:
    """Runs the benchmark; 2 on bad input."""
    options = arguments(sys.argv[1:])
    torch.set_grad_enabled(False)
    if options.memory:
        print(json.dumps(memory_of(options.memory, options)))
        return 0
    options.diffusers = options.diffusers and installed("diffusers")
    if options.compile and options.kind != "meta":
        try:
            check_compiler(torch.device(options.device))
        except InputError as problem:
            print(f"{problem}: the compiled rows are left out", file=sys.stderr)
            options.compile = False
    made = provenance(*["diffusers"] * options.diffusers)
    before = load_average()
    meta = options.kind == "meta"
    with cold_compiler():
        result = count(options) if meta else measure(options)
    hidden = ("memory", "attention", "words", "results", "kind", "clock")
    result |= {
        "made": made,
        "load_average": {"before": before, "after": load_average()},
        "device": "meta" if meta else device_name(options.device),
        "latents": latent_size(options),
        "tokens": math.prod(n // p for n, p in zip(latent_size(options), configured(options).patch, strict=True)),
        "options": {k: v for k, v in vars(options).items() if k not in hidden},
    }
    usual = DEFAULTS[options.kind]
    name = f"transformer_{slug(result['device'])}"
    name += f"_{slug(options.preset)}" if meta or options.preset != usual["preset"] else ""
    name += f"_{'-'.join(options.times)}" if options.times != usual["times"] else ""
    page = markdown(result)
    print(page, *write_results(name, result, page, options.results), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
