"""Store and restore by shard size: `make bench-shards`, or `python -m bench.shard_sizes`.

Prints a table, and writes bench/shard-sizes.json, docs/shard-sizes.md and docs/shard-sizes.svg.
Exit code 0 when it was measured, 1 when the measurement failed, 2 when something is missing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from bench import machine
from bench.plot import line_plot
from bench.processes import Leg, MeasurementFailed
from bench.results import disturbed, encode, greatest, others_share
from bench.sides import CkptdSide
from bench.store_restore import ROOT, add_options, say
from bench.summary import spread, table
from bench.turns import running, take_turn, workplace
from ckptd.core.limits import KIB, MIB, SHARD_SIZE_DEFAULT_BYTES
from ckptd.core.quantities import format_size
from ckptd.errors import CkptdError

SHARD_SIZES: Final = (256 * KIB, MIB, 4 * MIB, 16 * MIB, 32 * MIB, 64 * MIB, 128 * MIB)
SIZE_BYTES: Final = 512 * MIB
TURNS: Final = 3
LEGS: Final = ("store", "restore")


class BySize(msgspec.Struct, frozen=True):
    """The turns of one shard size, by leg."""

    shard_bytes: int
    legs: dict[str, list[Leg]]

    def seconds(self, leg: str) -> list[float]:
        return [turn.seconds for turn in self.legs[leg]]

    def median(self, leg: str) -> float:
        return statistics.median(self.seconds(leg))


class ShardSizes(msgspec.Struct, frozen=True):
    """The results of a run, as they lie in bench/shard-sizes.json."""

    format: int
    measured: str
    size_bytes: int
    turns: int
    machine: machine.Machine
    sizes: list[BySize]


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    options = _parser().parse_args(arguments)
    if not sys.platform.startswith("linux"):
        print("bench: the benchmark reads /proc and runs on Linux only", file=sys.stderr)
        return 2
    try:
        results = run(options.size, options.turns, options.dir)
    except (MeasurementFailed, CkptdError) as error:
        print(f"bench: the measurement failed: {error}", file=sys.stderr)
        return 1
    print("\n\n".join([sizes_table(results.sizes, results.size_bytes), *warnings(results)]))
    if not options.trial:
        (ROOT / "bench" / "shard-sizes.json").write_bytes(encode(results))
        (ROOT / "docs" / "shard-sizes.md").write_text(page(results), encoding="utf-8")
        (ROOT / "docs" / "shard-sizes.svg").write_text(plot(results), encoding="utf-8")
    return 0


def run(size_bytes: int, turns: int, parent: Path | None) -> ShardSizes:
    """Measures all shard sizes in turns, after one of the default that is not counted."""
    legs: dict[int, dict[str, list[Leg]]] = {
        shard_bytes: {leg: [] for leg in LEGS} for shard_bytes in SHARD_SIZES
    }
    with workplace(parent) as directory:
        described = machine.describe(directory)
        _take(directory, size_bytes, SHARD_SIZE_DEFAULT_BYTES, "warming up, not counted")
        for turn in range(1, turns + 1):
            for shard_bytes in SHARD_SIZES:
                taken = _take(directory, size_bytes, shard_bytes, f"turn {turn} of {turns}")
                for leg, measured in taken.items():
                    legs[shard_bytes][leg].append(measured)
    return ShardSizes(
        format=1,
        measured=datetime.now(UTC).strftime("%Y-%m-%d"),
        size_bytes=size_bytes,
        turns=turns,
        machine=described,
        sizes=[BySize(shard_bytes, found) for shard_bytes, found in legs.items()],
    )


def _take(directory: Path, size_bytes: int, shard_bytes: int, what: str) -> dict[str, Leg]:
    side = CkptdSide(directory / "ckptd", [f"replication.shard_size={format_size(shard_bytes)}"])
    with running(side):
        taken = take_turn(side, directory, size_bytes)
    shown = ", ".join(f"{leg} {measured.seconds:.2f} s" for leg, measured in taken.items())
    say(f"{what}, {format_size(shard_bytes)}: {shown}")
    return taken


def sizes_table(sizes: Sequence[BySize], size_bytes: int) -> str:
    """One row for each shard size."""
    rows = []
    for by_size in sizes:
        peaks = {leg: greatest(turn.peak_bytes for turn in by_size.legs[leg]) for leg in LEGS}
        workers = [
            value for peak in peaks.values() for label, value in peak.items() if "node" in label
        ]
        rows.append(
            [
                format_size(by_size.shard_bytes),
                str(-(-size_bytes // by_size.shard_bytes)),
                *(spread(by_size.seconds(leg)).text() for leg in LEGS),
                *(
                    f"{statistics.median(turn.cpu_total for turn in by_size.legs[leg]):.2f}"
                    for leg in LEGS
                ),
                *(f"{peaks[leg][f'ckptd {leg}'] / MIB:.0f}" for leg in LEGS),
                f"{max(workers) / MIB:.0f}",
            ]
        )
    header = ["shard size", "shards", "store, s", "restore, s", "store, CPU-s", "restore, CPU-s"]
    header += ["store, MiB", "restore, MiB", "worker, MiB"]
    return table(header, rows)


def warnings(results: ShardSizes) -> list[str]:
    """What makes these figures doubtful."""
    cores = results.machine.cores
    return disturbed(
        max(others_share(by_size.legs[leg], cores) for by_size in results.sizes for leg in LEGS)
    )


def against_best(sizes: Sequence[BySize], leg: str, shard_bytes: int) -> tuple[float, int]:
    """How much longer `leg` takes with `shard_bytes` than with the fastest size (0.1 for a tenth
    more), and the fastest size."""
    best = min(sizes, key=lambda by_size: by_size.median(leg))
    own = next(by_size for by_size in sizes if by_size.shard_bytes == shard_bytes)
    return own.median(leg) / best.median(leg) - 1, best.shard_bytes


def page(results: ShardSizes) -> str:
    """The text of docs/shard-sizes.md."""
    where = results.machine
    doubts = "".join(f"- {warning}.\n\n" for warning in warnings(results))
    compared = []
    for leg in LEGS:
        more, best = against_best(results.sizes, leg, SHARD_SIZE_DEFAULT_BYTES)
        if best == SHARD_SIZE_DEFAULT_BYTES:
            compared.append(f"- {leg}: the default is the fastest.")
        else:
            compared.append(
                f"- {leg}: {format_size(best)} is the fastest; the default takes {more:.0%} longer."
            )
    default = format_size(SHARD_SIZE_DEFAULT_BYTES)
    return f"""# Shard sizes

