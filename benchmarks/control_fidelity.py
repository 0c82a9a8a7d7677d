"""Is control obeyed? `python benchmarks/control_fidelity.py [--clips 48]`.

Held-out clips of MuJoCo in the plain look are drawn anew under each kind of control alone (edge, blur: preset medium;
depth, seg: exact, from the simulator), under all four at a quarter each, and without control, with the same noise: with
the clip's own caption, of which the clip itself is the truth, and with the caption that asks for the realistic look.
Four numbers of PAI-Bench-Transfer (`orrery.eval.control`) say how much of the structure is kept. Depth and masks are
seen by a perceiver that was trained on renders of both looks; what it gets wrong on renders stands in the same tables.
Drawn videos are kept in --cache, so that a killed run goes on. Writes JSON, Markdown and a contact sheet.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

import orrery
from orrery.errors import InputError, OrreryError
from orrery.eval.control import blur_ssim, depth_si_rmse, edge_f1, mask_miou
from orrery.eval.perception import CLASSES, Perceiver, class_map, inverse_depth, perceive, train_perceiver
from orrery.files import atomic_file, check_writable
from orrery.kinds import KINDS
from orrery.sim import simulate
from orrery.sim.looks import PHRASE
from orrery.video import Video
from orrery.weights.store import part_hash
from orrery.world import Signal

sys.path.insert(0, str(Path(__file__).parent))  # also when a test loads this file by its path
from common import RESULTS, load_average, made_line, provenance, table, write_results
from drift import interval

HELD_OUT = 1_000_000  # seeds from here on are in no training set
JUDGE = 2_000_000  # seeds of what the judge is trained on
JUDGE_EPISODES, JUDGE_STEPS, JUDGE_WIDTH = 96, 1000, 32
SCENES = ("drop", "push")
LOOKS = ("plain", "real")
CACHE = Path(__file__).parents[1] / "runs" / "transfers"
WAYS: dict[str, dict[str, float]] = {kind: {kind: 1.0} for kind in KINDS}
WAYS |= {"all": dict.fromkeys(KINDS, 0.25), "none": {}}
NAMES = {kind: f"{kind} alone" for kind in KINDS} | {"all": "all four, 0.25 each", "none": "no control"} | {
    "plain": "the clip itself", "plain, coded": "the clip through the VAE",
    "real": "its realistic render", "real, coded": "the realistic render through the VAE"}  # fmt: skip
# measure -> (heading, digits, 1: more is better, -1: less)
MEASURES = {
    "blur": ("blur SSIM", 3, 1),
    "edge": ("edge F1", 3, 1),
    "depth": ("depth si-RMSE", 4, -1),
    "seg": ("mask mIoU", 3, 1),
    "recall": ("mask recall", 3, 1),
    "named": ("IoU by name", 3, 1),
}
LEGEND = f"""\
Every number is the mean over clips with the bootstrap's 95 % interval. *Blur SSIM*, *edge F1*: against the plain clip.
*Depth si-RMSE*: inverse depth as the judge sees it against the simulator's, in shares of the clip's nearest point; in
each frame the median is fitted, the sky does not count; less is better. *Mask mIoU*: mean IoU over space and time of
the things that are found with an IoU above 0.1, whatever they are taken for; *recall*: the share of things found so;
*IoU by name*: of every thing that the caption names, the IoU of what the judge takes for that very thing, 0 if nothing.
The judge: a U-Net of width {JUDGE_WIDTH}, {JUDGE_STEPS} steps on both looks of {JUDGE_EPISODES} other episodes."""


@dataclass(frozen=True)
class Case:
    """An episode in both looks. frames: look -> [T, H, W, 3] uint8. depth [T, H, W] metres, inf for the sky; ids
    [T, H, W]; things: id -> a name of `CLASSES`."""

    name: str
    scene: str
    seed: int
    caption: str
    fps: float
    frames: Mapping[str, np.ndarray]
    depth: np.ndarray
    ids: np.ndarray
    things: Mapping[int, str]

    def prompt(self, look: str) -> str:
        """What the clip shows, in that look."""
        return self.caption.replace(PHRASE["plain"], PHRASE[look])

    @property
    def video(self) -> Video:
        """What is transferred."""
        return Video(self.frames["plain"], self.fps)

    def signals(self, weights: Mapping[str, float]) -> dict[str, Signal]:
        """Controls of these weights: edge and blur of the plain frames, depth and segmentation exact."""
        exact = {"depth": self.depth, "seg": self.ids}
        return {kind: Signal(exact.get(kind), weight) for kind, weight in weights.items()}

    @property
    def classes(self) -> np.ndarray:
        """[T, H, W] uint8 index into `CLASSES`."""
        return class_map(self.ids, self.things)


def make_case(scene: str, seed: int) -> Case:
    """An episode out of MuJoCo."""
    plain, real = (simulate(scene, seed, look) for look in LOOKS)
    assert plain.depth is not None and plain.segmentation is not None
    if not np.array_equal(plain.position, real.position):
        raise OrreryError(f"{scene} {seed} moves differently in the two looks")
    things = {i: thing.colour or "arm" for i, thing in enumerate(plain.things, start=1)}
    frames = {"plain": plain.frames[0], "real": real.frames[0]}
    truth = (plain.depth[0], plain.segmentation[0], things)
    return Case(f"{scene}-{seed:07d}", scene, seed, plain.caption, plain.fps, frames, *truth)


def make_cases(first: int, count: int) -> list[Case]:
    """`count` episodes with seeds from `first`, drop and push by turns."""
    return [make_case(SCENES[i % 2], first + i // 2) for i in range(count)]


def train_judge(cases: Sequence[Case]) -> Perceiver:
    """The judge, trained on both looks of `cases`."""
    frames = np.concatenate([case.frames[look] for case in cases for look in LOOKS])
    classes = np.concatenate([case.classes for case in cases for _ in LOOKS])
    inverse = np.concatenate([inverse_depth(case.depth) for case in cases for _ in LOOKS])
    return train_perceiver(frames, classes, inverse, steps=JUDGE_STEPS, width=JUDGE_WIDTH)


class Studio:
    """Draws episodes anew, and keeps what it drew. A video is found again by everything that makes it but the code:
    weights of model and branches, sampling, prompt, control, noise and the episode's pixels and depth."""

    def __init__(self, world: orrery.World, cache: Path) -> None:
        self.world, self.cache = world, cache
        self.branches = {kind: part_hash(world.files, f"control-{kind}") for kind in world.config.controls}
        self.seconds: list[float] = []  # of every video that was not there yet
        cache.mkdir(parents=True, exist_ok=True)
        check_writable(cache / "any.npz")

    def draw(self, case: Case, look: str, way: str) -> np.ndarray:
        """[T, H, W, 3] uint8: the episode with the caption of that look under the control of `WAYS`."""
        path = self.cache / f"{case.name}-{look}-{way}-{self._key(case, look, way)}.npz"
        if path.is_file():
            with np.load(path, allow_pickle=False) as archive:
                return archive["frames"]
        began = time.perf_counter()
        frames = self._draw(case, case.prompt(look), WAYS[way])
        self.seconds.append(time.perf_counter() - began)
        with atomic_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, frames=frames)
        return frames

    def _draw(self, case: Case, prompt: str, weights: Mapping[str, float]) -> np.ndarray:
        if not weights:
            return self.world.generate(prompt, seed=case.seed).frames
        return self.world.transfer(prompt, case.video, case.signals(weights), seed=case.seed).video.frames

    def _key(self, case: Case, look: str, way: str) -> str:
        made_of = {kind: (weight, self.branches[kind]) for kind, weight in WAYS[way].items()}
        about = [self.world.hash, vars(self.world.config.sampling), case.prompt(look), case.seed, made_of]
        digest = hashlib.sha256(json.dumps(about, default=str).encode())
        for array in (case.frames["plain"], case.depth, case.ids):
            digest.update(array.tobytes())
        return digest.hexdigest()[:12]

    def controls(self, case: Case) -> dict[str, np.ndarray]:
        """The control videos of an episode, as the branches see them."""
        request = self.world.transfer_request(case.caption, case.video, case.signals(dict.fromkeys(KINDS, 1.0)))
        return {signal.kind: signal.video.frames for signal in request.signals}

    @torch.no_grad()
    def coded(self, frames: np.ndarray) -> np.ndarray:
        """frames [T, H, W, 3] uint8 once through the VAE: what no drawn video can surpass."""
        vae, fps = self.world.model.vae, self.world.config.fps
        latents = vae.encode(Video(frames, fps).to_tensor().to(self.world.device))
        return Video.from_tensor(vae.decode(latents), fps).frames


