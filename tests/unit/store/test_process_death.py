"""The process dies in front of its k-th file-system call, for every k: old or new state, never a
torn one, and whatever was acknowledged is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.model_disk import ModelDisk
from tests.unit.store.call_hooks import Hooked, ProcessDied, dies_at
from tests.unit.store.workload import faults, whole_life

from ckptd.store.filesystem import OPERATING_SYSTEM

ROOT = Path(__file__).resolve().parents[3]
EVERYTHING = {"init", "first", "document", "same", "other"}


def count_calls() -> int:
    disk = ModelDisk()
    disk.mkdir("/disk")
    hooked = Hooked(disk)
    whole_life(hooked.port, "/disk/store", lambda label: None)
    return len(hooked.calls)


CALLS = count_calls()


def test_death_at_every_call(tmp_path: Path) -> None:
    seen: set[frozenset[str]] = set()
    for number in range(1, CALLS + 2):
        (tmp_path / str(number)).mkdir()
        path = str(tmp_path / str(number) / "store")
        said: set[str] = set()
        hooked = dies_at(OPERATING_SYSTEM, number)
        if number <= CALLS:
            with pytest.raises(ProcessDied):
                whole_life(hooked.port, path, said.add)
        else:
            whole_life(hooked.port, path, said.add)
        close_what_a_dead_process_would_not_hold(hooked)
        assert faults(OPERATING_SYSTEM, path, said) == [], hooked.calls[-1]
        seen.add(frozenset(said))
    # The deaths have met the store in all of its states.
    assert {len(said) for said in seen} == set(range(len(EVERYTHING) + 1))


def close_what_a_dead_process_would_not_hold(hooked: Hooked) -> None:
    opened: set[int] = set()
    for call in hooked.calls:
        if call.name == "open" and call.number in hooked.results:
            opened.add(hooked.results[call.number])
        elif call.name == "close" and call.number in hooked.results:
            opened.discard(call.arguments[0])
    for descriptor in opened:
        os.close(descriptor)


def test_death_of_a_real_process_at_every_call(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.store.dying_child", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    lives = sorted(tmp_path.iterdir(), key=lambda found: int(found.name))
    assert len(lives) == CALLS + 1
    for life in lives:
        said = set((life / "said").read_text().split())
        assert faults(OPERATING_SYSTEM, str(life / "store"), said) == [], life.name
    assert said == EVERYTHING
