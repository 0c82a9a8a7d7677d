"""A whole Video2World clip, stage by stage: `python benchmarks/clip.py [--preset 2b --size 704x1280 --frames 93]`.

A model folder (random weights of any transformer, the Wan 2.1 VAE and a small text encoder whose width fits; or
orrery-mini itself) is loaded as a `World` in a process of its own, and one clip is generated from five given frames.
For each stage (text, encoding, denoising, decoding) the seconds, the arithmetic and its share of what this machine can
do at most, and the peak of memory beside what `World.plan` said. Writes results/clip_MACHINE.json and .md.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    DTYPES,
    RESULTS,
    busy_line,
    counted,
    device_name,
    dit_config,
    fill,
    height_width,
    in_child,
    load_average,
    made_line,
    matmul_ceiling,
    provenance,
    random_dit,
    slug,
    synchronise,
    table,
    watched_memory,
    write_results,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from orrery.errors import InputError, OrreryError
from orrery.nn.dit import Conditions, DiT, TextContext
from orrery.nn.text import TextConfig, TextEncoder, word_tokenizer
from orrery.nn.vae import PRESETS as VAES
from orrery.nn.vae import VAE
from orrery.video import Video
from orrery.weights import CATALOGUE, ModelConfig, Sampling, find_model
from orrery.weights.store import write_config
from orrery.world import World
from orrery.world.networks import Networks
from orrery.world.plan import Plan, Shape, latents_at_once, measure
from orrery.world.speed import speed_of

DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"preset": ["mini", "small"], "dtype": "float32"},
    "cuda": {"preset": ["2b"], "dtype": "bfloat16"},
}
# Size, frames, steps of the solver and runs by preset; "" for all others.
CLIPS: dict[str, dict[str, Any]] = {
    "mini": {"size": None, "frames": None, "steps": None, "repeats": 3},
    "small": {"size": (128, 192), "frames": 17, "steps": 4, "repeats": 1},
    "": {"size": (704, 1280), "frames": 93, "steps": 35, "repeats": 1},
}
PROMPT, GIVEN, FPS = "a red ball falls and bounces", 5, 16.0
FULL_STEPS = 35  # of the published model
STAGES = {"load": "load", "text": "text", "encode": "VAE encode", "denoise": "denoise", "decode": "VAE decode"}
PLANNED = {"text": "text encoder", "encode": "VAE", "denoise": "transformer", "decode": "VAE"}
LEGEND = (
    "`TFLOP`: two operations a multiplication with addition, attention in full; of the text encoder by formula, of the "
    "others counted by torch on the meta device with the same calls. `of ceiling`: TFLOP/s over those of the best "
    "square matrix product in the same run and the stage's dtype; the VAE's arithmetic is that of direct "
    "convolutions, of which a CPU's need less (nn.winograd): more than 100 % is possible. `planned`: the largest of "
    "the stage's networks as `orrery plan` has it (the VAE's is that of encoding or decoding, whichever is larger). A "
    "stage includes what moves its results to and from the device; the first clip of a process is counted, nothing is "
    "warmed up."
)
MEMORY = {
    "cpu": "`peak`: resident memory of the process above that before the model was loaded, looked at every "
    "millisecond; weights included, which are mapped from their files and count when they are first read. What a stage "
    "freed may still be there.",
    "cuda": "`peak`: torch.cuda.max_memory_allocated, resident weights included.",
}


CPU_SECONDS = " Seconds are CPU seconds of one thread: others used this machine too."


class Watched(Networks):
    """Networks that note, of each stage, its seconds (by `clock`) and its memory."""

    def __init__(self, clock: Callable[[], float], *args: Any) -> None:
        super().__init__(*args)
        self.clock, self.stages = clock, []  # type: ignore[var-annotated]

    @contextmanager
    def use(self, name: str, placement: str = "resident", on_cpu: bool = False, resident: int = 0) -> Iterator[Any]:
        """As it is, watched."""
        stage = {"transformer": "denoise", "text": "text"}.get(name)
        if stage is None:
            stage = "decode" if any(each["stage"] == "denoise" for each in self.stages) else "encode"
        with self.watch(stage) as row, super().use(name, placement, on_cpu, resident) as network:
            row["fetched"] = self.clock() - row["began"]
            yield network
            synchronise()

    @contextmanager
    def watch(self, stage: str) -> Iterator[dict[str, Any]]:
        """Note seconds and memory of the block as a stage."""
        row: dict[str, Any] = {"stage": stage}
        asked = self.clock()
        with watched_memory(self.device) as peak:
            row["began"] = self.clock()
            yield row
            synchronise()
            row["seconds"] = self.clock() - row.pop("began")
        row["peak"] = peak.whole
        row["watching"] = self.clock() - asked - row["seconds"]  # no part of generating
        self.stages.append(row)
        print(f"{stage}: {row['seconds']:.3g} s, peak {peak.whole / 2**30:.3g} GiB", file=sys.stderr, flush=True)


def make_folder(folder: Path, preset: str, options: argparse.Namespace) -> None:
    """A model folder with random weights in the dtypes in which they compute."""
    transformer = dit_config(preset)
    width = transformer.text_width
    hidden = next((h for h in (128, 512, 256, 64, 32) if width % h == 0 and width // h <= 400), None)
    if hidden is None:
        raise InputError(f"preset {preset}: no small text encoder gives text of width {width}")
    entry = CATALOGUE.get(preset) or CATALOGUE["predict2.5-14b" if preset == "14b" else "predict2.5-2b"]
    tokenizer = word_tokenizer([PROMPT, entry.summary])
    text = TextConfig(
        hidden_size=hidden, layers=width // hidden, heads=max(1, hidden // 64), kv_heads=1, mlp=hidden // 4, length=512
    )
    config = ModelConfig(
        transformer=transformer,
        vae=VAES["wan2.1"],
        text=text,
        sampling=Sampling(negative_prompt=entry.summary, **entry.sampling),
        fps=FPS,
        frames=options.frames,
        resolution=options.size,
        any_length=True,
        vae_dtype="bfloat16",
        training={"weights": "random"},
    )
    dtype = DTYPES[options.dtype]
    print(f"random weights of {preset}", file=sys.stderr, flush=True)
    with torch.device("meta"):
        vae = VAE(config.vae)
    torch.manual_seed(0)
    fill(vae, draw_vae, options.device)
    parts: dict[str, tuple[nn.Module, torch.dtype]] = {
        "vae": (vae, torch.float32 if cpu(options) else torch.bfloat16),
        "text": (TextEncoder(text, tokenizer), dtype),
        "transformer": (random_dit(transformer, options.device, dtype), dtype),
    }
    for name, (network, kept) in parts.items():
        weights = {key: value.to("cpu", kept).contiguous() for key, value in network.state_dict().items()}
        save_file(weights, folder / f"{name}.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    write_config(folder, config, f"# {preset} with random weights")
    del parts, network, vae
    if not cpu(options):
        torch.cuda.empty_cache()  # what measures is another process


def draw_vae(name: str, weight: Tensor) -> None:
    """Weights with which activations keep their size from layer to layer."""
    spread = 0.3 if weight[0].numel() == 1 else 0.8 / weight[0].numel() ** 0.5
    nn.init.normal_(weight, mean=1.0 if "gamma" in name else 0.0, std=spread)


def cpu(options: argparse.Namespace) -> bool:
    """Whether there is no GPU in this."""
    return torch.device(options.device).type == "cpu"


def generate(options: argparse.Namespace) -> dict[str, Any]:
    """Load the model of --model and generate in this process: stages of each run, plan, arithmetic, ceilings."""
    files = find_model(options.model)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    vae_dtype = torch.float32 if cpu(options) else DTYPES[files.config.vae_dtype]
    # One thread's own time: the watch over the memory has another.
    clock = time.thread_time if options.cpu_seconds else time.perf_counter
    speed = speed_of(options.speed, files.config, device)
    networks = Watched(clock, files, device, dtype, vae_dtype, (), speed)
    with tempfile.TemporaryDirectory() as kept:
        world = World(networks, str(options.model), options.placement, kept if options.embeddings else None)
        with torch.device("meta"):  # imports what the text encoder needs: no part of loading
            TextEncoder(files.config.text, networks.reader.tokenizer)
        before = process_memory(device)
        size, frames = options.size or files.config.resolution, options.frames or files.config.frames
        start = Video(np.random.default_rng(0).integers(0, 256, (GIVEN, *size, 3), dtype=np.uint8), files.config.fps)
        if frames > files.config.frames:
            raise InputError(f"--frames must be at most the model's {files.config.frames} (one chunk), got {frames}")
        request = world.request(PROMPT, start, frames=frames, size=size, steps=options.steps)
        if options.embeddings:
            for prompt in {PROMPT, request.negative_prompt} - {None}:
                shape = (1, files.config.text.length, files.config.text.text_dim)
                world.embeddings.put(prompt, torch.randn(shape).to(dtype))  # type: ignore[union-attr]
        plan = world.plan(request.size, request.frames, GIVEN, request.guidance > 0)
        if plan.placement == "resident":
            with networks.watch("load"):
                networks.load_all()
        runs = [one_run(world, request) for _ in range(options.repeats)]
    evaluations = runs[0]["evaluations"]
    return {
        "runs": runs,
        "before": before,
        "plan": str(plan) if plan.capacity < float("inf") else f"{plan.placement}, as so small a model always is",
        "planned": planned(world, plan, request),
        "evaluations": evaluations,
        "texts": 2 if request.guidance > 0 else 1,
        "size": request.size,
        "frames": request.frames,
        "fps": files.config.fps,
        "tflop": arithmetic(world, plan, request, evaluations),
        "ceilings": {str(kind): matmul_ceiling(device, kind, clock=clock) for kind in {dtype, vae_dtype}},
        "dtypes": {"text": str(dtype), "denoise": str(dtype), "encode": str(vae_dtype), "decode": str(vae_dtype)},
        "text_encoder": dataclasses.asdict(files.config.text),
        "parameters": sum(weight.numel() for weight in _meta(DiT(files.config.transformer)).parameters()),
    }


def _meta(network: nn.Module) -> nn.Module:
    return network.to("meta")


def process_memory(device: torch.device) -> int:
    """Bytes that this process holds before there is a model; 0 on a GPU, of which only the allocated part counts."""
    with watched_memory(device) as peak:
        pass
    return 0 if device.type == "cuda" else peak.whole


def one_run(world: World, request: Any) -> dict[str, Any]:
    """Generate once: stages, seconds of each step and of the whole."""
    networks: Any = world.model
    stamps: list[float] = []
    evaluations = 0

    def progress(done: int, steps: int) -> None:
        synchronise()
        stamps.append(networks.clock())
        nonlocal evaluations
        evaluations = steps
        print(f"step {done} of {steps}", file=sys.stderr, flush=True)

    began = networks.clock()
    video = world.run(request, progress)
    whole = networks.clock() - began - sum(row["watching"] for row in networks.stages if row["stage"] != "load")
    if (len(video), video.height, video.width) != (request.frames, *request.size):
        raise OrreryError(f"the video is {len(video)} frames of {video.height}x{video.width}")
    stages, networks.stages = networks.stages, []
    steps = [b - a for a, b in zip(stamps[:-1], stamps[1:], strict=True)]
    about = {"evaluations": evaluations, "deviation": float(video.frames[GIVEN:].std())}
    return {"seconds": whole, "stages": stages, "steps": steps} | about


def planned(world: World, plan: Plan, request: Any) -> dict[str, int]:
    """Peak bytes by the plan's names of the stages; worked out for a model so small that it is given no plan."""
    if "transformer" in plan.peaks:
        return plan.peaks
    shape = Shape(request.size, request.frames, GIVEN, 2 if request.guidance > 0 else 1)
    needs = measure(world.config, shape, world.dtype, world.model.vae_dtype)
    weights = needs.text + needs.transformer + needs.vae
    peaks = {"text encoder": needs.text_peak, "transformer": needs.transformer_peak, "VAE": needs.vae_peak}
    return {name: weights + peak for name, peak in peaks.items()}


