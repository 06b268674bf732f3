"""The state machine of control connections: every rule, under any fragmentation."""

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.errors import LimitExceeded, PeerBusy, PeerUnreachable, ProtocolError
from ckptd.wire import frames, messages
from ckptd.wire.connection import (
    Buffer,
    Connection,
    ConnectionRefused,
    Event,
    HelloReceived,
    RequestReceived,
    ResponseReceived,
)
from ckptd.wire.messages import Message

HELLO = messages.Hello("home", "pi1", ("worker",), "0.1.0", 1_000, 2_000)
DIGEST = b"\x11" * 32
STATUS = messages.NodeStatus("pi1", "up", 1, 1, 1, 1.0, 0, 0, 0, 0, 0, DIGEST, 0, "0.1.0", 0, 1.0)
BAD = messages.Error("protocol", "no")


def joined(chunks: Iterable[Buffer]) -> bytes:
    return b"".join(bytes(chunk) for chunk in chunks)


def frame(message: Message, request_id: int = 1, payload: bytes = b"", hop: int = 0) -> bytes:
    return frames.encode_frame(message, request_id, len(payload), hop=hop) + payload


def greeted() -> tuple[Connection, Connection]:
    """A client and a server that have exchanged their hellos."""
    client, server = Connection("client", "server"), Connection("server", "client")
    assert server.receive_data(joined(client.send_hello(HELLO))) == [HelloReceived(HELLO)]
    assert client.receive_data(joined(server.send_hello(HELLO))) == [HelloReceived(HELLO)]
    return client, server


def in_fragments(connection: Connection, data: bytes, sizes: Iterable[int]) -> list[Event]:
    events: list[Event] = []
    start = 0
    for size in sizes:
        events += connection.receive_data(data[start : start + size])
        start += size
    return events + connection.receive_data(data[start:])


def test_a_request_and_its_answer() -> None:
    client, server = greeted()
    request_id, chunks = client.send_request(messages.PutDocuments(1), b"payload", hop=2)
    assert client.unanswered == (request_id,)
    assert server.receive_data(joined(chunks)) == [
        RequestReceived(request_id, 2, messages.PutDocuments(1), memoryview(b"payload"))
    ]
    assert server.unanswered == (request_id,)
    answer = messages.PutDocumentsReply(())
    assert client.receive_data(joined(server.send_response(request_id, answer))) == [
        ResponseReceived(request_id, answer, memoryview(b""), final=True)
    ]
    assert len(client.unanswered) + len(server.unanswered) == 0


def test_progress_comes_any_number_of_times_before_the_final_answer() -> None:
    client, server = greeted()
    request_id, chunks = client.send_request(messages.Verify((DIGEST,)))
    server.receive_data(joined(chunks))
    for _ in range(3):
        progress = joined(server.send_response(request_id, messages.Progress(())))
        assert client.receive_data(progress) == [
            ResponseReceived(request_id, messages.Progress(()), memoryview(b""), final=False)
        ]
    final = joined(server.send_response(request_id, messages.VerifyReply(("ok",))))
    [event] = client.receive_data(final)
    assert isinstance(event, ResponseReceived) and event.final
    with pytest.raises(ProtocolError, match="nobody waits for"):
        client.receive_data(progress)


def test_answers_come_in_any_order() -> None:
    client, server = greeted()
    ids = []
    for _ in range(3):
        request_id, chunks = client.send_request(messages.Ping())
        server.receive_data(joined(chunks))
        ids.append(request_id)
    assert len(set(ids)) == 3
    for request_id in reversed(ids):
        [event] = client.receive_data(joined(server.send_response(request_id, STATUS)))
        assert isinstance(event, ResponseReceived) and event.request_id == request_id


