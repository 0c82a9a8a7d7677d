"""What fits into how much memory: `python benchmarks/fits.py [--preset 2b --size 704x1280 --caps 8 24]`.

A model folder with random weights (see clip.py) is loaded and a short clip generated, in a process of its own for each
cap on its memory and each placement, which is then forced. Beside the seconds and the peak stands what `orrery plan`
said, and whether it was right. On a GPU the cap is on torch's allocator (set_per_process_memory_fraction), less what
the plan keeps for the driver; on a CPU it is on the address space that loading and generating add (RLIMIT_AS, Linux).
`--device meta` prints the plans alone, of the published models. Writes results/fits_MACHINE_PRESET.json and .md.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip import GIVEN, PROMPT, make_folder
from common import (
    DTYPES,
    RESULTS,
    busy_line,
    device_name,
    dit_config,
    draw_linear,
    fill,
    height_width,
    in_child,
    load_average,
    made_line,
    provenance,
    slug,
    status_kib,
    synchronise,
    table,
    watched_memory,
    write_results,
)
from safetensors.torch import save_file

import orrery
from orrery.errors import InputError, OrreryError, one_line
from orrery.nn.quantise import WAYS
from orrery.nn.text import PAD, TextEncoder, word_tokenizer
from orrery.nn.text import PRESETS as TEXTS
from orrery.video import Video
from orrery.weights import ModelConfig, find_model
from orrery.weights.store import write_config
from orrery.world.plan import CONTEXT, GIB, PLACEMENTS, Plan, Shape, make_plan

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {
        "preset": ["small"], "size": [(32, 48)], "frames": 9, "dtype": "float32", "caps": [0.5, 2.0],
        "text": "small",
    },
    "cuda": {
        "preset": ["2b"], "size": [(704, 1280), (432, 768)], "frames": 93, "dtype": "bfloat16",
        "caps": [8.0, 16.0, 24.0, 48.0, 80.0], "text": "full",
    },
}  # fmt: skip
DEFAULTS["meta"] = DEFAULTS["cuda"] | {"preset": ["2b", "14b"]}
LEGEND = (
    "`chosen`: what `orrery plan` would take for so much memory. `planned`: its peak and whether it is to fit. `peak`: "
    "{0} `load`: seconds until the model is there; where not everything is resident, networks are read within `s`. "
    "`s`: the clip of {1} steps; `step`: median of those after the first."
)
RIGHT = " `right`: whether it ran where the plan says that it fits, or ran out of memory where it says not."
MEMORY = {
    "cuda": "torch.cuda.max_memory_allocated, and in brackets what the allocator held (max_memory_reserved).",
    "cpu": "growth of resident memory from before the model was loaded; the cap is on address space, of which the "
    "mapped files of weights are a part, twice: it is far above what the plan speaks of.",
}


def quantised(way: str | None) -> dict[str, Any]:
    """What `load` is told for weights that are quantised in a way; nothing for None."""
    return {} if way is None else {"speed": f"quantise={way}"}


def planned(
    config: ModelConfig, size: tuple[int, int], cap: float, placement: str | None, way: str | None, options: Any
) -> Plan:
    """What `orrery plan` says to so many GiB."""
    texts = 2 if config.sampling.guidance > 0 else 1
    shape, dtype = Shape(size, options.frames, GIVEN, texts, quantise=way), DTYPES[options.dtype]
    vae_dtype = torch.float32 if options.kind == "cpu" else DTYPES[config.vae_dtype]
    return make_plan(config, shape, cap * GIB, dtype, vae_dtype, options.kind != "cpu", placement)


def variants(config: ModelConfig, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each size, cap, way of quantising and placement, with what is planned."""
    for size in options.size:
        for cap in options.caps:
            for way in options.quantise:
                chosen = planned(config, size, cap, None, way, options).placement
                for placement in [chosen] if options.chosen else options.placements:
                    plan = planned(config, size, cap, placement, way, options)
                    yield {
                        "size": size,
                        "cap": cap,
                        "quantise": way,
                        "placement": placement,
                        "chosen": placement == chosen,
                        "planned": plan.peak,
                        "peaks": plan.peaks,
                        "fits": plan.fits,
                        "plan": str(plan).split(";")[0].removeprefix(f"{placement}, "),
                    }


def full_text(folder: Path, options: argparse.Namespace) -> None:
    """Put a text encoder of the published shape, with random weights, in the place of the small one."""
    config = find_model(folder).config
    text = dataclasses.replace(TEXTS["reason1-7b"], pad_token=PAD)
    if text.text_dim != config.transformer.text_width:
        raise InputError(f"--text full gives text of {text.text_dim}; {options.preset[0]} takes another: --text small")
    print("random weights of the text encoder", file=sys.stderr, flush=True)
    with torch.device("meta"):
        encoder = TextEncoder(text, word_tokenizer(["word"])).to(DTYPES[options.dtype])
    fill(encoder, draw_linear, options.device)
    weights = {key: value.cpu().contiguous() for key, value in encoder.state_dict().items()}
    save_file(weights, folder / "text.safetensors", {"format": "pt"})
    write_config(folder, dataclasses.replace(config, text=text), "# random weights")
    del encoder, weights
    if options.kind == "cuda":
        torch.cuda.empty_cache()


