"""The tables and pages, from results that are made up here."""

import msgspec
import pytest
from bench import report, shard_sizes
from bench.floor import GIB, PASSES, Prices
from bench.machine import Machine
from bench.processes import Cpu, Leg
from bench.results import Results, encode, leg_ratio
from bench.shard_sizes import BySize, ShardSizes, against_best

from ckptd.core.limits import MIB

MACHINE = Machine(
    "A CPU", 2, 8.0, "Linux 6", "ext4", "CPython 3.11", "OpenSSL 3", "rsync 3.4.1", 0.5
)
PRICES = Prices(
    sha256=1.0, encrypt=0.5, decrypt=0.25, copy=0.125, new_file=9.0, new_file_wall=9.0, cipher="AES"
)


def leg(seconds: float, label: str, user: float, peak_mib: int = 10) -> Leg:
    cpu = {label: Cpu(user, 0.5), "node1": Cpu(0.25, 0.25)}
    return Leg(seconds, cpu, {label: peak_mib * MIB, "node1": MIB}, 0.125)


def results(*, store: float = 4.0, size_bytes: int = GIB) -> Results:
    legs = {
        "store": {
            "ckptd": [leg(store, "ckptd store", user, 50) for user in (3.0, 1.0, 2.0)],
            "rsync": [leg(4.0, "rsync to 1", 1.0, peak) for peak in (7, 9, 8)],
        },
        "restore": {
            "ckptd": [leg(2.0, "ckptd restore", 1.0)] * 3,
            "rsync": [leg(2.5, "rsync from 1", 1.0)] * 3,
        },
    }
    ratios = {name: leg_ratio(legs, name).of_medians for name in legs}
    return Results(1, "2026-01-01", size_bytes, 3, MACHINE, PRICES, PASSES, legs, ratios)


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_times_name_both_sides_and_every_ratio() -> None:
    rows = cells(report.times(results(store=5.0)))
    assert rows[2] == ["store", "5.00 (5.00–5.00)", "4.00 (4.00–4.00)", "1.25", "1.25 1.25 1.25"]
    assert rows[3][3] == "0.80"


def test_cpu_time_is_per_gib_and_of_all_processes() -> None:
    assert results().cpu_per_gib("store", "ckptd") == [4.0, 2.0, 3.0]
    assert results(size_bytes=GIB // 2).cpu_per_gib("store", "ckptd") == [8.0, 4.0, 6.0]
    row = cells(report.costs(results()))[2]
    assert row == ["store", "ckptd", "3.00 (2.00–4.00)", "6.25", "0.75", "0.12", "50"]


def test_the_floor_is_the_sum_of_all_passes() -> None:
    found = results()
    assert found.floor("store", "ckptd") == 4 * 1.0 + 2 * 0.5 + 2 * 0.25 + 6 * 0.125
    assert found.floor("restore", "ckptd") == 1.0 + 0.5 + 0.25 + 3 * 0.125
    assert found.floor("store", "rsync") == 8 * 0.125
    assert cells(report.floors(found))[2] == ["store", "ckptd", "4", "2 + 2", "6", "6.25", "3.12"]


def test_processes_are_shown_with_medians_and_greatest_peaks() -> None:
    rows = cells(report.processes(results()))
    assert rows[2] == ["store", "ckptd store", "2.00", "0.50", "50"]
    assert rows[4] == ["store", "rsync to 1", "1.00", "0.50", "9"]


@pytest.mark.parametrize(("store", "over"), [(5.2, []), (5.21, ["store"])])
def test_what_is_over_the_limit_stands_out(store: float, over: list[str]) -> None:
    found = results(store=store)
    assert found.too_slow() == over
    assert ("OVER THE LIMIT: store" in report.terminal_text(found, profile=False)) is bool(over)
    assert ("OVER THE LIMIT: store" in report.page(found)) is bool(over)
    assert "OVER THE LIMIT: restore" not in report.page(found)


@pytest.mark.parametrize(("others_s", "warned"), [(1.2, False), (1.3, True)])
def test_a_machine_that_was_not_quiet_is_said_first(others_s: float, warned: bool) -> None:
    found = results()
    # One leg of one side is enough: 4 s on 2 cores, of which 15 % are 1.2 CPU seconds.
    found.legs["store"]["rsync"] = [
        Leg(turn.seconds, turn.cpu, turn.peak_bytes, others_s)
        for turn in found.legs["store"]["rsync"]
    ]
    assert report.verdicts(found)[0].startswith("DISTURBED: ") is warned
    assert ("DISTURBED: " in report.page(found)) is warned


def test_one_disturbed_turn_among_quiet_ones_is_no_reason_to_warn() -> None:
    found = results()
    first = found.legs["store"]["rsync"][0]
    found.legs["store"]["rsync"][0] = Leg(first.seconds, first.cpu, first.peak_bytes, 7.0)
    assert not report.verdicts(found)[0].startswith("DISTURBED: ")


def test_disturbed_shard_sizes_are_called_so() -> None:
    found = shard_results()
    assert "DISTURBED" not in shard_sizes.page(found)
    turns = found.sizes[1].legs["store"]
    turns[:] = [Leg(turn.seconds, turn.cpu, turn.peak_bytes, 5.0) for turn in turns]
    assert "DISTURBED: other processes used 83% of the machine" in shard_sizes.page(found)


def test_the_profile_is_printed_when_it_is_asked_for() -> None:
    assert "| ckptd store " in report.terminal_text(results(), profile=True)
    assert "| ckptd store " not in report.terminal_text(results(), profile=False)


def test_the_page_says_where_it_was_measured() -> None:
    page = report.page(results())
    for fact in ("A CPU", "2 cores", "Linux 6", "CPython 3.11", "OpenSSL 3", "rsync 3.4.1", "1GiB"):
        assert fact in page


def test_results_come_back_from_their_file() -> None:
    assert msgspec.json.decode(encode(results()), type=Results) == results()
    assert msgspec.json.decode(encode(results()))["ratios"] == {"store": 1.0, "restore": 0.8}


def shard_results() -> ShardSizes:
    by_size = [
        BySize(
            shard_bytes,
            {
                "store": [leg(seconds, "ckptd store", 1.0, 30), leg(seconds, "ckptd store", 1.0)],
                "restore": [leg(2.0, "ckptd restore", 1.0), leg(2.0, "ckptd restore", 1.0, 40)],
            },
        )
        for shard_bytes, seconds in ((16 * MIB, 4.0), (32 * MIB, 3.0), (64 * MIB, 2.0))
    ]
    return ShardSizes(1, "2026-01-01", 96 * MIB, 2, MACHINE, by_size)


def test_shard_sizes_have_a_row_each() -> None:
    found = shard_results()
    rows = cells(shard_sizes.sizes_table(found.sizes, found.size_bytes))
    store, restore = "4.00 (4.00–4.00)", "2.00 (2.00–2.00)"
    assert rows[2] == ["16MiB", "6", store, restore, "2.00", "2.00", "30", "40", "1"]
    assert rows[4][:2] == ["64MiB", "2"], "a last shard that is not full counts"


def test_the_default_is_compared_with_the_fastest_size() -> None:
    found = shard_results()
    assert against_best(found.sizes, "store", 32 * MIB) == (0.5, 64 * MIB)
    page = shard_sizes.page(found)
    assert "store: 64MiB is the fastest; the default takes 50% longer." in page
    assert "32,768 shards of 32MiB" in page


def test_the_plot_has_both_legs() -> None:
    assert shard_sizes.plot(shard_results()).count("<polyline") == 2
