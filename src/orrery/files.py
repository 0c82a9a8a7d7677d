"""Writing that is whole or absent: a temporary name in the same folder, renamed when everything is on disk."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orrery.errors import InputError


def check_writable(path: str | os.PathLike[str]) -> Path:
    """`path` as a Path, if a file or folder can be made there; asked before minutes of work, not after.

    Raises:
        InputError: the folder that should hold it does not exist or does not let us write.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        kind = "is not a folder" if folder.exists() else "does not exist"
        raise InputError(f"cannot write {path}: {folder} {kind}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"cannot write {path}: no permission to write in {folder}")
    trial = _temporary(path)  # permission is not all: /proc, a name that is too long, no room for one more file
    try:
        trial.touch(exist_ok=True)
        trial.unlink()
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def _temporary(path: Path) -> Path:
    """The name beside `path` that this process writes to first."""
    return path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with its suffix; renames it to `path` if the block succeeds.

    If the block fails the temporary file is removed and whatever stood at `path` is untouched.

    Raises:
        InputError: `path` is a folder or cannot be written; the disk is full (any OSError of the block).
    """
    path = check_writable(path)
    if path.is_dir():
        raise InputError(f"cannot write {path}: it is a folder")
    partial = _temporary(path)
    try:
        yield partial
        with open(partial, "rb") as written:
            os.fsync(written.fileno())  # on a full disk the error may come only now
        os.replace(partial, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    except InputError as error:  # of a writer that was given the temporary name; the user knows the other
        raise InputError(str(error).replace(str(partial), str(path))) from error
    finally:
        with suppress(OSError):
            partial.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str], replaces: str) -> Iterator[Path]:
    """Yields a temporary folder beside `path`; it becomes `path` if the block succeeds.

    An existing folder is replaced only if it holds a file named `replaces` (so that a slip of the finger does not cost
    somebody's home) or is empty.

    Raises:
        InputError: something else stands at `path`; it cannot be written; the disk is full.
    """
    path = check_writable(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"cannot write {path}: it is a file, not a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / replaces).is_file():
        raise InputError(f"cannot replace {path}: it holds other files and no {replaces}")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        partial.mkdir()
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        if path.is_dir():
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except OSError:
            if old.is_dir():
                os.replace(old, path)
            raise
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