def test_a_payload_is_a_view_that_nobody_can_change_and_is_not_copied_when_sent() -> None:
    client, server = greeted()
    payload = memoryview(bytearray(b"x" * 1000))
    _, chunks = client.send_request(messages.PutDocuments(1), payload)
    assert chunks[1] is payload
    [event] = server.receive_data(joined(chunks))
    assert isinstance(event, RequestReceived)
    assert event.payload.readonly and event.payload == payload


def test_a_payload_of_wide_items_is_counted_in_bytes() -> None:
    client, server = greeted()
    wide = memoryview(bytes(80)).cast("Q")
    _, chunks = client.send_request(messages.PutDocuments(1), wide)
    [event] = server.receive_data(joined(chunks))
    assert isinstance(event, RequestReceived) and event.payload.nbytes == 80


SESSION = [
    (messages.Ping(), b""),
    (messages.PutDocuments(1), b"p" * 300),
    (messages.Have((DIGEST,) * 5, touch=True), b""),
    (messages.PutDocuments(2), b"q"),
]


@given(st.lists(st.integers(0, 90), max_size=40))
def test_fragments_of_any_size_give_the_same_events(sizes: list[int]) -> None:
    client, server = Connection("client", "server"), Connection("server", "client")
    to_server = joined(client.send_hello(HELLO))
    expected_requests: list[Event] = [HelloReceived(HELLO)]
    to_client = joined(server.send_hello(HELLO))
    expected_answers: list[Event] = [HelloReceived(HELLO)]
    ids = []
    for message, payload in SESSION:
        request_id, chunks = client.send_request(message, payload)
        to_server += joined(chunks)
        expected_requests.append(RequestReceived(request_id, 0, message, memoryview(payload)))
        ids.append(request_id)
    assert in_fragments(server, to_server, sizes) == expected_requests
    for request_id in ids:
        to_client += joined(server.send_response(request_id, messages.Busy()))
        expected_answers.append(
            ResponseReceived(request_id, messages.Busy(), memoryview(b""), True)
        )
    assert in_fragments(client, to_client, sizes) == expected_answers
    client.receive_eof()
    server.receive_eof()
    assert client.closed and server.closed


@given(st.sampled_from(["client", "server"]), st.lists(st.binary(max_size=80), max_size=5))
def test_random_bytes_are_refused(side: str, pieces: list[bytes]) -> None:
    connection = Connection("client" if side == "client" else "server", "peer")
    try:
        for piece in pieces:
            assert connection.receive_data(piece) == []
    except ProtocolError:
        assert connection.closed
    assert len(b"".join(pieces)) < 32 or connection.closed


@given(st.data())
def test_mutated_sessions_give_events_or_one_protocol_error(data: st.DataObject) -> None:
    stream = bytearray(frame(HELLO, 0))
    for request_id, (message, payload) in enumerate(SESSION, start=1):
        stream += frame(message, request_id, payload)
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(stream) - 1))
        stream[position] ^= data.draw(st.integers(1, 255))
    server = Connection("server", "client")
    events: list[Event] = []
    try:
        events = in_fragments(server, bytes(stream), data.draw(st.lists(st.integers(0, 99))))
    except ProtocolError:
        assert server.closed
        with pytest.raises(ProtocolError, match="over"):
            server.receive_data(b"")
    assert len(events) <= 1 + len(SESSION)
    assert not events or isinstance(events[0], HelloReceived | ConnectionRefused)


# Greeting


@pytest.mark.parametrize("side", ["client", "server"])
@pytest.mark.parametrize(
    ("first", "words"),
    [
        (frame(messages.Ping(), 1), "sent Ping before it said hello"),
        (frame(STATUS, 1), "sent NodeStatus before it said hello"),
        (frame(HELLO, 1), "sent Hello before it said hello"),
        (frame(messages.Ping(), 0), "sent Ping without a request id"),
        (frame(BAD, 1), "sent Error before it said hello"),
        (frame(messages.GetShard(DIGEST), 1), "sent GetShard on a control connection"),
        (frames.encode_header(70, 1, 0), "type 70, which is reserved"),
        (frames.encode_header(1, 0, 0), "malformed Hello"),
        (b"\x16\x03\x01\x02\x00" + bytes(27), "does not speak the ckptd protocol"),
    ],
)
def test_the_first_frame_is_hello(side: str, first: bytes, words: str) -> None:
    connection = Connection("client" if side == "client" else "server", "peer")
    with pytest.raises(ProtocolError, match=words):
        connection.receive_data(first)
    assert connection.closed


