"""Sim2Real in small: `python benchmarks/sim2real.py [--episodes 64] [--test 64] [--seeds 3]`.

Held-out episodes of MuJoCo in the plain look ("simulation") are transferred to the realistic look ("reality"): by edge,
depth or segmentation alone and by all four kinds at a quarter each, with the caption that asks for it. Three questions:
is the structure kept, is it the other look, and what is it worth? For the last one the same small network learns to
segment from plain renders, from transferred ones with the plain episodes' exact labels, and from realistic renders; the
test is realistic renders of other episodes. The branches have seen plain clips alone; the frozen base knows both looks.
Drawn videos are kept in --cache, so that a killed run goes on. Writes JSON, Markdown and a contact sheet.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orrery.errors import InputError, OrreryError
from orrery.eval.perception import (
    CLASSES,
    Perceiver,
    centroid_errors,
    class_iou,
    looks_real,
    perceive,
    train_look_classifier,
    train_perceiver,
)
from orrery.files import check_writable
from orrery.kinds import KINDS

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, load_average, made_line, provenance, table, write_results
from control_fidelity import (
    CACHE,
    JUDGE,
    JUDGE_EPISODES,
    LOOKS,
    MEASURES,
    SCENES,
    Case,
    Studio,
    cell,
    draw_sheet,
    make_cases,
    measure,
    open_world,
    progress,
    train_judge,
    triple,
)

TRAIN, TEST = 1_010_000, 1_020_000  # seeds; of the test episodes nothing is ever drawn
WAYS = ("edge", "depth", "seg", "all")
ADDED = ("edge", "all")  # of these ways also together with the plain renders
REDRAWN = "edge"  # of this way also with the plain caption: what being drawn anew does without another look
PUPIL_STEPS, PUPIL_WIDTH = 600, 16
LOOK_STEPS = 300
NAMES = {"plain": "plain renders", "real": "realistic renders"} | {
    "plain, coded": "plain renders through the VAE", "real, coded": "realistic renders through the VAE",
    "redrawn": f"redrawn by {REDRAWN}, plain caption"} | {
    way: f"transferred by {'all four' if way == 'all' else way}" for way in WAYS}  # fmt: skip
STRUCTURE = ("edge", "seg", "recall", "named", "depth")
# mark -> (heading, digits)
MARKS = {
    "miou": ("mIoU", 3),
    "drop": ("mIoU, drop", 3),
    "push": ("mIoU, push", 3),
    "things": ("things", 3),
    "centroid": ("centroid, px", 2),
}
KEPT = """\
Means over episodes with the bootstrap's 95 % interval; measures and judge as in
[control_fidelity](control_fidelity.md): edges against the plain render, depth and masks against the simulator. *Looks
real*: the share of frames that a classifier takes for the realistic look; it was trained on renders of other
episodes."""
PUPILS = f"""\
Tested on realistic renders of other episodes; the last column: on plain renders of the same. Labels are the simulator's
always. Every pupil: a U-Net of width {PUPIL_WIDTH}, {PUPIL_STEPS} steps of 16 pictures from nothing, half of them
mirrored and not augmented otherwise: colour augmentation is the classical remedy for such a gap and would hide it. One
pupil learns both scenes; the seed decides its first weights and the order. *mIoU*: mean over the colours and the arm,
of all pixels of the test clips together; of one scene over the classes that it shows. *Things*: IoU of all things
together against the background, whatever they are taken for. *Centroid*: pixels between the centroid of what is taken
for an object and that of the object, mean over objects and frames; one that is not seen (*missed*) counts as 32. Mean
and standard deviation over seeds; in brackets how much of the gap between the means is closed: 0 % is what plain
renders teach, 100 % what realistic ones do, below 0 % it is worse than plain ones."""


def videos_of(case: Case, studio: Studio) -> dict[str, np.ndarray]:
    """Every kind of video of an episode, [T, H, W, 3] uint8: rendered, coded, transferred, redrawn."""
    videos = {look: case.frames[look] for look in LOOKS}
    videos |= {f"{look}, coded": studio.coded(case.frames[look]) for look in LOOKS}
    videos |= {way: studio.draw(case, "real", way) for way in WAYS}
    return videos | {"redrawn": studio.draw(case, "plain", REDRAWN)}


def kept_and_changed(cases: Sequence[Case], videos: Sequence[Mapping[str, np.ndarray]]) -> list[dict[str, Any]]:
    """Of each episode and each of its videos: the structure (MEASURES), and the share of frames that look real.

    Judge and look classifier are trained on renders of other episodes.
    """
    others = make_cases(JUDGE, JUDGE_EPISODES)
    judge = train_judge(others)
    frames = np.concatenate([case.frames[look] for look in LOOKS for case in others])
    critic = train_look_classifier(frames, np.arange(len(frames)) >= len(frames) // 2, steps=LOOK_STEPS)
    records = []
    for case, each in zip(cases, videos, strict=True):
        rows = {}
        for name, drawn in each.items():
            numbers = measure(case, drawn, judge) | {"look": float((looks_real(critic, drawn) > 0.5).mean())}
            rows[name] = {key: round(value, 5) for key, value in numbers.items()}
        records.append({"id": case.name, "scene": case.scene, "caption": case.caption, "videos": rows})
    return records


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Video -> measure -> [mean, low, high] over episodes."""
    return {
        name: {key: triple(np.array([r["videos"][name][key] for r in records])) for key in row}
        for name, row in records[0]["videos"].items()
    }


