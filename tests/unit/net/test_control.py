"""Control connections: what a node owes to peers that are slow, greedy, broken or hostile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.cluster.hostile import RawPeer
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import RunningNode, identity

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.errors import NotAuthorized, PeerRefused, PeerStalled, PeerUnreachable
from ckptd.net.control import ControlClient, connect_control
from ckptd.net.loop import run
from ckptd.net.tls import client_context
from ckptd.wire import frames, messages
from ckptd.wire.messages import Message

ID = b"\x11" * 32
LARGE = messages.encode_documents((messages.SignedDocument(b"x" * 4 * limits.MIB, b"s"),))


def greeted(node: RunningNode, name: str = "client") -> RawPeer:
    peer = node.connect(name)
    assert isinstance(peer.greet(), messages.Hello)
    return peer


def with_client(
    node: RunningNode, work: Callable[[ControlClient], Any], name: str = "client"
) -> Any:
    """Runs `work` with a control client to `node`."""
    files = identity(node.pki, name)

    async def main() -> Any:
        client = await connect_control(
            node.place.host,
            node.place.control,
            context=client_context(files.ca, files.cert, files.key),
            cluster="home",
            hello=messages.Hello("home", "client", ("client",), "0", 0, 0),
        )
        try:
            return await work(client)
        finally:
            await client.close()

    return run(main())


def handled_by(
    node: RunningNode, handler: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node.node.control, "handler", handler)


def test_an_answer_that_the_protocol_does_not_allow_becomes_an_error(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(_: Identity, __: Message, ___: object, ____: object) -> Any:
        return messages.SyncReply(True, 0), b""

    handled_by(node, handler, monkeypatch)

    async def work(client: ControlClient) -> None:
        with pytest.raises(PeerRefused, match="internal error"):
            await client.request(messages.GetStatus(), messages.NodeStatus, timeout_s=5)

    with_client(node, work)


def test_a_handler_that_fails_is_an_error_to_the_peer_and_the_node_goes_on(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(_: Identity, __: Message, ___: object, ____: object) -> Any:
        raise RuntimeError("secret detail")

    handled_by(node, handler, monkeypatch)
    with greeted(node) as peer:
        for number in (1, 2):
            answer = peer.ask(messages.GetStatus(), request_id=number)
            assert isinstance(answer, messages.Error)
            assert "secret" not in answer.message


def test_an_answer_that_comes_after_its_question_was_given_up_does_no_harm(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gone = asyncio.Event(), asyncio.Event()
    client_loops: list[asyncio.AbstractEventLoop] = []
    original = node.node.control.handler

    async def handler(who: Identity, message: Message, payload: Any, progress: Any) -> Any:
        if isinstance(message, messages.GetStatus):
            client_loops[0].call_soon_threadsafe(asked.set)
            waiting = asyncio.run_coroutine_threadsafe(gone.wait(), client_loops[0])
            await asyncio.wrap_future(waiting)
        return await original(who, message, payload, progress)

    handled_by(node, handler, monkeypatch)

    async def work(client: ControlClient) -> None:
        client_loops.append(asyncio.get_running_loop())
        question = asyncio.create_task(client.request(messages.GetStatus(), messages.NodeStatus))
        await asked.wait()
        question.cancel()
        await asyncio.wait([question])
        gone.set()
        for _ in range(2):
            await client.request(messages.Ping(), messages.NodeStatus, timeout_s=5)
        assert client.connected

    with_client(node, work)


def test_whoever_says_no_hello_is_dropped(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.5)
    with node.connect("client") as peer:
        assert peer.is_closed()


@pytest.mark.parametrize("trickle", [False, True], ids=["stops", "one byte now and then"])
def test_a_frame_that_does_not_end_is_dropped(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch, trickle: bool
) -> None:
    monkeypatch.setattr(limits, "CONTROL_FRAME_TIMEOUT_S", 0.8)
    with greeted(node) as peer:
        peer.promise(messages.PutDocuments(1), 1000)
        started_s = time.monotonic()
        try:
            while trickle and time.monotonic() - started_s < 10:
                peer.sock.sendall(b"x")
                time.sleep(0.1)  # this is what a slow sender does
        except OSError:
            pass
        assert peer.is_closed()
        assert time.monotonic() - started_s < 10
    wait_until(lambda: node.node.control.requests_pool.held_bytes == 0, "the memory to be free")


def test_frames_of_a_busy_connection_never_count_as_one_slow_frame(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_FRAME_TIMEOUT_S", 4.0)
    ping = frames.encode_frame(messages.Ping(), 1)
    with greeted(node) as peer:
        started_s = time.monotonic()
        peer.sock.sendall(ping[:20])
        while time.monotonic() - started_s < 6:  # always in the middle of a frame
            peer.sock.sendall(ping[20:] + ping[:20])
            assert isinstance(peer.receive()[1], messages.NodeStatus)
            time.sleep(0.05)  # a peer that asks now and then, for longer than a frame may take


@pytest.mark.parametrize(
    ("kind", "body", "payload"),
    [
        (messages.GetStatus, 2**63, 0),
        (messages.PutDocuments, 10, 2**63),
        (messages.PutDocuments, 10, limits.DOCUMENTS_PAYLOAD_MAX_BYTES + 1),
        (messages.PutShard, 10, 0),
        (messages.NodeStatus, 10, 0),
    ],
)
def test_impossible_frames_are_refused_with_a_reason(
    node: RunningNode, kind: type[Message], body: int, payload: int
) -> None:
    with greeted(node) as peer:
        peer.announce(messages.NUMBERS[kind], body, payload)
        answer = peer.receive()[1]
        assert isinstance(answer, messages.Error)
        assert answer.code in ("protocol", "limit_exceeded")
        assert peer.is_closed()


def test_after_a_refusal_nothing_is_handled_any_more(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    handled: list[Message] = []

    async def handler(_: Identity, message: Message, __: object, ___: object) -> Any:
        handled.append(message)
        raise NotAuthorized("no")

    handled_by(node, handler, monkeypatch)
    other = messages.Hello("elsewhere", "x", (), "0", 0, 0)
    request = frames.encode_frame(messages.GetStatus(), 1)
    with node.connect("client") as peer:
        peer.sock.sendall(frames.encode_frame(other, 0) + request)
        assert isinstance(peer.receive()[1], messages.Error)
        assert peer.is_closed()
    with greeted(node) as peer:
        assert isinstance(peer.ask(messages.GetStatus()), messages.Error)
    assert handled == [messages.GetStatus()]


def test_a_monitor_gets_no_connection(node: RunningNode) -> None:
    with node.connect("monitor") as peer:
        assert not isinstance(peer.greet(), messages.Hello)
        assert peer.is_closed()


def test_one_peer_cannot_have_all_connections(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_CONNECTIONS_PER_PEER_MAX", 3)
    peers = [greeted(node, "mallory") for _ in range(3)]
    with node.connect("mallory") as fourth:
        assert isinstance(fourth.greet(), messages.Error)
    with greeted(node) as other:
        assert isinstance(other.ask(messages.GetStatus()), messages.NodeStatus)
    peers.pop().close()
    wait_until(lambda: len(node.node.control._protocols) == 2, "a place to be free")
    with greeted(node, "mallory"):
        pass
    for peer in peers:
        peer.close()


def test_all_connections_together_are_capped(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_CONNECTIONS_MAX", 2)
    with greeted(node, "mallory"), greeted(node, "client"), node.connect("admin") as third:
        assert isinstance(third.greet(), messages.Error)


def test_what_many_connections_announce_is_bounded_and_others_are_served(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONTROL_FRAME_TIMEOUT_S", 3.0)
    pool = node.node.control.requests_pool
    peers = [greeted(node, "mallory") for _ in range(8)]
    for peer in peers:
        peer.promise(messages.PutDocuments(1), limits.DOCUMENTS_PAYLOAD_MAX_BYTES)
    wait_until(lambda: pool.held_bytes > 0, "the first one to be let in")
    peaks = []
    with greeted(node) as client:
        for request_id in range(1, 20):
            answer = client.ask(messages.GetStatus(), request_id=request_id)
            assert isinstance(answer, messages.NodeStatus)
            peaks.append(pool.held_bytes)
        # A large request waits for its turn, and gets it: slow senders lose theirs.
        answer = client.ask(messages.PutDocuments(1), payload=LARGE, request_id=100)
        assert isinstance(answer, messages.PutDocumentsReply)
        assert answer.results[0].refused
    assert max(peaks) <= limits.CONTROL_REQUESTS_POOL_BYTES
    for peer in peers:
        peer.close()
    wait_until(lambda: pool.held_bytes == 0, "the memory to be free")


def test_memory_is_held_until_the_answer_was_worked_out_although_the_peer_is_gone(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()
    started: list[Message] = []

    async def handler(_: Identity, message: Message, __: object, ___: object) -> Any:
        started.append(message)
        await release.wait()
        return messages.PutDocumentsReply(()), b""

    handled_by(node, handler, monkeypatch)
    pool = node.node.control.requests_pool
    peer = greeted(node, "mallory")
    peer.send(messages.PutDocuments(1), request_id=1, payload=LARGE)
    wait_until(lambda: bool(started), "the request to arrive")
    peer.close()
    wait_until(lambda: not node.node.control._protocols, "the connection to end")
    assert pool.held_bytes >= len(LARGE) - limits.CONTROL_FREE_BYTES
    node.loop.call_soon_threadsafe(release.set)
    wait_until(lambda: pool.held_bytes == 0, "the memory to be free")


def test_a_reader_that_takes_nothing_loses_its_connection_and_its_memory(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "REQUEST_TIMEOUT_S", 1.0)

    async def handler(_: Identity, __: Message, ___: object, ____: object) -> Any:
        return messages.Documents(1), bytes(16 * limits.MIB)

    handled_by(node, handler, monkeypatch)
    pool = node.node.control.answers_pool
    peers = [greeted(node, "mallory") for _ in range(6)]
    for peer in peers:
        for number in range(1, 5):
            peer.send(messages.GetDocuments((ID,)), request_id=number)
    wait_until(lambda: pool.held_bytes > 0, "an answer to be under way")
    # One answer may be larger than the pool; then it is the only one.
    assert pool.held_bytes <= 16 * limits.MIB + limits.MIB
    wait_until(lambda: not node.node.control._protocols, "the connections to be dropped")
    wait_until(lambda: pool.held_bytes == 0, "the memory to be free")
    for peer in peers:
        peer.close()


def test_a_client_does_not_wait_for_ever_for_an_answer(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(_: Identity, __: Message, ___: object, ____: object) -> Any:
        await asyncio.Event().wait()

    handled_by(node, handler, monkeypatch)

    async def work(client: ControlClient) -> None:
        with pytest.raises(PeerStalled, match="pi1"):
            await client.request(messages.GetStatus(), messages.NodeStatus, timeout_s=0.3)
        with pytest.raises(PeerUnreachable):
            await client.request(messages.GetStatus(), messages.NodeStatus, timeout_s=0.3)

    with_client(node, work)


def test_another_node_than_the_meant_one_is_refused_by_the_client(node: RunningNode) -> None:
    files = identity(node.pki, "client")

    async def main() -> None:
        with pytest.raises(NotAuthorized, match="meant to reach node pi9"):
            await connect_control(
                node.place.host,
                node.place.control,
                context=client_context(files.ca, files.cert, files.key),
                cluster="home",
                hello=messages.Hello("home", "client", (), "0", 0, 0),
                expected_node_id="pi9",
            )

    run(main())


def test_progress_keeps_alive_only_what_takes_long(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer that goes on and on would hold whoever asks it, and all that waits for that."""

    async def endless(who: Identity, message: Message, payload: Any, progress: Any) -> Any:
        for _ in range(60):
            progress(messages.Progress(()))
            await asyncio.sleep(0.1)
        return messages.VerifyReply(()), b""

    async def ask(client: ControlClient) -> None:
        # Longer than a busy machine keeps a thread waiting, and less than the answer takes.
        await client.request(messages.Verify(()), messages.VerifyReply, timeout_s=4)
        with pytest.raises(PeerStalled, match="no answer to Ping"):
            await client.request(messages.Ping(), messages.NodeStatus, timeout_s=4)

    handled_by(node, endless, monkeypatch)
    with_client(node, ask)
