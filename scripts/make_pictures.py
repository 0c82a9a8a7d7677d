"""The pictures of README.md and docs: `python scripts/make_pictures.py [--only NAME ...] [--into docs/images]`.

hero.webp: above, worlds from words alone; below, what MuJoCo did, and what the model says after the first 5 frames.
failure.png: one such pair that went wrong. worlds.png: the three scenes with their ground truth. acting.webp: what a
robot does in MuJoCo, and the same actions in the tabletop model, from the first frame. transfer.webp: a simulation, its
edges, and two prompts. preview.webp: where early steps lead to, and the video. Prompts and seeds are written below; the
seeds are held out from training.
"""

import argparse
import textwrap
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import orrery
from orrery.cli.demo import redrawn
from orrery.cli.outputs import labelled_sheet
from orrery.files import atomic_file
from orrery.sim import simulate
from orrery.sim.store import PALETTE
from orrery.video import Video

WORDS = (
    ("a red ball falls and bounces, plain look", 2),
    ("a blue cube slides to the right, realistic look", 0),
    ("a robot arm pushes the green cube to the left, plain look", 1),
    ("a robot arm pushes the red cylinder closer, realistic look", 2),
)
HELD = (("drop", 1_000_002), ("drop", 1_000_005), ("push", 1_000_001), ("push", 1_000_006))
FAILURE = ("push", 1_000_018)
WATCHED, STEPS = ("a red ball falls and bounces, plain look", 2), (1, 2, 4, 8, 20)
ACTING, ACTING_FRAMES = (1_100_001, 1_100_004, 1_100_006, 1_100_009), 49
TILE, GAP, TEXT, GIVEN = 160, 6, 48, 5
PAPER, INK = (250, 250, 248), (30, 30, 34)


def beside_truth(world: orrery.World, scene: str, seed: int) -> tuple[str, Video, Video]:
    """Caption, MuJoCo's clip, and the model's after its first 5 frames."""
    clip = simulate(scene, seed, size=world.config.resolution[0], frames=world.config.frames)
    truth = Video(clip.frames[0], clip.fps)
    return clip.caption, truth, world.generate(clip.caption, start=truth[:GIVEN], seed=0)


def worlds(size: int = 96, columns: int = 8) -> Image.Image:
    """Each scene in both looks, then what is true about the second."""
    rows = []
    for scene, seed in (("drop", 1_000_004), ("push", 1_000_001), ("drive", 1_000_003)):
        plain, real = (simulate(scene, seed, look, size) for look in ("plain", "real"))
        picks = np.linspace(0, plain.frames.shape[1] - 1, columns).round().astype(int)
        rows += [np.concatenate(list(clip.frames[0, picks]), axis=1) for clip in (plain, real)]
        assert real.depth is not None and real.segmentation is not None
        near = 1 / real.depth[0, picks]
        rows.append(np.concatenate(list(np.repeat((255 * np.sqrt(near / near.max()))[..., None], 3, -1)), axis=1))
        rows.append(np.concatenate(list(PALETTE[real.segmentation[0, picks] % len(PALETTE)]), axis=1))
        if real.map is not None:
            rows.append(np.concatenate(list(real.map[0, picks]), axis=1))
    return Image.fromarray(np.concatenate([row.astype(np.uint8) for row in rows]))