def lessons(cases: Sequence[Case], videos: Sequence[Mapping[str, np.ndarray]]) -> dict[str, tuple]:
    """What pupils learn from: name -> (frames [N, H, W, 3], classes [N, H, W])."""
    classes = np.concatenate([case.classes for case in cases])
    frames = {name: np.concatenate([each[name] for each in videos]) for name in videos[0]}
    names = ("plain", "plain, coded", "redrawn", *WAYS, "real, coded", "real")
    sets: dict[str, tuple] = {name: (frames[name], classes) for name in names}
    for way in ADDED:
        sets[f"plain + {way}"] = (np.concatenate([frames["plain"], frames[way]]), np.concatenate([classes, classes]))
    return sets


def examine(net: Perceiver, cases: Sequence[Case], look: str) -> dict[str, float]:
    """A pupil's marks on renders of `cases`: MARKS, mIoU also by scene; `missed`, the share of objects not seen."""
    seen = [perceive(net, case.frames[look]).classes for case in cases]
    truth = [case.classes for case in cases]
    errors = [centroid_errors(a, b) for a, b in zip(seen, truth, strict=True)]
    half = cases[0].ids.shape[2] / 2

    def miou(chosen: Sequence[int]) -> float:
        true = np.stack([truth[i] for i in chosen])
        shown = np.unique(true)  # drop has no arm: one pixel taken for it would count as a whole class missed
        return float(class_iou(np.stack([seen[i] for i in chosen]), true)[shown[shown > 0]].mean())

    marks = {"miou": miou(range(len(cases)))}
    for scene in SCENES:
        marks[scene] = miou([i for i, case in enumerate(cases) if case.scene == scene])
    things = class_iou(np.stack([a > 0 for a in seen]).astype(np.uint8), np.stack([b > 0 for b in truth]))[1]
    flat = np.concatenate(errors)
    return marks | {"things": float(things), "centroid": float(flat.mean()), "missed": float((flat == half).mean())}


def teach(
    sets: Mapping[str, tuple], test: Sequence[Case], seeds: int, tell: Callable[[str], None]
) -> dict[str, list[dict[str, Any]]]:
    """The marks of every pupil: lesson -> one entry a seed: look of the test -> marks."""
    marks: dict[str, list[dict[str, Any]]] = {name: [] for name in sets}
    for seed in range(seeds):
        for name, (frames, classes) in sets.items():
            net = train_perceiver(frames, classes, seed=seed, steps=PUPIL_STEPS, width=PUPIL_WIDTH)
            marks[name].append({look: examine(net, test, look) for look in LOOKS})
            tell(f"pupil of {name}, seed {seed}: mIoU {marks[name][-1]['real']['miou']:.3f}")
    return marks


def kept_table(summary: Mapping[str, Any]) -> list[str]:
    """Structure kept and look changed."""
    rows = []
    for name in ("plain", "plain, coded", "redrawn", *WAYS, "real, coded", "real"):
        numbers = summary[name]
        cells = [cell(numbers[key], MEASURES[key][1]) for key in STRUCTURE]
        mean, low, high = numbers["look"]
        rows.append([NAMES[name], *cells, f"{mean:.0%} [{low:.0%}, {high:.0%}]"])
    return table(["", *(MEASURES[key][0] for key in STRUCTURE), "looks real"], rows)


def lesson_name(name: str) -> str:
    """`plain + edge` in the words of the tables."""
    first, plus, way = name.partition(" + ")
    return f"{NAMES[first]} + {NAMES[way]}" if plus else NAMES[name]


