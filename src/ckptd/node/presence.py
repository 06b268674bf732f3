"""Where a node is: its machine, its addresses, its directory, and what it tells others of these."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog

from ckptd.config import Config, NodeConfig
from ckptd.core import documents, limits
from ckptd.core.catalogue import Catalogue
from ckptd.core.quantities import Address
from ckptd.core.signing import Signer
from ckptd.discovery.interfaces import choose, read_interfaces
from ckptd.errors import CkptdError, ConfigError, DocumentRefused
from ckptd.net.acceptor import listen
from ckptd.net.tls import check_peer
from ckptd.node.ports import OnDisk
from ckptd.node.records import Records
from ckptd.store.marker import StoreDirectory, init_store, open_store

_log = structlog.get_logger(__name__)

DOCUMENTS: Final = "documents"
"""Below the state of a coordinator: its copy of the catalogue, laid out like a store."""
_WILDCARDS: Final = ("0.0.0.0", "::", "")


def boot_id() -> str:
    """An id of this machine's running kernel: nodes that share it share a fate. "" if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{uuid.getnode():012x}"


def now_text() -> str:
    """The wall clock as documents show it (RFC 3339, UTC)."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def reachable_host(host: str, peers: Sequence[Address], interfaces: Sequence[str]) -> str:
    """The address that others reach a node at which listens on `host`: when it listens on all
    interfaces, of the one that a packet to the configured peers would leave by, else of the first
    fit one. `interfaces` is the config's `discovery.interfaces`."""
    if host not in _WILDCARDS:
        return host
    for peer in peers:
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect((peer.host, peer.port))  # sends nothing: it only picks a route
            found = str(probe.getsockname()[0])
            if not found.startswith("127.") or peer.host.startswith("127."):
                return found  # else the peer is this node itself, by its name
    choice = choose(read_interfaces(), interfaces, host)
    return choice.advertised[0] if choice.advertised else socket.gethostname()


def listening(key: str, host: str, port: int) -> socket.socket:
    """A listening socket. Raises ConfigError about `key`."""
    try:
        return listen(host, port)
    except OSError as error:
        raise ConfigError(key, f"cannot listen on {host}:{port}: {error}") from error


def open_directory(config: Config) -> StoreDirectory:
    """Where the node keeps its documents, and a worker its shards.

    A worker's store is never made here. What a coordinator keeps is only a copy of what the
    workers have, so an empty place is as good as a full one, but for the time to fill it.
    """
    if config.is_worker:
        assert config.store is not None, "the config was checked"
        return open_store(str(config.store.path))
    assert config.node is not None and config.node.state is not None, "it is a coordinator"
    place = config.node.state / DOCUMENTS
    try:
        config.node.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError("node.state", f"{config.node.state}: {error.strerror}") from error
    init_store(str(place), store_id=secrets.token_hex(16))
    return open_store(str(place))


def member_document(
    catalogue: Catalogue,
    node: NodeConfig,
    *,
    cluster: str,
    address: str,
    bulk_port: int,
    serial: str,
) -> documents.Member | None:
    """What the node has to say of itself; None when its newest document in `catalogue` says it,
    signed with the certificate that it has now: `ckptd forget` finds the serial numbers there. A
    node whose certificate was forgotten has nothing to say."""
    if catalogue.roster.refuses(serial):
        return None
    known = catalogue.members().get(node.id)
    # A member's order counts among the documents of this node alone, so it is set above them: a
    # machine that boots with an old clock must still be believed.
    order = max(
        int(time.time() * 1000),
        1 + catalogue.highest_order,
        1 + known.order if known is not None else 0,
    )
    member = documents.Member(
        format=1,
        cluster=cluster,
        order=order,
        created=now_text(),
        node=node.id,
        roles=node.roles,
        address=address,
        bulk_port=bulk_port,
        zone=node.zone,
    )
    signed = catalogue.roster.newest_serial(node.id) == serial
    if known is not None and signed and _same_place(known, member):
        return None
    return member


def _same_place(one: documents.Member, other: documents.Member) -> bool:
    return (one.address, one.bulk_port, one.roles, one.zone) == (
        other.address,
        other.bulk_port,
        other.roles,
        other.zone,
    )


class Presence:
    """Where a node listens, and what it tells others of that: in hellos at once, in its member
    document less often, since documents are kept for ever."""

    def __init__(self, config: Config, records: Records, signer: Signer) -> None:
        assert config.node is not None, "it is a node"
        self._config = config
        self._node: NodeConfig = config.node
        self._records = records
        self._signer = signer
        self._serial = check_peer(signer.certificate_der, cluster=config.cluster).serial
        self.address = ""
        """Where others reach this node; "" before it listens."""
        self.bulk_port = 0
        """Where it takes shards; 0 for one that keeps none."""
        self.bound: Address

    def listen(self) -> list[socket.socket]:
        """The listening sockets: for control connections, and a worker's for bulk ones."""
        host, port = self._node.listen
        control = listening("node.listen", host, port)
        listeners = [control]
        try:
            if self._config.is_worker:
                listeners.append(listening("node.bulk_port", host, self._node.bulk_port))
                self.bulk_port = listeners[1].getsockname()[1]
            self.bound = Address(*control.getsockname()[:2])
            self.address = self._reachable_address()
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        return listeners

    def _reachable_address(self) -> str:
        discovery = self._config.discovery
        host = reachable_host(self._node.listen.host, discovery.peers, discovery.interfaces)
        return str(Address(host, self.bound.port))

    async def say(self, on_disk: OnDisk) -> bool:
        """Writes the node's member document unless its newest one says the same; whether that was
        tried. One too many is only logged: peers know the address from hellos. Raises NoRoom or
        MediumFailed."""
        try:
            return await on_disk(self._remember)
        except DocumentRefused as error:
            _log.warning("address_not_remembered", reason=error.message)
            return True

    def _remember(self) -> bool:
        member = member_document(
            self._records.catalogue,
            self._node,
            cluster=self._config.cluster,
            address=self.address,
            bulk_port=self.bulk_port,
            serial=self._serial,
        )
        if member is None:
            return False
        self._records.write(documents.encode(member), self._signer)
        return True

    async def follow(self, on_disk: OnDisk) -> None:
        """Follows the machine when it gets another address, until cancelled. The others hear of it
        at once; a document comes less often the more often that happens.

        What an earlier life of this node said of itself may come back from others, with a later
        order than this one could know at its start: then it is said once more.
        """
        pause_s, next_s = limits.ADDRESS_DOCUMENT_PAUSE_MIN_S, 0.0
        while True:
            await asyncio.sleep(limits.INTERFACES_CHECK_INTERVAL_S)
            address = await asyncio.to_thread(self._reachable_address)
            if address != self.address:
                _log.info("address_changed", address=address, before=self.address)
                self.address = address
            if time.monotonic() < next_s:
                continue
            try:
                tried = await self.say(on_disk)
            except CkptdError as error:
                _log.warning("address_not_remembered", reason=error.message, next=error.next)
                tried = True
            if tried:
                next_s = time.monotonic() + pause_s
                pause_s = min(2 * pause_s, limits.ADDRESS_DOCUMENT_PAUSE_MAX_S)
