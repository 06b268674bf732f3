"""Running many seeds on all cores, or one seed with its trace."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import pickle
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tests.simulation import substitutes
from tests.simulation.cluster import Pki, ram_directory
from tests.simulation.mutants import MUTANTS
from tests.simulation.scenario import Outcome, run_seed
from tests.simulation.substitutes import trace_to

_pki: Pki | None = None


def pki() -> Pki:
    """Certificates of this process, made with real chance; from then on nothing else is real."""
    global _pki
    if _pki is None:
        directory = ram_directory()
        atexit.register(shutil.rmtree, directory, ignore_errors=True)
        _pki = Pki(directory / "pki")
        substitutes.install()
    return _pki


def run_one(seed: int, write: Callable[[str], None] | None = None) -> Outcome:
    """One seed, in this process: the last thing that it does. Nothing is collected meanwhile: when
    that happens must not change anything."""
    certificates = pki()
    gc.disable()
    return run_seed(seed, certificates, write=write)


def run_apart(seed: int) -> Outcome:
    """One seed, in a process that is forked for it: nothing of an earlier seed is left in it, and
    the system takes back its memory at once, where Python would need a third of the time."""
    pki()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        try:
            outcome = pickle.dumps(run_one(seed))
            with open(writer, "wb") as out:
                out.write(outcome)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as told:
        content = told.read()
    _, status = os.waitpid(child, 0)
    if not content:
        return Outcome(seed, [f"the process of the seed died: {status}"], 0.0, 0, Counter())
    outcome = pickle.loads(content)
    assert isinstance(outcome, Outcome)
    return outcome


def replay(seed: int) -> int:
    """One seed, with everything that happens."""
    trace_to(print)
    outcome = run_one(seed, print)
    for failure in outcome.failures:
        print(f"VIOLATION {failure}")
    print(f"seed {seed}: {outcome.virtual_s:.0f} virtual seconds, {dict(outcome.counts)}")
    return 1 if outcome.failures else 0


def sweep(first: int, count: int, workers: int) -> int:
    """Many seeds; whether all hold."""
    began_s = time.perf_counter()
    failed: list[Outcome] = []
    done = virtual_s = 0
    counts: Counter[str] = Counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as pool:
        for outcome in pool.imap_unordered(run_apart, range(first, first + count)):
            done += 1
            virtual_s += int(outcome.virtual_s)
            counts.update(outcome.counts)
            if outcome.failures:
                failed.append(outcome)
                print(f"seed {outcome.seed}: {outcome.failures[0]}", flush=True)
    took_s = time.perf_counter() - began_s
    print(
        f"{done} seeds in {took_s:.0f} s ({done / took_s:.2f} seeds/s), {virtual_s / 3600:.0f} "
        f"virtual hours, {len(failed)} failed"
    )
    print(", ".join(f"{what} {number}" for what, number in sorted(counts.items())))
    if failed:
        print("replay one with: make sim SEED=" + str(min(o.seed for o in failed)))
    return 1 if failed else 0


@dataclass(frozen=True)
class Found:
    """Where the search for one mutant stands: from `first` on, seed by seed."""

    mutant: int
    first: int
    failure: str = ""  # of the seed `first`, with the mutant
    spent_s: float = 0.0


def hunt(at: Found, seeds: int) -> Found:
    """Runs seeds with a mutant planted until one fails; without `failure`, none did. In a process
    of its own, as the mutant stays."""
    began_s = time.perf_counter()
    pki()
    MUTANTS[at.mutant].plant()
    for seed in range(at.first, seeds):
        if failures := run_apart(seed).failures:
            spent_s = at.spent_s + time.perf_counter() - began_s
            return Found(at.mutant, seed, failures[0], spent_s)
    return Found(at.mutant, seeds, "", at.spent_s + time.perf_counter() - began_s)


def fails_unplanted(seed: int) -> str:
    """What a seed finds in the product as it is, in a process in which nothing is planted."""
    return "".join(run_apart(seed).failures[:1])


class Hunt:
    """Looks for all mutants. A seed counts for one only when it holds without it."""

    def __init__(self, seeds: int, submit: Callable[..., Future[Any]]) -> None:
        self._seeds = seeds
        self._submit = submit
        self._unplanted: dict[int, str] = {}  # what seeds find without a mutant
        self._running: dict[Future[Any], Found] = {}
        self.caught: list[Found] = []
        self.missed: list[Found] = []

    def run(self, mutants: Iterable[int], processes: int) -> None:
        waiting = [Found(mutant, 0) for mutant in reversed(list(mutants))]
        while waiting or self._running:
            while waiting and len(self._running) < processes:
                self._go_on(waiting.pop())
            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                waiting += self._take(self._running.pop(future), future.result())

    def _go_on(self, at: Found) -> None:
        work = (fails_unplanted, at.first) if at.failure else (hunt, at, self._seeds)
        self._running[self._submit(*work)] = at

    def _take(self, at: Found, result: Found | str) -> list[Found]:
        """What is to be done next because of a result."""
        if isinstance(result, str):
            self._unplanted[at.first] = result
        else:
            at = result
        if not at.failure:
            self.missed.append(at)
            print(
                f"NOT CAUGHT within {self._seeds} seeds ({at.spent_s:.0f} s): {_name(at)}",
                flush=True,
            )
        elif at.first not in self._unplanted:
            return [at]
        elif unplanted := self._unplanted[at.first]:
            print(f"seed {at.first} fails without a planted fault, too: {unplanted}", flush=True)
            return [Found(at.mutant, at.first + 1, "", at.spent_s)]
        else:
            self.caught.append(at)
            print(
                f"caught by seed {at.first} ({at.spent_s:.0f} s): {_name(at)}: {at.failure}",
                flush=True,
            )
        return []


def _name(at: Found) -> str:
    return MUTANTS[at.mutant].name


def hunt_all(seeds: int, processes: int, only: str) -> int:
    """All mutants; whether each was found."""
    numbers = [number for number, mutant in enumerate(MUTANTS) if only in mutant.name]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        found = Hunt(seeds, pool.submit)
        found.run(numbers, processes)
    print(f"{len(found.caught)} of {len(numbers)} planted faults caught")
    return 1 if found.missed else 0
