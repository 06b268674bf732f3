"""Who may do what: one table for requests on the wire, one for documents in the catalogue.

The reasons behind the rows:

- A stolen worker must not read checkpoints, so workers fetch no shards: repair is pushed by the
  node that holds the copy. A worker may plan it (there may be no coordinator), but the holder
  decides, and nobody can order a copy to be dropped. It must not delete or forge either, so a
  worker signs nothing but its own membership.
- Deciding and reading are apart: an admin needs no checkpoint bytes, a monitor only numbers.
- What a coordinator sees on its own disk is for people and other coordinators, not for workers.
- Whatever is not listed is forbidden.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from ckptd.core.identity import Identity, Role


class Action(StrEnum):
    """A request that a peer can make of a node."""

    HELLO = "hello"
    PING = "ping"
    STATUS = "status"
    HAVE = "have"
    TOUCH = "touch"
    INVENTORY = "inventory"
    PUT_SHARD = "put_shard"
    GET_SHARD = "get_shard"
    PUSH_SHARD = "push_shard"
    VERIFY = "verify"
    REPORT_CORRUPT = "report_corrupt"
    LIST_HEADERS = "list_headers"
    GET_DOCUMENTS = "get_documents"
    PUT_DOCUMENTS = "put_documents"
    SYNC = "sync"
    COPY_SHARDS = "copy_shards"
    PROMISE = "promise"
    SURPLUS = "surplus"
    WATCHED = "watched"
    PRUNE = "prune"
    SET_JOB = "set_job"
    SCRAPE = "scrape"


class DocumentKind(StrEnum):
    """What a document does, as far as it matters for who may write it."""

    MANIFEST = "manifest"
    TOMBSTONE_RETENTION = "tombstone_retention"
    TOMBSTONE_RM = "tombstone_rm"
    PIN = "pin"
    UNPIN = "unpin"
    MEMBER = "member"
    DRAIN = "drain"
    UNDRAIN = "undrain"
    MAINTENANCE = "maintenance"
    FORGET = "forget"


_CATALOGUE: Final = frozenset(
    {
        Action.HELLO,
        Action.PING,
        Action.STATUS,
        Action.INVENTORY,
        Action.LIST_HEADERS,
        Action.GET_DOCUMENTS,
        Action.PUT_DOCUMENTS,
        Action.SYNC,
    }
)
_REPLICATE: Final = frozenset({Action.HAVE, Action.PUT_SHARD})
_STEWARD: Final = frozenset({Action.COPY_SHARDS, Action.SURPLUS})
_CHECK: Final = frozenset({Action.HAVE, Action.VERIFY, Action.REPORT_CORRUPT})
_READ_AND_WRITE: Final = _REPLICATE | _CHECK | {Action.TOUCH, Action.GET_SHARD, Action.PUSH_SHARD}
_OPERATE: Final = frozenset({Action.WATCHED, Action.PRUNE, Action.SET_JOB, Action.SCRAPE})

PERMITTED_ACTIONS: Final = MappingProxyType(
    {
        Role.WORKER: _CATALOGUE | _REPLICATE | _STEWARD | {Action.PROMISE},
        Role.COORDINATOR: _CATALOGUE | _READ_AND_WRITE | _STEWARD | {Action.WATCHED},
        Role.CLIENT: _CATALOGUE | _READ_AND_WRITE | _OPERATE,
        Role.ADMIN: _CATALOGUE | _CHECK | _OPERATE,
        Role.MONITOR: frozenset({Action.SCRAPE}),
    }
)
"""For each role, the requests that it may make. A certificate with several roles may do what any
of them may."""

PERMITTED_AUTHORS: Final = MappingProxyType(
    {
        DocumentKind.MANIFEST: frozenset({Role.COORDINATOR, Role.CLIENT}),
        DocumentKind.TOMBSTONE_RETENTION: frozenset({Role.COORDINATOR}),
        DocumentKind.TOMBSTONE_RM: frozenset({Role.CLIENT, Role.ADMIN}),
        DocumentKind.PIN: frozenset({Role.CLIENT, Role.ADMIN}),
        DocumentKind.UNPIN: frozenset({Role.CLIENT, Role.ADMIN}),
        DocumentKind.MEMBER: frozenset({Role.WORKER, Role.COORDINATOR}),
        DocumentKind.DRAIN: frozenset({Role.ADMIN}),
        DocumentKind.UNDRAIN: frozenset({Role.ADMIN}),
        DocumentKind.MAINTENANCE: frozenset({Role.ADMIN}),
        DocumentKind.FORGET: frozenset({Role.ADMIN}),
    }
)
"""For each kind of document, the roles whose signature makes it valid."""


def may(roles: Iterable[Role], action: Action) -> bool:
    """Whether a peer with these roles may make this request."""
    return any(action in PERMITTED_ACTIONS[role] for role in roles)


def may_author(author: Identity, kind: DocumentKind, *, about: str | None = None) -> bool:
    """Whether a document of this kind is valid with the signature of `author`.

    `about` is the id of the node that a `member` document describes; a node speaks only about
    itself, so without `about` no member document is valid. For other kinds it plays no part.
    """
    if kind is DocumentKind.MEMBER and about != author.node_id:
        return False
    return not author.roles.isdisjoint(PERMITTED_AUTHORS[kind])