def test_hello_comes_once() -> None:
    client, server = greeted()
    for connection in (client, server):
        with pytest.raises(ProtocolError, match="sent Hello without a request id"):
            connection.receive_data(frame(HELLO, 0))
    client, server = greeted()
    for connection in (client, server):
        with pytest.raises(ValueError, match="once"):
            connection.send_hello(HELLO)
    with pytest.raises(ProtocolError, match="Hello, which is no request"):
        server.receive_data(frame(HELLO, 7))


def test_nothing_is_sent_before_hello() -> None:
    client = Connection("client", "server")
    with pytest.raises(ValueError, match="Hello is sent first"):
        client.send_request(messages.Ping())
    assert client.unanswered == ()
    server = Connection("server", "client")
    server.receive_data(frame(HELLO, 0) + frame(messages.Ping(), 1))
    with pytest.raises(ValueError, match="Hello is sent first"):
        server.send_response(1, STATUS)
    assert server.unanswered == (1,)


def test_a_client_may_ask_before_it_has_heard_the_servers_hello() -> None:
    client = Connection("client", "server")
    client.send_hello(HELLO)
    request_id, _ = client.send_request(messages.Ping())
    events = client.receive_data(frame(HELLO, 0) + frame(STATUS, request_id))
    assert [type(event) for event in events] == [HelloReceived, ResponseReceived]


# Refusals


@pytest.mark.parametrize("said_hello", [True, False])
def test_either_side_can_end_a_connection_with_a_reason(said_hello: bool) -> None:
    for number in (0, 1):
        pair = (
            greeted()
            if said_hello
            else (Connection("client", "server"), Connection("server", "client"))
        )
        refusing, refused = pair[number], pair[1 - number]
        refusal = joined(refusing.send_refusal(BAD))
        assert refused.receive_data(refusal + b"what follows is not read") == [
            ConnectionRefused(BAD)
        ]
        assert refusing.closed and refused.closed
        assert refusing.send_refusal(BAD) == refused.send_refusal(BAD) == []
        refused.receive_eof()
        refusing.receive_eof()
        for connection in pair:
            with pytest.raises(PeerUnreachable, match="over"):
                connection.send_hello(HELLO)
            with pytest.raises(ProtocolError, match="over"):
                connection.receive_data(b"x")


def test_a_refusal_can_follow_a_protocol_error() -> None:
    server = Connection("server", "client")
    with pytest.raises(ProtocolError):
        server.receive_data(b"GET / HTTP/1.1\r\nHost: example.com\r\n")
    client = Connection("client", "server")
    assert client.receive_data(joined(server.send_refusal(BAD))) == [ConnectionRefused(BAD)]


def test_a_dead_connection_sends_nothing_else() -> None:
    client, server = greeted()
    server.receive_data(joined(client.send_request(messages.Ping())[1]))
    for connection in (client, server):
        with pytest.raises(ProtocolError):
            connection.receive_data(bytes(32))
    with pytest.raises(PeerUnreachable, match="over"):
        client.send_request(messages.Ping())
    with pytest.raises(PeerUnreachable, match="over"):
        server.send_response(1, STATUS)
    assert client.unanswered == server.unanswered == (1,)


