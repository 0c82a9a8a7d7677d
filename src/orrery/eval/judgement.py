"""A world model judges robots, and is judged: robots tried in the model and in MuJoCo, compared, and a report of it.

This is policy evaluation inside a world model (WorldGym, arXiv 2506.00613; WorldEval, arXiv 2505.19017): worth
something if robots that do better in the model do better in truth. The environments are made through Gymnasium, which
has to know them (`orrery.env.register()`).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import orrery
from orrery.errors import InputError, OrreryError, note
from orrery.eval.cloning import cloned
from orrery.eval.correlation import Comparison, compare, kappa, wilson
from orrery.eval.pictures import ENDS, Dot, clip_sheet, scatter, side_by_side
from orrery.eval.policies import ALL, FINAL_SEED, TUNING, TUNING_SEED, Policy, Scripted, Spec, fingerprint
from orrery.eval.trials import Pair, Progress, Trial, judge, worth_a_look
from orrery.files import atomic_file
from orrery.video import Video
from orrery.world import World

MODEL, TRUTH = "orrery/Tabletop-v0", "orrery/TabletopTruth-v0"
MOST_SEEDS = FINAL_SEED - TUNING_SEED
Shown = tuple[str, int, tuple[bool, bool]]  # robot, seed, success in the model and in truth
DISAGREE_SHOWN, AGREE_SHOWN = 4, 2  # episodes of the contact sheet


def make_env(name: str, copies: int, **options: Any) -> Any:
    """A vector environment in which copies that are over stand still.

    Raises:
        OrreryError: Gymnasium is missing, or does not know the environment.
    """
    try:
        import gymnasium
    except ImportError as error:
        raise OrreryError(f"judging robots needs gymnasium: pip install 'orrery[env]' ({error})") from error
    if name not in gymnasium.registry:
        raise OrreryError(f"gymnasium does not know {name}; call orrery.env.register() first")
    options |= {"vectorization_mode": "vector_entry_point", "autoreset_mode": "Disabled"}
    return gymnasium.make_vec(name, num_envs=copies, **options)


def first_seed(chosen: Mapping[str, Spec], asked: int | None) -> int:
    """The first seed: the one asked for, else of the range that belongs to the robots (see `policies`).

    Raises:
        InputError: a seed below both ranges, where demonstrations lie.
    """
    if asked is None:
        return TUNING_SEED if chosen.keys() & TUNING.keys() else FINAL_SEED
    if not TUNING_SEED <= asked < 2**31 - MOST_SEEDS:
        raise InputError(f"--first-seed is {asked}; allowed is {TUNING_SEED} to {2**31 - MOST_SEEDS - 1}")
    return asked


def rehearse(
    world: World,
    chosen: Mapping[str, Spec],
    own: Mapping[str, Policy],
    seeds: Sequence[int],
    folder: Path,
    copies: int = 16,
    steps: int | None = None,
    progress: Progress | None = None,
    teaching: Callable[[int, int], None] | None = None,
) -> list[Trial]:
    """Tries robots in `world` and in MuJoCo on the same seeds.

    Args:
        chosen: robots of ours. own: those of the user, by where they come from (see `load_policy`).
        folder: gets `episodes/` (a file a robot; what is there is not done again), `clips/` and `robots/` (networks).
        copies: episodes that go at once, at most. steps: of the solver, default the model's.
        progress: see `trials.Progress`. teaching: is told how many demonstrations are made, and of how many.

    Raises:
        InputError: no robot, two of one name, no seed, or a model that is no tabletop.
    """
    names = [*chosen, *(policy.name for policy in own.values())]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"two policies are called {sorted(twice)[0]!r}; give one another name")
    if not names or not len(seeds) or copies < 1:
        raise InputError(f"{len(names)} policies, {len(seeds)} seeds, {copies} copies; allowed is at least 1 of each")
    for part in ("episodes", "clips", "robots"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    copies = math.ceil(len(seeds) / math.ceil(len(seeds) / copies))  # batches of one size, no row to spare
    truth, model = make_env(TRUTH, copies), make_env(MODEL, copies, model=world, steps=steps)
    counts = {name: spec.demonstrations for name, spec in chosen.items() if spec.demonstrations}
    learnt = {robot.name: robot for robot in cloned(counts, folder / "robots", truth, teaching)}
    robots: list[Policy] = []
    for name, spec in chosen.items():
        robots.append(learnt[name] if spec.choose is None else Scripted(name, spec.choose, spec.noise))
    prints = {robot.name: fingerprint(robot) for robot in robots}
    prints |= {policy.name: fingerprint(policy, place) for place, policy in own.items()}
    settings = {"model": world.hash, "steps": steps or world.config.sampling.steps}
    settings |= {"device": world.device.type, "dtype": str(world.dtype).removeprefix("torch.")}
    keeper = _Clips(folder / "clips")
    try:
        return judge(
            [*robots, *own.values()], model, truth, seeds, folder / "episodes", settings, prints, progress, keeper
        )
    finally:
        truth.close()
        model.close()


class _Clips:
    """Writes the pairs that it is given; those of a robot that is tried again replace what was there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.begun = folder, set[str]()

    def __call__(self, pair: Pair) -> None:
        place = self.folder / pair.policy
        place.mkdir(exist_ok=True)
        if pair.policy not in self.begun:
            self.begun.add(pair.policy)
            for old in place.glob("[0-9]*.mp4"):
                old.unlink()
        side_by_side(pair).save(place / f"{pair.seed}.mp4")


