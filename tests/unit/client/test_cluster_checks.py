"""What the doctor says about numbers of the cluster; clusters that are ill are in tests/cluster."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ckptd.client.cluster_checks import (
    check_clocks,
    check_machines,
    check_room,
    check_software,
    check_status,
)
from ckptd.client.cluster_status import Room
from ckptd.client.findings import Finding
from ckptd.wire.messages import NodeStatus


def states(findings: Iterable[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def test_clocks() -> None:
    assert list(check_clocks({})) == []
    assert states(check_clocks({"a": 0.1, "b": -0.2})) == ["ok"]
    (one,) = check_clocks({"a": 0.1, "b": -90.0})
    assert (one.message, one.next) == ("b: its clock is 90 s behind", "on b: timedatectl status")
    (mine,) = check_clocks({"a": 60.0, "b": 61.0})
    assert (mine.message.startswith("this machine's clock"), mine.next) == (
        True,
        "timedatectl status",
    )


def test_nodes_that_say_what_they_lack() -> None:
    def status(**changes: object) -> NodeStatus:
        fields: dict[str, object] = {
            "node": "pi1",
            "state": "up",
            "bytes_total": 9,
            "bytes_used": 1,
            "bytes_free": 8,
            "write_bytes_per_s": 0.0,
            "queued_bytes": 0,
            "shards": 0,
            "quarantined": 0,
            "documents": 0,
            "unknown_documents": 0,
            "documents_digest": bytes(32),
            "highest_order": 0,
            "software": "0.1.0",
            "clock_ms": 0,
            "uptime_s": 0.0,
        }
        return NodeStatus(**{**fields, **changes})  # type: ignore[arg-type]

    assert list(check_status(status())) == []
    found = list(
        check_status(
            status(state="failed", failed_reason="EIO", quarantined=2, unknown_documents=1)
        )
    )
    assert [(f.check, f.state) for f in found] == [
        ("disk", "error"),
        ("quarantine", "warning"),
        ("documents", "warning"),
    ]
    assert all(finding.next for finding in found)


def test_software_and_machines() -> None:
    assert list(check_software({"a": "1", "b": "1"})) == []
    assert states(check_software({"a": "1", "b": "2"})) == ["warning"]
    assert list(check_machines(2, 2)) == []
    assert states(check_machines(1, 2)) == ["error"]


@pytest.mark.parametrize(
    ("room", "state"),
    [
        (Room(bytes_free=100, bytes_storable=50, checkpoints_fit=None), "ok"),
        (Room(bytes_free=100, bytes_storable=50, checkpoints_fit=5), "ok"),
        (Room(bytes_free=100, bytes_storable=50, checkpoints_fit=2), "warning"),
        (Room(bytes_free=100, bytes_storable=50, checkpoints_fit=0), "error"),
        (Room(), "error"),
    ],
)
def test_room(room: Room, state: str) -> None:
    assert check_room(room).state == state
