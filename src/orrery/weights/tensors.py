"""Tensors out of files: safetensors (one file or shards) and torch checkpoints, mapped into memory, nothing executed.

What comes back is a plain table of names and tensors whose numbers are still on the disk: the system reads a page when
it is first touched and may drop it again, so a file is never twice in memory.
"""

import io
import json
import re
import zipfile
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orrery.errors import InputError, one_line
from orrery.weights.layouts import unwrapped

SAFETENSORS_NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_intact_files: set[tuple[str, int, int]] = set()
_TEXT_FILES = (
    (
        re.compile(rb"\s*<(!doctype|html|head|\?xml)", re.I),
        "a web page saved under that name: download the file itself",
    ),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the file it stands for: run `git lfs pull`"),
)


def read_tensors(path: str | PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a file, of a `*.safetensors.index.json` with its shards, or of a folder that holds either.

    Of a torch checkpoint, wrappers around the table of weights are taken off; values that are no tensors are left out.

    Raises:
        InputError: no such file; it is damaged, cut short, a web page, of an unknown kind, or a pickle that wants to
            run code (it is not run).
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise InputError(f"cannot read {path}: no such file")
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with open(path, "rb") as file:
        begin = file.read(512)
    for pattern, what in _TEXT_FILES:
        if pattern.match(begin):
            raise InputError(f"cannot read {path}: it is {what}")
    if not begin:
        raise InputError(f"cannot read {path}: the file is empty")
    if begin.startswith(b"PK"):
        return _read_torch(path, mapped=True)
    if path.suffix == ".safetensors" or begin[8:9] == b"{":
        return _read_safetensors(path)
    if begin.startswith(b"\x80") or path.suffix in TORCH_SUFFIXES:  # torch's format of before 2020
        return _read_torch(path, mapped=False)
    raise InputError(f"cannot read {path}: it is neither a safetensors file nor a torch checkpoint")


def tensor_files(path: str | PathLike[str]) -> list[Path]:
    """The files that `read_tensors` reads."""
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    return _shards(path) if path.name.endswith(".index.json") else [path]


def has_tensors(folder: Path) -> bool:
    """Whether a folder holds weights that `read_tensors` finds."""
    return any((folder / name).is_file() for name in SAFETENSORS_NAMES) or any(folder.glob("*.safetensors.index.json"))


def _in_folder(folder: Path) -> Path:
    found = [folder / name for name in SAFETENSORS_NAMES if (folder / name).is_file()]
    found += sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        raise InputError(f"cannot read {folder}: it holds none of {', '.join(SAFETENSORS_NAMES)}, whole or in shards")
    return found[0]


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {index}: it is not an index of shards ({one_line(error)})") from error
    for name in names:
        if Path(name).name != name:
            raise InputError(f"cannot read {index}: the shard {name!r} is not a file beside it")
        if not (index.parent / name).is_file():
            raise InputError(f"cannot read {index}: the shard {name} is missing")
    return [index.parent / name for name in names]


def _read_shards(index: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for shard in _shards(index):
        tensors |= _read_safetensors(shard)
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, RuntimeError) as error:
        text = one_line(error)
        cut = "IncompleteBuffer" in text or "InvalidHeaderLength" in text
        what = "it was cut short, or is no safetensors file" if cut else "it is no safetensors file, or damaged"
        raise InputError(f"cannot read {path}: {what} ({text})") from error


def _read_torch(path: Path, mapped: bool) -> dict[str, Tensor]:
    if mapped:
        _check_zip(path)
    try:
        with torch.serialization.safe_globals(
            [io.BytesIO]
        ):  # TransformerEngine's extra state; holds bytes, runs nothing
            content = torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except UnpicklingError as error:
        wanted = re.search(r"GLOBAL (\S+)", one_line(error))
        what = f"it wants to run {wanted[1]}" if wanted else "it holds more than tensors"
        if "not have been a torch" in one_line(error) or re.search(
            r"invalid load key|pickle data was trunc", str(error)
        ):
            what = "it is no torch checkpoint, or damaged"
        raise InputError(
            f"cannot read {path}: {what}; only files of plain tensors are read, nothing was run"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"cannot read {path}: it is no torch checkpoint, or damaged ({_first(error)})") from error
    if not isinstance(content, dict):
        raise InputError(f"cannot read {path}: it holds a {type(content).__name__}, not a table of weights")
    return {str(key): value for key, value in unwrapped(content).items() if isinstance(value, Tensor)}


def _check_zip(path: Path) -> None:
    """Checksums of a torch checkpoint, which mapping it into memory would pass over. About a second a gigabyte, once a
    process and file."""
    stat = path.stat()
    mark = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if mark in _intact_files:
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            damaged = [record.filename for record in records if not _intact(archive, record)]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: it was cut short or is damaged ({_first(error)})") from error
    if damaged and len(damaged) < len(records):  # torch can write files without checksums: then none fits
        raise InputError(
            f"cannot read {path}: it is damaged, {len(damaged)} of {len(records)} records fail their checksum"
        )
    _intact_files.add(mark)


def _intact(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as file:
            while file.read(1 << 22):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def _first(error: Any) -> str:
    return one_line(str(error).split("\n")[0])[:200]