Written by `make bench-shards`; every turn is in
[bench/shard-sizes.json](../bench/shard-sizes.json). Measured {results.measured}.

{doubts}One file of {format_size(results.size_bytes)} of random bytes, stored with two copies on
four local workers and restored, by fresh processes, in a new cluster for each. Turns through all
sizes: {results.turns}. Seconds are median (range); CPU seconds are those of client and workers
together, at the median; MiB are the greatest resident size of the storing client, the restoring
client, and any worker.

{where.cpu}, {where.cores} cores, {where.kernel}, {where.filesystem}, {where.python},
{where.openssl}. Load when it began: {where.load:.1f}.

{sizes_table(results.sizes, results.size_bytes)}

![Seconds by shard size](shard-sizes.svg)

Compared with the default of {default}, at the medians:

{chr(10).join(compared)}

What the seconds do not show: a shard is what is sent again after a broken connection and what is
fetched for one tensor, so a large one costs more there; and each shard is a file, an entry in every
index and a line in the manifest, so small ones cost more in large stores. 1 TiB has
{2**40 // SHARD_SIZE_DEFAULT_BYTES:,} shards of {default}.
"""


def plot(results: ShardSizes) -> str:
    """The text of docs/shard-sizes.svg."""
    return line_plot(
        f"{format_size(results.size_bytes)}, two copies on four local workers: seconds (median)",
        [(by_size.shard_bytes, format_size(by_size.shard_bytes)) for by_size in results.sizes],
        {leg: [by_size.median(leg) for by_size in results.sizes] for leg in LEGS},
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="make bench-shards ARGS=…", description=(__doc__ or "").split("\n")[0]
    )
    add_options(parser, size_bytes=SIZE_BYTES, turns=TURNS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