def cap_memory(gib: float, device: torch.device) -> None:
    """Let this process have so much more memory, and not more."""
    import orrery.world.world as assembled

    setattr(assembled, "device_bytes", lambda _: int(gib * GIB))  # noqa: B010 - what the plan is made for
    if device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = (gib * GIB - CONTEXT) / whole
        if not 0 < share <= 1:
            raise InputError(f"--caps must be above {CONTEXT / GIB:.1f} and at most {whole / GIB:.1f}, got {gib:g}")
        torch.cuda.set_per_process_memory_fraction(share, device.index or 0)
        return
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status_kib("VmSize") * 1024 + int(gib * GIB), hard))


def clip(options: argparse.Namespace) -> dict[str, Any]:
    """Load and generate in this process, under the cap; what became of it."""
    device, size = torch.device(options.device), options.size[0]
    config, row = find_model(options.model).config, {"ran": False, "why": ""}
    with torch.device("meta"):  # imports what the text encoder needs, before the cap
        TextEncoder(dataclasses.replace(config.text, pad_token=PAD), word_tokenizer(["word"]))
    pixels = np.random.default_rng(0).integers(0, 256, (GIVEN, *size, 3), dtype=np.uint8)
    stamps: list[float] = []

    def progress(_done: int, _steps: int) -> None:
        synchronise()
        stamps.append(time.perf_counter())

    with watched_memory(device) as peak:
        cap_memory(options.caps[0], device)
        try:
            began = time.perf_counter()
            words = {"placement": options.placements[0], **quantised(options.quantise[0])}
            world = orrery.load(options.model, device, options.dtype, **words)
            row["load"] = time.perf_counter() - began
            start = Video(pixels, config.fps)
            request = world.request(PROMPT, start, frames=options.frames, size=size, steps=options.steps)
            began = time.perf_counter()
            video = world.run(request, progress)
            row |= {"ran": len(video) == options.frames, "seconds": time.perf_counter() - began}
        except (RuntimeError, MemoryError, OSError, OrreryError) as problem:
            if not out_of_memory(problem):
                raise
            row["why"] = one_line(problem)[:200] or type(problem).__name__
    if options.kind == "cuda":
        row["reserved"] = torch.cuda.max_memory_reserved(device)
    steps = [b - a for a, b in zip(stamps[:-1], stamps[1:], strict=True)]
    return row | {"peak": peak.grown, "step": statistics.median(steps) if steps else None}


def out_of_memory(problem: BaseException) -> bool:
    """Whether an error says that there is no more memory, and nothing else."""
    text = str(problem).lower()
    told = ("out of memory", "can't allocate memory", "cannot allocate memory", "does not fit into the memory")
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or any(words in text for words in told)


