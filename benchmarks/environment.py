"""How fast is the environment? `python benchmarks/environment.py [--copies 1 8]`.

Steps a second of the world model's environment and of MuJoCo's, side by side in one run, for several numbers of copies;
a step is four frames, a third of a second of the world's time. On a GPU: `--device cuda --copies 1 64 512`. Also what a
step costs at least: the arithmetic of transformer and VAE beside the machine's best matrix product.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import orrery
from orrery.env.cells import Cells, start_of
from orrery.errors import InputError, OrreryError
from orrery.files import check_writable

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import (
    RESULTS,
    busy_line,
    counted,
    device_name,
    load_average,
    made_line,
    matmul_ceiling,
    paired,
    provenance,
    slug,
    table,
    write_results,
)

SECONDS_A_STEP = 4 / 12


def cells_of(kind: str, count: int, world: Any, steps: int | None) -> Cells:
    """Cells that have begun and will not end."""
    cells = Cells(kind, count, world, steps=steps, max_steps=10**9)
    far = {"goal": [1.0, 1.0]}
    cells.reset(range(count), [start_of(np.random.default_rng(i), far) for i in range(count)])
    actions = np.random.default_rng(0).uniform(-1, 1, (count, 2))
    for _ in range(4):  # the past is full
        cells.step(actions, range(count))
    return cells


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tabletop", help="a named model or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--solver-steps", type=int, default=None)
    parser.add_argument("--no-truth", action="store_true", help="leave MuJoCo out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if min(options.copies) < 1 or options.repeats < 1:
        raise InputError(f"--copies {options.copies} --repeats {options.repeats}; allowed is at least 1")
    name = f"environment_{slug(device_name(options.device))}"
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / f"{name}.json")
    busy, world = load_average(), orrery.load(options.model, device=options.device)
    ceiling, rows, data = 1e12 * matmul_ceiling(options.device, torch.float32), [], []
    for count in options.copies:
        actions = np.random.default_rng(1).uniform(-1, 1, (count, 2))
        kinds = ["model"] if options.no_truth else ["model", "truth"]
        cells = {kind: cells_of(kind, count, world, options.solver_steps) for kind in kinds}
        run = {kind: partial(each.step, actions, range(count)) for kind, each in cells.items()}
        seconds = {kind: float(np.median(values)) for kind, values in paired(run, options.repeats).items()}
        flops = 1e12 * counted(run["model"])[0]
        rates = {kind: count / value for kind, value in seconds.items()}
        data.append({"copies": count, "seconds": seconds, "flops": flops, "steps_a_second": rates})
        rows.append(
            [
                f"{count}",
                f"{rates['model']:.1f}",
                f"{rates['truth']:.1f}" if "truth" in rates else "-",
                f"{rates['model'] * SECONDS_A_STEP:.1f}",
                f"{flops / count / 1e9:.2f}",
                f"{100 * flops / ceiling / seconds['model']:.0f} %",
            ]
        )
    heads = [
        "copies",
        "model, steps/s",
        "MuJoCo, steps/s",
        "times real time, all copies",
        "GFLOP a step",
        "of the ceiling",
    ]
    result = {"made": provenance("mujoco"), "weights": world.hash, "ceiling": ceiling, "rows": data}
    steps = options.solver_steps or world.config.sampling.steps
    about = f"{steps} solver steps; best matrix product {ceiling / 1e9:.0f} GFLOP/s; {made_line(result['made'])}"
    page = [
        "# Steps a second of the environment",
        "",
        about,
        "",
        busy_line(busy, load_average()),
        "",
        *table(heads, rows),
    ]
    for path in write_results(name, result, "\n".join(page), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
