"""Peers that do what no peer of ours would: raw frames over real TLS, or no TLS at all."""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ckptd.client.pki import IssuedFiles
from ckptd.net.tls import client_context
from ckptd.wire import frames, messages
from ckptd.wire.frames import FrameHeader
from ckptd.wire.messages import Message

TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Place:
    """Where a node listens."""

    node: str
    host: str
    control: int
    bulk: int

    @property
    def ports(self) -> tuple[int, int]:
        return self.control, self.bulk

    @property
    def hop(self) -> messages.Hop:
        return messages.Hop(self.node, self.host, self.bulk)


def hello(cluster: str = "home", node: str = "mallory") -> messages.Hello:
    return messages.Hello(cluster, node, ("worker",), "0", 0, 0)


def without_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def files_of(directory: Path, name: str) -> IssuedFiles:
    """The files of an identity that was issued into `directory`."""
    return IssuedFiles(directory / "ca.pem", directory / f"{name}.pem", directory / f"{name}.key")


class RawPeer:
    """A TLS connection on which a test says what it likes."""

    def __init__(
        self,
        host: str,
        port: int,
        identity: IssuedFiles | ssl.SSLContext,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        if isinstance(identity, IssuedFiles):
            identity = client_context(identity.ca, identity.cert, identity.key)
        raw = socket.create_connection((host, port), timeout=timeout_s)
        try:
            self.sock = identity.wrap_socket(raw)
        except BaseException:
            raw.close()
            raise

    def send(
        self, message: Message, *, request_id: int = 0, payload: bytes = b"", hop: int = 0
    ) -> None:
        self.sock.sendall(frames.encode_frame(message, request_id, len(payload), hop=hop) + payload)

    def announce(self, number: int, body: int, payload: int, *, request_id: int = 1) -> None:
        """Sends a header with lengths of which nothing follows."""
        self.sock.sendall(frames.encode_header(number, request_id, body, payload))

    def promise(self, message: Message, payload: int, *, request_id: int = 1, hop: int = 0) -> None:
        """Sends a message whose payload does not follow."""
        self.sock.sendall(frames.encode_frame(message, request_id, payload, hop=hop))

    def receive(self) -> tuple[FrameHeader, Message, bytes]:
        """The next frame. Raises ConnectionError when there is none any more."""
        header = frames.parse_header(self._exactly(frames.HEADER_BYTES), peer="node")
        body = self._exactly(header.body_bytes)
        payload = self._exactly(header.payload_bytes)
        return header, messages.decode(header.type, body, peer="node"), payload

    def greet(self, *, cluster: str = "home", hop: int = 0) -> Message:
        """Says hello; what is answered."""
        self.send(hello(cluster), hop=hop)
        return self.receive()[1]

    def ask(
        self, message: Message, *, payload: bytes = b"", request_id: int = 1, hop: int = 0
    ) -> Message:
        """Sends a request; its answer without the payload, past Progress."""
        self.send(message, request_id=request_id, payload=payload, hop=hop)
        while isinstance(answer := self.receive()[1], messages.Progress):
            pass
        return answer

    def is_given_up(self) -> bool:
        """Whether the node refuses this connection with an Error, or ends it."""
        try:
            header, message, _ = self.receive()
        except TimeoutError:
            return False
        except OSError:
            return True
        return isinstance(message, messages.Error) and header.request_id == 0

    def is_closed(self, timeout_s: float = TIMEOUT_S) -> bool:
        """Whether the node ends this connection in time; what it says before is ignored."""
        deadline_s = time.monotonic() + timeout_s
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                self.sock.settimeout(left_s)
                if not self.sock.recv(65536):
                    return True
        except TimeoutError:
            return False
        except OSError:
            return True
        return False

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise ConnectionError("the node closed the connection")
            data += piece
        return bytes(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            # Reset: a test's thousand connections must not linger.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def is_refused(host: str, port: int, identity: IssuedFiles | ssl.SSLContext) -> bool:
    """Whether a peer with this certificate gets no hello."""
    try:
        with RawPeer(host, port, identity) as peer:
            return not isinstance(peer.greet(), messages.Hello)
    except OSError:
        return True


@contextlib.contextmanager
def half_open(host: str, ports: tuple[int, ...], count: int) -> Iterator[list[socket.socket]]:
    """`count` connections to each port that say nothing. The node may close any of them."""
    sockets: list[socket.socket] = []
    try:
        for _ in range(count):
            for port in ports:
                sockets.append(socket.create_connection((host, port), timeout=TIMEOUT_S))
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def peak_memory_bytes(pid: int) -> int:
    """The largest resident size that a process has had (VmHWM of proc(5))."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no VmHWM of process {pid}")
