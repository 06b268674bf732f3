"""The HTTP/1.1 endpoint of a node: sockets, TLS, limits. What it serves is in `pages`.

Nobody can keep others out by holding connections: there are at most 64, and when one more comes,
the oldest of the address that holds most has to go, one that waits before one that is answered.
So an address that opens hundreds crowds out itself alone, and even from that address a request
gets through, because it is done long before 64 newer connections have come. On top of that every
wait has a deadline. Accepting is done here rather than by `asyncio.start_server`, which counts a
connection only after its TLS handshake.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path

import msgspec
import structlog

from ckptd.core import limits
from ckptd.core.identity import Identity
from ckptd.core.quantities import Address
from ckptd.errors import ConfigError, NotAuthorized
from ckptd.net.tls import check_peer, none_forgotten, server_context
from ckptd.observe.http_connection import HttpConnection, HttpLimits
from ckptd.observe.pages import Health, Pages, Target

_log = structlog.get_logger(__name__)

# Accepting fails for lack of something that other connections give back: wait, do not spin.
_ACCEPT_PAUSE_S = 0.5


def tls_context(ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """The context for `HttpServer`: as for the other ports, but a client may come without a
    certificate (it then sees /healthz alone). One that is presented must be good.

    Raises ConfigError with the key of the file that cannot be used.
    """
    context = server_context(ca, cert, key)
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def least_entitled(holders: Sequence[tuple[str, bool]]) -> int:
    """Which of these connections has to make room: the index of one, of at least one.

    `holders` are the connections, oldest first, as (peer's address, whether it is being answered).
    """
    [(busiest, _)] = Counter(peer for peer, _ in holders).most_common(1)
    own = [index for index, (peer, _) in enumerate(holders) if peer == busiest]
    waiting = [index for index in own if not holders[index][1]]
    return (waiting or own)[0]


class _Open(msgspec.Struct, eq=False):
    """An accepted connection: its task, its peer's address, its socket until the task has it."""

    peer: str
    sock: socket.socket
    connection: HttpConnection
    task: asyncio.Task[None] | None = None


class HttpServer:
    """Serves /metrics, /healthz and /sd on `listen`, from `start` to `close`.

    `context` is that of `tls_context`, None for plain HTTP, which only loopback may have.
    `loopback` says that `listen` is reachable from this machine alone; `start` checks it.
    `cluster` is the name that certificates must carry; `forgotten` says of a certificate's serial
    number whether the node refuses it. The other callables are described at `Pages`.
    """

    def __init__(
        self,
        listen: Address,
        context: ssl.SSLContext | None,
        *,
        loopback: bool,
        cluster: str,
        metrics: Callable[[], bytes],
        health: Callable[[], Health],
        targets: Callable[[], Sequence[Target]],
        forgotten: Callable[[str], bool] = none_forgotten,
        bounds: HttpLimits | None = None,
    ) -> None:
        if context is None and not loopback:
            raise ConfigError("observe.tls", "off loopback, metrics are served with TLS only")
        self._listen = listen
        self._context = context
        self._loopback = loopback
        self._cluster = cluster
        self._limits = HttpLimits() if bounds is None else bounds
        self._pages = Pages(
            loopback=loopback, metrics=metrics, health=health, targets=targets, forgotten=forgotten
        )
        self._listeners: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._open: list[_Open] = []  # oldest first
        self._leaving: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> Address:
        """Where the server listens; with port 0 in `listen`, the port that the system chose."""
        host, port = self._listeners[0].getsockname()[:2]
        return Address(host, port)

    @property
    def connections(self) -> int:
        """How many connections are open now, handshakes included."""
        return len(self._open)

    async def start(self) -> None:
        """Listen on every address that `listen` resolves to. Raises ConfigError if that fails."""
        try:
            found = await asyncio.get_running_loop().getaddrinfo(
                self._listen.host,
                self._listen.port,
                type=socket.SOCK_STREAM,
                flags=socket.AI_PASSIVE,
            )
            for family, _, _, _, where in dict.fromkeys(found):
                self._check_loopback(str(where[0]))
                self._listeners.append(_listener(family, where))
        except OSError as error:
            self._close_listeners()
            raise ConfigError(
                "observe.listen",
                f"cannot listen on {self._listen}: {error.strerror or error}",
                next="ckptd doctor",
            ) from error
        except BaseException:
            self._close_listeners()
            raise
        for listener in self._listeners:
            name = f"http accept {listener.getsockname()[0]}"
            self._accepting.append(asyncio.create_task(self._accept(listener), name=name))

    async def close(self) -> None:
        """Stop listening, let answers under way end within 2 s, and close everything."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        self._accepting.clear()
        self._close_listeners()
        for each in self._open:
            if not each.connection.answering and each.task is not None:
                each.task.cancel()
            each.connection.last_request = True
        tasks = {each.task for each in self._open if each.task is not None} | self._leaving
        if not tasks:
            return
        _, late = await asyncio.wait(tasks, timeout=self._limits.close_timeout_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _check_loopback(self, host: str) -> None:
        if self._loopback and not ip_address(host.partition("%")[0]).is_loopback:
            raise ConfigError("observe.listen", f"{host} can be reached from other machines")

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, where = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno != errno.ECONNABORTED:  # else the peer had gone again
                    _log.warning(
                        "http_accept_failed",
                        reason=error.strerror,
                        next="raise the limit of open files of the service",
                    )
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._admit(sock, str(where[0]))
            # A full backlog is accepted without ever waiting: let the others run in between.
            await asyncio.sleep(0)

    def _admit(self, sock: socket.socket, peer: str) -> None:
        while len(self._open) >= self._limits.connections_max:
            self._evict()
        connection = HttpConnection(self._pages, self._limits)
        entry = _Open(peer, sock, connection)
        self._open.append(entry)
        task = entry.task = asyncio.create_task(self._run(entry), name=f"http {peer}")
        task.add_done_callback(lambda _: self._ended(entry))

    def _evict(self) -> None:
        """Close the connection that has the least right to stay, and make room at once."""
        holders = [(each.peer, each.connection.answering) for each in self._open]
        victim = self._open[least_entitled(holders)]
        self._open.remove(victim)
        if victim.task is not None:
            self._leaving.add(victim.task)
            victim.task.cancel()

    def _ended(self, entry: _Open) -> None:
        if entry in self._open:
            self._open.remove(entry)
        if entry.task is not None:
            self._leaving.discard(entry.task)
        if not entry.connection.started:  # cancelled before its first step
            entry.sock.close()

    async def _run(self, entry: _Open) -> None:
        try:
            await entry.connection.run(entry.sock, self._context, self._identity)
        except (OSError, TimeoutError) as error:
            # Scanners, monitoring that went away, handshakes that failed: no news for anybody.
            _log.debug("http_connection_lost", peer=entry.peer, reason=str(error))
        except Exception:
            _log.exception("http_connection_failed", peer=entry.peer, next="report this as a bug")

    def _identity(self, peer: ssl.SSLObject) -> Identity | None:
        if self._loopback or peer.getpeercert(binary_form=True) is None:
            return None
        try:
            return check_peer(peer, cluster=self._cluster)
        except NotAuthorized as error:
            _log.debug("http_certificate_refused", reason=error.message)
            return None


def _listener(family: int, where: tuple[object, ...]) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            # 0.0.0.0 and :: are two addresses here, on every system.
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        listener.listen(limits.HTTP_BACKLOG_MAX)
    except BaseException:
        listener.close()
        raise
    return listener
