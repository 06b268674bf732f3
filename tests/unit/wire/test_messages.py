"""Message bodies: what is encoded is decoded, and everything else is refused."""

import math
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.errors import ProtocolError
from ckptd.wire import messages
from ckptd.wire.messages import Message, SignedDocument

DIGEST = b"\x11" * 32
ITEMS_IN_SAMPLES_MAX = 3


def values_of(info: inspect.Type) -> st.SearchStrategy[Any]:
    """Any value that the schema `info` allows; collections stay short."""
    match info:
        case inspect.IntType(ge=low, le=high):
            return st.integers(low, high)
        case inspect.FloatType(ge=low, le=high):
            return st.floats(low, high)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.StrType(max_length=length):
            return st.text(max_size=min(length or 0, 8))
        case inspect.BytesType(min_length=low, max_length=high):
            return st.binary(min_size=low or 0, max_size=max(low or 0, min(high or 0, 40)))
        case inspect.VarTupleType(item_type=item, min_length=low):
            lists = st.lists(values_of(item), min_size=low or 0, max_size=ITEMS_IN_SAMPLES_MAX)
            return lists.map(tuple)
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(values_of(key), values_of(value), max_size=ITEMS_IN_SAMPLES_MAX)
        case inspect.UnionType(types=types):
            return st.one_of([values_of(choice) for choice in types])
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: values_of(field.type) for field in fields})
    raise AssertionError(f"no values for {info}")


MESSAGES = st.one_of([values_of(inspect.type_info(kind)) for kind in messages.TYPES.values()])


def unbounded_fields(info: inspect.Type, path: str) -> list[str]:
    """Fields below `info` that a peer could fill without a limit."""
    match info:
        case inspect.IntType(ge=low, le=high) | inspect.FloatType(ge=low, le=high):
            return [path] if low is None or high is None else []
        case inspect.StrType(max_length=length) | inspect.BytesType(max_length=length):
            return [path] if length is None else []
        case inspect.VarTupleType(item_type=item, max_length=length):
            return ([path] if length is None else []) + unbounded_fields(item, f"{path}[]")
        case inspect.DictType(key_type=key, value_type=value, max_length=length):
            below = unbounded_fields(key, f"{path} keys") + unbounded_fields(value, f"{path}[]")
            return ([path] if length is None else []) + below
        case inspect.UnionType(types=types):
            return [found for choice in types for found in unbounded_fields(choice, path)]
        case inspect.StructType(fields=fields):
            return [
                found
                for field in fields
                for found in unbounded_fields(field.type, f"{path}.{field.name}")
            ]
        case inspect.BoolType() | inspect.NoneType():
            return []
    raise AssertionError(f"{path}: no rule for {info}")


@given(MESSAGES)
def test_what_is_encoded_is_decoded(message: Message) -> None:
    number = messages.NUMBERS[type(message)]
    assert messages.decode(number, messages.encode(message), peer="pi1") == message


@pytest.mark.parametrize("kind", messages.TYPES.values())
def test_every_field_has_a_limit(kind: type[Message]) -> None:
    assert unbounded_fields(inspect.type_info(kind), kind.__name__) == []


@given(st.sampled_from(sorted(messages.TYPES)), st.binary(max_size=200))
def test_random_bodies_are_a_message_or_a_protocol_error(number: int, body: bytes) -> None:
    try:
        message = messages.decode(number, body, peer="pi1")
    except ProtocolError:
        return
    assert type(message) is messages.TYPES[number]


@given(MESSAGES, st.data())
def test_mutated_bodies_are_a_message_or_a_protocol_error(
    message: Message, data: st.DataObject
) -> None:
    number = messages.NUMBERS[type(message)]
    body = bytearray(messages.encode(message))
    position = data.draw(st.integers(0, len(body) - 1))
    body[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(body)))
    for mutant in (body, body[:cut]):
        try:
            assert type(messages.decode(number, mutant, peer="pi1")) is type(message)
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "type 0, which is unknown: upgrade this node"),
        (31, "type 31, which is unknown"),
        (65535, "type 65535, which is unknown"),
        (64, "type 64, which is reserved for a later version"),
        (95, "type 95, which is reserved for a later version"),
        (96, "type 96, which is unknown"),
    ],
)
def test_unknown_and_reserved_types_are_refused_clearly(number: int, words: str) -> None:
    with pytest.raises(ProtocolError, match=words):
        messages.decode(number, b"\x80", peer="pi1")


def test_no_type_has_a_reserved_number_and_numbers_are_unique() -> None:
    assert not set(messages.TYPES) & set(messages.RESERVED)
    assert len(messages.NUMBERS) == len(messages.TYPES)


