"""Files of the Hugging Face hub, in the hub's usual cache: what is there is never asked for again.

huggingface_hub 2.4 goes on after a broken connection within one call, but throws away what it has when the call fails
(file_download.py, `_download_to_tmp_and_move`). So the bytes are fetched here, with its `http_get`, into
`blobs/ETAG.orrery.incomplete`, which stays where it is; the whole file, checked, is renamed to `blobs/ETAG`, where
huggingface_hub finds it and enters it into its cache. `hf cache` lists and prunes what stayed incomplete.

The cache is the folder that HF_HUB_CACHE names. huggingface_hub is imported on first use.
"""

import errno
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orrery.errors import InputError, note, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfFileMetadata

T = TypeVar("T")

_BUSY = (408, 429, 500, 502, 503, 504)  # HTTP statuses that pass by themselves
_AGAIN = "run the same command again: it goes on where it stopped"
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_ELSEWHERE = "download elsewhere and pass the path"


def cached_file(repo: str, file: str, revision: str | None) -> Path | None:
    """The file in the local cache, or None. Never touches the network.

    Args:
        repo: OWNER/NAME.
        file: its path in the repository.
        revision: branch, tag or commit; None for main. A branch is what it was when it was downloaded.

    Raises:
        InputError: `repo` or `file` cannot be a name.
    """
    from huggingface_hub import try_to_load_from_cache

    _check_names(repo, file)
    path = try_to_load_from_cache(repo, file, revision=revision)
    return Path(path) if isinstance(path, str) else None


def fetch_file(repo: str, file: str, revision: str | None) -> Path:
    """The file in the local cache; downloaded if it is not there. A download that was cut goes on where it stopped.

    Args: as of `cached_file`.

    Raises:
        InputError: no such repository, revision or file; no access to it; the hub cannot be reached; the connection
            broke; the disk is full; what came is not what the hub announced.
    """
    path = cached_file(repo, file, revision)
    if path is not None:
        return path
    from huggingface_hub import hf_hub_download

    with _hub_errors(repo, file, revision):
        _download(repo, file, revision)
        return Path(hf_hub_download(repo, file, revision=revision))


def cached_folder(repo: str, revision: str | None, required: Sequence[str]) -> Path | None:
    """The folder of a revision in the local cache if every file of `required` is in it, else None. Never touches the
    network.

    Args:
        required: paths in the repository, at least one.

    Raises:
        InputError: `repo` or a name in `required` cannot be a name.
    """
    if not required:
        raise ValueError("required must name at least one file")
    paths = [cached_file(repo, file, revision) for file in required]
    if paths[0] is None or None in paths:
        return None
    return paths[0].parents[len(Path(required[0]).parts) - 1]


