"""Writing documents: which order a new one gets, and how it reaches the nodes.

Headers that nodes tell of are hints, and a worker may lie. So whatever a document says about other
documents is read from their signed bytes first.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import UTC, datetime
from typing import Final, Literal, TypedDict, get_args

from ckptd.client.cluster import Admitted, Cluster, Node
from ckptd.core import documents, limits
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.documents import Document, Manifest, MemberMark, UnknownDocument
from ckptd.errors import (
    CkptdError,
    DocumentRefused,
    NotAuthorized,
    NotEnoughNodes,
    ProtocolError,
    Refused,
)
from ckptd.wire import messages


async def next_order(cluster: Cluster, catalogue: Catalogue, now_ms: int) -> int:
    """The order of a new document: above every order in use, and not below the clock.

    `now_ms` is this machine's clock in milliseconds. Raises as `check_claims`, which it does first.
    """
    await check_claims(cluster, catalogue, now_ms)
    return max(now_ms, 1 + catalogue.highest_order)


async def check_claims(cluster: Cluster, catalogue: Catalogue, now_ms: int) -> None:
    """Fetches and checks the manifests whose headers claim an order above all that count so far.

    What no node can show is withdrawn from `catalogue`. So whoever works for long between asking
    for the catalogue and the new document checks at once, while those answer who told of them.
    Raises NotEnoughNodes when none answers any more: that says nothing about the claims. When only
    those fall silent who told of them, they are withdrawn: it could as well have been lies.
    """
    while claims := catalogue.unverified_above(max(now_ms, catalogue.highest_order)):
        await confirm(cluster, catalogue, claims[: limits.CLAIMS_CHECKED_AT_ONCE])
        cluster.require_nodes()


class Stamp(TypedDict):
    """What every document says of its making."""

    format: Literal[1]
    cluster: str
    order: int
    created: str
    nonce: str


async def stamp(cluster: Cluster, catalogue: Catalogue) -> Stamp:
    """That of a new document."""
    now = datetime.now(UTC)
    return Stamp(
        format=1,
        cluster=cluster.cluster,
        order=await next_order(cluster, catalogue, int(now.timestamp() * 1000)),
        created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        nonce=secrets.token_hex(16),
    )


async def write(cluster: Cluster, catalogue: Catalogue, document: Document) -> None:
    """Publishes a document and adds it to `catalogue`. Raises as `publish`, and NotEnoughNodes or
    Refused when no worker keeps it."""
    raw = documents.encode(document)
    results = await publish(cluster, raw)
    document_id = documents.document_id(raw)
    if not stored_on(results):
        raise refusals(results, document_id)
    await tell_others(cluster, raw, results)
    catalogue.add(document_id, document, author=cluster.identity)


async def confirm(
    cluster: Cluster, catalogue: Catalogue, versions: Iterable[VersionHeader]
) -> list[VersionHeader]:
    """The versions whose manifest some node can show: hash, signature and author checked.

    Their headers, here and in `catalogue`, are then what the signed documents say, which may be
    another name. The others are withdrawn from `catalogue`.
    """
    wanted = list(versions)
    confirmed = set()
    async for admitted, _ in manifests(cluster, wanted):
        catalogue.add(admitted.id, admitted.document, author=admitted.author)
        confirmed.add(admitted.id)
    for version in wanted:
        if version.id not in confirmed:
            with contextlib.suppress(KeyError):  # it came signed, and was dropped since
                catalogue.withdraw(version.id)
    found = (catalogue.version(version.id) for version in wanted)
    return [version for version in found if version is not None and version.id in confirmed]


async def manifests(
    cluster: Cluster, versions: Iterable[VersionHeader]
) -> AsyncIterator[tuple[Admitted, Manifest]]:
    """The manifests of `versions`, checked, in any order; those that no node can show are left out.

    Only a few are in memory at a time, fewer of large ones.
    """
    batch: list[str] = []
    weight = 0
    for version in [*versions, None]:
        own = 0 if version is None else version.shards + version.files
        if batch and (version is None or weight + own > limits.MANIFEST_ENTRIES_AT_ONCE):
            for admitted in await cluster.fetch(batch):
                if isinstance(admitted.document, Manifest):
                    yield admitted, admitted.document
            batch, weight = [], 0
        if version is not None:
            batch.append(version.id)
            weight += own


async def publish(
    cluster: Cluster, raw: bytes, nodes: Iterable[Node] | None = None
) -> dict[str, messages.PutDocumentResult]:
    """Signs the document `raw` and sends it to all workers (or `nodes`) at once; their answers by
    node id.

    A result with an empty `refused` says that the document is durable there. Nodes that do not
    answer within limits.REQUEST_TIMEOUT_S, or confirm another document, become absent. Raises
    NotAuthorized, before anything is sent, when this certificate may not write such a document.
    """
    signed = messages.SignedDocument(raw, cluster.signer.sign(raw))
    try:
        wanted, document, _ = cluster.admit(signed)
    except DocumentRefused as error:
        kind = type(documents.decode(raw, cluster=cluster.cluster))
        role = "admin" if kind in _OF_ADMINS else "client"
        raise NotAuthorized(
            error.message,
            next=f"ckptd pki issue {role} ID   (and name it under tls in the config)",
        ) from error
    assert not isinstance(document, UnknownDocument), "only documents of this version are written"
    payload = messages.encode_documents((signed,))

    async def put(node: Node) -> messages.PutDocumentResult:
        reply, _ = await node.control.request(
            messages.PutDocuments(1), messages.PutDocumentsReply, payload=payload
        )
        if len(reply.results) != 1:
            raise ProtocolError(node.id, f"gave {len(reply.results)} results for one document")
        result = reply.results[0]
        if not result.refused and result.id.hex() != wanted:
            raise ProtocolError(node.id, f"confirmed document {result.id.hex()}, not {wanted}")
        return result

    return await cluster.ask_all(put, nodes)


async def tell_others(
    cluster: Cluster, raw: bytes, told: Mapping[str, messages.PutDocumentResult]
) -> None:
    """Sends a published document to the nodes that keep no shards, too. It counts for nothing that
    they have it, but what they say in the next moment should not be what was so before."""
    await publish(cluster, raw, [node for node in cluster.nodes.values() if node.id not in told])


def stored_on(results: Mapping[str, messages.PutDocumentResult]) -> list[str]:
    """The nodes on which a published document is durable, by id."""
    return sorted(node for node, result in results.items() if not result.refused)


def refusals(results: Mapping[str, messages.PutDocumentResult], document: str) -> CkptdError:
    """The error to raise when no node has stored the document with this id."""
    if not results:
        return NotEnoughNodes(f"no node took document {document}: none answers", next=_DOCTOR)
    reasons = "; ".join(f"{node}: {results[node].refused}" for node in sorted(results))
    return Refused(f"no node took document {document}: {reasons}", next=_DOCTOR)


_DOCTOR = "ckptd doctor"
_OF_ADMINS: Final = get_args(MemberMark)
