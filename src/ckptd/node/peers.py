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

import structlog

from ckptd.config import MembershipConfig
from ckptd.core import limits
from ckptd.core.identity import Identity, Role
from ckptd.core.membership import PeerState, peer_state
from ckptd.core.quantities import Address, parse_address
from ckptd.errors import CkptdError, DocumentRefused
from ckptd.net.control import ControlClient, connect_control
from ckptd.node.records import Records
from ckptd.observe.metrics import Metrics
from ckptd.wire import messages

_log = structlog.get_logger(__name__)


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


def packed_ids(payload: bytes | memoryview) -> set[str]:
    """The document ids in the payload of a SyncReply."""
    text = bytes(payload).hex()
    return {text[start : start + 64] for start in range(0, len(text), 64)}


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
        on_disk: Callable[[Callable[[], str]], Awaitable[str]],
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

    def views(self) -> Iterator[messages.PeerView]:
        """What this node thinks of each other one, now."""
        now_s = time.monotonic()
        for peer in self._peers.values():
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
        self._heard(peer, hello)

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

    def _heard(self, peer: Peer, hello: messages.Hello) -> None:
        peer.heard_s = time.monotonic()
        peer.bulk_port = hello.bulk_port
        peer.roles = hello.roles
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
            finally:
                await client.close()
            await asyncio.sleep(self._config.heartbeat_s)

    async def _converse(self, client: ControlClient, address: str) -> None:
        peer = self._peer(client.node_id, address)
        peer.address = address
        self._heard(peer, client.hello)
        while True:
            status, _ = await client.request(
                messages.Ping(), messages.NodeStatus, timeout_s=self._config.down_s
            )
            self._heard(peer, client.hello)
            self._metrics.clock_skew(peer.node, status.clock_ms / 1000 - time.time())
            if Role.WORKER in client.identity.roles:
                await self._sync(client, status.documents_digest)
            await asyncio.sleep(self._config.heartbeat_s)

    async def _sync(self, client: ControlClient, digest: bytes) -> None:
        """Makes both catalogues the union of both."""
        catalogue = self._records.catalogue
        if digest == catalogue.digest():
            return
        reply, payload = await client.request(messages.Sync(catalogue.digest()), messages.SyncReply)
        if reply.equal:
            return
        theirs = packed_ids(payload)
        ours = set(catalogue.ids())
        await self._fetch(client, sorted(theirs - ours))
        await self._send(client, sorted(ours - theirs))

    async def _fetch(self, client: ControlClient, wanted: list[str]) -> None:
        while wanted:
            batch = wanted[: limits.DOCUMENTS_PER_SYNC]
            reply, payload = await client.request(
                messages.GetDocuments(tuple(bytes.fromhex(i) for i in batch)), messages.Documents
            )
            documents = messages.decode_documents(memoryview(payload), peer=client.node_id)
            for signed in documents:
                await self._admit(client.node_id, signed)
            answered = len(documents) + len(reply.missing)
            if not answered:
                return
            wanted = wanted[answered:]

    async def _admit(self, node: str, signed: messages.SignedDocument) -> None:
        try:
            await self._on_disk(lambda: self._records.put(signed.document, signed.signature))
        except DocumentRefused as error:
            # Whoever brings it need not be its author; it is not taken, and the rest goes on.
            _log.warning("document_refused", node=node, reason=error.message)

    async def _send(self, client: ControlClient, missing: list[str]) -> None:
        for document_id in missing:
            signed = self._records.get(document_id)
            if signed is None:
                continue
            payload = messages.encode_documents((messages.SignedDocument(*signed),))
            await client.request(
                messages.PutDocuments(1), messages.PutDocumentsReply, payload=payload
            )
