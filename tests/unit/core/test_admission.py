"""Admission: who may say what, whoever brings it."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec.structs import replace

from ckptd.client.pki import make_ca_certificate, make_leaf_certificate
from ckptd.core import limits
from ckptd.core.admission import AUTHOR_ROLES, admit, check_size
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
    content_id,
    encode,
)
from ckptd.core.identity import Identity, Role
from ckptd.core.signing import Signer
from ckptd.errors import DocumentRefused

CLUSTER = "home"
TIME = "2026-01-02T03:04:05Z"
NONCE = "0" * 32
VERSION, OTHER = "ab" * 32, "cd" * 32

CA_KEY = Ed25519PrivateKey.generate()
CA = make_ca_certificate(CLUSTER, CA_KEY)

MANIFEST = Manifest(
    format=1,
    cluster=CLUSTER,
    name="run/a",
    order=1,
    created=TIME,
    host="laptop",
    nonce=NONCE,
    unit="directory",
    content_id=content_id(()),
    copies=2,
    redundancy="copies",
    mode=0o755,
    entries=(),
    shards=(),
)
REMOVAL = Tombstone(
    format=1,
    cluster=CLUSTER,
    order=2,
    created=TIME,
    nonce=NONCE,
    reason="rm",
    versions=(VERSION,),
)
RETENTION = replace(REMOVAL, reason="retention", justified_by=OTHER)
PIN = Pin(format=1, cluster=CLUSTER, order=3, created=TIME, nonce=NONCE, version=VERSION)
UNPIN = Unpin(format=1, cluster=CLUSTER, order=4, created=TIME, nonce=NONCE, pins=(OTHER,))
MEMBER = Member(
    format=1,
    cluster=CLUSTER,
    order=5,
    created=TIME,
    node="pi1",
    roles=("worker",),
    address="10.0.0.1:7701",
    bulk_port=7702,
)
DRAIN = Drain(format=1, cluster=CLUSTER, order=6, created=TIME, nonce=NONCE, node="pi1")
UNDRAIN = Undrain(format=1, cluster=CLUSTER, order=7, created=TIME, nonce=NONCE, drains=(OTHER,))
MAINTENANCE = Maintenance(
    format=1, cluster=CLUSTER, order=8, created=TIME, nonce=NONCE, node="pi1", seconds=60
)
FORGET = Forget(
    format=1, cluster=CLUSTER, order=9, created=TIME, nonce=NONCE, node="pi1", serials=("0" * 40,)
)
UNKNOWN = msgspec.json.encode(
    {"cluster": CLUSTER, "format": 2, "kind": "manifest", "order": 9, "payload": [1, 2]}
)
MAY_WRITE: list[tuple[Document, set[Role]]] = [
    (MANIFEST, {Role.COORDINATOR, Role.CLIENT}),
    (REMOVAL, {Role.CLIENT, Role.ADMIN}),
    (RETENTION, {Role.COORDINATOR}),
    (PIN, {Role.CLIENT, Role.ADMIN}),
    (UNPIN, {Role.CLIENT, Role.ADMIN}),
    (MEMBER, {Role.WORKER}),
    (DRAIN, {Role.ADMIN}),
    (UNDRAIN, {Role.ADMIN}),
    (MAINTENANCE, {Role.ADMIN}),
    (FORGET, {Role.ADMIN}),
]


def signer(*roles: Role, node_id: str = "pi1", ca_key: Ed25519PrivateKey = CA_KEY) -> Signer:
    key = Ed25519PrivateKey.generate()
    ca = CA if ca_key is CA_KEY else make_ca_certificate(CLUSTER, ca_key)
    certificate = make_leaf_certificate(
        CLUSTER,
        roles,
        node_id,
        key.public_key(),
        ca=ca,
        ca_key=ca_key,
        valid_to=datetime(2030, 1, 1, tzinfo=UTC),
    )
    return Signer(key, certificate.public_bytes(Encoding.DER))


SIGNERS = {role: signer(role) for role in Role}


def admitted(
    raw: bytes, by: Signer, *, ca: x509.Certificate = CA
) -> tuple[str, Document | UnknownDocument, Identity]:
    return admit(raw, by.sign(raw), cluster=CLUSTER, ca=ca)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("document", "writers"), MAY_WRITE, ids=lambda value: getattr(value, "reason", None)
)
def test_only_the_right_roles_write_each_kind(
    document: Document, writers: set[Role], role: Role
) -> None:
    raw = encode(document)
    if role in writers:
        identifier, content, author = admitted(raw, SIGNERS[role])
        assert identifier == hashlib.sha256(raw).hexdigest()
        assert content == document
        assert (author.node_id, author.roles) == ("pi1", frozenset({role}))
    else:
        with pytest.raises(DocumentRefused, match=f"{role.value} pi1 of cluster home may not"):
            admitted(raw, SIGNERS[role])


def test_a_node_speaks_only_about_itself_and_only_of_roles_that_it_has() -> None:
    with pytest.raises(DocumentRefused, match="member document of pi2"):
        admitted(encode(replace(MEMBER, node="pi2")), SIGNERS[Role.WORKER])
    both = encode(replace(MEMBER, roles=("worker", "coordinator")))
    with pytest.raises(DocumentRefused, match="may not write"):
        admitted(both, SIGNERS[Role.WORKER])
    admitted(both, signer(Role.WORKER, Role.COORDINATOR))


@pytest.mark.parametrize("role", list(Role))
def test_what_cannot_be_read_needs_an_author_who_may_write_at_all(role: Role) -> None:
    if role is Role.MONITOR:
        with pytest.raises(DocumentRefused, match="may not write this manifest document"):
            admitted(UNKNOWN, SIGNERS[role])
    else:
        _, content, _ = admitted(UNKNOWN, SIGNERS[role])
        assert content == UnknownDocument("manifest", 2, 9)
    assert (role in AUTHOR_ROLES) == (role is not Role.MONITOR)


def test_a_forged_or_foreign_signature_is_refused() -> None:
    raw = encode(MANIFEST)
    envelope = SIGNERS[Role.CLIENT].sign(raw)
    changed = encode(replace(MANIFEST, name="run/b"))
    with pytest.raises(DocumentRefused, match="signed"):
        admit(changed, envelope, cluster=CLUSTER, ca=CA)
    with pytest.raises(DocumentRefused, match="author"):
        admitted(raw, signer(Role.CLIENT, ca_key=Ed25519PrivateKey.generate()))


def test_a_document_of_another_cluster_is_refused_even_if_signed_here() -> None:
    with pytest.raises(DocumentRefused, match="belongs to cluster 'other'"):
        admitted(encode(replace(MANIFEST, cluster="other")), SIGNERS[Role.CLIENT])


@pytest.mark.parametrize("name", ["", "../etc", "a//b", "a@b", "~a", "a/./b", "/a"])
def test_a_manifest_with_a_forbidden_name_is_refused(name: str) -> None:
    with pytest.raises(DocumentRefused, match="name"):
        admitted(encode(replace(MANIFEST, name=name)), SIGNERS[Role.CLIENT])


@pytest.mark.parametrize("justified_by", [None, VERSION])
def test_a_retention_tombstone_names_a_survivor(justified_by: str | None) -> None:
    raw = encode(replace(RETENTION, justified_by=justified_by))
    with pytest.raises(DocumentRefused, match="justif"):
        admitted(raw, SIGNERS[Role.COORDINATOR])


def test_an_overlong_document_is_refused_before_its_signature_is_looked_at() -> None:
    raw = bytes(limits.DOCUMENT_MAX_BYTES + 1)
    with pytest.raises(DocumentRefused, match="over the limit"):
        admit(raw, b"no envelope", cluster=CLUSTER, ca=CA)


@pytest.mark.parametrize(
    ("roles", "most"),
    [
        ({Role.WORKER}, limits.WORKER_DOCUMENT_MAX_BYTES),
        ({Role.CLIENT}, limits.DOCUMENT_MAX_BYTES),
        ({Role.WORKER, Role.COORDINATOR}, limits.DOCUMENT_MAX_BYTES),
    ],
)
def test_how_long_a_document_may_be_is_known_before_it_is_read(roles: set[Role], most: int) -> None:
    envelope = signer(*roles).sign(b"anything")
    check_size(most, envelope, cluster=CLUSTER, ca=CA)
    with pytest.raises(DocumentRefused, match=f"of {most + 1} bytes is over the limit of {most}"):
        check_size(most + 1, envelope, cluster=CLUSTER, ca=CA)


def test_a_long_document_of_a_stranger_is_refused_before_it_is_read() -> None:
    envelope = signer(Role.CLIENT, ca_key=Ed25519PrivateKey.generate()).sign(b"anything")
    with pytest.raises(DocumentRefused, match="not signed by this cluster's CA"):
        check_size(limits.WORKER_DOCUMENT_MAX_BYTES + 1, envelope, cluster=CLUSTER, ca=CA)
