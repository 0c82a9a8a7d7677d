"""The cards of the models that ship: `python benchmarks/model_card.py [--stages | --check]`.

Puts together what the exported configs say of their training, what the benchmarks in results/ measured, and what
docs/mini.md says goes wrong; writes README.md of each model folder and prints the table of its stages. A result of
other weights than those in the folder is refused, so a card never praises a model that is gone. `--check` writes
nothing and fails where a card would change; `--stages` prints the tables alone.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, table

import orrery
from orrery.errors import InputError
from orrery.files import atomic_file
from orrery.train.report import duration

ROOT = Path(__file__).parent.parent
FOLDERS = ROOT / "src" / "orrery" / "weights"
FIGURE = {"loss": "velocity loss {:.3f}", "psnr": "{:.2f} dB", "rollout": "rollout {:.3f}"}


def result(name: str, weights: str) -> dict[str, Any]:
    """A benchmark's JSON, which must be about these weights."""
    path = RESULTS / f"{name}.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    about = found.get("weights") or found.get("model_hash")
    if about != weights:
        raise InputError(f"{path} is about weights {about}, the model is {weights}: run benchmarks/{name}.py again")
    return found


def stages(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(what was trained, its record) of a model, in the order of training."""
    training = config["training"]
    parts = [("VAE", training.get("vae", {})), ("transformer", training)]
    parts += [("decoder", training.get("decoder", {}))]
    parts += [(f"control: {kind}", record) for kind, record in training.get("controls", {}).items()]
    return [(name, record) for name, record in parts if "recipe" in record]


def stage_rows(config: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, record in stages(config):
        figures = [form.format(record["validation"][key]) for key, form in FIGURE.items()
                   if key in record.get("validation", {})]  # fmt: skip
        if "without" in record.get("validation", {}):
            figures.append(f"{record['validation']['without']:.3f} without")
        seen = f"{record['steps']:,} steps, {record['clips_seen']:,} clips"
        recipe = f"[{record['recipe']}](../../../../{record['recipe']}), seed {record['seed']}"
        rows.append(
            [name, recipe, seen, duration(record["seconds"]), ", ".join(figures), str(record.get("commit", ""))]
        )
    return rows


STAGE_HEADS = ("stage", "recipe", "seen", "time", "held out", "commit")


def data_of(config: dict[str, Any]) -> list[str]:
    """Which clips each stage saw."""
    records = stages(config)
    seen: dict[str, list[str]] = {}
    for name, record in records:
        what = record.get("data") or (f"{record['episodes']:,} episodes of tabletop" if "episodes" in record else "")
        if what:
            seen.setdefault(what, []).append(name)
    return [f"- {', '.join(names)}: {what}" for what, names in seen.items()]


def failures(title: str) -> list[str]:
    """The bullets of a section of docs/mini.md."""
    text = (ROOT / "docs" / "mini.md").read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if section is None:
        raise InputError(f"docs/mini.md has no section {title!r}")
    lines = [line for line in section[1].strip().splitlines() if line.startswith(("- ", "  "))]
    return [line.replace("](../", "](../../../../") for line in lines]  # links from docs/ to links from the card


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def mini_figures(weights: str) -> list[str]:
    """What orrery-mini was measured to do, task by task."""
    quality = result("mini_quality", weights)
    lines = ["### Text2World, Image2World, Video2World", ""]
    rows = []
    for given, task in ((0, "words"), (1, "words, an image"), (2, "words, 5 frames")):
        for group in ("all", "drop", "push"):
            model = quality["summary"][group][str(given)]["model"]
            copied = quality["summary"][group][str(given)].get("copy", {})
            numbers = [f"{model['psnr']:.1f}" if "psnr" in model else "", f"{copied['psnr']:.1f}" if copied else ""]
            numbers.append(f"{model['last_centroid_radii']:.2f}" if "last_centroid_radii" in model else "")
            shares = [percent(model[key]) for key in ("count_kept", "colour_right", "shape_right", "told")]
            rows.append([task, group, *numbers, *shares])
    heads = (
        "given",
        "scenes",
        "PSNR, dB",
        "last frame copied",
        "centroid, radii",
        "count",
        "colour",
        "shape",
        "as told",
    )
    lines += table(heads, rows)
    gate = [[line["what"], f"{line['measured']:.3g}", line["needed"], "reached" if line["passed"] else "short"]
            for line in quality["gate"]]  # fmt: skip
    lines += ["", "The gate for shipping:", "", *table(("", "measured", "needed", ""), gate)]
    control = result("control_fidelity", weights)
    means = control["summary"]["all"]["means"]
    names = {"edge": "edge F1", "blur": "blur SSIM", "depth": "depth si-RMSE (less is better)", "seg": "mask mIoU"}
    ways = (("that kind alone", None), ("no control", "plain none"), ("the true clip through the VAE", "plain, coded"))
    cells = [[name, *(f"{means[way or f'plain {kind}'][kind][0]:.3f}" for kind in names)] for name, way in ways]
    return [*lines, "", "### Transfer", "", *table(("", *names.values()), cells)]


def tabletop_figures(weights: str) -> list[str]:
    """What orrery-tabletop was measured to do."""
    acting, judged = result("acting", weights), result("judge", weights)
    times = (0, 2, 5, 11, 15)
    heads = ["", "after", *(f"{(t + 1) / 3:.1f} s" for t in times)]
    measures = {"psnr": "PSNR, dB", "peg": "peg, cm off", "cube": "cube, cm off"}
    names = {"model": "told the robot's actions", "shuffled": "told another's", "copied": "first frame"}
    rows = [
        [measure, title, *(f"{acting['summary'][name]['mean'][key][t][0]:.1f}" for t in times)]
        for name, measure in measures.items()
        for key, title in names.items()
        if key in acting["summary"][name]["mean"]
    ]
    pearson = judged["comparison"]["pearson"]["value"]
    robots = f"{len(judged['policies'])} robots judged in it and in MuJoCo"
    return [
        "### Told a robot's actions", "", *table(heads, rows), "",
        f"{robots}, {judged['seeds']} episodes each: r = {pearson:.2f}.",
    ]  # fmt: skip


MODELS: dict[str, tuple[str, Callable[[str], list[str]], str]] = {
    "mini": (
        "A world model of the Cosmos-Predict2.5 architecture in small, trained by Orrery on its own MuJoCo worlds: "
        "text, image or video to video, with control branches.",
        mini_figures, "What it gets wrong",
    ),
    "tabletop": (
        "orrery-mini's transformer post-trained to predict what a robot's actions do to a table of blocks.",
        tabletop_figures, "What tabletop gets wrong",
    ),
}  # fmt: skip


def config_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDERS / name / "config.json").read_text(encoding="utf-8"))


def card(name: str) -> tuple[Path, str]:
    """(where it belongs, its text)."""
    folder, config = FOLDERS / name, config_of(name)
    about, figures, section = MODELS[name]
    weights = orrery.load(name).hash
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
    height, width = config["resolution"]
    lines = [f"# orrery-{name}", "", about, ""]
    lines += [
        f"{width}x{height} pixels, {config['fps']:g} frames a second, {size:.1f} MB in float16 (weights {weights})."
    ]
    lines += ["More: [docs/mini.md](../../../../docs/mini.md).", "", "## Data", ""]
    lines += ["Rendered by MuJoCo from random numbers (`orrery sim`); no person, place or brand is in it. Seeds from"]
    lines += ["1,000,000 on are held out and in no training set.", "", *data_of(config)]
    lines += ["", "## Training", "", *table(STAGE_HEADS, stage_rows(config))]
    lines += ["", "`make mini` repeats it. Times are of two CPU cores or one, see the recipes."]
    lines += ["", "## Figures", "", *figures(weights), "", "## Known failures", "", *failures(section)]
    lines += ["", "## Licence", "", "Apache-2.0, weights and data alike.", ""]
    return folder / "README.md", "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a card would change")
    parser.add_argument("--stages", action="store_true", help="print how the models were trained, and stop")
    options = parser.parse_args()
    stale = []
    for name in MODELS:
        print(f"orrery-{name}")
        print("\n".join(table(STAGE_HEADS, stage_rows(config_of(name)))))
        if options.stages:
            continue
        try:
            path, text = card(name)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path)
            if not options.check:
                with atomic_file(path) as partial:
                    partial.write_text(text, encoding="utf-8")
    for path in stale:
        print(f"{'would change' if options.check else 'wrote'} {path}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
