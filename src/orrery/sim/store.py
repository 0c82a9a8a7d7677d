"""Simulated clips on disk: one folder a clip with all its ground truth, and datasets of them that can be resumed.

Layout: `rgb.mp4` (4:4:4, visually lossless; further cameras `rgb.NAME.mp4`), `depth.npz` (float16 metres) and
`segmentation.npz` (uint8, 0 none, else 1 + index of the object), one array [T, H, W] a camera; where the scene has a
map, `map.NAME.mp4`, `map.json` (lane lines, road boundaries and lane centres as polylines in world metres) and
`boxes.json` (a track a vehicle: id, kind, size and per frame the box's centre and yaw, the ego car's too);
`actions.npy` [T, A]; `cameras.json`; `poses.npz`; `caption.txt`; `meta.json`; and, for a single clip, `sheet.png`. A
dataset is a folder of such folders and `index.jsonl`, one line a clip.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from orrery.errors import InputError
from orrery.sim.clip import Clip
from orrery.sim.simulate import check_request, simulate
from orrery.video import Video

PALETTE = np.array(
    [[40, 40, 46], [228, 87, 86], [76, 149, 80], [78, 121, 222], [242, 190, 60], [157, 92, 180], [78, 184, 190]],
    np.uint8,
)


def clip_id(scene: str, seed: int) -> str:
    """The folder name of a clip in a dataset."""
    return f"{scene}-{seed:07d}"


def index_line(clip: Clip) -> dict[str, Any]:
    """What index.jsonl and meta.json say of a clip."""
    return {
        "id": clip_id(clip.scene, clip.seed),
        "scene": clip.scene,
        "seed": clip.seed,
        "look": clip.look,
        "caption": clip.caption,
        "frames": clip.frames.shape[1],
        "fps": clip.fps,
        "size": list(clip.frames.shape[2:4]),
        "cameras": list(clip.cameras),
        "action_names": list(clip.action_names),
        "objects": [
            {
                "id": i + 1,
                "name": t.name,
                "colour": t.colour,
                "shape": t.shape,
                "radius": t.radius,
                "movable": t.movable,
            }
            for i, t in enumerate(clip.things)
        ],
    }


def write_clip(clip: Clip, folder: Path, sheet: bool = True) -> None:
    """Writes a clip's folder whole or not at all. An existing clip of the same name is replaced.

    Raises:
        InputError: `folder` exists and is no clip, or cannot be written.
    """
    folder = check_place(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        _write_files(clip, partial)
        if sheet:
            contact_sheet(clip, partial / "sheet.png")
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(partial, folder)
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    except InputError as error:  # of a writer that was given the temporary name; the user knows the other
        raise InputError(str(error).replace(str(partial), str(folder))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_place(folder: Path) -> Path:
    """Where a clip is to be written, absolute (`.` has no name to derive another from); asked before the work, too.

    Raises:
        InputError: `folder` exists and is neither a clip nor empty, or it cannot be looked at.
    """
    place = Path(folder).absolute()
    try:
        if place.exists() and not (place / "meta.json").is_file() and (not place.is_dir() or any(place.iterdir())):
            raise InputError(f"cannot write {folder}: something that is no clip stands there")
    except OSError as error:
        raise InputError(f"cannot write {folder}: {error.strerror or error}") from error
    return place


def _write_files(clip: Clip, folder: Path) -> None:
    for v, name in enumerate(clip.cameras):
        suffix = f".{name}" if v else ""
        Video(clip.frames[v], clip.fps).save(folder / f"rgb{suffix}.mp4", crf=8, pixel_format="yuv444p")
        if clip.map is not None:
            Video(clip.map[v], clip.fps).save(folder / f"map.{name}.mp4", crf=8, pixel_format="yuv444p")
    if clip.depth is not None:
        depth = clip.depth.astype(np.float16)
        np.savez_compressed(folder / "depth.npz", **dict(zip(clip.cameras, depth, strict=True)))
    if clip.segmentation is not None:
        np.savez_compressed(folder / "segmentation.npz", **dict(zip(clip.cameras, clip.segmentation, strict=True)))
    np.save(folder / "actions.npy", clip.actions)
    np.savez(folder / "poses.npz", position=clip.position, quaternion=clip.quaternion)
    cameras = [
        {"name": n, "intrinsics": k.tolist(), "world_to_camera": e.tolist()}
        for n, k, e in zip(clip.cameras, clip.intrinsics, clip.extrinsics.round(6), strict=True)
    ]
    (folder / "cameras.json").write_text(json.dumps(cameras))
    if clip.lanes:
        lanes = [line | {"points": np.round(line["points"], 3).tolist()} for line in clip.lanes]
        (folder / "map.json").write_text(json.dumps({"lines": lanes}))
        (folder / "boxes.json").write_text(json.dumps({"fps": clip.fps, "boxes": box_tracks(clip)}))
    (folder / "caption.txt").write_text(clip.caption + "\n")
    (folder / "meta.json").write_text(json.dumps(index_line(clip) | {"extra": clip.extra}, indent=1))


def box_tracks(clip: Clip) -> list[dict[str, Any]]:
    """The 3D boxes of a clip's things: {"id" (as in the segmentation), "name", "kind", "colour", "size" (length, width,
    height), "centre" [T][3], "yaw" [T]}, in metres and radians, x ahead and y to the left of the start."""
    out = []
    for i, thing in enumerate(clip.things):
        if thing.size is not None:
            w, _, _, z = clip.quaternion[:, i].T
            yaw = np.unwrap(2 * np.arctan2(z, w))
            track = {"centre": clip.position[:, i].round(4).tolist(), "yaw": yaw.round(5).tolist()}
            head = {"id": i + 1, "name": thing.name, "kind": thing.shape or "ego", "colour": thing.colour}
            out.append(head | {"size": list(thing.size)} | track)
    return out


def contact_sheet(clip: Clip, path: Path, columns: int = 9, scale: int = 2) -> None:
    """A PNG: time runs right; for each camera colour, map, depth (near is bright) and segmentation run down."""
    from PIL import Image

    picks = np.linspace(0, clip.frames.shape[1] - 1, min(columns, clip.frames.shape[1])).round().astype(int)
    rows = []
    for v in range(len(clip.cameras)):
        rows.append(clip.frames[v, picks])
        if clip.map is not None:
            rows.append(clip.map[v, picks])
        if clip.depth is not None:
            inverse = 1 / np.maximum(clip.depth[v, picks], 1e-3)
            near = max(float(inverse.max()), 1e-6)
            rows.append(np.repeat((255 * np.sqrt(inverse / near))[..., None], 3, -1).astype(np.uint8))
        if clip.segmentation is not None:
            ids = clip.segmentation[v, picks]
            rows.append(PALETTE[np.where(ids == 0, 0, 1 + (ids - 1) % (len(PALETTE) - 1))])
    grid = np.concatenate([np.concatenate(list(row), 1) for row in rows], 0)
    image = Image.fromarray(grid)
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path)


def leave_out(clip: Clip, names: Iterable[str]) -> Clip:
    """The clip without its `depth` or `segmentation`."""
    nothing: dict[str, Any] = dict.fromkeys(names)
    return replace(clip, **nothing)


def write_dataset(
    root: Path,
    scene: str,
    seeds: Iterable[int],
    workers: int = 1,
    truth: Iterable[str] = ("depth", "segmentation"),
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> int:
    """Makes the clips of `seeds` that `root` does not hold yet; returns how many were made.

    Interrupted at any moment, the same call goes on where it stopped: a clip's folder appears whole, and index.jsonl is
    mended from the folders. `truth` names which of depth and segmentation to keep; `progress(done, all)` is called
    after each clip; `options` go to `simulate`.

    Raises:
        InputError: an option is out of range; `root` cannot be written; a clip of these seeds is there already in
            another size, length or look than `options` ask for.
    """
    root, seeds = Path(root), list(seeds)
    for seed in seeds[:1] + seeds[-1:]:
        check_request(scene, seed, **options)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_partials(root)
        listed = _mend_index(root)
        _check_alike([listed[name] for name in (clip_id(scene, seed) for seed in seeds) if name in listed], options)
        missing = [seed for seed in seeds if clip_id(scene, seed) not in listed]
        done = len(seeds) - len(missing)
        if progress:
            progress(done, len(seeds))
        jobs = [(str(root), scene, seed, tuple(truth), options) for seed in missing]
        for line in _map(_make, jobs, workers):
            with open(root / "index.jsonl", "a", encoding="utf-8") as index:  # opened anew: another command may mend it
                index.write(json.dumps(line) + "\n")
            done += 1
            if progress:
                progress(done, len(seeds))
    except OSError as error:
        raise InputError(f"cannot write {root}: {error.strerror or error}") from error
    finally:
        _remove_partials(root)
    return len(missing)


def _check_alike(lines: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Refuse to call clips done that are not what is asked for."""
    size = options.get("size")
    asked = {
        "size": None if size is None else [size, size],
        "frames": options.get("frames"),
        "look": options.get("look"),
    }
    for line in lines:
        for name, wanted in asked.items():
            if wanted is not None and name in line and line[name] != wanted:
                raise InputError(
                    f"clip {line['id']} is there already with {name} {line[name]}, asked for is {wanted}; "
                    "allowed: the same, other seeds, or another folder"
                )


