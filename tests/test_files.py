"""Whole or absent: atomic files and folders."""

import os
from pathlib import Path

import pytest

from orrery.errors import InputError
from orrery.files import atomic_file, atomic_folder, check_writable


def test_a_file_appears_only_when_the_block_is_done(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with atomic_file(target) as partial:
        partial.write_text("new")
        assert not target.exists()
        assert partial.suffix == ".txt" and partial.parent == tmp_path
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(type(error)), atomic_file(target) as partial:
        partial.write_text("half")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_an_input_error_that_names_the_path(tmp_path: Path, full_disk) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(InputError, match=r"a\.bin: File too large"), full_disk(1000), atomic_file(target) as partial:
        partial.write_bytes(bytes(2000))
    assert os.listdir(tmp_path) == []


def test_dev_full_reports_no_space(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    with pytest.raises(InputError, match="No space left on device"), atomic_file(tmp_path / "a.bin") as partial:
        partial.symlink_to("/dev/full")
        partial.write_bytes(b"x")
    assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="nowhere does not exist"):
        check_writable(tmp_path / "nowhere" / "a.mp4")
    with pytest.raises(InputError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "a.mp4")
    with pytest.raises(InputError, match="it is a folder"), atomic_file(tmp_path):
        pass


def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root, who may write anywhere
    with pytest.raises(InputError, match="no permission"):
        check_writable(tmp_path / "a.mp4")


def test_a_folder_replaces_only_its_like(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("first", "second"):
        with atomic_folder(target, replaces="config.json") as partial:
            (partial / "config.json").write_text(text)
        assert (target / "config.json").read_text() == text
    assert os.listdir(tmp_path) == ["model"]
    home = tmp_path / "home"
    home.mkdir()
    (home / "diary.txt").write_text("dear")
    with pytest.raises(InputError, match=r"no config\.json"), atomic_folder(home, replaces="config.json"):
        pass
    assert (home / "diary.txt").read_text() == "dear"


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(RuntimeError), atomic_folder(target, replaces="config.json") as partial:
        (partial / "config.json").write_text("half")
        raise RuntimeError
    assert (target / "config.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_an_error_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error, atomic_file(tmp_path / "a.mp4") as outer, atomic_file(outer):
        raise OSError(28, "No space left on device")
    assert str(error.value) == f"cannot write {tmp_path / 'a.mp4'}: No space left on device"


def test_a_name_that_no_file_can_have_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too long"):
        check_writable(tmp_path / ("x" * 300 + ".mp4"))
    assert check_writable(tmp_path / "a.mp4") and not list(tmp_path.iterdir())
