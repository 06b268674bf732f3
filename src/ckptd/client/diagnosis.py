"""What could be wrong on this machine and in the cluster, each with the command to type next."""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from msgspec import Struct

from ckptd.client.cluster import AbsentNode, Cluster, Node
from ckptd.client.cluster_status import Room, room_of
from ckptd.client.connect import connect
from ckptd.client.survey import machines_of, survey, timestamp
from ckptd.config import Config, check_roots, inactive_keys
from ckptd.core import limits
from ckptd.core.identity import Role, identity_of, load_ca, verify_chain
from ckptd.errors import CkptdError, DiscoveryFailed
from ckptd.net.tls import cipher_environment, client_context
from ckptd.wire import messages

State = Literal["ok", "warning", "error"]

CERTIFICATE_WARNING_S: Final = 60 * 86_400.0
CLOCK_SKEW_WARNING_S: Final = 5.0
_CPUINFO: Final = Path("/proc/cpuinfo")


class Finding(Struct, frozen=True):
    """One thing that was looked at. `next` is the command to type, or "" when all is well."""

    check: str
    state: State
    message: str
    next: str = ""


async def diagnose(config: Config, *, environ: Mapping[str, str] = os.environ) -> list[Finding]:
    """Looks at config, certificate, ports, clocks, disks, room and versions. Raises nothing that
    it can report."""
    findings = [*check_config(config), *check_certificate(config, time.time())]
    findings += check_cipher(_read_cpuinfo(), environ)
    if any(finding.check == "certificate" and finding.state == "error" for finding in findings):
        return findings
    heard = await _listen(config)
    answering: set[str] = set()
    try:
        async with connect(config) as cluster:
            answering = set(cluster.nodes)
            findings += await _check_cluster(cluster)
    except CkptdError as error:
        findings.append(Finding("connection", "error", error.message, error.next or "ckptd nodes"))
    findings += check_mdns(config, heard, answering)
    return findings


# -- this machine


def check_config(config: Config) -> Iterator[Finding]:
    """Watched roots, and keys that this version does not act on."""
    for error in check_roots(config):
        yield Finding("config", "error", error.message, "ckptd config check")
    keys = [key for key in inactive_keys(config) if key.startswith(("watch", "retention"))]
    if keys:
        yield Finding(
            "config",
            "warning",
            f"nothing acts on {', '.join(keys)} here",
            "ckptd config check",
        )
    if not config.discovery.peers and not config.discovery.mdns and config.node is None:
        yield Finding(
            "config",
            "error",
            "no node can be found: discovery.peers is empty and discovery.mdns is off",
            "ckptd config check",
        )
    yield Finding("config", "ok", f"cluster {config.cluster}")


def check_certificate(config: Config, now: float) -> Iterator[Finding]:
    """Whether the own certificate and key are usable, whose they are, and how long they last.
    `now` in seconds since the epoch."""
    tls = config.tls
    issue = "ckptd pki issue ROLE ID"
    try:
        client_context(tls.ca, tls.cert, tls.key)
        certificate = x509.load_pem_x509_certificate(tls.cert.read_bytes())
        der = _der(certificate)
        verify_chain(der, load_ca(tls.ca.read_bytes()))
        identity = identity_of(der, cluster=config.cluster)
    except (CkptdError, OSError, ValueError) as error:
        message = error.message if isinstance(error, CkptdError) else f"{tls.cert}: {error}"
        yield Finding("certificate", "error", message, issue)
        return
    if config.node is not None and identity.node_id != config.node.id:
        yield Finding(
            "certificate",
            "error",
            f"{tls.cert} is for {identity}, but node.id is {config.node.id}",
            f"ckptd pki issue {','.join(config.node.roles)} {config.node.id}",
        )
    mode = stat.S_IMODE(tls.key.stat().st_mode)
    if mode & 0o077:
        yield Finding(
            "key",
            "warning",
            f"{tls.key} has mode {mode:04o}: others on this machine can read it",
            f"chmod 600 {tls.key}",
        )
    yield _lifetime(certificate, now, str(identity), issue)
    if config.node is None and not identity.roles & {Role.CLIENT, Role.COORDINATOR}:
        yield Finding(
            "certificate",
            "warning",
            f"{identity} may not read or store checkpoints",
            "ckptd pki issue client ID",
        )


