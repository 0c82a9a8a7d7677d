"""What every stage of a clip costs at least, and what bounds it: `python benchmarks/floor.py [--preset small]`.

Every operation of a stage is looked at as it is dispatched: its arithmetic, the bytes that it must move (what it reads
and what it writes, once each; views move nothing) and its part of the network, which the names of modules and weights
tell. An operation takes at least the larger of arithmetic and bytes over what this machine can do at most; a stage at
least the sum. Beside that stands what it does take, in the operations and between them. With `--device meta` and
`--ceilings 800:4000` the floor of a GPU that is not at hand is worked out, at any size. Counts are held against
`common.counted` and, of the transformer, against the formula of its shapes. Writes results/floor_MACHINE_PRESET.json
and .md.
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip import GIVEN, PROMPT, draw_vae
from common import (
    DTYPES,
    RESULTS,
    SMALL,
    busy_line,
    counted,
    device_name,
    draw_linear,
    fill,
    height_width,
    load_average,
    made_line,
    provenance,
    random_dit,
    slug,
    table,
    timed,
    write_results,
)
from operations import OVERHEAD, AsOnGPU, Ceilings, Operations, Row, timing_cost
from torch import nn
from transformer import CACHED, formula

import orrery
from orrery.errors import InputError, OrreryError
from orrery.flow import (
    FrameCondition,
    guided_velocity,
    karras_schedule,
    one_by_one,
    shift_schedule,
    side_by_side,
    solve,
)
from orrery.nn.dit import Conditions, DiT, TextContext
from orrery.nn.text import PAD, TextConfig, TextEncoder, word_tokenizer
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE
from orrery.video import Video
from orrery.weights import ModelConfig, Sampling, find_model
from orrery.world.plan import latents_at_once

PRESETS = ("mini", "small", "2b", "14b")
SMALL_TEXT = TextConfig(hidden_size=128, layers=4, heads=2, kv_heads=1, mlp=32, length=512)
PATIENCE, SHORT = 10.0, 1.5  # seconds: a stage that takes longer runs once; runs take as long at least, together
LEGEND = (
    "`TFLOP`: two operations a multiplication with addition, attention in full, as executed. `GB`: what the "
    "operations read and write, once each. `arithmetic`: the time of the TFLOP alone at the ceiling, which is what "
    "fusing everything else away could come to. `least`: of each operation the larger of its arithmetic and its bytes "
    "at the ceilings, summed. `calls`: operations, views left out. `bound by`: whichever of the two has the larger "
    f"part of `least`; overhead, where the time is more than {OVERHEAD} times the least."
)
MEASURED = (
    "`ms`: best run of a stage, warm; of a part the time inside its operations, in the best of the runs in which each "
    "is timed (on a GPU between two events, waiting for its launch included). `between operations`: the stage less all "
    "parts: Python, views, and what the framework does around an operation. `reached`: least over ms. Timing costs an "
    "operation {0:.2g} µs, which is taken off; the smallest operation takes {1:.2g} µs here."
)


def dit_part(name: str, kind: str) -> str:
    """Part of the transformer."""
    if kind in ("self", "cross"):
        return f"{kind}-attention"
    if "final_layer" in name:
        return "final layer"
    if "adaln" in name or name.startswith(("t_embedder", "t_embedding", "action_embedder")):
        return "modulation"
    if not name.startswith("blocks."):
        return "text projection" if "_proj" in name else "patches in and out"
    if kind == "other":
        return "norms, rope, other elementwise"
    return "MLP" if ".mlp" in name else "q, k, v, output projections"


def text_part(name: str, kind: str) -> str:
    """Part of the text encoder."""
    if kind in ("self", "cross"):
        return "attention"
    if kind == "other":
        return "norms, other elementwise"
    return "MLP" if ".mlp." in name else "q, k, v, output projections"


def vae_part(vae: VAE) -> Callable[[str, str], str]:
    """Parts of the VAE by resolution. A step between two levels belongs to the finer one."""
    steps, finest = len(vae.config.temporal_down), vae.config.patch
    levels = {"conv1": steps, "conv2": steps, "encoder.conv1": 0, "decoder.conv1": steps}
    levels |= {"encoder.middle": steps, "encoder.head": steps, "decoder.middle": steps, "decoder.head": 0}
    for prefix, level, turn in (("encoder.downsamples", 0, 1), ("decoder.upsamples", steps, -1)):
        for name, child in vae.get_submodule(prefix).named_children():
            moves = hasattr(child, "resample") or getattr(child, "space", 1) > 1
            levels[f"{prefix}.{name}"] = min(level, level + turn * moves)
            level += turn * moves

    def part(name: str, kind: str) -> str:
        words = name.split(".")
        keys = (".".join(words[:n]) for n in (3, 2, 1))
        level = next((levels[key] for key in keys if key in levels), None)
        if level is None:
            return "patches in and out"
        what = {"matmul": "convolutions", "other": "norms, other elementwise"}.get(kind, "attention")
        return f"1/{finest * 2**level}: {what}"

    return part


@dataclass
class Stage:
    """What is measured. calls: how often a clip needs it."""

    name: str
    run: Callable[[], Any]
    calls: float = 1
    network: nn.Module | None = None
    part: Callable[[str, str], str] = field(default=lambda name, kind: "all")
    formula: float | None = None


@dataclass(frozen=True)
class Case:
    """What a clip is made of. batch: texts that go through the transformer together."""

    config: ModelConfig
    size: tuple[int, int]
    frames: int
    batch: int
    transformer: DiT
    vae: VAE
    text: TextEncoder
    world: Any = None


def model_config(preset: str, options: argparse.Namespace) -> ModelConfig:
    """Of the published model, of orrery-mini, or of the small one."""
    if preset != "small":
        return find_model(preset if preset == "mini" else f"predict2.5-{preset}").config
    sampling = Sampling(steps=35, guidance=7.0, conditional_timestep=0.1, negative_prompt=PROMPT)
    size, frames = options.size or (192, 320), options.frames or 17
    return ModelConfig(
        transformer=SMALL, vae=VAES["wan2.1"], text=SMALL_TEXT, sampling=sampling, fps=16.0, frames=frames,
        resolution=size, any_length=True, vae_dtype="bfloat16", training={"weights": "random"},
    )  # fmt: skip


def make_case(preset: str, options: argparse.Namespace, device: str) -> Case:
    """The networks on a device, in the dtypes in which they compute; random weights, but for orrery-mini's."""
    config, dtype = model_config(preset, options), DTYPES[options.dtype]
    size, frames = options.size or config.resolution, options.frames or config.frames
    batch = options.batch or 2
    if preset == "mini" and device != "meta":
        world = orrery.load("mini", device, dtype)
        networks = world.model
        return Case(config, size, frames, batch, networks.transformer, networks.vae, networks.text, world)
    vae_dtype = torch.float32 if torch.device(options.device).type == "cpu" or preset == "mini" else torch.bfloat16
    reader = word_tokenizer(["word"])
    with torch.device("meta"):
        transformer = DiT(config.transformer).to(dtype).eval()
        vae = VAE(config.vae).to(vae_dtype).eval()
        text = TextEncoder(dataclasses.replace(config.text, pad_token=PAD), reader).to(dtype).eval()
    if device != "meta":
        torch.manual_seed(0)
        transformer = random_dit(config.transformer, device, dtype)
        fill(vae, draw_vae, device)
        fill(text, draw_linear, device)
    return Case(config, size, frames, batch, transformer, vae, text)


