"""What a generated video leaves on disk: the mp4, a contact sheet and a record of all settings, all of them or none.

A transfer leaves more: its control videos, and a video and a sheet with input, controls and result beside each other.
"""

import dataclasses
import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from orrery import __version__
from orrery.errors import InputError
from orrery.files import atomic_file, check_writable

if TYPE_CHECKING:
    from orrery.video import Video
    from orrery.world import Request, Transferred, World

MOST_SCALE = 64
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
EASY_TO_SEE = 768  # pixels: smaller videos are enlarged to about this
WIDEST = 1920  # pixels: what shows several videos beside each other is made smaller than that
GAP = 2  # pixels between videos beside each other
PREVIEW_ROWS = 10
SHEET_COLUMNS, SHEET_HEIGHT, SHEET_LABEL = 8, 144, 96  # of a transfer's sheet: frames, their height, the label's width


def is_image(output: Path) -> bool:
    """Whether a picture is to be written, not a video."""
    return output.suffix.lower() in IMAGES


def companions(output: Path) -> tuple[Path, Path]:
    """Where the contact sheet and the record of `output` go."""
    return output.with_suffix(".sheet.png"), output.with_suffix(".json")


def check_output(output: Path, start: Path | None = None, scale: int | None = None) -> None:
    """Refuse before the work what could not be written after it.

    Raises:
        InputError: another suffix than .mp4, a folder that does not exist or cannot be written, the start itself;
            an impossible scale.
    """
    if scale is not None and not 1 <= scale <= MOST_SCALE:
        raise InputError(f"scale must be a whole number from 1 to {MOST_SCALE}, got {scale}")
    if output.suffix.lower() != ".mp4" and not is_image(output):
        suffix = repr(output.suffix) if output.suffix else "missing"
        raise InputError(f"cannot write {output}: its suffix is {suffix}, allowed is .mp4 (or .png for one frame)")
    for path in (output, *companions(output)):
        check_writable(path)
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder")
        if start is not None and path.exists() and start.exists() and path.samefile(start):
            raise InputError(f"writing {path} would overwrite the start; choose another output")


@contextmanager
def progress_bar(words: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr where that is a terminal; what is given is called with (steps done, steps in all)."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(words, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def generate_to(
    output: Path,
    world: "World",
    prompt: str,
    scale: int | None = None,
    loading: float = 0.0,
    cut: int | None = None,
    show: Callable[[int, int, "Video"], None] | None = None,
    **options: Any,
) -> "Video":
    """`world.generate(prompt, **options)` with a progress bar, then the three files.

    loading: seconds, recorded. cut: frames that are kept of it. show: is told of every step, see `Preview`.
    """
    request = world.request(prompt, **options)
    if scale is None:
        scale = max(1, round(EASY_TO_SEE / max(request.size)))
    began = time.perf_counter()
    with progress_bar("generating") as tell:
        video = world.run(request, tell, show)
    video = video[: cut or len(video)]
    if is_image(output) and len(video) > 1:
        raise InputError(f"cannot write {len(video)} frames to {output}: a picture holds one; use .mp4")
    seconds = {"loading": round(loading, 2), "generating": round(time.perf_counter() - began, 2)}
    record = describe(world, request, options.get("start"), video, scale) | {"seconds": seconds}
    write_all(video, output, scale, record)
    return video


