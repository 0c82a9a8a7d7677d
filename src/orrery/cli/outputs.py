"""What a generated video leaves on disk: the mp4, a contact sheet and a record of all settings, all three or none."""

import hashlib
import json
import platform
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orrery import __version__
from orrery.errors import InputError
from orrery.files import atomic_file, check_writable

if TYPE_CHECKING:
    from orrery.video import Video
    from orrery.world import Request, World

MOST_SCALE = 64
IMAGES = (".png", ".jpg", ".jpeg", ".webp")
EASY_TO_SEE = 768  # pixels: smaller videos are enlarged to about this


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


def generate_to(
    output: Path,
    world: "World",
    prompt: str,
    scale: int | None = None,
    loading: float = 0.0,
    cut: int | None = None,
    **options: Any,
) -> "Video":
    """`world.generate(prompt, **options)` with a progress bar, then the three files.

    loading: seconds, recorded. cut: frames that are kept of it.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    request = world.request(prompt, **options)
    if scale is None:
        scale = max(1, round(EASY_TO_SEE / max(request.size)))
    console = Console(stderr=True)
    began = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("generating", total=None)
        video = world.run(request, lambda done, total: bar.update(task, completed=done, total=total))
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
    with ExitStack() as stack:
        video.save(stack.enter_context(atomic_file(output)), scale=scale)
        video.contact_sheet(stack.enter_context(atomic_file(sheet)), scale=max(1, scale // 3))
        text = json.dumps(record | {"output": str(output)}, indent=2, ensure_ascii=False)
        stack.enter_context(atomic_file(log)).write_text(text + "\n", encoding="utf-8")


def describe(world: "World", request: "Request", start: Any, video: "Video", scale: int) -> dict[str, Any]:
    """Every setting that the video depends on, as JSON values."""
    import torch

    given = request.given
    return {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "start": str(start) if isinstance(start, str | Path) else None,
        "start_sha256": hashlib.sha256(Path(start).read_bytes()).hexdigest() if isinstance(start, str | Path) else None,
        "given_frames": 0 if given is None else len(given),
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
        "loras": [{"file": lora.name, "scale": lora.scale, "hash": lora.hash} for lora in world.loras],
        "frames": len(video),
        "fps": video.fps,
        "size": [video.height, video.width],
        "scale": scale,
        "model": world.name,
        "model_hash": world.hash,
        "device": str(world.device),
        "dtype": str(world.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "versions": {
            "orrery": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": f"{sys.platform} {platform.machine()}",
        },
    }
