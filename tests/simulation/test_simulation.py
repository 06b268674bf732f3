"""The simulation runs, is the same each time, and finds faults. `make sim` runs it at large."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from tests.simulation.mutants import MUTANTS, Mutant
from tests.simulation.sweep import Found, Hunt, fails_unplanted

ROOT = Path(__file__).parents[2]


def simulate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_some_seeds_hold() -> None:
    found = simulate("--seeds", "8", "--processes", "2")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "8 seeds" in found.stdout and " 0 failed" in found.stdout


def test_a_seed_happens_in_the_same_way_each_time() -> None:
    first, second = simulate("--seed", "3"), simulate("--seed", "3")
    assert first.returncode == 0, first.stdout + first.stderr
    assert len(first.stdout.splitlines()) > 100
    assert first.stdout == second.stdout


@pytest.mark.parametrize(
    "fault", ["acknowledged before the flush", "copies are confirmed that are not there"]
)
def test_a_planted_fault_is_found(fault: str) -> None:
    found = simulate("--mutants", fault, "--seeds", "40", "--processes", "1")
    assert found.returncode == 0, found.stdout + found.stderr
    assert "caught by seed" in found.stdout


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_each_fault_can_still_be_planted(mutant: Mutant) -> None:
    mutant.check()


def test_a_seed_that_fails_by_itself_catches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    alone = {2: "broken by itself", 5: ""}
    asked: list[int] = []

    def submit(work: Callable[..., Any], *arguments: Any) -> Future[Any]:
        result: Future[Any] = Future()
        if work is fails_unplanted:
            asked.append(arguments[0])
            result.set_result(alone[arguments[0]])
        else:
            at, seeds = arguments
            failing = [seed for seed in alone if at.first <= seed < seeds]
            result.set_result(
                Found(at.mutant, failing[0], "broken") if failing else Found(at.mutant, seeds)
            )
        return result

    hunt = Hunt(9, submit)
    hunt.run([0, 1], processes=1)
    assert [(found.mutant, found.first) for found in hunt.caught] == [(0, 5), (1, 5)]
    assert asked == [2, 5], "the result of a seed serves all mutants"
    less = Hunt(5, submit)
    less.run([0], processes=1)
    assert [found.mutant for found in less.missed] == [0] and not less.caught
    assert "seed 2 fails without a planted fault, too" in capsys.readouterr().out
