"""`python -m tests.simulation`: many seeds, one seed with its trace, or the planted faults."""

from __future__ import annotations

import argparse
import os
import sys

from tests.simulation.sweep import replay, sweep


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seeds", type=int, default=300, help="how many seeds to run")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="run this one alone, and show what happens")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed)
    return sweep(options.first, options.seeds, options.processes)


if __name__ == "__main__":
    sys.exit(main())
