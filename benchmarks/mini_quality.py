"""How good orrery-mini is on clips it has never seen: `python benchmarks/mini_quality.py [--data data/mini]`.

Held-out clips of drop and push are drawn by seed from MuJoCo (or read from a dataset), and the model generates each
from 0, 1 and 2 given latent frames (0, 1 and 5 frames). Pixels are compared with truth beside two predictions that need
no model and the VAE's own reconstruction; objects are found in the pixels by `orrery.eval`, whose own errors on true
frames stand in the same table. Given two latents it draws several futures, to tell what is wrong from what is open.
Writes a JSON, a Markdown table and a contact sheet; prints the gate for shipping.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import orrery
from orrery.errors import InputError, OrreryError
from orrery.eval import ShapeVotes, Verdict, copy_last, detect, empty_scene, fit_brightness, judge, psnr, ssim
from orrery.eval.judging import Track, true_tracks
from orrery.eval.metrics import bootstrap
from orrery.files import atomic_file, check_writable
from orrery.video import Video

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import provenance
from futures import futures_lines, spread_of, summarise_futures

HELD_OUT = 1_000_000  # seeds from here on are in no training set
SCENES = ("drop", "push")
GIVEN = {0: 0, 1: 1, 2: 5}  # latent frames -> frames
GATE = {"vae_db": 31.0, "over_db": 4.0, "radius": 1.0, "share": 0.9}
LEGEND = (
    "Only generated frames are counted. `px`: error of the centroids at the last frame (mean; a missing object counts "
    "as half the picture). `radii`: the same in radii of the true object. `told`: goes the way that the caption "
    "tells (asked of 0 and 1 latents). `went`: goes the way that the true one goes. The rows `VAE ceiling` and `true "
    "frames` show what the measurement itself gets wrong."
)
HEADS = ("clips", "n", "", "PSNR", "SSIM", "px", "radii", "count", "count by frame", "colour", "shape", "told", "went")
METHODS = {"model": "model", "copy": "copy last", "empty": "empty scene", "vae": "VAE ceiling", "truth": "true frames"}


@dataclass(frozen=True)
class Case:
    """A clip and its truth: frames [T, H, W, 3] uint8, segmentation [T, H, W], objects {id: (colour, shape)}; `kind` is
    the background it is seen against, such as "drop real wood"."""

    name: str
    scene: str
    look: str
    kind: str
    caption: str
    fps: float
    frames: np.ndarray
    segmentation: np.ndarray
    objects: dict[int, tuple[str, str]]

    @property
    def tracks(self) -> dict[str, Track]:
        """The true tracks by colour."""
        return true_tracks(self.segmentation, {number: colour for number, (colour, _) in self.objects.items()})


def from_dataset(root: Path, line: dict[str, Any]) -> Case:
    """A clip of a dataset that `orrery sim` wrote."""
    folder = root / line["id"]
    try:
        with np.load(folder / "segmentation.npz", allow_pickle=False) as archive:
            segmentation = archive[archive.files[0]]
        extra = json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("extra", {})
    except OSError as error:
        raise InputError(f"{folder} cannot be judged: {error.strerror} ({Path(error.filename).name})") from error
    video = Video.read(folder / "rgb.mp4")
    things = [(item["id"], item["colour"], item["shape"]) for item in line["objects"]]
    return _case(line["id"], line["scene"], line["look"], extra, line["caption"], video, segmentation, things)


def from_simulator(scene: str, seed: int, size: int) -> Case:
    """A clip out of MuJoCo."""
    from orrery.sim import simulate

    clip = simulate(scene, seed, size=size)
    assert clip.segmentation is not None
    things = [(i + 1, thing.colour, thing.shape) for i, thing in enumerate(clip.things)]
    video = Video(clip.frames[0], clip.fps)
    name = f"{scene}-{seed:07d}"
    return _case(name, scene, clip.look, clip.extra, clip.caption, video, clip.segmentation[0], things)


def _case(name: str, scene: str, look: str, extra: dict, caption: str, video: Video, segmentation: np.ndarray,
          things: list[tuple[int, str, str]]) -> Case:  # fmt: skip
    kind = f"{scene} {look} {extra.get('look', {}).get('floor', 'flat')}"
    objects = {number: (colour, shape) for number, colour, shape in things if colour}
    return Case(name, scene, look, kind, caption, video.fps, video.frames, segmentation, objects)


def choose(options: argparse.Namespace, size: int) -> tuple[list[Case], list[Case]]:
    """(clips to judge, training clips to fit the shape vote and the empty scenes on)."""
    ones, several = options.clips, round(options.clips / 3)
    rng = np.random.default_rng(options.seed)
    test: list[Case] = []
    train: list[Case] = []
    if options.data:
        lines = [json.loads(text) for text in (options.data / "index.jsonl").read_text("utf-8").splitlines()]
        lines.sort(key=lambda line: line["id"])
    for scene in SCENES:
        if options.data:
            mine = [line for line in lines if line["scene"] == scene]
            held = [line for line in mine if line["seed"] >= HELD_OUT]
            order = [held[i] for i in rng.permutation(len(held))]
            test += [from_dataset(options.data, line) for line in _take(order, ones, several, scene)]
            seen = [line for line in mine if line["seed"] < HELD_OUT]
            train += [from_dataset(options.data, line) for line in seen[: options.fit]]
        else:
            test += _simulate_until(scene, HELD_OUT + 100_000 * options.seed, size, ones, several)
            train += [from_simulator(scene, seed, size) for seed in range(options.fit)]
    return test, train


def _quota(ones: int, several: int) -> dict[tuple[bool, str], int]:
    """(has it one object, look) -> how many such clips."""
    return {
        (one, look): (number + (look == "plain")) // 2
        for one, number in ((True, ones), (False, several))
        for look in ("plain", "real")
    }


def _take(lines: list[dict[str, Any]], ones: int, several: int, scene: str) -> list[dict[str, Any]]:
    """The first lines of an index that fill the quota."""
    chosen = []
    for (one, look), number in _quota(ones, several).items():
        fitting = [
            line
            for line in lines
            if line["look"] == look and (sum(bool(item["colour"]) for item in line["objects"]) == 1) == one
        ]
        if len(fitting) < number:
            what = f"{'one-object' if one else 'several-object'} {scene} clips of the {look} look"
            raise InputError(f"the dataset holds {len(fitting)} {what} with seeds >= {HELD_OUT}; {number} are needed")
        chosen += fitting[:number]
    return chosen


def _simulate_until(scene: str, seed: int, size: int, ones: int, several: int) -> list[Case]:
    """Held-out clips from `seed` upward until there are enough of each sort."""
    quota, chosen = _quota(ones, several), []
    while any(quota.values()):
        case = from_simulator(scene, seed, size)
        key = (len(case.objects) == 1, case.look)
        if quota[key]:
            quota[key] -= 1
            chosen.append(case)
        seed += 1
    return chosen


def fit_shapes(cases: list[Case]) -> ShapeVotes:
    """The shape vote, from every fourth true frame of the training clips."""
    examples = []
    for case in cases:
        shapes = dict(case.objects.values())
        for frame in detect(case.frames[::4]):
            examples += [(item, shapes[item.colour]) for item in frame if item.colour in shapes]
    return ShapeVotes.fit(examples, cases[0].frames.shape[2])


def fit_empty(cases: list[Case]) -> dict[str, np.ndarray]:
    """The empty scene [H, W, 3] of each background."""
    kinds = {case.kind for case in cases}
    groups = {kind: [case for case in cases if case.kind == kind] for kind in kinds}
    return {k: empty_scene([c.frames for c in g], [c.segmentation > 0 for c in g]) for k, g in groups.items()}


def resized(case: Case, world: orrery.World) -> Case:
    """The case in the model's length and resolution; a segmentation is not resampled, so sizes must fit."""
    height, width = world.config.resolution
    if case.frames.shape[1:3] != (height, width):
        have = "x".join(map(str, case.frames.shape[1:3]))
        raise InputError(f"{case.name} is {have}, the model {height}x{width}; without --data clips that fit are made")
    if len(case.frames) < world.config.frames:
        raise InputError(f"{case.name} has {len(case.frames)} frames, the model makes {world.config.frames}")
    n = world.config.frames
    return Case(**vars(case) | {"frames": case.frames[:n], "segmentation": case.segmentation[:n]})


