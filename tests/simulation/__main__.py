"""`python -m tests.simulation`: many seeds, one seed with its trace, or the planted faults."""

from __future__ import annotations

import argparse
import os
import sys

from tests.simulation.sweep import hunt_all, replay, sweep


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=300, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one alone, and show what happens")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--mutants", nargs="?", const="", help="plant faults (those whose name has this text)"
    )
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":  # else sets would come in another order each time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    if options.mutants is not None:
        return hunt_all(options.seeds, options.processes, options.mutants)
    if options.seed is not None:
        return replay(options.seed)
    return sweep(options.first, options.seeds, options.processes)


if __name__ == "__main__":
    sys.exit(main())