def _remove_partials(root: Path) -> None:
    """Remove what writers left that are no more; other commands may be writing to the same dataset."""
    for partial in root.glob(".*.partial"):
        writer = partial.suffixes[-2].removeprefix(".") if len(partial.suffixes) > 1 else ""
        if not (writer.isdecimal() and _alive(int(writer))):
            shutil.rmtree(partial, ignore_errors=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _make(job: tuple[str, str, int, tuple[str, ...], dict[str, Any]]) -> dict[str, Any]:
    root, scene, seed, truth, options = job
    clip = leave_out(simulate(scene, seed, **options), {"depth", "segmentation"} - set(truth))
    write_clip(clip, Path(root) / clip_id(scene, seed), sheet=False)
    return index_line(clip)


def _map(function: Callable[[Any], Any], jobs: list[Any], workers: int) -> Iterable[Any]:
    """function over jobs, results as they come; spawned processes, because a GL context does not survive a fork.

    Ctrl-C goes to every process of a terminal; here only the parent may hear it (the workers inherit the mask), and
    then it ends them: a worker that is interrupted while it holds the queue's lock would hang all others.
    """
    if workers <= 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    before = set(active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_end_with_parent)
    processes: list[Any] = []
    try:
        with _deaf_to_interrupts():
            futures = [pool.submit(function, job) for job in jobs]
            processes = [child for child in active_children() if child not in before]
        yield from (future.result() for future in as_completed(futures))
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
        raise
    finally:
        pool.shutdown()


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """SIGINT waits until the end of the block; processes that are started in it never hear it.

    The mask is what they inherit. It is not enough for ourselves: another thread (of a BLAS, say) may take the signal,
    and Python would raise here all the same, with a worker half started.
    """
    heard: list[int] = []
    ours = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: heard.append(number)) if ours else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if ours:
            signal.signal(signal.SIGINT, handler)
    if heard:
        raise KeyboardInterrupt


def _end_with_parent() -> None:
    """A worker ends when its parent does, even if that was killed."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _mend_index(root: Path) -> dict[str, dict[str, Any]]:
    """index.jsonl by id, after dropping a half-written line and adding clips that were written but not listed."""
    path, lines, broken = root / "index.jsonl", {}, not (root / "index.jsonl").is_file()
    for text in [] if broken else path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
            lines[line["id"]] = line
        except (json.JSONDecodeError, KeyError):
            broken = True
    listed = len(lines)
    for meta in root.glob("*/meta.json"):
        if meta.parent.name not in lines:
            line = json.loads(meta.read_text())
            line.pop("extra", None)
            lines[line["id"]] = line
    if broken or len(lines) != listed:
        partial = root / f".index.{os.getpid()}.jsonl"
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines.values()), encoding="utf-8")
        os.replace(partial, path)
    return lines