def reconstruct(world: orrery.World, frames: np.ndarray, fps: float) -> np.ndarray:
    """frames [T, H, W, 3] through the VAE and back."""
    with torch.no_grad():
        latents = world.model.vae.encode(Video(frames, fps).to_tensor().to(world.device))
        return Video.from_tensor(world.model.vae.decode(latents), fps).frames


def verdict_numbers(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON."""
    numbers: dict[str, Any] = {
        "count_right": verdict.count_right.tolist(),
        "count_kept": verdict.count_kept,
        "colour_right": verdict.colour_right.tolist(),
        "shape_right": verdict.shape_right.tolist(),
        "told": list(verdict.told),
        "went": list(verdict.went),
    }
    if verdict.error is not None and verdict.radius is not None:
        numbers["error_px"] = [[None if np.isnan(e) else round(float(e), 3) for e in row] for row in verdict.error]
        numbers["radius_px"] = verdict.radius.round(2).tolist()
    return numbers


def noise_seed(case: Case, seed: int, sample: int = 0) -> int:
    """The noise of a clip: its own, so that no one noise is good or bad luck for all clips at once."""
    return (1_000_003 * seed + 101 * int(case.name.rpartition("-")[2]) + sample) % 2**32


def evaluate(case: Case, world: orrery.World, votes: ShapeVotes, empty: np.ndarray, seed: int,
             samples: int) -> tuple[dict, dict]:  # fmt: skip
    """(numbers of one clip, the generated frames by number of given latents)."""
    truth, tracks = case.frames, case.tracks
    again = reconstruct(world, truth, case.fps)
    quality = {"psnr": psnr(again, truth).round(3).tolist(), "ssim": ssim(again, truth).round(4).tolist()}
    record: dict[str, Any] = {"id": case.name, "scene": case.scene, "look": case.look, "caption": case.caption,
                              "objects": len(case.objects), "vae": quality, "given": {}}  # fmt: skip
    pictures = {}
    for latents, given in GIVEN.items():
        started = time.perf_counter()
        start = Video(truth[:given], world.config.fps) if given else None
        made = world.generate(case.caption, start, seed=noise_seed(case, seed)).frames
        seconds = time.perf_counter() - started
        pictures[latents] = made
        videos = {"model": made, "vae": again, "truth": truth}
        if given:
            scene = truth.copy()
            scene[given:] = fit_brightness(empty, truth[0])
            videos |= {"copy": copy_last(truth, given), "empty": scene}
        entry: dict[str, Any] = {"seconds": round(seconds, 2)}
        for method, frames in videos.items():
            # Text alone says what there is, not where: truth is then another clip of the same words.
            reference = None if method == "model" and not given else tracks
            row = verdict_numbers(judge(frames, case.caption, votes, given, reference)) if method != "empty" else {}
            if given and method != "truth":
                row["psnr"] = psnr(frames[given:], truth[given:]).round(3).tolist()
                row["ssim"] = ssim(frames[given:], truth[given:]).round(4).tolist()
            entry[method] = row
        if latents == 2 and samples > 1:
            videos, rows = [made], [entry["model"]]
            for sample in range(1, samples):
                more = world.generate(case.caption, start, seed=noise_seed(case, seed, sample)).frames
                row = verdict_numbers(judge(more, case.caption, votes, given, tracks))
                videos.append(more)
                rows.append(row | {"psnr": psnr(more[given:], truth[given:]).round(3).tolist()})
            entry["futures"] = spread_of([video[given:] for video in videos], rows)
        record["given"][str(latents)] = entry
    return record, pictures


def _mean(values: list) -> float | None:
    flat = [float(v) for v in values if v is not None]
    return float(np.mean(flat)) if flat else None


def summarise(records: list[dict], latents: int, method: str) -> dict[str, Any]:
    """Means over clips of one method; `last_*` at the last frame, centroid errors over objects, radii likewise."""
    rows = [r["given"][str(latents)][method] for r in records if method in r["given"][str(latents)]]
    out: dict[str, Any] = {"clips": len(rows)}
    for name in ("psnr", "ssim"):
        curves = [row[name] for row in rows if name in row]
        if curves:
            out[name] = float(np.mean(curves))
            out[f"{name}_by_frame"] = np.mean(curves, axis=0).round(4).tolist()
    for name in ("count_right", "colour_right", "shape_right", "told", "went"):
        out[name] = _mean([value for row in rows for value in row.get(name, [])])
    out["count_kept"] = _mean([row["count_kept"] for row in rows if "count_kept" in row])
    curves = [curve for row in rows for curve in row.get("error_px", [])]
    if curves:
        table = np.array(curves, float)
        radii = np.array([curve for row in rows for curve in row["radius_px"]])
        last = ~np.isnan(table[:, -1])
        out["centroid_px_by_frame"] = [None if np.isnan(c).all() else round(float(np.nanmean(c)), 3) for c in table.T]
        out["centroid_px"] = float(np.nanmean(table))
        if last.any():
            ratio = table[last, -1] / radii[last, -1]
            out["last_centroid_px"] = float(table[last, -1].mean())
            out["last_centroid_median_px"] = float(np.median(table[last, -1]))
            out["last_centroid_radii"] = float(ratio.mean())
            out["last_centroid_radii_interval"] = list(bootstrap(ratio)[1:]) if len(ratio) > 1 else None
            out["last_within_radius"] = float((ratio < 1).mean())
    return out


def groups_of(records: list[dict]) -> dict[str, list[dict]]:
    """The clips in the groups of the table."""
    groups = {"all": records, "one object": [r for r in records if r["objects"] == 1]}
    groups |= {"several objects": [r for r in records if r["objects"] > 1]}
    for key, names in (("scene", SCENES), ("look", ("plain", "real"))):
        groups |= {name: [r for r in records if r[key] == name] for name in names}
    for scene in SCENES:
        groups[f"{scene}, one object"] = [r for r in records if r["scene"] == scene and r["objects"] == 1]
    return {name: group for name, group in groups.items() if group}


def gate(summary: dict[str, Any], vae_db: float) -> list[dict[str, Any]]:
    """The conditions for shipping: what was asked, what was measured."""
    one, whole = summary["one object"]["2"], summary["all"]["2"]["model"]
    over = {name: one["model"]["psnr"] - one[name]["psnr"] for name in ("copy", "empty")}
    lines = [("VAE reconstruction, all frames, dB", vae_db, ">=", GATE["vae_db"])]
    lines += [(f"two latents, one object: dB over {METHODS[n]}", v, ">=", GATE["over_db"]) for n, v in over.items()]
    intervals = {}
    for name, numbers in (("all clips", whole), ("one object", one["model"])):
        radii = numbers.get("last_centroid_radii", float("inf"))
        what = f"two latents, {name}: centroid error at the last frame, object radii"
        lines.append((what, radii, "<", GATE["radius"]))
        intervals[what] = numbers.get("last_centroid_radii_interval")
    lines.append(("two latents, all clips: object count kept", whole["count_kept"], ">=", GATE["share"]))
    lines.append(("two latents, all clips: colour right", whole["colour_right"], ">=", GATE["share"]))
    return [{"what": what, "measured": round(float(value), 4), "needed": f"{sign} {bound:g}",
             "passed": bool(value >= bound if sign == ">=" else value < bound), "interval": intervals.get(what)}
            for what, value, sign, bound in lines]  # fmt: skip


def gate_line(line: dict[str, Any]) -> str:
    """One condition of the gate as a line of text."""
    within = "" if line.get("interval") is None else ", 95 % {:.3g} to {:.3g}".format(*line["interval"])
    verdict = "PASS" if line["passed"] else "FAIL"
    return f"- {verdict}: {line['what']}: {line['measured']:.4g} ({line['needed']}{within})"


def markdown(result: dict[str, Any]) -> str:
    """The result as a page with tables."""
    about, machine = result["made"], result["made"]["machine"]
    dirty = " with uncommitted changes" if about["dirty"] else ""
    made = (
        f"Model `{result['model']}` ({result['weights']}); {result['clips']} clips; {about['date']}; commit "
        f"{about['commit']}{dirty}; {machine['gpu'] or machine['cpu']}, {machine['cores']} cores; torch "
        f"{about['versions']['torch']}; `{about['command']}`."
    )
    lines = [
        "# orrery-mini on held-out clips",
        "",
        made,
        "",
        LEGEND,
        "",
        "## Gate",
        "",
        *map(gate_line, result["gate"]),
    ]
    for latents in GIVEN:
        lines += ["", f"## Given {latents} latent frame{'s' * (latents != 1)}", ""]
        lines += ["| " + " | ".join(HEADS) + " |", "| " + " | ".join("---" for _ in HEADS) + " |"]
        for group, methods in result["summary"].items():
            for method, s in methods[str(latents)].items():
                told = s["told"] if latents < 2 else None
                shares = [s["count_kept"], s["count_right"], s["colour_right"], s["shape_right"], told, s["went"]]
                numbers = [
                    ("psnr", ".2f"),
                    ("ssim", ".3f"),
                    ("last_centroid_px", ".2f"),
                    ("last_centroid_radii", ".2f"),
                ]
                cells = [_cell(s.get(name), form) for name, form in numbers] + [_cell(v, ".0%") for v in shares]
                lines.append("| " + " | ".join([group, str(s["clips"]), METHODS[method], *cells]) + " |")
    lines += futures_lines(result["summary"])
    for latents in (1, 2):
        model = result["summary"]["all"][str(latents)]
        lines += ["", f"By frame, given {latents}, all clips (from frame {GIVEN[latents]}):", ""]
        for method in ("model", "copy", "empty", "vae"):
            curve = " ".join(f"{value:.1f}" for value in model[method]["psnr_by_frame"])
            lines.append(f"- PSNR {METHODS[method]}: {curve}")
        curve = " ".join(_cell(value, ".1f") for value in model["model"].get("centroid_px_by_frame", []))
        lines.append(f"- centroid error px, model: {curve}")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def draw_sheet(path: Path, cases: list[Case], records: list[dict], pictures: list[dict[int, np.ndarray]]) -> list[str]:
    """Truth above what was generated from 0, 1 and 2 latents, for the best, the middle and the worst clip of each scene
    by centroid error given two latents; the captions, in order."""
    columns, gap, chosen = 9, 3, []
    for scene in SCENES:
        mine = [i for i, record in enumerate(records) if record["scene"] == scene]
        mine.sort(key=lambda i: np.nanmean(np.array(records[i]["given"]["2"]["model"]["error_px"], float)))
        chosen += list(dict.fromkeys([mine[0], mine[len(mine) // 2], mine[-1]]))
    blocks = []
    for i in chosen:
        picks = np.linspace(0, len(cases[i].frames) - 1, min(columns, len(cases[i].frames))).round().astype(int)
        rows = [np.concatenate(list(frames[picks]), 1) for frames in (cases[i].frames, *pictures[i].values())]
        blocks += [*rows, np.full((gap, rows[0].shape[1], 3), 255, np.uint8)]
    image = Image.fromarray(np.concatenate(blocks[:-1], 0))
    with atomic_file(path) as partial:
        image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS).save(partial)
    return [f"{cases[i].name}: {cases[i].caption}" for i in chosen]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini", help="a name or a model folder")
    parser.add_argument("--clips", type=int, default=48, help="one-object clips a scene; a third as many have several")
    parser.add_argument("--samples", type=int, default=4, help="futures of two latents; 1: no table of them")
    parser.add_argument("--seed", type=int, default=0, help="which held-out clips, and the noise")
    parser.add_argument("--fit", type=int, default=48, help="training clips a scene, for shape vote and empty scenes")
    parser.add_argument("--data", type=Path, help="a dataset to read clips from; default: MuJoCo makes them")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mini_quality.json")
    options = parser.parse_args()
    for name, least in (("clips", 2), ("fit", 16), ("seed", 0), ("samples", 1)):
        if getattr(options, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(options, name)}")
    if options.out.suffix != ".json":
        raise InputError(f"--out must end in .json, got {options.out}")
    if options.data and not (options.data / "index.jsonl").is_file():
        raise InputError(f"no dataset at {options.data}: it holds no index.jsonl")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    check_writable(options.out)
    return options


def main() -> int:
    """Runs the benchmark; 0 whether or not the gate is passed, 2 on bad input."""
    options = arguments()
    began = time.perf_counter()
    world = orrery.load(options.model)
    test, train = choose(options, world.config.resolution[0])
    test = [resized(case, world) for case in test]
    votes, empty = fit_shapes(train), fit_empty(train)
    if strange := {case.kind for case in test} - set(empty):
        raise InputError(f"--fit {options.fit} is too small: it holds no clip of {', '.join(sorted(strange))}")
    records, pictures = [], []
    for number, case in enumerate(test, start=1):
        record, made = evaluate(case, world, votes, empty[case.kind], options.seed, options.samples)
        records.append(record)
        pictures.append(made)
        print(f"{number}/{len(test)} {case.name} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    summary = {
        name: {str(k): {m: summarise(group, k, m) for m in METHODS if m in group[0]["given"][str(k)]} for k in GIVEN}
        for name, group in groups_of(records).items()
    }
    if options.samples > 1:
        for name, group in groups_of(records).items():
            summary[name]["futures"] = summarise_futures([r["given"]["2"]["futures"] for r in group])
    vae_db = float(np.mean([record["vae"]["psnr"] for record in records]))
    result = {
        "made": provenance(),
        "model": world.name,
        "weights": world.hash,
        "training": dict(world.config.training),
        "sampling": vars(world.config.sampling),
        "clips": len(records),
        "seconds": round(time.perf_counter() - began, 1),
        "gate": gate(summary, vae_db),
        "summary": summary,
        "sheet": draw_sheet(options.out.with_suffix(".png"), test, records, pictures),
        "records": records,
    }
    with atomic_file(options.out.with_suffix(".md")) as partial:
        partial.write_text(markdown(result), encoding="utf-8")
    with atomic_file(options.out) as partial:
        partial.write_text(json.dumps(result, default=str) + "\n", encoding="utf-8")
    for line in result["gate"]:
        print(gate_line(line))
    print(f"{len(records)} clips in {result['seconds']} s; {options.out}, .md, .png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
