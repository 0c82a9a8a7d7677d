"""`orrery demo` (called by `make demo`): one world from words, one from an image, one from a video, and the truth; then
one simulated clip drawn anew after its edges, twice; and what a robot's actions do, in MuJoCo and in the model."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

if TYPE_CHECKING:
    from orrery.video import Video
    from orrery.weights import ModelConfig
    from orrery.world import World

COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
# Seeds far above those of any training set.
WORDS = "a red ball falls and bounces, plain look"
IMAGE = ("push", 9_000_000)
VIDEO = ("drop", 9_000_000)
TRANSFER = ("drop", 9_000_010)
ACTING, ACTING_FRAMES = ("tabletop", 9_000_023), 33


def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder to write")] = Path("out/demo"),
    model: Annotated[str, typer.Option(help="a name from `orrery models`, or the folder of a model")] = "mini",
    seed: Annotated[int, typer.Option(help="of the model's noise")] = 0,
) -> None:
    """Generate three worlds, and lay the last one beside what MuJoCo really did; then draw a simulated clip
    anew, by its edges and two prompts; and predict what a robot's actions do."""
    from orrery import load
    from orrery.cli.outputs import generate_to
    from orrery.errors import InputError

    began = time.perf_counter()
    world = load(model)
    world.request(WORDS, seed=seed)  # refuses a wrong seed before there is a folder
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {output}: {error.strerror}") from error
    typer.echo(f"{world}, loaded in {time.perf_counter() - began:.1f} s\n")

    began = time.perf_counter()
    generate_to(output / "1_from_words.mp4", world, WORDS, seed=seed)
    typer.echo(f"1. from words: {WORDS}\n   {output}/1_from_words.mp4")

    caption, real = _simulated(*IMAGE, world.config)
    image = real[0]
    image.save(output / "2_start.png")
    generate_to(output / "2_from_image.mp4", world, caption, start=image, seed=seed)
    typer.echo(f"2. from an image ({output}/2_start.png): {caption}\n   {output}/2_from_image.mp4")

    caption, real = _simulated(*VIDEO, world.config)
    given = world.factors.temporal + 1
    video = generate_to(output / "3_from_video.mp4", world, caption, start=real[:given], seed=seed)
    typer.echo(f"3. from the first {given} frames of a simulation: {caption}\n   {output}/3_from_video.mp4")

    both = side_by_side(real, video)
    both.save(output / "3_beside_mujoco.mp4", scale=4)
    both.contact_sheet(output / "3_beside_mujoco.png", columns=len(both), frames=len(both))
    psnr, still = (signal_to_noise(real[given:], guess) for guess in (video[given:], _standing(real, given)))
    typer.echo(f"   {output}/3_beside_mujoco.png and .mp4: MuJoCo above, the model below")
    typer.echo(
        f"   its {len(video) - given} frames: {psnr:.1f} dB PSNR against MuJoCo; a still picture has {still:.1f} dB"
    )
    if "edge" in world.config.controls:
        _transfer(world, output, seed)
    if model == "mini":
        _act(output, seed)
    seconds = time.perf_counter() - began
    typer.echo(f"\nAll of it in {seconds:.1f} s. Beside each: a contact sheet and a record of its settings.")


def redrawn(world: "World", seed: int) -> tuple[str, dict[str, str], dict[str, "Video"]]:
    """A plain simulated clip's caption, two other prompts by name; the clip, its edges and what the prompts make."""
    caption, real = _simulated(*TRANSFER, world.config, look="plain")
    words, _, _ = caption.rpartition(", ")
    colour = next(each for each in COLOURS if each in words)
    other = next(each for each in reversed(COLOURS) if each not in words)
    prompts = {"realistic": f"{words}, realistic look", other: f"{words.replace(colour, other)}, plain look"}
    rows = {"MuJoCo": real}
    for name, prompt in prompts.items():
        result = world.transfer(prompt, real, ["edge"], seed=seed)
        rows |= {"edge": result.controls["edge"], name: result.video}
    return caption, prompts, rows


def _transfer(world: "World", output: Path, seed: int) -> None:
    """One plain simulated clip, its edges, and what two other prompts make of them."""
    from orrery.cli.outputs import labelled_sheet
    from orrery.files import atomic_file

    caption, prompts, rows = redrawn(world, seed)
    for label, video in rows.items():
        video.save(output / f"4_{label.lower()}.mp4", scale=8)
    with atomic_file(output / "4_transfer.png") as partial:
        labelled_sheet(rows, partial)
    typer.echo(f"4. the edges of a simulation ({caption}), drawn anew by two prompts:")
    typer.echo("".join(f"   {prompt}\n   {output}/4_{name}.mp4\n" for name, prompt in prompts.items()), nl=False)
    typer.echo(f"   {output}/4_transfer.png: the simulation, its edges, and both")


def _act(output: Path, seed: int) -> None:
    """A robot's actions in MuJoCo, and the same ones in the tabletop model from the first frame on."""
    from orrery import load
    from orrery.sim import simulate
    from orrery.video import Video

    world = load("tabletop")
    clip = simulate(*ACTING, size=world.config.resolution[0], frames=ACTING_FRAMES, truth=False)
    real = Video(clip.frames[0], clip.fps)
    both = side_by_side(real, world.rollout(real[:1], clip.actions[:-1], seed=seed))
    both.save(output / "5_acting.mp4", scale=6)
    both.contact_sheet(output / "5_acting.png", columns=9, frames=9)
    typer.echo(f"5. what a robot's {len(clip.actions) - 1} actions do, from one picture on:")
    typer.echo(f"   {output}/5_acting.png and .mp4: MuJoCo above, the model below; drive it yourself: make play")


def _simulated(scene: str, seed: int, config: "ModelConfig", look: str | None = None) -> tuple[str, "Video"]:
    """Caption and frames of a simulated clip in the model's native size."""
    from orrery.sim import simulate
    from orrery.video import Video

    height, width = config.resolution
    clip = simulate(scene, seed, look, size=max(height, width), frames=config.frames, truth=False)
    return clip.caption, Video(clip.frames[0], clip.fps).resize(height, width)


def _standing(real: "Video", given: int) -> "Video":
    """The last given frame, repeated: what a model would answer that knows nothing of motion."""
    from orrery.video import Video

    return Video(np.repeat(real[given - 1].frames, len(real) - given, axis=0), real.fps)


def side_by_side(above: "Video", below: "Video") -> "Video":
    """Both as one video, with a white line between."""
    from orrery.video import Video

    line = np.full((len(above), 2, above.width, 3), 255, np.uint8)
    return Video(np.concatenate([above.frames, line, below.frames], axis=1), above.fps)


def signal_to_noise(truth: "Video", guess: "Video") -> float:
    """PSNR in dB over all pixels."""
    error = float(np.mean((truth.frames.astype(np.float64) - guess.frames.astype(np.float64)) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-9)))
