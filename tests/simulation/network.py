"""Sockets without a network: byte streams that are late, cut, or held back in one direction.

A connection is two `Endpoint`s. Each behaves as a socket (blocking, for simulated threads) and can
be driven by the event loop. TLS is replaced by an exchange of certificates at the beginning of the
stream; everything behind that is the product's own.

As with TCP, bytes come in order or the connection ends. What a network loses, delivers twice or too
late shows as delays, held streams, and connections that break when a request has arrived and its
answer has not.
"""

from __future__ import annotations

import asyncio
import errno
import socket as real_socket
import ssl as real_ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from tests.simulation.kernel import Host, Kernel, Process, SimulatedThread, current_process
from tests.simulation.threads import kernel

_WINDOW_BYTES: Final = 256 * 1024
_CONNECT_GIVE_UP_S: Final = 120.0
_HANDSHAKE: Final = b"\x16sim"


@dataclass
class Network:
    """All hosts by address, and what is wrong between them."""

    kernel: Kernel
    hosts: dict[str, Host] = field(default_factory=dict)
    listeners: dict[tuple[str, int], SimulatedSocket] = field(default_factory=dict)
    blocked: set[tuple[str, str]] = field(default_factory=set)  # names: (from, to)
    latency_s: tuple[float, float] = (0.0005, 0.005)
    slow: dict[str, float] = field(default_factory=dict)  # by host, a factor
    streams: dict[int, SimulatedSocket] = field(default_factory=dict)
    bytes_moved: int = 0

    def delay_s(self, source: Host, target: Host) -> float:
        if source is target:
            return 0.0001
        factor = self.slow.get(source.name, 1.0) * self.slow.get(target.name, 1.0)
        rng = self.kernel.rng
        late = 20.0 if rng.random() < 0.01 else 1.0
        return rng.uniform(*self.latency_s) * factor * late

    def is_cut(self, source: Host, target: Host) -> bool:
        return (source.name, target.name) in self.blocked

    def cut(self, source: str, target: str) -> None:
        self.blocked.add((source, target))

    def heal(self) -> None:
        """Everything flows again; what was held arrives."""
        self.blocked.clear()
        for stream in list(self.streams.values()):
            stream.release_held()

    def reset_some(self, share: float, hosts: set[str] | None = None) -> None:
        """Breaks a share of the connections; what is under way on them is lost."""
        for stream in list(self.streams.values()):
            ours = hosts is None or stream.host.name in hosts
            if ours and self.kernel.rng.random() < share:
                stream.reset()