def arithmetic(world: World, plan: Plan, request: Any, evaluations: int) -> dict[str, float]:
    """TFLOP of each stage, of the same calls on the meta device (a VAE in tiles counts as the whole picture)."""
    config, texts = world.config, 2 if request.guidance > 0 else 1
    text = config.text
    layer = 2 * text.hidden_size**2 + 3 * text.hidden_size * text.mlp
    layer += 2 * text.hidden_size**2 * text.kv_heads // text.heads
    encoded = 2 * texts * text.layers * text.length * (layer + 2 * text.length * text.hidden_size) / 1e12
    with torch.device("meta"), torch.no_grad():
        vae, network = VAE(config.vae), DiT(config.transformer)
        frames, latent = torch.empty(1, 3, GIVEN, *request.size), vae.spatial_factor
        height, width = (side // latent for side in request.size)
        drawn = request.frames if config.any_length else config.frames
        count, kept = ((n - 1) // vae.temporal_factor + 1 for n in (drawn, request.frames))
        latents = torch.empty(1, config.vae.latent_channels, count, height, width)
        chunk = 1 if plan.tiled else latents_at_once(vae, (height, width))
        words = torch.empty(1, text.length, text.text_dim)
        projected, context = counted(lambda: network.encode_text(words))
        batch = texts if plan.side_by_side else 1
        told = TextContext.batched([context] * batch)
        inputs, times = latents.expand(batch, -1, -1, -1, -1), torch.empty(batch, count)
        step, _ = counted(lambda: network(inputs, times, Conditions(told, frame_mask=torch.empty_like(latents[:, :1]))))
        return {
            "text": encoded,
            "encode": counted(lambda: vae.encode(frames))[0],
            "denoise": texts * projected + evaluations * step * texts / batch,
            "decode": counted(lambda: sum(1 for _ in vae.decode_stream(latents[:, :, :kept], chunk)))[0],
        }


def summary(data: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each stage: medians over the runs, largest peak."""
    rows = []
    for stage in STAGES:
        found = [each for run in data["runs"] for each in run["stages"] if each["stage"] == stage]
        if not found:
            continue
        row: dict[str, Any] = {"stage": stage, "seconds": statistics.median(each["seconds"] for each in found)}
        row["fetched"] = max(each.get("fetched", 0.0) for each in found)
        row["peak"] = max(each["peak"] for each in found) - data["before"]
        if stage in PLANNED:
            row["planned"] = data["planned"][PLANNED[stage]]
            row["tflop"] = data["tflop"][stage]
            row["tflops"] = row["tflop"] / row["seconds"]
            row["of_ceiling"] = row["tflops"] / data["ceilings"][data["dtypes"][stage]]
        rows.append(row)
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The result as a page, a section for each clip."""
    where = "cuda" if result["made"]["machine"]["gpu"] and result["options"]["device"] != "cpu" else "cpu"
    lines = [f"# A clip on {result['device']}", "", made_line(result["made"]), ""]
    lines += [
        busy_line(result["load_average"]["before"], result["load_average"]["after"]),
        "",
        f"{LEGEND} {MEMORY[where]}" + CPU_SECONDS * result["options"]["cpu_seconds"],
    ]
    for preset, data in result["clips"].items():
        height, width = data["size"]
        text = data["text_encoder"]
        weights = "the shipped weights" if preset == "mini" else "random weights"
        ceilings = ", ".join(f"{value:.3g} TFLOP/s in {name[6:]}" for name, value in data["ceilings"].items())
        lines += ["", f"## {preset}: {data['frames']} frames of {height}x{width}", ""]
        lines += [
            f"{data['parameters'] / 1e6:,.1f}M parameters, {weights}; {GIVEN} given frames; {data['evaluations']} "
            f"evaluations of {data['texts']} texts. Text encoder: {text['layers']} layers of {text['hidden_size']}, "
            f"{text['length']} tokens{', its embeddings kept from before' if result['options']['embeddings'] else ''}. "
            f"Plan: {data['plan']}. The best matrix product: {ceilings}. Runs: {len(data['runs'])}.",
            "",
        ]
        rows = summary(data)
        cells = []
        for row in rows:
            cells.append([STAGES[row["stage"]], f"{row['seconds']:.3g}"])
            cells[-1] += [f"{row[key]:.3g}" if key in row else "" for key in ("tflop", "tflops")]
            cells[-1] += [f"{row['of_ceiling']:.0%}" if "of_ceiling" in row else "", f"{row['peak'] / 2**30:.2f}"]
            cells[-1] += [f"{row['planned'] / 2**30:.2f}" if "planned" in row else ""]
        lines += table(["", "s", "TFLOP", "TFLOP/s", "of ceiling", "peak GiB", "planned GiB"], cells)
        lines += ["", *_totals(data)]
    return "\n".join(lines)


def _totals(data: dict[str, Any]) -> list[str]:
    """Sentences about the whole clip, and what the published number of steps would take."""
    whole = statistics.median(run["seconds"] for run in data["runs"])
    seconds = data["frames"] / data["fps"]
    said = [
        f"The clip, without loading: {whole:.3g} s for {seconds:.3g} s of video ({whole / seconds:.3g} times as long)."
    ]
    steps = [step for run in data["runs"] for step in run["steps"]]
    if steps:
        each = statistics.median(steps)
        said.append(f"A step after the first: {each:.3g} s, median.")
        full = FULL_STEPS + 1  # the published sampler asks once more than it has steps
        if data["evaluations"] < full and data["scaled"]:
            total = whole + (full - data["evaluations"]) * each
            said.append(f"Extrapolated, not run: with {full} evaluations the clip would take {total:.3g} s.")
    return said


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line; what is not given depends on device and preset (DEFAULTS, CLIPS)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", help="mini (the shipped weights), small, 2b, 14b; mini small on a CPU")
    parser.add_argument("--size", type=height_width, help="pixels, HxW: 128x192 for small, 704x1280 for 2b and 14b")
    parser.add_argument("--frames", type=int, help="4k + 1: 17 for small, 93 for 2b and 14b")
    parser.add_argument("--steps", type=int, help="of the solver: 4 for small, 35 for 2b (36 evaluations)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="float32 on a CPU, else bfloat16")
    parser.add_argument("--repeats", type=int, help="clips in a row: 3 for mini, else 1")
    parser.add_argument("--placement", choices=["resident", "stages", "blocks"], help="instead of the plan's choice")
    parser.add_argument("--speed", metavar="WORDS", help='as `orrery.load` takes it, such as "balanced compile"')
    parser.add_argument(
        "--embeddings", action="store_true", help="text embeddings are random and there before: no text stage"
    )
    parser.add_argument("--cpu-seconds", action="store_true", help="of one thread, on a CPU that others use too")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # measure this folder in this process, print JSON
    options = parser.parse_args(words)
    for name, value in DEFAULTS["cpu" if cpu(options) else "cuda"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for preset in options.preset:
        dit_config(preset)
    if options.cpu_seconds:
        if not cpu(options):
            raise InputError(f"--cpu-seconds needs --device cpu, got {options.device}")
        torch.set_num_threads(1)
    if (options.repeats or 1) < 1 or (options.steps or 1) < 1:
        raise InputError("--repeats and --steps must be at least 1")
    if options.frames is not None and (options.frames < 9 or options.frames % 4 != 1):
        raise InputError(f"--frames must be 4k + 1 and at least 9, got {options.frames}")
    return options


def settled(options: argparse.Namespace, preset: str) -> argparse.Namespace:
    """The options of one preset's clip."""
    own = argparse.Namespace(**vars(options) | {"preset": [preset]})
    for name, value in CLIPS.get(preset, CLIPS[""]).items():
        if getattr(own, name) is None:
            setattr(own, name, value)
    return own


def clip(options: argparse.Namespace, preset: str) -> dict[str, Any]:
    """One preset's clip, in a process of its own."""
    own = settled(options, preset)
    words = ["--preset", preset, "--device", own.device, "--dtype", own.dtype, "--repeats", str(own.repeats)]
    words += ["--size", f"{own.size[0]}x{own.size[1]}"] if own.size else []
    for name in ("frames", "steps", "placement", "speed"):
        words += [f"--{name}", str(getattr(own, name))] if getattr(own, name) is not None else []
    words += ["--embeddings"] * own.embeddings + ["--cpu-seconds"] * own.cpu_seconds
    with tempfile.TemporaryDirectory(prefix="orrery-clip-") as folder:
        model = find_model("mini").folder if preset == "mini" else Path(folder)
        if preset != "mini":
            make_folder(Path(folder), preset, own)
        return in_child([*words, "--model", str(model)]) | {"scaled": preset != "mini"}


def main() -> int:
    """Runs the benchmark; 2 on bad input."""
    options = arguments(sys.argv[1:])
    if options.model:
        torch.set_grad_enabled(False)
        print(json.dumps(generate(options)))
        return 0
    made, before = provenance("transformers", "safetensors"), load_average()
    clips = {preset: clip(options, preset) for preset in options.preset}
    for data in clips.values():
        data["rows"] = summary(data)
    result = {
        "made": made,
        "load_average": {"before": before, "after": load_average()},
        "device": device_name(options.device),
        "options": {key: value for key, value in vars(options).items() if key not in ("model", "results")},
        "clips": clips,
    }
    usual = options.preset == DEFAULTS["cpu" if cpu(options) else "cuda"]["preset"]
    name = f"clip_{slug(result['device'])}" + ("" if usual else "_" + slug("-".join(options.preset)))
    page = markdown(result)
    print(page, *write_results(name, result, page, options.results), sep="\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
