"""From a recipe's path to a run: clips chosen and frozen in the run directory, task, loop, export."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from orrery.control.inputs import TRUTH
from orrery.data.clips import ClipDataset, ClipEntry, entry_from_json, read_index, split
from orrery.errors import InputError, note
from orrery.train.action import ActionTask
from orrery.train.checkpoint import write_text
from orrery.train.control import ControlTask
from orrery.train.decoder import DecoderTask
from orrery.train.flow import FlowTask
from orrery.train.loop import Randomness, Task, Trainer, pick_device
from orrery.train.preview import PreviewTask
from orrery.train.recipe import (
    ActionRecipe,
    ControlRecipe,
    DecoderRecipe,
    FlowRecipe,
    PreviewRecipe,
    Recipe,
    VAERecipe,
    load_recipe,
)
from orrery.train.vae import VAETask, check_clip


def train(
    path: Path,
    sets: Sequence[str] = (),
    max_seconds: float | None = None,
    refresh_data: bool = False,
    export: Path | None = None,
) -> Path:
    """Run a recipe, from the newest checkpoint of its run directory if there is one.

    Args:
        path: the recipe. sets: `key=value` changes to it.
        max_seconds: stop (and save) after so long.
        refresh_data: take up clips that were added to the dataset since the run began.
        export: only export the newest checkpoint's EMA weights, to this directory.

    Returns:
        the directory of the exported model: `export`, or OUT/model after the last step; else the run directory.

    Raises:
        InputError: whatever is wrong with the recipe, the data or the run directory, in one line.
    """
    recipe = load_recipe(path, sets)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    device = pick_device(recipe.device)
    with claimed(recipe.out):
        trainer = open_run(recipe, device, refresh_data)
        if export is None:
            if not trainer.run(max_seconds):
                if trainer.interrupted:
                    raise SystemExit(130)
                return recipe.out
            export = recipe.out / "model"
        elif trainer.step == 0:
            raise InputError(f"{recipe.out} has no checkpoint to export; train first")
        trainer.export(export, str(path))
    print(f"exported {export}", file=sys.stderr)
    return export


ClipRecipe = VAERecipe | FlowRecipe | ControlRecipe | PreviewRecipe


def open_run(recipe: Recipe, device: torch.device, refresh_data: bool = False) -> Trainer:
    """The trainer of a recipe, at the newest checkpoint of its run directory, ready to run."""
    random = Randomness(recipe.seed)
    if isinstance(recipe, ActionRecipe):
        return Trainer(recipe, ActionTask(recipe, random, device), random, device)
    if isinstance(recipe, DecoderRecipe):
        return Trainer(recipe, DecoderTask(recipe, random, device), random, device)
    clips = choose_or_recall_clips(recipe, refresh_data)
    datasets = _datasets(recipe, *clips)
    freeze_clips(recipe, *clips)
    task: Task
    if isinstance(recipe, VAERecipe):
        task = VAETask(recipe, *datasets, random, device)
    elif isinstance(recipe, ControlRecipe):
        task = ControlTask(recipe, *datasets, random, device)
    elif isinstance(recipe, PreviewRecipe):
        task = PreviewTask(recipe, *datasets, random, device)
    else:
        task = FlowTask(recipe, *datasets, random, device)
    return Trainer(recipe, task, random, device)


def _datasets(
    recipe: ClipRecipe, train_clips: list[ClipEntry], heldout: list[ClipEntry]
) -> tuple[ClipDataset, ClipDataset]:
    root, data = recipe.data.root, recipe.data
    weighted = isinstance(recipe, VAERecipe) and recipe.loss.foreground > 1
    pixels = isinstance(recipe, VAERecipe)  # the transformer reads each clip once, into the latent cache
    train = ClipDataset(root, train_clips, data.cache_gb if pixels else 0.0, foreground=weighted)
    held = ClipDataset(root, heldout, 0.2, foreground=pixels)
    for dataset in (train, held):
        check_clip(dataset[0], dataset.entries[0].id, data.frames, data.size)
    return train, held


def choose_clips(entries: Sequence[ClipEntry], recipe: ClipRecipe) -> list[ClipEntry]:
    """The clips of an index that the recipe's [data] describes."""
    data = recipe.data
    chosen = [
        entry
        for entry in entries
        if (not data.scenes or entry.scene in data.scenes)
        and (not data.looks or entry.look in data.looks)
        and (data.max_objects is None or _movable(entry) <= data.max_objects)
        and entry.frames >= data.frames
    ]
    if not chosen:
        wanted = f"scenes {list(data.scenes) or 'all'}, looks {list(data.looks) or 'all'}, frames >= {data.frames}"
        raise InputError(f"none of the {len(entries)} clips of {data.root} fits the recipe's [data]: {wanted}")
    return _with_truth(chosen, recipe) if isinstance(recipe, ControlRecipe) else chosen


