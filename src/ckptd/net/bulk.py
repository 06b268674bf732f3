"""The bulk path: blocking TLS sockets, one thread at a time on each.

Shards travel here, everything small travels on control connections. A thread that sits in OpenSSL,
in a hash or in a system call has released the interpreter lock, so a few such threads use all
cores of a small machine; `docs/decisions/bulk-path.md` has the measurements.
"""

from __future__ import annotations

import random
import socket
import ssl
import threading
import time
from collections.abc import Callable

from ckptd.core import limits
from ckptd.core.backoff import handshake_pause_s
from ckptd.errors import NotAuthorized, PeerStalled, PeerUnreachable
from ckptd.net.bulk_channel import (
    BulkChannel,
    connect_timeout_s,
    hand_shake,
    refusal,
    stall_timeout_s,
    tune,
)
from ckptd.net.shard_sender import ShardSender, ShardSource, push_shard
from ckptd.net.tls import check_peer, none_forgotten
from ckptd.net.tls_stream import TlsStream
from ckptd.wire import messages

__all__ = [
    "BulkChannel",
    "BulkConnector",
    "ShardSender",
    "ShardSource",
    "push_shard",
    "refusal",
    "stall_timeout_s",
    "tune",
]


class BulkConnector:
    """Makes bulk connections and keeps idle ones for the next shard. Thread-safe."""

    def __init__(
        self,
        context: ssl.SSLContext,
        cluster: str,
        hello: Callable[[], messages.Hello],
        forgotten: Callable[[str], bool] = none_forgotten,
    ) -> None:
        self._context = context
        self._cluster = cluster
        self._hello = hello
        self._forgotten = forgotten
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str, int, int], list[BulkChannel]] = {}
        self._in_use: set[BulkChannel] = set()
        self._closed = False

    def acquire(self, node: str, host: str, port: int, *, hop: int = 0) -> BulkChannel:
        """A channel to `node` at `host`:`port`, for payload at `hop`.

        Raises PeerUnreachable, PeerBusy, or NotAuthorized when somebody else answers there.
        """
        key = (node, host, port, hop)
        timeout_s = stall_timeout_s(hop)
        while (channel := self._take_idle(key)) is not None:
            fresh = time.monotonic() - channel.idle_since_s < limits.BULK_IDLE_TIMEOUT_S / 2
            if fresh and not channel.frame_waiting():
                channel.set_timeout(timeout_s)
                return self._use(channel)
            channel.close()
        deadline_s = time.monotonic() + connect_timeout_s(hop)
        channel = self._connect_patiently(node, host, port, deadline_s)
        try:
            channel.set_timeout(_left_s(node, deadline_s))
            hand_shake(channel, self._hello(), hop=hop)
        except BaseException:
            channel.close()
            raise
        channel.set_timeout(timeout_s)
        return self._use(channel)

    def _use(self, channel: BulkChannel) -> BulkChannel:
        with self._lock:
            if not self._closed:
                self._in_use.add(channel)
                return channel
        channel.close()
        raise PeerUnreachable(channel.peer, "this side is stopping")

    def release(
        self, node: str, host: str, port: int, channel: BulkChannel, *, hop: int = 0
    ) -> None:
        """Gives a channel back after a complete exchange; a broken one is closed."""
        channel.rest()
        with self._lock:
            self._in_use.discard(channel)
            if not (channel.broken or self._closed):
                channel.idle_since_s = time.monotonic()
                self._idle.setdefault((node, host, port, hop), []).append(channel)
                return
        channel.close()

    def close(self) -> None:
        """Closes all channels; whoever waits on one gets PeerUnreachable."""
        with self._lock:
            self._closed = True
            idle = [channel for channels in self._idle.values() for channel in channels]
            self._idle.clear()
            for channel in self._in_use:
                channel.interrupt()  # whoever uses it closes it
        for channel in idle:
            channel.close()

    def _take_idle(self, key: tuple[str, str, int, int]) -> BulkChannel | None:
        with self._lock:
            channels = self._idle.get(key)
            return channels.pop() if channels else None

    def _connect_patiently(self, node: str, host: str, port: int, deadline_s: float) -> BulkChannel:
        """As `_connect`, a few times when the handshake is cut off: a node sheds connections that
        have not proved who they are when too many arrive at once, ours among them."""
        rng = random.Random()
        for failures in range(1, limits.HANDSHAKE_TRIES_MAX):
            try:
                return self._connect(node, host, port, deadline_s)
            except PeerUnreachable as error:
                if not isinstance(error.__cause__, ConnectionResetError | ssl.SSLEOFError):
                    raise
            time.sleep(min(handshake_pause_s(failures, rng), _left_s(node, deadline_s)))
        return self._connect(node, host, port, deadline_s)

    def _connect(self, node: str, host: str, port: int, deadline_s: float) -> BulkChannel:
        connect_s = min(limits.CONNECT_TIMEOUT_S, _left_s(node, deadline_s))
        try:
            raw = socket.create_connection((host, port), timeout=connect_s)
        except (OSError, UnicodeError, ValueError) as error:  # the last two: of a strange host name
            raise PeerUnreachable(node, f"cannot connect to {host}:{port}: {error}") from error
        try:
            tune(raw)
            raw.settimeout(min(limits.HANDSHAKE_TIMEOUT_S, _left_s(node, deadline_s)))
            sock = TlsStream(raw, self._context, server_side=False)
            sock.shake_hands()
        except (OSError, PeerStalled) as error:  # ssl.SSLError is an OSError
            raw.close()
            raise PeerUnreachable(node, f"no TLS with {host}:{port}: {error}") from error
        try:
            check_peer(
                sock.tls,
                cluster=self._cluster,
                expected_node_id=node,
                forgotten=self._forgotten,
            )
        except NotAuthorized:
            sock.close()
            raise
        return BulkChannel(sock, node, timeout_s=limits.HANDSHAKE_TIMEOUT_S)


def _left_s(node: str, deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise PeerStalled(node, "took too long to connect")
    return left_s
