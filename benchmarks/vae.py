"""Time, memory and seams of the Wan 2.1 VAE: `python benchmarks/vae.py [--device cuda]`.

Encoding and decoding with random weights, beside diffusers' AutoencoderKLWan with the same weights in the same run:
whole clips, streamed and tile by tile; on a CPU in float32 also as written, without the rearranged convolutions that
are chosen there (`orrery.nn.winograd`). The arithmetic is counted by torch and set against the best matrix product of
this machine. Also: does the memory of a stream grow with the clip, and what do the seams of tiles cost (with the random
weights, and with orrery-mini's trained VAE). Writes results/vae_MACHINE.json and .md.
"""

import argparse
import copy
import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import (
    copy_ceiling,
    device_name,
    in_child,
    made_line,
    matmul_ceiling,
    paired,
    peak_memory,
    provenance,
    ratio,
    slug,
    write_results,
)
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import orrery
from orrery.errors import InputError, OrreryError
from orrery.nn import winograd
from orrery.nn.vae import PRESETS, VAE, VAEConfig
from orrery.nn.vae_tiling import decode_tiled, encode_tiled

PRESET = {"full": PRESETS["wan2.1"], "small": dataclasses.replace(PRESETS["wan2.1"], base=24)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS = {
    "cpu": {"dtype": "float32", "size": (64, 96), "frames": 9, "tile": (6, 8), "overlap": 4},
    "cuda": {"dtype": "bfloat16", "size": (704, 1280), "frames": 93, "tile": (48, 48), "overlap": 8},
}
STREAMED, WHOLE, TILED, THEIRS = "ours, streamed", "ours, whole clip", "ours, tiled", "diffusers"
DIRECT = "ours, streamed, direct convolutions"
LEGEND = (
    "`s`: median of the runs. `speed`: diffusers' time over this time, median over interleaved pairs. `TFLOP`: counted "
    "by torch (FlopCounterMode). `of ceiling`: TFLOP/s over those of the best square matrix product in the same run "
    "and dtype. `peak`: memory beyond weights and input. `difference`: largest from diffusers' output (decoded frames "
    "clamped to [-1, 1], latents normalised). Streams take 1 latent at a time, as diffusers does; tiles too."
)
REARRANGED = (
    "On a CPU in float32 our wide 3x3 convolutions are Winograd's F(4x4, 3x3), and those after a doubling of pixels "
    "are four 2x2 ones: fewer products, equal but for rounding. TFLOP are those that are left, transforms included; "
    "the row of direct convolutions is the same network without."
)
MEMORY = {
    "cpu": "Memory is the growth of resident memory in a process of its own, one run, looked at every millisecond.",
    "cuda": "Memory is torch.cuda.max_memory_allocated less what was allocated before.",
}
SEAMS = (
    "Tiled against streamed: differences of latents, and of frames in [-1, 1], where a step between uint8 values is "
    "0.0078. `deviation`: of the latents and the frames themselves. Random weights and random input say little about "
    "trained ones; orrery-mini is trained, and its clip shows moving shapes."
)
Contenders = dict[str, Callable[[], Tensor]]


def build(options: argparse.Namespace, theirs: bool = True) -> tuple[VAE, Any]:
    """Our VAE and diffusers' (None unless `theirs`) with the same random weights."""
    config = PRESET[options.preset]
    torch.manual_seed(0)
    ours = VAE(config).eval().requires_grad_(False)
    for name, weight in ours.named_parameters():
        spread = 0.3 if weight[0].numel() == 1 else 0.8 / weight[0].numel() ** 0.5
        torch.nn.init.normal_(weight, mean=1.0 if "gamma" in name else 0.0, std=spread)
    other = None
    if theirs:
        from diffusers import AutoencoderKLWan

        from orrery.weights.layouts import diffusers_vae_key

        other = AutoencoderKLWan(base_dim=config.base, z_dim=config.latent_channels).eval().requires_grad_(False)
        other.load_state_dict({diffusers_vae_key(name, config): w for name, w in ours.state_dict().items()})
        other.to(options.device, DTYPES[options.dtype])
    return ours.to(options.device, DTYPES[options.dtype]), other


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random frames [1, 3, F, H, W] and, independent of them, latents [1, 16, T, H/8, W/8]."""
    (height, width), count = options.size, options.frames
    generator = torch.Generator().manual_seed(1)
    frames = torch.rand(1, 3, count, height, width, generator=generator) * 2 - 1
    latents = torch.randn(1, 16, (count - 1) // 4 + 1, height // 8, width // 8, generator=generator)
    return tuple(x.to(options.device, DTYPES[options.dtype]) for x in (frames, latents))  # type: ignore[return-value]


def contenders(ours: VAE, theirs: Any, options: argparse.Namespace) -> dict[str, Contenders]:
    """What is measured: ways to encode and to decode, each without arguments."""
    frames, latents = inputs(options)
    raw = ours.denormalise(latents)
    tiling = (options.tile, options.overlap)

    def direct(function: Callable[[], Tensor]) -> Tensor:
        with winograd.disabled():
            return function()

    made: dict[str, Contenders] = {
        "encode": {
            STREAMED: lambda: ours.encode(frames, chunk=4),
            WHOLE: lambda: ours.encode(frames),
            TILED: lambda: encode_tiled(ours, frames, *tiling),
            THEIRS: lambda: theirs.encode(frames).latent_dist.mean,
        },
        "decode": {
            STREAMED: lambda: ours.decode(latents, chunk=1),
            WHOLE: lambda: ours.decode(latents),
            TILED: lambda: decode_tiled(ours, latents, *tiling),
            THEIRS: lambda: theirs.decode(raw, return_dict=False)[0],
        },
    }
    if rearranges(options):
        for functions in made.values():
            functions[DIRECT] = lambda streamed=functions[STREAMED]: direct(streamed)  # type: ignore[misc]
    return made


def rearranges(options: argparse.Namespace) -> bool:
    """Whether convolutions are computed with fewer products: on a CPU in float32."""
    return torch.device(options.device).type == "cpu" and options.dtype == "float32"


def streams(ours: VAE, theirs: Any, options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """Encoding and decoding of which nothing is kept, at two lengths ("encode/9"), and, unless `theirs` is None, that
    of diffusers ("encode, diffusers/9"), which takes and gives whole clips."""

    def drain(pieces: Iterator[Tensor]) -> None:
        for _ in pieces:
            pass

    def clip(count: int) -> Iterator[Tensor]:
        yield frames[:, :, :1]
        for _ in range(count // 4):
            yield later

    frames, latents = inputs(options)
    later = frames[:, :, 1:5]
    made: dict[str, Callable[[], Any]] = {}
    for count in lengths(options):
        long = latents[:, :, :1].expand(-1, -1, (count - 1) // 4 + 1, -1, -1)
        made[f"encode/{count}"] = lambda count=count: drain(ours.encode_stream(clip(count)))  # type: ignore[misc]
        made[f"decode/{count}"] = lambda long=long: drain(ours.decode_stream(long))  # type: ignore[misc]
        if theirs is not None:
            given = torch.cat([frames, frames[:, :, 1:]], dim=2)[:, :, :count]
            made[f"encode, {THEIRS}/{count}"] = lambda given=given: theirs.encode(given)  # type: ignore[misc]
            made[f"decode, {THEIRS}/{count}"] = lambda long=long: theirs.decode(long)  # type: ignore[misc]
    return made


def lengths(options: argparse.Namespace) -> tuple[int, int]:
    """Frames of the clip, and of one about twice as long."""
    return options.frames, 2 * options.frames - 1


def memory_of(case: str, options: argparse.Namespace) -> int:
    """Peak bytes of one case, "decode/ours, tiled" or "decode/17", in this process."""
    task, name = case.split("/")
    ours, theirs = build(options, theirs=THEIRS in case)
    with torch.no_grad():
        function = contenders(ours, theirs, options).get(task, {}).get(name) or streams(ours, theirs, options)[case]
        return peak_memory(function, options.device)


def memory(case: str, function: Callable[[], Any], options: argparse.Namespace) -> int:
    """Peak bytes of `function`; on a CPU in a new process, where no earlier run has left memory to fill again."""
    print(f"memory of {case}", file=sys.stderr, flush=True)
    if torch.device(options.device).type == "cuda":
        return peak_memory(function, options.device)
    return in_child([*options.words, "--memory", case])


def counted(functions: Contenders) -> tuple[dict[str, float], dict[str, Tensor]]:
    """TFLOP and output (float32, on the CPU) of each; what does not fit into the GPU is named, and left out."""
    work, outputs = {}, {}
    for name, function in functions.items():
        try:
            with FlopCounterMode(display=False) as counter:
                outputs[name] = function().float().cpu()
        except torch.OutOfMemoryError:
            print(f"{name}: does not fit into this GPU's memory and is left out", flush=True)
            torch.cuda.empty_cache()
            continue
        work[name] = counter.get_total_flops() / 1e12
    return work, outputs


def error(a: Tensor, b: Tensor) -> dict[str, float]:
    """Largest and root mean square difference, decibels for a range of 2, and the deviation of `b` itself."""
    difference = a - b
    square = difference.square().mean().item()
    decibels = 10 * math.log10(4 / square) if square else math.inf
    largest = difference.abs().amax().item()
    return {"max": largest, "rms": square**0.5, "psnr": decibels, "deviation": b.std().item()}


def reference(ours: VAE, options: argparse.Namespace) -> dict[str, Tensor]:
    """Outputs of our VAE in float32 (no TF32) with the same weights and inputs."""
    wide, (frames, latents) = copy.deepcopy(ours).float(), inputs(options)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return {
            "encode": wide.encode(frames.float(), chunk=4).cpu(),
            "decode": wide.decode(latents.float(), chunk=1).clamp(-1, 1).cpu(),
        }


def comparable(task: str, outputs: dict[str, Tensor], ours: VAE) -> dict[str, Tensor]:
    """Outputs in one convention: normalised latents, clamped frames."""
    if task == "encode":
        return outputs | {THEIRS: ours.normalise(outputs[THEIRS])}
    return {name: frames.clamp(-1, 1) for name, frames in outputs.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Every number of the Wan 2.1 VAE."""
    ours, theirs = build(options)
    dtype = DTYPES[options.dtype]
    clock = time.process_time if options.cpu_seconds else time.perf_counter
    ceilings = [matmul_ceiling(options.device, dtype, clock=clock)]
    result: dict[str, Any] = {"encode": {}, "decode": {}, "seams": {}, "notes": []}
    groups = contenders(ours, theirs, options)
    exact = reference(ours, options) if options.dtype != "float32" else {}
    for task, functions in groups.items():
        print(task, file=sys.stderr, flush=True)
        work, outputs = counted(functions)
        for needed in (THEIRS, STREAMED):
            if needed not in work:
                raise OrreryError(f"{task}: {needed} does not fit; take a smaller --size than {options.size}")
        outputs = comparable(task, outputs, ours)
        fitting = {name: functions[name] for name in work}
        quiet = 0.1 if options.device == "cpu" and not options.cpu_seconds else None
        # Counting was the warm-up.
        notes: list[str] = []
        seconds = paired(fitting, options.repeats, warmup=0, tolerated=quiet, report=notes.append, clock=clock)
        for name in fitting:
            median = statistics.median(seconds[name])
            row = {"seconds": seconds[name], "median": median, "tflop": work[name], "tflops": work[name] / median}
            row |= {"speed": ratio(seconds, THEIRS, name), "difference": error(outputs[name], outputs[THEIRS])}
            if exact:
                row["to_float32"] = error(outputs[name], exact[task])
            result[task][name] = row | {"peak": memory(f"{task}/{name}", fitting[name], options)}
        result["notes"] += [f"{task}: {note}" for note in notes]
        result["seams"][task] = {str(options.overlap): error(outputs[TILED], outputs[STREAMED])}
        if options.overlap:
            tiled = {"encode": encode_tiled, "decode": decode_tiled}[task]
            apart = {TILED: tiled(ours, inputs(options)[task == "decode"], options.tile, 0).float().cpu()}
            apart = apart if task == "encode" else comparable(task, apart, ours)
            result["seams"][task]["0"] = error(apart[TILED], outputs[STREAMED])
    clips = streams(ours, theirs, options)
    result["streams"] = {case: memory(case, function, options) for case, function in clips.items()}
    ceilings.append(matmul_ceiling(options.device, dtype, clock=clock))
    result |= {"matmul_tflops": max(ceilings), "copy_gbs": copy_ceiling(options.device, clock=clock)}
    for task in groups:
        for row in result[task].values():
            row["of_ceiling"] = row["tflops"] / result["matmul_tflops"]
    return result


def shapes_in_motion(count: int, height: int, width: int) -> Tensor:
    """Striped squares that move over a chequered floor, [1, 3, F, H, W] in [-1, 1]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    floor = 0.25 * ((rows // 20 + columns // 20) % 2) + 0.3 * torch.sin(columns / 23) * torch.cos(rows / 13)
    clip = (floor + torch.tensor([0.1, 0.0, -0.1]).view(3, 1, 1)).repeat(count, 1, 1, 1)
    stripes = 0.5 + 0.3 * torch.sin((rows + 2 * columns) / 2)
    for t in range(count):
        for colour, (top, left) in enumerate(((30 + 2 * t, 50 + 3 * t), (75 - t, 110 - 2 * t), (20 + t, 140))):
            square = (..., slice(top, top + 34), slice(left, left + 34))
            clip[t][square] = -0.5
            clip[t, colour][square[1:]] = stripes[square[1:]]
    return clip.transpose(0, 1)[None]


def mini_seams() -> dict[str, dict[str, dict[str, float]]]:
    """Errors of tiles of 16x16 latents with orrery-mini's VAE on a clip of 128x192, by overlap."""
    folder = Path(orrery.__file__).parent / "weights" / "mini"
    vae = VAE(VAEConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8"))["vae"])).eval()
    vae.load_state_dict(load_file(folder / "vae.safetensors"))
    frames = shapes_in_motion(9, 128, 192)
    latents = vae.float().encode(frames)
    whole = vae.decode(latents)
    return {
        str(n): {
            "encode": error(encode_tiled(vae, frames, (16, 16), n), latents),
            "decode": error(decode_tiled(vae, latents, (16, 16), n, dtype=torch.float32), whole),
        }
        for n in (0, 2, 4, 6, 8)
    }


def markdown(result: dict[str, Any]) -> str:
    """The result as a page with tables."""
    about = result["options"]
    height, width = about["size"]
    tile = "x".join(map(str, about["tile"]))
    exact = "to_float32" in result["decode"][STREAMED]
    lines = [
        f"# VAE on {result['device']}",
        "",
        made_line(result["made"]),
        "",
        f"Wan 2.1 layout, {about['preset']} widths, random weights; {about['frames']} frames of {height}x{width}, "
        f"{about['dtype']}; {about['repeats']} interleaved runs; tiles of {tile} latents, overlap {about['overlap']}. "
        f"This machine multiplies matrices at {result['matmul_tflops']:.3g} TFLOP/s and copies at "
        f"{result['copy_gbs']:.3g} GB/s. {LEGEND} {result['memory_is']}",
        *[f"\n{REARRANGED}"] * (DIRECT in result["decode"]),
        *["\nSeconds are CPU seconds of one thread: others used this machine too."] * about["cpu_seconds"],
        *(f"\nRounds: {note}." for note in result["notes"]),
    ]
    for task in ("encode", "decode"):
        heads = ["", "s", "speed", "TFLOP", "TFLOP/s", "of ceiling", "peak GiB", "difference"]
        heads += ["rms error to float32"] if exact else []
        lines += ["", f"## {task.capitalize()}", "", _line(heads), _line(["---"] * len(heads))]
        for name, row in result[task].items():
            cells = [name, f"{row['median']:.3g}", f"{row['speed']:.2f}x"]
            cells += [f"{row[key]:.3g}" for key in ("tflop", "tflops")]
            cells += [f"{row['of_ceiling']:.0%}", f"{row['peak'] / 2**30:.3g}", f"{row['difference']['max']:.1e}"]
            lines.append(_line(cells + ([f"{row['to_float32']['rms']:.1e}"] if exact else [])))
    lines += ["", "## Memory of a stream", ""]
    lines += ["Our pieces are dropped as they come; diffusers takes and gives whole clips.", ""]
    lines += [_line(["", "frames", "peak MiB"]), _line(["---"] * 3)]
    for case, peak in sorted(result["streams"].items(), key=lambda item: item[0].split("/")[0]):
        task, count = case.split("/")
        lines.append(_line([task, count, f"{peak / 2**20:.0f}"]))
    lines += ["", "## Seams", "", SEAMS, ""]
    heads = ["VAE", "tiles", "overlap", "encode max", "encode rms", "deviation"]
    heads += ["decode max", "decode PSNR", "deviation"]
    lines += [_line(heads), _line(["---"] * len(heads))]
    ours = {n: {task: result["seams"][task][n] for task in ("encode", "decode")} for n in result["seams"]["encode"]}
    mini = ("orrery-mini, 16x24 latents", "16x16", result["mini_seams"])
    for name, size, table in ((f"Wan 2.1, random, {height // 8}x{width // 8} latents", tile, ours), mini):
        for overlap, row in sorted(table.items(), key=lambda item: int(item[0])):
            encode, decode = row["encode"], row["decode"]
            cells = [f"{encode['max']:.2g}", f"{encode['rms']:.1e}", f"{encode['deviation']:.2g}"]
            cells += [f"{decode['max']:.2g}", f"{decode['psnr']:.1f}", f"{decode['deviation']:.2g}"]
            lines.append(_line([name, size, overlap, *cells]))
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def pair_of(text: str) -> tuple[int, int]:
    """Height and width out of HxW."""
    if not (match := re.fullmatch(r"(\d+)x(\d+)", text)):
        raise argparse.ArgumentTypeError(f"must be HxW such as 704x1280, got {text}")
    return int(match[1]), int(match[2])


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given depends on the device (DEFAULTS)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--preset", choices=PRESET, default="full", help="widths of the published VAE, or a quarter")
    parser.add_argument("--size", type=pair_of, help="pixels, HxW: 64x96 on a CPU, else 704x1280")
    parser.add_argument("--frames", type=int, help="4k + 1: 9 on a CPU, else 93")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tile", type=pair_of, help="latents, HxW: 6x8 on a CPU, else 48x48")
    parser.add_argument("--overlap", type=int, help="latents: 4 on a CPU, else 8")
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, on a CPU that others use too")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # print the peak memory of one case and stop
    options = parser.parse_args(words)
    for name, value in DEFAULTS["cpu" if torch.device(options.device).type == "cpu" else "cuda"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {options.repeats}")
    if options.frames < 5 or options.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1 and at least 5, got {options.frames}")
    if min(options.size) < 8 or options.size[0] % 8 or options.size[1] % 8:
        raise InputError(f"--size must be positive multiples of 8, got {options.size[0]}x{options.size[1]}")
    if not 0 <= options.overlap < min(options.tile):
        raise InputError(f"--overlap must be 0 to {min(options.tile) - 1} for this --tile, got {options.overlap}")
    if options.cpu_seconds:
        if options.device != "cpu":
            raise InputError(f"--cpu-seconds needs --device cpu, got {options.device}")
        torch.set_num_threads(1)
    options.words = words
    return options


def main() -> int:
    """Runs the benchmark; 2 on bad input."""
    options = arguments(sys.argv[1:])
    if options.memory:
        print(json.dumps(memory_of(options.memory, options)))
        return 0
    gpu = torch.device(options.device).type == "cuda"
    made = provenance("diffusers")
    with torch.no_grad():
        result = measure(options) | {"mini_seams": mini_seams()}
    result |= {
        "made": made,
        "device": device_name(options.device),
        "options": {k: v for k, v in vars(options).items() if k not in ("memory", "words")},
        "memory_is": MEMORY["cuda" if gpu else "cpu"],
        "cudnn": {"benchmark": torch.backends.cudnn.benchmark, "allow_tf32": torch.backends.cudnn.allow_tf32},
    }
    name = f"vae_{slug(result['device'])}" + ("" if options.preset == "full" else f"_{options.preset}")
    page = markdown(result)
    paths = write_results(name, result, page)
    print(page, *paths, sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
