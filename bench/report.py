"""The results as tables for the terminal, and as the page docs/benchmark.md."""

from __future__ import annotations

import statistics
from typing import Final

from bench.results import LIMIT, Results, disturbed
from bench.summary import spread, table
from ckptd.core.quantities import format_size

LEGS: Final = ("store", "restore")
SIDES: Final = ("ckptd", "rsync")
_MIB: Final = 2**20


def terminal_text(results: Results, *, profile: bool) -> str:
    """What `make bench` prints."""
    parts = [times(results), costs(results), floors(results)]
    if profile:
        parts.append(processes(results))
    parts.append("\n".join(verdicts(results)))
    return "\n\n".join(parts)


def page(results: Results) -> str:
    """The text of docs/benchmark.md."""
    machine = results.machine
    size = format_size(results.size_bytes)
    explained = "\n".join(
        f"- {leg}, {side}: {results.passes[leg][side].why}." for leg in LEGS for side in SIDES
    )
    prices = results.prices
    return f"""# Benchmark: ckptd against rsync

Written by `make bench`; the figures with every single turn are in
[bench/results.json](../bench/results.json), how it is done in
[bench/README.md](../bench/README.md). Measured {results.measured}.

{_verdict_list(results)}

**What is compared.** One file of {size} of random bytes, stored with two copies on four local
workers (`ckptd store`) and restored (`ckptd restore`), against `rsync -W --fsync` to two daemons at
once and back from one. ckptd encrypts every byte on every hop, hashes it at every receiver, and
forces file and directory to the disk before it says that a shard is there; rsync sends plain TCP.
{results.turns} turns in the order ckptd, rsync, ckptd, rsync, after one of each that is not
counted; new random bytes and new target files in each. The source has held still for three seconds,
as one that the watcher has let settle; one that was just written is hashed once more
([one-reading.md](decisions/one-reading.md)), which costs another SHA-256 below.

rsync writes through the page cache, and on a virtual machine its time depends on whether that has
used its memory before: between 1.9 and 4.4 s for the same store on the machine that most was
measured on, while ours stayed within a second ([bulk-path.md](decisions/bulk-path.md)). So a ratio
belongs to one run.

**Where.** {machine.cpu}, {machine.cores} cores, {machine.memory_gib:.0f} GiB of memory,
{machine.kernel}, {machine.filesystem}, {machine.python}, {machine.openssl} ({prices.cipher}),
{machine.rsync}. Load when it began: {machine.load:.1f}.

## Time

Seconds: median (range).

{times(results)}

## CPU and memory

CPU seconds for each GiB of the checkpoint, all processes of a side together; *floor* as below.
*Cores busy* is CPU time over wall time. *Others* is the CPU time of everything else on the machine
during the leg, the kernel's own threads included, at the median: the measure of how disturbed a leg
was.

{costs(results)}

## Floor

What the passes over the bytes cost alone, measured in the same run in one thread, in CPU seconds
per GiB: SHA-256 {prices.sha256:.2f}, TLS encryption {prices.encrypt:.2f}, decryption
{prices.decrypt:.2f}, one copy in memory {prices.copy:.2f}. Writing and fsyncing a new file costs
{prices.new_file:.2f} and takes {prices.new_file_wall:.2f} s; it is not in the floor, although
both sides have to do it: two of them for a store, one for a restore.

{floors(results)}

{explained}

## Where the CPU time goes

CPU seconds of each process at the median, and the greatest resident size (VmHWM) in all turns. A
daemon includes its children.

{processes(results)}
"""


def times(results: Results) -> str:
    """The table of seconds and ratios."""
    rows = []
    for leg in LEGS:
        ratio = results.ratio(leg)
        rows.append(
            [
                leg,
                *(spread(results.seconds(leg, side)).text() for side in SIDES),
                f"{ratio.of_medians:.2f}",
                " ".join(f"{value:.2f}" for value in ratio.of_turns),
            ]
        )
    return table(["leg", "ckptd, s", "rsync, s", "ratio", "of each turn"], rows)


def costs(results: Results) -> str:
    """The table of CPU and memory by leg and side."""
    rows = []
    for leg in LEGS:
        for side in SIDES:
            cpu = spread(results.cpu_per_gib(leg, side))
            busy = statistics.median(
                turn.cpu_total / turn.seconds for turn in results.legs[leg][side]
            )
            rows.append(
                [
                    leg,
                    side,
                    cpu.text(),
                    f"{results.floor(leg, side):.2f}",
                    f"{busy:.2f}",
                    f"{statistics.median(results.others_cpu(leg, side)):.2f}",
                    f"{max(results.peak_bytes(leg, side).values()) / _MIB:.0f}",
                ]
            )
    header = ["leg", "side", "CPU-s/GiB", "floor", "cores busy", "others, CPU-s", "largest, MiB"]
    return table(header, rows)


def floors(results: Results) -> str:
    """The table of passes and what they cost together."""
    rows = []
    for leg in LEGS:
        for side in SIDES:
            passes = results.passes[leg][side]
            floor = results.floor(leg, side)
            rows.append(
                [
                    leg,
                    side,
                    str(passes.sha256),
                    f"{passes.encrypt} + {passes.decrypt}",
                    str(passes.copies),
                    f"{floor:.2f}",
                    f"{floor / results.machine.cores:.2f}",
                ]
            )
    header = ["leg", "side", "SHA-256", "TLS", "copies", "CPU-s/GiB", "s/GiB on all cores"]
    return table(header, rows)


def processes(results: Results) -> str:
    """The table of CPU time and memory by process."""
    rows = []
    for leg in LEGS:
        for side in SIDES:
            peaks = results.peak_bytes(leg, side)
            for label, used in results.median_cpu(leg, side).items():
                user, system = f"{used.user:.2f}", f"{used.system:.2f}"
                rows.append([leg, label, user, system, f"{peaks[label] / _MIB:.0f}"])
    return table(["leg", "process", "user, s", "system, s", "peak, MiB"], rows)


def verdicts(results: Results) -> list[str]:
    """One sentence for each leg, those above the limit stand out; before them a warning when the
    machine was not quiet."""
    sentences = disturbed(results.disturbance())
    for leg in LEGS:
        value = results.ratios[leg]
        over = leg in results.too_slow()
        sentences.append(
            f"{'OVER THE LIMIT: ' if over else ''}{leg} takes {value:.2f} times as long as rsync "
            f"(aim 1.0, limit {LIMIT})"
        )
    return sentences


def _verdict_list(results: Results) -> str:
    return "\n".join(f"- {sentence}." for sentence in verdicts(results))