def write_all(video: "Video", output: Path, scale: int, record: dict[str, Any]) -> None:
    """The mp4, the contact sheet and the record: all of them, or an InputError and none."""
    sheet, log = companions(output)
    _write_together(
        {
            output: lambda path: video.save(path, scale=scale),
            sheet: lambda path: video.contact_sheet(path, scale=max(1, scale // 3)),
            log: lambda path: _write_json(path, record | {"output": str(output)}),
        }
    )


def _write_together(writers: Mapping[Path, Callable[[Path], object]]) -> None:
    """All files or, with an InputError, none. The first gets its name last: where it is, all are."""
    with ExitStack() as stack:
        for path, write in writers.items():
            write(stack.enter_context(atomic_file(path)))


def _write_json(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(world: "World", request: "Request", start: Any, video: "Video", scale: int) -> dict[str, Any]:
    """Every setting that the video depends on, as JSON values."""
    given = request.given
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "start": str(start) if isinstance(start, str | Path) else None,
        "start_sha256": sha256(Path(start)) if isinstance(start, str | Path) else None,
        "given_frames": 0 if given is None else len(given),
        **describe_drawing(request),
        "frames": len(video),
        "fps": video.fps,
        "size": [video.height, video.width],
        "scale": scale,
        **describe_model(world),
    }


def describe_drawing(request: "Request") -> dict[str, Any]:
    """How it is drawn, as JSON values."""
    return {
        "seed": request.seed,
        "steps": request.steps,
        "guidance": request.guidance,
        "sampling": {
            "solver": request.sampling.solver,
            "schedule": request.sampling.schedule,
            "shift": request.sampling.shift,
            "exact_times": request.sampling.exact_times,
            "conditional_timestep": request.sampling.conditional_timestep,
        },
        "overlap": request.overlap,
        "handover": request.handover,
    }


def describe_model(world: "World") -> dict[str, Any]:
    """What draws it, and on what, as JSON values."""
    import torch

    return {
        "loras": [{"file": lora.name, "scale": lora.scale, "hash": lora.hash} for lora in world.loras],
        "model": world.name,
        "model_hash": world.hash,
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "speed": {"rungs": str(world.speed), "exact": world.speed.exact, **dataclasses.asdict(world.spent)},
        "threads": torch.get_num_threads(),
        "versions": {
            "orrery": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": f"{sys.platform} {platform.machine()}",
        },
    }


def sha256(path: Path) -> str:
    """Of a file; of a folder, of the names and contents of the files in it."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def transfer_files(output: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """Where everything about the transfer `output` goes: "result", "beside", "sheet", "record" and, for each kind of
    control, "control-KIND"."""
    sheet, log = companions(output)
    still = output.suffix if is_image(output) else ".mp4"
    if still in (".jpg", ".jpeg"):
        still = ".png"  # controls are used again, and nothing of them may be lost
    files = {"result": output, "record": log, "sheet": sheet, "beside": output.with_suffix(f".beside{still}")}
    return files | {f"control-{kind}": output.with_suffix(f".control-{kind}{still}") for kind in kinds}


def write_transfer(
    output: Path,
    result: "Transferred",
    weights: Mapping[str, float],
    record: Mapping[str, Any],
    show_input: bool = False,
    show_controls: bool = False,
) -> None:
    """The result, its control videos, what shows them beside each other, and the record: all of them, or an InputError
    and none.

    Args:
        weights: of the controls that acted, by kind.
        show_input, show_controls: whether the result's own video has them to its left.
    """
    size = result.video.height, result.video.width
    controls = {kind: result.controls[kind] for kind in weights}
    panels = {} if result.source is None else {"input": result.source}
    panels |= {f"{kind} {weights[kind]:g}": video for kind, video in controls.items()}
    panels = {label: video.resize(*size, crop=False) for label, video in panels.items()}
    shown = [each for label, each in panels.items() if (show_input if label == "input" else show_controls)]
    files = transfer_files(output, list(weights))
    writers: dict[Path, Callable[[Path], object]] = {
        output: lambda path: _save(beside([*shown, result.video], 0), path),
        files["beside"]: lambda path: _save_for_the_eye([*panels.values(), result.video], path),
        files["sheet"]: lambda path: labelled_sheet(panels | {"result": result.video}, path),
        files["record"]: lambda path: _write_json(path, record),
    }
    for kind, video in controls.items():
        # 4:4:4, lossless but for the rounding to YUV: at crf 4 edges were off by up to 68 levels, in larger files.
        writers[files[f"control-{kind}"]] = partial(video.save, crf=0, pixel_format="yuv444p")
    _write_together(writers)


def _save(video: "Video", path: Path, scale: int = 1) -> None:
    """An odd size needs 4:4:4, which not every browser plays, and is kept."""
    even = (video.height * scale) % 2 == 0 and (video.width * scale) % 2 == 0
    video.save(path, scale=scale, pixel_format="yuv420p" if even else "yuv444p")


def _save_for_the_eye(panels: Sequence["Video"], path: Path) -> None:
    """Beside each other, small videos enlarged and large ones made smaller."""
    height, width = panels[0].height, panels[0].width
    most = (WIDEST - GAP * (len(panels) - 1)) // len(panels)
    if width > most:
        size = max(1, round(height * most / width) // 2 * 2), most // 2 * 2
        panels = [panel.resize(*size, crop=False) for panel in panels]
    video = beside(panels, GAP)
    _save(video, path, max(1, round(EASY_TO_SEE / max(video.height, video.width))))


def beside(videos: Sequence["Video"], gap: int) -> "Video":
    """Videos of one length and one height from left to right, with white between."""
    import numpy as np

    from orrery.video import Video

    if len(videos) == 1:
        return videos[0]
    first = videos[0]
    line = np.full((len(first), first.height, gap, 3), 255, np.uint8)
    pieces = [piece for video in videos for piece in (line, video.frames)][1:]
    return Video(np.concatenate(pieces, axis=2), first.fps)


class Preview:
    """A picture that grows while a video is drawn: a row a step with what it will be, as the preview decoder has it;
    at most PREVIEW_ROWS of them, evenly spread, and the latest. Written anew at every step, whole each time.

    A step that cannot be written (a full disk) is passed over: nothing of the video depends on it.
    """

    def __init__(self, path: Path) -> None:
        check_writable(path)
        self.path = path
        self._rows: dict[str, Any] = {}

    def __call__(self, done: int, steps: int, video: "Video") -> None:
        """Add a step."""
        every = -(-steps // PREVIEW_ROWS)
        rows = self._rows | {f"step {done}/{steps}": video}
        if done % every == 0 or done in (1, steps):
            self._rows = rows
        with suppress(OSError, InputError), atomic_file(self.path) as partial:
            labelled_sheet(rows, partial)


def labelled_sheet(rows: Mapping[str, "Video"], path: Path | IO[bytes]) -> None:
    """A PNG with a row a video, its label to the left; columns are the same frames, from the first to the last."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    first = next(iter(rows.values()))
    chosen = [round(i) for i in np.linspace(0, len(first) - 1, min(SHEET_COLUMNS, len(first)))]
    height = SHEET_HEIGHT
    width = max(1, round(first.width * height / first.height))
    head, gap = 20, 4
    size = (SHEET_LABEL + len(chosen) * (width + gap), head + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, index in enumerate(chosen):
        draw.text((SHEET_LABEL + column * (width + gap), 3), f"frame {index}", "black", font)
    for row, (label, video) in enumerate(rows.items()):
        top = head + row * (height + gap)
        draw.text((4, top + height // 2 - 6), label, "black", font)
        for column, index in enumerate(chosen):
            picture = Image.fromarray(video.frames[index]).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(picture, (SHEET_LABEL + column * (width + gap), top))
    sheet.save(path, format="PNG")