# Requests and responses


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame(STATUS, 1), "sent NodeStatus, which is no request"),
        (frame(messages.Progress(()), 1), "sent Progress, which is no request"),
        (frame(BAD, 1), "sent Error, which is no request"),
        (frame(messages.PutShard(DIGEST, 1), 1), "PutShard on a control connection"),
        (frame(messages.Ping(), 1) * 2, "used request id 1 twice"),
        (frame(messages.Ping(), 0), "Ping without a request id"),
        (frame(messages.Ping(), 1, b"x"), "payload of 1 bytes after Ping, over the limit of 0"),
    ],
)
def test_what_a_server_refuses(data: bytes, words: str) -> None:
    _, server = greeted()
    with pytest.raises(ProtocolError, match=words):
        server.receive_data(data)
    assert server.closed


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (frame(messages.Ping(), 1), "answered Ping with Ping"),
        (frame(messages.Ping(), 7), "answered request 7, which nobody waits for"),
        (frame(STATUS, 2), "answered request 2, which nobody waits for"),
        (frame(messages.HaveReply(b"", ()), 1), "answered Ping with HaveReply"),
        (frame(STATUS, 1) * 2, "nobody waits for"),
        (frame(STATUS, 1, hop=1), "answered with hop 1"),
        (frame(STATUS, 0), "NodeStatus without a request id"),
        (frame(messages.Ready(True), 1), "Ready on a control connection"),
    ],
)
def test_what_a_client_refuses(data: bytes, words: str) -> None:
    client, _ = greeted()
    client.send_request(messages.Ping())
    with pytest.raises(ProtocolError, match=words):
        client.receive_data(data)
    assert client.closed


@pytest.mark.parametrize(
    "message", [HELLO, STATUS, messages.Progress(()), messages.GetShard(DIGEST), BAD]
)
def test_a_client_sends_requests_of_control_connections_only(message: Message) -> None:
    client, _ = greeted()
    with pytest.raises(ValueError, match=type(message).__name__):
        client.send_request(message)
    assert client.unanswered == ()


def test_a_server_sends_no_requests_and_a_client_no_responses() -> None:
    client, server = greeted()
    with pytest.raises(ValueError, match="a server sends no Ping"):
        server.send_request(messages.Ping())
    request_id, _ = client.send_request(messages.Ping())
    with pytest.raises(ValueError, match="not waiting for an answer"):
        client.send_response(request_id, STATUS)


def test_a_server_answers_each_request_once_and_with_what_fits() -> None:
    client, server = greeted()
    request_id, chunks = client.send_request(messages.Ping())
    with pytest.raises(ValueError, match="request 1 is not waiting"):
        server.send_response(request_id, STATUS)
    server.receive_data(joined(chunks))
    with pytest.raises(ValueError, match="HaveReply does not answer Ping"):
        server.send_response(request_id, messages.HaveReply(b"", ()))
    with pytest.raises(ValueError, match="payload of 1 bytes"):
        server.send_response(request_id, STATUS, b"x")
    assert server.unanswered == (request_id,)
    server.send_response(request_id, BAD)
    with pytest.raises(ValueError, match="not waiting"):
        server.send_response(request_id, STATUS)


def test_request_ids_wrap_around_and_skip_those_in_use() -> None:
    client, _ = greeted()
    first, _ = client.send_request(messages.Ping())
    client._next_id = 2**32 - 1
    assert client.send_request(messages.Ping())[0] == 2**32 - 1
    assert first == 1 and client.send_request(messages.Ping())[0] == 2
    client._next_id = 1
    assert client.send_request(messages.Ping())[0] == 3


# Limits


def test_the_number_of_unanswered_requests_is_limited_on_both_sides() -> None:
    client, server = greeted()
    for _ in range(limits.CONTROL_REQUESTS_MAX):
        server.receive_data(joined(client.send_request(messages.Ping())[1]))
    with pytest.raises(PeerBusy, match="64 requests"):
        client.send_request(messages.Ping())
    client.receive_data(joined(server.send_response(1, STATUS)))
    server.receive_data(joined(client.send_request(messages.Ping())[1]))
    with pytest.raises(LimitExceeded, match="over 64 requests at a time"):
        server.receive_data(frame(messages.Ping(), 1000))