def pupils_table(marks: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What each lesson was worth."""

    def numbers(name: str, look: str, key: str) -> np.ndarray:
        return np.array([entry[look][key] for entry in marks[name]])

    def spread(name: str, look: str, key: str) -> str:
        values, digits = numbers(name, look, key), MARKS[key][1]
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1):.{digits}f}"

    def closed(name: str, key: str) -> str:
        low, high, mean = (numbers(each, "real", key).mean() for each in (*LOOKS, name))
        return "" if name in LOOKS else f" ({(mean - low) / (high - low):.0%})"

    rows = []
    for name in marks:
        cells = [spread(name, "real", key) + closed(name, key) for key in MARKS]
        missed = f"{numbers(name, 'real', 'missed').mean():.1%}"
        rows.append([lesson_name(name), *cells, missed, spread(name, "plain", "miou")])
    headings = [heading for heading, _ in MARKS.values()]
    return table(["learnt from", *headings, "missed", "mIoU on plain renders"], rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a page with tables."""
    branches = ", ".join(f"{kind} {digest}" for kind, digest in result["branches"].items())
    about = f"Model `{result['model']}` ({result['weights']}; branches {branches}); {result['episodes']} episodes, "
    about += f"{result['test']} others for the test, {result['seeds']} seeds; {result['seconds']:.0f} s, in which "
    about += f"{result['drawn']} videos were drawn; {made_line(result['made'])}"
    lines = ["# Sim2Real in small: from the plain look to the realistic one", "", about, "", "## Kept, and changed", ""]
    lines += [KEPT, "", *kept_table(result["summary"]["all"]), ""]
    for scene in SCENES:
        lines += [f"### {scene}", "", *kept_table(result["summary"][scene]), ""]
    lines += ["## What it is worth", "", PUPILS, "", *pupils_table(result["pupils"]), "", "## Picture", ""]
    lines += ["![contact sheet](sim2real.png)", ""]
    return "\n".join([*lines, *(f"- {line}" for line in result["sheet"])])


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=64, help="episodes that are transferred, half of either scene")
    parser.add_argument("--test", type=int, default=64, help="other episodes, of the test")
    parser.add_argument("--seeds", type=int, default=3, help="pupils of each lesson")
    parser.add_argument("--model", default="mini", help="a name or a model folder, with branches of all four kinds")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder that keeps what was drawn")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, for sim2real.json, .md and .png")
    options = parser.parse_args()
    for name, least, step in (("episodes", 4, 2), ("test", 4, 2), ("seeds", 2, 1)):
        if not least <= (value := getattr(options, name)) <= 1000 or value % step:
            raise InputError(f"--{name} is {value}; allowed are {'even ' if step == 2 else ''}numbers {least} to 1000")
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "sim2real.json")
    return options


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    options, began, load = arguments(), time.perf_counter(), load_average()
    tell, world = progress(began), open_world(options.model, KINDS)
    studio, videos = Studio(world, options.cache), []
    cases = make_cases(TRAIN, options.episodes)
    for number, case in enumerate(cases, start=1):
        videos.append(videos_of(case, studio))
        tell(f"{number}/{len(cases)} {case.name}")
    records = kept_and_changed(cases, videos)
    tell("structure and look are judged")
    marks = teach(lessons(cases, videos), make_cases(TEST, options.test), options.seeds, tell)
    columns = [{lesson_name(n): each[n] for n in ("plain", "redrawn", *WAYS, "real")} for each in videos[:4]]
    draw_sheet(options.out / "sim2real.png", columns, shown=4, margin=190)
    groups = {"all": records} | {scene: [r for r in records if r["scene"] == scene] for scene in SCENES}
    result = {
        "made": provenance("mujoco", "opencv-python-headless"),
        "load": {"before": load, "after": load_average()},
        "model": Path(world.name).name,
        "weights": world.hash,
        "branches": studio.branches,
        "sampling": vars(world.config.sampling),
        "classes": CLASSES,
        "episodes": len(cases),
        "test": options.test,
        "seeds": options.seeds,
        "seconds": round(time.perf_counter() - began, 1),
        "drawn": len(studio.seconds),
        "seconds_a_video": round(float(np.mean(studio.seconds)), 2) if studio.seconds else None,
        "summary": {name: summarise(group) for name, group in groups.items()},
        "pupils": marks,
        "sheet": [f"{case.name}: {case.prompt('real')}" for case in cases[:4]],
        "records": records,
    }
    for path in write_results("sim2real", result, markdown(result), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
