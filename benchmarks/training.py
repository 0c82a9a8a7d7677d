"""Clips a second of a training step, and what each way of running it is worth: `python benchmarks/training.py`.

Steps of the shipped recipes (VAE, transformer, control branch), on a few clips of `--data`, in one process, in turns:
with torch's attention, with plain matrix products in its place, and with compiled blocks too (`compile = true`). A step
is everything: batch, forward, backward, optimizer, average. Beside the rates stands the share of the best matrix
product of the same run that the step's arithmetic reaches. Writes results/training_MACHINE_N-threads.json and .md.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import (
    busy_line,
    device_name,
    load_average,
    made_line,
    matmul_ceiling,
    paired,
    provenance,
    ratio,
    slug,
    table,
    write_results,
)
from torch.utils.flop_counter import FlopCounterMode

from orrery.errors import InputError, OrreryError
from orrery.train import loop
from orrery.train.loop import Trainer, pick_device
from orrery.train.recipe import load_recipe
from orrery.train.start import open_run

ROOT = Path(__file__).parent.parent
RECIPES = {"VAE": "mini-vae", "transformer": "mini-dit", "control branch": "mini-control"}
TORCH, PRODUCTS, COMPILED = "torch's attention", "plain products", "and compiled blocks"
WARMUP = 12  # steps: every shape of a batch has been met and compiled by then


def opened(name: str, compiled: bool, out: Path, options: argparse.Namespace) -> Trainer:
    """The trainer of a recipe at its beginning, on a few clips."""
    sets = [f"out={out}", f"data.root={options.data}", f"data.max_clips={options.clips}"]
    sets += [f"compile={str(compiled).lower()}", f"threads={torch.get_num_threads()}", "validation.sheet=0"]
    if name != "mini-vae":
        sets += ["validation.clips=8", "latents.mirror=false"]
    if name == "mini-dit":
        sets.append(f"latents.vae={ROOT / 'src' / 'orrery' / 'weights' / 'mini'}")
    recipe = load_recipe(ROOT / "recipes" / f"{name}.toml", sets)
    out.mkdir(parents=True)
    trainer = open_run(recipe, pick_device(options.device))
    if compiled and not trainer.compiled:
        raise InputError("compile = true cannot be measured: there is no compiler on this machine")
    return trainer


def steps(trainer: Trainer, count: int, torchs_attention: bool) -> Callable[[], None]:
    """`count` steps of a run, as a function without arguments."""

    def run() -> None:
        kept = loop.using
        if torchs_attention:
            loop.using = lambda *_, **__: nullcontext()  # type: ignore[assignment]
        try:
            for _ in range(count):
                trainer.train_step()
        finally:
            loop.using = kept

    return run


def measured(title: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each way of running a recipe's steps."""
    name, ways = RECIPES[title], {TORCH: False, PRODUCTS: False, COMPILED: True}
    trainers = {way: opened(name, compiled, folder / name / way, options) for way, compiled in ways.items()}
    for way, trainer in trainers.items():
        steps(trainer, WARMUP, way == TORCH)()
    timed = {way: steps(trainer, options.steps, way == TORCH) for way, trainer in trainers.items()}
    seconds = paired(timed, options.repeats, warmup=0, tolerated=options.tolerated)
    with FlopCounterMode(display=False) as counter:
        timed[PRODUCTS]()
    flop = counter.get_total_flops() / options.steps / trainers[PRODUCTS].task.clips
    rows = []
    for way, trainer in trainers.items():
        rate = options.steps * trainer.task.clips / median(seconds[way])
        rows.append({"trained": title, "way": way, "clips_per_second": rate, "tflop_per_second": rate * flop / 1e12,
                     "times": ratio(seconds, TORCH, way), "seconds": seconds[way]})  # fmt: skip
        print(f"{title}, {way}: {rate:.1f} clips/s, {rows[-1]['times']:.2f}x", file=sys.stderr)
    return rows


def markdown(data: dict[str, Any]) -> str:
    heads = ("trained", "steps with", "clips a second", "faster", "TFLOP/s", "of the best product")
    cells = [
        (row["trained"], row["way"], f"{row['clips_per_second']:.1f}", f"{row['times']:.2f}x",
         f"{row['tflop_per_second']:.3f}", f"{row['tflop_per_second'] / data['ceiling']:.0%}")
        for row in data["rows"]
    ]  # fmt: skip
    lines = ["# Training steps", "", made_line(data["made"]), "", data["busy"], ""]
    lines += [f"Best product of two square matrices in bfloat16: {data['ceiling']:.3f} TFLOP/s.", ""]
    lines += table(heads, cells)
    lines += ["", "Arithmetic: the matrix products and convolutions of whole steps, the optimizer's too, counted."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "mini", help="a dataset of `orrery sim`")
    parser.add_argument("--only", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--clips", type=int, default=64, help="of the dataset that are read")
    parser.add_argument("--steps", type=int, default=10, help="timed together")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of all ways")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    parser.add_argument("--tolerated", type=float, default=0.05, help="share of the CPU that others may take")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads or os.cpu_count() or 1)
    before, rows = load_average(), []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for title in options.only:
                rows += measured(title, Path(folder), options)
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = pick_device(options.device)
    data = {"made": provenance(), "rows": rows, "ceiling": matmul_ceiling(device, torch.bfloat16),
            "busy": busy_line(before, load_average())}  # fmt: skip
    name = f"training_{slug(device_name(device))}_{torch.get_num_threads()}-threads"
    print(f"wrote {write_results(name, data, markdown(data))[0]} and .md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
