"""The endpoint over real sockets and real TLS, on uvloop and on plain asyncio."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import h11
import pytest
import uvloop

from ckptd.client.pki import IssuedFiles, init_cluster, issue
from ckptd.core.identity import Role
from ckptd.core.quantities import Address
from ckptd.errors import ConfigError
from ckptd.observe.http import HttpServer, least_entitled, tls_context
from ckptd.observe.http_connection import HttpLimits
from ckptd.observe.pages import Health, Target

DEADLINE_S = 20.0
LOOPBACK = Address("127.0.0.1", 0)
# Far beyond every deadline of a test: what ends earlier did not end because of it.
PATIENT = HttpLimits(
    handshake_timeout_s=60, request_timeout_s=60, idle_timeout_s=60, answer_timeout_s=60
)
# Short enough to wait for, long enough for a machine that is busy.
IMPATIENT = HttpLimits(
    handshake_timeout_s=0.5, request_timeout_s=0.5, idle_timeout_s=0.5, answer_timeout_s=0.5
)
Run = Callable[[Callable[[], Awaitable[None]]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs a test's coroutine on each of the two event loops."""
    factory = asyncio.new_event_loop if request.param == "asyncio" else uvloop.new_event_loop

    def run_on_loop(test: Callable[[], Awaitable[None]]) -> None:
        async def limited() -> None:
            async with asyncio.timeout(DEADLINE_S):
                await test()

        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(limited())

    return run_on_loop


