"""The bulk side of a node: takes shards in and passes them on, hands shards out.

Slots are a separate pool per hop: a shard from a client takes one at hop 0, its forwarding one at
hop 1 of the next node, and so on. A slot is never waited for while another one is held (the next
hop says Busy instead), so chains that cross each other cannot wait in a circle. Shards that a node
pushes by itself use the last pool, so that they never take the place of somebody's store.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Callable
from typing import Final

import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.core.permissions import Action, may
from ckptd.errors import CkptdError, NotAuthorized, NotFound, PeerError, ProtocolError
from ckptd.net.bulk import BulkChannel, BulkConnector, ShardSender, stall_timeout_s
from ckptd.net.control_connection import as_error_message
from ckptd.node.reception import Reception
from ckptd.node.traffic import Traffic
from ckptd.store.shards import ShardStore
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport, Message

_log = structlog.get_logger(__name__)

PUSH_HOP: Final = limits.CHAIN_HOPS_MAX

_ACTIONS: Final[dict[type[Message], Action]] = {
    messages.PutShard: Action.PUT_SHARD,
    messages.GetShard: Action.GET_SHARD,
    messages.PushShard: Action.PUSH_SHARD,
}


class Slots:
    """Bounded pools that are never waited for."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._lock = threading.Lock()

    def take(self) -> bool:
        with self._lock:
            if not self._free:
                return False
            self._free -= 1
            return True

    def give_back(self) -> None:
        with self._lock:
            self._free += 1


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
    ) -> None:
        self.cluster = cluster
        self.node_id = node_id
        self.store = store
        self.connector = connector
        self.traffic = traffic
        self._hello = hello
        self._on_suspicion = on_suspicion
        hops = range(limits.CHAIN_HOPS_MAX + 1)
        self._connections = [Slots(limits.BULK_CONNECTIONS_PER_HOP_MAX) for _ in hops]
        self._receive_slots = [Slots(limits.BULK_SLOTS_PER_HOP) for _ in hops]
        self._read_slots = Slots(limits.BULK_READ_SLOTS)
        self._lock = threading.Lock()
        self._channels: dict[BulkChannel, threading.Thread] = {}
        self._busy = 0
        self._idle = threading.Condition(self._lock)
        self._stopping = False

    def start(self, sock: ssl.SSLSocket, identity: Identity) -> None:
        """Takes over an authenticated socket."""
        sock.setblocking(True)
        channel = BulkChannel(sock, identity.node_id, timeout_s=limits.HANDSHAKE_TIMEOUT_S)
        thread = threading.Thread(
            target=self._serve, args=(channel, identity), name=f"bulk {identity.node_id}"
        )
        thread.daemon = True
        with self._lock:
            if self._stopping or len(self._channels) >= limits.BULK_CONNECTIONS_MAX:
                channel.close()
                return
            self._channels[channel] = thread
        thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Takes nothing new, lets transfers under way finish for `timeout_s`, closes everything.

        Returns whether all transfers had finished."""
        deadline_s = time.monotonic() + timeout_s
        with self._lock:
            self._stopping = True
            while self._busy and (left_s := deadline_s - time.monotonic()) > 0:
                self._idle.wait(left_s)
            finished = not self._busy
            threads = list(self._channels.items())
        for channel, _ in threads:
            channel.close()
        for _, thread in threads:
            thread.join(timeout=1.0)
        return finished

    def _serve(self, channel: BulkChannel, identity: Identity) -> None:
        try:
            hop = self._greet(channel)
            if hop is None:
                return
            try:
                while not (channel.broken or self._stopping):
                    channel.set_timeout(limits.BULK_IDLE_TIMEOUT_S)
                    if not channel.wait_for_frame(limits.BULK_IDLE_TIMEOUT_S):
                        return
                    self._serve_one(channel, identity, hop)
            finally:
                self._connections[hop].give_back()
        except PeerError as error:
            _log.debug("bulk_connection_ended", peer=channel.peer, reason=error.reason)
        except Exception:  # the edge of this thread: one connection must not take the node down
            _log.exception("bulk_connection_failed", peer=channel.peer)
        finally:
            channel.close()
            with self._lock:
                self._channels.pop(channel, None)

    def _greet(self, channel: BulkChannel) -> int | None:
        """Exchanges hellos; the hop that this connection is for, or None when it is refused."""
        header, hello = channel.receive()
        if not isinstance(hello, messages.Hello) or hello.cluster != self.cluster:
            channel.send(messages.Error("protocol", "hello of this cluster expected"))
            return None
        if not self._connections[header.hop].take():
            channel.send(messages.Busy("has too many bulk connections"))
            return None
        channel.send(self._hello())
        return header.hop

    def _serve_one(self, channel: BulkChannel, identity: Identity, hop: int) -> None:
        channel.set_timeout(stall_timeout_s(hop))
        header, request = channel.receive()
        action = _ACTIONS.get(type(request))
        if action is None:
            raise ProtocolError(channel.peer, f"sent {type(request).__name__} on a bulk connection")
        if header.hop != hop:
            raise ProtocolError(channel.peer, "changed the hop of a connection")
        if not may(identity.roles, action):
            refused = NotAuthorized(f"{identity} may not {action.value.replace('_', ' ')}")
            _log.warning("request_refused", peer=channel.peer, request=action.value)
            channel.send(as_error_message(refused, self.node_id))
            return
        with self._lock:
            if self._stopping:
                channel.send(messages.Busy("is stopping"))
                return
            self._busy += 1
        try:
            self._dispatch(channel, request, hop)
        except PeerError:
            raise
        except CkptdError as error:
            self.traffic.error(error.kind)
            channel.send(as_error_message(error, self.node_id))
        finally:
            with self._lock:
                self._busy -= 1
                self._idle.notify_all()

    def _dispatch(self, channel: BulkChannel, request: Message, hop: int) -> None:
        if isinstance(request, messages.PutShard):
            self._with_slot(
                self._receive_slots[hop], channel, lambda: self._put(channel, request, hop)
            )
        elif isinstance(request, messages.PushShard):
            self._with_slot(
                self._receive_slots[PUSH_HOP], channel, lambda: self._push(channel, request)
            )
        elif isinstance(request, messages.GetShard):
            self._with_slot(self._read_slots, channel, lambda: self._get(channel, request))

    def _with_slot(self, slots: Slots, channel: BulkChannel, work: Callable[[], None]) -> None:
        if not slots.take():
            channel.send(messages.Busy("has no free slot"))
            return
        try:
            work()
        finally:
            slots.give_back()

    def _put(self, channel: BulkChannel, request: messages.PutShard, hop: int) -> None:
        Reception(
            channel,
            request,
            hop=hop,
            node_id=self.node_id,
            store=self.store,
            connector=self.connector,
            traffic=self.traffic,
        ).run()

    def _push(self, channel: BulkChannel, request: messages.PushShard) -> None:
        target = request.chain[0]
        with self.store.open_read(request.shard) as source:
            if source.size != request.size:
                raise NotFound(f"shard {request.shard.hex()} has {source.size} bytes here")
            put = messages.PutShard(request.shard, request.size, request.chain[1:])
            out = self.connector.acquire(target.node, target.host, target.port, hop=PUSH_HOP)
            try:
                sender = ShardSender(
                    out,
                    put,
                    hop=PUSH_HOP,
                    on_change=lambda: channel.send(
                        messages.Progress(tuple(sender.reports.values()))
                    ),
                )
                started_s = time.monotonic()
                sender.negotiate()
                reports = sender.send(source, memoryview(bytearray(limits.BULK_BUFFER_BYTES)))
            finally:
                self.connector.release(target.node, target.host, target.port, out, hop=PUSH_HOP)
        self.traffic.sent(target.node, sender.sent_bytes, time.monotonic() - started_s)
        own = CopyReport(self.node_id, "present", request.size)
        channel.send(messages.PutResult((own, *reports)))

    def _get(self, channel: BulkChannel, request: messages.GetShard) -> None:
        with self.store.open_read(request.shard) as source:
            started_s = time.monotonic()
            channel.send(messages.ShardData(request.shard), payload_bytes=source.size)
            buffer = memoryview(bytearray(limits.BULK_BUFFER_BYTES))
            offset = 0
            while offset < source.size:
                try:
                    count = source.read_into(buffer, offset)
                except CkptdError as error:
                    # The payload was promised: the only honest end is to break the connection.
                    channel.broken = True
                    self.traffic.error(error.kind)
                    self._on_suspicion(request.shard)
                    _log.error("shard_read_failed", shard=request.shard.hex(), reason=error.message)
                    return
                if not count:
                    break
                channel.send_payload(buffer[:count])
                offset += count
            if offset != source.size:  # the file shrank while it was read
                channel.broken = True
                self._on_suspicion(request.shard)
        self.traffic.sent(channel.peer, source.size, time.monotonic() - started_s)
