"""What could be wrong in the cluster: who does not answer, ports, clocks, disks, versions, room."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from ckptd.client.cluster import AbsentNode, Cluster, Node
from ckptd.client.cluster_status import Room, room_of
from ckptd.client.findings import Finding
from ckptd.client.survey import machines_of, survey
from ckptd.core import limits
from ckptd.errors import CkptdError
from ckptd.wire import messages

CLOCK_SKEW_WARNING_S: Final = 5.0


async def check_cluster(cluster: Cluster) -> list[Finding]:
    """Asks every node that answers, and tells of those that do not."""
    findings = [*check_absent(cluster.absent.values())]
    if not cluster.nodes:
        return findings
    nodes = sorted(cluster.nodes.values(), key=lambda node: node.id)
    found = await asyncio.gather(*(_check_node(node) for node in nodes))
    findings += [finding for part, _ in found for finding in part]
    skews = {node.id: skew for node, (_, skew) in zip(nodes, found, strict=True)}
    findings += check_clocks({node: skew for node, skew in skews.items() if skew is not None})
    findings += check_software({node.id: node.status.software for node in nodes})
    workers = cluster.workers
    machines = machines_of(cluster)
    findings += check_machines(
        len({machines[node.id] for node in workers}), cluster.config.replication.copies
    )
    if workers:
        try:
            versions = list((await survey(cluster)).versions.values())
            findings.append(check_room(room_of(cluster, versions)))
        except CkptdError as error:
            findings.append(Finding("room", "error", error.message, error.next or "ckptd nodes"))
    return findings


def check_absent(absent: Iterable[AbsentNode]) -> Iterator[Finding]:
    """A finding for each node that is known and does not answer."""
    for node in absent:
        who = f"{node.id} at {node.address}" if node.id else node.address
        yield Finding(
            "peers",
            "error",
            f"{who} does not answer: {node.reason}",
            f"on {node.id or 'that machine'}: systemctl status ckptd",
        )


async def _check_node(node: Node) -> tuple[list[Finding], float | None]:
    """What one node says of itself, whether its bulk port is open, and how far its clock is ahead
    in seconds (None when it went away)."""
    findings = list(check_status(node.status))
    try:
        asked_at = time.time()
        status, _ = await node.control.request(messages.GetStatus(), messages.NodeStatus)
        skew_s = status.clock_ms / 1000 - (asked_at + time.time()) / 2
    except CkptdError as error:
        return [*findings, Finding("peers", "error", error.message, "ckptd nodes")], None
    if "worker" not in node.hello.roles:
        findings.append(Finding("ports", "ok", f"{node.id}: {node.control.address}"))
        return findings, skew_s
    fault = await _port_fault(node.host, node.bulk_port)
    if fault:
        findings.append(
            Finding(
                "ports",
                "error",
                f"{node.id}: the control port answers, but the bulk port {node.bulk_port} does "
                f"not: {fault}",
                f"allow TCP port {node.bulk_port} in the firewall of {node.id}",
            )
        )
    else:
        findings.append(
            Finding("ports", "ok", f"{node.id}: {node.control.address}, bulk {node.bulk_port}")
        )
    return findings, skew_s


async def _port_fault(host: str, port: int) -> str:
    try:
        async with asyncio.timeout(limits.CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host, port)
    except TimeoutError:
        return f"no connection within {limits.CONNECT_TIMEOUT_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    writer.close()
    return ""


def check_status(status: messages.NodeStatus) -> Iterator[Finding]:
    """What a node says of its disk and its documents."""
    if status.state == "failed":
        yield Finding(
            "disk",
            "error",
            f"{status.node}: its disk has failed: {status.failed_reason}",
            f"on {status.node}: check the disk, then systemctl restart ckptd",
        )
    if status.quarantined:
        yield Finding(
            "quarantine",
            "warning",
            f"{status.node}: {status.quarantined} bad copies are in quarantine",
            "ckptd verify --all",
        )
    if status.unknown_documents:
        yield Finding(
            "documents",
            "warning",
            f"{status.node}: there are documents that it cannot read, damaged or newer than its "
            f"version {status.software}; they are kept, and nothing is collected meanwhile",
            f"on {status.node}: journalctl -u ckptd | grep document_unreadable   (none: upgrade)",
        )


def check_clocks(skews_s: Mapping[str, float]) -> Iterator[Finding]:
    """`skews_s`: by node, how far its clock is ahead of this machine's. When most nodes disagree
    with this machine, it is this one's clock that is wrong."""
    wrong = {node: skew for node, skew in skews_s.items() if abs(skew) > CLOCK_SKEW_WARNING_S}
    if not wrong:
        if skews_s:
            widest = max(abs(skew) for skew in skews_s.values())
            yield Finding("clock", "ok", f"all clocks are within {widest:.1f} s of this one")
        return
    if len(wrong) > 1 and len(wrong) == len(skews_s):
        yield Finding(
            "clock",
            "warning",
            f"this machine's clock differs from those of all {len(wrong)} nodes, by "
            f"{min(wrong.values()):+.0f} to {max(wrong.values()):+.0f} s",
            "timedatectl status",
        )
        return
    for node, skew in sorted(wrong.items()):
        yield Finding(
            "clock",
            "warning",
            f"{node}: its clock is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}",
            f"on {node}: timedatectl status",
        )


def check_software(versions: Mapping[str, str]) -> Iterator[Finding]:
    """Whether all nodes run one version of ckptd."""
    if len(set(versions.values())) > 1:
        listing = ", ".join(f"{node} {version}" for node, version in sorted(versions.items()))
        yield Finding(
            "software", "warning", f"the nodes run different versions: {listing}", "ckptd nodes"
        )


def check_machines(machines: int, copies: int) -> Iterator[Finding]:
    """Whether there are machines enough for the wanted copies."""
    if machines < copies:
        yield Finding(
            "copies",
            "error",
            f"{copies} copies are wanted, on machines of their own, and {machines} of them answer "
            "(nodes on one machine count as one unless their node.zone differs)",
            "ckptd nodes",
        )


def check_room(room: Room) -> Finding:
    """Whether another checkpoint like the newest one fits."""
    if room.bytes_storable == 0 or room.checkpoints_fit == 0:
        return Finding(
            "room",
            "error",
            f"{room.bytes_storable} bytes of checkpoints can still get all their copies: less than "
            "the newest one has",
            "ckptd nodes   (then add a node, or put in a larger disk)",
        )
    if room.checkpoints_fit is not None and room.checkpoints_fit < 3:
        return Finding(
            "room",
            "warning",
            f"there is room for {room.checkpoints_fit} more checkpoints like the newest",
            "ckptd nodes   (then add a node, or put in a larger disk)",
        )
    return Finding("room", "ok", f"{room.bytes_storable / 1e9:.1f} GB of checkpoints still fit")
