"""Who plans."""

from __future__ import annotations

from msgspec.structs import replace

from ckptd.core.steward import Standing, steward

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