def fetch_folder(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of a revision in the local cache, with all files that match; those that are not there are downloaded.

    Args:
        patterns: paths in the repository, `*` for any characters ("vae/*.safetensors"); each must match something.

    Raises:
        InputError: as `fetch_file`.
    """
    if not patterns:
        raise ValueError("patterns must have at least one pattern")
    _check_names(repo, *patterns)
    known = _known_files(repo, revision)
    folder = cached_folder(repo, revision, _matching(repo, revision, known, patterns)) if known else None
    if folder is not None:
        return folder
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):  # each download has shown its own; what is left to do is to enter them into the cache
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    with _hub_errors(repo, ", ".join(patterns), revision):
        info = _ask(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout))
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _matching(repo, revision, list(sizes), patterns)
        missing = [file for file in wanted if cached_file(repo, file, info.sha) is None]
        if missing:
            total = _amount(sum(sizes[file] for file in missing))
            many = f"{len(missing)} of {len(wanted)} files"
            note(f"to download: {many} of {repo} (revision {revision or 'main'}), {total}")
        for file in missing:
            _download(repo, file, info.sha)
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), tqdm_class=NoBar))
    if folder.name != info.sha:  # or the hub went away, and what an older commit left here was returned
        raise InputError(f"{repo} changed at revision {revision or 'main'} while it was downloaded; {_AGAIN}")
    return folder


def _known_files(repo: str, revision: str | None) -> list[str]:
    """All files of a revision, from the listing that an earlier `fetch_folder` left in the cache; else none."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        return [file.path for file in get_cached_repo_tree(repo, revision=revision)]
    except CachedRepoTreeNotFoundError:
        return []


def _matching(repo: str, revision: str | None, files: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The files that match a pattern; every pattern must match one."""
    from huggingface_hub.utils import filter_repo_objects

    found: dict[str, None] = {}
    for pattern in patterns:
        matches = list(filter_repo_objects(files, allow_patterns=pattern))
        if not matches:
            raise InputError(f"{repo} has no file {pattern!r} at revision {revision or 'main'}")
        found.update(dict.fromkeys(matches))
    return list(found)


def _check_names(repo: str, *files: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{repo!r} is not the name of a repository of the hub; allowed is OWNER/NAME") from error
    for file in files:
        if not file or file.startswith("/") or "\\" in file or ".." in file.split("/"):
            raise InputError(f"{file!r} is not the path of a file in a repository; allowed is FOLDER/NAME")


def _ask(question: Callable[[], T]) -> T:
    """The hub's answer; asked again, twice, when it is busy."""
    from huggingface_hub.errors import HfHubHTTPError

    for seconds in (1, 4):
        try:
            return question()
        except HfHubHTTPError as error:
            if error.response.status_code not in _BUSY:
                raise
        time.sleep(seconds)
    return question()


def _download(repo: str, file: str, revision: str | None) -> None:
    """Put a file of the hub into `blobs/` of the cache, if it is not there, whole or not at all."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import FileMetadataError
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    found = _ask(lambda: get_hf_file_metadata(hf_hub_url(repo, file, revision=revision)))
    if found.commit_hash is None or found.etag is None:
        raise FileMetadataError("no commit or no ETag in the answer")
    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    blob, lock = cache / folder / "blobs" / found.etag, cache / ".locks" / folder / f"{found.etag}.lock"
    if blob.exists():
        return
    partial = blob.with_name(f"{blob.name}.orrery.incomplete")
    size = "size unknown" if found.size is None else _amount(found.size)
    done = f", {_amount(partial.stat().st_size)} of it here already" if partial.exists() else ""
    note(f"downloading {file} of {repo} (revision {revision or 'main'}, {size}{done}) into {cache}")
    if found.size is None or _through_xet(found, file):
        way = "without a size" if found.size is None else "through Xet"
        note(f"{file} comes {way}: should the download be cut, it starts over")
        hf_hub_download(repo, file, revision=found.commit_hash)
        return
    blob.parent.mkdir(parents=True, exist_ok=True)
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the lock of huggingface_hub itself: whoever comes second finds the file
        if not blob.exists():
            _fetch_bytes(hf_hub_url(repo, file, revision=found.commit_hash), file, partial, found.size)
            _check_hash(partial, found.etag, file)
            os.replace(partial, blob)


def _through_xet(found: "HfFileMetadata", file: str) -> bool:
    """Xet is faster than plain HTTP but cannot go on after a cut: only where it is asked for, or nothing else goes."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import is_xet_available

    stored = found.xet_file_data is not None and is_xet_available()
    if (found.size or 0) > constants.MAX_HTTP_DOWNLOAD_SIZE:
        if not stored:
            raise InputError(f"{file} is too large for HTTP: install hf_xet and do not set HF_HUB_DISABLE_XET")
        return True
    return stored and constants.HF_XET_HIGH_PERFORMANCE


def _fetch_bytes(url: str, file: str, partial: Path, size: int) -> None:
    """Append to `partial` what it lacks, until it has `size` bytes; tried anew as long as every try brings some."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # a range counts the bytes that are sent
    while True:
        with open(partial, "ab") as out:
            before = out.tell()
            _check_room(partial, size - before)
            try:
                http_get(url, out, resume_size=before, headers=headers, expected_size=size, displayed_filename=file)
                out.flush()
                os.fsync(out.fileno())
                return
            except HfHubHTTPError:
                raise
            except HTTPError as error:
                out.flush()
                done = out.tell()
                if done <= before:
                    text = f"the connection broke after {_amount(done)} of {_amount(size)} of {file}; {_AGAIN}"
                    raise InputError(text) from error
            except OSError as error:
                if error.errno is not None:
                    raise
                done = out.tell()
                partial.unlink()
                raise InputError(f"{file} has {done} bytes, the hub announced {size}; nothing of it is kept") from error


def _check_room(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{_amount(needed)} are needed, {_amount(free)} are free", str(partial))


def _check_hash(partial: Path, etag: str, file: str) -> None:
    """Large files are named by their SHA-256 in the hub; what a cut or a crash left must not end up in one of them."""
    if re.fullmatch("[0-9a-f]{64}", etag) is None:
        return
    with open(partial, "rb") as stored:
        digest = hashlib.file_digest(stored, "sha256").hexdigest()
    if digest != etag:
        partial.unlink()
        raise InputError(f"{file} has the SHA-256 {digest}, the hub announced {etag}; nothing of it is kept: try again")


@contextmanager
def _hub_errors(repo: str, file: str, revision: str | None) -> Iterator[None]:
    """What goes wrong between here and the hub, as an InputError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # the last one comes from hf_xet
        cause: BaseException = error
        while isinstance(cause, LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__
        message = _refused(cause, repo, file, revision) or _unreachable(cause, repo, file)
        if message is None and isinstance(cause, OSError) and cause.errno is not None:
            message = f"cannot write {cause.filename or constants.HF_HUB_CACHE}: {cause.strerror}"
            if cause.errno in (errno.ENOSPC, errno.EDQUOT):
                message += f"; free some room, or set HF_HUB_CACHE to a folder on another disk, and {_AGAIN}"
        raise InputError(message or f"{file} of {repo} could not be downloaded: {one_line(cause)}") from error


def _refused(error: BaseException, repo: str, file: str, revision: str | None) -> str | None:
    """What to say when the hub answered, and the answer is no."""
    from huggingface_hub import errors

    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.GatedRepoError) or (status == 403 and not isinstance(error, errors.DisabledRepoError)):
        return f"{repo} is gated: accept the licence at https://huggingface.co/{repo} and {_LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"the hub has no repository {repo!r}, or it is private: check the name, or {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision or 'main'!r}; allowed are its branches, tags and commits"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"{repo} has no file {file!r} at revision {revision or 'main'}"
    if status == 401:
        return f"the hub does not accept the token (HTTP 401) for {repo}: {_LOGIN} to another"
    if status is not None:
        return f"the hub answered HTTP {status} for {file} of {repo}" + (f"; {_AGAIN}" if status in _BUSY else "")
    return None


def _unreachable(error: BaseException, repo: str, file: str) -> str | None:
    """What to say when no hub answered."""
    from huggingface_hub import errors

    here = f"{file} of {repo} is not downloaded yet"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{here}, and HF_HUB_OFFLINE is set: unset it, or {_ELSEWHERE}"
    if isinstance(error, errors.FileMetadataError | ValueError):  # a login page of a network: an answer, not the hub's
        who = f"what answers is not the hub ({one_line(error)})"
        return f"{here}, and {who}: check HF_ENDPOINT and the proxies, or {_ELSEWHERE}"
    if isinstance(error, errors.HTTPError | errors.LocalEntryNotFoundError):
        return f"{here}, and the hub cannot be reached ({one_line(error)}); {_ELSEWHERE}"
    return None


def _amount(count: int) -> str:
    """A number of bytes for people: 4.9 GB."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"
