"""Before authentication: caps, deadlines, and who makes room for whom."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.cluster.hostile import RawPeer, half_open, is_refused, without_certificate
from tests.cluster.kill_fixtures import wait_until
from tests.unit.node.running_nodes import RunningNode, identity, make_pki

from ckptd.core import limits
from ckptd.net.acceptor import Unauthenticated, _Pending
from ckptd.wire import messages

PORTS = ("control", "bulk")


def bulk_threads() -> int:
    return sum(thread.name.startswith("bulk ") for thread in threading.enumerate())


def assert_served(node: RunningNode, port: str) -> None:
    """A client gets through. It may be turned away at first, when more are accepted at this
    moment than there is room for, and then tries again as ours do."""
    deadline_s = time.monotonic() + 15
    while True:
        try:
            with node.connect("client", port) as peer:
                assert isinstance(peer.greet(), messages.Hello)
                return
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)  # before the next try


@contextlib.contextmanager
def sockets(count: int) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.socket()) for _ in range(count)]


def admitted(waiting: Unauthenticated, sock: socket.socket, address: str) -> _Pending:
    pending = waiting.admit(sock, address)
    assert pending is not None
    return pending


def test_one_address_gets_its_share_and_its_oldest_silent_connection_makes_room() -> None:
    share = limits.UNAUTHENTICATED_CONNECTIONS_PER_ADDRESS_MAX

    async def main() -> None:
        waiting = Unauthenticated()
        with sockets(share + 2) as socks:
            pending = [admitted(waiting, sock, "a") for sock in socks[:share]]
            pending[0].silent = False
            other = admitted(waiting, socks[share], "b")
            newest = admitted(waiting, socks[share + 1], "a")
            assert [each.evicted.is_set() for each in pending[:3]] == [False, True, False]
            assert not other.evicted.is_set()
            assert not newest.evicted.is_set()
            assert len(waiting) == share + 1

    asyncio.run(main())


def test_all_addresses_together_are_capped() -> None:
    async def main() -> None:
        waiting = Unauthenticated()
        with sockets(limits.UNAUTHENTICATED_CONNECTIONS_MAX + 1) as socks:
            pending = [
                admitted(waiting, sock, f"a{number // 4}") for number, sock in enumerate(socks)
            ]
            assert pending[0].evicted.is_set()
            assert len(waiting) == limits.UNAUTHENTICATED_CONNECTIONS_MAX

    asyncio.run(main())


def test_a_handshake_makes_room_only_when_it_takes_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share = limits.UNAUTHENTICATED_CONNECTIONS_PER_ADDRESS_MAX

    async def main() -> None:
        waiting = Unauthenticated()
        with sockets(share + 2) as socks:
            pending = [admitted(waiting, sock, "a") for sock in socks[:share]]
            for each in pending:
                each.silent = False
                each.task = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
            assert waiting.admit(socks[share], "a") is None
            monkeypatch.setattr(limits, "EVICT_HANDSHAKE_AFTER_S", 0.0)
            assert waiting.admit(socks[share + 1], "a") is not None
            tasks = [each.task for each in pending if each.task is not None]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert [task.cancelled() for task in tasks] == [True] + [False] * (share - 1)
            for task in tasks:
                task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize("port", PORTS)
def test_nobody_without_a_certificate_of_this_cluster_gets_in(
    node: RunningNode, port: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = make_pki(tmp_path_factory.mktemp("other") / "pki", "pi1")
    where = node.place.control if port == "control" else node.place.bulk
    assert is_refused(node.place.host, where, without_certificate())
    context = without_certificate()
    context.load_cert_chain(other / "client.pem", other / "client.key")
    assert is_refused(node.place.host, where, context)
    assert not is_refused(node.place.host, where, identity(node.pki, "client"))


@pytest.mark.parametrize("port", PORTS)
@pytest.mark.parametrize("rubbish", [b"\x80\x04\x95pickle.", b"GET / HTTP/1.1\r\n\r\n", b"\x16"])
def test_rubbish_instead_of_tls_is_dropped(
    node: RunningNode, port: str, rubbish: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.5)
    where = node.place.control if port == "control" else node.place.bulk
    with socket.create_connection((node.place.host, where), timeout=10) as sock:
        sock.sendall(rubbish)
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass


@pytest.mark.parametrize("port", PORTS)
def test_a_silent_connection_is_closed_after_the_deadline(
    node: RunningNode, port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.3)
    where = node.place.control if port == "control" else node.place.bulk
    with socket.create_connection((node.place.host, where), timeout=10) as sock:
        assert sock.recv(1) == b""


def test_500_half_open_connections_on_both_ports_keep_nobody_out(node: RunningNode) -> None:
    with half_open(node.place.host, node.place.ports, 500):
        for port in PORTS:
            assert_served(node, port)
        assert bulk_threads() <= 1
    wait_until(lambda: not bulk_threads(), "the threads to end")


def test_handshakes_that_stall_keep_others_out_only_for_a_moment(node: RunningNode) -> None:
    stop = threading.Event()

    def attack(port: int) -> None:
        while not stop.is_set():
            with contextlib.ExitStack() as held, contextlib.suppress(OSError):
                for _ in range(10):
                    sock = socket.create_connection((node.place.host, port), timeout=5)
                    held.enter_context(sock)
                    sock.sendall(b"\x16\x03\x01")
                stop.wait(2.5)

    with ThreadPoolExecutor(2) as pool:
        try:
            for port in node.place.ports:
                pool.submit(attack, port)
            for port_name in PORTS:
                assert_served(node, port_name)
        finally:
            stop.set()


@pytest.mark.parametrize("port", PORTS)
def test_500_connections_with_a_certificate_that_do_nothing_keep_nobody_out(
    node: RunningNode, port: str
) -> None:
    files = identity(node.pki, "mallory")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.cert, files.key)
    where = node.place.control if port == "control" else node.place.bulk
    peers: list[RawPeer] = []
    try:
        for number in range(500):
            with contextlib.suppress(OSError):
                peers.append(RawPeer(node.place.host, where, context))
                if number % 2:
                    peers[-1].send(messages.Hello("home", "m", (), "0", 0, 0), hop=1)
        assert bulk_threads() <= limits.BULK_CONNECTIONS_PER_PEER_MAX
        with node.connect("client", port) as peer:
            assert isinstance(peer.greet(), messages.Hello)
    finally:
        for each in peers:
            each.close()
    wait_until(lambda: not bulk_threads(), "the threads to end")


def test_whoever_has_spoken_does_not_make_room_although_nobody_has_looked_yet() -> None:
    share = limits.UNAUTHENTICATED_CONNECTIONS_PER_ADDRESS_MAX

    async def main() -> None:
        waiting = Unauthenticated()
        with contextlib.ExitStack() as stack:
            pairs = [socket.socketpair() for _ in range(share + 1)]
            for pair in pairs:
                for sock in pair:
                    stack.enter_context(sock)
            pending = [admitted(waiting, ours, "a") for ours, _ in pairs[:share]]
            pairs[0][1].send(b"\x16")
            admitted(waiting, pairs[share][0], "a")
            assert [each.evicted.is_set() for each in pending[:2]] == [False, True]

    asyncio.run(main())
