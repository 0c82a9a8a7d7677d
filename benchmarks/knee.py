"""What fewer evaluations cost in quality: `python benchmarks/knee.py [--data data/mini] [--clips 6]`.

Held-out clips, chosen as `mini_quality.py` chooses them, are drawn with every rung of steps x solver, step cache,
guidance interval and bfloat16. Error: of the latents and frames, against the model's own converged run (60 UniPC steps
from the same noise) and against the true clip; and whether the objects are as they should be. Cost: passes of the
transformer for one text (guidance makes two a step), and seconds of this process. `--random small` or `2b` instead
draws with random weights of that architecture at a few tokens and compares the cache with its own uncached run.
"""

import argparse
import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import orrery
from orrery.errors import InputError, OrreryError
from orrery.eval import ShapeVotes, judge, psnr
from orrery.files import atomic_file, check_writable
from orrery.flow import (
    FrameCondition,
    Schedule,
    StepCache,
    guidance_jumps,
    guided_velocity,
    karras_schedule,
    numpy_noise,
    shift_schedule,
    side_by_side,
    solve,
)
from orrery.nn.dit import Conditions, DiT, TextContext
from orrery.video import Video

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, dit_config, made_line, provenance, random_dit, table, write_results
from mini_quality import GIVEN, Case, choose, fit_shapes, resized, verdict_numbers

STEPS = (4, 6, 8, 10, 14, 20, 30)
BUDGETS = (0.005, 0.01, 0.02, 0.05, 0.1)
INTERVALS = ((0.0, 0.9), (0.3, 1.0), (0.3, 0.9), (0.0, 0.95), (0.5, 1.0))
COLOURS = {"unipc": "#1f77b4", "euler": "#9467bd", "cache": "#d62728", "cache, more steps": "#8c564b",
           "guidance interval": "#2ca02c", "interval and cache": "#ff7f0e", "bfloat16": "#7f7f7f"}  # fmt: skip
LINES = ("unipc", "euler", "cache", "cache, more steps")


@dataclass(frozen=True)
class Rung:
    """One way to sample. interval: of guidance; budget: of the step cache; dtype: of the transformer."""

    steps: int
    solver: str = "unipc"
    budget: float = 0.0
    interval: tuple[float, float] | None = None
    dtype: str = "float32"

    @property
    def kind(self) -> str:
        """What it belongs to in the picture."""
        if self.dtype != "float32":
            return self.dtype
        if self.interval:
            return "interval and cache" if self.budget else "guidance interval"
        return "cache" if self.budget else self.solver

    def __str__(self) -> str:
        words = [f"{self.solver} {self.steps}"]
        words += [f"cache {self.budget:g}"] * bool(self.budget)
        words += [f"guided {self.interval[0]:g}-{self.interval[1]:g}"] if self.interval else []
        return ", ".join([*words, *([self.dtype] if self.dtype != "float32" else [])])


def rungs(steps: int) -> list[Rung]:
    """All that is drawn; `steps` is the model's own number."""
    plain = [Rung(n, solver) for solver in ("unipc", "euler") for n in sorted({*STEPS, steps})]
    cached = [Rung(steps, budget=budget) for budget in BUDGETS] + [Rung(2 * steps, budget=b) for b in (0.02, 0.05)]
    guided = [Rung(steps, interval=interval) for interval in INTERVALS]
    both = [Rung(steps, budget=budget, interval=INTERVALS[0]) for budget in (0.02, 0.05)]
    return [*plain, *cached, *guided, *both, Rung(steps, dtype="bfloat16")]


@dataclass
class Start:
    """A clip as the sampler sees it: texts [1, L, D] (the prompt's, and what is led away from), given frames, noise."""

    texts: list[Tensor]
    given: FrameCondition
    noise: Tensor


@dataclass
class Drawn:
    """Latents [1, C, T, H, W], and what they cost; the cache says what it skipped."""

    latents: Tensor
    passes: int
    seconds: float
    cache: StepCache