def test_the_bytes_of_unanswered_requests_are_limited_on_both_sides() -> None:
    client, server = greeted()
    payload = bytes(limits.CONTROL_UNANSWERED_MAX_BYTES // 2 + 1)
    request_id, chunks = client.send_request(messages.PutDocuments(1), payload)
    server.receive_data(joined(chunks))
    with pytest.raises(PeerBusy, match="bytes of requests"):
        client.send_request(messages.PutDocuments(1), payload)
    assert client.unanswered == (request_id,)
    answer = joined(server.send_response(request_id, messages.PutDocumentsReply(())))
    client.receive_data(answer)
    _, chunks = client.send_request(messages.PutDocuments(1), payload)
    server.receive_data(joined(chunks))
    # The header alone decides: nothing of the payload has come.
    announced = frames.encode_frame(messages.PutDocuments(1), 1000, len(payload))
    with pytest.raises(LimitExceeded, match="bytes at a time"):
        server.receive_data(announced[: frames.HEADER_BYTES])


@pytest.mark.parametrize("size", [limits.DOCUMENTS_PAYLOAD_MAX_BYTES + 1, 2**28, 2**63, 2**64 - 1])
def test_absurd_payloads_are_refused_by_their_header(size: int) -> None:
    _, server = greeted()
    header = frames.encode_header(messages.NUMBERS[messages.PutDocuments], 1, 10, size)
    with pytest.raises(LimitExceeded, match=str(size)):
        server.receive_data(header)


@pytest.mark.parametrize("size", [limits.REQUEST_BODY_MAX_BYTES + 1, 2**63, 2**64 - 1])
def test_absurd_bodies_are_refused_by_their_header(size: int) -> None:
    _, server = greeted()
    header = frames.encode_header(messages.NUMBERS[messages.Have], 1, size)
    with pytest.raises(LimitExceeded, match=str(size)):
        server.receive_data(header)


def test_what_is_over_a_limit_is_not_sent() -> None:
    client, _ = greeted()
    too_long = bytes(limits.DOCUMENTS_PAYLOAD_MAX_BYTES + 1)
    with pytest.raises(ValueError, match="this side: announced a payload"):
        client.send_request(messages.PutDocuments(1), too_long)
    assert client.unanswered == ()


def test_an_announced_payload_costs_memory_only_as_it_arrives() -> None:
    _, server = greeted()
    announced = frames.encode_frame(messages.PutDocuments(1), 1, limits.DOCUMENTS_PAYLOAD_MAX_BYTES)
    assert server.receive_data(announced + b"x") == []
    assert server._reader._part.__sizeof__() < 10_000


# The end


def test_an_end_between_frames_with_nothing_open_is_clean() -> None:
    for connection in greeted():
        connection.receive_eof()
        connection.receive_eof()
        assert connection.closed


@pytest.mark.parametrize("length", [1, 31, 32, 33, len(frame(HELLO, 0)) - 1])
def test_an_end_inside_a_frame_is_reported(length: int) -> None:
    server = Connection("server", "client")
    server.receive_data(frame(HELLO, 0)[:length])
    with pytest.raises(PeerUnreachable, match="in the middle of a frame"):
        server.receive_eof()


def test_an_end_before_hello_is_reported() -> None:
    with pytest.raises(PeerUnreachable, match="before it said hello"):
        Connection("client", "server").receive_eof()


def test_an_end_with_unanswered_requests_is_reported_to_who_asked() -> None:
    client, server = greeted()
    server.receive_data(joined(client.send_request(messages.Ping())[1]))
    with pytest.raises(PeerUnreachable, match="1 requests unanswered"):
        client.receive_eof()
    server.receive_eof()
    assert client.unanswered == (1,)