class Pki:
    """A cluster's CA, a foreign one, and client contexts of people and nodes."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for cluster in ("home", "away"):
            init_cluster(directory / cluster, cluster)
        self.node = issue(directory / "home", [Role.WORKER], "pi1")

    def visitor(self, *roles: Role, cluster: str = "home") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.load_verify_locations(self.node.ca)
        if roles:
            files = self._files(cluster, roles)
            context.load_cert_chain(files.cert, files.key)
        return context

    def _files(self, cluster: str, roles: Sequence[Role]) -> IssuedFiles:
        directory = self._directory / cluster
        node_id = f"visitor-{roles[0].value}"
        cert, key = directory / f"{node_id}.pem", directory / f"{node_id}.key"
        if cert.exists():
            return IssuedFiles(ca=directory / "ca.pem", cert=cert, key=key)
        return issue(directory, roles, node_id)


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@asynccontextmanager
async def served(
    pki: Pki | None = None,
    *,
    loopback: bool = True,
    bounds: HttpLimits = PATIENT,
    metrics: Callable[[], bytes] = lambda: b"ckptd_x 1\n",
    forgotten: Callable[[str], bool] = lambda _: False,
) -> AsyncIterator[HttpServer]:
    """A server; with `pki` it speaks TLS."""
    server = HttpServer(
        LOOPBACK,
        tls_context(pki.node.ca, pki.node.cert, pki.node.key) if pki else None,
        loopback=loopback,
        cluster="home",
        metrics=metrics,
        health=lambda: Health({"worker": []}),
        targets=lambda: [Target("pi1", Address("10.0.0.1", 9701), ["worker"], "home")],
        forgotten=forgotten,
        bounds=bounds,
    )
    await server.start()
    try:
        yield server
    finally:
        await server.close()


class Visitor:
    """An HTTP client that reads answers one by one with h11."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self._http = h11.Connection(h11.CLIENT)

    @classmethod
    async def to(cls, address: Address, context: ssl.SSLContext | None = None) -> Visitor:
        return cls(*await asyncio.open_connection(*address, ssl=context))

    async def ask(
        self, target: str = "/metrics", *, method: str = "GET", **headers: str
    ) -> tuple[h11.Response, bytes]:
        request = h11.Request(
            method=method, target=target, headers=[("Host", "pi1"), *headers.items()]
        )
        self.writer.write(self._http.send(request) or b"")
        self.writer.write(self._http.send(h11.EndOfMessage()) or b"")
        return await self.answer()

    async def answer(self) -> tuple[h11.Response, bytes]:
        response, body = None, b""
        while True:
            event = self._http.next_event()
            if event is h11.NEED_DATA:
                self._http.receive_data(await self.reader.read(65536))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert response is not None
                if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
                    self._http.start_next_cycle()
                return response, body
            else:
                raise ConnectionResetError("closed without an answer")

    async def closed(self) -> bytes:
        """What still comes until the server closes the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""
        finally:
            self.leave()

    def leave(self) -> None:
        self.writer.transport.abort()


async def ask_once(
    address: Address, context: ssl.SSLContext | None = None, target: str = "/metrics"
) -> tuple[int, bytes]:
    visitor = await Visitor.to(address, context)
    try:
        response, body = await visitor.ask(target)
        return response.status_code, body
    finally:
        visitor.leave()


async def raw(address: Address, sent: bytes) -> bytes:
    """Everything that a plain server answers to these bytes until it closes."""
    visitor = await Visitor.to(address)
    visitor.writer.write(sent)
    try:
        return await visitor.closed()
    finally:
        visitor.leave()


def test_pages_on_loopback_in_plain_http(run: Run) -> None:
    async def test() -> None:
        async with served() as server:
            assert await ask_once(server.address) == (200, b"ckptd_x 1\n")
            status, body = await ask_once(server.address, target="/healthz")
            assert (status, body.startswith(b'{"ok":true')) == (200, True)
            assert (await ask_once(server.address, target="/sd"))[0] == 200
            assert (await ask_once(server.address, target="/"))[0] == 404

    run(test)


def test_on_loopback_tls_asks_for_no_certificate(run: Run, pki: Pki) -> None:
    async def test() -> None:
        async with served(pki) as server:
            assert await ask_once(server.address, pki.visitor()) == (200, b"ckptd_x 1\n")

    run(test)


def test_off_loopback_the_certificate_decides(run: Run, pki: Pki) -> None:
    async def test() -> None:
        async with served(pki, loopback=False) as server:
            for role, status in (
                (Role.MONITOR, 200),
                (Role.CLIENT, 200),
                (Role.ADMIN, 200),
                (Role.WORKER, 403),
            ):
                for target in ("/metrics", "/sd"):
                    got, _ = await ask_once(server.address, pki.visitor(role), target)
                    assert got == status, (role, target)
            anonymous = pki.visitor()
            assert (await ask_once(server.address, anonymous))[0] == 403
            assert await ask_once(server.address, anonymous, "/healthz") == (200, b"ok\n")

    run(test)


def test_a_certificate_of_another_cluster_fails_the_handshake(run: Run, pki: Pki) -> None:
    async def test() -> None:
        async with served(pki, loopback=False) as server:
            foreign = pki.visitor(Role.MONITOR, cluster="away")
            with pytest.raises((ssl.SSLError, ConnectionError, h11.RemoteProtocolError)):
                await ask_once(server.address, foreign, "/healthz")

    run(test)


def test_a_forgotten_certificate_is_refused_on_an_open_connection_too(run: Run, pki: Pki) -> None:
    async def test() -> None:
        refused: list[str] = []
        async with served(pki, loopback=False, forgotten=lambda _: bool(refused)) as server:
            visitor = await Visitor.to(server.address, pki.visitor(Role.MONITOR))
            assert (await visitor.ask())[0].status_code == 200
            refused.append("all")
            assert (await visitor.ask())[0].status_code == 403
            visitor.leave()

    run(test)


def test_plain_http_on_the_tls_port_gets_nothing_back(run: Run, pki: Pki) -> None:
    async def test() -> None:
        async with served(pki, bounds=IMPATIENT) as server:
            answer = await raw(server.address, b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            assert b"ckptd" not in answer
            assert (await ask_once(server.address, pki.visitor()))[0] == 200

    run(test)


def test_off_loopback_plain_http_is_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        HttpServer(
            Address("0.0.0.0", 0),
            None,
            loopback=False,
            cluster="home",
            metrics=bytes,
            health=lambda: Health({}),
            targets=list,
        )
    assert caught.value.key == "observe.tls"


@pytest.mark.parametrize("listen", [Address("0.0.0.0", 0), Address("no-such-host.invalid", 0)])
def test_an_address_that_cannot_be_is_named(run: Run, listen: Address) -> None:
    async def test() -> None:
        server = HttpServer(
            listen,
            None,
            loopback=True,  # the node must not tell strangers what loopback may hear
            cluster="home",
            metrics=bytes,
            health=lambda: Health({}),
            targets=list,
        )
        with pytest.raises(ConfigError) as caught:
            await server.start()
        assert caught.value.key == "observe.listen"

    run(test)


def test_a_port_that_is_taken_is_named(run: Run) -> None:
    async def test() -> None:
        async with served() as first:
            second = HttpServer(
                first.address,
                None,
                loopback=True,
                cluster="home",
                metrics=bytes,
                health=lambda: Health({}),
                targets=list,
            )
            with pytest.raises(ConfigError, match=str(first.address.port)):
                await second.start()

    run(test)


def test_head_has_the_headers_of_get_and_no_body(run: Run) -> None:
    async def test() -> None:
        async with served() as server:
            visitor = await Visitor.to(server.address)
            got, _ = await visitor.ask()
            head, body = await visitor.ask(method="HEAD")
            assert body == b""
            assert dict(head.headers)[b"content-length"] == b"10"
            assert {name for name, _ in head.headers} == {name for name, _ in got.headers}
            visitor.leave()

    run(test)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello", 405),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.0\r\n\r\n", 200),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 30_000, 431),
        (b"GET /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
    ],
)
def test_odd_requests_are_answered_once_and_closed(run: Run, sent: bytes, status: int) -> None:
    async def test() -> None:
        async with served() as server:
            answer = await raw(server.address, sent)
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            assert answer.lower().count(b"connection: close\r\n") == 1
            assert answer.count(b"HTTP/1.1 ") == 1
            assert (await ask_once(server.address))[0] == 200

    run(test)


def test_requests_that_come_at_once_are_answered_in_order(run: Run) -> None:
    async def test() -> None:
        async with served() as server:
            answer = await raw(
                server.address,
                b"GET /nothing HTTP/1.1\r\nHost: a\r\n\r\n"
                b"GET /metrics HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
            )
            assert answer.index(b" 404 ") < answer.index(b" 200 ")

    run(test)


def test_one_connection_is_good_for_few_requests(run: Run) -> None:
    async def test() -> None:
        async with served(bounds=HttpLimits(requests_max=3)) as server:
            visitor = await Visitor.to(server.address)
            closing = [dict((await visitor.ask())[0].headers).get(b"connection") for _ in range(3)]
            assert closing == [None, None, b"close"]
            assert await visitor.closed() == b""

    run(test)


def test_a_page_that_fails_is_a_500_and_the_next_request_works(run: Run) -> None:
    async def test() -> None:
        results: list[bytes] = [b"ckptd_x 2\n"]
        async with served(metrics=lambda: results.pop()) as server:
            assert (await ask_once(server.address))[0] == 200
            status, body = await ask_once(server.address)
            assert (status, b"pop" in body) == (500, False)
            assert (await ask_once(server.address, target="/healthz"))[0] == 200

    run(test)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_hundreds_of_idle_connections_keep_nobody_out(run: Run, pki: Pki, tls: bool) -> None:
    """No deadline helps here, they are all a minute: only the cap does."""

    async def test() -> None:
        async with served(pki if tls else None) as server:
            idle: list[Visitor] = []
            for number in range(500):
                visitor = await Visitor.to(server.address)
                if number % 2:  # half of them say a little and stop
                    visitor.writer.write(b"\x16\x03\x01" if tls else b"GET /metr")
                idle.append(visitor)
                assert server.connections <= 64
            context = pki.visitor() if tls else None
            for _ in range(5):
                assert (await ask_once(server.address, context))[0] == 200
            assert server.connections <= 64
            # The crowded-out ones were closed, the youngest are still there.
            for visitor in idle[: 500 - 64]:
                await visitor.closed()
            for visitor in idle:
                visitor.leave()

    run(test)


@pytest.mark.parametrize(
    ("holders", "index"),
    [
        ([("a", False)], 0),
        ([("modest", False), ("greedy", False), ("greedy", False)], 1),
        ([("modest", False), ("greedy", True), ("greedy", False)], 2),
        ([("modest", False), ("greedy", True), ("greedy", True)], 1),
        ([("greedy", False), ("modest", False), ("greedy", False)], 0),
    ],
)
def test_the_address_that_holds_most_makes_room(
    holders: list[tuple[str, bool]], index: int
) -> None:
    assert least_entitled(holders) == index


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GET /metrics HTTP/1.1\r\nHost:", b"HTTP/1.1 408 "),
        (b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"HTTP/1.1 200 "),
    ],
    ids=["silent", "half a request", "idle after a request"],
)
def test_who_waits_too_long_is_closed(run: Run, sent: bytes, answer: bytes) -> None:
    async def test() -> None:
        async with served(bounds=IMPATIENT) as server:
            assert (await raw(server.address, sent)).startswith(answer)

    run(test)


def test_a_request_that_trickles_has_one_deadline_for_all_of_it(run: Run) -> None:
    async def test() -> None:
        async with served(bounds=IMPATIENT) as server:
            visitor = await Visitor.to(server.address)
            visitor.writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n")
            closed = asyncio.create_task(visitor.closed())
            while not closed.done():
                visitor.writer.write(b"X: y\r\n")
                await asyncio.wait([closed], timeout=0.05)
            assert closed.result().startswith(b"HTTP/1.1 408 ") or closed.result() == b""
            visitor.leave()

    run(test)


def test_a_handshake_that_never_begins_is_closed(run: Run, pki: Pki) -> None:
    async def test() -> None:
        async with served(pki, bounds=IMPATIENT) as server:
            assert await raw(server.address, b"") == b""

    run(test)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_who_does_not_take_the_answer_is_closed(run: Run, pki: Pki, tls: bool) -> None:
    async def test() -> None:
        asked = asyncio.Event()

        def metrics() -> bytes:
            asked.set()
            return b"#" * (32 * 1024 * 1024)  # far more than the buffers on the way hold

        context = pki.visitor() if tls else None
        async with served(pki if tls else None, metrics=metrics, bounds=IMPATIENT) as server:
            loop = asyncio.get_running_loop()
            sock = await loop.run_in_executor(None, ask_and_take_nothing, server.address, context)
            with sock:
                await asked.wait()
                serving = [
                    task for task in asyncio.all_tasks() if task.get_name() == "http 127.0.0.1"
                ]
                assert len(serving) == 1
                await asyncio.wait(serving)

    run(test)


def ask_and_take_nothing(address: Address, context: ssl.SSLContext | None) -> socket.socket:
    sock = socket.create_connection(address, timeout=DEADLINE_S)
    if context:
        sock = context.wrap_socket(sock)
    sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    return sock


def test_close_ends_idle_connections_and_frees_the_port(run: Run) -> None:
    async def test() -> None:
        async with served() as server:
            address = server.address
            silent = await Visitor.to(address)
            idle = await Visitor.to(address)
            assert (await idle.ask())[0].status_code == 200
        assert server.connections == 0
        assert await idle.closed() == b""
        assert await silent.closed() == b""
        with pytest.raises(ConnectionRefusedError):
            await Visitor.to(address)
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(address)

    run(test)


def test_close_lets_an_answer_under_way_arrive(run: Run) -> None:
    async def test() -> None:
        large = b"#" * (16 * 1024 * 1024)
        asked = asyncio.Event()

        def metrics() -> bytes:
            asked.set()
            return large

        async with served(metrics=metrics) as server:
            visitor = await Visitor.to(server.address)
            reading = asyncio.create_task(visitor.ask())
            await asked.wait()
        assert (await reading)[1] == large
        visitor.leave()

    run(test)


def test_close_waits_only_so_long(run: Run) -> None:
    async def test() -> None:
        asked = asyncio.Event()

        def metrics() -> bytes:
            asked.set()
            return b"#" * (64 * 1024 * 1024)

        bounds = HttpLimits(answer_timeout_s=60, close_timeout_s=0.2)
        async with served(metrics=metrics, bounds=bounds) as server:
            visitor = await Visitor.to(server.address)
            visitor.writer.write(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
            await asked.wait()  # and never reads: its own buffers are far smaller
        assert server.connections == 0
        visitor.leave()

    run(test)