def measure(case: Case, frames: np.ndarray, judge: Perceiver) -> dict[str, float]:
    """MEASURES of a video of that episode."""
    seen, plain = perceive(judge, frames), case.frames["plain"]
    inverse = inverse_depth(case.depth)
    truth = {name: case.ids == number for number, name in case.things.items()}
    masks = {name: seen.classes == CLASSES.index(name) for name in truth}  # as the caption prompts the published judge
    score = mask_miou(masks, truth)
    named = [(masks[n] & truth[n]).sum() / (masks[n] | truth[n]).sum() for n in truth]
    return {
        "blur": blur_ssim(frames, plain),
        "edge": edge_f1(frames, plain).f1,
        "depth": depth_si_rmse(seen.inverse, inverse / inverse.max()),
        "seg": score.miou,
        "recall": score.recall,
        "named": float(np.mean(named)),
    }


def evaluate(case: Case, studio: Studio, judge: Perceiver) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the record of one episode, what was drawn: "LOOK WAY" -> frames)."""
    drawn = {f"{look} {way}": studio.draw(case, look, way) for look in LOOKS for way in WAYS}
    videos = dict(drawn)
    for look in LOOKS:
        videos |= {look: case.frames[look], f"{look}, coded": studio.coded(case.frames[look])}
    measured = {name: measure(case, frames, judge) for name, frames in videos.items()}
    rounded = {name: {key: round(value, 5) for key, value in row.items()} for name, row in measured.items()}
    return {"id": case.name, "scene": case.scene, "caption": case.caption, "videos": rounded}, drawn


def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means with intervals of every video, and of the paired differences to no control: name -> measure -> triple."""

    def values(name: str, key: str) -> np.ndarray:
        return np.array([record["videos"][name][key] for record in records])

    names = list(records[0]["videos"])
    means = {name: {key: triple(values(name, key)) for key in MEASURES} for name in names}
    margins = {
        name: {key: triple(values(name, key) - values(f"{name.split()[0]} none", key)) for key in MEASURES}
        for name in names
        if name.split()[-1] in WAYS and not name.endswith(" none")
    }
    return {"clips": len(records), "means": means, "margins": margins}


