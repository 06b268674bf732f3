"""The protocol's grammar as tables: complete, and enforced on the header alone."""

import pytest

from ckptd.core import limits
from ckptd.errors import LimitExceeded, ProtocolError
from ckptd.wire import exchanges, messages
from ckptd.wire.exchanges import Channel
from ckptd.wire.frames import FrameHeader
from ckptd.wire.messages import Message


def header_of(kind: type[Message], body_bytes: int = 0, payload_bytes: int = 0) -> FrameHeader:
    return FrameHeader(messages.NUMBERS[kind], 1, 0, body_bytes, payload_bytes)


def test_every_type_is_a_hello_a_request_or_a_response_and_only_one_of_them() -> None:
    requests = set(exchanges.REQUESTS)
    assert requests | exchanges.RESPONSES | {messages.Hello} == set(messages.TYPES.values())
    # ShardData answers GetShard, and carries what a PutShard announced.
    assert not requests & exchanges.RESPONSES


@pytest.mark.parametrize("kind", exchanges.REQUESTS)
def test_a_request_and_its_answers_share_a_channel(kind: type[Message]) -> None:
    for answer in exchanges.REQUESTS[kind] | exchanges.ANY_REQUEST | {messages.Progress}:
        assert exchanges.channel_of(kind) & exchanges.channel_of(answer)


def test_shards_travel_on_bulk_connections_only() -> None:
    for kind in (
        messages.PutShard,
        messages.PushShard,
        messages.Ready,
        messages.PutResult,
        messages.GetShard,
        messages.ShardData,
    ):
        assert exchanges.channel_of(kind) is Channel.BULK


@pytest.mark.parametrize("kind", messages.TYPES.values())
def test_a_control_peer_can_make_a_node_collect_documents_at_most(kind: type[Message]) -> None:
    limit = exchanges.PAYLOADS_MAX_BYTES.get(kind, 0)
    if exchanges.channel_of(kind) & Channel.CONTROL:
        assert limit <= limits.DOCUMENTS_PAYLOAD_MAX_BYTES < limits.FRAME_PAYLOAD_MAX_BYTES
    longest = header_of(kind, exchanges.body_limit(kind), limit)
    channel = next(c for c in Channel if c & exchanges.channel_of(kind))
    assert exchanges.check_header(longest, channel, peer="pi1") is kind
    for header in (
        longest._replace(payload_bytes=limit + 1),
        longest._replace(body_bytes=exchanges.body_limit(kind) + 1),
    ):
        with pytest.raises(LimitExceeded, match=kind.__name__):
            exchanges.check_header(header, channel, peer="pi1")


def test_the_longest_document_fits_into_a_request_and_the_longest_request_into_the_budget() -> None:
    document = messages.SignedDocument(
        bytes(limits.DOCUMENT_MAX_BYTES), bytes(limits.SIGNATURE_ENVELOPE_MAX_BYTES)
    )
    assert len(messages.encode_documents((document,))) <= limits.DOCUMENTS_PAYLOAD_MAX_BYTES
    longest = limits.REQUEST_BODY_MAX_BYTES + limits.DOCUMENTS_PAYLOAD_MAX_BYTES
    assert longest <= limits.CONTROL_UNANSWERED_MAX_BYTES


@pytest.mark.parametrize(
    "message",
    [
        messages.Have((b"\xff" * 32,) * limits.SHARDS_PER_MESSAGE_MAX, touch=True),
        messages.Verify((b"\xff" * 32,) * limits.SHARDS_PER_MESSAGE_MAX),
        messages.Inventory((b"\xff" * 32,) * limits.VERSIONS_PER_MESSAGE_MAX),
        messages.GetDocuments((b"\xff" * 32,) * limits.DOCUMENTS_PER_MESSAGE_MAX),
        messages.HaveReply(
            b"\xff" * (limits.SHARDS_PER_MESSAGE_MAX // 8), (1e9,) * limits.SHARDS_PER_MESSAGE_MAX
        ),
        messages.PutDocumentsReply(
            (messages.PutDocumentResult(b"\xff" * 32, "no: " + "x" * 800),)
            * limits.DOCUMENTS_PER_MESSAGE_MAX
        ),
    ],
)
def test_the_largest_counts_fit_into_a_body(message: Message) -> None:
    assert len(messages.encode(message)) <= exchanges.body_limit(type(message))


def test_the_wrong_channel_is_refused() -> None:
    with pytest.raises(ProtocolError, match="sent PutShard on a control connection"):
        exchanges.check_header(header_of(messages.PutShard), Channel.CONTROL, peer="pi1")
    with pytest.raises(ProtocolError, match="sent Have on a bulk connection"):
        exchanges.check_header(header_of(messages.Have), Channel.BULK, peer="pi1")


def test_unknown_types_are_refused_by_number() -> None:
    with pytest.raises(ProtocolError, match="type 77, which is reserved"):
        exchanges.check_header(FrameHeader(77, 1, 0, 0, 0), Channel.CONTROL, peer="pi1")
