"""Does a policy get better by practising inside the model? `python benchmarks/imagine.py [--rounds 6]`.

A pusher with seven badly set numbers is improved by the cross-entropy method three ways: in the world model alone, in
MuJoCo with as many steps as that took, and not at all. All three are then tested in MuJoCo on the same fresh seeds.
The search sees only rewards that the detector reads from pixels. Every finished part is kept in --cache, so that a
killed run goes on. Writes JSON and Markdown.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import orrery
from orrery.env.cells import Cells
from orrery.env.improve import NUMBERS, START, Pusher, Search, improve, play
from orrery.errors import InputError, OrreryError
from orrery.eval.correlation import wilson
from orrery.files import atomic_file, check_writable

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, load_average, made_line, provenance, table, write_results

PRACTICE, TEST = 3_000_000, 4_000_000  # first seeds, of the search and of the test; in no training set
CACHE = Path(__file__).parents[1] / "runs" / "imagine"
NAMES = {"before": "before", "model": "improved in the model", "truth": "improved in MuJoCo, as many steps"}


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returns, or what it returned before."""
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    value = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(value), encoding="utf-8")
    return value


def searched(kind: str, world: Any, options: argparse.Namespace, budget: int | None) -> dict[str, Any]:
    """One search: its numbers, rounds, steps and seconds."""
    cells = Cells(kind, options.population * options.each, world, max_steps=options.max_steps)
    began = time.perf_counter()

    def tell(search: Search) -> None:
        last = ", ".join(f"{name} {value:.2f}" for name, value in search.rounds[-1].items())
        print(f"{kind}, round {len(search.rounds)}: {last}", file=sys.stderr, flush=True)

    rounds = options.rounds if budget is None else 100
    search = improve(cells, options.population, rounds, options.seed, PRACTICE, budget, tell)
    return {
        "numbers": search.mean.tolist(),
        "rounds": search.rounds,
        "steps": search.steps,
        "seconds": round(time.perf_counter() - began, 1),
    }


def tested(kind: str, world: Any, numbers: np.ndarray, episodes: int, at_once: int = 25) -> list[int]:
    """Success of each episode, on the seeds from TEST on."""
    out: list[int] = []
    while len(out) < episodes:
        count = min(at_once, episodes - len(out))
        played = play(Cells(kind, count, world), Pusher(numbers), range(TEST + len(out), TEST + len(out) + count))
        out += played.success.astype(int).tolist()
    return out


def markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    heads = ["", "success in MuJoCo", "95 %", "success in the model", "true steps used", "imagined steps used"]
    body = []
    for way, name in NAMES.items():
        wins, count = sum(result["tests"][way]), len(result["tests"][way])
        low, high = wilson(wins, count)
        inside = np.mean(result["inside"][way])
        spent = result["searches"].get(way, {}).get("steps", 0)
        true, imagined = (spent, 0) if way == "truth" else (0, spent)
        body.append(
            [name, f"{wins / count:.2f}", f"{low:.2f} to {high:.2f}", f"{inside:.2f}", f"{true}", f"{imagined}"]
        )
    lines = ["# Practising inside the model", "", result["about"], "", *table(heads, body), ""]
    lines += ["The search, round by round: mean return and success of the candidates, where they practised.", ""]
    rows = []
    for way, search in result["searches"].items():
        for number, row in enumerate(search["rounds"], start=1):
            numbers = (f"{row['steps']:.0f}", f"{row['mean return']:.2f}", f"{row['success']:.2f}")
            rows.append([NAMES[way] if number == 1 else "", str(number), *numbers])
    lines += [*table(["", "round", "steps so far", "mean return", "success"], rows), ""]
    numbers = {"before": START.tolist()} | {way: search["numbers"] for way, search in result["searches"].items()}
    rows = [[NAMES[way], *(f"{value:.2f}" for value in row)] for way, row in numbers.items()]
    lines += ["The numbers of the policy (`orrery.env.improve`):", "", *table(["", *NUMBERS], rows)]
    return "\n".join(lines)


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tabletop", help="a named model or a folder")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--each", type=int, default=6, help="episodes that a candidate is judged by")
    parser.add_argument("--max-steps", type=int, default=18, help="of an episode of practice")
    parser.add_argument("--episodes", type=int, default=100, help="of the test")
    parser.add_argument("--inside", type=int, default=50, help="episodes of the test repeated in the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in ("rounds", "population", "each", "max_steps", "episodes", "inside"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(options, name)}; allowed is at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "imagine.json")
    busy, world = load_average(), orrery.load(options.model, device="cpu")
    asked = [getattr(options, name) for name in ("rounds", "population", "each", "max_steps", "seed")]
    place = options.cache / hashlib.sha256(json.dumps([world.hash, asked]).encode()).hexdigest()[:12]
    searches = {"model": kept(place / "model.json", lambda: searched("model", world, options, None))}
    budget = searches["model"]["steps"]
    searches["truth"] = kept(place / "truth.json", lambda: searched("truth", world, options, budget))
    numbers = {"before": START} | {way: np.array(search["numbers"]) for way, search in searches.items()}
    tests: dict[str, list[int]] = {}
    inside: dict[str, list[int]] = {}
    for way, row in numbers.items():
        for kind, found, count in (("truth", tests, options.episodes), ("model", inside, options.inside)):
            path = place / f"test-{way}-{kind}-{count}.json"
            make = lambda kind=kind, row=row, count=count: {"wins": tested(kind, world, row, count)}  # noqa: E731
            found[way] = kept(path, make)["wins"]
        print(f"{way}: {np.mean(tests[way]):.2f} in MuJoCo, {np.mean(inside[way]):.2f} inside", file=sys.stderr)
    result = {
        "made": provenance("mujoco", "gymnasium"),
        "model": "tabletop" if options.model == "tabletop" else "another",
        "weights": world.hash,
        "searches": searches,
        "tests": tests,
        "inside": inside,
        "load": [busy, load_average()],
    }
    result["about"] = (
        f"Model `{result['model']}` ({result['weights']}); {options.rounds} rounds of {options.population} candidates, "
        f"{options.each} episodes each ({searches['model']['seconds']:.0f} s in the model, "
        f"{searches['truth']['seconds']:.0f} s in MuJoCo); {options.episodes} fresh episodes of the test; "
        f"{made_line(result['made'])}"
    )
    for path in write_results("imagine", result, markdown(result), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