HAVE = {"shards": [DIGEST], "touch": False}
STATUS = msgspec.to_builtins(
    messages.NodeStatus("pi1", "up", 1, 1, 1, 1.0, 0, 0, 0, 0, 0, DIGEST, 0, "1", 0, 1.0),
    builtin_types=(bytes,),
)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (messages.Have, HAVE | {"extra": 1}),
        (messages.Have, {"touch": False}),
        (messages.Have, HAVE | {"touch": 1}),
        (messages.Have, HAVE | {"shards": DIGEST}),
        (messages.Have, HAVE | {"shards": [DIGEST[:31]]}),
        (messages.Have, HAVE | {"shards": [DIGEST + b"\0"]}),
        (messages.Have, HAVE | {"shards": [DIGEST.hex()]}),
        (messages.Have, HAVE | {"shards": [DIGEST] * (limits.SHARDS_PER_MESSAGE_MAX + 1)}),
        (messages.Inventory, {"versions": [DIGEST] * (limits.VERSIONS_PER_MESSAGE_MAX + 1)}),
        (messages.GetDocuments, {"ids": [DIGEST] * (limits.DOCUMENTS_PER_MESSAGE_MAX + 1)}),
        (messages.ListDocuments, {"after": b"\0" * 33}),
        (messages.PutShard, {"shard": DIGEST, "size": 0}),
        (messages.PutShard, {"shard": DIGEST, "size": limits.SHARD_SIZE_MAX_BYTES + 1}),
        (messages.PutShard, {"shard": DIGEST, "size": 2**63}),
        (messages.PutShard, {"shard": DIGEST, "size": -1}),
        (messages.PushShard, {"shard": DIGEST, "size": 1, "chain": []}),
        (messages.PushShard, {"shard": DIGEST, "size": 1, "chain": [{"node": "a"}]}),
        (messages.Error, {"code": "x", "message": "y" * 8193}),
        (messages.Busy, {"retry_after_s": math.nan}),
        (messages.Busy, {"retry_after_s": math.inf}),
        (messages.Busy, {"retry_after_s": -1.0}),
        (messages.NodeStatus, STATUS | {"write_bytes_per_s": math.nan}),
        (messages.NodeStatus, STATUS | {"write_bytes_per_s": math.inf}),
        (messages.NodeStatus, STATUS | {"bytes_free": -1}),
        (messages.SyncReply, {"equal": True, "count": 2**62 + 1}),
    ],
)
def test_wrong_bodies_are_refused(kind: type[Message], body: dict[str, Any]) -> None:
    raw = msgspec.msgpack.encode(body)
    with pytest.raises(ProtocolError, match=f"pi1: sent a malformed {kind.__name__}"):
        messages.decode(messages.NUMBERS[kind], raw, peer="pi1")


def test_the_bodies_that_were_made_wrong_are_right_without_the_fault() -> None:
    for kind, body in ((messages.Have, HAVE), (messages.NodeStatus, STATUS)):
        raw = msgspec.msgpack.encode(body)
        assert type(messages.decode(messages.NUMBERS[kind], raw, peer="pi1")) is kind


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of 2^32 - 1 items, none of which follows
        b"\xdf\xff\xff\xff\xff",
        b"\x81\xa6shards\xdd\xff\xff\xff\xff",
        b"\x81\xa6shards\x91\xc6\xff\xff\xff\xff",
        b"\x81\xa6shards" + b"\x91" * 100_000,
        b"\x81\xa1x" + b"\x91" * 100_000,
        b"\x81\xa6\xff\xfe\xfd\xfc\xfb\xfa\x90",
        messages.encode(messages.Have((DIGEST,))) + b"\0",
        b"",
    ],
)
def test_absurd_counts_and_depths_are_refused_without_being_believed(body: bytes) -> None:
    with pytest.raises(ProtocolError):
        messages.decode(messages.NUMBERS[messages.Have], body, peer="pi1")


@given(
    st.lists(
        st.builds(SignedDocument, st.binary(max_size=20), st.binary(max_size=20)), max_size=4
    ).map(tuple)
)
def test_documents_travel_as_payload(documents: tuple[SignedDocument, ...]) -> None:
    payload = messages.encode_documents(documents)
    assert messages.decode_documents(memoryview(payload), peer="pi1") == documents


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        msgspec.msgpack.encode([{"document": b"", "signature": b"", "more": 1}]),
        msgspec.msgpack.encode(
            [{"document": b"", "signature": b""}] * (limits.DOCUMENTS_PER_MESSAGE_MAX + 1)
        ),
        msgspec.msgpack.encode(
            [{"document": b"", "signature": bytes(limits.SIGNATURE_ENVELOPE_MAX_BYTES + 1)}]
        ),
    ],
)
def test_malformed_document_payloads_are_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="malformed documents"):
        messages.decode_documents(payload, peer="pi1")


@given(st.frozensets(st.binary(min_size=32, max_size=32), max_size=6))
def test_document_ids_travel_sorted(ids: frozenset[bytes]) -> None:
    payload = messages.encode_document_ids(ids)
    reply = messages.SyncReply(equal=False, count=len(ids))
    assert messages.decode_document_ids(reply, payload, peer="pi1") == b"".join(sorted(ids))
    equal = messages.SyncReply(equal=True, count=len(ids))
    assert bytes(messages.decode_document_ids(equal, b"", peer="pi1")) == b""


@pytest.mark.parametrize(
    ("reply", "payload"),
    [
        (messages.SyncReply(False, 1), b""),
        (messages.SyncReply(False, 1), b"\0" * 31),
        (messages.SyncReply(False, 1), b"\0" * 33),
        (messages.SyncReply(False, 2), b"\0" * 64),
        (messages.SyncReply(False, 2), b"\1" * 32 + b"\0" * 32),
        (messages.SyncReply(True, 1), b"\0" * 32),
    ],
)
def test_wrong_document_ids_are_refused(reply: messages.SyncReply, payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="document ids"):
        messages.decode_document_ids(reply, payload, peer="pi1")
