"""Documents: canonical bytes, and the refusal of everything that is not exactly well made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from ckptd.core import documents, limits
from ckptd.core.documents import (
    DirectoryEntry,
    Document,
    Entry,
    FileEntry,
    Manifest,
    Member,
    Part,
    Pin,
    RemovedContent,
    ShardReference,
    SymlinkEntry,
    Tombstone,
    UnknownDocument,
    Unpin,
    content_id,
)
from ckptd.errors import DocumentRefused

CLUSTER = "home"
TIME = "2026-01-02T03:04:05Z"
HEX = "0123456789abcdef" * 4
OTHER = "f" * 64

hexes = st.binary(min_size=32, max_size=32).map(bytes.hex)
orders = st.integers(0, 2**62)
times = st.datetimes().map(lambda moment: moment.isoformat(timespec="microseconds") + "Z")
segments = st.text(
    st.characters(exclude_characters="/", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=5
).filter(lambda segment: segment not in (".", ".."))
name_segments = st.text(st.sampled_from("abcdé-_.0"), min_size=1, max_size=6).filter(
    lambda segment: segment not in (".", "..")
)


@st.composite
def entry_tuples(draw: st.DrawFn, shards: tuple[ShardReference, ...]) -> tuple[Entry, ...]:
    """Entries of one directory, their parts inside `shards`."""
    entries: list[Entry] = []
    for name in draw(st.lists(segments, max_size=5, unique=True)):
        match draw(st.sampled_from(["file", "directory", "symlink"] if shards else ["directory"])):
            case "file":
                parts = draw(st.lists(parts_inside(shards), max_size=3))
                size = sum(part.length for part in parts)
                entries.append(FileEntry(name, draw(modes), size, draw(hexes), tuple(parts)))
            case "directory":
                entries.append(DirectoryEntry(name, draw(modes)))
                below = draw(st.none() | segments)
                if below is not None:
                    entries.append(DirectoryEntry(f"{name}/{below}", draw(modes)))
            case _:
                entries.append(SymlinkEntry(name, draw(segments)))
    return tuple(entries)


@st.composite
def parts_inside(draw: st.DrawFn, shards: tuple[ShardReference, ...]) -> Part:
    number = draw(st.integers(0, len(shards) - 1))
    offset = draw(st.integers(0, shards[number].size - 1))
    return Part(number, offset, draw(st.integers(1, shards[number].size - offset)))


modes = st.integers(0, 0o777)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    shards = tuple(
        ShardReference(digest, draw(st.integers(1, limits.SHARD_SIZE_MAX_BYTES)))
        for digest in draw(st.lists(hexes, max_size=4, unique=True))
    )
    entries = draw(entry_tuples(shards))
    return Manifest(
        format=1,
        cluster=CLUSTER,
        name="/".join(draw(st.lists(name_segments, min_size=1, max_size=4))),
        order=draw(orders),
        created=draw(times),
        host=draw(st.text(max_size=10)),
        nonce=draw(st.binary(min_size=16, max_size=16)).hex(),
        unit="directory",
        content_id=content_id(entries),
        copies=draw(st.integers(1, limits.CLUSTER_NODES_MAX)),
        redundancy="copies",
        mode=draw(modes),
        entries=entries,
        shards=shards,
        tensor_index=draw(st.none() | st.integers(0, len(shards) - 1)) if shards else None,
        step=draw(st.none() | st.integers(0, 2**62)),
        metrics=draw(
            st.dictionaries(
                st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False), max_size=3
            )
        ),
    )


FIXED = {"format": st.just(1), "cluster": st.just(CLUSTER), "order": orders, "created": times}
nonces = st.binary(min_size=16, max_size=16).map(bytes.hex)
tombstones = st.builds(
    Tombstone,
    **FIXED,
    nonce=nonces,
    reason=st.just("rm"),
    versions=st.lists(hexes, max_size=3).map(tuple),
    contents=st.lists(st.builds(RemovedContent, hexes, hexes), max_size=3).map(tuple),
    justified_by=st.none(),
)
pins = st.builds(Pin, **FIXED, nonce=nonces, version=hexes)
unpins = st.builds(Unpin, **FIXED, nonce=nonces, pins=st.lists(hexes, max_size=3).map(tuple))
members = st.builds(
    Member,
    **FIXED,
    node=st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,8}[a-z0-9])?", fullmatch=True),
    roles=st.lists(st.sampled_from(["worker", "coordinator"]), max_size=2).map(tuple),
    address=st.text(max_size=20),
    bulk_port=st.integers(0, 65535),
    zone=st.text(max_size=8),
)
ANY_DOCUMENT: st.SearchStrategy[Document] = st.one_of(
    manifests(), tombstones, pins, unpins, members
)


def decode(raw: bytes) -> Document | UnknownDocument:
    return documents.decode(raw, cluster=CLUSTER)


def manifest_of(*entries: Entry, shards: tuple[ShardReference, ...] = ()) -> Manifest:
    """A manifest of `entries`, right in everything else."""
    return Manifest(
        format=1,
        cluster=CLUSTER,
        name="run/a",
        order=1,
        created=TIME,
        host="mac",
        nonce="0" * 32,
        unit="directory",
        content_id=content_id(entries),
        copies=2,
        redundancy="copies",
        mode=0o755,
        entries=entries,
        shards=shards,
    )


PIN = Pin(format=1, cluster=CLUSTER, order=1, created=TIME, nonce="0" * 32, version=HEX)
TOMBSTONE = Tombstone(
    format=1, cluster=CLUSTER, order=1, created=TIME, nonce="0" * 32, reason="rm", versions=(HEX,)
)
MEMBER = Member(
    format=1,
    cluster=CLUSTER,
    order=1,
    created=TIME,
    node="pi1",
    roles=("worker",),
    address="10.0.0.1:7701",
    bulk_port=7702,
)
TEN = (ShardReference(HEX, 10),)


def a_file(path: str = "f", *parts: Part, size: int | None = None) -> FileEntry:
    total = sum(part.length for part in parts) if size is None else size
    return FileEntry(path, 0o644, total, OTHER, parts)


@given(ANY_DOCUMENT)
def test_what_is_encoded_is_decoded(document: Document) -> None:
    raw = documents.encode(document)
    assert decode(raw) == document
    assert documents.document_id(raw) == hashlib.sha256(raw).hexdigest()


@given(ANY_DOCUMENT)
def test_canonical_bytes_are_sorted_compact_json(document: Document) -> None:
    raw = documents.encode(document)
    plain = json.loads(raw)
    assert list(plain) == sorted(plain)
    assert b"\n" not in raw and json.loads(raw.decode("utf-8")) == plain


@given(ANY_DOCUMENT, st.data())
def test_every_other_spelling_is_refused(document: Document, data: st.DataObject) -> None:
    raw = documents.encode(document)
    plain = json.loads(raw)
    keys = data.draw(st.permutations(sorted(plain)))
    shuffled = {key: plain[key] for key in keys}
    spellings = [
        json.dumps(plain, ensure_ascii=False).encode(),
        json.dumps(shuffled, ensure_ascii=False, separators=(",", ":")).encode(),
        raw + b"\n",
        b" " + raw,
        raw.replace(b'"order":', b'"order":0,"order":'),
        raw.replace(b'"kind"', b'"\\u006bind"'),
    ]
    for spelling in spellings:
        if spelling != raw:
            with pytest.raises(DocumentRefused):
                decode(spelling)


@given(ANY_DOCUMENT, st.data())
def test_mutated_bytes_are_a_document_of_another_id_or_refused(
    document: Document, data: st.DataObject
) -> None:
    raw = bytearray(documents.encode(document))
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    try:
        assert decode(bytes(raw)) != document
    except DocumentRefused:
        pass


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(raw: bytes) -> None:
    with pytest.raises(DocumentRefused):
        decode(raw)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"null",
        b"[]",
        b'{"kind":"\xff"}',
        b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"kind":"new","format":9,"cluster":"home","order":1,"x":' + b"[" * 100_000,
        b'{"kind":"new","format":0,"cluster":"home","order":1}',
        b'{"kind":"new","format":9,"cluster":"home","order":-1}',
        b'{"kind":"new","format":9,"cluster":"home","order":4611686018427387905}',
        b'{"kind":"new","format":9,"cluster":"home","order":99999999999999999999999999}',
        b'{"kind":"new","format":9,"cluster":"home"}',
        b'{"kind":"new","format":9,"order":1}',
        b" " * (limits.DOCUMENT_MAX_BYTES + 1),
    ],
    ids=range(14),
)
def test_what_has_not_the_four_common_fields_is_refused(raw: bytes) -> None:
    with pytest.raises(DocumentRefused, match=r"cannot be read|over the limit"):
        decode(raw)


def test_the_document_of_another_cluster_is_refused() -> None:
    raw = documents.encode(PIN)
    with pytest.raises(DocumentRefused, match="belongs to cluster 'home', this one is 'office'"):
        documents.decode(raw, cluster="office")
    unknown = b'{"kind":"new","format":9,"cluster":"office","order":1}'
    with pytest.raises(DocumentRefused, match="belongs to cluster"):
        decode(unknown)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"kind":"lease","format":1,"cluster":"home","order":7}',
        b'{"kind":"pin","format":2,"cluster":"home","order":7}',
        b'{"order":7, "what":[{"nobody":"knows"}],"kind":"lease","cluster":"home","format":3}',
    ],
)
def test_unknown_kinds_and_formats_are_kept_and_not_understood(raw: bytes) -> None:
    document = decode(raw)
    assert isinstance(document, UnknownDocument)
    assert document.order == 7 and (document.kind, document.format) not in documents.KNOWN


def test_known_kinds_are_those_of_the_union() -> None:
    union = inspect.type_info(Document)
    assert isinstance(union, inspect.UnionType)
    tags = {kind.tag for kind in union.types if isinstance(kind, inspect.StructType)}
    assert {(tag, documents.FORMAT) for tag in tags} == documents.KNOWN


def changed(document: Document, **fields: Any) -> bytes:
    """Canonical JSON of `document` with other fields, past the types."""
    plain = msgspec.json.decode(documents.encode(document)) | fields
    return msgspec.json.encode(plain, order="sorted")


@pytest.mark.parametrize(
    ("document", "fields"),
    [
        (PIN, {"version": HEX + "\n"}),
        (PIN, {"version": HEX.upper()}),
        (PIN, {"version": HEX[:63]}),
        (PIN, {"nonce": "0" * 32 + "\n"}),
        (PIN, {"nonce": ""}),
        (PIN, {"extra": 1}),
        (PIN, {"order": 2**63}),
        (PIN, {"order": 1.0}),
        (PIN, {"created": "yesterday"}),
        (PIN, {"created": TIME + "\n"}),
        (PIN, {"created": "2026-01-02T03:04:05+01:00"}),
        (PIN, {"created": "2026-02-30T03:04:05Z"}),
        (PIN, {"created": "0000-01-02T03:04:05Z"}),
        (MEMBER, {"node": "../pi1"}),
        (MEMBER, {"node": "pi1\n"}),
        (MEMBER, {"node": "p" * 64}),
        (MEMBER, {"roles": ["admin"]}),
        (MEMBER, {"roles": ["worker"] * 3}),
        (MEMBER, {"bulk_port": 65536}),
        (TOMBSTONE, {"reason": "spite"}),
        (TOMBSTONE, {"versions": [HEX] * (limits.TOMBSTONE_VERSIONS_MAX + 1)}),
        (TOMBSTONE, {"reason": "retention"}),
        (TOMBSTONE, {"justified_by": OTHER}),
        (TOMBSTONE, {"reason": "retention", "justified_by": HEX}),
        (manifest_of(), {"unit": "file"}),
        (manifest_of(), {"unit": "socket"}),
        (manifest_of(), {"copies": 0}),
        (manifest_of(), {"copies": limits.CLUSTER_NODES_MAX + 1}),
        (manifest_of(), {"redundancy": "parity"}),
        (manifest_of(), {"mode": 0o1777}),
        (manifest_of(), {"content_id": OTHER}),
        (manifest_of(), {"name": "../run"}),
        (manifest_of(), {"name": ""}),
        (manifest_of(), {"name": "/etc"}),
        (manifest_of(), {"name": "a@b"}),
        (manifest_of(), {"tensor_index": 0}),
        (manifest_of(), {"step": -1}),
        (manifest_of(), {"metrics": {"loss": None}}),
        (manifest_of(), {"metrics": {str(n): 1.5 for n in range(limits.METRICS_MAX + 1)}}),
        (manifest_of(), {"shards": [[HEX, 0]]}),
        (manifest_of(), {"shards": [[HEX, limits.SHARD_SIZE_MAX_BYTES + 1]]}),
        (manifest_of(), {"shards": [[HEX, 1, 2]]}),
        (manifest_of(), {"shards": [[HEX, 5], [HEX, 6]]}),
    ],
)
def test_wrong_fields_are_refused(document: Document, fields: dict[str, Any]) -> None:
    assert decode(documents.encode(document)) == document
    with pytest.raises(DocumentRefused):
        decode(changed(document, **fields))


def test_a_retention_tombstone_that_names_another_version_is_taken() -> None:
    document = replace(TOMBSTONE, reason="retention", justified_by=OTHER)
    assert decode(documents.encode(document)) == document


@pytest.mark.parametrize("number", ["1e999", "-1e999", "NaN", "Infinity"])
def test_metrics_are_finite(number: str) -> None:
    raw = documents.encode(replace(manifest_of(), metrics={"loss": 0.5}))
    with pytest.raises(DocumentRefused):
        decode(raw.replace(b"0.5", number.encode()))


def test_more_entries_than_the_limit_are_refused() -> None:
    entries = tuple(DirectoryEntry(str(n), 0o755) for n in range(limits.ENTRIES_MAX + 1))
    raw = documents.encode(manifest_of(*entries))
    with pytest.raises(DocumentRefused, match="malformed"):
        decode(raw)


@pytest.mark.parametrize(
    "path",
    [
        "..",
        "../x",
        "a/../../x",
        "a/..",
        ".",
        "./a",
        "/etc/passwd",
        "a//b",
        "a/",
        "",
        "a\0",
        "a\0zz",
        "a\x002f",  # the escape of "/", which is no undecodable byte
        "a" * (limits.PATH_IN_CHECKPOINT_MAX_BYTES + 1),
        "é" * (limits.PATH_IN_CHECKPOINT_MAX_BYTES // 2 + 1),
    ],
)
@pytest.mark.parametrize(
    "entry_of",
    [a_file, lambda path: DirectoryEntry(path, 0o755), lambda path: SymlinkEntry(path, "t")],
    ids=["file", "directory", "symlink"],
)
def test_paths_that_leave_the_checkpoint_are_refused(
    path: str, entry_of: Callable[[str], Entry]
) -> None:
    with pytest.raises(DocumentRefused):
        decode(documents.encode(manifest_of(entry_of(path))))


@pytest.mark.parametrize("target", ["/etc/passwd", "..", "../x", "a/../../x", "", "a\0"])
def test_symlinks_that_leave_the_checkpoint_are_refused(target: str) -> None:
    with pytest.raises(DocumentRefused):
        decode(documents.encode(manifest_of(SymlinkEntry("link", target))))


def test_file_names_that_are_not_utf_8_travel_escaped_and_never_raw() -> None:
    escaped = manifest_of(a_file("caf\x00e9"))
    assert decode(documents.encode(escaped)) == escaped
    with pytest.raises(DocumentRefused, match="UTF-8"):
        documents.encode(replace(manifest_of(), host="caf\udce9"))


@pytest.mark.parametrize(
    "entries",
    [
        (a_file("a"), a_file("a")),
        (a_file("a"), DirectoryEntry("a", 0o755)),
        (a_file("a"), a_file("a/b")),
        (SymlinkEntry("a", "t"), a_file("a/b")),
        (SymlinkEntry("a", "t"), a_file("a/b/c")),
        (SymlinkEntry("a", "t"), a_file("a!"), a_file("a/b")),
        (a_file("x/y/z"), DirectoryEntry("a", 0o755), SymlinkEntry("x/y", "t")),
    ],
)
def test_entries_that_clash_are_refused(entries: tuple[Entry, ...]) -> None:
    for ordered in (entries, entries[::-1]):
        with pytest.raises(DocumentRefused, match=r"two entries of the path|no directory"):
            decode(documents.encode(manifest_of(*ordered)))


def test_entries_below_directories_and_next_to_files_are_taken() -> None:
    document = manifest_of(
        a_file("a"), a_file("a!"), a_file("a.b"), DirectoryEntry("d", 0o700), a_file("d/a")
    )
    assert decode(documents.encode(document)) == document


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (a_file("f", Part(1, 0, 1)), "a part lies in a shard that is not listed"),
        (a_file("f", Part(2**62, 0, 1)), "not listed"),
        (a_file("f", Part(0, 0, 11)), "past the end of its shard"),
        (a_file("f", Part(0, 10, 1)), "past the end of its shard"),
        (a_file("f", Part(0, 2**62, 1)), "past the end of its shard"),
        (a_file("f", Part(0, 0, 5), size=6), "its parts have 5 bytes, not 6"),
        (a_file("f", Part(0, 0, 5), size=4), "its parts have 5 bytes, not 4"),
        (a_file("f", size=1), "its parts have 0 bytes, not 1"),
        (a_file("f", Part(0, 0, 0)), "malformed"),
        (a_file("f", Part(0, -1, 5)), "malformed"),
        (a_file("f", Part(-1, 0, 5)), "malformed"),
    ],
)
def test_parts_outside_of_their_shards_are_refused(entry: FileEntry, words: str) -> None:
    with pytest.raises(DocumentRefused, match=words):
        decode(documents.encode(manifest_of(entry, shards=TEN)))


def test_a_manifest_of_a_single_file_holds_exactly_that_file() -> None:
    one = replace(manifest_of(a_file("f", Part(0, 0, 10)), shards=TEN), unit="file")
    assert decode(documents.encode(one)) == one
    for entries in ((), (a_file("f"), a_file("g")), (DirectoryEntry("d", 0o755),)):
        wrong = replace(manifest_of(*entries), unit="file")
        with pytest.raises(DocumentRefused, match="exactly one file"):
            decode(documents.encode(wrong))


# Content ids

ENTRIES = (
    a_file("f", Part(0, 0, 10)),
    DirectoryEntry("d", 0o755),
    SymlinkEntry("l", "f"),
)


def test_a_content_id_depends_on_content_and_on_nothing_else() -> None:
    expected = content_id(ENTRIES)
    assert content_id(ENTRIES[::-1]) == expected
    cut_otherwise = (a_file("f", Part(3, 0, 5), Part(4, 5, 5)), *ENTRIES[1:])
    assert content_id(cut_otherwise) == expected


@pytest.mark.parametrize(
    "entries",
    [
        ENTRIES[:2],
        (replace(ENTRIES[0], path="g"), *ENTRIES[1:]),
        (replace(ENTRIES[0], mode=0o600), *ENTRIES[1:]),
        (replace(ENTRIES[0], size=11), *ENTRIES[1:]),
        (replace(ENTRIES[0], sha256=HEX), *ENTRIES[1:]),
        (ENTRIES[0], replace(ENTRIES[1], mode=0o700), ENTRIES[2]),
        (*ENTRIES[:2], replace(ENTRIES[2], target="d")),
        (*ENTRIES[:2], DirectoryEntry("l", 0)),
    ],
)
def test_a_content_id_tells_contents_apart(entries: tuple[Entry, ...]) -> None:
    assert content_id(entries) != content_id(ENTRIES)


def test_a_content_id_is_what_the_format_says() -> None:
    target = hashlib.sha256(b"f").hexdigest()
    rows = (
        f'[["d","directory",493,0,""],["f","file",420,10,"{OTHER}"],["l","symlink",0,0,"{target}"]]'
    )
    digest = hashlib.sha256(b"ckptd-content-v1\0" + rows.encode()).hexdigest()
    assert content_id(ENTRIES) == digest
