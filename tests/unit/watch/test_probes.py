"""Reading what decides, from files that change under one's hands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from tests.layouts import gguf, safetensors, write

from ckptd.core import limits
from ckptd.core.checkpoint_units import Entry, Kind, Members, Unit
from ckptd.core.pending import Key
from ckptd.watch import probes
from ckptd.watch.probes import Probes, examine_file, read_training_state
from ckptd.watch.scanner import RootScanner

UNIT = Unit("step-1", "step-1", "directory")


def seen(root: Path) -> Members:
    found = RootScanner(str(root)).members(UNIT)
    assert found is not None
    return found


def test_files_are_read_once_as_long_as_they_do_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    real = probes.examine_file

    def counting(location: str, *rest: object) -> object:
        read.append(os.path.basename(location))
        return real(location, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(probes, "examine_file", counting)
    write(tmp_path, "step-1/a.safetensors", safetensors())
    write(tmp_path, "step-1/b.gguf", gguf())
    key, known = Key(str(tmp_path), "step-1"), Probes()
    assert {path: e.fault for path, e in known.examine(key, UNIT, seen(tmp_path)).items()} == {
        "a.safetensors": "",
        "b.gguf": "",
    }
    write(tmp_path, "step-1/b.gguf", gguf()[:-50])
    assert known.examine(key, UNIT, seen(tmp_path))["b.gguf"].fault
    assert read == ["a.safetensors", "b.gguf", "b.gguf"]
    known.forget(key)
    known.examine(key, UNIT, seen(tmp_path))
    assert len(read) == 5


def test_what_is_remembered_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "EXAMINED_CHECKPOINTS_MAX", 2)
    write(tmp_path, "step-1/a.safetensors", safetensors())
    known = Probes()
    for number in range(5):
        known.examine(Key(str(tmp_path), "step-1" + "/" * number), UNIT, seen(tmp_path))
    assert len(known._known) == 2


def test_a_file_that_is_gone_or_another_kind_or_size_says_so(tmp_path: Path) -> None:
    entry = Entry(Kind.FILE, 10)
    missing = examine_file(str(tmp_path / "x"), entry, "json")
    assert missing.fault == "cannot be read: No such file or directory"
    os.mkfifo(tmp_path / "pipe")
    assert examine_file(str(tmp_path / "pipe"), entry, "json").fault == "is changing"
    write(tmp_path, "short", b"x")
    assert examine_file(str(tmp_path / "short"), entry, "json").fault == "is changing"


def test_a_disk_that_fails_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "x", b"0123456789")

    def broken(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", broken)
    found = examine_file(str(tmp_path / "x"), Entry(Kind.FILE, 10), "json")
    assert found.fault == "cannot be read: Input/output error"


def test_a_state_that_cannot_be_read_tells_nothing(tmp_path: Path) -> None:
    members = Members({"metrics.json": Entry(Kind.FILE, 10)})
    found = read_training_state(Key(str(tmp_path), "step-1"), UNIT, members)
    assert found.step == 1
    assert found.metrics == {}
