"""TLS in memory over a real socket: all bytes in order, ends and alerts told, nothing kept."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.node.running_nodes import identity, make_pki

from ckptd.net.tls import client_context, server_context
from ckptd.net.tls_stream import RECORDS_BYTES, WIRE_BYTES, TlsStream


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pki(tmp_path_factory.mktemp("stream") / "pki", "pi1")


@contextlib.contextmanager
def streams(pki: Path, *, on_loop: bool = False) -> Iterator[tuple[TlsStream, TlsStream]]:
    """The client's and the server's end of one connection."""
    one, other = socket.socketpair()
    files = identity(pki, "pi1")
    server = TlsStream(one, server_context(files.ca, files.cert, files.key), server_side=True)
    files = identity(pki, "client")
    client = TlsStream(other, client_context(files.ca, files.cert, files.key), server_side=False)

    def serve() -> None:
        if on_loop:
            one.setblocking(False)
            asyncio.run(server.shake_hands_on_loop())
        else:
            server.shake_hands()

    thread = threading.Thread(target=serve)
    thread.start()
    client.shake_hands()
    thread.join(10)
    server.settimeout(10)
    client.settimeout(10)
    try:
        yield client, server
    finally:
        client.close()
        server.close()


def receive_all(stream: TlsStream, size: int, piece: int) -> bytes:
    received = bytearray(size)
    view = memoryview(received)
    filled = 0
    while filled < size:
        count = stream.recv_into(view[filled : filled + piece])
        assert count, "the connection ended before all bytes came"
        filled += count
    return bytes(received)


@pytest.mark.parametrize("on_loop", [False, True])
@pytest.mark.parametrize("piece", [1, 1000, WIRE_BYTES + 1])
def test_all_bytes_come_in_order(pki: Path, piece: int, on_loop: bool) -> None:
    size = 3 * WIRE_BYTES + 12345 if piece > 1 else 20_000
    content = os.urandom(size)
    with streams(pki, on_loop=on_loop) as (client, server):
        thread = threading.Thread(target=client.sendall, args=(memoryview(content),))
        thread.start()
        assert receive_all(server, size, piece) == content
        thread.join(10)
        assert not server.pending()
        server.sendall(memoryview(b"thanks"))
        assert receive_all(client, 6, 6) == b"thanks"


def test_what_nobody_has_read_yet_is_pending_and_survives_a_rest(pki: Path) -> None:
    with streams(pki) as (client, server):
        client.sendall(memoryview(b"x" * 5000))
        assert receive_all(server, 10, 10) == b"x" * 10
        assert server.pending()
        server.rest()
        assert receive_all(server, 4990, 4990) == b"x" * 4990
        assert not server.pending()
        server.rest()
        client.sendall(memoryview(b"more"))
        assert receive_all(server, 4, 4) == b"more"


def test_the_end_is_told_and_what_came_before_it_is_not_lost(pki: Path) -> None:
    with streams(pki) as (client, server):
        client.sendall(memoryview(b"last words"))
        client.shutdown()
        assert receive_all(server, 10, 100) == b"last words"
        buffer = memoryview(bytearray(10))
        assert server.recv_into(buffer) == 0
        assert server.recv_into(buffer) == 0


def test_a_proper_close_of_tls_is_an_end_too(pki: Path) -> None:
    with streams(pki) as (client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            client.tls.unwrap()
        client.sendall(memoryview(b""))
        client._flush()
        assert server.recv_into(memoryview(bytearray(10))) == 0


def test_nothing_moves_within_the_deadline(pki: Path) -> None:
    with streams(pki) as (client, server):
        server.settimeout(0.05)
        with pytest.raises(TimeoutError):
            server.recv_into(memoryview(bytearray(10)))
        client.settimeout(0.05)
        with pytest.raises(TimeoutError):
            client.sendall(memoryview(bytes(16 * 1024 * 1024)))


@pytest.mark.parametrize(
    "head",
    [b"GET / HTTP/1.1\r\n", b"\x17\x09\x09\x00\x20", b"\x17\x03\x03\xff\xff"],
    ids=["http", "version", "length"],
)
def test_what_cannot_become_a_record_is_an_error_at_once(pki: Path, head: bytes) -> None:
    """Nobody waits for the rest of it."""
    with streams(pki) as (client, server):
        client._raw.sendall(head)
        with pytest.raises(ssl.SSLError):
            server.recv_into(memoryview(bytearray(10)))


@pytest.mark.parametrize("said", [b"payload", b""], ids=["then bytes", "then the end"])
def test_records_of_tls_itself_are_no_bytes_and_no_end(pki: Path, said: bytes) -> None:
    """Here tickets, which our servers do not send: OpenSSL wants more and has nothing."""
    one, other = socket.socketpair()
    files = identity(pki, "pi1")
    context = server_context(files.ca, files.cert, files.key)
    context.num_tickets = 2
    server = TlsStream(one, context, server_side=True)
    files = identity(pki, "client")
    client = TlsStream(other, client_context(files.ca, files.cert, files.key), server_side=False)
    thread = threading.Thread(target=server.shake_hands)
    thread.start()
    client.shake_hands()
    thread.join(10)
    assert client.pending() or select.select([other], [], [], 10)[0], "the tickets have come"
    server.settimeout(10)
    client.settimeout(10)

    def say() -> None:
        server.sendall(memoryview(said))
        server.shutdown()

    later = threading.Timer(0.1, say)
    later.start()
    assert receive_all(client, len(said), 100) == said
    assert client.recv_into(memoryview(bytearray(10))) == 0
    later.join(10)
    server.close()
    client.close()


def test_a_connection_that_is_cut_inside_a_record_ends(pki: Path) -> None:
    with streams(pki) as (client, server):
        client.tls.write(b"x" * 1000)
        record = client._outgoing.read()
        client._raw.sendall(record + record[:500])
        client.shutdown()
        buffer = memoryview(bytearray(2000))
        assert server.recv_into(buffer) == 1000
        assert server.recv_into(buffer) == 0


@pytest.mark.parametrize("first", [1, 4, 5, 6, 500])
def test_a_record_may_come_in_parts(pki: Path, first: int) -> None:
    with streams(pki) as (client, server):
        client.tls.write(b"x" * 1000)
        one = client._outgoing.read()
        client.tls.write(b"y" * 1000)
        other = client._outgoing.read()
        client._raw.sendall(one + other[:first])
        buffer = memoryview(bytearray(3000))
        assert server.recv_into(buffer) == 1000
        later = threading.Timer(0.05, client._raw.sendall, args=(other[first:],))
        later.start()
        assert server.recv_into(buffer) == 1000
        later.join()
        assert bytes(buffer[:1000]) == b"y" * 1000


def test_bytes_that_are_no_tls_are_an_error(pki: Path) -> None:
    with streams(pki) as (client, server):
        client._raw.sendall(b"\x17\x03\x03\x00\x20" + b"rubbish!" * 4)
        with pytest.raises(ssl.SSLError):
            server.recv_into(memoryview(bytearray(10)))


def test_whoever_is_refused_learns_why(pki: Path, tmp_path: Path) -> None:
    other = identity(make_pki(tmp_path / "other", "pi1"), "client")
    own = identity(pki, "pi1")
    one, two = socket.socketpair()
    server = TlsStream(one, server_context(own.ca, own.cert, own.key), server_side=True)
    errors: list[BaseException] = []

    def serve() -> None:
        try:
            server.shake_hands()
        except ssl.SSLError as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    client = TlsStream(two, client_context(other.ca, other.cert, other.key), server_side=False)
    with pytest.raises(ssl.SSLError):  # the server's certificate is of another CA
        client.shake_hands()
    thread.join(10)
    assert errors and "ALERT" in str(errors[0]).upper(), "and the server was told"
    server.close()
    client.close()


def test_a_peer_that_leaves_during_the_handshake_is_an_error(pki: Path) -> None:
    own = identity(pki, "pi1")
    one, two = socket.socketpair()
    server = TlsStream(one, server_context(own.ca, own.cert, own.key), server_side=True)
    two.close()
    with pytest.raises(OSError):  # ssl.SSLEOFError, or a reset
        server.shake_hands()
    server.close()


def test_buffers_of_openssl_stay_small(pki: Path) -> None:
    """They never shrink, and a node has many connections."""
    largest = 0
    with streams(pki) as (client, server):
        real = client._flush

        def flush() -> None:
            nonlocal largest
            largest = max(largest, client._outgoing.pending)
            real()

        client._flush = flush  # type: ignore[method-assign]
        thread = threading.Thread(target=client.sendall, args=(memoryview(bytes(8 * WIRE_BYTES)),))
        thread.start()
        received = 0
        buffer = memoryview(bytearray(WIRE_BYTES))
        while received < 8 * WIRE_BYTES:
            received += server.recv_into(buffer)
        thread.join(10)
    assert 0 < largest <= 2 * RECORDS_BYTES


def test_openssl_gets_no_more_than_it_is_asked_for_at_once(
    pki: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much has come: it keeps the memory for it."""
    largest = 0
    content = os.urandom(WIRE_BYTES - RECORDS_BYTES)
    with streams(pki) as (client, server):
        real = server._feed

        def feed() -> bool:
            nonlocal largest
            fed = real()
            largest = max(largest, server._incoming.pending)
            return fed

        monkeypatch.setattr(server, "_feed", feed)
        for start in range(0, len(content), RECORDS_BYTES):
            client.tls.write(content[start : start + RECORDS_BYTES])
        server._wire = memoryview(bytearray(client._outgoing.read()))  # as if it had come
        server._waiting = server._wire
        assert receive_all(server, len(content), len(content)) == content
    assert RECORDS_BYTES // 2 < largest < 1.5 * RECORDS_BYTES
