"""Who plans, whether it is time to, and for whom."""

from __future__ import annotations

from msgspec.structs import replace

from ckptd.core.steward import Standing, absent_long, most_are_live, steward

WORKER = frozenset({"worker"})
COORDINATOR = frozenset({"coordinator"})


def worker(node: str, *, absent_s: float | None = None) -> Standing:
    return Standing(node, WORKER, absent_s)


def coordinator(node: str, *, absent_s: float | None = None) -> Standing:
    return Standing(node, COORDINATOR, absent_s)


def test_the_live_coordinator_with_the_smallest_id_is_steward() -> None:
    nodes = [worker("a"), coordinator("y"), coordinator("x")]
    assert steward(nodes) == "x"
    assert steward([*nodes, Standing("m", WORKER | COORDINATOR, None)]) == "m"


def test_without_a_coordinator_it_is_the_live_worker_with_the_smallest_id() -> None:
    assert steward([worker("b"), worker("a"), coordinator("x", absent_s=0.0)]) == "a"
    failed = replace(coordinator("x"), failed=True)
    assert steward([worker("b"), worker("a", absent_s=9.0), failed]) == "b"


def test_nobody_is_steward_when_nobody_is_live() -> None:
    assert steward([]) is None
    assert steward([worker("a", absent_s=1.0)]) is None


def test_more_than_half_of_the_remembered_workers_must_be_live() -> None:
    assert most_are_live([worker("a"), worker("b"), worker("c", absent_s=1.0)])
    assert not most_are_live([worker("a"), worker("b", absent_s=1.0)])
    assert not most_are_live([worker("a"), replace(worker("b"), failed=True)])
    assert most_are_live([worker("a"), coordinator("x", absent_s=1.0)])
    assert not most_are_live([coordinator("x")])
    assert not most_are_live([])


def test_copies_are_replaced_for_workers_that_are_absent_for_long() -> None:
    nodes = [
        worker("present"),
        worker("short", absent_s=599.0),
        worker("long", absent_s=600.0),
        replace(worker("under repair", absent_s=700.0), maintenance_s=1.0),
        coordinator("coordinator", absent_s=700.0),
    ]
    assert absent_long(nodes, 600.0) == {"long"}


def test_who_takes_copies() -> None:
    assert worker("a").takes_copies
    assert not worker("a", absent_s=0.0).takes_copies
    assert not replace(worker("a"), failed=True).takes_copies
    assert not replace(worker("a"), draining=True).takes_copies
    assert not coordinator("a").takes_copies
    assert replace(worker("a"), maintenance_s=5.0).takes_copies


def test_nodes_of_one_kernel_are_one_machine() -> None:
    one = replace(worker("a"), boot_id="k", zone="z")
    assert one.machine == replace(worker("b"), boot_id="k", zone="z").machine
    assert one.machine != replace(one, zone="y").machine
    assert worker("a").machine != worker("b").machine
