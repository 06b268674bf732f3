"""Sending one shard down a chain, and asking a node to do it.

Nothing is waited for without end. A node that says nothing for the deadline has stalled; so has the
first node of the chain that has not finished and makes no progress, although others still speak.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from ckptd.core import limits
from ckptd.errors import PeerError, PeerRefused, PeerStalled
from ckptd.net.bulk_channel import BulkChannel, refusal, stall_timeout_s
from ckptd.wire import messages
from ckptd.wire.messages import CopyReport

_UNFINISHED: Final = "receiving"


class ShardSource(Protocol):
    """Bytes of one shard, taken from the start to the end by one thread."""

    def piece(self, offset: int, size: int) -> memoryview:
        """What follows at `offset`, at least one byte and at most `size` of them, which is at most
        BULK_BUFFER_BYTES; blocks until there is one.

        Good until the next call. Raises what stands in the way when it will never come.
        """


class _Deadlines:
    """When to stop waiting for the nodes of a chain, `nodes` in its order. All bounded, however
    much the peer talks."""

    def __init__(self, nodes: tuple[str, ...], size: int, hop: int) -> None:
        self._nodes = nodes
        self._size = size
        self._stall_s = stall_timeout_s(hop)
        self._flush_s = limits.FLUSH_TIMEOUT_S - hop * limits.STALL_TIMEOUT_STEP_PER_HOP_S
        now_s = time.monotonic()
        self._heard_s = self._progress_s = now_s
        slowest_s = size / limits.TRANSFER_MIN_BYTES_PER_S + self._flush_s
        self._end_s = now_s + self._stall_s + len(nodes) * slowest_s

    def heard(self) -> None:
        """The peer said something."""
        self._heard_s = time.monotonic()

    def progress(self) -> None:
        """Something that was asked for came nearer."""
        self._progress_s = self._heard_s = time.monotonic()

    def check(self, peer: str, reports: dict[str, CopyReport]) -> float:
        """How many seconds may still be waited for the next frame. Raises PeerStalled."""
        now_s = time.monotonic()
        silence_s = self._heard_s + self._stall_s - now_s
        if silence_s <= 0:
            raise PeerStalled(peer, "said nothing within the deadline")
        unfinished = [node for node in self._nodes if _is_unfinished(reports.get(node))]
        flushing = all(_received(reports.get(node)) >= self._size for node in unfinished)
        allowed_s = self._flush_s if flushing else self._stall_s
        left_s = min(self._progress_s + allowed_s, self._end_s) - now_s
        if left_s <= 0:
            culprit = unfinished[0] if unfinished else peer
            raise PeerStalled(culprit, "no progress within the deadline")
        return min(silence_s, left_s)


class ShardSender:
    """Sends one shard down a chain, over a channel to the chain's first node.

    `hop` is the chain's first one. `depth`, where it differs, is how many nodes wait for this
    sender: the deadlines follow from it. `on_news` is called whenever the chain said something.
    `reports` is up to date at any time: per node of the chain
    what it last said. `sent_bytes` is the payload that left here.
    """

    def __init__(
        self,
        channel: BulkChannel,
        request: messages.PutShard,
        *,
        hop: int,
        depth: int | None = None,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._channel = channel
        self._request = request
        self._hop = hop
        self._on_news = on_news
        self.reports: dict[str, CopyReport] = {}
        self.durable_at_s: dict[str, float] = {}  # by node, on the monotonic clock
        self.sent_bytes = 0
        self.wanted = False
        self._result: messages.PutResult | None = None
        self._nodes = (channel.peer, *(next_hop.node for next_hop in request.chain))
        self._depth = hop if depth is None else depth
        self._deadlines = _Deadlines(self._nodes, request.size, self._depth)

    def negotiate(self) -> bool:
        """Asks the chain to take the shard; whether it wants the payload. Raises PeerError."""
        self._channel.set_timeout(stall_timeout_s(self._depth))
        self._channel.send(self._request, hop=self._hop)
        _, answer = self._channel.receive()
        if not isinstance(answer, messages.Ready):
            raise refusal(self._channel.peer, answer)
        self._note(answer.reports)
        self.wanted = answer.wanted
        return answer.wanted

    def send(self, source: ShardSource) -> tuple[CopyReport, ...]:
        """Sends the payload if the chain wants it, and waits for the result. Raises PeerError, or
        what `source` raises; then the channel is broken, and `reports` says how far the chain
        came."""
        try:
            if self.wanted:
                self._send_payload(source)
            self._deadlines.progress()
            while self._result is None:
                self._wait()
        except BaseException:
            self._channel.broken = True
            raise
        return tuple(report for report in self._result.reports if report.node in self._nodes)

    def _send_payload(self, source: ShardSource) -> None:
        size = self._request.size
        data = messages.ShardData(self._request.shard)
        self._channel.send(data, payload_bytes=size, hop=self._hop)
        while self.sent_bytes < size:
            left = size - self.sent_bytes
            piece = source.piece(self.sent_bytes, min(left, limits.BULK_BUFFER_BYTES))
            try:
                self._channel.send_payload(piece)
            except PeerError:
                if not self._hear_last_words():
                    raise
                return
            self.sent_bytes += len(piece)
            # One frame for each piece: a peer that talks without end cannot keep us from sending.
            if self._channel.frame_waiting():
                self._take_frame()
            if self._result is not None:  # the head gave up: what is left has nowhere to go
                self._channel.broken = self.sent_bytes < size
                return

    def _hear_last_words(self) -> bool:
        """Whether the peer, before it stopped taking bytes, has said how it ended."""
        try:
            while self._result is None and self._channel.frame_waiting():
                self._take_frame()
                self._deadlines.check(self._channel.peer, self.reports)
        except PeerRefused:
            raise
        except PeerError:
            return False
        return self._result is not None

    def _wait(self) -> None:
        left_s = self._deadlines.check(self._channel.peer, self.reports)
        if self._channel.wait_for_frame(left_s):
            self._take_frame()

    def _take_frame(self) -> None:
        _, message = self._channel.receive()
        self._deadlines.heard()
        if isinstance(message, messages.PutResult):
            self._note(message.reports)
            self._result = message
        elif isinstance(message, messages.Progress):
            self._note(message.reports)
        else:
            raise refusal(self._channel.peer, message)

    def _note(self, reports: tuple[CopyReport, ...]) -> None:
        for report in reports:
            before = self.reports.get(report.node)
            if report.node not in self._nodes or report == before:
                continue
            self.reports[report.node] = report
            if report.state == "durable":
                self.durable_at_s[report.node] = time.monotonic()
            if not _is_unfinished(report) or _received(report) > _received(before):
                self._deadlines.progress()
        self._on_news()


def _is_unfinished(report: CopyReport | None) -> bool:
    return report is None or report.state == _UNFINISHED


def _received(report: CopyReport | None) -> int:
    return report.received_bytes if report is not None else 0


def push_shard(channel: BulkChannel, request: messages.PushShard) -> tuple[CopyReport, ...]:
    """Asks the node at the other end to send a shard that it has to other nodes; their reports.

    Raises PeerError when it cannot or stalls."""
    nodes = tuple(hop.node for hop in request.chain)
    deadlines = _Deadlines(nodes, request.size, 0)
    reports: dict[str, CopyReport] = {}
    channel.send(request)
    try:
        while True:
            if not channel.wait_for_frame(deadlines.check(channel.peer, reports)):
                continue
            _, message = channel.receive()
            deadlines.heard()
            if not isinstance(message, messages.PutResult | messages.Progress):
                raise refusal(channel.peer, message)
            for report in message.reports:
                before = reports.get(report.node)
                if report.node in nodes and report != before:
                    reports[report.node] = report
                    if not _is_unfinished(report) or _received(report) > _received(before):
                        deadlines.progress()
            if isinstance(message, messages.PutResult):
                return message.reports
    except PeerRefused:
        raise  # a complete answer: the channel is as good as before
    except BaseException:
        channel.broken = True
        raise
