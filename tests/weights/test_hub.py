"""Downloads: what comes is what the hub has, a cut costs only what was not there yet, and errors say what to do.

Everything runs against the server of conftest.py on 127.0.0.1.
"""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from orrery.errors import InputError
from orrery.weights.hub import cached_file, cached_folder, fetch_file, fetch_folder

REPO, WEIGHTS = "owner/model", "vae/model.safetensors"
DATA = random.Random(0).randbytes(20_500)  # 20 of the fixture's chunks and a half


@pytest.fixture
def served(hub, tmp_path: Path):
    """The hub with one model: two small files, and one large one in a folder."""
    folder = tmp_path / "served"
    (folder / "vae").mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(DATA)
    (folder / "vae" / "config.json").write_text('{"base": 8}')
    (folder / "README.md").write_text("# card")
    hub.folders[REPO] = folder
    return hub


def partials(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "hub").rglob("*.incomplete"))


def break_for_good(served) -> None:
    """The first try brings 7300 bytes, of which 7 whole chunks reach the disk; all others bring nothing."""
    served.cuts = [(7300, "close")] + [(0, "close")] * 50


def test_import_does_not_import_huggingface_hub() -> None:
    code = "import sys, orrery.weights.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_file_comes_whole_and_once(served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cached_file(REPO, WEIGHTS, None) is None and served.requests == []
    path = fetch_file(REPO, WEIGHTS, None)
    assert path.read_bytes() == DATA
    assert path.is_relative_to(tmp_path / "hub") and path.as_posix().endswith(f"/{WEIGHTS}")
    line = capsys.readouterr().err.splitlines()[0]
    for part in (WEIGHTS, REPO, "main", "20.5 kB", str(tmp_path / "hub")):
        assert part in line
    asked = len(served.requests)
    served.stop()
    for revision in (None, "main", served.commit(REPO)):
        assert fetch_file(REPO, WEIGHTS, revision) == cached_file(REPO, WEIGHTS, revision) == path
    assert len(served.requests) == asked and capsys.readouterr().err == "" and partials(tmp_path) == []


def test_huggingface_hub_sees_the_file_as_its_own(served) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir

    path = fetch_file(REPO, WEIGHTS, None)
    sent = served.sent(WEIGHTS)
    assert hf_hub_download(REPO, WEIGHTS) == str(path) and served.sent(WEIGHTS) == sent == len(DATA)
    cache = scan_cache_dir()
    assert not cache.warnings and [repo.repo_id for repo in cache.repos] == [REPO]
    assert cache.size_on_disk == len(DATA)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_cut_connection_is_taken_up_within_the_call(served, how: str) -> None:
    served.cut(7300, how=how)
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA
    first, second = [item for item in served.asked("GET", WEIGHTS) if item.storage]
    assert first.range is None and second.range == "bytes=7000-"  # whole chunks are on disk
    assert second.sent == len(DATA) - 7000


def test_the_next_call_goes_on_where_a_cut_one_stopped(served, tmp_path: Path, capsys) -> None:
    break_for_good(served)
    with pytest.raises(InputError, match=r"broke after 7\.0 kB of 20\.5 kB of vae.*same command again: it goes on"):
        fetch_file(REPO, WEIGHTS, None)
    assert cached_file(REPO, WEIGHTS, None) is None
    assert [path.read_bytes() for path in partials(tmp_path)] == [DATA[:7000]]
    served.cuts.clear()
    served.requests.clear()
    capsys.readouterr()
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA
    (asked,) = [item for item in served.asked("GET", WEIGHTS) if item.storage]
    assert asked.range == "bytes=7000-" and asked.sent == len(DATA) - 7000
    assert "7.0 kB of it here already" in capsys.readouterr().err and partials(tmp_path) == []