def _der(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.DER)


def _lifetime(certificate: x509.Certificate, now: float, whose: str, issue: str) -> Finding:
    starts = certificate.not_valid_before_utc.timestamp()
    ends = certificate.not_valid_after_utc.timestamp()
    until = timestamp(ends)
    if now < starts:
        clock = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        return Finding(
            "certificate",
            "error",
            f"the certificate of {whose} is not valid yet: this machine's clock says {clock}",
            "timedatectl status",
        )
    if now >= ends:
        return Finding(
            "certificate", "error", f"the certificate of {whose} ended at {until}", issue
        )
    if ends - now < CERTIFICATE_WARNING_S:
        return Finding("certificate", "warning", f"the certificate of {whose} ends {until}", issue)
    return Finding("certificate", "ok", f"{whose}, until {until}")


def check_cipher(cpuinfo: str, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Whether TLS uses what this processor is fast at. `cpuinfo`: text of /proc/cpuinfo."""
    wanted = cipher_environment(cpuinfo, environ)
    if wanted is not None:
        yield Finding(
            "cipher",
            "warning",
            "this processor has no AES instructions; commands are several times faster with "
            "ChaCha20 (the daemon sets it by itself)",
            f"export OPENSSL_CONF={wanted['OPENSSL_CONF']}",
        )


def _read_cpuinfo() -> str:
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# -- the local network


class Heard(Struct, frozen=True):
    """What mDNS brought within a moment: on which own addresses, nodes of this cluster, names of
    others. `failure` says why it cannot be used here, or is ""."""

    on: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    other_clusters: tuple[str, ...] = ()
    failure: str = ""


async def _listen(config: Config) -> Heard:
    if not config.discovery.mdns:
        return Heard()
    from ckptd.discovery.service import look_out

    try:
        async with look_out(config.cluster, config.discovery.interfaces) as lookout:
            # Others that ask at the same time may delay answers: all of the time is given.
            await asyncio.sleep(limits.DISCOVERY_WAIT_S)
            return Heard(
                lookout.choice.multicast,
                tuple(sorted(lookout.hints.nodes(time.monotonic()))),
                tuple(sorted(lookout.hints.other_clusters)),
            )
    except DiscoveryFailed as error:
        return Heard(failure=error.message)


def check_mdns(
    config: Config, heard: Heard, answering: Collection[str], *, platform: str = sys.platform
) -> Iterator[Finding]:
    """Whether nodes can be found without an address. `answering`: ids of the nodes that answer,
    however they were found. `platform` is a value of `sys.platform`."""
    if not config.discovery.mdns:
        yield Finding("mdns", "ok", "off: nodes are found by discovery.peers alone")
        return
    # With configured peers the cluster works all the same, as far as they are right.
    state: State = "warning" if config.discovery.peers else "error"
    if heard.failure:
        yield Finding(
            "mdns",
            state,
            heard.failure,
            "name an interface of the home network in discovery.interfaces (ip -brief address), "
            "or the nodes in discovery.peers",
        )
        return
    where = ", ".join(heard.on)
    others = f"; clusters heard besides: {', '.join(heard.other_clusters)}"[:500]
    others = others if heard.other_clusters else ""
    if heard.nodes:
        yield Finding("mdns", "ok", f"heard {', '.join(heard.nodes)} on {where}{others}")
        return
    silence = f"no node of cluster {config.cluster} was heard on {where}{others}"
    if answering:
        silence += f", but {len(answering)} answer: multicast does not get through"
    yield Finding("mdns", state, silence, _multicast_advice(platform))


def _multicast_advice(platform: str) -> str:
    if platform == "darwin":
        return (
            "System Settings > Privacy & Security > Local Network: allow your terminal (a daemon "
            "belongs into /Library/LaunchDaemons, which needs no permission); else list the nodes "
            "in discovery.peers"
        )
    return (
        "allow UDP port 5353 in the firewalls of this machine and of the nodes (sudo ufw allow "
        "mdns), switch off client isolation in the access point, or list the nodes in "
        "discovery.peers"
    )


# -- the cluster


async def _check_cluster(cluster: Cluster) -> list[Finding]:
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