def summarise(trials: Sequence[Trial]) -> dict[str, Any]:
    """JSON values: of each robot success and its 95 % interval in both worlds, distance and steps, how often both end
    alike; of all together `comparison` (None for fewer than two robots)."""
    robots = []
    for trial in trials:
        spec = ALL.get(trial.policy)
        entry: dict[str, Any] = {"policy": trial.policy, "about": spec.about if spec else "the user's"}
        for name, part in (("truth", trial.truth), ("model", trial.model)):
            low, high = wilson(int(part.success.sum()), len(part.success))
            entry[name] = {
                "success": float(part.success.mean()),
                "interval": [low, high],
                "distance": float(np.nanmean(part.distance)) if not np.isnan(part.distance).all() else None,
                "steps": float(part.steps.mean()),
            }
        entry["agreement"] = float((trial.model.success == trial.truth.success).mean())
        entry["kappa"] = kappa(trial.model.success, trial.truth.success)
        entry["seconds"] = {"model": trial.seconds[0], "truth": trial.seconds[1]}
        robots.append(entry)
    robots.sort(key=lambda entry: (-entry["truth"]["success"], -entry["model"]["success"]))
    found = compared(trials)
    return _plain({"policies": robots, "comparison": None if found is None else asdict(found)})


def compared(trials: Sequence[Trial]) -> Comparison | None:
    """What the model's verdict is worth; None for fewer than two robots."""
    if len(trials) < 2:
        return None
    return compare(np.stack([t.model.success for t in trials]), np.stack([t.truth.success for t in trials]))


def _plain(value: Any) -> Any:
    """Rounded; what is not a number becomes None, as JSON has no such thing."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return round(value, 4) if math.isfinite(value) else None
    return value


def report(trials: Sequence[Trial], world: World, seeds: Sequence[int], folder: Path) -> dict[str, Any]:
    """Writes results.json, scatter.png and sheet.png into `folder`; returns what results.json holds."""
    result = {
        "orrery": orrery.__version__,
        "model": Path(world.name).name,
        "model_hash": world.hash,
        "device": str(world.device),
        "first_seed": int(seeds[0]),
        "seeds": len(seeds),
        **summarise(trials),
    }
    with atomic_file(folder / "results.json") as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw_scatter(result, folder / "scatter.png")
    draw_sheet(trials, seeds, folder)
    return result


def draw_scatter(result: Mapping[str, Any], path: Path) -> None:
    """The scatter of a result of `report`."""
    dots = [
        Dot(each["policy"], *((each[name]["success"], *each[name]["interval"]) for name in ("truth", "model")))
        for each in result["policies"]
    ]
    title = f"{result['model']}: {len(dots)} policies, {result['seeds']} episodes each"
    if found := result["comparison"]:
        low, high = found["pearson"]["trials"]
        title += f"; r = {found['pearson']['value']:.2f} [{low:.2f}, {high:.2f}], MMRV {found['mmrv']['value']:.3f}"
    scatter(path, dots, title)


def draw_sheet(trials: Sequence[Trial], seeds: Sequence[int], folder: Path) -> None:
    """The contact sheet of the episodes in which the two worlds disagree most, and of some in which they agree."""
    apart: list[tuple[float, Shown]] = []
    alike: list[tuple[bool, float, Shown]] = []
    for trial in trials:
        rows = worth_a_look(trial)
        for row in rows:
            ends = bool(trial.model.success[row]), bool(trial.truth.success[row])
            gap = float(np.nan_to_num(abs(trial.model.distance[row] - trial.truth.distance[row])))
            item = (trial.policy, int(seeds[row]), ends)
            if ends[0] != ends[1]:
                apart.append((gap, item))
            elif row == rows[-1]:
                alike.append((ends[0], gap, item))
    apart.sort(key=lambda each: -each[0])
    alike.sort(key=lambda each: (not each[0], each[1]))
    chosen = _varied([item for _, item in apart])[:DISAGREE_SHOWN]
    chosen += _varied([item for *_, item in alike])[:AGREE_SHOWN]
    clips = []
    for policy, seed, ends in chosen:
        path = folder / "clips" / policy / f"{seed}.mp4"
        if path.is_file():
            clips.append((f"{policy}\nseed {seed}\n{ENDS[ends]}", Video.read(path)))
        else:
            note(f"{path} is gone: left out of the sheet")
    if clips:
        clip_sheet(folder / "sheet.png", clips)


def _varied(items: list[Shown]) -> list[Shown]:
    """The same in their order, but first those whose robot and whose seed have not been shown yet."""
    first: list[Shown] = []
    for item in items:
        if not any(item[0] == other[0] or item[1] == other[1] for other in first):
            first.append(item)
    return first + [item for item in items if item not in first]


def describe(name: str, estimate: Mapping[str, Any], digits: int = 2) -> list[str]:
    """A number of a comparison with its intervals, as words: name, value, over trials, over policies."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    spans = [f"{shown(estimate[key][0])} to {shown(estimate[key][1])}" for key in ("trials", "policies")]
    return [name, shown(estimate["value"]), *spans]


NAMES = {
    "pearson": "Pearson r of success rates (1 is best)",
    "spearman": "Spearman rank correlation (1 is best)",
    "mmrv": "MMRV, mean maximum rank violation (0 is best)",
    "bias": "success in the model less success in MuJoCo",
    "agreement": "episodes that end alike in both",
    "kappa": "the same beyond chance, Cohen's kappa (1 is best)",
}