def begin(world: orrery.World, case: Case, latents: int, seed: int) -> Start:
    """The start of a case from its first `latents` latent frames."""
    model, sampling = world.model, world.config.sampling
    with torch.no_grad():
        texts = [model.text.encode([case.caption])]
        if sampling.guidance:
            negative = sampling.negative_prompt
            texts.append(torch.zeros_like(texts[0]) if negative is None else model.text.encode([negative]))
        whole = model.vae.encode(Video(case.frames, case.fps).to_tensor()).float()
        known = torch.zeros_like(whole)
        if latents:
            first = Video(case.frames[: GIVEN[latents]], case.fps).to_tensor()
            known[:, :, :latents] = model.vae.encode(first).float()
    return Start(texts, FrameCondition(known, latents, sampling.conditional_timestep), numpy_noise(seed, known.shape))


@torch.no_grad()
def draw(network: DiT, start: Start, schedule: Schedule, rung: Rung, g: float) -> Drawn:
    """One clip by one rung."""
    passes = 0

    def ask(told: Conditions, texts: int, x: Tensor, times: Tensor) -> Tensor:
        nonlocal passes
        passes += texts
        return network(x, times, told)

    dtype = next(network.parameters()).dtype
    began = time.process_time()
    texts = [network.encode_text(text.to(dtype)) for text in start.texts]
    count = len(texts)
    every = Conditions(TextContext.batched(texts), frame_mask=start.given.mask)
    first = Conditions(texts[0], frame_mask=start.given.mask)
    predict = side_by_side(
        lambda x, times: ask(every, count, x, times), count, lambda x, times: ask(first, 1, x, times)
    )
    velocity = guided_velocity(predict, start.given, start.noise, g, rung.interval)
    cache = StepCache(velocity, schedule, rung.budget, guidance_jumps(schedule, rung.interval))
    latents = solve(cache, start.noise, schedule, rung.solver)
    return Drawn(latents, passes, time.process_time() - began, cache)


def schedule_of(world: orrery.World, steps: int) -> Schedule:
    """The model's schedule with so many steps."""
    sampling = world.config.sampling
    if sampling.schedule == "karras":
        return karras_schedule(steps, exact_times=sampling.exact_times)
    return shift_schedule(steps, sampling.shift, sampling.exact_times)


