"""Signatures of documents: made, verified, and refused when anything at all is different."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from ckptd.client.pki import make_ca_certificate, make_leaf_certificate
from ckptd.core.identity import Identity, Role, load_ca
from ckptd.core.limits import SIGNATURE_ENVELOPE_MAX_BYTES
from ckptd.core.signing import SIGNATURE_CONTEXT, Signer, author_of, verify
from ckptd.errors import ConfigError, DocumentRefused, NotAuthorized

GOLDEN = Path(__file__).parents[2] / "golden" / "signature-1"
GOLDEN_SERIAL = "1ec452b3f8cb4a02c47e56c51392bfb50375eb9f"
GOLDEN_AUTHOR_KEY = b"golden author, for the test only"

CA_KEY = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
CA = make_ca_certificate("home", CA_KEY)
KEY = Ed25519PrivateKey.from_private_bytes(b"k" * 32)
OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
DOCUMENT = b'{"cluster":"home","kind":"example"}'


def certificate_pem(cluster: str = "home", encoding: Encoding = Encoding.PEM) -> bytes:
    return make_leaf_certificate(
        cluster,
        {Role.CLIENT},
        "laptop",
        KEY.public_key(),
        ca=CA,
        ca_key=CA_KEY,
        valid_to=datetime(2036, 1, 1, tzinfo=UTC),
    ).public_bytes(encoding)


SIGNER = Signer(KEY, certificate_pem(encoding=Encoding.DER))


def key_pem(password: bytes | None = None) -> bytes:
    encryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    return KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def test_the_golden_envelope_is_read_and_made_bit_by_bit() -> None:
    document = (GOLDEN / "document.json").read_bytes()
    envelope = (GOLDEN / "document.sig").read_bytes()
    ca = load_ca((GOLDEN / "ca.pem").read_bytes())
    assert verify(document, envelope, ca, "home") == Identity(
        "home", frozenset({Role.CLIENT}), "laptop", GOLDEN_SERIAL
    )
    key = Ed25519PrivateKey.from_private_bytes(GOLDEN_AUTHOR_KEY)
    certificate = msgspec.convert(json.loads(envelope)["certificate"], bytes)
    assert Signer(key, certificate).sign(document) == envelope


@given(st.binary(max_size=2000))
def test_what_was_signed_verifies(document: bytes) -> None:
    identity = verify(document, SIGNER.sign(document), CA, "home")
    assert identity.node_id == "laptop"


@given(st.data())
def test_any_other_document_is_refused(data: st.DataObject) -> None:
    other = data.draw(st.binary(max_size=100).filter(lambda b: b != DOCUMENT))
    with pytest.raises(DocumentRefused, match="not what client laptop of cluster home signed"):
        verify(other, SIGNER.sign(DOCUMENT), CA, "home")


@given(st.data())
def test_any_other_envelope_is_refused(data: st.DataObject) -> None:
    envelope = bytearray(SIGNER.sign(DOCUMENT))
    position = data.draw(st.integers(0, len(envelope) - 1))
    envelope[position] = data.draw(st.integers(0, 255).filter(lambda b: b != envelope[position]))
    with pytest.raises(DocumentRefused):
        verify(DOCUMENT, bytes(envelope), CA, "home")


@given(st.binary(max_size=300))
def test_arbitrary_envelopes_are_refused(envelope: bytes) -> None:
    with pytest.raises(DocumentRefused):
        verify(DOCUMENT, envelope, CA, "home")


def test_one_signature_has_one_envelope() -> None:
    envelope = SIGNER.sign(DOCUMENT)
    assert SIGNER.sign(DOCUMENT) == envelope
    content = json.loads(envelope)
    for same_meaning in (
        envelope + b"\n",
        json.dumps(content).encode(),
        json.dumps(dict(reversed(content.items())), separators=(",", ":")).encode(),
    ):
        assert json.loads(same_meaning) == content
        with pytest.raises(DocumentRefused, match="canonical"):
            verify(DOCUMENT, same_meaning, CA, "home")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": "ckptd-signature-2"}, "malformed"),
        ({"more": 1}, "malformed"),
        ({"signature": "AAAA"}, "malformed"),
        ({"certificate": "not base64"}, "malformed"),
        ({"certificate": ""}, "author is not known here"),
    ],
)
def test_envelopes_of_other_shapes_are_refused(change: dict[str, object], reason: str) -> None:
    content = {**json.loads(SIGNER.sign(DOCUMENT)), **change}
    envelope = msgspec.json.encode(content, order="sorted")
    with pytest.raises(DocumentRefused, match=reason):
        verify(DOCUMENT, envelope, CA, "home")


def test_a_long_envelope_is_refused_before_it_is_read() -> None:
    with pytest.raises(DocumentRefused, match="longer than"):
        verify(DOCUMENT, b" " * (SIGNATURE_ENVELOPE_MAX_BYTES + 1), CA, "home")


def test_authors_of_another_ca_or_cluster_are_refused() -> None:
    envelope = SIGNER.sign(DOCUMENT)
    other_ca = make_ca_certificate("home", OTHER_KEY)
    with pytest.raises(DocumentRefused, match="not signed by this cluster's CA"):
        verify(DOCUMENT, envelope, other_ca, "home")
    with pytest.raises(DocumentRefused, match="for cluster 'home', not 'away'"):
        verify(DOCUMENT, envelope, CA, "away")
    # Refused also when the same author was admitted just before.
    verify(DOCUMENT, envelope, CA, "home")
    with pytest.raises(DocumentRefused):
        verify(DOCUMENT, envelope, other_ca, "home")


def test_a_signature_over_the_bare_document_does_not_count() -> None:
    content = json.loads(SIGNER.sign(DOCUMENT))
    for signed in (DOCUMENT, SIGNATURE_CONTEXT.rstrip(b"\0") + DOCUMENT):
        content["signature"] = KEY.sign(signed)
        with pytest.raises(DocumentRefused, match="not what"):
            verify(DOCUMENT, msgspec.json.encode(content, order="sorted"), CA, "home")


def test_a_signer_needs_the_key_of_its_certificate() -> None:
    with pytest.raises(NotAuthorized, match="does not belong"):
        Signer(OTHER_KEY, certificate_pem(encoding=Encoding.DER))
    with pytest.raises(NotAuthorized, match="cannot be read"):
        Signer(KEY, b"rubbish")


def test_a_signer_is_made_from_the_configs_files() -> None:
    signer = Signer.from_pem(certificate_pem(), key_pem())
    assert signer.sign(DOCUMENT)[-60:] == SIGNER.sign(DOCUMENT)[-60:]


def test_files_that_make_no_signer_are_named_by_their_key() -> None:
    curve_key = ec.derive_private_key(7, ec.SECP256R1()).private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    other_key = OTHER_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for certificate, key, config_key, reason in [
        (certificate_pem(), b"rubbish", "tls.key", "not an unencrypted private key"),
        (certificate_pem(), key_pem(b"secret"), "tls.key", "not an unencrypted private key"),
        (certificate_pem(), curve_key, "tls.key", "not an Ed25519 key"),
        (certificate_pem(), other_key, "tls.key", "does not belong"),
        (b"rubbish", key_pem(), "tls.cert", "not a certificate"),
    ]:
        with pytest.raises(ConfigError) as fault:
            Signer.from_pem(certificate, key)
        assert fault.value.key == config_key
        assert reason in fault.value.reason


def test_whose_envelope_it_is_can_be_told_before_the_document_is_read() -> None:
    envelope = SIGNER.sign(DOCUMENT)
    assert author_of(envelope, CA, "home") == verify(DOCUMENT, envelope, CA, "home")
    for ca, cluster, reason in [
        (make_ca_certificate("home", OTHER_KEY), "home", "not signed by this cluster's CA"),
        (CA, "away", "for cluster 'home', not 'away'"),
    ]:
        with pytest.raises(DocumentRefused, match=reason):
            author_of(envelope, ca, cluster)
    with pytest.raises(DocumentRefused):
        author_of(b"no envelope", CA, "home")