def _with_truth(entries: list[ClipEntry], recipe: ControlRecipe) -> list[ClipEntry]:
    """The clips that have what the control is made of, where that is the simulator's depth or segmentation."""
    truth = TRUTH.get(recipe.control.kind)
    if truth is None:
        return entries
    there = [entry for entry in entries if (recipe.data.root / entry.id / truth).is_file()]
    if not there:
        raise InputError(
            f"none of the {len(entries)} clips of {recipe.data.root} has a {truth}; make the dataset with `orrery sim` "
            f"and without --without {truth.partition('.')[0]}"
        )
    if len(there) < len(entries):
        note(f"{recipe.data.root}: {len(entries) - len(there)} of {len(entries)} clips have no {truth}; left out")
    return there


def _movable(entry: ClipEntry) -> int:
    return sum(bool(item.get("movable", True)) for item in entry.objects)


def choose_or_recall_clips(recipe: ClipRecipe, refresh: bool) -> tuple[list[ClipEntry], list[ClipEntry]]:
    """(training, held-out) clips of the run: chosen from the dataset at its beginning, later those of OUT/clips.json,
    so that a dataset may grow meanwhile.

    Raises:
        InputError: no dataset, or no training or held-out clip in it.
    """
    path = recipe.out / "clips.json"
    begun = any((recipe.out / "checkpoints").glob("*.pt"))
    if path.exists() and begun and not refresh:
        lists = json.loads(path.read_text(encoding="utf-8"))
        return [entry_from_json(e) for e in lists["train"]], [entry_from_json(e) for e in lists["heldout"]]
    train_clips, heldout = split(choose_clips(read_index(recipe.data.root), recipe), recipe.data.heldout_from)
    train_clips = train_clips[: recipe.data.max_clips]
    border = f"heldout_from = {recipe.data.heldout_from}"
    for name, clips, side in (("training", train_clips, "below"), ("held-out", heldout, "at or above")):
        if not clips:
            raise InputError(f"no {name} clip in {recipe.data.root}: no seed {side} {border}")
    return train_clips, heldout


def freeze_clips(recipe: ClipRecipe, train_clips: list[ClipEntry], heldout: list[ClipEntry]) -> None:
    """Keep the lists in OUT/clips.json."""
    lists = {"train": [e.as_json() for e in train_clips], "heldout": [e.as_json() for e in heldout]}
    write_text(recipe.out / "clips.json", json.dumps(lists))
    print(f"{recipe.out}: {len(train_clips)} training clips, {len(heldout)} held out", file=sys.stderr)


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """The run directory, locked for this process; the system drops the lock when the process ends, however it ends.
    If the run was refused and nothing but the lock is in it, the directory goes too.

    Raises:
        InputError: the directory cannot be written, or another process trains in it.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"cannot write the run directory {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another process is training in {folder}; allowed: one at a time") from None
        yield
    except InputError:
        if [entry.name for entry in folder.iterdir()] == ["lock"]:
            (folder / "lock").unlink()
            folder.rmdir()
        raise
    finally:
        os.close(lock)
