"""What a scan sees of a real directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.layouts import write

from ckptd.core import limits
from ckptd.core.checkpoint_units import Kind, Unit
from ckptd.errors import RootUnreadable
from ckptd.watch.scanner import RootScanner


def test_names_kinds_sizes_and_times_are_seen(tmp_path: Path) -> None:
    write(tmp_path, "run/step-1/w.bin", b"12345")
    os.mkfifo(tmp_path / "run" / "pipe")
    (tmp_path / "run" / "file-link").symlink_to("step-1/w.bin")
    (tmp_path / "run" / "directory-link").symlink_to("step-1")
    (tmp_path / "run" / "dangling").symlink_to("nowhere")
    (tmp_path / "run" / "loop").symlink_to("loop")
    snapshot = RootScanner(str(tmp_path)).scan()
    assert {name: entry.kind for name, entry in snapshot["run"].items()} == {
        "step-1": Kind.DIRECTORY,
        "pipe": Kind.SPECIAL,
        "file-link": Kind.FILE_LINK,
        "directory-link": Kind.DIRECTORY_LINK,
        "dangling": Kind.DANGLING_LINK,
        "loop": Kind.DANGLING_LINK,
    }
    seen = (tmp_path / "run/step-1/w.bin").stat()
    for entry in (snapshot["run/step-1"]["w.bin"], snapshot["run"]["file-link"]):
        assert (entry.size, entry.mtime_ns, entry.inode) == (5, seen.st_mtime_ns, seen.st_ino)
    assert set(snapshot) == {"", "run", "run/step-1"}


def test_a_link_to_a_device_is_special(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    assert RootScanner(str(tmp_path)).scan()[""]["null"].kind is Kind.SPECIAL


def test_one_checkpoint_alone_is_scanned(tmp_path: Path) -> None:
    write(tmp_path, "run/step-1/sub/w.bin", b"1")
    write(tmp_path, "run/step-2/w.bin", b"1")
    write(tmp_path, "a.pt", b"1")
    root = RootScanner(str(tmp_path))
    assert set(root.scan("run/step-1")) == {"run/step-1", "run/step-1/sub"}
    found = root.members(Unit("run/step-1", "x", "directory"))
    assert found is not None
    assert set(found.entries) == {"sub", "sub/w.bin"}
    file = root.members(Unit("a.pt", "x", "file"))
    assert file is not None
    assert list(file.entries) == ["a.pt"]


def test_what_is_gone_has_no_members(tmp_path: Path) -> None:
    root = RootScanner(str(tmp_path))
    assert root.members(Unit("x", "x", "directory")) is None
    assert root.members(Unit("x", "x", "file")) is None
    (tmp_path / "x").mkdir()
    assert root.members(Unit("x", "x", "file")) is None
    write(tmp_path, "y", b"")
    assert root.members(Unit("y", "y", "directory")) is None


def test_leftovers_of_restores_are_not_looked_into(tmp_path: Path) -> None:
    write(tmp_path, ".x.ckptd-restore-01ab/w.bin", b"1")
    assert set(RootScanner(str(tmp_path)).scan()) == {""}


def test_a_root_that_is_missing_or_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RootUnreadable, match="No such file"):
        RootScanner(str(tmp_path / "x")).scan()
    write(tmp_path, "file", b"")
    with pytest.raises(RootUnreadable, match="not a directory"):
        RootScanner(str(tmp_path / "file")).scan()
    with pytest.raises(RootUnreadable):
        RootScanner(str(tmp_path / "x")).members(Unit("a.pt", "x", "file"))


def _forbidding(monkeypatch: pytest.MonkeyPatch, forbidden: Path, error: type[OSError]) -> None:
    """The system refuses to list a directory (permissions do not bind root)."""
    scandir = os.scandir

    def refusing(path: str) -> object:
        if str(path).rstrip("/") == str(forbidden):
            raise error(13 if error is PermissionError else 2, "refused", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)


def test_a_directory_that_cannot_be_listed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "run/secret/w.bin", b"1")
    _forbidding(monkeypatch, tmp_path / "run/secret", PermissionError)
    snapshot = RootScanner(str(tmp_path)).scan()
    assert snapshot["run"]["secret"].kind is Kind.UNREADABLE
    assert "run/secret" not in snapshot


def test_a_directory_that_vanishes_meanwhile_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "run/w.bin", b"1")
    _forbidding(monkeypatch, tmp_path / "run", FileNotFoundError)
    assert "run" not in RootScanner(str(tmp_path)).scan()


def test_a_root_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _forbidding(monkeypatch, tmp_path, PermissionError)
    with pytest.raises(RootUnreadable, match="refused"):
        RootScanner(str(tmp_path)).scan()


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCHED_ENTRIES_MAX", 3)
    for number in range(3):
        write(tmp_path, f"run/{number}", b"")
    with pytest.raises(RootUnreadable, match="over 3"):
        RootScanner(str(tmp_path)).scan()


def test_what_lies_too_deep_is_not_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WATCHED_DEPTH_MAX", 1)
    write(tmp_path, "a/b/c", b"")
    snapshot = RootScanner(str(tmp_path)).scan()
    assert snapshot["a"]["b"].kind is Kind.UNREADABLE


def test_a_mount_point_without_its_disk_is_not_taken_for_an_empty_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    write(root, "run/w.bin", b"1")
    scanned = RootScanner(str(root))
    scanned.scan()
    # Another disk at the same place: as an unmount leaves it, and as another mount does.
    monkeypatch.setattr(scanned, "_device", -1)
    scanned.scan()
    (root / "run/w.bin").unlink()
    (root / "run").rmdir()
    scanned.scan()
    monkeypatch.setattr(scanned, "_device", -1)
    with pytest.raises(RootUnreadable, match="another disk"):
        scanned.scan()