def tried(row: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The row with what became of it, in a process of its own."""
    size, cap, way = row["size"], row["cap"], row["quantise"]
    print(f"{cap:g} GiB, {row['placement']}, quantise {way}: {row['plan']}", file=sys.stderr, flush=True)
    words = ["--device", options.device, "--size", f"{size[0]}x{size[1]}", "--caps", str(cap)]
    words += ["--placements", row["placement"], "--dtype", options.dtype, "--steps", str(options.steps)]
    words += ["--frames", str(options.frames), *(["--quantise", way] if way else [])]
    try:
        row = row | in_child([*words, "--model", str(folder)])
    except subprocess.CalledProcessError as problem:
        if problem.returncode == InputError.exit_code:
            raise InputError("a clip was refused: see above") from problem
        row = row | {"ran": False, "why": f"the process ended with {problem.returncode}: see stderr"}
    print("  ran" if row["ran"] else f"  {row['why']}", file=sys.stderr, flush=True)
    return row | {"right": row["ran"] == row["fits"]}


def markdown(result: dict[str, Any]) -> str:
    """The result as a page, a table for each size."""
    about, rows = result["options"], result["rows"]
    lines = [f"# What fits: {result['preset']} on {result['device']}", "", made_line(result["made"]), ""]
    text = "published shape" if about["text"] == "full" else "small"
    kind = torch.device(about["device"]).type
    if kind == "meta":
        lines += ["Plans alone, of the published model: nothing was run."]
    else:
        lines += [
            busy_line(result["load_average"]["before"], result["load_average"]["after"]),
            "",
            f"Random weights, {about['dtype']}; text encoder: {text}. {LEGEND.format(MEMORY[kind], about['steps'])}"
            + RIGHT * (kind == "cuda"),
        ]
    for size in dict.fromkeys(tuple(row["size"]) for row in rows):
        lines += ["", f"## {about['frames']} frames of {size[0]}x{size[1]}", ""]
        found = [row for row in rows if tuple(row["size"]) == size]
        heads = ["GiB", "placement", *["quantised"] * any(row.get("quantise") for row in found), "chosen", "plan"]
        heads += ["planned GiB", "is to fit"]
        heads += [] if kind == "meta" else ["ran", "peak GiB", "load s", "s", "step s"]
        heads += ["right"] * (kind == "cuda")
        lines += table(heads, [cells(row, heads) for row in found])
    if kind == "cuda":  # elsewhere the cap and the plan speak of different things
        right = sum(row["right"] for row in rows)
        lines += ["", f"The plan was right {right} times of {len(rows)}."]
    for row in rows:
        if row.get("why"):
            height, width = row["size"]
            lines += ["", f"{height}x{width}, {row['cap']:g} GiB, {row['placement']}: {row['why']}"]
    return "\n".join(lines)


def cells(row: dict[str, Any], heads: list[str]) -> list[str]:
    """A row of the table, in the order of its heads."""
    yes = {True: "yes", False: "no"}

    def number(key: str) -> str:
        return f"{row[key]:.3g}" if row.get(key) is not None else ""

    peak = f"{row['peak'] / GIB:.2f}" if row.get("peak") is not None else ""
    values = {
        "GiB": f"{row['cap']:g}",
        "placement": row["placement"],
        "quantised": row.get("quantise") or "",
        "chosen": "*" if row["chosen"] else "",
        "plan": row["plan"],
        "planned GiB": f"{row['planned'] / GIB:.2f}",
        "is to fit": yes[row["fits"]],
        "ran": "yes" if row.get("ran") else "out of memory",
        "peak GiB": peak + (f" ({row['reserved'] / GIB:.2f})" if "reserved" in row else ""),
        "load s": number("load"),
        "s": number("seconds"),
        "step s": number("step"),
        "right": yes[bool(row.get("right"))],
    }
    return [values[head] for head in heads]


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given depends on the device (DEFAULTS)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", help="small on a CPU, 2b on a GPU, 2b 14b on meta; results each")
    parser.add_argument("--size", type=height_width, nargs="+", help="pixels, HxW: 32x48 on a CPU, else 720p and 480p")
    parser.add_argument("--frames", type=int, help="4k + 1: 9 on a CPU, else 93")
    parser.add_argument("--steps", type=int, default=2, help="of the solver")
    parser.add_argument("--caps", type=float, nargs="+", help="GiB: 0.5 2 on a CPU, else 8 16 24 48 80")
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS))
    parser.add_argument("--chosen", action="store_true", help="of the placements only the one that the plan takes")
    parser.add_argument("--quantise", nargs="+", default=[None], metavar="WAY", help="weights, as `load` has it")
    parser.add_argument("--text", choices=("small", "full"), help="encoder; full, as published, on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or meta")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # one clip of this folder, print JSON
    options = parser.parse_args(words)
    options.kind = torch.device(options.device).type
    for name, value in DEFAULTS[options.kind].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if min(options.caps) <= 0 or options.steps < 1:
        raise InputError("--caps must be above 0 and --steps at least 1")
    if options.frames < 9 or options.frames % 4 != 1:
        raise InputError(f"--frames must be 4k + 1 and at least 9, got {options.frames}")
    if unknown := [way for way in options.quantise if way not in (None, *WAYS)]:
        raise InputError(f"--quantise is {unknown[0]!r}; allowed are {', '.join(WAYS)}")
    if options.kind == "meta" and {*options.preset} - {"2b", "14b"}:
        raise InputError(f"--device meta plans the published 2b and 14b, not {', '.join(options.preset)}")
    for preset in options.preset:
        dit_config(preset)
    return options


def measure(preset: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one preset."""
    if options.kind == "meta":
        return list(variants(find_model(f"predict2.5-{preset}").config, options))
    with tempfile.TemporaryDirectory(prefix="orrery-fits-") as folder:
        own = argparse.Namespace(**vars(options) | {"preset": [preset], "size": options.size[0]})
        make_folder(Path(folder), preset, own)
        if options.text == "full":
            full_text(Path(folder), own)
        return [tried(row, Path(folder), options) for row in variants(find_model(folder).config, options)]


def main() -> int:
    """Runs the benchmark; 2 on bad input."""
    options = arguments(sys.argv[1:])
    torch.set_grad_enabled(False)
    if options.model:
        print(json.dumps(clip(options)))
        return 0
    for preset in options.preset:
        made, before = provenance("transformers", "safetensors"), load_average()
        device = "meta" if options.kind == "meta" else device_name(options.device)
        result = {
            "made": made,
            "preset": preset,
            "device": device,
            "options": {k: v for k, v in vars(options).items() if k not in ("model", "results", "kind", "preset")},
            "rows": measure(preset, options),
            "load_average": {"before": before, "after": load_average()},
        }
        page = markdown(result)
        name = "_".join(["fits", slug(device), preset, *filter(None, options.quantise)])
        print(page, *write_results(name, result, page, options.results), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
