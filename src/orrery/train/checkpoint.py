"""Checkpoints that survive a kill at any moment: written aside, synced, then renamed into place.

A checkpoint is one `step-000001234.pt`, written by torch.save and read with weights_only=True: tensors, numbers and
strings only. A file under that name is always whole.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from orrery.errors import InputError
from orrery.files import atomic_file


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write(temporary path)` make a file, then put it at `path`: whole or not at all, even after a power cut.

    Raises:
        InputError: the disk is full or the path is not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path.parent}: {error.strerror}") from None
    with atomic_file(path) as partial:
        try:
            write(partial)
        except RuntimeError as error:  # how torch.save reports a full disk
            raise InputError(f"cannot write {path}: {error}") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """`write_atomically` for a text."""
    write_atomically(path, lambda temporary: _write_utf8(temporary, text))


def _write_utf8(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


class CheckpointFolder:
    """The checkpoints of a run: `save` keeps the last `keep`, `latest` finds the newest."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = Path(folder), keep

    def paths(self) -> list[Path]:
        """All whole checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        paths = self.paths()
        return paths[-1] if paths else None

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the checkpoint of `step`, then delete those beyond `keep` and what killed writers left.

        Raises:
            InputError: it could not be written; older checkpoints are untouched.
        """
        path = self.folder / f"step-{step:09d}.pt"
        write_atomically(path, lambda temporary: torch.save(state, temporary))
        for old in self.paths()[: -self.keep]:
            old.unlink(missing_ok=True)
        for rest in self.folder.glob(".step-*.partial.pt"):
            rest.unlink(missing_ok=True)
        return path

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        """Read a checkpoint onto the CPU; no pickled code is run."""
        return torch.load(path, map_location="cpu", weights_only=True)
