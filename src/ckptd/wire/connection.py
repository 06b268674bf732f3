"""The state of one control connection: bytes in, events out; calls in, bytes out.

No socket, clock or task is known here; `ckptd.net` moves the bytes. The rules of the protocol that
this module enforces, each of them also a security limit:

- The first frame in each direction is Hello, and it is the only one. In its place, and at any time
  later, a side may send an Error with request id 0: it refuses the whole connection, and says why.
- Requests come from the client's side only, responses from the server's side only, and only to
  request ids that are unanswered.
- At most `CONTROL_REQUESTS_MAX` requests are unanswered, and their bodies and payloads have at most
  `CONTROL_UNANSWERED_MAX_BYTES` together. Both sides count; the client does not send what the
  server would refuse.
- Nothing is collected before its header has passed every check; at most one frame is collected.
- A connection that broke a rule is dead: it takes no more input.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple, TypeAlias

from ckptd.core import limits
from ckptd.errors import LimitExceeded, PeerBusy, PeerUnreachable, ProtocolError
from ckptd.wire import exchanges, frames, messages
from ckptd.wire.exchanges import Channel
from ckptd.wire.messages import Error, Hello, Message, Progress

Buffer: TypeAlias = bytes | bytearray | memoryview

_REQUEST_ID_MAX: Final = 2**32 - 1
_CONNECTION_ID: Final = 0  # the request id of Hello, and of an Error that ends the connection


class HelloReceived(NamedTuple):
    """The peer's Hello, once and before every other event but ConnectionRefused."""

    message: Hello


class RequestReceived(NamedTuple):
    """Server's side: answer it with `send_response` under its `request_id`.
    `payload` is a read-only view of memory that nobody else uses."""

    request_id: int
    hop: int
    message: Message
    payload: memoryview


class ResponseReceived(NamedTuple):
    """Client's side: an answer. `final` is False for Progress only."""

    request_id: int
    message: Message
    payload: memoryview
    final: bool


class ConnectionRefused(NamedTuple):
    """The peer gives this connection up and says why. No event follows."""

    message: Error


Event: TypeAlias = HelloReceived | RequestReceived | ResponseReceived | ConnectionRefused


class _Request(NamedTuple):
    """An unanswered request. `held_bytes` is the size of its body and payload."""

    kind: type[Message]
    held_bytes: int


