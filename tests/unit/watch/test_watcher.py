"""The watcher on real directories: what it hands out to be stored, and what it says meanwhile."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.layouts import LAYOUTS, archive, latest, safetensors, trainer_state, write

from ckptd.config import WatchRoot
from ckptd.core.pending import Key
from ckptd.core.training_state import NOT_FINITE
from ckptd.watch.watcher import Taken, Watcher


class Rig:
    """A watcher without events, and the clock that it goes by, which the test moves."""

    def __init__(self, root: Path, **config: float | str) -> None:
        self.root = root
        self.now = 1000.0
        self.watcher = Watcher(
            [WatchRoot(root=root, **config)],  # type: ignore[arg-type]
            events=False,
            clock=self,
        )

    def monotonic_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return time.time() + self.now - 1000.0

    def pass_s(self, seconds: float, *, store: bool = True) -> list[Taken]:
        """Lets time pass; what is taken counts as stored."""
        end = self.now + seconds
        taken = []
        while True:
            at = self.watcher.step()
            while store and (one := self.watcher.take()) is not None:
                taken.append(one)
                self.watcher.stored(one.key)
            if at > end:
                self.now = end
                return taken
            self.now = max(at, self.now + 0.01)

    def reasons(self) -> dict[str, str]:
        return {row.path: row.reason for row in self.watcher.rows()}


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_stored_once_and_nothing_over_three_scans(layout: str, rig: Rig) -> None:
    made = LAYOUTS[layout]()
    made.write(rig.root)
    taken = {one.name: one for one in rig.pass_s(12)}
    assert set(taken) == set(made.checkpoints)
    for name, step in made.steps.items():
        assert taken[name].state.step == step
    assert rig.pass_s(35) == []
    assert rig.watcher.counts() == {"stored": len(taken), "refused": 0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_that_can_tell_is_stored_before_its_last_file(layout: str, rig: Rig) -> None:
    """The trainer pauses after each file for longer than settle."""
    made = LAYOUTS[layout]()
    written = set()
    for path, content in made.writes:
        write(rig.root, path, content)
        written.add(path)
        for taken in rig.pass_s(13):
            last = made.incomplete_until.get(taken.name)
            assert last is None or last in written


def test_a_growing_file_is_told_of_and_stored_when_it_is_whole(rig: Rig) -> None:
    content = safetensors(2_400_000)
    for length in (600_000, 1_200_000, 1_800_000):
        write(rig.root, "run/step-1/model.safetensors", content[:length])
        assert rig.pass_s(11) == []
        share = f"{length / 1e6:.1f} of 2.4 MB"
        assert rig.reasons() == {"run/step-1": f"model.safetensors has {share}"}
    write(rig.root, "run/step-1/model.safetensors", content)
    (taken,) = rig.pass_s(13)
    assert taken.location == rig.root / "run/step-1"
    assert (taken.key, taken.name) == (Key(str(rig.root), "run/step-1"), "run/step-1")


def test_written_beside_and_renamed_into_place(rig: Rig) -> None:
    write(rig.root, "run/tmp-checkpoint-5/model.safetensors", safetensors())
    assert rig.pass_s(20) == []
    assert "temporary name" in rig.reasons()["run/tmp-checkpoint-5"]
    (rig.root / "run/tmp-checkpoint-5").rename(rig.root / "run/checkpoint-5")
    assert [one.name for one in rig.pass_s(13)] == ["run/checkpoint-5"]
    assert rig.reasons() == {}


def test_overwritten_in_place_with_old_times_is_stored_again(rig: Rig) -> None:
    latest(0).write(rig.root)
    assert len(rig.pass_s(13)) == 1
    path = rig.root / "run/latest/model.safetensors"
    seen = path.stat()
    before = path.read_bytes()
    path.write_bytes(latest(1).contents()["run/latest/model.safetensors"])
    assert path.read_bytes() != before
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert len(rig.pass_s(13)) == 1


def test_a_forgotten_temporary_file_is_left_out_with_a_warning(rig: Rig) -> None:
    latest().write(rig.root)
    write(rig.root, "run/latest/model.safetensors.tmp", b"x")
    assert rig.pass_s(590) == []
    (taken,) = rig.pass_s(30)
    assert taken.excluded == {"model.safetensors.tmp"}
    assert "model.safetensors.tmp" in taken.warnings[0]


def test_a_forgotten_directory_with_a_temporary_name_is_left_out(rig: Rig) -> None:
    write(rig.root, "tmp-x/w.bin", archive())
    assert rig.pass_s(620) == []
    assert rig.reasons() == {}
    assert [row.path for row in rig.watcher.left_out()] == ["tmp-x"]


def test_a_done_marker_skips_the_quiet_time_and_is_no_change(rig: Rig) -> None:
    latest().write(rig.root)
    write(rig.root, "run/latest/.ckptd-done", b"")
    (taken,) = rig.pass_s(0)
    assert taken.excluded == frozenset()
    (rig.root / "run/latest/.ckptd-done").unlink()
    assert rig.pass_s(30) == []


def test_a_checkpoint_that_appears_below_another_is_no_part_of_it(rig: Rig) -> None:
    write(rig.root, "run/w.bin", archive())
    rig.pass_s(3, store=False)
    write(rig.root, "run/step-9/w.bin", archive()[:100])
    taken = rig.watcher.take()
    assert taken is not None
    assert taken.excluded == {"step-9"}
    assert rig.watcher.is_unchanged(taken)
    write(rig.root, "run/step-10/w.bin", b"")
    assert not rig.watcher.is_unchanged(taken)


def test_what_changed_after_it_was_found_complete_is_not_handed_out(rig: Rig) -> None:
    latest().write(rig.root)
    rig.pass_s(3, store=False)
    assert rig.watcher.counts()["ready"] == 1
    write(rig.root, "run/latest/model.safetensors", safetensors()[:50])
    assert rig.watcher.take() is None
    assert "model.safetensors" in rig.reasons()["run/latest"]
    assert len(rig.pass_s(0)) == 0
    latest().write(rig.root)
    assert len(rig.pass_s(13)) == 1


def test_what_was_deleted_after_it_was_found_complete_is_forgotten(rig: Rig) -> None:
    latest().write(rig.root)
    write(rig.root, "single.pt", archive())
    rig.pass_s(3, store=False)
    shutil.rmtree(rig.root / "run")
    (rig.root / "single.pt").unlink()
    assert rig.watcher.take() is None
    assert rig.watcher.counts() == {"refused": 0}


def test_changes_while_it_is_stored_are_seen(rig: Rig) -> None:
    latest(0).write(rig.root)
    rig.pass_s(3, store=False)
    taken = rig.watcher.take()
    assert taken is not None
    assert rig.watcher.is_unchanged(taken)
    latest(1).write(rig.root)
    assert not rig.watcher.is_unchanged(taken)
    rig.watcher.source_changed(taken.key)
    assert "changed while it was read" in rig.reasons()["run/latest"]
    assert len(rig.pass_s(13)) == 1
    shutil.rmtree(rig.root)
    assert not rig.watcher.is_unchanged(taken)


def test_a_failed_store_is_told_and_tried_again(rig: Rig) -> None:
    latest().write(rig.root)
    rig.pass_s(3, store=False)
    taken = rig.watcher.take()
    assert taken is not None
    rig.watcher.failed(taken.key, "no node answers")
    assert rig.reasons() == {"run/latest": "no node answers"}
    assert rig.watcher.is_busy()
    rig.watcher.retry_failed()
    assert len(rig.pass_s(0)) == 1
    assert not rig.watcher.is_busy()


def test_a_root_that_goes_away_waits_and_comes_back(tmp_path: Path) -> None:
    root = tmp_path / "root"
    latest().write(root)
    rig = Rig(root)
    assert len(rig.pass_s(3)) == 1
    write(root, "run/step-1/w.bin", archive())
    rig.pass_s(11, store=False)
    root.rename(tmp_path / "away")
    assert rig.watcher.take() is None
    rig.pass_s(25)
    assert "No such file" in rig.reasons()[""]
    (tmp_path / "away").rename(root)
    assert [one.name for one in rig.pass_s(25)] == ["run/step-1"]
    assert rig.reasons() == {}


def test_a_restart_reads_nothing_again(rig: Rig) -> None:
    latest().write(rig.root)
    rig.pass_s(3)
    again = Rig(rig.root)
    for key, fingerprint in rig.watcher.remembered():
        again.watcher.remember(key, fingerprint)
    assert again.pass_s(35) == []
    assert len(Rig(rig.root).pass_s(35)) == 1


def test_a_loss_that_is_no_number_comes_with_the_checkpoint(rig: Rig) -> None:
    write(rig.root, "run/step-4/w.pt", archive())
    write(rig.root, "run/step-4/trainer_state.json", trainer_state(4, loss=float("nan")))
    write(rig.root, "run/step-4/metrics.json", b'{"ppl": 2.5}')
    (taken,) = rig.pass_s(3)
    assert taken.state.metrics[NOT_FINITE] == 1.0
    assert taken.state.metrics["ppl"] == 2.5


def test_prefix_and_pattern_of_a_root(tmp_path: Path) -> None:
    write(tmp_path, "a/final/state.any", b"x")
    write(tmp_path, "a/step-1/w.bin", archive())
    rig = Rig(tmp_path, prefix="mac", pattern="*/final")
    assert [one.name for one in rig.pass_s(3)] == ["mac/a/final"]


# -- with real events and the real clock


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Watcher, threading.Event]]:
    woken = threading.Event()
    config = WatchRoot(root=tmp_path, settle_s=0.2, settle_max_s=60.0, retry_s=3000.0)
    watcher = Watcher([config], wake=woken.set)
    watcher.step()
    yield watcher, woken
    watcher.close()


def taken_within(live: tuple[Watcher, threading.Event], seconds: float = 30.0) -> Taken:
    """The next checkpoint to store. A periodic scan comes too late: only events help."""
    watcher, woken = live
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        at = watcher.step()
        if (taken := watcher.take()) is not None:
            watcher.stored(taken.key)
            return taken
        woken.wait(max(0.0, min(at, deadline) - time.monotonic()))
        woken.clear()
    raise AssertionError("nothing was found to store")


def test_events_find_what_is_new_overwritten_renamed_and_beside(
    live: tuple[Watcher, threading.Event], tmp_path: Path
) -> None:
    latest(0).write(tmp_path)
    assert taken_within(live).name == "run/latest"
    latest(1).write(tmp_path)
    assert taken_within(live).name == "run/latest"
    (tmp_path / "run/latest").rename(tmp_path / "run/old")
    assert taken_within(live).name == "run/old"
    write(tmp_path, "run/old/checkpoint-5/w.bin", archive())
    assert taken_within(live).name == "run/old/checkpoint-5"
    write(tmp_path, "other/.ckptd-checkpoint", b"")
    assert taken_within(live).name == "other"


def test_a_root_without_events_is_scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr("watchdog.observers.api.BaseObserver.schedule", refuse)
    latest().write(tmp_path)
    watcher = Watcher([WatchRoot(root=tmp_path, settle_s=0.0)])
    try:
        watcher.step()
        assert watcher.take() is not None
    finally:
        watcher.close()


def unreadable_with_something_ready(directory: Path) -> Rig:
    root = directory / "root"
    latest().write(root)
    rig = Rig(root)
    rig.pass_s(13, store=False)
    root.rename(directory / "away")
    rig.pass_s(25, store=False)
    assert rig.watcher.counts()["ready"] == 1
    return rig


def test_what_is_ready_in_a_root_that_is_away_is_not_to_be_taken(tmp_path: Path) -> None:
    rig = unreadable_with_something_ready(tmp_path)
    assert not rig.watcher.has_ready() and rig.watcher.take() is None
    (tmp_path / "away").rename(tmp_path / "root")
    rig.pass_s(25, store=False)
    assert rig.watcher.has_ready() and rig.watcher.take() is not None


def test_times_of_files_go_by_the_wall_clock(tmp_path: Path) -> None:
    """What nobody has written to for long was forgotten, although it is seen for the first time."""
    rig = Rig(tmp_path)
    path = tmp_path / "tmp-x/w.bin"
    path.parent.mkdir()
    path.write_bytes(b"x")
    rig.now += 620
    rig.pass_s(6)
    assert [row.path for row in rig.watcher.left_out()] == ["tmp-x"]


def test_a_watcher_of_nothing_rests(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    idle = Watcher([], events=False, clock=rig)
    assert idle.step() > rig.now + 60