def triple(values: np.ndarray) -> list[float]:
    """[mean, low, high] of the bootstrap over clips."""
    return [round(value, 5) for value in interval(values)]


def cell(numbers: Sequence[float], digits: int, sign: str = "") -> str:
    """mean [low, high]."""
    mean, low, high = (f"{value:{sign}.{digits}f}" for value in numbers)
    return f"{mean} [{low}, {high}]"


def own(way: str) -> Sequence[str]:
    """The measures that a kind of control is there for."""
    return KINDS if way == "all" else (way,)


def means_table(summary: Mapping[str, Any], look: str) -> list[str]:
    """One prompt: every way of control, above what a perfect video would reach."""
    rows, floors = [], ["plain", "plain, coded"] + (["real", "real, coded"] if look == "real" else [])
    for way in (*WAYS, *floors):
        numbers = summary["means"][f"{look} {way}" if way in WAYS else way]
        cells = [cell(numbers[key], digits) for key, (_, digits, _) in MEASURES.items()]
        if way in WAYS and way != "none":  # the measure that the control is there for, in bold
            cells = [f"**{c}**" if k in own(way) else c for k, c in zip(MEASURES, cells, strict=True)]
        rows.append([NAMES[way], *cells])
    return table(["", *(heading for heading, _, _ in MEASURES.values())], rows)


