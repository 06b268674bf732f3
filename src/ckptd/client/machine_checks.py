"""What could be wrong on this machine: config, certificate, cipher, and what it hears by mDNS."""

from __future__ import annotations

import asyncio
import stat
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from msgspec import Struct

from ckptd.client.findings import Finding, State
from ckptd.client.survey import timestamp
from ckptd.config import Config, check_roots, inactive_keys
from ckptd.core import limits
from ckptd.core.identity import Role, identity_of, load_ca, verify_chain
from ckptd.errors import CkptdError, DiscoveryFailed
from ckptd.net.tls import cipher_environment, client_context

CERTIFICATE_WARNING_S: Final = 60 * 86_400.0
_CPUINFO: Final = Path("/proc/cpuinfo")


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


def read_cpuinfo() -> str:
    """What `check_cipher` looks at; empty where there is no such file."""
    try:
        return _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


# -- what it hears


class Heard(Struct, frozen=True):
    """What mDNS brought within a moment: on which own addresses, nodes of this cluster, names of
    others. `failure` says why it cannot be used here, or is ""."""

    on: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    other_clusters: tuple[str, ...] = ()
    failure: str = ""


async def listen(config: Config) -> Heard:
    """Listens for a moment, unless the config has mDNS off."""
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
