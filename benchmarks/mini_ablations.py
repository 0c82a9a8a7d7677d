"""What each choice of the mini recipes is worth, in small: `python benchmarks/mini_ablations.py vae|flow|ema|scale`.

Each row is a run of its own of recipes/mini-vae.toml or mini-dit.toml, shortened, with one thing changed, judged on
held-out clips. Rows that change the network get as many steps as take the base's time (measured side by side before the
run), the others as many clips. `scale` trains networks of several sizes for several budgets; `ema` judges averages of
several horizons over one run. A row that results/mini_ablations_PART.json has is not run again; stopped, the same
command goes on. Writes that file and its .md.
"""

import argparse
import copy
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import RESULTS, commit, made_line, provenance, table, write_results

from orrery.errors import InputError, note
from orrery.files import atomic_file
from orrery.train.export import load_vae
from orrery.train.flow import FlowTask
from orrery.train.loop import Trainer, pick_device
from orrery.train.optim import EMA
from orrery.train.recipe import FlowRecipe, VAERecipe, changed_keys, load_recipe, recipe_json
from orrery.train.start import open_run
from orrery.weights.sources import find_model
from orrery.weights.store import load_model

ROOT = Path(__file__).parent.parent
MINI = ROOT / "src" / "orrery" / "weights" / "mini"
CALIBRATED = 12  # steps that are timed, after as many that are not
JUDGED = 96  # held-out clips on which a transformer's samples are judged
DONE = "judged.json"
GIVEN = 2  # latent frames that they are given


@dataclass(frozen=True)
class Row:
    """A change to the base recipe. timed: it changes what a step costs, so the base's seconds decide, not its clips."""

    name: str
    sets: tuple[str, ...] = ()
    timed: bool = False


# Where the study began; what it found has gone into the recipes since, and must not move the rows that are there.
BEGAN_WITH = {
    "vae": ("optimizer.lr=1.5e-3", "optimizer.matrix_lr=2e-3"),
    "flow": ("optimizer.lr=1.5e-3", "optimizer.matrix_lr=2e-3", "loss.high_noise_fraction=0.05"),
}

VAE_ROWS = (
    Row("base"),
    Row("base, another seed", ("seed=101",)),
    Row("things weigh no more than the rest", ("loss.foreground=1.0",)),
    Row("L1 alone", ("loss.l2=0.0",)),
    Row("L2 alone", ("loss.l1=0.0", "loss.l2=8.0")),
    Row("no sharpness term", ('loss.sharpness="none"',)),
    Row("spectrum in place of Sobel", ('loss.sharpness="fft"',)),
    Row("KL 1e-4", ("loss.kl=1e-4",)),
    Row("AdamW", ('optimizer={name="adamw",lr=1.5e-3,warmup=50,hold=0.4,ema=0.998}',)),
    Row("Muon, rates x 2", ("optimizer.lr=3e-3", "optimizer.matrix_lr=4e-3")),
    Row("Muon, rates x 4", ("optimizer.lr=6e-3", "optimizer.matrix_lr=8e-3")),
    Row("Muon, rates x 1/2", ("optimizer.lr=7.5e-4", "optimizer.matrix_lr=1e-3")),
    Row("no mirrored clips", ("flip=0.0",)),
    Row("batch 2, as long", ("batch=2",), True),
    Row("batch 8, as long", ("batch=8",), True),
    Row("patch 4x2x2", ("vae.override={patch=2,multipliers=[0.5,1,1.667],temporal_down=[false,false]}",), True),
    Row("patch 4x8x8", ("vae.override={patch=8,multipliers=[2],temporal_down=[],res_blocks=3,decoder_res_blocks=3}",),
        True),
    Row("patch 2x4x4, halved in time", ("vae.override={temporal_patch=2,temporal_down=[true]}",), True),
    Row("whole 3x3x3 kernels", ("vae.override={factorised=false}",), True),
    Row("widths x 4/3", ("vae.override={base=128}",), True),
    Row("widths x 2/3", ("vae.override={base=64}",), True),
    Row("three blocks a level", ("vae.override={res_blocks=3,decoder_res_blocks=3}",), True),
)  # fmt: skip

