"""The bulk side of a node: takes shards in and passes them on, hands shards out.

Slots are a separate pool per hop: a shard from a client takes one at hop 0, its forwarding one at
hop 1 of the next node, and so on. A slot is never waited for while another one is held (the next
hop says Busy instead), so chains that cross each other cannot wait in a circle. Shards that a node
pushes by itself use the last pool, so that they never take the place of somebody's store.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.core.permissions import Action, may
from ckptd.errors import (
    CkptdError,
    NotAuthorized,
    PeerError,
    PeerUnreachable,
    ProtocolError,
    ShardCorrupt,
)
from ckptd.net.bulk import BulkChannel, BulkConnector
from ckptd.net.bulk_channel import patience_s
from ckptd.net.control_connection import as_error_message
from ckptd.net.tls import refuse_forgotten
from ckptd.net.tls_stream import TlsStream
from ckptd.node.bulk_connections import BulkConnection, BulkConnections, Slots
from ckptd.node.push import Push
from ckptd.node.reception import Reception
from ckptd.node.traffic import Traffic
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import Message

_log = structlog.get_logger(__name__)

_ACTIONS: Final[dict[type[Message], Action]] = {
    messages.PutShard: Action.PUT_SHARD,
    messages.GetShard: Action.GET_SHARD,
    messages.PushShard: Action.PUSH_SHARD,
}


def may_use_hop(identity: Identity, hop: int) -> bool:
    """Whether a bulk connection of `identity` may be for `hop`.

    Hop 0 is for whoever stores and restores, the others for nodes that pass shards on: a worker
    that fell into the wrong hands cannot take the slots of the clients.
    """
    if hop == 0:
        return may(identity.roles, Action.GET_SHARD)
    return identity.is_node


class BulkService:
    """Serves authenticated bulk connections, each in a thread of its own."""

    def __init__(
        self,
        *,
        cluster: str,
        node_id: str,
        store: ShardStore,
        connector: BulkConnector,
        hello: Callable[[], messages.Hello],
        traffic: Traffic,
        on_suspicion: Callable[[bytes], None],
        forgotten: Callable[[str], bool],
        draining: Callable[[], bool],
    ) -> None:
        """`forgotten` says of a certificate's serial number whether it is refused, `draining`
        whether this node takes no new copies."""
        self.cluster = cluster
        self.node_id = node_id
        self.store = store
        self.connector = connector
        self.traffic = traffic
        self._hello = hello
        self._on_suspicion = on_suspicion
        self._forgotten = forgotten
        self._draining = draining
        per_peer = limits.BULK_SLOTS_PER_PEER_MAX
        self.connections = BulkConnections()
        self.receive_slots = [
            Slots(limits.BULK_SLOTS_PER_HOP, per_peer=per_peer)
            for _ in range(limits.CHAIN_HOPS_MAX + 1)
        ]
        self.read_slots = Slots(limits.BULK_READ_SLOTS, per_peer=per_peer)
        self.push_slots = Slots(limits.BULK_PUSH_SLOTS)
        self._lock = threading.Lock()
        self._busy = 0
        self._idle = threading.Condition(self._lock)
        self._stopping = False

    def start(self, sock: TlsStream, identity: Identity) -> None:
        """Takes over an authenticated connection."""
        channel = BulkChannel(sock, identity.node_id, timeout_s=limits.HANDSHAKE_TIMEOUT_S)
        connection = self.connections.admit(channel)
        if connection is None:
            _log.info("bulk_connection_refused", peer=channel.peer, reason="too many connections")
            channel.close()
            return
        thread = threading.Thread(
            target=self._serve,
            args=(connection, identity),
            name=f"bulk {identity.node_id}",
            daemon=True,
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system gives no more threads
            _log.error("bulk_connection_refused", peer=channel.peer, reason=str(error))
            self.connections.leave(connection)
            channel.close()

    def stop(self, timeout_s: float) -> bool:
        """Takes nothing new, lets transfers under way finish for `timeout_s`, closes everything.

        Returns whether all transfers had finished."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._stopping = True
        self.connections.close()
        with self._lock:
            while self._busy and (left_s := deadline_s - time.monotonic()) > 0:
                self._idle.wait(left_s)
            finished = not self._busy
        self.connections.interrupt_all()
        self.connector.close()  # threads that forward wait on other nodes
        self.connections.wait_empty(limits.LAST_WORDS_TIMEOUT_S)
        return finished

    def _serve(self, connection: BulkConnection, identity: Identity) -> None:
        channel = connection.channel
        try:
            if self._greet(connection, identity):
                self._serve_requests(connection, identity)
        except ProtocolError as error:
            self.traffic.error(error.kind)
            _log.warning("bulk_connection_dropped", peer=channel.peer, reason=error.reason)
            self._refuse(channel, error)
        except PeerError as error:
            _log.debug("bulk_connection_ended", peer=channel.peer, reason=error.reason)
        except Exception:  # the edge of this thread: one connection must not take the node down
            _log.exception("bulk_connection_failed", peer=channel.peer)
        finally:
            channel.close()
            self.connections.leave(connection)

    def _refuse(self, channel: BulkChannel, error: CkptdError) -> None:
        """Tells the peer why its connection ends, if it listens."""
        try:
            channel.set_timeout(limits.LAST_WORDS_TIMEOUT_S)
            channel.send(as_error_message(error, self.node_id))
            channel.drain(limits.LAST_WORDS_TIMEOUT_S)
        except (PeerError, OSError):
            pass  # it does not

    def _greet(self, connection: BulkConnection, identity: Identity) -> bool:
        """Exchanges hellos; whether the connection is taken."""
        channel = connection.channel
        header, hello = channel.receive()
        if not isinstance(hello, messages.Hello) or hello.cluster != self.cluster:
            raise ProtocolError(channel.peer, "sent no hello of this cluster")
        if not may_use_hop(identity, header.hop):
            self._refuse(channel, self._not_authorized(identity, f"use hop {header.hop}"))
            return False
        if not self.connections.enter(connection, header.hop):
            channel.send(messages.Busy("has too many bulk connections"))
            return False
        channel.send(self._hello())
        return True

    def _not_authorized(self, identity: Identity, what: str) -> NotAuthorized:
        _log.warning("request_refused", peer=identity.node_id, request=what)
        self.traffic.error(NotAuthorized.kind)
        return NotAuthorized(f"{identity} may not {what}")

    def _serve_requests(self, connection: BulkConnection, identity: Identity) -> None:
        channel = connection.channel
        while not channel.broken and self.connections.begin_idle(connection):
            channel.rest()
            if not channel.wait_for_frame(limits.BULK_IDLE_TIMEOUT_S):
                return
            if not self.connections.begin_work(connection):
                return
            self._serve_one(connection, identity)

    def _serve_one(self, connection: BulkConnection, identity: Identity) -> None:
        channel, hop = connection.channel, connection.hop or 0
        channel.set_timeout(patience_s(hop))
        header, request = channel.receive()
        action = _ACTIONS.get(type(request))
        if action is None:
            raise ProtocolError(channel.peer, f"sent {type(request).__name__} as a request")
        if header.hop != hop:
            raise ProtocolError(channel.peer, "changed the hop of a connection")
        try:
            refuse_forgotten(identity, self._forgotten)
            if not may(identity.roles, action):
                raise self._not_authorized(identity, action.value.replace("_", " "))
        except NotAuthorized as refused:
            channel.send(as_error_message(refused, self.node_id))
            return
        if not self._begin_request():
            channel.send(messages.Busy("is stopping"))
            return
        try:
            self._dispatch(channel, request, hop)
        except ProtocolError:
            raise
        except PeerError as error:
            self.traffic.error(error.kind)
            raise
        except CkptdError as error:
            self.traffic.error(error.kind)
            if isinstance(error, ShardCorrupt):  # our own copy, too short: it is looked at
                self._on_suspicion(bytes.fromhex(error.shard))
            channel.send(as_error_message(error, self.node_id))
        finally:
            with self._lock:
                self._busy -= 1
                self._idle.notify_all()

    def _begin_request(self) -> bool:
        with self._lock:
            if self._stopping:
                return False
            self._busy += 1
            return True

    def _dispatch(self, channel: BulkChannel, request: Message, hop: int) -> None:
        if isinstance(request, messages.PutShard):
            reception = Reception(
                channel,
                request,
                hop=hop,
                node_id=self.node_id,
                store=self.store,
                connector=self.connector,
                traffic=self.traffic,
                draining=self._draining,
            )
            self._with_slot(self.receive_slots[hop], channel, reception.run)
        elif isinstance(request, messages.PushShard):
            push = Push(
                channel,
                request,
                node_id=self.node_id,
                store=self.store,
                connector=self.connector,
                traffic=self.traffic,
                on_suspicion=self._on_suspicion,
            )
            self._with_slot(self.push_slots, channel, push.run)
        elif isinstance(request, messages.GetShard):
            self._with_slot(self.read_slots, channel, lambda: self._get(channel, request))

    def _with_slot(self, slots: Slots, channel: BulkChannel, work: Callable[[], None]) -> None:
        if not slots.take(channel.peer):
            channel.send(messages.Busy("has no free slot"))
            return
        try:
            work()
        finally:
            slots.give_back(channel.peer)

    def _get(self, channel: BulkChannel, request: messages.GetShard) -> None:
        with self.store.open_read(request.shard) as source:
            started_s = time.monotonic()
            channel.send(messages.ShardData(request.shard), payload_bytes=source.size)
            source.bypass_cache()
            offset = 0
            try:
                while offset < source.size:
                    piece = source.piece(offset, limits.BULK_BUFFER_BYTES)
                    channel.send_payload(piece)
                    offset += len(piece)
            except PeerError:
                raise
            except CkptdError as error:
                # The payload was promised: the only honest end is to break the connection.
                self._on_suspicion(request.shard)
                _log.error("shard_read_failed", shard=request.shard.hex(), reason=error.message)
                raise PeerUnreachable(channel.peer, "was promised bytes that are gone") from error
        self.traffic.sent(channel.peer, source.size, time.monotonic() - started_s)
