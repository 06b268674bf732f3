"""The other nodes: one control connection to each, heartbeats, and catalogues that converge.

Addresses from the config and from member documents are hints; who answers is decided by the
certificate. Every heartbeat tells the digest of the peer's catalogue; when it differs from ours,
ids are exchanged, and each side gets the documents that it lacks (anti-entropy).
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar

import structlog

from ckptd.config import MembershipConfig
from ckptd.core import limits
from ckptd.core.identity import Identity, Role
from ckptd.core.membership import PeerState, peer_state
from ckptd.core.quantities import Address, parse_address
from ckptd.errors import CkptdError, DocumentRefused, PeerError
from ckptd.net.control import ControlClient, connect_control
from ckptd.node.records import Records
from ckptd.observe.metrics import Metrics
from ckptd.wire import messages

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class OnDisk(Protocol):
    """Runs work in a bounded pool of threads."""

    def __call__(self, work: Callable[[], _T]) -> Awaitable[_T]: ...


@dataclass
class Peer:
    """What is known of one other node. Times are of the monotonic clock, in seconds."""

    node: str
    address: str
    bulk_port: int = 0
    roles: tuple[str, ...] = ()
    zone: str = ""
    boot_id: str = ""
    heard_s: float | None = None
    state: PeerState = "down"


def missing_ids(
    ours: bytes | memoryview, theirs: bytes | memoryview, limit: int
) -> tuple[list[bytes], list[bytes]]:
    """Which document ids each side lacks: (here, there), up to `limit` each. Both arguments are
    packed ids, 32 bytes each, ascending."""
    here: list[bytes] = []
    there: list[bytes] = []
    own = other = 0
    while own < len(ours) or other < len(theirs):
        mine = bytes(ours[own : own + 32])
        told = bytes(theirs[other : other + 32])
        if mine == told:
            own, other = own + 32, other + 32
        elif not mine or (told and told < mine):
            other += 32
            if len(here) < limit:
                here.append(told)
        else:
            own += 32
            if len(there) < limit:
                there.append(mine)
        if len(here) == len(there) == limit:
            break
    return here, there


class Peers:
    """Keeps in touch with the other nodes until cancelled."""

    def __init__(
        self,
        *,
        cluster: str,
        node_id: str,
        context: ssl.SSLContext,
        config: MembershipConfig,
        addresses: tuple[Address, ...],
        records: Records,
        hello: Callable[[], messages.Hello],
        on_disk: OnDisk,
        metrics: Metrics,
    ) -> None:
        self._cluster = cluster
        self._node_id = node_id
        self._context = context
        self._config = config
        self._configured = [str(address) for address in addresses]
        self._records = records
        self._hello = hello
        self._on_disk = on_disk
        self._metrics = metrics
        self._peers: dict[str, Peer] = {}
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._own_addresses: set[str] = set()
        self._jitter = random.Random()
        # What a peer answers is held in memory: one at a time may answer with much.
        self._syncing = asyncio.Lock()

    def views(self) -> Iterator[messages.PeerView]:
        """What this node thinks of each other one, now."""
        now_s = time.monotonic()
        for peer in list(self._peers.values())[: limits.CLUSTER_NODES_MAX]:
            silent_s = None if peer.heard_s is None else now_s - peer.heard_s
            state = peer_state(
                silent_s, suspect_s=self._config.suspect_s, down_s=self._config.down_s
            )
            seen = -1.0 if silent_s is None else silent_s
            yield messages.PeerView(
                peer.node, peer.address, peer.bulk_port, state, seen, peer.roles, peer.zone
            )

    def on_hello(self, identity: Identity, hello: messages.Hello) -> None:
        """Somebody connected to us; a node that did is alive, and says where it listens."""
        if not identity.is_node or identity.node_id == self._node_id:
            return
        peer = self._peer(identity.node_id, hello.address)
        self._heard(peer, hello, identity)

    async def run(self) -> None:
        """Looks for nodes to keep in touch with, and notes who went silent."""
        try:
            while True:
                for address in self._wanted_addresses():
                    if address not in self._keepers:
                        self._keepers[address] = asyncio.create_task(
                            self._keep(address), name=f"peer {address}"
                        )
                self._note_states()
                await asyncio.sleep(self._config.heartbeat_s)
        finally:
            for task in self._keepers.values():
                task.cancel()
            await asyncio.gather(*self._keepers.values(), return_exceptions=True)

    def _wanted_addresses(self) -> list[str]:
        known = list(self._configured)
        for node, member in self._records.catalogue.members().items():
            if node != self._node_id and member.address:
                known.append(member.address)
                self._peer(node, member.address)
        wanted = dict.fromkeys(a for a in known if a not in self._own_addresses)
        return list(wanted)[: 2 * limits.CLUSTER_NODES_MAX]

    def _peer(self, node: str, address: str) -> Peer:
        peer = self._peers.get(node)
        if peer is None:
            peer = self._peers[node] = Peer(node, address)
        elif address and peer.state != "up":
            peer.address = address
        return peer

    def _heard(self, peer: Peer, hello: messages.Hello, identity: Identity) -> None:
        peer.heard_s = time.monotonic()
        peer.bulk_port = hello.bulk_port
        peer.roles = tuple(sorted(identity.roles.intersection(hello.roles)))
        peer.zone = hello.zone
        peer.boot_id = hello.boot_id
        self._note_state(peer)

    def _note_states(self) -> None:
        for peer in self._peers.values():
            self._note_state(peer)

    def _note_state(self, peer: Peer) -> None:
        silent_s = None if peer.heard_s is None else time.monotonic() - peer.heard_s
        state = peer_state(silent_s, suspect_s=self._config.suspect_s, down_s=self._config.down_s)
        if state != peer.state:
            _log.info("peer_state", node=peer.node, state=state, before=peer.state)
            peer.state = state
        self._metrics.node_up(peer.node, state == "up")

    async def _keep(self, address: str) -> None:
        """Holds one connection to whatever node listens at `address`."""
        wait_s = self._config.heartbeat_s
        where = parse_address(address)
        while True:
            try:
                client = await connect_control(
                    where.host,
                    where.port,
                    context=self._context,
                    cluster=self._cluster,
                    hello=self._hello(),
                )
            except CkptdError as error:
                _log.debug("peer_unreachable", address=address, reason=error.message)
                await asyncio.sleep(wait_s * self._jitter.uniform(0.5, 1.0))
                wait_s = min(wait_s * 2, limits.RECONNECT_MAX_S)
                continue
            wait_s = self._config.heartbeat_s
            if client.node_id == self._node_id:
                self._own_addresses.add(address)
                self._keepers.pop(address, None)
                await client.close()
                return
            try:
                await self._converse(client, address)
            except CkptdError as error:
                _log.info("peer_lost", node=client.node_id, reason=error.message)
            except Exception:  # the edge of this task: the peer will be tried again
                _log.exception("peer_failed", node=client.node_id)
            finally:
                await client.close()
            await asyncio.sleep(self._config.heartbeat_s)

    async def _converse(self, client: ControlClient, address: str) -> None:
        peer = self._peer(client.node_id, address)
        peer.address = address
        self._heard(peer, client.hello, client.identity)
        while True:
            status, _ = await client.request(
                messages.Ping(), messages.NodeStatus, timeout_s=self._config.down_s
            )
            self._heard(peer, client.hello, client.identity)
            self._metrics.clock_skew(peer.node, status.clock_ms / 1000 - time.time())
            if Role.WORKER in client.identity.roles:
                try:
                    await self._sync(client, status.documents_digest)
                except PeerError:
                    raise
                except CkptdError as error:  # this node's own disk: the peer is as well as before
                    _log.warning("sync_failed", node=peer.node, reason=error.message)
            await asyncio.sleep(self._config.heartbeat_s)

    async def _sync(self, client: ControlClient, digest: bytes) -> None:
        """Makes both catalogues the union of both."""
        own_digest = self._records.digest()
        if digest == own_digest:
            return
        async with self._syncing:
            here, there = await self._compare(client, own_digest)
        await self._fetch(client, here)
        await self._send(client, there)

    async def _compare(
        self, client: ControlClient, own_digest: bytes
    ) -> tuple[list[bytes], list[bytes]]:
        reply, payload = await client.request(messages.Sync(own_digest), messages.SyncReply)
        if reply.equal:
            return [], []
        node = client.node_id
        theirs = await self._on_disk(
            lambda: messages.decode_document_ids(reply, payload, peer=node)
        )
        return await self._on_disk(
            lambda: missing_ids(
                self._records.packed_ids(), theirs, limits.DOCUMENTS_FETCHED_PER_SYNC
            )
        )

    async def _fetch(self, client: ControlClient, wanted: list[bytes]) -> None:
        start = 0
        while start < len(wanted):
            batch = tuple(wanted[start : start + limits.DOCUMENTS_PER_SYNC])
            async with self._syncing:
                answered = await self._fetch_batch(client, batch)
            if not answered:
                return
            start += answered

    async def _fetch_batch(self, client: ControlClient, batch: tuple[bytes, ...]) -> int:
        """Asks for documents; how many of them the peer's answer was about."""
        reply, payload = await client.request(messages.GetDocuments(batch), messages.Documents)
        for signed in messages.document_views(payload, reply.count, peer=client.node_id):
            await self._admit(client.node_id, signed)
        return min(len(batch), reply.count + len(reply.missing))

    async def _admit(self, node: str, signed: messages.DocumentView) -> None:
        try:
            await self._on_disk(lambda: self._records.put(signed.document, signed.signature))
        except DocumentRefused as error:
            # Whoever brings it need not be its author; it is not taken, and the rest goes on.
            _log.warning("document_refused", node=node, reason=error.message)

    async def _send(self, client: ControlClient, missing: list[bytes]) -> None:
        for document_id in missing:
            key = document_id.hex()
            signed = await self._on_disk(partial(self._records.get, key))
            if signed is None:
                continue
            payload = messages.encode_documents((messages.SignedDocument(*signed),))
            await client.request(
                messages.PutDocuments(1), messages.PutDocumentsReply, payload=payload
            )