def margins_table(summary: Mapping[str, Any]) -> list[str]:
    """How much better than without control each kind is, on its own measure and on the others."""
    rows = []
    for look in LOOKS:
        for way in list(WAYS)[:-1]:
            numbers, cells = summary["margins"][f"{look} {way}"], []
            for key, (_, digits, better) in MEASURES.items():
                mean, low, high = numbers[key]
                mark = "" if low <= 0 <= high else "*" if mean * better > 0 else " (worse)"
                text = cell(numbers[key], digits, "+") + mark
                cells.append(f"**{text}**" if key in own(way) else text)
            rows.append([look, NAMES[way], *cells])
    return table(["prompt", "", *(heading for heading, _, _ in MEASURES.values())], rows)


def scenes_table(scenes: Mapping[str, Any]) -> list[str]:
    """The means of either scene, without intervals."""
    rows = []
    for look in LOOKS:
        for way in WAYS:
            cells = [
                " / ".join(f"{scenes[scene]['means'][f'{look} {way}'][key][0]:.{digits}f}" for scene in SCENES)
                for key, (_, digits, _) in MEASURES.items()
            ]
            rows.append([look, NAMES[way], *cells])
    return table(["prompt", "", *(heading for heading, _, _ in MEASURES.values())], rows)


def markdown(result: Mapping[str, Any]) -> str:
    """The result as a page with tables."""
    summary = result["summary"]["all"]
    branches = ", ".join(f"{kind} {digest}" for kind, digest in result["branches"].items())
    about = f"Model `{result['model']}` ({result['weights']}; branches {branches}); {summary['clips']} clips in "
    about += (
        f"{result['seconds']:.0f} s, of which {result['drawn']} videos were drawn anew; {made_line(result['made'])}"
    )
    lines = ["# Control: is it obeyed?", "", about, "", LEGEND, "", "## The clip's own caption (plain look)", ""]
    lines += [*means_table(summary, "plain"), "", "## The same, with the caption of the realistic look", ""]
    lines += ["Blur SSIM and edge F1 are still against the plain clip: colours and textures that the look brings along "
              "count against it, as they do in the realistic render.", ""]  # fmt: skip
    lines += [*means_table(summary, "real"), "", "## Over no control", ""]
    lines += ["Paired differences, same clip and noise; in bold what the control is there for; a star: 0 is outside "
              "the interval, on the good side.", ""]  # fmt: skip
    lines += [*margins_table(summary), "", "## By scene: drop / push", "", *scenes_table(result["summary"])]
    lines += ["", "## Picture", "", "![contact sheet](control_fidelity.png)", ""]
    return "\n".join([*lines, *(f"- {line}" for line in result["sheet"])])


