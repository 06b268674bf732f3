"""What nodes announce: the names, the text and the rules by which an announcement is read.

    NODE-DIGEST._ckptd._tcp.local.   SRV   control port, NODE-DIGEST.local.
                                     TXT   txtvers=1 id=NODE cluster=CLUSTER version=… roles=…
    NODE-DIGEST.local.               A, AAAA

DIGEST tells nodes of different clusters apart that have the same id. It follows from both names
alone, so that a node that was restarted replaces its old announcement, and two that say they are
the same node are heard under one name. Announcements are hints: anybody on the network can write
them, and who really answers at an address is decided by its certificate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from ipaddress import ip_address
from typing import Final, NamedTuple

from ckptd.core import limits
from ckptd.core.names import check_node_id
from ckptd.core.quantities import Address
from ckptd.errors import NameRefused

SERVICE: Final = "_ckptd._tcp.local."
TXT_VERSION: Final = "1"
_LABEL_MAX: Final = 63
_DIGEST_DIGITS: Final = 10
_SOFTWARE_MAX: Final = 32
_ROLES: Final = ("worker", "coordinator")


class Announcement(NamedTuple):
    """What one node says of itself."""

    node: str
    cluster: str
    software: str
    roles: tuple[str, ...]
    addresses: tuple[Address, ...]


class AnnouncementRefused(ValueError):
    """An announcement that breaks the rules; the text says which one."""


def label(cluster: str, node: str) -> str:
    """The first part of a node's mDNS names: its id, as far as it fits into one DNS label."""
    digest = hashlib.sha256(f"{cluster}\0{node}".encode()).hexdigest()[:_DIGEST_DIGITS]
    plain = "".join(c if c.isalnum() else "-" for c in node)
    return f"{plain[: _LABEL_MAX - 1 - _DIGEST_DIGITS].rstrip('-')}-{digest}"


def instance_name(cluster: str, node: str) -> str:
    """The name of a node's service."""
    return f"{label(cluster, node)}.{SERVICE}"


def host_name(cluster: str, node: str) -> str:
    """The name of a node's addresses: one of our own, so that it does not meet that of the
    machine, which others announce."""
    return f"{label(cluster, node)}.local."


def text(cluster: str, node: str, software: str, roles: Iterable[str]) -> dict[str, str]:
    """The TXT record of a node."""
    return {
        "txtvers": TXT_VERSION,
        "id": node,
        "cluster": cluster,
        "version": software[:_SOFTWARE_MAX],
        "roles": ",".join(roles),
    }


def read(
    instance: str,
    txt: Mapping[bytes, bytes | None],
    port: int | None,
    addresses: Iterable[str],
    *,
    loopback: bool,
) -> Announcement:
    """The announcement that these records make up. Raises AnnouncementRefused.

    `loopback` tells whether addresses of this very machine may be meant, as on an interface `lo`:
    elsewhere a stranger could make us connect to our own services.
    """
    version = _value(txt, b"txtvers")
    if version != TXT_VERSION:
        raise AnnouncementRefused(f"txtvers {version!r} is not known")
    node, cluster = _identifier(txt, b"id"), _identifier(txt, b"cluster")
    if instance.lower() != instance_name(cluster, node):
        raise AnnouncementRefused(f"{instance!r} is not the name of {node} of {cluster}")
    if port is None or not 0 < port < 65536:
        raise AnnouncementRefused(f"port {port} is none")
    usable = tuple(
        Address(address, port)
        for address in dict.fromkeys(addresses)
        if _may_be_tried(address, loopback=loopback)
    )
    if not usable:
        raise AnnouncementRefused("it names no address that can be used")
    roles = _value(txt, b"roles").split(",")
    return Announcement(
        node,
        cluster,
        "".join(c for c in _value(txt, b"version")[:_SOFTWARE_MAX] if c.isprintable()),
        tuple(role for role in _ROLES if role in roles),
        usable[: limits.ANNOUNCED_ADDRESSES_MAX],
    )


def _value(txt: Mapping[bytes, bytes | None], key: bytes) -> str:
    return (txt.get(key) or b"").decode(errors="replace")


def _identifier(txt: Mapping[bytes, bytes | None], key: bytes) -> str:
    try:
        return check_node_id(_value(txt, key))
    except NameRefused as error:
        raise AnnouncementRefused(error.message) from error


def _may_be_tried(text_: str, *, loopback: bool) -> bool:
    try:
        address = ip_address(text_)
    except ValueError:
        return False
    if address.is_multicast or address.is_unspecified or text_ == "255.255.255.255":
        return False
    if address.is_loopback:
        return loopback
    # Those of IPv6 lead nowhere without the number of an interface, which is ours alone.
    return not (address.version == 6 and address.is_link_local)