class Connection:
    """One side of one control connection.

    `peer` names the other side in errors. The methods that return lists of chunks expect them to be
    written in this order, and unchanged until they have been sent.
    """

    def __init__(self, side: Literal["client", "server"], peer: str) -> None:
        self.side: Final = side
        self.peer = peer
        self._hello_sent = False
        self._hello_received = False
        self._input_over = False
        self._output_over = False
        self._next_id = 1
        self._requests: dict[int, _Request] = {}
        self._held_bytes = 0
        self._frames_received = 0
        self._reader = _FrameReader()

    @property
    def unanswered(self) -> tuple[int, ...]:
        """Ids of the requests without a final response, oldest first. A shell that closes the
        connection fails them; one that gives up waiting leaves them: the answer may still come."""
        return tuple(self._requests)

    @property
    def collecting(self) -> bool:
        """Whether a frame has begun to arrive and not ended."""
        return self._reader.collecting

    @property
    def frames_received(self) -> int:
        """How many frames were complete so far."""
        return self._frames_received

    @property
    def announced_bytes(self) -> tuple[int, int]:
        """Body and payload of the frame that is being collected, in bytes, as its header announces
        them; (0, 0) while there is none. A shell that has no memory for it stops reading."""
        header = self._reader.header
        return (header.body_bytes, header.payload_bytes) if header is not None else (0, 0)

    def request_bytes(self, request_id: int) -> int:
        """Body and payload of an unanswered request, in bytes. Raises KeyError for any other."""
        return self._requests[request_id].held_bytes

    @property
    def closed(self) -> bool:
        """Whether the connection is of no further use: broken, refused or at its end."""
        return self._input_over or self._output_over

    # Bytes in

    def receive_data(self, data: Buffer) -> list[Event]:
        """The events in `data`, the next bytes of the stream in fragments of any size.

        Raises ProtocolError when the peer breaks a rule, LimitExceeded when it passes a limit. The
        connection is dead then, and what came before in the same `data` is lost with it: whoever
        waits for an answer learns that the connection ended. `send_refusal` is still allowed.
        """
        if self._input_over:
            raise ProtocolError(self.peer, "sent data on a connection that is over")
        events: list[Event] = []
        rest = memoryview(data)
        try:
            while True:
                part, rest = self._reader.take(rest)
                if part is None:
                    return events
                event = self._advance(part)
                if event is not None:
                    events.append(event)
                if isinstance(event, ConnectionRefused):
                    return events
        except ProtocolError:
            self._end_input()
            raise

    def receive_eof(self) -> None:
        """The stream ended. Raises PeerUnreachable if that leaves anything unfinished: a frame, the
        greeting, or (client's side) a request without its answer."""
        if self._input_over:
            return
        unfinished = self._reader.collecting
        self._end_input()
        if unfinished:
            raise PeerUnreachable(self.peer, "closed the connection in the middle of a frame")
        if not self._hello_received:
            raise PeerUnreachable(self.peer, "closed the connection before it said hello")
        if self.side == "client" and self._requests:
            raise PeerUnreachable(
                self.peer,
                f"closed the connection with {len(self._requests)} requests unanswered",
            )

    # Bytes out

    def send_hello(self, hello: Hello) -> list[Buffer]:
        """The first chunks to send. Raises ValueError when it was sent before, PeerUnreachable
        when the connection is over."""
        self._check_open()
        if self._hello_sent:
            raise ValueError("Hello is sent once")
        self._hello_sent = True
        return [frames.encode_frame(hello, _CONNECTION_ID)]

    def send_request(
        self, message: Message, payload: bytes | memoryview = b"", hop: int = 0
    ) -> tuple[int, list[Buffer]]:
        """The id of a new request, and the chunks to send.

        Raises PeerBusy when too many requests are unanswered or hold too many bytes: wait for an
        answer. Raises PeerUnreachable when the connection is over; ValueError for what the peer
        would refuse: a message that is no request of a control connection, a payload over its
        limit, or a request before `send_hello`.
        """
        self._check_open()
        kind = type(message)
        if self.side != "client" or kind not in exchanges.REQUESTS:
            raise ValueError(f"a {self.side} sends no {kind.__name__} as a request")
        request_id = self._free_id()
        chunks, size = self._encode(request_id, message, payload, hop)
        if len(self._requests) >= limits.CONTROL_REQUESTS_MAX:
            raise PeerBusy(self.peer, f"has {len(self._requests)} requests to answer first")
        if self._held_bytes + size > limits.CONTROL_UNANSWERED_MAX_BYTES:
            raise PeerBusy(self.peer, f"has {self._held_bytes} bytes of requests to answer first")
        self._open_request(request_id, kind, size)
        self._next_id = request_id % _REQUEST_ID_MAX + 1
        return request_id, chunks

    def send_response(
        self, request_id: int, message: Message, payload: bytes | memoryview = b""
    ) -> list[Buffer]:
        """The chunks of an answer to `request_id`; anything but Progress is the final one.

        Raises PeerUnreachable when the connection is over; ValueError for an unknown or answered
        request, a message that does not answer it, or a payload over its limit.
        """
        self._check_open()
        request = self._requests.get(request_id)
        if self.side != "server" or request is None:
            raise ValueError(f"request {request_id} is not waiting for an answer")
        if not _answers(type(message), request.kind):
            raise ValueError(f"{type(message).__name__} does not answer {request.kind.__name__}")
        chunks, _ = self._encode(request_id, message, payload, 0)
        if not isinstance(message, Progress):
            self._close_request(request_id)
        return chunks

    def send_refusal(self, error: Error) -> list[Buffer]:
        """The chunks that end the connection with a reason; close it after them. Empty when this
        side has ended it before, or the peer has."""
        if self._output_over:
            return []
        self._output_over = True
        self._end_input()
        return [frames.encode_frame(error, _CONNECTION_ID)]

    # Receiving, step by step

    def _advance(self, part: bytearray) -> Event | None:
        """Checks the header, body or payload that was just completed; an event at a frame's end."""
        reader = self._reader
        if reader.header is None:
            header = frames.parse_header(part, peer=self.peer)
            self._check_header(header)
            reader.start_body(header)
            return None
        if reader.message is None:
            reader.start_payload(messages.decode(reader.header.type, part, peer=self.peer))
            return None
        header, message = reader.header, reader.message
        reader.start_header()
        self._frames_received += 1
        return self._complete(header, message, memoryview(part).toreadonly())

    def _check_header(self, header: frames.FrameHeader) -> None:
        """Everything that can be refused before a byte of body or payload is collected."""
        kind = exchanges.check_header(header, Channel.CONTROL, peer=self.peer)
        if header.request_id == _CONNECTION_ID:
            if kind is Error or (kind is Hello and not self._hello_received):
                return
            raise ProtocolError(self.peer, f"sent {kind.__name__} without a request id")
        if not self._hello_received:
            raise ProtocolError(self.peer, f"sent {kind.__name__} before it said hello")
        if self.side == "server":
            self._check_request(header, kind)
        else:
            self._check_response(header, kind)

    def _check_request(self, header: frames.FrameHeader, kind: type[Message]) -> None:
        if kind not in exchanges.REQUESTS:
            raise ProtocolError(self.peer, f"sent {kind.__name__}, which is no request")
        if header.request_id in self._requests:
            raise ProtocolError(self.peer, f"used request id {header.request_id} twice")
        if len(self._requests) >= limits.CONTROL_REQUESTS_MAX:
            raise LimitExceeded(self.peer, f"sent over {len(self._requests)} requests at a time")
        held = self._held_bytes + header.body_bytes + header.payload_bytes
        if held > limits.CONTROL_UNANSWERED_MAX_BYTES:
            raise LimitExceeded(self.peer, f"sent requests of {held} bytes at a time")

    def _check_response(self, header: frames.FrameHeader, kind: type[Message]) -> None:
        request = self._requests.get(header.request_id)
        if request is None:
            raise ProtocolError(
                self.peer, f"answered request {header.request_id}, which nobody waits for"
            )
        if not _answers(kind, request.kind):
            raise ProtocolError(self.peer, f"answered {request.kind.__name__} with {kind.__name__}")
        if header.hop:
            raise ProtocolError(self.peer, f"answered with hop {header.hop}")

    def _complete(self, header: frames.FrameHeader, message: Message, payload: memoryview) -> Event:
        """The event of a frame that passed all checks."""
        if isinstance(message, Hello):
            self._hello_received = True
            return HelloReceived(message)
        if isinstance(message, Error) and header.request_id == _CONNECTION_ID:
            self._output_over = True
            self._end_input()
            return ConnectionRefused(message)
        if self.side == "server":
            size = header.body_bytes + header.payload_bytes
            self._open_request(header.request_id, type(message), size)
            return RequestReceived(header.request_id, header.hop, message, payload)
        final = not isinstance(message, Progress)
        if final:
            self._close_request(header.request_id)
        return ResponseReceived(header.request_id, message, payload, final)

    # State

    def _check_open(self) -> None:
        if self.closed:
            raise PeerUnreachable(self.peer, "the connection is over")

    def _end_input(self) -> None:
        self._input_over = True
        self._reader.start_header()

    def _free_id(self) -> int:
        request_id = self._next_id
        while request_id in self._requests:
            request_id = request_id % _REQUEST_ID_MAX + 1
        return request_id

    def _encode(
        self, request_id: int, message: Message, payload: bytes | memoryview, hop: int
    ) -> tuple[list[Buffer], int]:
        """The chunks of a frame, and the bytes of its body and payload."""
        if not self._hello_sent:
            raise ValueError("Hello is sent first")
        payload_bytes = memoryview(payload).nbytes
        frame = frames.encode_frame(message, request_id, payload_bytes, hop=hop)
        body_bytes = len(frame) - frames.HEADER_BYTES
        header = frames.FrameHeader(
            messages.NUMBERS[type(message)], request_id, hop, body_bytes, payload_bytes
        )
        try:
            exchanges.check_header(header, Channel.CONTROL, peer="this side")
        except ProtocolError as error:
            raise ValueError(error.message) from error
        chunks: list[Buffer] = [frame, payload] if payload_bytes else [frame]
        return chunks, body_bytes + payload_bytes

    def _open_request(self, request_id: int, kind: type[Message], held_bytes: int) -> None:
        self._requests[request_id] = _Request(kind, held_bytes)
        self._held_bytes += held_bytes

    def _close_request(self, request_id: int) -> None:
        self._held_bytes -= self._requests.pop(request_id).held_bytes


class _FrameReader:
    """Collects the three parts of one frame. It grows with what arrived, never by what a header
    announces."""

    def __init__(self) -> None:
        self.start_header()

    def start_header(self) -> None:
        self.header: frames.FrameHeader | None = None
        self.message: Message | None = None
        self._expect(frames.HEADER_BYTES)

    def start_body(self, header: frames.FrameHeader) -> None:
        self.header = header
        self._expect(header.body_bytes)

    def start_payload(self, message: Message) -> None:
        assert self.header is not None
        self.message = message
        self._expect(self.header.payload_bytes)

    @property
    def collecting(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self.header is not None or bool(self._part)

    def take(self, data: memoryview) -> tuple[bytearray | None, memoryview]:
        """The part that is complete with the start of `data`, or None; and the rest of `data`."""
        missing = self._expected_bytes - len(self._part)
        self._part += data[:missing]
        complete = len(self._part) == self._expected_bytes
        return self._part if complete else None, data[missing:]

    def _expect(self, size: int) -> None:
        self._part = bytearray()
        self._expected_bytes = size


def _answers(response: type[Message], request: type[Message]) -> bool:
    return (
        response is Progress
        or response in exchanges.ANY_REQUEST
        or response in exchanges.REQUESTS[request]
    )