def off(a: Tensor, b: Tensor) -> float:
    """Relative error of a: rms of the difference over rms of b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


class Model:
    """A world in both kinds of numbers, and how it draws."""

    def __init__(self, name: str):
        self.world = orrery.load(name, "cpu", "float32")
        self.networks = {"float32": self.world.model.transformer}
        self.networks["bfloat16"] = orrery.load(name, "cpu", "bfloat16").model.transformer

    def draw(self, start: Start, rung: Rung) -> Drawn:
        """Latents of a start by a rung."""
        schedule = schedule_of(self.world, rung.steps)
        return draw(self.networks[rung.dtype], start, schedule, rung, self.world.config.sampling.guidance)

    @torch.no_grad()
    def frames(self, latents: Tensor) -> np.ndarray:
        """Pixels [T, H, W, 3] uint8."""
        return Video.from_tensor(self.world.model.vae.decode(latents), self.world.config.fps).frames


def measure(model: Model, case: Case, latents: int, votes: ShapeVotes, seed: int, converged: int) -> dict[str, Any]:
    """Numbers of one clip for every rung."""
    start, truth = begin(model.world, case, latents, seed), case.frames
    given, dense = GIVEN[latents], {}
    reference = model.draw(start, Rung(converged)).latents
    pictures = model.frames(reference)
    lines = {}
    for rung in [Rung(converged), *rungs(model.world.config.sampling.steps)]:
        drawn = model.draw(start, rung)
        frames = model.frames(drawn.latents)
        line: dict[str, Any] = {"passes": drawn.passes, "seconds": drawn.seconds, "off": off(drawn.latents, reference)}
        line["psnr_converged"] = float(np.mean(np.minimum(psnr(frames[given:], pictures[given:]), 99)))
        if given:
            line["psnr_truth"] = float(np.mean(psnr(frames[given:], truth[given:])))
        row = verdict_numbers(judge(frames, case.caption, votes, given, case.tracks if given else None))
        line |= {name: row[name] for name in ("count_kept", "colour_right", "shape_right", "told", "went")}
        if "error_px" in row:
            line["last_px"] = [curve[-1] for curve in row["error_px"]]
        bare = dataclasses.replace(rung, budget=0.0)
        if rung.budget:
            if bare not in dense:
                dense[bare] = model.draw(start, bare).latents
            line["off_uncached"] = off(drawn.latents, dense[bare])
            line["estimated"], line["pattern"] = drawn.cache.estimated_error, drawn.cache.pattern
        elif rung.steps == model.world.config.sampling.steps:
            dense[bare] = drawn.latents
        lines[str(rung)] = line
    return {"id": case.name, "given": latents, "rungs": lines}


def summarise(records: list[dict[str, Any]], rung: Rung) -> dict[str, Any]:
    """Means of a rung over clips (over objects or frames where there are several a clip)."""
    rows = [record["rungs"][str(rung)] for record in records]
    out: dict[str, Any] = {"rung": str(rung), **dataclasses.asdict(rung), "kind": rung.kind}
    for name in dict.fromkeys(key for row in rows for key in row if key != "pattern"):
        values = [row[name] for row in rows if name in row]
        flat = [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]
        out[name] = float(np.mean(flat)) if flat else None
    out["off_worst"] = max(row["off"] for row in rows)
    if rung.budget:
        errors = np.array([row["off_uncached"] for row in rows])
        estimates = np.array([row["estimated"] for row in rows])
        out["within_budget"] = float(np.mean(errors <= rung.budget))
        out["off_uncached_worst"] = float(errors.max())
        out["over_estimate"] = float(np.median(errors[estimates > 0] / estimates[estimates > 0]))
        out["pattern"] = rows[0]["pattern"]
    return out


def pareto(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rungs that no other beats in both passes and error of the latents, by passes."""
    front: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["passes"], row["off"])):
        if not front or row["off"] < front[-1]["off"]:
            front.append(row)
    return front


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    heads = ("", "passes", "s", "latents off", "worst", "dB to converged", "dB to truth", "last px", "count", "colour",
             "shape", "told", "went")  # fmt: skip
    front = {row["rung"] for row in result["front"]}
    shares = ("count_kept", "colour_right", "shape_right", "told", "went")
    lines = []
    for row in result["rungs"]:
        name = f"**{row['rung']}**" if row["rung"] in front else row["rung"]
        cells = [name + (" (default)" if row["rung"] == result["default"] else ""), f"{row['passes']:.1f}"]
        cells += [f"{row['seconds']:.2f}", f"{row['off']:.4f}", f"{row['off_worst']:.4f}"]
        cells += [f"{row['psnr_converged']:.1f}", _cell(row.get("psnr_truth"), ".2f"), _cell(row.get("last_px"), ".2f")]
        lines.append([*cells, *(_cell(row.get(share), ".0%") for share in shares)])
    cached = [
        [row["rung"], f"{row['passes']:.1f}", f"{row['off_uncached']:.4f}", f"{row['off_uncached_worst']:.4f}",
         f"{row['estimated']:.4f}", f"{row['within_budget']:.0%}", f"`{row['pattern']}`"]
        for row in result["rungs"] if row["budget"]
    ]  # fmt: skip
    return "\n".join(
        [
            "# Fewer evaluations: error against cost",
            "",
            f"Model `{result['model']}` ({result['weights']}); {result['clips']} held-out clips, begun from 1, 2 and 0 "
            f"latent frames in turn; {made_line(result['made'])}",
            "",
            f"`passes`: of the transformer, for one text. `latents off`: rms of the difference over rms, from "
            f"{result['converged']} UniPC steps with the same noise; `dB to converged`: PSNR of the drawn frames to "
            "that run's. `dB to truth`: to the true clip, where there are given frames. Objects as in "
            "`mini_quality.md`. Bold: nothing here has both fewer passes and a smaller error. Seconds are of this "
            "process, of all threads together.",
            "",
            *table(heads, lines),
            "",
            "## Step cache against the same run without it",
            "",
            *table(("", "passes", "off", "worst", "estimated", "clips within budget", "steps of the first"), cached),
        ]
    )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def picture(result: dict[str, Any], path: Path) -> None:
    """Error against cost, and PSNR to the true clip against cost."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(15, 7), constrained_layout=True)
    own = next(row for row in result["rungs"] if row["rung"] == result["default"])
    rows = [row for row in result["rungs"] if row["steps"] != result["converged"]]
    for axis, key, name in (
        (axes[0], "off", f"error of the latents, relative to {result['converged']} UniPC steps"),
        (axes[1], "psnr_truth", "PSNR to the true clip, dB"),
    ):
        for kind, colour in COLOURS.items():
            mine = [row for row in rows if _drawn_as(row, own) == kind and row.get(key) is not None]
            mine.sort(key=lambda row: row["passes"])
            line = "-" if kind in LINES else ""
            axis.plot([r["passes"] for r in mine], [r[key] for r in mine], "o" + line, c=colour, lw=1, ms=5, label=kind)
            for row in mine if key == "off" else ():
                words = {"unipc": row["steps"], "euler": row["steps"], "bfloat16": ""}.get(kind) or _mark(row, own)
                place = (4, 5) if kind in ("euler", "guidance interval", "interval and cache") else (-6, -13)
                axis.annotate(
                    words, (row["passes"], row[key]), place, textcoords="offset points", fontsize=8, color=colour
                )
        axis.plot(own["passes"], own[key], "o", mfc="none", mec="black", ms=13, mew=1.6, label="the model's default")
        axis.set_xscale("log")
        ticks = [8, 12, 16, 20, 28, 40, 60]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.set(xlabel="passes of the transformer (one text each)", ylabel=name)
        axis.grid(alpha=0.3)
    best = result["front"]
    axes[0].plot([r["passes"] for r in best], [r["off"] for r in best], "k:", lw=2, label="Pareto front", zorder=1)
    levels = [0.01, 0.02, 0.03, 0.05, 0.1]
    axes[0].set_yscale("log")
    axes[0].set_yticks(levels, [f"{level:g}" for level in levels])
    axes[0].minorticks_off()
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(f"{result['model']}, {result['clips']} held-out clips. Numbers: steps, cache budget, guided levels")
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _drawn_as(row: dict[str, Any], own: dict[str, Any]) -> str:
    return "cache, more steps" if row["kind"] == "cache" and row["steps"] > own["steps"] else row["kind"]


def _mark(row: dict[str, Any], own: dict[str, Any]) -> str:
    """A short name of a rung with a cache or an interval."""
    words = [f"{row['steps']}:"] if row["steps"] != own["steps"] else []
    words += [f"{row['budget']:g}"] if row["budget"] else []
    return " ".join([*words, *(["-".join(f"{level:g}" for level in row["interval"])] if row["interval"] else [])])


def random_weights(name: str, size: tuple[int, int, int], clips: int) -> dict[str, Any]:
    """Budgets and steps with random weights: the relative error against the uncached run of the same steps."""
    config = dit_config(name)
    network, g = random_dit(config, "cpu", torch.float32), 7.0
    lines = []
    for label, make, usual in (("shift", shift_schedule, 35), ("karras", karras_schedule, 35)):
        starts = []
        for seed in range(clips):
            noise = numpy_noise(seed, (1, config.latent_channels, *size))
            generator = torch.Generator().manual_seed(seed)
            texts = [torch.randn(1, 16, config.text_width, generator=generator) for _ in range(2)]
            starts.append(Start(texts, FrameCondition(torch.zeros_like(noise), 0), noise))
        dense = [draw(network, start, make(usual), Rung(usual), g) for start in starts]
        for rung in [Rung(usual, budget=budget) for budget in BUDGETS] + [Rung(n) for n in (12, 18, 25)]:
            drawn = [draw(network, start, make(rung.steps), rung, g) for start in starts]
            errors = [off(each.latents, base.latents) for each, base in zip(drawn, dense)]
            line = {"schedule": label, "rung": str(rung), "passes": float(np.mean([each.passes for each in drawn]))}
            line |= {"dense": dense[0].passes, "off": float(np.mean(errors)), "off_worst": max(errors)}
            line["estimated"] = float(np.mean([each.cache.estimated_error for each in drawn]))
            lines.append(line | {"budget": rung.budget, "pattern": drawn[0].cache.pattern})
            print(line, file=sys.stderr, flush=True)
    return {"made": provenance(), "preset": name, "latents": list(size), "starts": clips, "guidance": g, "lines": lines}


def random_page(result: dict[str, Any]) -> str:
    """The result of random weights as a page."""
    rows = [
        [line["schedule"], line["rung"], f"{line['passes']:.1f} of {line['dense']}", f"{line['off']:.4f}",
         f"{line['off_worst']:.4f}", f"{line['estimated']:.4f}" if line["budget"] else "",
         f"`{line['pattern']}`" if line["budget"] else ""]
        for line in result["lines"]
    ]  # fmt: skip
    heads = ("schedule", "", "passes", "off", "worst", "estimated", "steps of the first")
    return "\n".join(
        [
            f"# Step cache with random weights of {result['preset']}",
            "",
            f"Latents {result['latents']}, {result['starts']} starts, guidance {result['guidance']:g}; "
            f"{made_line(result['made'])}",
            "",
            "`off`: relative error of the final latents against 35 steps (Karras: 36) without a cache.",
            "",
            *table(heads, rows),
        ]
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="a name or a model folder")
    parser.add_argument("--clips", type=int, default=6, help="one-object clips a scene; a third as many have several")
    parser.add_argument("--seed", type=int, default=0, help="which held-out clips, and the noise")
    parser.add_argument("--fit", type=int, default=32, help="training clips a scene, for the shape vote")
    parser.add_argument("--data", type=Path, help="a dataset to read clips from; default: MuJoCo makes them")
    parser.add_argument("--converged", type=int, default=60, help="UniPC steps of the reference")
    parser.add_argument("--random", metavar="PRESET", help="random weights of small or 2b instead")
    parser.add_argument("--latents", type=int, nargs=3, default=(3, 8, 8), metavar=("T", "H", "W"), help="of --random")
    parser.add_argument("--starts", type=int, default=4, help="of --random")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    options = parser.parse_args()
    for name, least in (("clips", 1), ("fit", 16), ("seed", 0), ("converged", 31), ("starts", 1), ("threads", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.data and not (options.data / "index.jsonl").is_file():
        raise InputError(f"no dataset at {options.data}: it holds no index.jsonl")
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "knee.json")
    return options


def main() -> int:
    """Runs the benchmark; 2 on bad input."""
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.random:
        result = random_weights(options.random, tuple(options.latents), options.starts)
        write_results(f"knee_random_{options.random}", result, random_page(result), options.out)
        print(random_page(result))
        return 0
    began = time.perf_counter()
    model = Model(options.model)
    world = model.world
    test, train = choose(options, world.config.resolution[0])
    votes = fit_shapes(train)
    records = []
    for number, case in enumerate(test):
        latents = (1, 2, 0)[number % 3]
        records.append(measure(model, resized(case, world), latents, votes, options.seed + number, options.converged))
        print(f"{number + 1}/{len(test)} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    sampling = world.config.sampling
    default = str(Rung(sampling.steps, sampling.solver))
    rows = [summarise(records, rung) for rung in [Rung(options.converged), *rungs(sampling.steps)]]
    result = {
        "made": provenance("matplotlib"),
        "model": world.name,
        "weights": world.hash,
        "clips": len(records),
        "seconds": round(time.perf_counter() - began, 1),
        "converged": options.converged,
        "default": default,
        "rungs": rows,
        "front": pareto([row for row in rows if row["steps"] != options.converged]),
        "records": records,
    }
    write_results("knee", result, markdown(result), options.out)
    picture(result, options.out / "knee.png")
    print(markdown(result))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
