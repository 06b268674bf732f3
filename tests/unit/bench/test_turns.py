"""When a source is stored: after it has held still, unless it is asked otherwise."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from bench import report, store_restore, turns
from bench.processes import Command, Leg


class CopyingSide:
    """Stores and restores with `cp`."""

    name = "cp"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ages_s: list[float] = []

    def start(self) -> None:
        self.directory.mkdir()

    def stop(self) -> None:
        pass

    def clear(self) -> None:
        self.restored(Path("weights.bin")).unlink()

    def daemons(self) -> dict[str, int]:
        return {}

    def store(self, source: Path) -> list[Command]:
        self.ages_s.append(time.time() - source.stat().st_mtime)
        return [Command("store", ["cp", str(source), str(self.directory / "stored")], {})]

    def restore(self, source: Path) -> list[Command]:
        copied = [str(self.directory / "stored"), str(self.restored(source))]
        return [Command("restore", ["cp", *copied], {})]

    def check_stored(self, source: Path, output_directory: Path) -> None:
        assert (self.directory / "stored").is_file()

    def restored(self, source: Path) -> Path:
        return self.directory / f"restored-{source.name}"


@pytest.mark.parametrize("settled", [True, False])
def test_a_source_has_held_still_unless_it_is_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settled: bool
) -> None:
    monkeypatch.setattr(turns, "SETTLED_S", 0.5)
    side = CopyingSide(tmp_path / "side")
    side.start()
    legs: dict[str, Leg] = turns.take_turn(side, tmp_path, 1000, settled=settled)
    assert legs.keys() == {"store", "restore"}
    assert (side.ages_s[0] >= 0.5) is settled


@pytest.mark.parametrize(
    ("arguments", "settled", "kept"),
    [([], True, True), (["--just-written"], False, False), (["--trial"], True, False)],
)
def test_only_a_whole_run_with_sources_that_held_still_is_kept(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    settled: bool,
    kept: bool,
) -> None:
    asked: list[bool] = []

    def run(size: int, count: int, parent: Path | None, *, settled: bool) -> dict[str, int]:
        asked.append(settled)
        return {"size": size}

    (tmp_path / "bench").mkdir()
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(store_restore, "ROOT", tmp_path)
    monkeypatch.setattr(store_restore, "missing", lambda: None)
    monkeypatch.setattr(store_restore, "run", run)
    monkeypatch.setattr(store_restore, "encode", lambda results: json.dumps(results).encode())
    monkeypatch.setattr(report, "page", lambda results: "page")
    monkeypatch.setattr(report, "terminal_text", lambda results, profile: "table")
    assert store_restore.main(arguments) == 0
    assert asked == [settled]
    assert (tmp_path / "bench" / "results.json").exists() is kept
    assert (tmp_path / "docs" / "benchmark.md").exists() is kept
