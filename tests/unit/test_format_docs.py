"""The descriptions of the formats say what the code does: every field, type, limit and number."""

import re
from enum import Enum
from pathlib import Path

import msgspec
import msgspec.inspect as inspect
import pytest

from ckptd.core import documents, limits
from ckptd.wire import exchanges, frames, messages
from ckptd.wire.messages import Message

FORMATS = Path(__file__).parents[2] / "docs" / "formats"
WIRE = (FORMATS / "wire.md").read_text()
DOCUMENTS = (FORMATS / "documents.md").read_text()

PATTERNS = {
    "64 hex digits": documents.Hex64,
    "32 hex digits": documents.Nonce,
    "40 hex digits": documents.Serial,
    "time": documents.Time,
    "node id": documents.NodeId,
}


def sections(text: str) -> dict[str, str]:
    """The text below each heading of the third level, up to the next heading."""
    found = re.findall(r"^### (.+?)\n(.*?)(?=^#{1,3} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(dict(found)) == len(found), "a heading stands twice"
    return dict(found)


def rows(section: str) -> list[list[str]]:
    """The cells of the table in `section`, without its two head lines."""
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def number(value: float | None) -> str:
    if value is not None and abs(value) >= 1e300:
        return "-max" if value < 0 else "max"
    return "2^62" if value == 2**62 else f"{value:g}" if isinstance(value, float) else str(value)


def described(info: inspect.Type) -> str:
    """How the second column of the tables writes the type `info`."""
    match info:
        case inspect.IntType(ge=low, le=high):
            return f"integer {number(low)} to {number(high)}"
        case inspect.FloatType(ge=low, le=high):
            return f"number {number(low)} to {number(high)}"
        case inspect.BoolType():
            return "bool"
        case inspect.NoneType():
            return "nil"
        case inspect.StrType(pattern=str(pattern)):
            return next(
                name
                for name, kind in PATTERNS.items()
                if inspect.type_info(kind) == inspect.StrType(pattern=pattern)
            )
        case inspect.StrType(max_length=length):
            return f"text ≤ {length}"
        case inspect.BytesType(min_length=low, max_length=high):
            return f"{high} bytes" if low == high else f"bytes ≤ {high}"
        case inspect.VarTupleType(item_type=item, min_length=low, max_length=length):
            count = "" if length is None else f" ≤ {length}" if not low else f" {low} to {length}"
            return f"array{count} of {described(item)}"
        case inspect.DictType(key_type=key, value_type=value, max_length=length):
            return f"map ≤ {length} from {described(key)} to {described(value)}"
        case inspect.UnionType(types=types):
            return " or ".join(described(choice) for choice in types)
        case inspect.LiteralType(values=values):
            return " or ".join(f"`{value}`" for value in values)
        case inspect.StructType(cls=cls):
            return str(cls.__name__)
    raise AssertionError(f"no words for {info}")


def expected_rows(kind: type[msgspec.Struct]) -> list[tuple[str, str]]:
    """Field and type of each row that the table of `kind` must have; optional fields say so."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    tag = [(f"`{info.tag_field}`", f"`{info.tag}`")] if info.tag_field else []
    return tag + [
        (f"`{field.name}`", described(field.type) + ("" if field.required else ", optional"))
        for field in info.fields
    ]


def records_below(kinds: list[type[msgspec.Struct]]) -> set[type[msgspec.Struct]]:
    """All structures that fields of `kinds` hold, at any depth."""
    found: set[type[msgspec.Struct]] = set()
    waiting: list[inspect.Type] = [inspect.type_info(kind) for kind in kinds]
    while waiting:
        match waiting.pop():
            case inspect.StructType(cls=cls, fields=fields):
                found.add(cls)
                waiting += [field.type for field in fields]
            case inspect.VarTupleType(item_type=item):
                waiting.append(item)
            case inspect.UnionType(types=types):
                waiting += types
            case _:
                pass
    return found


MESSAGES = list(messages.TYPES.values())
RECORDS = sorted(
    (records_below([*MESSAGES, messages.SignedDocument]) - set(MESSAGES)), key=lambda k: k.__name__
)
DOCUMENT_RECORDS = sorted(
    records_below(
        [
            documents.Manifest,
            documents.Tombstone,
            documents.Pin,
            documents.Unpin,
            documents.Member,
            documents.Drain,
            documents.Undrain,
            documents.Maintenance,
            documents.Forget,
        ]
    ),
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_is_described(kind: type[Message]) -> None:
    section = sections(WIRE)[f"{messages.NUMBERS[kind]} {kind.__name__}"]
    assert [(row[0], row[1]) for row in rows(section)] == expected_rows(kind)
    assert all(len(row) == 3 and row[2] for row in rows(section))


@pytest.mark.parametrize("kind", RECORDS)
def test_every_record_of_a_message_is_described(kind: type[msgspec.Struct]) -> None:
    section = sections(WIRE)[kind.__name__]
    assert [(row[0], row[1]) for row in rows(section)] == expected_rows(kind)
    assert all(len(row) == 3 and row[2] for row in rows(section))


def named(enum: Enum) -> str:
    return str(enum.name).lower()


def direction_line(kind: type[Message]) -> str:
    """The line under the heading of a message: direction, channel, answers, payload."""
    channel = f"{named(exchanges.channel_of(kind))} connections"
    if exchanges.channel_of(kind) is exchanges.Channel.BOTH:
        channel = "both kinds of connections"
    if kind is messages.Hello:
        line = f"Both directions, {channel}."
    elif kind in exchanges.REQUESTS:
        answers = " or ".join(sorted(answer.__name__ for answer in exchanges.REQUESTS[kind]))
        line = f"Request, {channel}. Answer: {answers}."
    else:
        line = f"Response, {channel}."
    payload = exchanges.PAYLOADS_MAX_BYTES.get(kind)
    return line + (f" Payload: at most {payload:,} bytes." if payload else "")


@pytest.mark.parametrize("kind", MESSAGES)
def test_every_message_has_its_direction_channel_and_payload(kind: type[Message]) -> None:
    section = sections(WIRE)[f"{messages.NUMBERS[kind]} {kind.__name__}"]
    assert section.strip().splitlines()[0] == direction_line(kind)


def test_nothing_else_is_described() -> None:
    names = {f"{messages.NUMBERS[kind]} {kind.__name__}" for kind in MESSAGES}
    assert set(sections(WIRE)) == names | {kind.__name__ for kind in RECORDS}
    assert set(sections(DOCUMENTS)) == {kind.__name__ for kind in DOCUMENT_RECORDS}


def test_the_header_table_has_the_offsets_of_the_header() -> None:
    table = WIRE.split("## Frame")[1].split("\n## ")[0]
    offset = 0
    sizes = []
    for row in rows(table):
        assert row[0] == str(offset)
        sizes.append(int(row[1]))
        offset += sizes[-1]
    assert offset == frames.HEADER_BYTES
    assert sizes == [4, 1, 1, 2, 2, 2, 4, 8, 8]


@pytest.mark.parametrize(
    "name",
    [
        "FRAME_BODY_MAX_BYTES",
        "REQUEST_BODY_MAX_BYTES",
        "FRAME_PAYLOAD_MAX_BYTES",
        "DOCUMENTS_PAYLOAD_MAX_BYTES",
        "CATALOGUE_DOCUMENTS_MAX",
        "CONTROL_REQUESTS_MAX",
        "CONTROL_UNANSWERED_MAX_BYTES",
        "CHAIN_HOPS_MAX",
        "DOCUMENT_MAX_BYTES",
        "ENTRIES_MAX",
        "PATH_IN_CHECKPOINT_MAX_BYTES",
    ],
)
def test_limits_are_told_with_their_values(name: str) -> None:
    line = f"| `{name}` | {getattr(limits, name):,} |"
    assert line in WIRE or line in DOCUMENTS


def test_versions_and_reserved_numbers_are_told() -> None:
    assert f"protocol version ({frames.PROTOCOL_VERSION})" in WIRE
    assert "64 to 79" in WIRE and "80 to 95" in WIRE
    assert (messages.RESERVED.start, messages.RESERVED.stop) == (64, 96)


@pytest.mark.parametrize("kind", DOCUMENT_RECORDS)
def test_every_document_and_record_is_described(kind: type[msgspec.Struct]) -> None:
    section = sections(DOCUMENTS)[kind.__name__]
    assert [(row[0], row[1]) for row in rows(section)] == expected_rows(kind)
    assert all(len(row) == 3 and row[2] for row in rows(section))