FLOW_ROWS = (
    Row("base"),
    Row("base, another seed", ("seed=102",)),
    Row("text encoder frozen", ("text.frozen=true",)),
    Row("shift 1", ("loss.shift=1.0",)),
    Row("shift 5", ("loss.shift=5.0",)),
    Row("uniform times", ('loss.distribution="uniform"',)),
    Row("no times of high noise added", ("loss.high_noise_fraction=0.0",)),
    Row("AdamW", ('optimizer={name="adamw",lr=1.5e-3,warmup=50,hold=0.4,ema=0.999}',)),
    Row("Muon, rates x 2", ("optimizer.lr=3e-3", "optimizer.matrix_lr=4e-3")),
    Row("Muon, rates x 4", ("optimizer.lr=6e-3", "optimizer.matrix_lr=8e-3")),
    Row("Muon, rates x 1/2", ("optimizer.lr=7.5e-4", "optimizer.matrix_lr=1e-3")),
    Row("no mirrored clips", ("latents.mirror=false",)),
    Row("captions never dropped", ("loss.text_dropout=0.0",)),
    Row("captions dropped at 0.3", ("loss.text_dropout=0.3",)),
    Row("captions never cut", ("loss.caption_cut=0.0",)),
    Row("no clips from the middle", ("loss.midstream=0.0",)),
    Row("2 latents given at 0.6", ("loss.condition=[0.1,0.3,0.6]",)),
    Row("given frames told the time of the rest", ("loss.conditional_timestep=1000.0",)),
    Row("patch 1x1x1, as long", ("transformer.override={patch=[1,1,1]}",), True),
    Row("batch 16, as long", ("batch=16",), True),
    Row("batch 64, as long", ("batch=64",), True),
)

SIZES = {
    "1.9 M": ("transformer.override={width=128,depth=5,heads=2}",),
    "4.2 M": ("transformer.override={width=192,depth=6,heads=3}",),
    "9.1 M": (),
    "19 M": ("transformer.override={width=384,depth=7,heads=6}",),
}
DECAYS = (0.0, 0.9, 0.97, 0.99, 0.995)
SHIPPED = "what ships"
BUDGETS = (80, 240, 720)  # seconds of one core


def sets_of(part: str, row: Row, out: Path, steps: int, data: Path, vae: str) -> list[str]:
    """The changes to the recipe that make a row's run."""
    shared = [f"out={out}", f"data.root={data}", "threads=1", "compile=true", f"steps={steps}"]
    shared += ["checkpoint.seconds=60", "checkpoint.keep=1", "log.steps=50", "optimizer.warmup=50"]
    shared += [f"validation.steps={max(steps, 1)}", "validation.sheet=0", "data.heldout_from=1000000"]
    if part == "vae":
        shared += ["data.max_clips=3000", "statistics_clips=8", 'data.scenes=["drop","push"]']
    else:
        shared += ["data.max_clips=6000", f"latents.vae={vae}", f"validation.clips={JUDGED}"]
    return [*shared, *BEGAN_WITH.get(part, ()), *row.sets]


def rows_of(part: str) -> tuple[Row, ...]:
    return VAE_ROWS if part == "vae" else FLOW_ROWS


def folder(part: str, row: Row, options: argparse.Namespace) -> Path:
    """The run directory of a row."""
    return options.runs / part / "".join(c if c.isalnum() or c == "." else "-" for c in row.name)


def recorded(part: str) -> dict[str, dict[str, Any]]:
    """The rows of the result by name: a run's folder may be gone."""
    path = RESULTS / f"mini_ablations_{part}.json"
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}


