"""The immutable documents of the catalogue, and their canonical bytes.

A document is JSON with sorted keys, no white space, UTF-8; its id is the SHA-256 of exactly these
bytes (64 lower-case hex digits). The id of a manifest is the version id. `docs/formats/documents.md`
describes every field; golden files under `tests/golden` pin the bytes.

Formats are versioned by the pair (kind, format). What this version cannot read is kept as
`UnknownDocument`, passed on to other nodes byte for byte, and never acted upon.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from ckptd.core import limits
from ckptd.errors import DocumentRefused

FORMAT: Final = 1

Hex64: TypeAlias = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Order: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Mode: TypeAlias = Annotated[int, Meta(ge=0, le=0o777)]
PathText: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=3 * limits.PATH_IN_CHECKPOINT_MAX_BYTES)
]
NodeId: TypeAlias = Annotated[
    str, Meta(pattern=r"^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$")
]
ShortText: TypeAlias = Annotated[str, Meta(max_length=1024)]


class _Record(Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ShardReference(Struct, frozen=True, array_like=True):
    """A shard that a manifest names: its SHA-256 and its size in bytes."""

    shard: Hex64
    size: Annotated[int, Meta(ge=1, le=limits.SHARD_SIZE_MAX_BYTES)]


class Part(Struct, frozen=True, array_like=True):
    """`length` bytes of a file, found in shard number `shard_index` from `offset` on."""

    shard_index: Count
    offset: Count
    length: Annotated[int, Meta(ge=1, le=limits.SHARD_SIZE_MAX_BYTES)]


class FileEntry(_Record, frozen=True, tag_field="kind", tag="file"):
    """A file: its parts in order give its bytes. An empty file has no parts."""

    path: PathText
    mode: Mode
    size: Count
    sha256: Hex64
    parts: tuple[Part, ...]


class DirectoryEntry(_Record, frozen=True, tag_field="kind", tag="directory"):
    path: PathText
    mode: Mode


class SymlinkEntry(_Record, frozen=True, tag_field="kind", tag="symlink"):
    path: PathText
    target: PathText


Entry: TypeAlias = FileEntry | DirectoryEntry | SymlinkEntry


class Manifest(_Record, frozen=True, tag_field="kind", tag="manifest"):
    """One version of a checkpoint.

    `unit` says whether the checkpoint is a directory or a single file (then `entries` is that
    one file). `shards` lists each distinct shard once; parts refer to it by index.
    `tensor_index` is the index of the shard that holds the tensor index, or None.
    `created` (RFC 3339 UTC) and `host` are for display only: nothing is decided by them.
    """

    format: Literal[1]
    cluster: ShortText
    name: Annotated[str, Meta(max_length=limits.NAME_MAX_BYTES)]
    order: Order
    created: ShortText
    host: ShortText
    nonce: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    unit: Literal["directory", "file"]
    content_id: Hex64
    copies: Annotated[int, Meta(ge=1, le=limits.CLUSTER_NODES_MAX)]
    redundancy: Literal["copies"]
    mode: Mode
    entries: tuple[Entry, ...]
    shards: tuple[ShardReference, ...]
    tensor_index: Count | None = None
    step: int | None = None
    metrics: dict[str, float] = {}


class Tombstone(_Record, frozen=True, tag_field="kind", tag="tombstone"):
    """Versions that are dead for ever. `reason` "rm": somebody removed them;
    "retention": a policy did, justified by the live, protected version `justified_by`.
    `content_ids` lists what the versions held, so that nothing stores them again by itself.
    """

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: ShortText
    nonce: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    reason: Literal["rm", "retention"]
    versions: Annotated[
        tuple[Hex64, ...], Meta(max_length=limits.TOMBSTONE_VERSIONS_MAX)
    ]
    content_ids: Annotated[
        tuple[Hex64, ...], Meta(max_length=limits.TOMBSTONE_VERSIONS_MAX)
    ] = ()
    justified_by: Hex64 | None = None


class Pin(_Record, frozen=True, tag_field="kind", tag="pin"):
    """Protects one version from retention, until an unpin names this document."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: ShortText
    nonce: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    version: Hex64


class Unpin(_Record, frozen=True, tag_field="kind", tag="unpin"):
    """Takes back the pins whose document ids it names."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: ShortText
    nonce: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    pins: Annotated[tuple[Hex64, ...], Meta(max_length=limits.TOMBSTONE_VERSIONS_MAX)]


class Member(_Record, frozen=True, tag_field="kind", tag="member"):
    """A node about itself: where it was last reached. The newest by (order, id) counts."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: ShortText
    node: NodeId
    roles: tuple[Literal["worker", "coordinator"], ...]
    address: ShortText
    bulk_port: Annotated[int, Meta(ge=0, le=65535)]
    zone: ShortText = ""


Document: TypeAlias = Manifest | Tombstone | Pin | Unpin | Member

_decoder: msgspec.json.Decoder[Document] = msgspec.json.Decoder(Document)
_encoder = msgspec.json.Encoder(order="sorted")