def sheet_rows(case: Case, controls: Mapping[str, np.ndarray], drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Label -> frames, for one episode."""
    rows: dict[str, Any] = {"input": case.frames["plain"], "real render": case.frames["real"]}
    for way in WAYS:
        label = NAMES[way].split(",")[0].removesuffix(" alone")
        if way in KINDS:
            rows[f"{label} control"] = controls[way]
        rows |= {f"{label}, {look}": drawn[f"{look} {way}"] for look in LOOKS}
    return rows


def draw_sheet(
    path: Path, columns: Sequence[Mapping[str, np.ndarray]], shown: int = 6, margin: int = 110, zoom: int = 2
) -> None:
    """Episodes side by side, each label -> frames [T, H, W, 3], of which `shown` are seen; labels in a margin."""
    first = next(iter(columns[0].values()))
    picks, side = np.linspace(0, len(first) - 1, shown).round().astype(int), first.shape[1] * zoom
    gap = 4 * zoom
    width = margin + len(columns) * (shown * side + gap) - gap
    image = Image.new("RGB", (width, len(columns[0]) * side), "white")
    pen = ImageDraw.Draw(image)
    for row, label in enumerate(columns[0]):
        pen.text((4, row * side + side // 2 - 6), label, fill="black")
        for column, rows in enumerate(columns):
            strip = Image.fromarray(np.concatenate(list(rows[label][picks]), 1))
            place = (margin + column * (shown * side + gap), row * side)
            image.paste(strip.resize((shown * side, side), Image.Resampling.LANCZOS), place)
    with atomic_file(path) as partial:
        image.quantize(256, dither=Image.Dither.NONE).save(partial, format="PNG", optimize=True)  # a third of the bytes


def open_world(model: str, kinds: Sequence[str]) -> orrery.World:
    """The model on the CPU.

    Raises:
        InputError: it lacks a branch of these kinds.
    """
    world = orrery.load(model, device="cpu")
    if missing := [kind for kind in kinds if kind not in world.config.controls]:
        raise InputError(f"{model} has no control branch for {', '.join(missing)}; `orrery train` makes them")
    return world


def progress(began: float) -> Callable[[str], None]:
    """A function that prints a line with the seconds since `began` to stderr."""
    return lambda line: print(f"{time.perf_counter() - began:6.0f} s  {line}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48, help="held-out clips, half of either scene")
    parser.add_argument("--model", default="mini", help="a name or a model folder, with branches of all four kinds")
    parser.add_argument("--cache", type=Path, default=CACHE, help="a folder that keeps what was drawn")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder, for control_fidelity.json, .md and .png")
    options = parser.parse_args()
    if not 4 <= options.clips <= 1000 or options.clips % 2:
        raise InputError(f"--clips is {options.clips}; allowed are even numbers from 4 to 1000")
    options.out.mkdir(parents=True, exist_ok=True)
    check_writable(options.out / "control_fidelity.json")
    return options


def main() -> int:
    """Runs the benchmark; 0, or 2 on bad input."""
    options, began, load = arguments(), time.perf_counter(), load_average()
    tell, world = progress(began), open_world(options.model, KINDS)
    studio = Studio(world, options.cache)
    cases = make_cases(HELD_OUT, options.clips)
    judge = train_judge(make_cases(JUDGE, JUDGE_EPISODES))
    tell("the judge is trained")
    records, columns = [], []
    for number, case in enumerate(cases, start=1):
        record, drawn = evaluate(case, studio, judge)
        records.append(record)
        if number <= len(SCENES):
            columns.append(sheet_rows(case, studio.controls(case), drawn))
        tell(f"{number}/{len(cases)} {case.name}")
    draw_sheet(options.out / "control_fidelity.png", columns)
    groups = {"all": records} | {scene: [r for r in records if r["scene"] == scene] for scene in SCENES}
    result = {
        "made": provenance("mujoco", "opencv-python-headless"),
        "load": {"before": load, "after": load_average()},
        "model": Path(world.name).name,
        "weights": world.hash,
        "branches": studio.branches,
        "sampling": vars(world.config.sampling),
        "ways": WAYS,
        "seconds": round(time.perf_counter() - began, 1),
        "drawn": len(studio.seconds),
        "seconds_a_video": round(float(np.mean(studio.seconds)), 2) if studio.seconds else None,
        "summary": {name: summarise(group) for name, group in groups.items()},
        "sheet": [f"{case.name}: {case.caption}" for case in cases[: len(SCENES)]],
        "records": records,
    }
    for path in write_results("control_fidelity", result, markdown(result), options.out):
        print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrreryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
