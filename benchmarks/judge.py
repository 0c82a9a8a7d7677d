"""Does the tabletop model rank robots as MuJoCo does? `python benchmarks/judge.py [--seeds 48]`.

The final set of `orrery.eval.policies` (scripted robots of graded skill and learnt ones, all from pixels) meets the
same held-out starts in the model and in MuJoCo. Success rates with Wilson's intervals; Pearson's r, Spearman, MMRV with
bootstraps over trials and over robots; bias, and how many episodes end alike. Nothing was tuned on these robots or
seeds; `--policies tuning` is for that. Results of each robot are kept in --cache, so that a killed run goes on. Writes
JSON, Markdown, the scatter and a contact sheet.
"""

import argparse
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orrery
from orrery.env import register
from orrery.errors import InputError, OrreryError
from orrery.eval.judgement import MOST_SEEDS, NAMES, describe, first_seed, rehearse, report
from orrery.eval.policies import choose_robots
from orrery.files import atomic_file, check_writable

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, busy_line, load_average, made_line, provenance, table, write_results

CACHE = Path(__file__).parents[1] / "runs" / "judge"
ABOUT = """\
Success: the cube within 7 cm of the goal within 24 actions, read from pixels by one detector in both worlds. Intervals
are of 95 %: Wilson's for rates; for the rest the bootstrap's over trials (seeds, the same for all robots and both
worlds) and over robots. *End alike*: the share of seeds with which the robot succeeds in both or fails in both."""


def percent(world: Mapping[str, Any]) -> str:
    """A success rate with its interval."""
    low, high = world["interval"]
    return f"{world['success']:.0%} [{low:.0%}, {high:.0%}]"


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a page."""
    lines = ["# Robots judged in the model and in MuJoCo", "", result["about"], "", ABOUT, ""]
    found = result["comparison"]
    if found is not None:
        rows = [describe(words, found[key], 3 if key == "mmrv" else 2) for key, words in NAMES.items()]
        lines += [*table(["", "", "over trials", "over robots"], rows), ""]
    rows = [
        [each["policy"], each["about"], percent(each["truth"]), percent(each["model"]), f"{each['agreement']:.0%}"]
        for each in result["policies"]
    ]
    lines += [*table(["robot", "what it does", "MuJoCo", "model", "end alike"], rows), ""]
    lines += ["![success in the model over success in MuJoCo](judge.png)", ""]
    if result["clips"]:
        lines += ["![episodes in which they disagree most, and some in which they agree](judge_clips.png)", ""]
    return "\n".join([*lines, busy_line(*result["load"])])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tabletop", help="a named model or a folder")
    parser.add_argument("--policies", default="final", help="as of `orrery judge`")
    parser.add_argument("--seeds", type=int, default=48, help="episodes of each robot in each world")
    parser.add_argument("--first-seed", type=int, default=None)
    parser.add_argument("--copies", type=int, default=16, help="episodes that go at once")
    parser.add_argument("--steps", type=int, default=None, help="of the solver")
    parser.add_argument("--device", default=None)
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder that keeps what was done")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, for judge.json, .md and .png")
    options = parser.parse_args()
    if not 2 <= options.seeds <= MOST_SEEDS or not 1 <= options.copies <= 256:
        raise InputError(f"--seeds {options.seeds} --copies {options.copies}; allowed: 2 to {MOST_SEEDS}, 1 to 256")
    for folder in (options.out, options.cache):
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "judge.json")
    return options


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    options, began, busy = arguments(), time.perf_counter(), load_average()
    chosen = choose_robots(options.policies)
    first = first_seed(chosen, options.first_seed)
    seeds = range(first, first + options.seeds)
    register()
    world = orrery.load(options.model, device=options.device)

    def tell(robot: str, where: str, done: int, of: int) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  {robot} in the {where}: {done}/{of}", file=sys.stderr, flush=True)

    def taught(done: int, of: int) -> None:
        print(f"{time.perf_counter() - began:6.0f} s  demonstration {done}/{of}", file=sys.stderr, flush=True)

    trials = rehearse(world, chosen, {}, seeds, options.cache, options.copies, options.steps, tell, taught)
    result = {
        "made": provenance("mujoco", "gymnasium"),
        "load": [busy, load_average()],
        "seconds": round(time.perf_counter() - began, 1),
        "solver_steps": options.steps or world.config.sampling.steps,
        **report(trials, world, seeds, options.cache),
        "episodes": {
            trial.policy: {
                name: "".join("01"[int(end)] for end in part.success)
                for name, part in (("model", trial.model), ("truth", trial.truth))
            }
            for trial in trials
        },
    }
    result["about"] = (
        f"Model `{result['model']}` ({world.hash}), {result['solver_steps']} solver steps; {len(trials)} robots, "
        f"{len(seeds)} seeds from {first}; {made_line(result['made'])}"
    )
    result["clips"] = (options.cache / "sheet.png").is_file()
    for name, target in (("scatter.png", "judge.png"), ("sheet.png", "judge_clips.png")):
        if (options.cache / name).is_file():
            with atomic_file(options.out / target) as partial:
                shutil.copyfile(options.cache / name, partial)
    for path in write_results("judge", result, markdown(result), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