def test_a_killed_process_loses_nothing(served, tmp_path: Path) -> None:
    served.cut(7300, how="stall")
    code = "from huggingface_hub import constants as c; c.DOWNLOAD_CHUNK_SIZE = 1000\n"
    code += f"from orrery.weights.hub import fetch_file; fetch_file({REPO!r}, {WEIGHTS!r}, None)"
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert served.stalled.wait(30)
    for _ in range(100):
        if partials(tmp_path) and partials(tmp_path)[0].stat().st_size:
            break
        threading.Event().wait(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    (partial,) = partials(tmp_path)
    kept = partial.stat().st_size
    assert 0 < kept < len(DATA) and cached_file(REPO, WEIGHTS, None) is None
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA
    assert [item.range for item in served.asked("GET", WEIGHTS) if item.storage] == [None, f"bytes={kept}-"]


def test_a_server_that_ignores_ranges_gives_the_same_file(served) -> None:
    served.ranges = False
    served.cut(7300)
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA
    assert [item.sent for item in served.asked("GET", WEIGHTS) if item.storage] == [7300, len(DATA)]


def test_what_a_crash_spoilt_is_not_taken_for_the_file(served, tmp_path: Path) -> None:
    break_for_good(served)
    with pytest.raises(InputError):
        fetch_file(REPO, WEIGHTS, None)
    served.cuts.clear()
    partials(tmp_path)[0].write_bytes(bytes(7000))
    with pytest.raises(InputError, match="has the SHA-256 .* the hub announced .* nothing of it is kept: try again"):
        fetch_file(REPO, WEIGHTS, None)
    assert cached_file(REPO, WEIGHTS, None) is None and partials(tmp_path) == []
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA


def test_a_part_longer_than_the_file_starts_over(served, tmp_path: Path) -> None:
    break_for_good(served)
    with pytest.raises(InputError):
        fetch_file(REPO, WEIGHTS, None)
    served.cuts.clear()
    partials(tmp_path)[0].write_bytes(DATA + b"more")
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA


@pytest.mark.parametrize("file", [WEIGHTS, "README.md"])
@pytest.mark.parametrize("off", [-3, 3])
def test_a_size_other_than_announced_is_refused(served, tmp_path: Path, file: str, off: int) -> None:
    size = len((served.folders[REPO] / file).read_bytes())
    served.announced[file] = size + off
    with pytest.raises(InputError, match=f"{file} has {size} bytes, the hub announced {size + off}"):
        fetch_file(REPO, file, None)
    assert cached_file(REPO, file, None) is None and partials(tmp_path) == []


def test_two_at_once_download_once(served) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch_file(REPO, WEIGHTS, None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [DATA] * 4
    assert served.sent(WEIGHTS) == len(DATA)


def test_a_busy_hub_is_asked_again(served) -> None:
    served.busy(2)
    assert fetch_file(REPO, "README.md", None).read_text() == "# card"
    served.busy(3)
    with pytest.raises(InputError, match=f"the hub answered HTTP 503 for {WEIGHTS} of {REPO}; run the same command"):
        fetch_file(REPO, WEIGHTS, None)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch_file(REPO, WEIGHTS, None)
    fetch_file(REPO, "README.md", None)
    assert {item.token for item in served.requests if not item.storage} == {"Bearer hf_secret"}
    assert {item.token for item in served.requests if item.storage} == {None}


def test_files_in_xet_come_in_the_way_that_can_go_on(served, tmp_path: Path, monkeypatch, capsys) -> None:
    from huggingface_hub import constants, file_download

    served.xet = True
    asked = []

    def xet_get(*, incomplete_path: Path, **more) -> None:
        asked.append(incomplete_path.write_bytes(DATA))

    monkeypatch.setattr(file_download, "is_xet_available", lambda: True)
    monkeypatch.setattr(file_download, "xet_get", xet_get)
    served.cut(7300)
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA and served.sent(WEIGHTS) > 0 and asked == []
    shutil.rmtree(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_XET_HIGH_PERFORMANCE", True)
    served.requests.clear()
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA and served.sent(WEIGHTS) == 0 and len(asked) == 1
    assert "through Xet: should the download be cut, it starts over" in capsys.readouterr().err


def test_a_file_without_a_size_comes_but_not_silently(served, capsys: pytest.CaptureFixture[str]) -> None:
    served.announced[WEIGHTS] = None
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA
    assert "comes without a size: should the download be cut, it starts over" in capsys.readouterr().err


def test_files_too_large_for_http_need_xet(served, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", 1000)
    with pytest.raises(InputError, match=f"{WEIGHTS} is too large for HTTP: install hf_xet"):
        fetch_file(REPO, WEIGHTS, None)


def both(message: str, repo: str = REPO, file: str = WEIGHTS, revision: str | None = None) -> None:
    """A file and a folder fail with the same message, of one line."""
    for fetch in (lambda: fetch_file(repo, file, revision), lambda: fetch_folder(repo, revision, [file])):
        with pytest.raises(InputError, match=message) as raised:
            fetch()
        assert "\n" not in str(raised.value)


LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
LICENCE = f"{REPO} is gated: accept the licence at https://huggingface.co/{REPO} and {LOGIN}"


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "GatedRepo", LICENCE),
        (403, "GatedRepo", LICENCE),
        (403, None, LICENCE),
        (401, None, f"the hub does not accept the token (HTTP 401) for {REPO}: {LOGIN} to another"),
        (418, None, f"the hub answered HTTP 418 for {WEIGHTS} of {REPO}"),
    ],
)
def test_no_access_says_what_to_do(served, status: int, code: str | None, message: str) -> None:
    served.refuse(REPO, status, code)
    both(f"^{re.escape(message)}$")


@pytest.mark.parametrize(
    ("repo", "file", "revision", "message"),
    [
        ("owner/other", WEIGHTS, None, f"the hub has no repository 'owner/other', or it is private: .*{LOGIN}"),
        (REPO, WEIGHTS, "v9", f"{REPO} has no revision 'v9'"),
        (REPO, "vae/other.pt", None, f"{REPO} has no file 'vae/other.pt' at revision main"),
        ("a/b/c", WEIGHTS, None, "'a/b/c' is not the name of a repository of the hub; allowed is OWNER/NAME"),
        (REPO, "../x", None, "'../x' is not the path of a file"),
        (REPO, "/etc/x", None, "'/etc/x' is not the path of a file"),
    ],
)
def test_what_is_not_there_is_named(served, repo: str, file: str, revision: str | None, message: str) -> None:
    both(message, repo, file, revision)


def test_offline_says_so(served, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    both(f"{WEIGHTS} of {REPO} is not downloaded yet, and HF_HUB_OFFLINE is set: .* pass the path")
    assert served.requests == []


def test_no_network_says_so(served) -> None:
    served.stop()
    both(f"{WEIGHTS} of {REPO} is not downloaded yet, and the hub cannot be reached .* pass the path")


def test_a_login_page_is_not_taken_for_the_hub(served) -> None:
    served.portal = True
    both(f"{WEIGHTS} of {REPO} is not downloaded yet, and what answers is not the hub .*check HF_ENDPOINT")
    assert served.asked("GET", WEIGHTS) == []


def test_too_little_room_is_said_before_anything_comes(served, monkeypatch: pytest.MonkeyPatch) -> None:
    import orrery.weights.hub as module

    monkeypatch.setattr(module, "shutil", SimpleNamespace(disk_usage=lambda path: SimpleNamespace(free=5000)))
    both(r"cannot write .*: 20\.5 kB are needed, 5\.0 kB are free; free some room, or set HF_HUB_CACHE")
    assert served.sent(WEIGHTS) == 0


def test_a_disk_that_fills_up_keeps_what_came(served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import file_download

    def fills_up(url: str, out, **options) -> None:
        out.write(DATA[:7000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", fills_up)
        with pytest.raises(InputError, match=r"cannot write .*: No space left on device; free .*: it goes on where"):
            fetch_file(REPO, WEIGHTS, None)
    assert fetch_file(REPO, WEIGHTS, None).read_bytes() == DATA
    assert [item.range for item in served.asked("GET", WEIGHTS) if item.storage] == ["bytes=7000-"]


def test_a_cache_that_cannot_be_written_is_named(served, tmp_path: Path) -> None:
    (tmp_path / "hub").write_text("a file")
    both(f"cannot write {tmp_path / 'hub'}.*: Not a directory")


def test_a_folder_holds_what_matches_and_is_complete_offline(served, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fetch_folder(REPO, None, ["vae/*"])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {WEIGHTS, "vae/config.json"} and (folder / WEIGHTS).read_bytes() == DATA
    lines = capsys.readouterr().err
    assert "to download: 2 of 2 files of owner/model (revision main), 20.5 kB" in lines
    assert f"downloading {WEIGHTS} of {REPO}" in lines
    served.stop()
    for revision in (None, folder.name):
        assert fetch_folder(REPO, revision, ["vae/*"]) == folder == cached_folder(REPO, revision, ["vae/config.json"])
    assert capsys.readouterr().err == ""
    with pytest.raises(InputError, match="has no file '\\*.pt' at revision main"):
        fetch_folder(REPO, None, ["vae/*", "*.pt"])
    with pytest.raises(InputError, match="cannot be reached"):  # known to be there, but not here
        fetch_folder(REPO, None, ["vae/*", "README.md"])


def test_a_folder_that_was_cut_is_not_complete_and_goes_on(served) -> None:
    break_for_good(served)
    with pytest.raises(InputError, match="same command again"):
        fetch_folder(REPO, None, ["*"])
    assert cached_folder(REPO, None, [WEIGHTS]) is None
    served.cuts.clear()
    served.requests.clear()
    folder = fetch_folder(REPO, None, ["*"])
    assert (folder / WEIGHTS).read_bytes() == DATA and served.sent(WEIGHTS) == len(DATA) - 7000
    required = ["README.md", "vae/config.json", WEIGHTS]
    assert cached_folder(REPO, None, required) == folder
    (folder / WEIGHTS).resolve().unlink()  # a link that leads nowhere is no file
    assert cached_folder(REPO, None, required) is None
    assert cached_folder(REPO, None, required[:2]) == folder


def test_a_folder_adds_what_is_missing(served) -> None:
    fetch_file(REPO, WEIGHTS, None)
    served.requests.clear()
    folder = fetch_folder(REPO, "main", ["README.md", "vae/*.safetensors"])
    assert (folder / "README.md").read_text() == "# card" and (folder / WEIGHTS).read_bytes() == DATA
    assert served.sent(WEIGHTS) == 0


def test_a_commit_is_not_another_commit(served) -> None:
    old, first = served.commit(REPO), fetch_folder(REPO, None, ["README.md"])
    (served.folders[REPO] / "README.md").write_text("# another")
    new = served.commit(REPO)
    assert fetch_folder(REPO, None, ["README.md"]) == first  # a branch stays what it was when it came
    assert cached_file(REPO, "README.md", new) is None
    second = fetch_folder(REPO, new, ["README.md"])
    assert (first.name, second.name) == (old, new)
    assert [(folder / "README.md").read_text() for folder in (first, second)] == ["# card", "# another"]


def test_a_branch_that_moves_during_the_download_is_an_error(served, monkeypatch: pytest.MonkeyPatch) -> None:
    import orrery.weights.hub as module

    download = module._download

    def then_moves(repo: str, file: str, revision: str | None) -> None:
        download(repo, file, revision)
        (served.folders[REPO] / "README.md").write_text("# another")

    monkeypatch.setattr(module, "_download", then_moves)
    with pytest.raises(InputError, match=f"{REPO} changed at revision main while it was downloaded"):
        fetch_folder(REPO, None, ["README.md"])
