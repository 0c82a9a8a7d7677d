"""Does a long video drift less when its chunks stay in latents? `python benchmarks/drift.py [--clips 15] [--seed 0]`.

Held-out one-object clips of MuJoCo are continued from their first 5 frames in chunks of 17, with the same noise for
both ways of handing a chunk over: its last latents as they are ("latents"), or its last frames decoded, rounded to
uint8 and encoded again ("frames"), with an overlap of 2 and of 1 latents. Chunk by chunk the videos are held against
truth, and the two ways against each other in pairs. Two experiments say why: what a round trip through the VAE alone
does, again and again, and how much of that the transformer takes back. Writes JSON, Markdown and a contact sheet.
"""

import argparse
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
from orrery.eval import copy_last, detect, psnr
from orrery.eval.judging import found_track, true_tracks
from orrery.eval.metrics import bootstrap
from orrery.eval.objects import colour_masks
from orrery.files import atomic_file, check_writable
from orrery.sim import simulate
from orrery.video import Video

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, made_line, provenance, write_results

HELD_OUT = 1_000_000  # seeds from here on are in no training set
GIVEN, NATIVE = 5, 17  # frames
FRAMES = {"drop": NATIVE + 192, "push": NATIVE + 96}  # MuJoCo finds few longer pushes that a caption describes
LATE = 48  # frames at the end; both overlaps have a seam before and after
STEPS = 10  # the model's own 20 would mean half as many clips in the same time
STILL = 0.05  # metres (0.6 pixels) that an object at rest may move over all of the late frames
MARGIN = 4  # pixels around objects that are no background: blur and shadow
WAYS = [(way, overlap) for overlap in (2, 1) for way in ("latents", "frames")]
ROUNDS = (1, 2, 4, 8, 16)
PULLED = (0, 1, 4, 16)
RESAMPLES = 10_000
# name -> (heading, digits, what is better)
MEASURES = {
    "psnr": ("PSNR, dB", 2, "more"),
    "background": ("background PSNR, dB", 2, "more"),
    "tint": ("background tint", 2, "less"),
    "sharpness": ("background sharpness", 3, "near 1"),
    "seam": ("change at the seam", 2, "less"),
    "size": ("object size", 3, "near 1"),
    "paint": ("object colour off", 1, "less"),
    "radii": ("centroid off, radii", 2, "less"),
    "colour": ("colour there", 3, "more"),
    "count": ("count right", 3, "more"),
}
LEGEND = f"""\
Only generated frames count. *PSNR*: against MuJoCo. Background is what lies more than {MARGIN} pixels from any thing of
truth, now or in the first frame, and from any pixel of an object's colour in the video itself; in `push` what no thing
ever covers in any clip, because an invented arm cannot be told from background: where the model puts one, that counts
against it. *Background PSNR*: against the first true frame. *Tint*: how far the median background pixel has moved from
there, mean of three colours, grey levels. *Sharpness*: energy of the Laplacian over that of truth at the same pixels.
*Change at the seam*: mean absolute change of the background from the last frame of a chunk to the first new one of the
next, grey levels. *Object size*: pixels of the object's colour over those in the true frame. *Object colour off*:
distance of their mean RGB from the first 5 true frames, grey levels. *Centroid off*: in radii of the true object; a
missing one counts as half the picture. *Colour there*, *count right*: shares of frames in which an object of that
colour is found, and in which it is the only one found."""


@dataclass(frozen=True)
class Case:
    """A clip and its truth. group: the scene, and whether the object of `drop` comes to rest. frames [T, H, W, 3]
    uint8; thing, occupied [T, H, W] bool: the object, all that moves; noise: the seed of what is generated from it."""

    name: str
    scene: str
    group: str
    caption: str
    colour: str
    frames: np.ndarray
    thing: np.ndarray
    occupied: np.ndarray
    noise: int


