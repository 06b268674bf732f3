"""The other nodes: one control connection to each, heartbeats, and catalogues that converge.

Addresses from the config, from member documents and from announcements are hints; who answers is
decided by the certificate. One connection is kept to each node, whatever number of ways leads to
it; when a node is announced at another place, that is tried beside the connection that there is.
Every heartbeat tells the digest of the peer's catalogue; when it differs from ours,
ids are exchanged, and each side gets the documents that it lacks (anti-entropy).
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from ckptd.config import MembershipConfig
from ckptd.core import limits
from ckptd.core.identity import Identity, Role
from ckptd.core.quantities import Address, parse_address
from ckptd.discovery.hints import Hints
from ckptd.errors import CkptdError, DocumentRefused, PeerError, PeerRefused
from ckptd.net.control import ControlClient, connect_control
from ckptd.net.tls import refuse_forgotten
from ckptd.node.members import Members
from ckptd.node.ports import OnDisk
from ckptd.node.records import Records, TooManyByWorker
from ckptd.observe.metrics import Metrics
from ckptd.wire import messages

_log = structlog.get_logger(__name__)


@dataclass
class _Link:
    """The connection to a node that is in use, and when it last answered on it."""

    client: ControlClient
    answered_s: float


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
        hints: Hints,
        members: Members,
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
        self._members = members
        self._hints = hints
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._seekers: dict[str, asyncio.Task[None]] = {}
        self._seeking = asyncio.Semaphore(limits.ANNOUNCED_CONNECTS_MAX)
        self._links: dict[str, _Link] = {}
        self._own_addresses: set[str] = set()
        self._jitter = random.Random()
        # What a peer answers is held in memory: one at a time may answer with much.
        self._syncing = asyncio.Lock()
        self._known_until_s: dict[str, float] = {}

    def client(self, node: str) -> ControlClient | None:
        """The connection to `node` that is in use, if there is one."""
        link = self._links.get(node)
        return link.client if link is not None and link.client.connected else None

    def known_until_s(self, node: str) -> float | None:
        """Up to which moment of the monotonic clock everything is known here that `node` knew: the
        beginning of the last exchange of documents with it that came to its end. None: never."""
        return self._known_until_s.get(node)

    def on_hello(self, identity: Identity, hello: messages.Hello) -> None:
        """Somebody connected to us; a node that did is alive, and says where it listens."""
        if not identity.is_node or identity.node_id == self._node_id:
            return
        self._members.heard(identity, hello)

    async def run(self) -> None:
        """Looks for nodes to keep in touch with, and notes who went silent."""
        try:
            while True:
                self._start_keepers()
                self._start_seekers()
                self._members.tick()
                await asyncio.sleep(self._config.heartbeat_s)
        finally:
            tasks = [*self._keepers.values(), *self._seekers.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _start_keepers(self) -> None:
        wanted = self._wanted_addresses()
        for address in wanted:
            if address not in self._keepers:
                self._keepers[address] = asyncio.create_task(
                    self._keep(address), name=f"peer {address}"
                )
        used = {link.client.address for link in self._links.values()}
        for address in self._keepers.keys() - set(wanted) - used:
            self._keepers.pop(address).cancel()  # the node that was there has moved

    def _start_seekers(self) -> None:
        for node in self._hints.nodes(time.monotonic()):
            if node not in self._seekers:
                task = asyncio.create_task(self._seek(node), name=f"announced {node}")
                self._seekers[node] = task
                task.add_done_callback(partial(self._seeker_ended, node))

    def _seeker_ended(self, node: str, task: asyncio.Task[None]) -> None:
        if self._seekers.get(node) is task:
            del self._seekers[node]

    def _wanted_addresses(self) -> list[str]:
        known = list(self._configured)
        for node, member in self._records.catalogue.members().items():
            if node != self._node_id and member.address:
                known.append(member.address)
        wanted = dict.fromkeys(a for a in known if a not in self._own_addresses)
        return list(wanted)[: 2 * limits.CLUSTER_NODES_MAX]

    async def _keep(self, address: str) -> None:
        """Holds one connection to whatever node listens at `address`."""
        wait_s = self._config.heartbeat_s
        try:
            where = parse_address(address)
        except ValueError as error:  # a node says so of itself, and signed it
            _log.warning("peer_address_unusable", address=address, reason=str(error))
            return
        told = ""
        while True:
            try:
                client = await connect_control(
                    where.host,
                    where.port,
                    context=self._context,
                    cluster=self._cluster,
                    hello=self._hello(),
                    forgotten=self._members.forgotten,
                )
            except CkptdError as error:
                if isinstance(error, PeerRefused) and error.message != told:
                    told = error.message
                    _log.warning("peer_refuses", address=address, reason=told, next=error.next)
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
            if not self._is_needed(client):
                await client.close()
                await self._until_needed(client)
                continue
            await self._hold(client, address)
            await asyncio.sleep(self._config.heartbeat_s)

    def _is_needed(self, client: ControlClient) -> bool:
        """Whether there is no connection to this node, or one to where it no longer answers."""
        link = self._links.get(client.node_id)
        if link is None:
            return True
        silent_s = time.monotonic() - link.answered_s
        return link.client.remote != client.remote and silent_s >= self._config.suspect_s

    async def _until_needed(self, client: ControlClient) -> None:
        while True:
            await asyncio.sleep(self._config.heartbeat_s)
            if self._is_needed(client):
                return

    async def _seek(self, node: str) -> None:
        """Keeps in touch with a node for as long as it is announced, wherever it is."""
        wait_s = self._config.heartbeat_s
        while addresses := self._hints.addresses(node, time.monotonic()):
            link = self._links.get(node)
            announced = self._hints.announced(node, time.monotonic())
            if link is not None and (not announced or link.client.remote in announced):
                await asyncio.sleep(self._config.heartbeat_s)
                continue
            if link is not None:
                # Said to be elsewhere: only that is tried, not what was right until now, so that
                # a liar does not make us leave a connection that works.
                addresses = announced
            client = await self._first_answer(node, addresses)
            if client is not None:
                wait_s = self._config.heartbeat_s
                link = self._links.get(node)
                if link is not None and link.client.remote == client.remote:
                    await client.close()  # somebody else was quicker
                else:
                    await self._hold(client, str(client.remote))
                await asyncio.sleep(self._config.heartbeat_s)
                continue
            retry_s = time.monotonic() + wait_s * self._jitter.uniform(0.5, 1.0)
            wait_s = min(wait_s * 2, limits.ANNOUNCED_RETRY_MAX_S)
            while True:
                await asyncio.sleep(self._config.heartbeat_s)
                now_s = time.monotonic()
                if now_s >= retry_s or not set(addresses).issuperset(
                    self._hints.announced(node, now_s)
                ):
                    break

    async def _first_answer(self, node: str, addresses: list[Address]) -> ControlClient | None:
        """A connection to `node` at the first address where it proves to be there."""
        for address in addresses:
            try:
                async with self._seeking, asyncio.timeout(limits.ANNOUNCED_CONNECT_TIMEOUT_S):
                    client = await connect_control(
                        address.host,
                        address.port,
                        context=self._context,
                        cluster=self._cluster,
                        hello=self._hello(),
                        expected_node_id=node,
                        forgotten=self._members.forgotten,
                    )
            except (CkptdError, TimeoutError) as error:
                reason = error.message if isinstance(error, CkptdError) else "no answer"
                _log.debug("announced_unreachable", node=node, address=address, reason=reason)
                self._hints.disprove(node, address)
                continue
            self._hints.prove(node, address, time.monotonic())
            return client
        return None

    async def _hold(self, client: ControlClient, address: str) -> None:
        """Talks with a node until the connection is lost, or another one takes its place."""
        node = client.node_id
        before = self._links.get(node)
        link = self._links[node] = _Link(client, time.monotonic())
        try:
            if before is not None:
                await before.client.close()  # the node has moved
            await self._converse(link, address)
        except CkptdError as error:
            _log.info("peer_lost", node=node, address=address, reason=error.message)
        except Exception:  # the edge of this task: the peer will be tried again
            _log.exception("peer_failed", node=node)
        finally:
            if self._links.get(node) is link:
                del self._links[node]
            await client.close()

    async def _converse(self, link: _Link, address: str) -> None:
        client = link.client
        node = client.node_id
        self._members.at(node, address).address = address
        self._members.heard(client.identity, client.hello)
        while True:
            refuse_forgotten(client.identity, self._members.forgotten)
            asked_s = time.monotonic()
            status, _ = await client.request(
                messages.Ping(), messages.NodeStatus, timeout_s=self._config.down_s
            )
            link.answered_s = time.monotonic()
            self._members.heard(client.identity, client.hello)
            self._members.answered(node, status)
            self._metrics.clock_skew(node, status.clock_ms / 1000 - time.time())
            if Role.WORKER in client.identity.roles:
                try:
                    complete = await self._sync(client, status.documents_digest)
                    # A node whose disk has failed takes nothing in: what it knows is of that day.
                    if complete and status.state != "failed":
                        self._known_until_s[node] = asked_s
                except PeerError:
                    raise
                except CkptdError as error:  # this node's own disk: the peer is as well as before
                    _log.warning("sync_failed", node=node, reason=error.message)
            await asyncio.sleep(self._config.heartbeat_s)

    async def _sync(self, client: ControlClient, digest: bytes) -> bool:
        """Makes both catalogues the union of both; whether all that the peer knows is here now."""
        own_digest = self._records.digest()
        if digest == own_digest:
            return True
        async with self._syncing:
            here, there = await self._compare(client, own_digest)
        fetched = await self._fetch(client, here)
        await self._send(client, there)
        return fetched and len(here) < limits.DOCUMENTS_FETCHED_PER_SYNC

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

    async def _fetch(self, client: ControlClient, wanted: list[bytes]) -> bool:
        """Takes in documents of a peer; whether it had all that were asked for, and they are here
        now. Those of versions that are dead here are not asked for: a peer that still tells of one
        has not heard of it yet."""
        wanted = [each for each in wanted if not self._records.is_dead(each.hex())]
        start = missing = 0
        while start < len(wanted):
            batch = tuple(wanted[start : start + limits.DOCUMENTS_PER_SYNC])
            async with self._syncing:
                answered, lacking = await self._fetch_batch(client, batch)
            if not answered:
                return False
            start += answered
            missing += lacking
        return not missing

    async def _fetch_batch(
        self, client: ControlClient, batch: tuple[bytes, ...]
    ) -> tuple[int, int]:
        """Asks for documents; how many of them the peer's answer was about, and how many of these
        are not here after it: the peer has them not (any more), or they are refused here."""
        reply, payload = await client.request(messages.GetDocuments(batch), messages.Documents)
        lacking = len(reply.missing)
        for signed in messages.document_views(payload, reply.count, peer=client.node_id):
            lacking += not await self._admit(client.node_id, signed)
        return min(len(batch), reply.count + len(reply.missing)), lacking

    async def _admit(self, node: str, signed: messages.DocumentView) -> bool:
        """Takes in one document; whether it is here now, or need not be."""
        try:
            await self._on_disk(lambda: self._records.put(signed.document, signed.signature))
        except TooManyByWorker as error:
            # Else a stolen worker could keep the others from ever having heard of each other.
            _log.warning("document_refused", node=node, reason=error.message)
        except DocumentRefused as error:
            # Whoever brings it need not be its author; it is not taken, and the rest goes on.
            _log.warning("document_refused", node=node, reason=error.message)
            return False
        return True

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