def is_known(part: str, row: Row, options: argparse.Namespace) -> bool:
    return (folder(part, row, options) / DONE).exists() or row.name in options.recorded


def recipe_of(part: str) -> Path:
    return ROOT / "recipes" / ("mini-vae.toml" if part == "vae" else "mini-dit.toml")


def opened(part: str, sets: list[str]) -> Trainer:
    recipe = load_recipe(recipe_of(part), sets)
    assert recipe.threads is not None
    torch.set_num_threads(recipe.threads)
    recipe.out.mkdir(parents=True, exist_ok=True)
    _share_latents(recipe.out)
    return open_run(recipe, pick_device("cpu"))


def _share_latents(out: Path) -> None:
    """The latents of all runs of a part are the same: one folder."""
    shared, mine = out.parent / "latents", out / "latents"
    shared.mkdir(exist_ok=True)
    if not mine.exists():
        mine.symlink_to(shared.resolve(), target_is_directory=True)


def step_seconds(part: str, row: Row, options: argparse.Namespace) -> float:
    """CPU seconds of a step, in a process of its own and a run that is thrown away."""
    command = [sys.executable, __file__, part, "--calibrate", row.name, "--data", str(options.data)]
    command += ["--vae", options.vae, "--runs", str(options.runs)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def calibrate(part: str, row: Row, options: argparse.Namespace) -> float:
    out = options.runs / part / f"calibration-{os.getpid()}"
    shutil.rmtree(out, ignore_errors=True)
    trainer = opened(part, sets_of(part, row, out, 1000, options.data, options.vae))
    times = []
    for _ in range(2 * CALIBRATED):
        began = time.process_time()
        trainer.train_step()
        times.append(time.process_time() - began)
    shutil.rmtree(out, ignore_errors=True)
    return float(np.median(times[CALIBRATED:]))


def run(part: str, row: Row, steps: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a row and judge it."""
    out = folder(part, row, options)
    done = out / DONE
    sets = sets_of(part, row, out, steps, options.data, options.vae)
    vae = {} if part == "vae" else {"vae": load_vae(Path(options.vae))[1]}
    if is_known(part, row, options):
        found = json.loads(done.read_text()) if done.exists() else options.recorded[row.name]
        wanted = {"sets": list(row.sets)} | vae
        changed = [(key, found.get(key), wanted[key]) for key in wanted if wanted[key] != found.get(key)]
        if done.exists():
            begun = json.loads((out / "recipe.json").read_text())
            changed += changed_keys(begun, recipe_json(load_recipe(recipe_of(part), sets)))
        if changed:
            where = out if done.exists() else RESULTS / f"mini_ablations_{part}.json"
            raise InputError(f"{row.name!r} of {where} is of another recipe: {changed}; remove it to run it again")
        return found
    trainer = opened(part, sets)
    if not trainer.run():
        raise SystemExit(130)
    recipe = trainer.recipe
    count = sum(p.numel() for p in trainer.task.model.parameters())
    found = {"name": row.name, "sets": list(row.sets), "steps": steps, "clips": steps * trainer.task.clips}
    found |= {"parameters": count, "seconds": round(trainer.seconds), "commit": commit()} | vae
    with torch.no_grad():
        found |= trainer.task.validate(trainer.ema.model)
        found |= judged_vae(trainer) if isinstance(recipe, VAERecipe) else judged_flow(trainer)
        found["petaflop"] = 3 * found["clips"] * forward_flop(trainer) / 1e15
    done.write_text(json.dumps(found))
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    return found


def forward_flop(trainer: Trainer) -> float:
    """Floating point operations of one clip's way through what is trained; a backward pass has twice as many."""
    from torch.utils.flop_counter import FlopCounterMode

    task, batch = trainer.task, trainer.task.batch()
    while isinstance(task, FlowTask) and batch.x0.shape[2] < task.held.latents.shape[3]:
        batch = task.batch()
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        task.loss(trainer.ema.model, batch)
    return counter.get_total_flops() / task.clips


def cases_of(trainer: Trainer, count: int) -> list[Any]:
    from mini_quality import from_dataset

    heldout = trainer.task.heldout  # type: ignore[attr-defined]
    lines = {}
    for line in (heldout.root / "index.jsonl").read_text().splitlines():
        entry = json.loads(line)
        lines[entry["id"]] = entry
    return [from_dataset(heldout.root, lines[entry.id]) for entry in heldout.entries[:count]]


def judged_flow(trainer: Trainer) -> dict[str, float]:
    """Samples given two latents: PSNR, and errors of the objects' centroids at the last frame in their radii."""
    from mini_quality import fit_shapes

    from orrery.eval import judge, psnr
    from orrery.train.sheets import to_uint8

    task = trainer.task
    assert isinstance(trainer.recipe, FlowRecipe)
    count = min(JUDGED, len(task.held))  # type: ignore[attr-defined]
    cases = cases_of(trainer, count)
    votes = fit_shapes(cases[:48])
    given = 1 + 4 * (GIVEN - 1)
    errors, kept, values = [], [], []
    for start in range(0, count, 16):
        indices = list(range(start, min(start + 16, count)))
        latents = task.sample(trainer.ema.model, indices, GIVEN)  # type: ignore[attr-defined]
        clips = task.vae.decode(latents).cpu().numpy()  # type: ignore[attr-defined]
        for index, clip in zip(indices, clips, strict=True):
            case, frames = cases[index], to_uint8(clip)
            verdict = judge(frames, case.caption, votes, given, case.tracks)
            assert verdict.error is not None and verdict.radius is not None
            errors += [e / r for e, r in zip(verdict.error[:, -1], verdict.radius[:, -1], strict=True) if e == e]
            kept.append(verdict.count_kept)
            values.append(float(np.mean(psnr(frames[given:], case.frames[given : len(frames)]))))
    return {"radii": float(np.mean(errors)), "kept": float(np.mean(kept)), "sample_psnr": float(np.mean(values))}


def judged_vae(trainer: Trainer) -> dict[str, float]:
    """SSIM of held-out clips, and the mean absolute Sobel gradient of the error over that of the picture."""
    from orrery.eval import ssim
    from orrery.train.sheets import to_uint8
    from orrery.train.vae import VAETask, sobel

    task, model = trainer.task, trainer.ema.model
    assert isinstance(task, VAETask)
    frames, _ = task._heldout(task.recipe.validation.clips)
    similar, edges, picture = [], 0.0, 0.0
    for clip in frames.split(4):
        decoded = model.decode_raw(model.moments(clip)[0]).float()  # type: ignore[operator]
        edges += sum(float(part.abs().sum()) for part in sobel(decoded - clip))
        picture += sum(float(part.abs().sum()) for part in sobel(clip))
        for pair in zip(decoded.numpy(), clip.numpy(), strict=True):
            similar.append(float(np.mean(ssim(*map(to_uint8, pair)))))
    return {"ssim": float(np.mean(similar)), "edge_error": edges / picture}


VAE_HEADS = {"psnr": "PSNR, dB", "psnr_foreground": "of things, dB", "ssim": "SSIM", "edge_error": "edges lost"}
FLOW_HEADS = {"loss": "velocity loss", "radii": "centroid, radii", "sample_psnr": "PSNR, dB", "kept": "count kept"}


def markdown(part: str, rows: list[dict[str, Any]], made: dict[str, Any]) -> str:
    """The table of a part."""
    heads = VAE_HEADS if part == "vae" else FLOW_HEADS
    forms = {"psnr": ".2f", "psnr_foreground": ".2f", "sample_psnr": ".2f", "kept": ".0%"}
    lines = [f"# Ablations of orrery-mini: {part}", "", made_line(made), ""]
    lines += ["That is the last run's; rows are kept from run to run, each with its commit in the JSON.", ""]
    cells = [
        [row["name"], f"{row['clips']:,}", f"{row['seconds']:,}", f"{row['parameters'] / 1e6:.1f}"]
        + [format(row[key], forms.get(key, ".3f")) for key in heads]
        for row in rows
    ]
    lines += table(["", "clips seen", "seconds", "M parameters", *heads.values()], cells)
    return "\n".join(lines)


def shipped(options: argparse.Namespace) -> dict[str, Any]:
    """The model in the package, judged like the rows on the same latents."""
    model = load_model(find_model("mini", controls=()))
    training = model.config.training
    out = options.runs / "scale" / "shipped"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    shutil.copy(MINI / "tokenizer.json", out)
    trainer = opened("scale", sets_of("scale", Row(SHIPPED), out, 1, options.data, options.vae))
    whole = torch.nn.ModuleDict({"transformer": model.transformer, "text": model.text})
    trainer.ema.model = whole
    found = {"name": SHIPPED, "sets": [], "steps": training["steps"], "clips": training["clips_seen"]}
    found |= {"parameters": sum(p.numel() for p in whole.parameters()), "seconds": round(training["seconds"])}
    with torch.no_grad():
        found |= trainer.task.validate(whole) | judged_flow(trainer)
    return found | {"petaflop": 3 * found["clips"] * forward_flop(trainer) / 1e15}


def horizons(options: argparse.Namespace) -> list[Path]:
    """One run of the base, and the held-out loss of averages of its weights, while the rate is high and at its end."""
    out = options.runs / "ema" / "base"
    shutil.rmtree(out, ignore_errors=True)
    trainer = opened("ema", sets_of("ema", Row("base"), out, options.steps, options.data, options.vae))
    averages = {decay: EMA(trainer.task.model, copy.deepcopy(trainer.ema.model), decay) for decay in DECAYS}
    rows = {
        decay: [f"{1 / (1 - decay) / options.steps:.1%}" if decay else "the weights themselves"] for decay in DECAYS
    }
    moments = (round(0.4 * options.steps), options.steps)
    while trainer.step < options.steps:
        trainer.train_step()
        for average in averages.values():
            average.update()
        if trainer.step in moments:
            for decay, average in averages.items():
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):
                    rows[decay].append(f"{trainer.task.validate(average.model)['loss']:.4f}")
            note(f"step {trainer.step}: {rows}")
    made = provenance()
    heads = ("horizon, share of the run", "velocity loss at the highest rate", "at the end")
    lines = ["# Ablations of orrery-mini: averaging the weights", "", made_line(made), ""]
    lines += [
        f"{options.steps:,} steps. The recipe's average has a horizon of at most a tenth of the steps so far.",
        "",
    ]
    text = "\n".join([*lines, *table(heads, list(rows.values()))])
    return write_results("mini_ablations_ema", {"made": made, "rows": list(rows.values())}, text)


def frontier(rows: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """(a, b) of value = a petaflop^b through the best row of each budget."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        budget = row["name"].rpartition(", ")[2]
        if budget not in best or row[key] < best[budget][key]:
            best[budget] = row
    x, y = np.log([row["petaflop"] for row in best.values()]), np.log([row[key] for row in best.values()])
    b, a = np.polyfit(x, y, 1)
    return float(np.exp(a)), float(b)


def draw_scale(rows: list[dict[str, Any]], path: Path) -> list[str]:
    """The curve as a picture, and what it says in lines of Markdown."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), constrained_layout=True)
    lines = ["", "Through the best size of each budget:", ""]
    for axis, (key, title) in zip(axes, (("loss", "velocity loss"), ("radii", "centroid error, radii")), strict=True):
        for size in SIZES:
            mine = [row for row in rows if row["name"].startswith(f"{size},")]
            if mine:
                axis.loglog(
                    [r["petaflop"] for r in mine], [r[key] for r in mine], "o-", ms=4, label=f"{size} parameters"
                )
        shipped = [row for row in rows if row["name"] == SHIPPED]
        axis.loglog([r["petaflop"] for r in shipped], [r[key] for r in shipped], "k*", ms=11, label=SHIPPED)
        small = [row for row in rows if row["name"] != SHIPPED]
        if len({row["name"].rpartition(", ")[2] for row in small}) > 1:
            a, b = frontier(small, key)
            far = np.geomspace(min(r["petaflop"] for r in rows), max(r["petaflop"] for r in rows), 40)
            axis.loglog(far, a * far**b, "--", color="0.6", lw=1)
            lines.append(f"- {title}: {a:.3g} x petaflop^{b:.3f}, so x {2**b:.3f} for twice the compute")
        axis.set(title=title, xlabel="petaflop of training")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    with atomic_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    return lines


def planned(part: str, options: argparse.Namespace) -> Iterator[tuple[Row, int]]:
    """The rows of a part with their steps, which are measured when a row's turn comes."""
    if part == "scale":
        for size, sets in SIZES.items():
            seconds: float | None = None
            for budget in options.budgets:
                row = Row(f"{size}, {budget} s", sets, True)
                if options.only and row.name not in options.only and not is_known(part, row, options):
                    continue
                if not is_known(part, row, options):
                    seconds = seconds or step_seconds(part, row, options)
                yield row, max(60, round(budget / (seconds or 1.0)))
        return
    base: float | None = None
    for row in rows_of(part):
        if options.only and row.name not in options.only and not is_known(part, row, options):
            continue
        steps = options.steps
        if row.timed and not is_known(part, row, options):
            base = base or step_seconds(part, Row("base"), options)
            steps = max(50, round(steps * base / step_seconds(part, row, options)))
        yield row, steps


def written(part: str, rows: dict[str, dict[str, Any]]) -> list[Path]:
    """The result of all rows that there are, by name, in the order of the plan."""
    order = [row.name for row in rows_of(part)] if part != "scale" else [*SIZES, SHIPPED]
    names = sorted(rows, key=lambda name: order.index(name.rpartition(", ")[0] or name if part == "scale" else name))
    found, made = [rows[name] for name in names], provenance()
    text = [markdown(part, found, made)]
    if part == "scale":
        text += draw_scale(found, RESULTS / "mini_ablations_scale.png")
    return write_results(f"mini_ablations_{part}", {"made": made, "rows": found}, "\n".join(text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("vae", "flow", "ema", "scale"))
    parser.add_argument("--steps", type=int, help="of the base; default 1200 (vae, ema), 300 (flow)")
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS), help="seconds of one core, for scale")
    parser.add_argument("--only", nargs="+", help="names of rows to run; the table has every row that is there")
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "mini")
    parser.add_argument("--vae", default=str(MINI), help="whose latents, for flow, scale")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablations")
    parser.add_argument("--calibrate", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.recorded = recorded(options.part)
    options.steps = options.steps or (300 if options.part == "flow" else 1200)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.calibrate:
        known = {row.name: row for row in rows_of(options.part)} | {size: Row(size, SIZES[size]) for size in SIZES}
        name = options.calibrate.rpartition(", ")[0] if options.part == "scale" else options.calibrate
        print(calibrate(options.part, known[name], options))
        return
    if options.part == "ema":
        print(f"wrote {horizons(options)[0]} and .md")
        return
    rows = dict(options.recorded)
    for row, steps in planned(options.part, options):
        note(f"{row.name}: {steps} steps")
        rows[row.name] = run(options.part, row, steps, options)
        paths = written(options.part, rows)
    if options.part == "scale":
        asked = not options.only or SHIPPED in options.only
        if asked and load_vae(Path(options.vae))[1] == load_vae(MINI)[1]:
            rows[SHIPPED] = shipped(options)
        paths = written(options.part, rows)
    print(f"wrote {paths[0]} and .md")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
