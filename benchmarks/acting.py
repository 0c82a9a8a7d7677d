"""Do actions matter, and for how long is the model right? `python benchmarks/acting.py [--episodes 96] [--steps 16]`.

Held-out episodes of the tabletop (random, scripted and failing robots) are rolled out from their first frame, told
their true actions, beside two baselines: the first frame, and the same model told the actions of another episode.
Errors by how far ahead: PSNR, SSIM, latents, and where the detector sees cube and peg. Writes JSON, Markdown, PNG.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import orrery
from orrery.data.episodes import open_episodes
from orrery.errors import InputError, OrreryError
from orrery.eval.acting import MEASURES, WAYS, Horizons, measure_horizons
from orrery.eval.metrics import bootstrap
from orrery.files import atomic_file, check_writable
from orrery.sim.store import write_dataset

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, load_average, made_line, provenance, table, write_results

FIRST = 1_100_000  # seeds from here on were not looked at while the model was made
CACHE = Path(__file__).parents[1] / "runs" / "acting"
TITLES = {"psnr": "PSNR, dB", "ssim": "SSIM", "latent": "latent error", "cube": "cube, cm", "peg": "peg, cm"}
DIGITS = {"psnr": 1, "ssim": 3, "latent": 3, "cube": 1, "peg": 1}
NAMES = {
    "model": "model",
    "shuffled": "model, another's actions",
    "copied": "first frame",
    "coded": "truth through the VAE",
}


def summary(found: Horizons) -> dict[str, Any]:
    """By measure and way: [mean, low, high] of each step; and the model's gain over the other ways."""
    moving = found.moved[:, -1] > 5
    out: dict[str, Any] = {"moving": int(moving.sum())}
    for measure in MEASURES:
        rows = {way: [bootstrap(column) for column in found.values[way][measure].T] for way in WAYS}
        clear = {way: found.clearly_better(measure, way).tolist() for way in ("shuffled", "copied")}
        out[measure] = {"mean": rows, "gain_low": clear}
    out["cube, where it moves"] = {
        "mean": {way: [bootstrap(column) for column in found.values[way]["cube"][moving].T] for way in WAYS}
    }
    return out


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    seconds = [(step + 1) / 3 for step in range(result["steps"])]
    shown = [step for step in (0, 1, 2, 3, 5, 7, 11, 15, 19, 23) if step < result["steps"]]
    lines = ["# What actions do: prediction by horizon", "", result["about"], ""]
    heads = ["", "", *(f"{seconds[step]:.1f} s" for step in shown)]
    for measure in (*MEASURES, "cube, where it moves"):
        numbers = result["summary"][measure]
        digits = DIGITS[measure.partition(",")[0]]
        body = []
        for way in WAYS:
            means = numbers["mean"][way]
            body.append(["", NAMES[way], *(f"{means[step][0]:.{digits}f}" for step in shown)])
        if "gain_low" in numbers:
            for way in ("shuffled", "copied"):
                marks = ["yes" if numbers["gain_low"][way][step] > 0 else "no" for step in shown]
                body.append(["", f"clearly better than {NAMES[way]}", *marks])
        body[0][0] = TITLES.get(measure, f"cube, cm: the {result['summary']['moving']} episodes in which it moves")
        lines += [*table(heads, body), ""]
    lines += [
        "![rollouts](acting.png)",
        "",
        "For each of four episodes: truth, model, the model told another's actions.",
        "",
    ]
    return "\n".join(lines)


def draw(found: Horizons, path: Path) -> None:
    """Truth, model and shuffled of the four episodes in which the cube moves most, every second step."""
    blocks = []
    for row in np.argsort(-found.moved[:, -1])[:4]:
        for way in ("truth", "model", "shuffled"):
            blocks.append(np.concatenate(list(found.videos[way][row, ::8]), 1))
        blocks.append(np.full((3, blocks[-1].shape[1], 3), 255, np.uint8))
    image = Image.fromarray(np.concatenate(blocks[:-1]))
    with atomic_file(path) as partial:
        image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS).save(partial, format="PNG")


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tabletop", help="a named model or a folder")
    parser.add_argument("--episodes", type=int, default=96)
    parser.add_argument("--steps", type=int, default=16, help="latent frames ahead, a third of a second each")
    parser.add_argument("--first-seed", type=int, default=FIRST)
    parser.add_argument("--solver-steps", type=int, default=None)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the episodes are kept")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.episodes < 4 or not 1 <= options.steps <= 48:
        raise InputError(f"--episodes {options.episodes} --steps {options.steps}; allowed: 4 or more, 1 to 48")
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "acting.json")
    began, busy = time.perf_counter(), load_average()
    frames = 1 + 4 * options.steps
    root, seeds = options.cache / f"frames-{frames}", range(options.first_seed, options.first_seed + options.episodes)
    write_dataset(root, "tabletop", seeds, 1, (), size=64, frames=frames)
    episodes, world = open_episodes(root), orrery.load(options.model, device="cpu")
    names = {f"tabletop-{seed:07d}" for seed in seeds}
    indices = [i for i, name in enumerate(episodes.ids) if name in names]
    found = measure_horizons(world, episodes, indices, options.steps, solver_steps=options.solver_steps)
    result = {
        "made": provenance("mujoco"),
        "model": world.name if options.model == "tabletop" else "another",
        "weights": world.hash,
        "sampling": vars(world.config.sampling),
        "episodes": len(indices),
        "steps": options.steps,
        "load": [busy, load_average()],
        "seconds": round(time.perf_counter() - began, 1),
        "summary": summary(found),
    }
    solver_steps = options.solver_steps or world.config.sampling.steps
    result["about"] = (
        f"Model `{result['model']}` ({result['weights']}), {solver_steps} solver steps; {len(indices)} episodes, seeds "
        f"from {options.first_seed}; {made_line(result['made'])}"
    )
    draw(found, options.out / "acting.png")
    for path in write_results("acting", result, markdown(result), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
