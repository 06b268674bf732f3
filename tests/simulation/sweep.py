"""Running many seeds on all cores, or one seed with its trace."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import shutil
import time
from collections import Counter
from collections.abc import Callable

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
        gc.collect()
        gc.freeze()  # what modules have made need not be looked through after each seed
    return _pki


def run_one(seed: int, write: Callable[[str], None] | None = None) -> Outcome:
    """One seed. Nothing is collected meanwhile: when that happens must not change anything."""
    certificates = pki()
    gc.disable()
    try:
        return run_seed(seed, certificates, write=write)
    finally:
        gc.enable()
        gc.collect()


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
        for outcome in pool.imap_unordered(run_one, range(first, first + count)):
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


def hunt(task: tuple[int, int]) -> tuple[str, int | None, str, float]:
    """Runs seeds with one mutant planted until one finds it: its name, the seed, what was found."""
    number, seeds = task
    mutant = MUTANTS[number]
    began_s = time.perf_counter()
    pki()
    mutant.plant()
    for seed in range(seeds):
        outcome = run_one(seed)
        if outcome.failures:
            return mutant.name, seed, outcome.failures[0], time.perf_counter() - began_s
    return mutant.name, None, "", time.perf_counter() - began_s


def hunt_all(seeds: int, processes: int, only: str) -> int:
    """All mutants; whether each was found."""
    missed = []
    tasks = [(n, seeds) for n, mutant in enumerate(MUTANTS) if only in mutant.name]
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=1) as pool:
        for name, seed, failure, took_s in pool.imap_unordered(hunt, tasks, chunksize=1):
            if seed is None:
                missed.append(name)
                print(f"NOT CAUGHT within {seeds} seeds ({took_s:.0f} s): {name}", flush=True)
            else:
                print(f"caught by seed {seed} ({took_s:.0f} s): {name}: {failure}", flush=True)
    print(f"{len(tasks) - len(missed)} of {len(tasks)} planted faults caught")
    return 1 if missed else 0