class UnknownDocument(Struct, frozen=True):
    """A well-signed document of a kind or format that this version does not know."""

    kind: str
    format: int
    order: int


class _Envelope(Struct, frozen=True):
    kind: ShortText
    format: Annotated[int, Meta(ge=1, le=2**31)]
    cluster: ShortText
    order: Order


_envelope_decoder = msgspec.json.Decoder(_Envelope)
KNOWN: Final = frozenset(
    {(k, FORMAT) for k in ("manifest", "tombstone", "pin", "unpin", "member")}
)


def encode(document: Document) -> bytes:
    """The canonical bytes of `document`: those that are hashed, signed, stored and sent."""
    return _encoder.encode(document)


def document_id(raw: bytes) -> str:
    """The id of a document: SHA-256 of its canonical bytes, 64 lower-case hex digits."""
    return hashlib.sha256(raw).hexdigest()


def decode(raw: bytes, *, cluster: str) -> Document | UnknownDocument:
    """The document in `raw`, validated.

    Raises DocumentRefused when it is too long, not JSON, not canonical, of another cluster, or
    breaks the schema of its format. A kind or format that this version does not know is returned
    as UnknownDocument, as long as it has the four fields that every document has.
    """
    if len(raw) > limits.DOCUMENT_MAX_BYTES:
        raise DocumentRefused(
            f"a document of {len(raw)} bytes is over the limit of {limits.DOCUMENT_MAX_BYTES}"
        )
    try:
        envelope = _envelope_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DocumentRefused(f"a document cannot be read: {error}") from error
    if envelope.cluster != cluster:
        raise DocumentRefused(
            f"a document belongs to cluster {envelope.cluster!r}, this one is {cluster!r}"
        )
    if (envelope.kind, envelope.format) not in KNOWN:
        return UnknownDocument(envelope.kind, envelope.format, envelope.order)
    try:
        document = _decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DocumentRefused(
            f"a {envelope.kind} document is malformed: {error}"
        ) from error
    if encode(document) != raw:
        raise DocumentRefused(f"a {envelope.kind} document is not in canonical form")
    if isinstance(document, Manifest):
        check_manifest(document)
    return document


def check_manifest(manifest: Manifest) -> None:
    """Raises DocumentRefused unless parts cover each file exactly and stay inside their shards."""
    if len(manifest.entries) > limits.ENTRIES_MAX:
        raise DocumentRefused(
            f"a manifest has {len(manifest.entries)} entries, over the limit"
        )
    if len({entry.path for entry in manifest.entries}) != len(manifest.entries):
        raise DocumentRefused("a manifest has two entries of one path")
    if len({reference.shard for reference in manifest.shards}) != len(manifest.shards):
        raise DocumentRefused("a manifest lists one shard twice")
    if manifest.unit == "file" and not (
        len(manifest.entries) == 1 and isinstance(manifest.entries[0], FileEntry)
    ):
        raise DocumentRefused(
            "a manifest of a single file does not hold exactly one file"
        )
    if manifest.tensor_index is not None and manifest.tensor_index >= len(
        manifest.shards
    ):
        raise DocumentRefused("a manifest's tensor index is not among its shards")
    if content_id(manifest.entries) != manifest.content_id:
        raise DocumentRefused("a manifest's content id is not that of its entries")
    for entry in manifest.entries:
        _check_path(entry.path)
        if isinstance(entry, FileEntry):
            _check_parts(entry, manifest.shards)


def _check_path(path: str) -> None:
    if "\0" in path or any(segment in ("", ".", "..") for segment in path.split("/")):
        raise DocumentRefused(f"a manifest has the forbidden path {path!r}")


def _check_parts(entry: FileEntry, shards: tuple[ShardReference, ...]) -> None:
    total = 0
    for part in entry.parts:
        if part.shard_index >= len(shards):
            raise DocumentRefused(
                f"{entry.path}: a part lies in a shard that is not listed"
            )
        if part.offset + part.length > shards[part.shard_index].size:
            raise DocumentRefused(
                f"{entry.path}: a part reaches past the end of its shard"
            )
        total += part.length
    if total != entry.size:
        raise DocumentRefused(
            f"{entry.path}: its parts have {total} bytes, not {entry.size}"
        )


def content_id(entries: tuple[Entry, ...]) -> str:
    """SHA-256 over the canonical list of (path, kind, mode, size, hash) sorted by path.

    Name, time and host are not part of it: equal content gives an equal id everywhere. For a
    symlink the hash stands for its target text, and it has no mode.
    """
    rows: list[tuple[str, str, int, int, str]] = []
    for entry in entries:
        if isinstance(entry, FileEntry):
            rows.append((entry.path, "file", entry.mode, entry.size, entry.sha256))
        elif isinstance(entry, DirectoryEntry):
            rows.append((entry.path, "directory", entry.mode, 0, ""))
        else:
            target = hashlib.sha256(entry.target.encode()).hexdigest()
            rows.append((entry.path, "symlink", 0, 0, target))
    rows.sort()
    return hashlib.sha256(b"ckptd-content-v1\0" + _encoder.encode(rows)).hexdigest()
