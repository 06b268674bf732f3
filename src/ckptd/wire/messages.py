"""Every message of the protocol: one frozen structure each, encoded as a msgpack map.

Unknown fields, wrong types and counts over the limits are refused when decoding. Shards travel as
32 raw bytes, documents ids as well. `TYPES` maps the type number of a frame to its structure;
numbers are never used again for something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Final, TypeAlias

import msgspec
from msgspec import Meta, Struct

from ckptd.core import limits
from ckptd.core.documents import Metrics
from ckptd.errors import ProtocolError

Digest: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
Text: TypeAlias = Annotated[str, Meta(max_length=1024)]
Roles: TypeAlias = Annotated[tuple[Text, ...], Meta(max_length=8)]
LongText: TypeAlias = Annotated[str, Meta(max_length=8192)]
Size: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
ShardSize: TypeAlias = Annotated[int, Meta(ge=1, le=limits.SHARD_SIZE_MAX_BYTES)]
Port: TypeAlias = Annotated[int, Meta(ge=0, le=65535)]
Digests: TypeAlias = Annotated[tuple[Digest, ...], Meta(max_length=limits.SHARDS_PER_MESSAGE_MAX)]
Versions: TypeAlias = Annotated[
    tuple[Digest, ...], Meta(max_length=limits.VERSIONS_PER_MESSAGE_MAX)
]
DocumentIds: TypeAlias = Annotated[
    tuple[Digest, ...], Meta(max_length=limits.DOCUMENTS_PER_MESSAGE_MAX)
]


Bitmap: TypeAlias = Annotated[bytes, Meta(max_length=limits.SHARDS_PER_MANIFEST_MAX // 8)]
Clock: TypeAlias = Annotated[int, Meta(ge=0, le=2**62)]
# Floats have an upper bound because infinity would pass any comparison later; NaN never passes.
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e12)]
Age: TypeAlias = Annotated[float, Meta(ge=-1, le=1e12)]
Rate: TypeAlias = Annotated[float, Meta(ge=0, le=1e15)]


class Message(Struct, frozen=True, forbid_unknown_fields=True):
    """Base of all messages."""


class Hello(Message, frozen=True):
    """First frame in both directions on every connection: who speaks, and what it knows.

    `clock_ms` is the sender's wall clock (for the skew gauge only), `highest_order` the highest
    order of any document that it knows. Identity comes from the certificate, never from here.
    """

    cluster: Text
    node: Text
    roles: Roles
    software: Text
    clock_ms: Clock
    highest_order: Size
    boot_id: Text = ""
    zone: Text = ""
    address: Text = ""
    bulk_port: Port = 0


class Error(Message, frozen=True):
    """The request failed. `code` is the stable word of the error class, `node` where it failed."""

    code: Text
    message: LongText
    node: Text = ""
    next: LongText = ""


class Busy(Message, frozen=True):
    """No slot: come again or go elsewhere. Not a failure. `retry_after_s` is a hint."""

    reason: Text = ""
    retry_after_s: Seconds = 0.2


class Ping(Message, frozen=True):
    """The heartbeat. Answered like GetStatus, without `peers`."""


class PeerView(Message, frozen=True):
    """What a node thinks of another one. `last_seen_s`: seconds ago, -1 when never."""

    node: Text
    address: Text
    bulk_port: Port
    state: Text
    last_seen_s: Age
    roles: Roles = ()
    zone: Text = ""


class JobView(Message, frozen=True):
    """A background job of a node. `state`: running, waiting, paused or failed (it is tried again).
    `done_bytes` of `total_bytes` of what it knows to be left; `last_error` is empty when all is
    well."""

    name: Text
    state: Text
    done_bytes: Size = 0
    total_bytes: Size = 0
    last_error: Text = ""


class RepairView(Message, frozen=True):
    """What the steward found when it last asked everybody. Shards are distinct ones of live
    versions: `queued_shards` and `queued_bytes` are to be copied, `under_replicated` of them have
    too few copies (the others are on a draining node), `unrecoverable` have none. `waiting` says
    what repair waits for, "" when for nothing."""

    queued_shards: Size = 0
    queued_bytes: Size = 0
    under_replicated: Size = 0
    unrecoverable: Size = 0
    waiting: Text = ""


class NodeStatus(Message, frozen=True):
    """A node about itself; sizes in bytes, speed in bytes per second (0: not measured yet).

    `documents_digest` is the SHA-256 over its sorted document ids: equal digests mean equal
    catalogues. `repair` is told by the steward alone.
    """

    node: Text
    state: Text
    bytes_total: Size
    bytes_used: Size
    bytes_free: Size
    write_bytes_per_s: Rate
    queued_bytes: Size
    shards: Size
    quarantined: Size
    documents: Size
    unknown_documents: Size
    documents_digest: Digest
    highest_order: Size
    software: Text
    clock_ms: Clock
    uptime_s: Seconds
    failed_reason: LongText = ""
    peers: Annotated[tuple[PeerView, ...], Meta(max_length=limits.CLUSTER_NODES_MAX)] = ()
    jobs: Annotated[tuple[JobView, ...], Meta(max_length=limits.JOBS_PER_NODE_MAX)] = ()
    repair: RepairView | None = None


class GetStatus(Message, frozen=True):
    """How is the node, and what does it think of the others?"""


class Have(Message, frozen=True):
    """Which of these shards are here, whole and durable? `touch` (a store's question) keeps
    them from being collected; every other question leaves them as they are."""

    shards: Digests
    touch: bool = False


class HaveReply(Message, frozen=True):
    """Bit i (of byte i // 8, least significant first) answers shard i of the question.
    `verified_age_s[i]`: seconds since shard i was last hashed from disk, -1: not since start."""

    held: Annotated[bytes, Meta(max_length=limits.SHARDS_PER_MESSAGE_MAX // 8)]
    verified_age_s: Annotated[tuple[Age, ...], Meta(max_length=limits.SHARDS_PER_MESSAGE_MAX)]


class Inventory(Message, frozen=True):
    """Which shards of these versions are here?"""

    versions: Versions


class InventoryReply(Message, frozen=True):
    """Per version: whether its manifest is durable here, and a bitmap over the manifest's
    shards (None when the manifest is not here). May answer only the first few: ask again for the
    rest. `verified_age_s`: seconds since that shard of the version which is here and was hashed
    from disk longest ago, before the node's start included: for people, as no copy may be counted
    on for it. -1 when of one of them nobody knows, or none is here."""

    bitmaps: Annotated[tuple[Bitmap | None, ...], Meta(max_length=limits.VERSIONS_PER_MESSAGE_MAX)]
    verified_age_s: Annotated[tuple[Age, ...], Meta(max_length=limits.VERSIONS_PER_MESSAGE_MAX)]


class ListDocuments(Message, frozen=True):
    """The headers of all documents with an id above `after` (empty: from the start), by id."""

    after: Annotated[bytes, Meta(max_length=32)] = b""


class DocumentHeader(Message, frozen=True):
    """What a node keeps in memory of a document; for manifests with what `ls` shows.
    `size` and `files` are those of the checkpoint."""

    id: Digest
    kind: Text
    order: Size
    name: Text = ""
    created: Text = ""
    content_id: Annotated[bytes, Meta(max_length=32)] = b""
    size: Size = 0
    files: Size = 0
    shards: Size = 0
    copies: Size = 0
    step: Size | None = None
    metrics: Metrics = {}


class DocumentHeaders(Message, frozen=True):
    headers: Annotated[
        tuple[DocumentHeader, ...], Meta(max_length=limits.DOCUMENTS_PER_MESSAGE_MAX)
    ]
    more: bool


class GetDocuments(Message, frozen=True):
    """Asks for signed documents; the answer may hold only the first few: ask again for the rest."""

    ids: DocumentIds


class SignedDocument(Message, frozen=True):
    document: Annotated[bytes, Meta(max_length=limits.DOCUMENT_MAX_BYTES)]
    signature: Annotated[bytes, Meta(max_length=limits.SIGNATURE_ENVELOPE_MAX_BYTES)]


class DocumentView(Struct, frozen=True, forbid_unknown_fields=True):
    """As SignedDocument, but `document` is a view of the payload that it came in."""

    document: Annotated[memoryview, Meta(max_length=limits.DOCUMENT_MAX_BYTES)]
    signature: Annotated[bytes, Meta(max_length=limits.SIGNATURE_ENVELOPE_MAX_BYTES)]


class Documents(Message, frozen=True):
    """Follows as payload: a msgpack array of SignedDocument. `missing`: ids not known here."""

    count: Size
    missing: DocumentIds = ()


class PutDocuments(Message, frozen=True):
    """Payload: a msgpack array of SignedDocument."""

    count: Size


class PutDocumentResult(Message, frozen=True):
    """`bitmap`: for a manifest, which of its shards are here, taken while nothing can be
    collected; `refused` is empty when the document is durable here."""

    id: Digest
    refused: LongText = ""
    bitmap: Bitmap | None = None


class PutDocumentsReply(Message, frozen=True):
    results: Annotated[
        tuple[PutDocumentResult, ...], Meta(max_length=limits.DOCUMENTS_PER_MESSAGE_MAX)
    ]


class Sync(Message, frozen=True):
    """Asks for all document ids, unless the digest over them is `documents_digest`."""

    documents_digest: Digest


class SyncReply(Message, frozen=True):
    """Payload: all `count` document ids, 32 bytes each, ascending; none when `equal`."""

    equal: bool
    count: Size


class Verify(Message, frozen=True):
    """Read these shards from the disk, past the page cache, and hash them."""

    shards: Digests


class VerifyReply(Message, frozen=True):
    """One word per shard: ok, missing, corrupt (now in quarantine) or unreadable."""

    results: Annotated[tuple[Text, ...], Meta(max_length=limits.SHARDS_PER_MESSAGE_MAX)]


class ReportCorrupt(Message, frozen=True):
    """A reader got bytes with another hash: look at your copy. Answered like Verify."""

    shard: Digest


class GetWatched(Message, frozen=True):
    """What does this coordinator see that is not stored yet?"""


class Unstored(Message, frozen=True):
    """A checkpoint that a coordinator sees and has not stored as it is now. `state`: pending or
    storing; `reason`: in words why it waits; `name` is empty for what cannot have one."""

    name: Text
    path: LongText
    state: Text
    reason: LongText
    since: Text
    size: Size = 0
    step: Size | None = None


class Watched(Message, frozen=True):
    """`unstored` holds the first few of `count`. `scanned`: whether every root was looked through
    since the node started, so that what is not listed is stored."""

    unstored: Annotated[tuple[Unstored, ...], Meta(max_length=limits.UNSTORED_PER_MESSAGE_MAX)]
    count: Size
    scanned: bool


class Prune(Message, frozen=True):
    """Apply the retention rules of your config now, or tell what that would do. `confirmed`: also
    if it drops more than half of the live versions."""

    dry_run: bool
    confirmed: bool = False


class PruneRow(Message, frozen=True):
    """A live version, and why it goes or stays."""

    version: Digest
    reason: Annotated[str, Meta(max_length=limits.PRUNE_REASON_MAX)]


PruneRows: TypeAlias = Annotated[tuple[PruneRow, ...], Meta(max_length=limits.PRUNE_ROWS_MAX)]


class PruneReply(Message, frozen=True):
    """What the rules drop and keep, newest first: the first few of `delete_count` and `keep_count`.
    `waits`: nothing was dropped, because that needs to be confirmed."""

    delete: PruneRows
    keep: PruneRows
    delete_count: Size
    keep_count: Size
    waits: bool


class SetJob(Message, frozen=True):
    """Pause this background job, or let it go on; that survives a restart of the node."""

    job: Text
    paused: bool


class CopyShards(Message, frozen=True):
    """Send your copies of these shards of a version to the node `target`, not faster than
    `rate_bytes_per_s` (0: as fast as your own limit). Whether it does is for the holder to decide.
    Answered by Progress and CopyShardsReply."""

    version: Digest
    shards: Annotated[tuple[Digest, ...], Meta(max_length=limits.SHARDS_PER_COPY_MAX)]
    target: Text
    rate_bytes_per_s: Rate = 0.0


class Promise(Message, frozen=True):
    """Promise to keep your copies of these shards of a version for `seconds`, and prove with
    `nonce` that you have them: I have too many."""

    version: Digest
    shards: Annotated[tuple[Digest, ...], Meta(max_length=limits.SHARDS_PER_PROMISE_MAX)]
    seconds: Seconds
    nonce: Digest


class PromiseReply(Message, frozen=True):
    """For each shard the proof (`ckptd.core.trimming.proof_of_possession`) that it is here, good,
    and will be kept; empty for one that is not."""

    proofs: Annotated[
        tuple[Annotated[bytes, Meta(max_length=32)], ...],
        Meta(max_length=limits.SHARDS_PER_PROMISE_MAX),
    ]


class Surplus(Message, frozen=True):
    """You hold these shards of a version, and others hold enough of them, too. A hint: the holder
    drops nothing before others have promised to keep theirs."""

    version: Digest
    shards: Digests


class SurplusReply(Message, frozen=True):
    """How many of the shards the holder will look at."""

    noted: Size


class Hop(Message, frozen=True):
    """A next node of a chain, where its bulk port is."""

    node: Text
    host: Text
    port: Port


class PutShard(Message, frozen=True):
    """Offers a shard. It follows in a ShardData of the same request id once the receiver said
    Ready. The receiver passes it on to chain[0] with the rest of the chain."""

    shard: Digest
    size: ShardSize
    chain: Annotated[tuple[Hop, ...], Meta(max_length=limits.CHAIN_HOPS_MAX)] = ()


class PushShard(Message, frozen=True):
    """Send a shard that is here to other nodes. Answered by Progress and PutResult."""

    shard: Digest
    size: ShardSize
    chain: Annotated[tuple[Hop, ...], Meta(min_length=1, max_length=limits.CHAIN_HOPS_MAX)]


class CopyReport(Message, frozen=True):
    """One node of a chain about its copy. `state`: receiving, durable, present (it had the
    copy before), busy, failed (then `code` and `message` say why, as in Error), or unknown (another
    node's failure cut it off)."""

    node: Text
    state: Text
    received_bytes: Size = 0
    code: Text = ""
    message: LongText = ""


Reports: TypeAlias = Annotated[tuple[CopyReport, ...], Meta(max_length=limits.CHAIN_HOPS_MAX + 1)]


class CopyShardsReply(Message, frozen=True):
    """What the target said of each shard, or why it was not asked, in the order of the request.
    Fewer than asked for when the time was over: ask again for the rest."""

    reports: Annotated[tuple[CopyReport, ...], Meta(max_length=limits.SHARDS_PER_COPY_MAX)]


class Ready(Message, frozen=True):
    """Send the shard (`wanted`), or do not: no node of the chain needs it. `reports` tells of
    the nodes of the chain that will not take part or have the shard already."""

    wanted: bool
    reports: Reports = ()


class Progress(Message, frozen=True):
    """Sent upstream at least every second while something is under way."""

    reports: Reports


class PutResult(Message, frozen=True):
    """The end of a put or push: one report per node of the chain, this one first."""

    reports: Reports


class GetShard(Message, frozen=True):
    """Asks for a whole shard."""

    shard: Digest


class ShardData(Message, frozen=True):
    """Payload: the shard's bytes. Answers GetShard, and follows a PutShard that Ready wanted."""

    shard: Digest


TYPES: Final[dict[int, type[Message]]] = {
    1: Hello,
    2: Error,
    3: Busy,
    4: Ping,
    5: GetStatus,
    6: NodeStatus,
    7: Have,
    8: HaveReply,
    9: Inventory,
    10: InventoryReply,
    11: ListDocuments,
    12: DocumentHeaders,
    13: GetDocuments,
    14: Documents,
    15: PutDocuments,
    16: PutDocumentsReply,
    17: Sync,
    18: SyncReply,
    19: Verify,
    20: VerifyReply,
    21: ReportCorrupt,
    22: GetWatched,
    23: Watched,
    28: Prune,
    29: PruneReply,
    30: SetJob,
    25: CopyShards,
    26: CopyShardsReply,
    27: Promise,
    32: PutShard,
    33: Ready,
    34: Progress,
    35: PutResult,
    36: GetShard,
    37: ShardData,
    38: PushShard,
    39: PromiseReply,
    40: Surplus,
    41: SurplusReply,
}
# Kept free for pairing of new machines (64 to 79) and for subscriptions (80 to 95).
RESERVED: Final = range(64, 96)

NUMBERS: Final[dict[type[Message], int]] = {message: number for number, message in TYPES.items()}

_encoder = msgspec.msgpack.Encoder()
_decoders = {number: msgspec.msgpack.Decoder(message) for number, message in TYPES.items()}
_views_decoder: msgspec.msgpack.Decoder[tuple[msgspec.Raw, ...]] = msgspec.msgpack.Decoder(
    Annotated[tuple[msgspec.Raw, ...], Meta(max_length=limits.DOCUMENTS_PER_MESSAGE_MAX)]
)
_view_decoder = msgspec.msgpack.Decoder(DocumentView)
_documents_decoder: msgspec.msgpack.Decoder[tuple[SignedDocument, ...]] = msgspec.msgpack.Decoder(
    Annotated[
        tuple[SignedDocument, ...],
        Meta(max_length=limits.DOCUMENTS_PER_MESSAGE_MAX),
    ]
)


def encode(message: Message) -> bytes:
    """The body of `message`."""
    return _encoder.encode(message)


def type_of(number: int, *, peer: str) -> type[Message]:
    """The message type of `number`. Raises ProtocolError for one that this version has not."""
    kind = TYPES.get(number)
    if kind is None:
        hint = "reserved for a later version" if number in RESERVED else "unknown"
        raise ProtocolError(peer, f"sent message type {number}, which is {hint}: upgrade this node")
    return kind


def decode(number: int, body: bytes | bytearray | memoryview, *, peer: str) -> Message:
    """The message of type `number` in `body`. Raises ProtocolError with what is wrong with it."""
    kind = type_of(number, peer=peer)
    try:
        return _decoders[number].decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(peer, f"sent a malformed {kind.__name__}: {error}") from error


def encode_documents(documents: tuple[SignedDocument, ...]) -> bytes:
    """The payload of Documents and PutDocuments."""
    return _encoder.encode(documents)


def decode_documents(payload: bytes | memoryview, *, peer: str) -> tuple[SignedDocument, ...]:
    """What `encode_documents` made. Raises ProtocolError."""
    try:
        return _documents_decoder.decode(payload)
    except msgspec.DecodeError as error:
        raise ProtocolError(peer, f"sent malformed documents: {error}") from error


def document_views(payload: bytes | memoryview, count: int, *, peer: str) -> Iterator[DocumentView]:
    """The `count` documents in what `encode_documents` made, one at a time and without copying
    them: a payload may be large. Raises ProtocolError."""
    try:
        parts = _views_decoder.decode(payload)
        if len(parts) != count:
            raise ProtocolError(peer, f"announced {count} documents, sent {len(parts)}")
        for part in parts:
            yield _view_decoder.decode(part)
    except msgspec.DecodeError as error:
        raise ProtocolError(peer, f"sent malformed documents: {error}") from error


def encode_document_ids(ids: Iterable[bytes]) -> bytes:
    """The payload of SyncReply: `ids` (32 bytes each), sorted."""
    return b"".join(sorted(ids))


def decode_document_ids(reply: SyncReply, payload: bytes | memoryview, *, peer: str) -> memoryview:
    """The ids behind `reply`, 32 bytes each and strictly ascending, packed as they came: a quarter
    of a million of them would take many times that as objects. None when the catalogues are equal.
    Raises ProtocolError."""
    packed = memoryview(payload)
    if len(packed) != (0 if reply.equal else 32 * reply.count):
        raise ProtocolError(peer, f"announced {reply.count} document ids, sent {len(packed)} bytes")
    before = b""
    for start in range(0, len(packed), 32):
        document_id = bytes(packed[start : start + 32])
        if document_id <= before:
            raise ProtocolError(peer, "sent document ids that are not sorted")
        before = document_id
    return packed
