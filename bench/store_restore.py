"""Store and restore against rsync: `make bench`, or `python -m bench.store_restore`.

Prints tables, and writes bench/results.json and docs/benchmark.md. Exit code 0 when it was
measured, whatever the figures are; 1 when the measurement failed; 2 when something is missing.
"""

from __future__ import annotations

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from bench import machine, report
from bench.floor import PASSES, measure_prices
from bench.processes import Leg, MeasurementFailed
from bench.results import FORMAT, Results, encode, leg_ratio
from bench.sides import CkptdSide, RsyncSide, Side, rsync_complaint
from bench.turns import running, take_turn, workplace
from ckptd.core.quantities import format_size, parse_size
from ckptd.errors import CkptdError

ROOT: Final = Path(__file__).parents[1]
SIZE_BYTES: Final = 2**30
TURNS: Final = 5
TURNS_NEEDED: Final = 4
BUDGET_S: Final = 540.0
"""Turns beyond those needed are left out when they would take the whole run past this."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = _parser().parse_args(arguments)
    complaint = missing()
    if complaint:
        print(f"bench: {complaint}", file=sys.stderr)
        return 2
    try:
        results = run(options.size, options.turns, options.dir, settled=not options.just_written)
    except (MeasurementFailed, CkptdError) as error:
        print(f"bench: the measurement failed: {error}", file=sys.stderr)
        return 1
    print(report.terminal_text(results, profile=options.profile))
    if not (options.trial or options.just_written):
        (ROOT / "bench" / "results.json").write_bytes(encode(results))
        (ROOT / "docs" / "benchmark.md").write_text(report.page(results), encoding="utf-8")
    return 0


def missing() -> str | None:
    """What keeps the benchmark from running on this machine; None when nothing does."""
    if not sys.platform.startswith("linux"):
        return "the benchmark reads /proc and runs on Linux only"
    return rsync_complaint()


def run(size_bytes: int, turns: int, parent: Path | None, *, settled: bool = True) -> Results:
    """Measures everything. `parent` decides the file system; `settled` is as in `take_turn`.
    Raises MeasurementFailed."""
    with workplace(parent) as directory:
        described = machine.describe(directory)
        measured = datetime.now(UTC).strftime("%Y-%m-%d")
        say("the floor: SHA-256, TLS, copies")
        (directory / "floor").mkdir()
        prices = measure_prices(directory / "floor")
        sides = (CkptdSide(directory / "ckptd"), RsyncSide(directory / "rsync"))
        with running(*sides):
            legs = _take_turns(sides, directory, size_bytes, turns, settled)
    return Results(
        format=FORMAT,
        measured=measured,
        size_bytes=size_bytes,
        turns=len(legs["store"][sides[0].name]),
        machine=described,
        prices=prices,
        passes=PASSES,
        legs=legs,
        ratios={leg: leg_ratio(legs, leg).of_medians for leg in legs},
    )


def _take_turns(
    sides: tuple[Side, ...], directory: Path, size_bytes: int, turns: int, settled: bool
) -> dict[str, dict[str, list[Leg]]]:
    legs: dict[str, dict[str, list[Leg]]] = {
        leg: {side.name: [] for side in sides} for leg in ("store", "restore")
    }
    started_s = time.monotonic()
    for turn in range(turns + 1):  # turn 0 warms up
        if turn > TURNS_NEEDED and not fits(time.monotonic() - started_s, turn):
            say(f"no time left for turn {turn}")
            break
        for side in sides:
            taken = take_turn(side, directory, size_bytes, settled=settled)
            shown = ", ".join(f"{leg} {measured.seconds:.2f} s" for leg, measured in taken.items())
            say(f"turn {turn} of {turns}, {side.name}: {shown}{'' if turn else ' (not counted)'}")
            if turn:
                for leg, measured in taken.items():
                    legs[leg][side.name].append(measured)
    return legs


def fits(elapsed_s: float, taken: int) -> bool:
    """Whether one more turn ends within the budget when it takes as long as those `taken`."""
    return elapsed_s * (taken + 1) / taken <= BUDGET_S


def say(text: str) -> None:
    """Progress, on stderr: stdout has the tables alone."""
    print(text, file=sys.stderr, flush=True)


def size(text: str) -> int:
    """A size on the command line, as argparse wants it."""
    try:
        size_bytes = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if not size_bytes:
        raise argparse.ArgumentTypeError("nothing to store")
    return size_bytes


def count(text: str) -> int:
    """A number of turns on the command line."""
    if not text.isascii() or not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of turns")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make bench ARGS=…", description=(__doc__ or "").split("\n")[0]
    )
    add_options(parser, size_bytes=SIZE_BYTES, turns=TURNS)
    parser.add_argument(
        "--just-written",
        action="store_true",
        help="store each source as soon as it is written; only prints, as with --trial",
    )
    parser.add_argument(
        "--profile", action="store_true", help="also print CPU time and memory by process"
    )
    return parser


def add_options(parser: argparse.ArgumentParser, *, size_bytes: int, turns: int) -> None:
    """The options that all benchmarks share."""
    default = format_size(size_bytes)
    parser.add_argument(
        "--size", type=size, default=size_bytes, help=f"what is stored [default: {default}]"
    )
    parser.add_argument(
        "--turns", type=count, default=turns, help=f"turns that count [default: {turns}]"
    )
    parser.add_argument(
        "--dir", type=Path, help="where all files are made [default: the temporary directory]"
    )
    parser.add_argument(
        "--trial", action="store_true", help="only print: leave the results in the tree as they are"
    )


if __name__ == "__main__":
    sys.exit(main())
