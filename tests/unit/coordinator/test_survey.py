"""Who tells about the whole cluster, and how far the newest checkpoint is ahead."""

from __future__ import annotations

from ckptd.coordinator.survey import steward, unprotected_steps
from ckptd.core.catalogue import Catalogue
from ckptd.core.headers import VersionHeader
from ckptd.wire.messages import PeerView


def peer(node: str, state: str = "up", *roles: str) -> PeerView:
    return PeerView(node, "10.0.0.9:7701", 0, state, 1.0, roles)


def test_the_steward_is_the_live_coordinator_with_the_smallest_id() -> None:
    assert steward("b", []) == "b"
    assert steward("b", [peer("a", "up", "coordinator")]) == "a"
    assert steward("b", [peer("c", "up", "coordinator")]) == "b"
    assert steward("b", [peer("a", "suspect", "coordinator")]) == "b"
    assert steward("b", [peer("a", "up", "worker")]) == "b"
    assert steward("b", [peer("a", "up", "worker", "coordinator")]) == "a"


def catalogue(*versions: tuple[str, int | None]) -> Catalogue:
    known = Catalogue("home")
    for number, (name, step) in enumerate(versions):
        known.add_unverified(
            VersionHeader(
                id=f"{number:064x}",
                kind="manifest",
                order=number,
                created="2026-01-02T03:04:05Z",
                name=name,
                content_id="b" * 64,
                size=1,
                files=1,
                shards=1,
                copies=2,
                step=step,
                metrics={},
            )
        )
    return known


def test_steps_are_counted_from_the_newest_version_of_the_run() -> None:
    known = catalogue(("run/step-100", 100), ("run/step-300", 300), ("run/odd", None))
    assert unprotected_steps(known, []) == 0
    assert unprotected_steps(known, [("run/step-500", 500)]) == 200
    assert unprotected_steps(known, [("run/step-400", 400), ("run/step-500", 500)]) == 200
    assert unprotected_steps(known, [("run/step-200", 200)]) == 0
    assert unprotected_steps(known, [("other/step-7", 7), ("run/step-500", 500)]) == 200
    assert unprotected_steps(known, [("run/latest", None)]) is None
