"""The whole table of who may do what, spelled out."""

from __future__ import annotations

import pytest

from ckptd.core.identity import Identity, Role
from ckptd.core.permissions import Action, DocumentKind, may, may_author

ROLES = (Role.WORKER, Role.COORDINATOR, Role.CLIENT, Role.ADMIN, Role.MONITOR)

# Columns: worker, coordinator, client, admin, monitor.
ACTIONS = {
    Action.HELLO: "y y y y -",
    Action.PING: "y y y y -",
    Action.STATUS: "y y y y -",
    Action.HAVE: "y y y y -",
    Action.TOUCH: "- y y - -",
    Action.INVENTORY: "y y y y -",
    Action.PUT_SHARD: "y y y - -",
    Action.GET_SHARD: "- y y - -",
    Action.PUSH_SHARD: "- y y - -",
    Action.VERIFY: "- y y y -",
    Action.REPORT_CORRUPT: "- y y y -",
    Action.LIST_HEADERS: "y y y y -",
    Action.GET_DOCUMENTS: "y y y y -",
    Action.PUT_DOCUMENTS: "y y y y -",
    Action.SYNC: "y y y y -",
    Action.COPY_SHARDS: "y y - - -",
    Action.PROMISE: "y - - - -",
    Action.SURPLUS: "y y - - -",
    Action.WATCHED: "- y y y -",
    Action.PRUNE: "- - y y -",
    Action.SET_JOB: "- - y y -",
    Action.SCRAPE: "- - y y y",
}

DOCUMENTS = {
    DocumentKind.MANIFEST: "- y y - -",
    DocumentKind.TOMBSTONE_RETENTION: "- y - - -",
    DocumentKind.TOMBSTONE_RM: "- - y y -",
    DocumentKind.PIN: "- - y y -",
    DocumentKind.UNPIN: "- - y y -",
    DocumentKind.MEMBER: "y y - - -",
    DocumentKind.DRAIN: "- - - y -",
    DocumentKind.UNDRAIN: "- - - y -",
    DocumentKind.MAINTENANCE: "- - - y -",
    DocumentKind.FORGET: "- - - y -",
}


def author(*roles: Role, node_id: str = "pi1") -> Identity:
    return Identity("home", frozenset(roles), node_id, "0" * 40)


def test_the_tables_are_complete() -> None:
    assert set(ROLES) == set(Role)
    assert set(ACTIONS) == set(Action)
    assert set(DOCUMENTS) == set(DocumentKind)


@pytest.mark.parametrize("action", Action)
def test_actions(action: Action) -> None:
    for role, cell in zip(ROLES, ACTIONS[action].split(), strict=True):
        assert may({role}, action) is (cell == "y"), role


@pytest.mark.parametrize("kind", DocumentKind)
def test_authors(kind: DocumentKind) -> None:
    for role, cell in zip(ROLES, DOCUMENTS[kind].split(), strict=True):
        assert may_author(author(role), kind, about="pi1") is (cell == "y"), role


def test_several_roles_may_do_what_any_of_them_may() -> None:
    both = {Role.WORKER, Role.COORDINATOR}
    for action in Action:
        assert may(both, action) is (may({Role.WORKER}, action) or may({Role.COORDINATOR}, action))
    assert may_author(author(*both), DocumentKind.MANIFEST)
    assert not may_author(author(*both), DocumentKind.FORGET)


def test_no_role_may_do_nothing() -> None:
    assert not any(may((), action) for action in Action)
    assert not any(may_author(author(), kind, about="pi1") for kind in DocumentKind)


def test_a_node_speaks_about_itself_only() -> None:
    both = author(Role.WORKER, Role.COORDINATOR)
    assert may_author(both, DocumentKind.MEMBER, about="pi1")
    assert not may_author(both, DocumentKind.MEMBER, about="pi2")
    assert not may_author(both, DocumentKind.MEMBER)


def test_an_admin_may_speak_about_other_nodes_but_not_for_them() -> None:
    person = author(Role.ADMIN, node_id="me")
    assert may_author(person, DocumentKind.DRAIN, about="pi1")
    assert not may_author(person, DocumentKind.MEMBER, about="me")
