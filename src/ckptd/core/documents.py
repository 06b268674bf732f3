"""The immutable documents of the catalogue, and their canonical bytes.

A document is JSON with sorted keys, no white space, UTF-8; its id is the SHA-256 of exactly these
bytes (64 lower-case hex digits). The id of a manifest is the version id.
`docs/formats/documents.md` describes every field; golden files under `tests/golden` pin the bytes.

Formats are versioned by the pair (kind, format). What this version cannot read is kept as
`UnknownDocument`, passed on to other nodes byte for byte, and never acted upon.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from datetime import datetime
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta, Struct

from ckptd.core import limits, names
from ckptd.errors import DocumentRefused, NameRefused

FORMAT: Final = 1

# Patterns end in \Z: `$` would also match in front of a final line feed.
Hex64: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Nonce: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}\Z")]
Time: TypeAlias = Annotated[
    str,
    Meta(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?Z\Z"),
]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Order: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
Mode: TypeAlias = Annotated[int, Meta(ge=0, le=0o777)]
# As `names.path_to_json` writes it: up to three characters a byte.
PathText: TypeAlias = Annotated[
    str, Meta(min_length=1, max_length=3 * limits.PATH_IN_CHECKPOINT_MAX_BYTES)
]
NodeId: TypeAlias = Annotated[str, Meta(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?\Z")]
# Of a certificate, as `identity.serial_text` writes it.
Serial: TypeAlias = Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z")]
DocumentIds: TypeAlias = Annotated[tuple[Hex64, ...], Meta(max_length=limits.MARKS_MAX)]
ShortText: TypeAlias = Annotated[str, Meta(max_length=1024)]
Metrics: TypeAlias = Annotated[
    dict[
        Annotated[str, Meta(max_length=limits.METRIC_NAME_MAX_CHARACTERS)],
        Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)],
    ],
    Meta(max_length=limits.METRICS_MAX),
]


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
    created: Time
    host: ShortText
    nonce: Nonce
    unit: Literal["directory", "file"]
    content_id: Hex64
    copies: Annotated[int, Meta(ge=1, le=limits.CLUSTER_NODES_MAX)]
    redundancy: Literal["copies"]
    mode: Mode
    entries: Annotated[tuple[Entry, ...], Meta(max_length=limits.ENTRIES_MAX)]
    shards: Annotated[tuple[ShardReference, ...], Meta(max_length=limits.SHARDS_PER_MANIFEST_MAX)]
    tensor_index: Count | None = None
    step: Count | None = None
    metrics: Metrics = {}


class RemovedContent(Struct, frozen=True, array_like=True):
    """What a dead version held, and under which name: its content id, and the SHA-256 of the name.

    A tombstone outlives the manifest that tells the name, and the same content under another name
    is not removed.
    """

    name_sha256: Hex64
    content_id: Hex64

    @classmethod
    def of(cls, name: str, content_id: str) -> RemovedContent:
        """The record of a checkpoint's name and a version's content id."""
        return cls(hashlib.sha256(name.encode()).hexdigest(), content_id)


class Tombstone(_Record, frozen=True, tag_field="kind", tag="tombstone"):
    """Versions that are dead for ever. `reason` "rm": somebody removed them;
    "retention": a policy did, justified by the live, protected version `justified_by`.
    `contents` lists what the versions held, so that nothing stores it again by itself.
    """

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    reason: Literal["rm", "retention"]
    versions: Annotated[tuple[Hex64, ...], Meta(max_length=limits.TOMBSTONE_VERSIONS_MAX)]
    contents: Annotated[
        tuple[RemovedContent, ...], Meta(max_length=limits.TOMBSTONE_VERSIONS_MAX)
    ] = ()
    justified_by: Hex64 | None = None


class Pin(_Record, frozen=True, tag_field="kind", tag="pin"):
    """Protects one version from retention, until an unpin names this document."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    version: Hex64


class Unpin(_Record, frozen=True, tag_field="kind", tag="unpin"):
    """Takes back the pins whose document ids it names."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    pins: Annotated[tuple[Hex64, ...], Meta(max_length=limits.TOMBSTONE_VERSIONS_MAX)]


class Member(_Record, frozen=True, tag_field="kind", tag="member"):
    """A node about itself: where it was last reached. The newest by (order, id) counts."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    node: NodeId
    roles: Annotated[tuple[Literal["worker", "coordinator"], ...], Meta(max_length=2)]
    address: ShortText
    bulk_port: Annotated[int, Meta(ge=0, le=65535)]
    zone: ShortText = ""


class Drain(_Record, frozen=True, tag_field="kind", tag="drain"):
    """Asks a node to give all its copies to others and to take no new ones, until an undrain (or
    a forget) names this document."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    node: NodeId


class Undrain(_Record, frozen=True, tag_field="kind", tag="undrain"):
    """Takes back the drains whose document ids it names."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    drains: DocumentIds