class SimulatedSocket:
    """A listener, or one end of a connection."""

    def __init__(self, family: int = 2, kind: int = 1, *, network: Network | None = None) -> None:
        self.network = network or NETWORK[-1]
        process = current_process()
        assert process is not None, "a socket belongs to a process"
        self.process: Process = process
        self.host = process.host
        self.number = next(_numbers)
        self.address: tuple[str, int] = ("", 0)
        self.peer: SimulatedSocket | None = None
        self.timeout_s: float | None = None
        self.certificate = b""  # of the other side, once hands are shaken
        self.inbox = bytearray()
        self.ended = False  # nothing more will come
        self.error: OSError | None = None
        self.closed = False
        self.shut = False
        self.listening = False
        self.accepted: list[SimulatedSocket] = []
        self.on_readable: Callable[[], None] | None = None
        self._waiting: list[SimulatedThread] = []
        self._arrives_s = 0.0
        self._held: list[bytes | None] = []
        self._unread_at_peer = 0

    # -- what code with sockets calls

    def setsockopt(self, *_: object) -> None:
        pass

    def setblocking(self, blocking: bool) -> None:
        self.timeout_s = None if blocking else 0.0

    def settimeout(self, timeout_s: float | None) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        self.timeout_s = timeout_s

    def fileno(self) -> int:
        return -1 if self.closed else self.number

    def getsockname(self) -> tuple[str, int]:
        return self.address

    def getpeername(self) -> tuple[str, int]:
        return self.peer.address if self.peer is not None else ("", 0)

    def getpeercert(self, binary_form: bool = False) -> bytes:
        return self.certificate

    def pending(self) -> int:
        return 0

    def bind(self, address: tuple[str, int]) -> None:
        host, port = address
        if (host, port or 0) in self.network.listeners:
            raise OSError(errno.EADDRINUSE, "in use")
        self.address = (host, port or next(_ports))

    def listen(self, backlog: int = 0) -> None:
        self.listening = True
        self.network.listeners[self.address] = self
        self.process.when_dead.append(self.close)

    def recv_into(self, view: memoryview) -> int:
        self._wait_until(lambda: bool(self.inbox) or self.ended or self.error is not None)
        count = self._take(view)
        return count

    def recv(self, count: int, flags: int = 0) -> bytes:
        """Only as the Acceptor peeks: without waiting, without taking."""
        if not self.inbox and not self.ended:
            raise BlockingIOError
        return bytes(self.inbox[:count])

    def sendall(self, data: memoryview | bytes) -> None:
        self._raise_error()
        content = bytes(data)
        self._wait_until(lambda: self._unread_at_peer < _WINDOW_BYTES or self.error is not None)
        self._raise_error()
        self.transmit(content)

    def shutdown(self, how: int) -> None:
        self.shut = True
        self.ended = True
        self._notify()
        self.transmit(None)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if self.listening:
            if self.network.listeners.get(self.address) is self:
                del self.network.listeners[self.address]
            for waiting in self.accepted:
                waiting.reset()
            self._notify()
            return
        self.network.streams.pop(self.number, None)
        self.ended = True
        if self.inbox:
            self.reset()  # closing with bytes unread resets
        else:
            self.transmit(None)
        self._notify()

    def reset(self) -> None:
        """The connection breaks, at once here and after a delay there."""
        peer = self.peer
        self.fail(ConnectionResetError(errno.ECONNRESET, "connection reset by peer"))
        reaches = peer is not None and self.process.alive
        if reaches and peer is not None and not self.network.is_cut(self.host, peer.host):
            delay_s = self.network.delay_s(self.host, peer.host)
            error = ConnectionResetError(errno.ECONNRESET, "connection reset by peer")
            self.network.kernel.call_later(delay_s, peer.fail, error, context=_OUTSIDE)

    def fail(self, error: OSError) -> None:
        if self.error is None and not self.closed:
            self.error = error
            self._held.clear()
            self.network.streams.pop(self.number, None)
            self._notify()

    # -- bytes on their way

    def transmit(self, data: bytes | None) -> None:
        """Sends bytes, or the end (None), as the network lets them through."""
        peer = self.peer
        if peer is None or self.error is not None or not self.process.alive:
            return
        if data:
            self._unread_at_peer += len(data)
        if self._held or self.network.is_cut(self.host, peer.host):
            if not self._held:
                give_up_s = self.network.kernel.rng.uniform(60.0, 900.0)
                self.network.kernel.call_later(give_up_s, self._give_up, context=_OUTSIDE)
            self._held.append(data)
            return
        self._deliver_later(data)

    def _deliver_later(self, data: bytes | None) -> None:
        peer = self.peer
        assert peer is not None
        network = self.network
        at_s = network.kernel.now_s + network.delay_s(self.host, peer.host)
        self._arrives_s = max(self._arrives_s + 1e-9, at_s)  # never two at once
        if data:
            network.bytes_moved += len(data)
        network.kernel.call_at(self._arrives_s, peer.arrive, data, context=_OUTSIDE)

    def release_held(self) -> None:
        held, self._held = self._held, []
        if self.error is None:
            for data in held:
                self._deliver_later(data)

    def _give_up(self) -> None:
        if self._held:
            self.fail(TimeoutError(errno.ETIMEDOUT, "connection timed out"))

    def arrive(self, data: bytes | None) -> None:
        """On the loop: bytes or the end reach this side."""
        if not self.host.powered:
            return  # nobody is there, and nobody says so
        if self.closed or not self.process.alive:
            if data is not None and self.peer is not None:
                self.peer.fail(ConnectionResetError(errno.ECONNRESET, "connection reset by peer"))
            return
        if self.error is not None:
            return
        if data is None:
            self.ended = True
        elif self.shut:
            return
        else:
            self.inbox += data
        self._notify()

    def take_all(self) -> bytes:
        data = bytes(self.inbox)
        self.inbox.clear()
        self._read(len(data))
        return data

    def _take(self, view: memoryview) -> int:
        if not self.inbox:
            self._raise_error()
            return 0
        count = min(len(view), len(self.inbox))
        view[:count] = self.inbox[:count]
        del self.inbox[:count]
        self._read(count)
        return count

    def _read(self, count: int) -> None:
        if self.peer is not None:
            self.peer._unread_at_peer -= count
            if count:
                self.peer._notify_writers()

    def _raise_error(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        if self.error is not None:
            raise type(self.error)(*self.error.args)
        if self.shut:
            raise BrokenPipeError(errno.EPIPE, "shut down")

    # -- waiting

    def readable(self) -> bool:
        return bool(self.inbox) or self.ended or self.error is not None or bool(self.accepted)

    def wait_readable(self, timeout_s: float) -> bool:
        try:
            self._wait_until(self.readable, timeout_s)
        except TimeoutError:
            return False
        return True

    def wait_for_more(self, than: int) -> None:
        """In a simulated thread: until more bytes are here, or the end is."""
        self._wait_until(lambda: len(self.inbox) > than or self.ended or self.error is not None)

    def _wait_until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        limit_s = self.timeout_s if timeout_s is None else timeout_s
        if self.closed:
            raise OSError(errno.EBADF, "closed")
        end_s = None if limit_s is None else kernel().now_s + limit_s
        while not condition():
            left_s = None if end_s is None else end_s - kernel().now_s
            if left_s is not None and left_s <= 0:
                raise TimeoutError("timed out")
            me = kernel().current
            if me is None:
                raise AssertionError("the event loop would wait for a socket")
            self._waiting.append(me)
            try:
                kernel().block(left_s, "network")
            finally:
                if me in self._waiting:
                    self._waiting.remove(me)

    def _notify(self) -> None:
        self._notify_writers()
        if self.on_readable is not None and (self.readable() or self.closed):
            self.network.kernel.call_soon(self._call_reader, context=self.process.context)

    def _notify_writers(self) -> None:
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            kernel().wake(thread)

    def _call_reader(self) -> None:
        if self.on_readable is not None:
            self.on_readable()

    # -- the stand-in for TLS

    def greet(self, certificate: bytes) -> None:
        self.transmit(_HANDSHAKE + len(certificate).to_bytes(4, "big") + certificate)

    def take_greeting(self, context: SimulatedContext) -> bool:
        """Whether the other side's certificate is here. Raises SSLError when it is not one of
        the same CA, or when the connection is gone."""
        head = len(_HANDSHAKE) + 4
        size = int.from_bytes(self.inbox[len(_HANDSHAKE) : head], "big")
        if len(self.inbox) < head or len(self.inbox) < head + size:
            if self.error is not None:
                raise ConnectionResetError(errno.ECONNRESET, "connection reset by peer")
            if self.ended:
                raise real_ssl.SSLEOFError(8, "EOF occurred in violation of protocol")
            return False
        self.certificate = bytes(self.inbox[head : head + size])
        del self.inbox[: head + size]
        self._read(head + size)
        context.check(self.certificate)
        return True


class SimulatedContext:
    """As ssl.SSLContext: holds a certificate and the CA's."""

    def __init__(self, protocol: object = None) -> None:
        self.verify_flags = 0
        self.options = 0
        self.certificate = b""
        self._trusted: bytes = b""

    def load_verify_locations(self, cadata: bytes) -> None:
        self._trusted = cadata

    def load_cert_chain(self, cert: Path, key: Path, password: object = None) -> None:
        loaded = x509.load_pem_x509_certificate(Path(cert).read_bytes())
        self.certificate = loaded.public_bytes(Encoding.DER)

    def check(self, certificate: bytes) -> None:
        key = (certificate, self._trusted)
        if key not in _verified:
            try:
                ca = x509.load_der_x509_certificate(self._trusted)
                x509.load_der_x509_certificate(certificate).verify_directly_issued_by(ca)
            except Exception as error:
                raise real_ssl.SSLError(1, f"certificate verify failed: {error}") from error
            _verified.add(key)


_verified: set[tuple[bytes, bytes]] = set()


class _Numbers:
    def __init__(self, first: int) -> None:
        self.value = first

    def __next__(self) -> int:
        self.value += 1
        return self.value


_numbers = _Numbers(100_000)
_ports = _Numbers(50_000)
NETWORK: list[Network] = []
_OUTSIDE: Any = None


def begin(network: Network) -> None:
    """From now on `network` is the one that sockets belong to."""
    global _OUTSIDE
    NETWORK[:] = [network]
    _OUTSIDE = network.kernel.in_process(None)
    _numbers.value, _ports.value = 100_000, 50_000


def _start_connection(network: Network, address: tuple[str, int]) -> tuple[SimulatedSocket, float]:
    """A socket that is connected, and how long that takes. Raises OSError when refused; a delay
    over _CONNECT_GIVE_UP_S means that there is no answer."""
    sock = SimulatedSocket(network=network)
    target = network.hosts.get(address[0])
    if target is None:
        return sock, 2 * _CONNECT_GIVE_UP_S
    if network.is_cut(sock.host, target) or network.is_cut(target, sock.host):
        return sock, 2 * _CONNECT_GIVE_UP_S
    if not target.powered:
        return sock, 2 * _CONNECT_GIVE_UP_S
    return sock, network.delay_s(sock.host, target) + network.delay_s(target, sock.host)


def _finish_connection(network: Network, sock: SimulatedSocket, address: tuple[str, int]) -> None:
    listener = network.listeners.get(address)
    if listener is None or not listener.process.alive:
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    sock.address = (_address_of(network, sock.host), next(_ports))
    context = network.kernel.in_process(listener.process)
    other = context.run(SimulatedSocket, network=network)
    other.address = address
    sock.peer, other.peer = other, sock
    network.streams[sock.number] = sock
    network.streams[other.number] = other
    listener.accepted.append(other)
    listener._notify()


def _address_of(network: Network, host: Host) -> str:
    return next((address for address, each in network.hosts.items() if each is host), "10.9.9.9")


def create_connection(address: tuple[str, int], timeout: float | None = None) -> SimulatedSocket:
    """As socket.create_connection, in a simulated thread."""
    network = NETWORK[-1]
    sock, delay_s = _start_connection(network, address)
    limit_s = _CONNECT_GIVE_UP_S if timeout is None else timeout
    kernel().block(min(delay_s, limit_s), "network")
    if delay_s >= limit_s:
        raise TimeoutError("timed out")
    _finish_connection(network, sock, address)
    return sock


class SimulatedTlsStream:
    """As ckptd.net.tls_stream.TlsStream, without TLS."""

    def __init__(
        self, raw: SimulatedSocket, context: SimulatedContext, *, server_side: bool
    ) -> None:
        self.tls = raw
        self._context = context
        self._server_side = server_side
        self.fileno = raw.fileno
        self.settimeout = raw.settimeout
        self.recv_into = raw.recv_into
        self.sendall = raw.sendall
        self.close = raw.close

    def shake_hands(self) -> None:
        self.tls.greet(self._context.certificate)
        while not self.tls.take_greeting(self._context):
            self.tls.wait_for_more(len(self.tls.inbox))

    async def shake_hands_on_loop(self) -> None:
        await shaken(self.tls, self._context)
        self.tls.greet(self._context.certificate)

    def pending(self) -> bool:
        return False

    def rest(self) -> None:
        pass

    def shutdown(self) -> None:
        self.tls.shutdown(real_socket.SHUT_RDWR)


async def shaken(sock: SimulatedSocket, context: SimulatedContext) -> None:
    """On the loop: the other side's certificate is here."""
    while not sock.take_greeting(context):
        size = len(sock.inbox)
        while len(sock.inbox) == size and not sock.ended and sock.error is None:
            await readable(sock)


async def readable(sock: SimulatedSocket) -> None:
    """On the loop: something has come."""
    arrived = asyncio.Event()
    sock.on_readable = arrived.set
    try:
        await arrived.wait()
    finally:
        sock.on_readable = None


class Poll:
    """As select.poll, for one socket."""

    def __init__(self) -> None:
        self._sock: SimulatedSocket | None = None

    def register(self, number: int, events: int) -> None:
        # The channel registers its socket by number right after it was made.
        self._sock = NETWORK[-1].streams[number]

    def poll(self, timeout_ms: float) -> list[tuple[int, int]]:
        assert self._sock is not None
        ready = self._sock.readable() or (
            timeout_ms > 0 and self._sock.wait_readable(timeout_ms / 1000)
        )
        return [(self._sock.number, 1)] if ready else []


class SimulatedSelect:
    """The module `select` as the product sees it."""

    poll = Poll
    POLLIN = 1


class SimulatedSocketModule:
    """The module `socket` as the product sees it."""

    socket = SimulatedSocket
    create_connection = staticmethod(create_connection)
    gethostname = staticmethod(lambda: getattr(current_process(), "name", "outside"))

    def __getattr__(self, name: str) -> Any:
        return getattr(real_socket, name)


class SimulatedSsl:
    """The module `ssl` as the product sees it."""

    SSLContext = SimulatedContext
    OP_NO_TICKET = 0
    OP_NO_COMPRESSION = 0

    class VerifyFlags:
        VERIFY_X509_STRICT = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(real_ssl, name)


# -- the event loop's side


class SimulatedTransport(asyncio.Transport):
    """A connection as an asyncio transport, after the exchange of certificates."""

    def __init__(self, loop: Kernel, sock: SimulatedSocket, protocol: asyncio.Protocol) -> None:
        super().__init__({"ssl_object": sock, "peername": sock.getpeername(), "socket": sock})
        self._loop = loop
        self._sock = sock
        self._protocol = protocol
        self._paused = False
        self._closing = False
        self._lost = False
        self._context = sock.process.context
        sock.on_readable = self._read
        protocol.connection_made(self)
        loop.call_soon(self._read, context=self._context)

    def _read(self) -> None:
        sock = self._sock
        if not self._reads():
            return
        if sock.inbox and not self._closing:
            self._protocol.data_received(sock.take_all())
        if not self._reads():
            return
        if sock.error is not None:
            self._lose(sock.error)
        elif sock.ended:
            self._lose(None)

    def _reads(self) -> bool:
        return not (self._lost or self._paused)

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self._lost = self._closing = True
        self._sock.on_readable = None
        self._loop.call_soon(self._protocol.connection_lost, error, context=self._context)
        self._loop.call_soon(self._sock.close, context=self._context)

    def write(self, data: Any) -> None:
        if not self._closing and not self._lost:
            self._sock.transmit(bytes(data))

    def writelines(self, list_of_data: Any) -> None:
        self.write(b"".join(bytes(each) for each in list_of_data))

    def is_closing(self) -> bool:
        return self._closing

    def pause_reading(self) -> None:
        self._paused = True

    def resume_reading(self) -> None:
        if self._paused:
            self._paused = False
            self._loop.call_soon(self._read, context=self._context)

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._sock.transmit(None)
            self._lose(None)

    def abort(self) -> None:
        if not self._lost:
            self._sock.reset()
            self._lose(None)


class SimulatedLoop(Kernel):
    """The kernel with what the product asks of a loop about sockets."""

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        sock = NETWORK[-1].streams[fd]
        sock.on_readable = lambda: callback(*args)
        if sock.readable():
            sock._notify()

    def remove_reader(self, fd: Any) -> bool:
        sock = NETWORK[-1].streams.get(fd)
        if sock is None:
            return False
        sock.on_readable = None
        return True

    async def sock_accept(self, sock: Any) -> tuple[Any, Any]:
        while not sock.accepted:
            if sock.closed:
                raise OSError(errno.EBADF, "closed")
            await readable(sock)
        accepted = sock.accepted.pop(0)
        return accepted, accepted.getpeername()

    async def create_connection(  # type: ignore[override]
        self, factory: Callable[[], Any], host: str, port: int, *, ssl: Any, **_: Any
    ) -> tuple[SimulatedTransport, Any]:
        network = NETWORK[-1]
        sock, delay_s = _start_connection(network, (host, port))
        await asyncio.sleep(delay_s)
        if delay_s >= _CONNECT_GIVE_UP_S:
            raise TimeoutError(errno.ETIMEDOUT, "no answer")
        _finish_connection(network, sock, (host, port))
        try:
            sock.greet(ssl.certificate)
            await shaken(sock, ssl)
        except BaseException:
            sock.close()
            raise
        protocol = factory()
        return SimulatedTransport(self, sock, protocol), protocol

    async def connect_accepted_socket(  # type: ignore[override]
        self, factory: Callable[[], Any], sock: Any, *, ssl: Any, **_: Any
    ) -> tuple[SimulatedTransport, Any]:
        await shaken(sock, ssl)
        sock.greet(ssl.certificate)
        protocol = factory()
        return SimulatedTransport(self, sock, protocol), protocol