def held_out(scene: str, count: int, seed: int) -> list[Case]:
    """One-object clips from `seed` upward, half of either look; of `drop` half are at rest when it is late."""
    kinds = ("rest", "moving") if scene == "drop" else ("any",)
    keys = [(look, kind) for kind in kinds for look in ("plain", "real")]
    quota = {key: (count + i) // len(keys) for i, key in enumerate(reversed(keys))}
    cases: list[Case] = []
    while any(quota.values()):
        clip = simulate(scene, seed, frames=FRAMES[scene])
        things = [thing for thing in clip.things if thing.colour]
        late = clip.position[-LATE:, 0]
        kind = "any" if scene == "push" else "rest" if np.ptp(late, axis=0).max() < STILL else "moving"
        if len(things) == 1 and quota[clip.look, kind]:
            quota[clip.look, kind] -= 1
            assert clip.segmentation is not None
            seen, group = clip.segmentation[0], scene if kind == "any" else f"{scene}, {kind}"
            about = (f"{scene}-{seed:07d}", scene, group, clip.caption, things[0].colour)
            noise = 100 * (seed - HELD_OUT)  # chunks count upwards from here: no two clips share noise
            cases.append(Case(*about, clip.frames[0], seen == 1, seen > 0, noise))
        seed += 1
    return cases


def spans(overlap: int, frames: int) -> list[tuple[int, int]]:
    """The new frames (from, to) of each chunk of a video of so many frames; the late ones last."""
    step = 4 * (NATIVE // 4 + 1 - overlap)
    chunks = [(start, start + step) for start in range(NATIVE, frames, step)]
    return [(GIVEN, NATIVE), *chunks, (frames - LATE, frames)]


def laplacian(frames: np.ndarray) -> np.ndarray:
    """The Laplacian of the brightness, [T, H - 2, W - 2], of frames [T, H, W, 3]."""
    grey = frames.astype(np.float64).mean(-1)
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return 4 * grey[:, 1:-1, 1:-1] - around


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """mask [T, H, W] bool and all within `by` pixels of it."""
    for axis in (1, 2):
        padded = np.pad(mask, [(by, by) if a == axis else (0, 0) for a in range(3)])
        size = mask.shape[axis]
        mask = np.logical_or.reduce([padded.take(range(i, i + size), axis) for i in range(2 * by + 1)])
    return mask


def background(case: Case, frames: np.ndarray, free: np.ndarray | None) -> np.ndarray:
    """[T, H, W] bool: what is background in `frames`; `free` [H, W], if given, is it by definition."""
    if free is not None:
        return np.broadcast_to(free, frames.shape[:3])
    coloured = np.any(list(colour_masks(frames).values()), axis=0)
    return ~grown(case.occupied[: len(frames)] | case.occupied[:1] | coloured, MARGIN)


def paint(frames: np.ndarray, colour: str) -> tuple[np.ndarray, np.ndarray]:
    """(mean RGB [T, 3], number [T]) of the pixels of a colour; nan where there are none."""
    mask = colour_masks(frames)[colour]
    area = mask.sum((1, 2))
    with np.errstate(invalid="ignore"):
        return (frames * mask[..., None]).sum((1, 2)) / area[:, None], area


def measure(case: Case, frames: np.ndarray, chunks: list[tuple[int, int]], free: np.ndarray | None) -> dict[str, list]:
    """Each of MEASURES by chunk; None where it cannot be asked."""
    truth, first = case.frames, case.frames[:1].astype(np.float64)
    where = background(case, frames, free)
    inside = where[:, 1:-1, 1:-1]
    change = frames - first
    sharp, true_sharp = laplacian(frames) ** 2, laplacian(truth) ** 2
    seams = np.abs(np.diff(frames.astype(np.float64), axis=0)).mean(-1)
    (rgb, area), (true_rgb, true_area) = paint(frames, case.colour), paint(truth, case.colour)
    found = detect(frames)
    true = true_tracks(case.thing.astype(np.uint8), {1: case.colour})[case.colour]
    off = np.linalg.norm(found_track(found, case.colour).centre - true.centre, axis=1)
    shown = ~np.isnan(true.centre[:, 0])
    off[shown & np.isnan(off)] = frames.shape[2] / 2
    off /= np.sqrt(np.maximum(true.area, 1) / np.pi)
    there = np.array([any(item.colour == case.colour for item in frame) for frame in found])
    alone = there & np.array([len(frame) == 1 for frame in found])
    quality = psnr(frames, truth)
    rows: dict[str, list] = {name: [] for name in MEASURES}
    for start, end in chunks:
        part, seen, inner = slice(start, end), where[start:end], inside[start:end]
        asked, painted = shown[part], area[part] > 0
        values = {
            "psnr": quality[part].mean(),
            "background": -10 * np.log10(max((change[part][seen] ** 2).mean() / 255**2, 1e-6)),
            "tint": np.abs(np.median(change[part][seen], axis=0)).mean(),
            "sharpness": sharp[part][inner].sum() / true_sharp[part][inner].sum(),
            "seam": _mean(seams[start - 1][where[start - 1] & where[start]]) if start >= NATIVE else np.nan,
            "size": _mean((area / np.maximum(true_area, 1))[part][asked]),
            "paint": np.linalg.norm(rgb[part][painted].mean(0) - true_rgb[:GIVEN].mean(0)) if painted.any() else np.nan,
            "radii": _mean(off[part][asked]),
            "colour": _mean(there[part][asked]),
            "count": _mean(alone[part][asked]),
        }
        for name, value in values.items():
            rows[name].append(_round(value, 4))
    return rows


def swollen(frames: np.ndarray, truth: np.ndarray, colour: str) -> float:
    """Pixels of a colour over those in truth; nan where truth shows none."""
    area = paint(truth, colour)[1].sum()
    return float(paint(frames, colour)[1].sum() / area) if area else float("nan")


def coded(world: orrery.World, frames: np.ndarray) -> np.ndarray:
    """frames [T, H, W, 3] uint8 once through the VAE."""
    with torch.no_grad():
        latents = world.model.vae.encode(Video(frames, world.config.fps).to_tensor().to(world.device))
        return Video.from_tensor(world.model.vae.decode(latents), world.config.fps).frames


def evaluate(case: Case, world: orrery.World, free: np.ndarray | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the record of one clip, the videos of the two ways with overlap 2)."""
    start, count = Video(case.frames[:GIVEN], world.config.fps), len(case.frames)
    pictures, rows = {}, {}
    for way, overlap in WAYS:
        video = world.generate(
            case.caption, start, seed=case.noise, steps=STEPS, frames=count, handover=way, overlap=overlap
        ).frames
        rows[f"{way} {overlap}"] = measure(case, video, spans(overlap, count), free)
        if overlap == 2:
            pictures[way] = video
    for name, video in (("vae", coded(world, case.frames)), ("copy", copy_last(case.frames, GIVEN))):
        rows[name] = measure(case, video, spans(2, count), free)
    record = {"id": case.name, "group": case.group, "caption": case.caption, "noise": case.noise, "ways": rows}
    return record, pictures


def interval(differences: np.ndarray) -> list[float]:
    """[mean, low, high]: the bootstrap's 95 % interval over clips; nans are left out."""
    return list(bootstrap(differences, RESAMPLES))


def summarise(records: list[dict]) -> dict[str, Any]:
    """Means by chunk of every way, and paired differences latents - frames by chunk and late."""
    out: dict[str, Any] = {"clips": len(records), "by_chunk": {}, "paired": {}, "overlaps": {}}
    for name, (_, digits, _) in MEASURES.items():
        tables = {w: np.array([r["ways"][w][name] for r in records], float) for w in records[0]["ways"]}
        out["by_chunk"][name] = {
            way: [_round(_mean(column), digits + 1) for column in table.T] for way, table in tables.items()
        }
        out["paired"][name] = {
            str(overlap): [
                [_round(v, digits + 2) for v in interval(column)]
                for column in (tables[f"latents {overlap}"] - tables[f"frames {overlap}"]).T
            ]
            for overlap in (2, 1)
        }
        out["overlaps"][name] = {
            way: [_round(v, digits + 2) for v in interval(tables[f"{way} 2"][:, -1] - tables[f"{way} 1"][:, -1])]
            for way in ("latents", "frames")
        }
    return out


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _round(value: float, digits: int) -> float | None:
    return None if np.isnan(value) else round(float(value), digits)


@torch.no_grad()
def round_trips(case: Case, world: orrery.World) -> dict[str, Any]:
    """What the VAE does to the last 2 latents of a chunk, without a transformer.

    handover: relative L2 change of the 4th and 5th latent of a chunk of true frames by decoding, rounding and encoding
    the last 5 frames; of which the 4th is also turned from 4 frames into 1. rounds: that again and again.
    """
    vae, fps = world.model.vae, world.config.fps

    def encode(video: Video) -> torch.Tensor:
        return vae.encode(video.to_tensor().to(world.device))

    def change(new: torch.Tensor, old: torch.Tensor) -> float:
        return float((new - old).norm() / old.norm())

    chunk = encode(Video(case.frames[:NATIVE], fps))
    decoded = vae.decode(chunk)
    again = encode(Video.from_tensor(decoded, fps)[-GIVEN:])
    unrounded = vae.encode(decoded[:, :, -GIVEN:].clamp(-1, 1))
    true = case.frames[NATIVE - GIVEN : NATIVE]
    start = latents = encode(Video(true, fps))
    out: dict[str, Any] = {
        "first": change(again[:, :, 0], chunk[:, :, -2]),
        "second": change(again[:, :, 1], chunk[:, :, -1]),
        "second, not rounded": change(unrounded[:, :, 1], chunk[:, :, -1]),
        "first, of true frames": change(start[:, :, 0], chunk[:, :, -2]),
        "rounds": [],
    }
    for count in range(1, max(ROUNDS) + 1):
        video = Video.from_tensor(vae.decode(latents), fps)
        before, latents = latents, encode(video)
        row = {
            "latents": change(latents, start),
            "step": change(latents, before),
            "psnr": float(psnr(video.frames, true).mean()),
            "brightness": float(video.frames.mean() - true.mean()),
            "sharpness": float((laplacian(video.frames) ** 2).mean() / (laplacian(true) ** 2).mean()),
            "size": swollen(video.frames, true, case.colour),
        }
        if count in ROUNDS:
            out["rounds"].append({"count": count} | row)
    return out


def pulled_back(case: Case, world: orrery.World) -> list[dict[str, Any]]:
    """What a chunk makes of 5 frames that went 0, 1, 4 and 16 times through the VAE: the last 17 true frames, continued
    from such; PSNR and size of the object in the frames handed over and in the last 4 generated."""
    truth, rows = case.frames[-NATIVE:], []
    handed = truth[:GIVEN]
    for count in range(max(PULLED) + 1):
        if count in PULLED:
            made = world.generate(case.caption, Video(handed, world.config.fps), seed=case.noise, steps=STEPS).frames
            row: dict[str, Any] = {"count": count}
            for name, frames, true in (("handed", handed, truth[:GIVEN]), ("made", made[-4:], truth[-4:])):
                row[f"{name}_psnr"] = float(psnr(frames, true).mean())
                row[f"{name}_size"] = swollen(frames, true, case.colour)
            rows.append(row)
        handed = coded(world, handed)
    return rows


def gathered(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The two experiments: means over clips, whatever the nesting."""
    out: dict[str, Any] = {"clips": len(rows)}
    for key, value in rows[0].items():
        same = [row[key] for row in rows]
        if isinstance(value, list):
            out[key] = [gathered(list(each)) for each in zip(*same)]
        else:
            out[key] = _round(_mean(np.array(same, float)), 4)
    return out


def cell(value: float | None, digits: int) -> str:
    """A number in a table."""
    return "" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def difference_cell(triple: list[float | None], digits: int) -> str:
    """mean [low, high], with a star where the interval leaves out 0."""
    mean, low, high = triple
    if mean is None or low is None or high is None:
        return ""
    mark = "*" if low > 0 or high < 0 else ""
    return f"{mean:+.{digits}f}{mark} [{low:+.{digits}f}, {high:+.{digits}f}]"


def rows_of(header: list[str], body: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *body)]


def late_tables(summary: dict[str, Any]) -> list[str]:
    """Late frames: latents, frames, and their paired difference, by group."""
    lines = []
    for group, numbers in summary.items():
        lines += ["", f"### {group}: {numbers['clips']} clips", ""]
        body = []
        for name, (heading, digits, better) in MEASURES.items():
            if numbers["by_chunk"][name]["latents 2"][-1] is None:
                continue
            line = [heading, better]
            means, paired = numbers["by_chunk"][name], numbers["paired"][name]
            for overlap in ("2", "1"):
                line += [cell(means[f"{way} {overlap}"][-1], digits) for way in ("latents", "frames")]
                line.append(difference_cell(paired[overlap][-1], digits))
            line.append(difference_cell(numbers["overlaps"][name]["latents"], digits))
            line += [cell(means[way][-1], digits) for way in ("vae", "copy")]
            body.append(line)
        header = ["", "better", "latents 2", "frames 2", "latents - frames, 2", "latents 1", "frames 1",
                  "latents - frames, 1", "latents 2 - latents 1", "truth, coded", "copy last"]  # fmt: skip
        lines += rows_of(header, body)
    return lines


def chunk_tables(summary: dict[str, Any]) -> list[str]:
    """By chunk: the means of either way, and the paired difference; its interval is in the JSON."""
    lines = []
    for scene in FRAMES:
        numbers = summary[scene]
        for overlap in (2, 1):
            heads = ["", "", *(str(start) for start, _ in spans(overlap, FRAMES[scene])[:-1])]
            body = []
            for name, (heading, digits, _) in MEASURES.items():
                for way in ("latents", "frames"):
                    means = numbers["by_chunk"][name][f"{way} {overlap}"][:-1]
                    body.append([heading, way, *(cell(value, digits) for value in means)])
                triples = numbers["paired"][name][str(overlap)][:-1]
                body.append(["", "difference", *(difference_cell(t, digits).partition(" [")[0] for t in triples)])
            lines += ["", f"### {scene}, overlap {overlap}: chunks by their first new frame", "", *rows_of(heads, body)]
    return lines


def vae_tables(vae: dict[str, Any]) -> list[str]:
    """The two experiments, by scene."""
    lines = []
    for scene, found in vae.items():
        lines += [
            "",
            f"### {scene}: {found['clips']} clips",
            "",
            "Relative L2 change of latents of a chunk of true frames when its last 5 decoded frames are encoded again: "
            f"{found['second']:.3f} for the last one ({found['second, not rounded']:.3f} without rounding to uint8), "
            f"{found['first']:.3f} for the one before, which also turns from 4 frames into 1 "
            f"({found['first, of true frames']:.3f} if the true frames are encoded so).",
            "",
        ]
        header = ["round trips of 5 true frames", "latents, from the start", "latents, last trip", "PSNR, dB",
                  "brightness", "sharpness", "object size"]  # fmt: skip
        keys = (("latents", 3), ("step", 3), ("psnr", 1), ("brightness", 2), ("sharpness", 2), ("size", 2))
        lines += rows_of(header, [[f"{r['count']:.0f}", *(cell(r[k], d) for k, d in keys)] for r in found["rounds"]])
        header = ["round trips before 5 frames are given", "PSNR of these", "PSNR of the last 4 generated",
                  "object size in these", "object size in the last 4 generated"]  # fmt: skip
        keys = (("handed_psnr", 1), ("made_psnr", 1), ("handed_size", 2), ("made_size", 2))
        body = [[f"{r['count']:.0f}", *(cell(r[k], d) for k, d in keys)] for r in found["pulled"]]
        lines += ["", *rows_of(header, body)]
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The result as a page with tables."""
    about = f"Model `{result['model']}` ({result['weights']}), {STEPS} solver steps; {result['clips']} clips in "
    about += f"{result['seconds']:.0f} s; {made_line(result['made'])}"
    late = f"The last {LATE} frames of {FRAMES['drop']} (`drop`) or {FRAMES['push']} (`push`). Means over clips; of "
    late += "paired differences the bootstrap's 95 % interval, with a star if it leaves out 0 (1 in 20 does by chance)."
    lines = ["# Drift of long videos: latents or frames between chunks", "", about, "", LEGEND, "", "## Late", "", late]
    lines += late_tables(result["summary"])
    lines += ["", "## The VAE alone, and what the transformer takes back", *vae_tables(result["vae"])]
    lines += ["", "## By chunk", *chunk_tables(result["summary"]), "", "## Picture", ""]
    lines += ["![contact sheet](drift.png)", "", "Truth, latents, frames (overlap 2):", ""]
    return "\n".join([*lines, *(f"- {line}" for line in result["sheet"])])


def draw_sheet(path: Path, chosen: list[tuple[Case, dict[str, np.ndarray]]]) -> list[str]:
    """Truth above latents above frames: from the last given frame to the end; the captions, in order."""
    blocks, lines = [], []
    for case, videos in chosen:
        picks = np.linspace(GIVEN - 1, len(case.frames) - 1, 11).round().astype(int)
        rows = [np.concatenate(list(frames[picks]), 1) for frames in (case.frames, videos["latents"], videos["frames"])]
        blocks += [*rows, np.full((3, rows[0].shape[1], 3), 255, np.uint8)]
        lines.append(f"{case.name}, frames {', '.join(map(str, picks))}: {case.caption}")
    image = Image.fromarray(np.concatenate(blocks[:-1], 0))
    with atomic_file(path) as partial:
        image.resize((image.width * 2, image.height * 2), Image.Resampling.LANCZOS).save(partial)
    return lines


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=15, help="two thirds drop, half of which come to rest; else push")
    parser.add_argument("--seed", type=int, default=0, help="which held-out clips, and their noise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, for drift.json, .md and .png")
    options = parser.parse_args()
    for name, least, most in (("clips", 6, 1000), ("seed", 0, 400)):
        if not least <= (value := getattr(options, name)) <= most:
            raise InputError(f"--{name} is {value}; allowed is {least} to {most}")
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "drift.json")
    return options


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    options, began = arguments(), time.perf_counter()
    world = orrery.load("mini", device="cpu")
    first, pushes = HELD_OUT + 100_000 * options.seed, options.clips // 3
    cases = [*held_out("drop", options.clips - pushes, first), *held_out("push", pushes, first)]
    taken = np.any([case.occupied.any(0) for case in cases if case.scene == "push"], axis=0)
    free = {"drop": None, "push": ~grown(taken[None], MARGIN)[0]}
    records, chosen = [], {}
    trips: dict[str, list] = {"drop": [], "push": []}
    for number, case in enumerate(cases, start=1):
        record, videos = evaluate(case, world, free[case.scene])
        records.append(record)
        chosen.setdefault(case.scene, (case, videos))
        trips[case.scene].append(round_trips(case, world) | {"pulled": pulled_back(case, world)})
        print(f"{number}/{len(cases)} {case.name} {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    groups = {name: [r for r in records if r["group"].startswith(name)] for name in ("drop", "drop, rest", "push")}
    result = {
        "made": provenance("mujoco"),
        "model": world.name,
        "weights": world.hash,
        "sampling": vars(world.config.sampling) | {"steps": STEPS},
        "clips": len(records),
        "seconds": round(time.perf_counter() - began, 1),
        "summary": {name: summarise(group) for name, group in groups.items()},
        "vae": {scene: gathered(rows) for scene, rows in trips.items()},
        "sheet": draw_sheet(options.out / "drift.png", list(chosen.values())),
        "records": records,
    }
    for path in write_results("drift", result, markdown(result), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