def label(text: str, width: int, height: int = TEXT) -> np.ndarray:
    """Text on paper, wrapped: [height, width, 3]."""
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(11)
    draw.multiline_text((2, 2), textwrap.fill(text, width // 6), INK, font=font, spacing=1)
    return np.asarray(image)


def tiles(videos: list[Video], captions: list[str], column: str) -> list[np.ndarray]:
    """One row of the picture for every frame: a name on the left, videos with captions above them."""
    above = TEXT if any(captions) else GAP
    name = label(column, 74, TILE + above)
    rows = []
    for t in range(len(videos[0])):
        parts = [name]
        for video, caption in zip(videos, captions, strict=True):
            picture = np.asarray(Image.fromarray(video.frames[t]).resize((TILE, TILE), Image.Resampling.BICUBIC))
            gap = np.full((TILE + above, GAP, 3), PAPER, np.uint8)
            parts += [np.concatenate([label(caption, TILE, above), picture]), gap]
        rows.append(np.concatenate(parts, axis=1))
    return rows


def save_moving(rows: list[list[np.ndarray]], path: Path, quality: int) -> None:
    """A looping webp of rows of tiles that stand above each other."""
    frames = [Image.fromarray(np.concatenate(parts)) for parts in zip(*rows, strict=True)]
    durations = [84] * (len(frames) - 1) + [900]
    with atomic_file(path) as partial:
        frames[0].save(partial, save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=quality)


def save_sheet(rows: dict[str, Video], path: Path) -> None:
    """A webp with a row a video."""
    png = BytesIO()
    labelled_sheet(rows, png)
    with atomic_file(path) as partial:
        Image.open(png).save(partial, format="WEBP", quality=90)


def acting(_: orrery.World, path: Path) -> None:
    """MuJoCo above, the tabletop model told the same actions below."""
    world = orrery.load("tabletop")
    clips = [simulate("tabletop", seed, frames=ACTING_FRAMES, truth=False) for seed in ACTING]
    truth = [Video(clip.frames[0], clip.fps) for clip in clips]
    drawn = [world.rollout(video[:1], clip.actions[:-1]) for video, clip in zip(truth, clips, strict=True)]
    rows = [tiles(truth, [""] * len(clips), "MuJoCo"), tiles(drawn, [""] * len(clips), "the model,\nthe same\nactions")]
    save_moving(rows, path, 80)


def hero(world: orrery.World, path: Path) -> None:
    spoken = [world.generate(prompt, seed=seed) for prompt, seed in WORDS]
    held = [beside_truth(world, *which) for which in HELD]
    rows = [
        tiles(spoken, [prompt for prompt, _ in WORDS], "from words"),
        tiles([truth for _, truth, _ in held], [caption for caption, _, _ in held], "MuJoCo"),
        tiles([video for _, _, video in held], [""] * len(held), "Orrery,\nafter the\nfirst 5\nframes"),
    ]
    save_moving(rows, path, 85)


def failure(world: orrery.World, path: Path) -> None:
    caption, truth, video = beside_truth(world, *FAILURE)
    picks = np.linspace(0, len(truth) - 1, 6).round().astype(int)
    lines = [np.concatenate(list(v.frames[picks]), axis=1) for v in (truth, video)]
    sheet = Image.fromarray(np.concatenate(lines)).resize((6 * 128, 2 * 128), Image.Resampling.NEAREST)
    with atomic_file(path) as partial:
        sheet.save(partial, format="PNG")
    print(f"the failure: {caption}")


def transfer(world: orrery.World, path: Path) -> None:
    save_sheet(redrawn(world, seed=0)[2], path)


def preview(world: orrery.World, path: Path) -> None:
    rows: dict[str, Video] = {}

    def show(step: int, steps: int, sketch: Video) -> None:
        if step in STEPS:
            rows[f"step {step}/{steps}"] = sketch

    prompt, seed = WATCHED
    video = world.generate(prompt, seed=seed, show=show)
    save_sheet(rows | {"the video": video}, path)


def scenes(_: orrery.World, path: Path) -> None:
    with atomic_file(path) as partial:
        worlds().save(partial, format="PNG")


PICTURES: dict[str, Callable[[orrery.World, Path], None]] = {
    "hero.webp": hero,
    "failure.png": failure,
    "worlds.png": scenes,
    "acting.webp": acting,
    "transfer.webp": transfer,
    "preview.webp": preview,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--into", type=Path, default=Path("docs/images"))
    names = [name.partition(".")[0] for name in PICTURES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="these alone")
    options = parser.parse_args()
    world = orrery.load(options.model)
    for name, draw in PICTURES.items():
        if name.partition(".")[0] in options.only:
            draw(world, options.into / name)
            print(options.into / name)


if __name__ == "__main__":
    main()
