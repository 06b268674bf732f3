"""A node that has too many strangers cuts handshakes off: whoever was cut off comes again."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from ckptd.client import pki as authority
from ckptd.core import limits
from ckptd.core.identity import Role
from ckptd.errors import PeerUnreachable
from ckptd.net.bulk import BulkConnector
from ckptd.net.bulk_channel import BulkChannel
from ckptd.net.control import connect_control
from ckptd.net.tls import client_context, server_context
from ckptd.net.tls_stream import TlsStream
from ckptd.wire import messages


def hello() -> messages.Hello:
    return messages.Hello("home", "pi1", ("worker",), "0", 0, 0)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("shedding") / "pki"
    authority.init_cluster(directory, "home")
    authority.issue(directory, [Role.WORKER], "pi1")
    return directory


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """Runs `serve` on a listening socket in a thread, until its `accept` fails; the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)
    assert not thread.is_alive()


@contextmanager
def node_that_sheds(pki: Path, count: int) -> Iterator[tuple[int, list[int]]]:
    """A node that resets the first `count` connections; its port, and what it has reset."""
    context = server_context(pki / "ca.pem", pki / "pi1.pem", pki / "pi1.key")
    reset: list[int] = []

    def serve(listener: socket.socket) -> None:
        while len(reset) < count:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            sock.recv(1)  # it has begun to speak
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
            reset.append(1)
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        stream = TlsStream(sock, context, server_side=True)
        stream.shake_hands()
        channel = BulkChannel(stream, "client", timeout_s=5)
        channel.receive()
        channel.send(hello())
        channel.wait_for_frame(5)
        channel.close()

    with listening(serve) as port:
        yield port, reset


def connector(pki: Path) -> BulkConnector:
    context = client_context(pki / "ca.pem", pki / "client.pem", pki / "client.key")
    return BulkConnector(context, "home", hello)


def test_a_connection_that_is_shed_comes_again(pki: Path) -> None:
    with node_that_sheds(pki, 2) as (port, reset):
        connecting = connector(pki)
        channel = connecting.acquire("pi1", "127.0.0.1", port)
        assert len(reset) == 2
        connecting.release("pi1", "127.0.0.1", port, channel)
        connecting.close()


def test_it_does_not_come_for_ever(pki: Path) -> None:
    with (
        node_that_sheds(pki, 100) as (port, reset),
        pytest.raises(PeerUnreachable, match="no TLS"),
    ):
        connector(pki).acquire("pi1", "127.0.0.1", port)
    assert len(reset) == limits.HANDSHAKE_TRIES_MAX  # the node counts after it has reset


async def connected(pki: Path, port: int) -> str:
    context = client_context(pki / "ca.pem", pki / "client.pem", pki / "client.key")
    client = await connect_control(
        "127.0.0.1", port, context=context, cluster="home", hello=hello()
    )
    await client.close()
    return client.node_id


def test_a_control_connection_that_is_shed_comes_again(pki: Path) -> None:
    with node_that_sheds(pki, 2) as (port, reset):
        assert asyncio.run(connected(pki, port)) == "pi1"
        assert len(reset) == 2


def test_a_control_connection_does_not_come_for_ever(pki: Path) -> None:
    with node_that_sheds(pki, 100) as (port, reset), pytest.raises(PeerUnreachable):
        asyncio.run(connected(pki, port))
    assert len(reset) == limits.HANDSHAKE_TRIES_MAX


@contextmanager
def stranger(words: bytes) -> Iterator[tuple[int, list[int]]]:
    """Something that is no node, says `words` and hangs up; its port, and who came."""
    asked: list[int] = []

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            asked.append(1)
            with sock, suppress(OSError):
                sock.sendall(words)
                sock.recv(1 << 16)

    with listening(serve) as port:
        yield port, asked


def test_whoever_is_no_node_is_asked_once(pki: Path) -> None:
    with stranger(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (port, asked):
        with pytest.raises(PeerUnreachable):
            asyncio.run(connected(pki, port))
        assert len(asked) == 1


def test_each_try_waits_longer_than_the_one_before(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note)
    with node_that_sheds(pki, 100) as (port, _), pytest.raises(PeerUnreachable):
        asyncio.run(connected(pki, port))
    longest = [limits.HANDSHAKE_RETRY_MIN_S * 2**n for n in range(limits.HANDSHAKE_TRIES_MAX - 1)]
    assert len(pauses) == len(longest)
    assert all(most / 2 <= pause <= most for pause, most in zip(pauses, longest, strict=True))


def test_one_that_is_slow_to_hang_up_gets_no_more_time_for_it(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECT_TIMEOUT_S", 0.0)
    with node_that_sheds(pki, 100) as (port, reset), pytest.raises(PeerUnreachable):
        asyncio.run(connected(pki, port))
    assert len(reset) == 1
