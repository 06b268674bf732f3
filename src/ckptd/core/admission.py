"""Whether a document may enter the catalogue: signed in this cluster, by somebody who may say it.

It does not matter who brings a document, only who wrote it. So a node can take documents from any
peer, and whoever holds a worker's key can neither delete nor forge a checkpoint.
"""

from __future__ import annotations

from typing import Final

from cryptography import x509

from ckptd.core import limits
from ckptd.core.documents import (
    Document,
    Drain,
    Forget,
    Maintenance,
    Manifest,
    Member,
    Pin,
    Tombstone,
    Undrain,
    UnknownDocument,
    Unpin,
    decode,
    document_id,
)
from ckptd.core.identity import Identity, Role
from ckptd.core.permissions import PERMITTED_AUTHORS, DocumentKind, may_author
from ckptd.core.signing import author_of, verify
from ckptd.errors import DocumentRefused

AUTHOR_ROLES: Final = frozenset().union(*PERMITTED_AUTHORS.values())
"""Roles that may write any document at all. What cannot be read here must have such an author."""


def admit(
    raw: bytes, envelope: bytes, *, cluster: str, ca: x509.Certificate
) -> tuple[str, Document | UnknownDocument, Identity]:
    """The id, the content and the author of a document that may enter the catalogue.

    `raw` are its canonical bytes, `envelope` certificate and signature. Raises DocumentRefused
    when it is too long, not signed by a certificate of this cluster, malformed, contradicts
    itself, or says what its author's roles may not say. A document of a kind or format that is
    unknown here is admitted from anybody who may write documents, to be kept and passed on.
    """
    # The signature comes first, so that only what the cluster's own members wrote is ever parsed.
    check_size(len(raw), envelope, cluster=cluster, ca=ca)
    author = verify(raw, envelope, ca, cluster)
    document = decode(raw, cluster=cluster)
    if not _may_say(author, document):
        raise DocumentRefused(f"{author} may not write this {_description(document)}")
    return document_id(raw), document, author


def check_size(size_bytes: int, envelope: bytes, *, cluster: str, ca: x509.Certificate) -> None:
    """Raises DocumentRefused when a document of `size_bytes` is longer than its author may write.

    Reads nothing but the envelope. A mere worker's documents are short: parsing one of the size of
    a large manifest would take many times that in memory, before its role could refuse it.
    """
    limit = limits.DOCUMENT_MAX_BYTES
    if limits.WORKER_DOCUMENT_MAX_BYTES < size_bytes <= limit:
        author = author_of(envelope, ca, cluster)
        if author.roles <= {Role.WORKER}:
            limit = limits.WORKER_DOCUMENT_MAX_BYTES
    if size_bytes > limit:
        raise DocumentRefused(f"a document of {size_bytes} bytes is over the limit of {limit}")


def _may_say(author: Identity, document: Document | UnknownDocument) -> bool:
    match document:
        case UnknownDocument():
            return not author.roles.isdisjoint(AUTHOR_ROLES)
        case Manifest():
            return may_author(author, DocumentKind.MANIFEST)
        case Tombstone(reason="rm"):
            return may_author(author, DocumentKind.TOMBSTONE_RM)
        case Tombstone():
            return may_author(author, DocumentKind.TOMBSTONE_RETENTION)
        case Pin():
            return may_author(author, DocumentKind.PIN)
        case Unpin():
            return may_author(author, DocumentKind.UNPIN)
        case Drain():
            return may_author(author, DocumentKind.DRAIN)
        case Undrain():
            return may_author(author, DocumentKind.UNDRAIN)
        case Maintenance():
            return may_author(author, DocumentKind.MAINTENANCE)
        case Forget():
            return may_author(author, DocumentKind.FORGET)
    about_itself = may_author(author, DocumentKind.MEMBER, about=document.node)
    return about_itself and author.roles.issuperset(document.roles)


def _description(document: Document | UnknownDocument) -> str:
    match document:
        case UnknownDocument():
            return f"{document.kind} document"
        case Tombstone():
            return f"{document.reason} tombstone"
        case Member():
            return f"member document of {document.node}"
        case _:
            return f"{type(document).__name__.lower()} document"