def stages(case: Case, device: str) -> list[Stage]:
    """All stages of a clip that begins with given frames, each with inputs of its own."""
    config, sampling = case.config, case.config.sampling
    transformer, vae = case.transformer, case.vae
    dtype, vae_dtype = transformer.dtype, next(vae.parameters()).dtype
    texts = 2 if sampling.guidance > 0 else 1
    batch = min(case.batch, texts)
    tokens = torch.zeros(1, config.text.length, dtype=torch.int64, device=device)
    words = torch.randn(1, config.text.length, config.text.text_dim).to(device, dtype)
    pixels = (torch.rand(1, 3, GIVEN, *case.size) * 2 - 1).to(device, vae_dtype)
    count, sides = (case.frames - 1) // vae.temporal_factor + 1, [side // vae.spatial_factor for side in case.size]
    latents = torch.randn(1, config.vae.latent_channels, count, *sides).to(device)
    mask = torch.zeros(1, 1, count, *sides)
    mask[:, :, : (GIVEN - 1) // vae.temporal_factor + 1] = 1
    given = FrameCondition(latents, conditional_timestep=sampling.conditional_timestep, mask=mask.to(device))
    times = given.timesteps(500.0)
    times = times.repeat(batch, *[1] * (times.ndim - 1))
    told = Conditions(TextContext.batched([transformer.encode_text(words)] * batch), frame_mask=given.mask)
    several = latents.repeat(batch, 1, 1, 1, 1)
    answer = torch.cat([latents] * batch)
    if sampling.schedule == "karras":
        schedule = karras_schedule(sampling.steps, exact_times=sampling.exact_times)
    else:
        schedule = shift_schedule(sampling.steps, sampling.shift, exact_times=sampling.exact_times)
    if batch == texts:
        predict: Any = side_by_side(lambda x, times: answer, texts)
    else:
        predict = one_by_one([lambda x, times: answer] * texts)
    velocity = guided_velocity(predict, given, latents, sampling.guidance)
    raw, chunk = latents.to(vae_dtype), latents_at_once(vae, (sides[0], sides[1]))
    shape = argparse.Namespace(size=case.size, frames=case.frames, length=config.text.length)
    kind = "shared" if times.ndim == 1 else "per-frame"
    expected = formula(config.transformer, shape, kind, batch, CACHED)
    encoded = 1 + (texts == 2 and sampling.negative_prompt is not None)
    evaluations = len(schedule)
    return [
        Stage("text encoder", lambda: case.text(tokens), encoded, case.text, text_part),
        Stage("VAE encode", lambda: vae.encode(pixels), 1, vae, vae_part(vae)),
        Stage("text to keys, values", lambda: transformer.encode_text(words), texts, transformer, dit_part),
        Stage(
            f"DiT forward (batch {batch})",
            lambda: transformer(several, times, told),
            evaluations * texts / batch,
            transformer,
            dit_part,
            expected,
        ),
        Stage("solver, guidance", lambda: solve(velocity, latents, schedule, sampling.solver)),
        Stage("VAE decode", lambda: sum(1 for _ in vae.decode_stream(raw, chunk)), 1, vae, vae_part(vae)),
    ]


def measure_stage(stage: Stage, plain: Stage, ceilings: Ceilings, cost: float, options: argparse.Namespace) -> Any:
    """Counts, times and parts of a stage. plain: the same stage on the meta device."""
    print(stage.name, file=sys.stderr, flush=True)
    meta, cuda = options.kind == "meta", options.kind == "cuda"

    def watch(each: Stage, clock: Any = None) -> Operations:
        with Operations(ceilings, each.network, each.part, clock, cuda) as seen:
            each.run()
        return seen

    with AsOnGPU():
        tflop, on_meta = counted(lambda: watch(plain))
    check(plain.name, tflop, on_meta.total())
    result = {"name": stage.name, "calls": stage.calls, "formula": stage.formula, "plain_tflop": tflop}
    seen, seconds = on_meta, []
    if not meta:
        tflop, seen = counted(lambda: watch(stage))  # also the warm-up
        check(stage.name, tflop, seen.total())
        pairs = again(lambda: (timed(stage.run, options.clock), watch(stage, options.clock)), options)
        seconds, runs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        seen = runs[0]
        for name, row in seen.rows.items():
            row.seconds = max(0.0, min(run.rows[name].seconds for run in runs) - cost * row.calls)
    total = seen.total()
    result |= {"seconds": seconds, "best": min(seconds, default=None), "bound": total.bound(min(seconds, default=None))}
    result |= {"median": statistics.median(seconds) if seconds else None, "total": dataclasses.asdict(total)}
    result["parts"] = {
        name: dataclasses.asdict(row) | {"bound": row.bound(None if meta else row.seconds)}
        for name, row in sorted(seen.rows.items(), key=lambda item: -(item[1].seconds or item[1].least))
    }
    return result | {"uncounted": sorted(seen.uncounted)}


def again(run: Callable[[], tuple[float, Any]], options: argparse.Namespace) -> list[tuple[float, Any]]:
    """Several runs, which give their seconds and more; of a short one many: the best of them met a quiet machine."""
    found = [run()]
    while found[0][0] < PATIENCE and (len(found) < options.repeats or sum(pair[0] for pair in found) < SHORT):
        found.append(run())
    return found


def check(name: str, tflop: float, total: Row) -> None:
    """That the parts sum to what torch counts."""
    if abs(total.flop / 1e12 - tflop) > 1e-9 * tflop:
        raise OrreryError(f"{name}: the operations sum to {total.flop / 1e12} TFLOP, torch counts {tflop}")


def measure(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one preset."""
    on_meta = make_case(preset, options, "meta")
    case = on_meta if options.kind == "meta" else make_case(preset, options, options.device)
    dtypes = {DTYPES[options.dtype], next(case.vae.parameters()).dtype, torch.float32}
    cost, smallest = (0.0, 0.0) if options.kind == "meta" else timing_cost(options.device, options.clock)
    if options.ceilings:
        ceilings = Ceilings.told(options.ceilings)
    else:
        ceilings = Ceilings.measured(options.device, sorted(dtypes, key=str), options.clock)
    pairs = zip(stages(case, options.device), stages(on_meta, "meta"), strict=True)
    result: dict[str, Any] = {
        "ceilings": str(ceilings),
        "timing_cost": cost,
        "smallest_operation": smallest,
        "size": case.size,
        "frames": case.frames,
        "parameters": sum(weight.numel() for weight in case.transformer.parameters()),
        "stages": [measure_stage(stage, plain, ceilings, cost, options) for stage, plain in pairs],
    }
    if case.world is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (GIVEN, *case.size, 3), dtype=np.uint8)
        start = Video(pixels, case.config.fps)
        request = case.world.request(PROMPT, start, frames=case.frames, size=case.size)
        with Operations(ceilings) as seen:
            case.world.run(request)
        result["generate_total"] = dataclasses.asdict(seen.total())
        result["generate"] = [timed(lambda: case.world.run(request), options.clock) for _ in range(options.repeats)]
    return result


def milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def share(part: float, whole: float | None) -> str:
    return f"{part / whole:.0%}" if whole else ""


def clip_table(data: dict[str, Any]) -> list[str]:
    """A row for each stage of a clip, and their sum."""
    cells, sums = [], [0.0, 0.0, 0.0, 0.0, 0.0]
    times = data["stages"][0]["best"] is not None
    for stage in data["stages"]:
        total, calls, best = stage["total"], stage["calls"], stage["best"]
        inside = sum(part["seconds"] for part in stage["parts"].values())
        row = [total["flop"] / 1e12, total["moved"] / 1e9, total["arithmetic"], total["least"], best or 0.0]
        row = [calls * value for value in row]
        sums = [a + b for a, b in zip(sums, row)]
        cells.append([stage["name"], f"{calls:g}", *(f"{v:,.4g}" for v in row[:2]), *map(milliseconds, row[2:4])])
        if times:
            between = calls * max(0.0, best - inside)
            cells[-1] += [milliseconds(row[4]), milliseconds(between), share(row[3], row[4])]
            cells[-1] += [f"{row[4] / row[3]:,.1f}x"]
        cells[-1].append(stage["bound"])
    cells.append(["all", "", *(f"{v:,.4g}" for v in sums[:2]), *map(milliseconds, sums[2:4])])
    if times:
        cells[-1] += [milliseconds(sums[4]), "", share(sums[3], sums[4]), f"{sums[4] / sums[3]:,.1f}x"]
    cells[-1].append("")
    heads = ["in a clip", "times", "TFLOP", "GB", "arithmetic ms", "least ms"]
    heads += ["ms", "between operations ms", "reached", "could be faster by"] * times
    return table([*heads, "bound by"], cells)


def stage_table(stage: dict[str, Any]) -> list[str]:
    """A row for each part of one call of a stage."""
    cells, whole, best = [], stage["total"], stage["best"]
    inside = sum(part["seconds"] for part in stage["parts"].values())
    rows = list(stage["parts"].items()) + (
        [("all", whole | {"bound": stage["bound"]})] if len(stage["parts"]) > 1 else []
    )
    for name, part in rows:
        cells.append([name, f"{part['calls']:,}", f"{part['flop'] / 1e12:,.4g}", f"{part['moved'] / 1e9:,.4g}"])
        cells[-1] += [milliseconds(part["arithmetic"]), milliseconds(part["least"])]
        cells[-1].append(share(part["least"], whole["least"]))
        if best is not None:
            took = best if name == "all" else part["seconds"]
            cells[-1] += [milliseconds(took), share(part["least"], took)]
        cells[-1].append(part["bound"])
    if best is not None:
        empty = ["between operations", "", "", "", "", "", ""]
        cells.insert(len(cells) - (len(stage["parts"]) > 1), [*empty, milliseconds(max(0.0, best - inside)), "", ""])
    heads = ["part", "calls", "TFLOP", "GB", "arithmetic ms", "least ms", "of least"]
    return table([*heads, *["ms", "reached"] * (best is not None), "bound by"], cells)


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    data, about = result["data"], result["options"]
    height, width = data["size"]
    lines = [f"# The floor of {result['preset']} on {result['device']}", "", made_line(result["made"]), ""]
    if about["device"] == "meta":
        lines += ["Counted without computing: no time is measured here.", ""]
    else:
        lines += [busy_line(result["load_average"]["before"], result["load_average"]["after"])]
        lines[-1] += " Seconds are CPU seconds of one thread: others used this machine too." * about["cpu_seconds"]
        lines.append("")
    lines += [
        f"{data['frames']} frames of {height}x{width}, {GIVEN} given; transformer of {data['parameters'] / 1e6:,.1f}M "
        f"parameters, {about['dtype']}. {data['ceilings']}",
        "",
        LEGEND,
    ]
    if about["device"] != "meta":
        lines[-1] += " " + MEASURED.format(1e6 * data["timing_cost"], 1e6 * data["smallest_operation"])
    lines += ["", "## A clip", "", *clip_table(data)]
    if "generate" in data:
        staged = sum(stage["calls"] * stage["best"] for stage in data["stages"])
        counts = [sum(stage["calls"] * stage["total"][key] for stage in data["stages"]) for key in ("flop", "calls")]
        whole, total = min(data["generate"]), data["generate_total"]
        lines += [
            "",
            f"The whole `generate`: {milliseconds(whole)} ms, best of {len(data['generate'])}, "
            f"{total['flop'] / 1e12:,.4g} TFLOP in {total['calls']:,} operations; its stages, measured alone, come to "
            f"{milliseconds(staged)} ms, {counts[0] / 1e12:,.4g} TFLOP in {counts[1]:,.0f} operations.",
        ]
    for stage in data["stages"]:
        lines += ["", f"## {stage['name']}: one call", "", *stage_table(stage)]
        done, plain = stage["total"]["flop"] / 1e12, stage["plain_tflop"]
        if abs(done / plain - 1 if plain else done) > 1e-9:
            lines += ["", f"Executed here: {done:,.5g} TFLOP; the same stage on the meta device: {plain:,.5g}."]
        if stage["formula"]:
            lines += ["", f"By the formula of the shapes: {stage['formula']:,.5g} TFLOP (counted / formula "
                      f"{done / stage['formula']:.6f})."]  # fmt: skip
        if stage["uncounted"]:
            lines += ["", f"The arithmetic of these is not counted: {', '.join(stage['uncounted'])}."]
    return "\n".join(lines)


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, help="mini on a CPU, else 2b; a file of results each")
    parser.add_argument("--size", type=height_width, help="pixels, HxW (default: the model's; small: 192x320)")
    parser.add_argument("--frames", type=int, help="4k + 1 (default: the model's; small: 17)")
    parser.add_argument("--batch", type=int, choices=(1, 2), help="texts in one pass; 2, as guidance asks for")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or meta")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU and for mini, else bfloat16")
    parser.add_argument("--ceilings", metavar="T:G[:S]", help="TFLOP/s, GB/s (and TFLOP/s in float32), not measured")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, on a CPU that others use too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    options = parser.parse_args(words)
    options.kind = torch.device(options.device).type
    options.preset = options.preset or ["mini" if options.kind == "cpu" else "2b"]
    if options.kind == "cpu" and {"2b", "14b"} & {*options.preset}:
        raise InputError("2b and 14b take hours on a CPU; --device meta works out their floor")
    if options.kind == "meta" and not options.ceilings:
        raise InputError("--device meta needs --ceilings, such as 800:4000: it measures nothing")
    if options.repeats < 1:
        raise InputError(f"--repeats must be at least 1, got {options.repeats}")
    if options.frames is not None and (options.frames < 9 or options.frames % 4 != 1):
        raise InputError(f"--frames must be 4k + 1 and at least 9, got {options.frames}")
    if options.size and any(side < 16 or side % 16 for side in options.size):
        raise InputError(f"--size must be positive multiples of 16, got {options.size[0]}x{options.size[1]}")
    if options.cpu_seconds:
        if options.kind != "cpu":
            raise InputError(f"--cpu-seconds needs --device cpu, got {options.device}")
        torch.set_num_threads(1)
    options.clock = time.process_time if options.cpu_seconds else time.perf_counter
    return options


def main() -> int:
    """Runs the benchmark; 2 on bad input."""
    asked = arguments(sys.argv[1:])
    torch.set_grad_enabled(False)
    torch.backends.cudnn.deterministic = True  # as World generates
    for preset in asked.preset:
        options = argparse.Namespace(**vars(asked))
        whole = options.kind == "cpu" or preset == "mini"
        options.dtype = options.dtype or ("float32" if whole else "bfloat16")
        made, before = provenance("transformers"), load_average()
        device = "meta" if options.kind == "meta" else device_name(options.device)
        hidden = ("results", "clock", "kind", "preset")
        result = {
            "made": made,
            "preset": preset,
            "device": device,
            "options": {key: value for key, value in vars(options).items() if key not in hidden},
            "data": measure(preset, options),
            "load_average": {"before": before, "after": load_average()},
        }
        page = markdown(result)
        name = f"floor_{slug(device)}_{preset}"
        name += f"_{options.size[0]}x{options.size[1]}" if options.size else ""
        print(page, *write_results(name, result, page, options.results), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
