"""The bulk path over real TLS: deadlines, least speed, what is refused, who is blamed."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.node.running_nodes import identity, make_pki

from ckptd.core import limits
from ckptd.errors import (
    LimitExceeded,
    NotAuthorized,
    PeerBusy,
    PeerRefused,
    PeerStalled,
    PeerUnreachable,
    ProtocolError,
)
from ckptd.net.bulk import BulkChannel, BulkConnector, ShardSender, push_shard
from ckptd.net.bulk_channel import connect_timeout_s, patience_s, stall_timeout_s
from ckptd.net.tls import client_context, server_context
from ckptd.net.tls_stream import TlsStream
from ckptd.wire import frames, messages
from ckptd.wire.messages import CopyReport

SHARD = b"\x22" * 32
SIZE = 3 * limits.BULK_BUFFER_BYTES
TAIL = messages.Hop("pi2", "127.0.0.1", 1)
HELLO = messages.Hello("home", "pi1", ("worker",), "0", 0, 0)

Script = Callable[[BulkChannel], None]


class Bytes:
    """A shard of zeros."""

    def piece(self, offset: int, size: int) -> memoryview:
        return memoryview(bytes(size))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("bulk") / "pki", "pi1", "pi9")


@contextlib.contextmanager
def scripted(pki: Path, script: Script, node: str = "pi1") -> Iterator[int]:
    """A node that does what `script` says with its first connection; its port."""
    files = identity(pki, node)
    context = server_context(files.ca, files.cert, files.key)
    errors: list[BaseException] = []

    def serve() -> None:
        raw, _ = listener.accept()
        try:
            sock = TlsStream(raw, context, server_side=True)
            sock.shake_hands()
        except OSError:
            raw.close()
            return
        channel = BulkChannel(sock, "client", timeout_s=10)
        try:
            script(channel)
        except (PeerUnreachable, PeerStalled):
            pass  # the side under test has given up
        except BaseException as error:
            errors.append(error)
        finally:
            channel.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(15)
        assert not thread.is_alive()
        assert not errors, errors


def greeting(script: Script) -> Script:
    def whole(channel: BulkChannel) -> None:
        channel.receive()
        channel.send(HELLO)
        script(channel)

    return whole


def connector(pki: Path) -> BulkConnector:
    files = identity(pki, "client")
    return BulkConnector(client_context(files.ca, files.cert, files.key), "home", lambda: HELLO)


@contextlib.contextmanager
def channel_to(pki: Path, script: Script) -> Iterator[BulkChannel]:
    with scripted(pki, greeting(script)) as port:
        channel = connector(pki).acquire("pi1", "127.0.0.1", port)
        try:
            yield channel
        finally:
            channel.close()


def put(channel: BulkChannel) -> ShardSender:
    return ShardSender(channel, messages.PutShard(SHARD, SIZE, (TAIL,)), hop=0)


def send(sender: ShardSender) -> tuple[CopyReport, ...]:
    sender.negotiate()
    return sender.send(Bytes())


def take_all(channel: BulkChannel) -> None:
    """Receives PutShard and its payload."""
    channel.receive()
    channel.send(messages.Ready(True))
    header, _ = channel.receive()
    left, buffer = header.payload_bytes, memoryview(bytearray(65536))
    while left:
        left -= channel.receive_payload(buffer[: min(left, len(buffer))])


def report(node: str, state: str = "receiving", received: int = 0) -> CopyReport:
    return CopyReport(node, state, received)


@pytest.fixture
def short_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    # Short, and yet longer than a busy machine keeps a thread from running.
    monkeypatch.setattr(limits, "STALL_TIMEOUT_S", 3.5)
    monkeypatch.setattr(limits, "STALL_TIMEOUT_STEP_PER_HOP_S", 0.1)
    monkeypatch.setattr(limits, "FLUSH_TIMEOUT_S", 6.0)


# Who answers


def test_another_node_at_the_address_is_refused_before_hello(pki: Path) -> None:
    said: list[bytes] = []

    def script(channel: BulkChannel) -> None:
        channel.receive()
        said.append(b"hello")

    with scripted(pki, script, "pi9") as port, pytest.raises(NotAuthorized, match="pi9"):
        connector(pki).acquire("pi1", "127.0.0.1", port)
    assert not said


def test_another_cluster_in_the_hello_is_refused(pki: Path) -> None:
    def script(channel: BulkChannel) -> None:
        channel.receive()
        channel.send(messages.Hello("elsewhere", "pi1", (), "0", 0, 0))

    with scripted(pki, script) as port, pytest.raises(ProtocolError, match="elsewhere"):
        connector(pki).acquire("pi1", "127.0.0.1", port)


def test_nobody_there_is_unreachable(pki: Path) -> None:
    with pytest.raises(PeerUnreachable, match="pi1"):
        connector(pki).acquire("pi1", "127.0.0.1", 1)
    with pytest.raises(PeerUnreachable, match="pi1"):
        connector(pki).acquire("pi1", "a..b", 1)


def test_a_node_that_answers_no_handshake_is_given_up(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(PeerUnreachable, match="no TLS"),
    ):
        connector(pki).acquire("pi1", "127.0.0.1", listener.getsockname()[1])


@pytest.mark.parametrize("hop", range(1, limits.CHAIN_HOPS_MAX))
def test_deadlines_leave_time_for_the_next_hop_to_be_blamed(hop: int) -> None:
    assert connect_timeout_s(hop) + stall_timeout_s(hop) < stall_timeout_s(hop - 1)
    assert stall_timeout_s(limits.CHAIN_HOPS_MAX) > connect_timeout_s(limits.CHAIN_HOPS_MAX)
    assert patience_s(hop) > patience_s(hop - 1) >= stall_timeout_s(hop - 1)


# Frames


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (frames.encode_header(34, 0, 2**63, 0), LimitExceeded),
        (frames.encode_header(34, 0, limits.BULK_BODY_MAX_BYTES + 1, 0), LimitExceeded),
        (frames.encode_header(37, 0, 10, 2**63), LimitExceeded),
        (frames.encode_frame(messages.Ready(True), 0, 5), LimitExceeded),
        (frames.encode_frame(messages.Ping(), 0), ProtocolError),
        (frames.encode_header(9999, 0, 0, 0), ProtocolError),
        (b"\x80\x04\x95" + bytes(29), ProtocolError),
    ],
)
def test_what_does_not_belong_here_is_refused_by_its_header(
    pki: Path, frame: bytes, error: type[ProtocolError]
) -> None:
    done = threading.Event()

    def script(channel: BulkChannel) -> None:
        channel.send_payload(memoryview(frame))  # no body follows
        done.wait(10)

    with channel_to(pki, script) as channel:
        with pytest.raises(error):
            channel.receive()
        assert channel.broken
        done.set()


def test_a_frame_in_single_bytes_must_end_within_the_deadline(pki: Path) -> None:
    stop = threading.Event()

    def script(channel: BulkChannel) -> None:
        while not stop.wait(0.05):
            channel.send_payload(memoryview(frames.MAGIC[:1]))

    with channel_to(pki, script) as channel:
        channel.set_timeout(0.4)
        started_s = time.monotonic()
        with pytest.raises(PeerStalled):
            channel.receive()
        assert time.monotonic() - started_s < 10
        stop.set()


def test_a_frame_that_begins_late_gets_no_more_time(pki: Path) -> None:
    stop = threading.Event()

    def script(channel: BulkChannel) -> None:
        assert not stop.wait(3.5)
        channel.send_payload(memoryview(frames.MAGIC))
        stop.wait(10)

    with channel_to(pki, script) as channel:
        channel.set_timeout(4.0)
        started_s = time.monotonic()
        with pytest.raises(PeerStalled):
            channel.receive()
        assert time.monotonic() - started_s < 7.4  # anew it would be 7.5
        stop.set()


def test_a_payload_in_single_bytes_is_too_slow(pki: Path) -> None:
    stop = threading.Event()

    def script(channel: BulkChannel) -> None:
        channel.send(messages.ShardData(SHARD), payload_bytes=limits.MIB)
        while not stop.wait(0.02):
            channel.send_payload(memoryview(b"x"))

    with channel_to(pki, script) as channel:
        channel.set_timeout(3.5)
        channel.receive()
        buffer = memoryview(bytearray(1024))
        started_s = time.monotonic()
        with pytest.raises(PeerStalled, match="only"):
            while True:
                channel.receive_payload(buffer)
        assert 3 < time.monotonic() - started_s < 20
        stop.set()


def test_a_reader_that_takes_little_is_too_slow(pki: Path) -> None:
    stop = threading.Event()

    def script(channel: BulkChannel) -> None:
        buffer = memoryview(bytearray(16384))
        while not stop.wait(0.1):
            channel.receive_payload(buffer)

    with channel_to(pki, script) as channel:
        channel.set_timeout(0.5)
        channel.send(messages.ShardData(SHARD), payload_bytes=64 * limits.MIB)
        piece = memoryview(bytearray(16384))
        # Almost all of the deadline goes by between two records, and never all of it.
        with pytest.raises(PeerStalled):
            for _ in range(4096):
                channel.send_payload(piece)
        stop.set()


def test_time_spent_elsewhere_is_not_held_against_the_peer(pki: Path) -> None:
    def script(channel: BulkChannel) -> None:
        channel.send(messages.ShardData(SHARD), payload_bytes=4)
        for _ in range(4):
            channel.send_payload(memoryview(b"x"))
        channel.receive()

    with channel_to(pki, script) as channel:
        channel.set_timeout(0.3)
        channel.receive()
        for _ in range(4):
            time.sleep(0.2)  # our own disk
            channel.receive_payload(memoryview(bytearray(1)))
        channel.send(messages.GetShard(SHARD))


def test_whoever_waits_is_woken_by_an_interrupt(pki: Path) -> None:
    stop = threading.Event()
    with channel_to(pki, lambda _: (stop.wait(10), None)[1]) as channel:
        threading.Timer(0.2, channel.interrupt).start()
        with pytest.raises(PeerUnreachable):
            channel.receive()
        stop.set()


def test_a_connector_that_closes_wakes_who_waits_and_gives_no_more(pki: Path) -> None:
    stop = threading.Event()
    with scripted(pki, greeting(lambda _: (stop.wait(10), None)[1])) as port:
        bulk = connector(pki)
        channel = bulk.acquire("pi1", "127.0.0.1", port)
        threading.Timer(0.2, bulk.close).start()
        with pytest.raises(PeerUnreachable):
            channel.receive()
        bulk.release("pi1", "127.0.0.1", port, channel)
        assert not bulk._in_use and not bulk._idle
        stop.set()


def test_an_idle_channel_that_the_node_closed_is_not_used_again(pki: Path) -> None:
    with scripted(pki, greeting(lambda _: None)) as port:
        bulk = connector(pki)
        channel = bulk.acquire("pi1", "127.0.0.1", port)
        bulk.release("pi1", "127.0.0.1", port, channel)
        assert channel.wait_for_frame(10)
    with pytest.raises(PeerUnreachable, match="cannot connect"):
        bulk.acquire("pi1", "127.0.0.1", port)


# Chains: who is blamed


@pytest.mark.usefixtures("short_deadlines")
class TestBlame:
    def test_a_head_that_says_nothing(self, pki: Path) -> None:
        stop = threading.Event()

        def script(channel: BulkChannel) -> None:
            take_all(channel)
            channel.send(messages.Progress((report("pi1", "durable", SIZE), report("pi2"))))
            stop.wait(10)

        with channel_to(pki, script) as channel:
            with pytest.raises(PeerStalled) as caught:
                send(put(channel))
            assert caught.value.node == "pi1"
            assert channel.broken
            stop.set()

    def test_a_head_that_does_not_answer_the_offer(self, pki: Path) -> None:
        stop = threading.Event()
        with channel_to(pki, lambda _: (stop.wait(10), None)[1]) as channel:
            with pytest.raises(PeerStalled) as caught:
                send(put(channel))
            assert caught.value.node == "pi1"
            stop.set()

    def test_a_head_that_takes_no_payload(self, pki: Path) -> None:
        stop = threading.Event()

        def script(channel: BulkChannel) -> None:
            channel.receive()
            channel.send(messages.Ready(True))
            stop.wait(20)

        with channel_to(pki, script) as channel:
            request = messages.PutShard(SHARD, limits.SHARD_SIZE_MAX_BYTES)
            with pytest.raises(PeerStalled) as caught:
                send(ShardSender(channel, request, hop=0))
            assert caught.value.node == "pi1"
            stop.set()

    def test_a_tail_that_makes_no_progress_while_the_head_talks(self, pki: Path) -> None:
        stop = threading.Event()

        def script(channel: BulkChannel) -> None:
            take_all(channel)
            while not stop.wait(0.1):
                channel.send(
                    messages.Progress((report("pi1", "durable", SIZE), report("pi2", received=5)))
                )

        with channel_to(pki, script) as channel:
            sender = put(channel)
            with pytest.raises(PeerStalled) as caught:
                send(sender)
            assert caught.value.node == "pi2"
            assert sender.reports["pi1"].state == "durable"
            stop.set()

    def test_a_flush_may_take_longer_but_not_for_ever(self, pki: Path) -> None:
        stop = threading.Event()

        def script(channel: BulkChannel) -> None:
            take_all(channel)
            while not stop.wait(0.1):
                channel.send(
                    messages.Progress(
                        (report("pi1", received=SIZE), report("pi2", "durable", SIZE))
                    )
                )

        with channel_to(pki, script) as channel:
            started_s = time.monotonic()
            with pytest.raises(PeerStalled) as caught:
                send(put(channel))
            assert caught.value.node == "pi1"
            assert 5.5 < time.monotonic() - started_s < 30
            stop.set()

    def test_a_head_that_invents_progress_ends_too(
        self, pki: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "TRANSFER_MIN_BYTES_PER_S", SIZE)
        monkeypatch.setattr(limits, "FLUSH_TIMEOUT_S", 2.0)
        stop = threading.Event()

        def script(channel: BulkChannel) -> None:
            take_all(channel)
            number = 0
            while not stop.wait(0.05):
                number += 1
                state = "durable" if number % 2 else "failed"
                channel.send(messages.Progress((report("pi1", state, number), report("pi2"))))

        with channel_to(pki, script) as channel:
            started_s = time.monotonic()
            with pytest.raises(PeerStalled):
                send(put(channel))
            assert time.monotonic() - started_s < 15
            stop.set()

    def test_what_is_said_of_strangers_is_not_kept(self, pki: Path) -> None:
        def script(channel: BulkChannel) -> None:
            take_all(channel)
            for number in range(50):
                channel.send(messages.Progress((report(f"stranger{number}", "durable"),)))
            channel.send(messages.PutResult((report("pi1", "durable"), report("evil", "durable"))))

        with channel_to(pki, script) as channel:
            sender = put(channel)
            assert send(sender) == (report("pi1", "durable"),)
            assert set(sender.reports) == {"pi1"}

    def test_half_a_success_is_reported_as_such(self, pki: Path) -> None:
        reports = (
            report("pi1", "durable", SIZE),
            CopyReport("pi2", "failed", 7, "no_room", "full"),
        )

        def script(channel: BulkChannel) -> None:
            take_all(channel)
            channel.send(messages.PutResult(reports))

        with channel_to(pki, script) as channel:
            assert send(put(channel)) == reports
            assert not channel.broken

    def test_what_the_head_said_last_is_heard_although_it_takes_no_more(self, pki: Path) -> None:
        last = (CopyReport("pi1", "failed", 0, "no_room", "full"),)

        def script(channel: BulkChannel) -> None:
            channel.receive()
            channel.send(messages.Ready(True))
            channel.receive()
            channel.send(messages.PutResult(last))
            channel.drain(2)

        with channel_to(pki, script) as channel:
            request = messages.PutShard(SHARD, 64 * limits.MIB, (TAIL,))
            assert send(ShardSender(channel, request, hop=0)) == last
            assert channel.broken

    def test_a_push_that_makes_no_progress_is_given_up(self, pki: Path) -> None:
        stop = threading.Event()

        def script(channel: BulkChannel) -> None:
            channel.receive()
            while not stop.wait(0.1):
                channel.send(messages.Progress((report("pi2", received=5),)))

        with channel_to(pki, script) as channel:
            with pytest.raises(PeerStalled) as caught:
                push_shard(channel, messages.PushShard(SHARD, SIZE, (TAIL,)))
            assert caught.value.node == "pi2"
            stop.set()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (messages.Busy(), PeerBusy),
        (messages.Error("no_room", "full"), PeerRefused),
        (messages.PutResult(()), ProtocolError),
    ],
)
def test_answers_that_are_no_ready(
    pki: Path, answer: messages.Message, error: type[Exception]
) -> None:
    def script(channel: BulkChannel) -> None:
        channel.receive()
        channel.send(answer)

    with channel_to(pki, script) as channel, pytest.raises(error):
        put(channel).negotiate()


def test_tls_is_version_1_3(pki: Path) -> None:
    files = identity(pki, "client")
    context = client_context(files.ca, files.cert, files.key)
    assert context.minimum_version is ssl.TLSVersion.TLSv1_3
