"""`orrery rollout`: what happens when a robot acts, from its actions in a file or in a dataset."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orrery.cli import options as opt

if TYPE_CHECKING:
    import numpy as np


def run(
    output: Annotated[Path, typer.Option("--output", "-o", help="The .mp4 to write.", show_default=False)],
    start: Annotated[
        Path | None, typer.Option(help="How it begins: an image, or a video whose last frames are the past.")
    ] = None,
    actions: Annotated[
        Path | None, typer.Option(help="What is done: .npy [N, A], .csv with a row an action, or .json.")
    ] = None,
    dataset: Annotated[
        Path | None,
        typer.Option(
            help="Take both from an episode instead (LeRobot, Bridge, `orrery sim`); the truth stands beside."
        ),
    ] = None,
    episode: Annotated[int, typer.Option(help="Which episode of the dataset.")] = 0,
    frame: Annotated[int, typer.Option(help="Of which it begins with this frame.")] = 0,
    camera: Annotated[str | None, typer.Option(help="Of a dataset with several.")] = None,
    model: opt.Model = "tabletop",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Solver steps.", show_default="the model's")] = None,
    prompt: Annotated[str, typer.Option(help="Words, for a model that was trained with some.")] = "",
    scale: Annotated[
        int | None, typer.Option(help="Enlarge so many times for the eye.", show_default="so that it is easy to see")
    ] = None,
    preset: opt.Preset = None,
    speed: opt.Speeds = None,
    device: opt.Device = None,
    dtype: opt.Dtype = None,
    lora: opt.Loras = None,
) -> None:
    """Predict what actions do, chunk after chunk, as far as they reach.

    A row of actions acts between one frame and the next. Writes OUTPUT (H.264), its contact sheet and a record of all
    settings. `orrery models NAME` says what an action of a model is.

    Example: orrery rollout --dataset data/tabletop --episode 3 -o episode3.mp4
    """
    import numpy as np

    from orrery.cli.outputs import EASY_TO_SEE, check_output, describe_model, progress_bar, write_all
    from orrery.errors import InputError
    from orrery.video import Video

    check_output(output, start, scale)
    if (dataset is None) == (start is None) or (start is None) != (actions is None):
        raise InputError("what is done? allowed are --start with --actions, or --dataset with --episode")
    truth: Video | None = None
    if dataset is not None:
        truth, deeds = _episode(dataset, episode, frame, camera)
        begins: Any = truth[:1]
    else:
        assert actions is not None
        begins, deeds = start, read_actions(actions)
    world = opt.load_world(model, device, lora, preset, speed, dtype=dtype)
    with progress_bar("acting") as tell:
        video = world.rollout(begins, deeds, seed=seed, steps=steps, prompt=prompt, progress=tell)
    shown = video
    if truth is not None:
        real = truth.resize(video.height, video.width).frames[: len(video)]
        shown = Video(np.concatenate([video.frames[: len(real)], real], axis=2), video.fps)
    record = {
        "start": None if start is None else str(start),
        "actions": None if actions is None else str(actions),
        "dataset": None if dataset is None else {"path": str(dataset), "episode": episode, "frame": frame},
        "seed": seed,
        "steps": steps or world.config.sampling.steps,
        "prompt": prompt,
        "frames": len(video),
        "fps": video.fps,
        "size": [video.height, video.width],
        **describe_model(world),
    }
    size = max(1, round(EASY_TO_SEE / max(shown.height, shown.width)))
    write_all(shown, output, scale or size, record)
    beside = "" if truth is None else "; left the model, right what happened"
    typer.echo(f"{output}: {len(video)} frames at {video.fps:g} a second, by {world.name}{beside}")


def _episode(dataset: Path, episode: int, frame: int, camera: str | None) -> Any:
    """(Video from `frame` on, actions from there on [N, A])."""
    from orrery.data.episodes import open_episodes
    from orrery.errors import InputError
    from orrery.video import Video

    episodes = open_episodes(dataset, camera)
    if not 0 <= episode < len(episodes):
        raise InputError(f"--episode is {episode}; allowed are 0 to {len(episodes) - 1}")
    frames, actions = episodes.frames(episode), episodes.actions(episode)
    if not 0 <= frame < len(frames) - 1:
        raise InputError(f"--frame is {frame}; allowed are 0 to {len(frames) - 2}")
    return Video(frames[frame:], episodes.fps), actions[frame:]


def read_actions(path: Path) -> "np.ndarray":
    """Actions [N, A] float32 of a .npy, .csv (a heading is passed over) or .json (a list of lists) file.

    Raises:
        InputError: the file cannot be read, or holds no table of numbers.
    """
    import json

    import numpy as np

    from orrery.errors import InputError, one_line

    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".csv":
            lines = path.read_text(encoding="utf-8").splitlines()
            heading = bool(lines) and any(c.isalpha() and c not in "eE" for c in lines[0])
            rows = lines[1:] if heading else lines
            values = np.loadtxt(rows, delimiter=",", ndmin=2) if rows else np.zeros((0, 0))
        elif path.suffix == ".json":
            values = np.array(json.loads(path.read_text(encoding="utf-8")), dtype=np.float64)
        else:
            raise InputError(f"{path}: its suffix is {path.suffix!r}; allowed are .npy, .csv, .json")
        values = values.astype(np.float32)
    except InputError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"cannot read actions from {path}: {one_line(error)}") from None
    if values.ndim != 2 or not values.size:
        raise InputError(f"{path} holds {list(values.shape)} numbers; allowed is a table [N, A]")
    return values