class Maintenance(_Record, frozen=True, tag_field="kind", tag="maintenance"):
    """Somebody works on a node for `seconds` from `created` on: its copies are not replaced
    meanwhile. Of several for one node the newest by (order, id) counts; 0 ends it."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    node: NodeId
    seconds: Annotated[int, Meta(ge=0, le=limits.MAINTENANCE_MAX_S)]


class Forget(_Record, frozen=True, tag_field="kind", tag="forget"):
    """A node will not come back: the certificates with these serial numbers are refused by every
    node for ever. `drains` are the drain documents that end with it, so that a new machine may
    bear the id."""

    format: Literal[1]
    cluster: ShortText
    order: Order
    created: Time
    nonce: Nonce
    node: NodeId
    serials: Annotated[tuple[Serial, ...], Meta(max_length=limits.MARKS_MAX)]
    drains: DocumentIds = ()


Document: TypeAlias = (
    Manifest | Tombstone | Pin | Unpin | Member | Drain | Undrain | Maintenance | Forget
)
MemberMark: TypeAlias = Drain | Undrain | Maintenance | Forget
"""What an admin says about a node."""

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


# RecursionError: fields of unknown formats are skipped, however deeply they nest.
_MALFORMED: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_envelope_decoder = msgspec.json.Decoder(_Envelope)
_KINDS: Final = (
    *("manifest", "tombstone", "pin", "unpin"),
    *("member", "drain", "undrain", "maintenance", "forget"),
)
KNOWN: Final = frozenset((kind, FORMAT) for kind in _KINDS)


def encode(document: Document) -> bytes:
    """The canonical bytes of `document`: those that are hashed, signed, stored and sent.

    Raises DocumentRefused when a text in it has no UTF-8 form (a file name that is not UTF-8).
    """
    try:
        return _encoder.encode(document)
    except UnicodeEncodeError as error:
        raise DocumentRefused(f"a document holds text that is not UTF-8: {error}") from error


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
    except _MALFORMED as error:
        raise DocumentRefused(f"a document cannot be read: {error}") from error
    if envelope.cluster != cluster:
        raise DocumentRefused(
            f"a document belongs to cluster {envelope.cluster!r}, this one is {cluster!r}"
        )
    if (envelope.kind, envelope.format) not in KNOWN:
        return UnknownDocument(envelope.kind, envelope.format, envelope.order)
    try:
        document = _decoder.decode(raw)
    except _MALFORMED as error:
        raise DocumentRefused(f"a {envelope.kind} document is malformed: {error}") from error
    if encode(document) != raw:
        raise DocumentRefused(f"a {envelope.kind} document is not in canonical form")
    _check_time(document.created)
    if isinstance(document, Manifest):
        check_manifest(document)
    elif isinstance(document, Tombstone):
        check_tombstone(document)
    return document


def _check_time(created: str) -> None:
    try:
        datetime.fromisoformat(created)
    except ValueError as error:
        raise DocumentRefused(f"a document has the impossible time {created}") from error


def check_tombstone(tombstone: Tombstone) -> None:
    """Raises DocumentRefused unless a policy's tombstone, and only that, names a live version that
    justifies it."""
    if (tombstone.reason == "retention") != (tombstone.justified_by is not None):
        raise DocumentRefused("a tombstone's reason and its justifying version do not fit")
    if tombstone.justified_by in tombstone.versions:
        raise DocumentRefused("a tombstone removes the version that justifies it")


def check_manifest(manifest: Manifest) -> None:
    """Raises DocumentRefused unless the manifest can be restored as it stands: paths stay inside
    the checkpoint and do not clash, parts cover each file exactly and stay inside their shards."""
    if len({reference.shard for reference in manifest.shards}) != len(manifest.shards):
        raise DocumentRefused("a manifest lists one shard twice")
    if manifest.unit == "file" and not (
        len(manifest.entries) == 1 and isinstance(manifest.entries[0], FileEntry)
    ):
        raise DocumentRefused("a manifest of a single file does not hold exactly one file")
    if manifest.tensor_index is not None and manifest.tensor_index >= len(manifest.shards):
        raise DocumentRefused("a manifest's tensor index is not among its shards")
    if content_id(manifest.entries) != manifest.content_id:
        raise DocumentRefused("a manifest's content id is not that of its entries")
    try:
        names.check_name(manifest.name)
        kinds = _checked_paths(manifest.entries)
    except NameRefused as error:
        raise DocumentRefused(f"a manifest holds a forbidden name: {error.message}") from error
    _check_tree(kinds)
    for entry in manifest.entries:
        if isinstance(entry, FileEntry):
            _check_parts(entry, manifest.shards)


def _checked_paths(entries: tuple[Entry, ...]) -> list[tuple[str, bool]]:
    """The path of each entry and whether it is a directory. Raises NameRefused."""
    rows: list[tuple[str, bool]] = []
    for entry in entries:
        path = names.check_path(names.path_from_json(entry.path))
        if isinstance(entry, SymlinkEntry):
            names.check_symlink_target(path, names.path_from_json(entry.target))
        rows.append((path, isinstance(entry, DirectoryEntry)))
    return rows


def _check_tree(rows: list[tuple[str, bool]]) -> None:
    """No path twice, and nothing below a file or a symlink: a restore would write through it."""
    # NUL is in no path and sorts first, so what lies below a path comes right after it.
    keys = sorted((path.replace("/", "\0"), is_directory) for path, is_directory in rows)
    for (above, is_directory), (below, _) in itertools.pairwise(keys):
        path = names.path_to_json(above.replace("\0", "/"))
        if above == below:
            raise DocumentRefused(f"a manifest has two entries of the path {path!r}")
        if below.startswith(above + "\0") and not is_directory:
            raise DocumentRefused(f"a manifest has entries below {path!r}, which is no directory")


def _check_parts(entry: FileEntry, shards: tuple[ShardReference, ...]) -> None:
    total = 0
    for part in entry.parts:
        if part.shard_index >= len(shards):
            raise DocumentRefused(f"{entry.path}: a part lies in a shard that is not listed")
        if part.offset + part.length > shards[part.shard_index].size:
            raise DocumentRefused(f"{entry.path}: a part reaches past the end of its shard")
        total += part.length
    if total != entry.size:
        raise DocumentRefused(f"{entry.path}: its parts have {total} bytes, not {entry.size}")


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
