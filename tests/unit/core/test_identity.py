"""Certificates: exactly ours are taken, and everything else is refused for a stated reason."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import combinations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from ckptd.client.pki import make_ca_certificate, make_leaf_certificate
from ckptd.core.identity import (
    LEAF_KEY_USAGE,
    Identity,
    Role,
    cluster_of_ca,
    identity_of,
    identity_uri,
    load_ca,
    roles_may_combine,
    verify_chain,
)
from ckptd.core.limits import CERTIFICATE_MAX_BYTES
from ckptd.errors import NameRefused, NotAuthorized

CA_KEY = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
CA = make_ca_certificate("home", CA_KEY)
LEAF_KEY = Ed25519PrivateKey.from_private_bytes(b"l" * 32)
VALID_TO = datetime(2036, 1, 1, tzinfo=UTC)
NO_CA = x509.BasicConstraints(ca=False, path_length=None)
CRITICAL_UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")


def ours(*roles: Role, cluster: str = "home", node_id: str = "pi1") -> bytes:
    certificate = make_leaf_certificate(
        cluster, roles, node_id, LEAF_KEY.public_key(), ca=CA, ca_key=CA_KEY, valid_to=VALID_TO
    )
    return certificate.public_bytes(Encoding.DER)


def crafted(
    names: Sequence[x509.GeneralName | str] = ("ckptd://home/worker/pi1",),
    *,
    issuer: x509.Name = CA.subject,
    signing_key: Ed25519PrivateKey = CA_KEY,
    leaf_key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey = LEAF_KEY,
    constraints: x509.BasicConstraints | None = NO_CA,
    usage: x509.KeyUsage | None = LEAF_KEY_USAGE,
    extra: Sequence[x509.ExtensionType] = (),
) -> bytes:
    """A certificate signed by our CA in which one thing at a time is not as it should be."""
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pi1")]))
        .issuer_name(issuer)
        .public_key(leaf_key.public_key())
        .serial_number(7)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(VALID_TO)
    )
    if names:
        general = [x509.UniformResourceIdentifier(n) if isinstance(n, str) else n for n in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(general), critical=False)
    if constraints is not None:
        builder = builder.add_extension(constraints, critical=True)
    if usage is not None:
        builder = builder.add_extension(usage, critical=True)
    for extension in extra:
        builder = builder.add_extension(extension, critical=True)
    return builder.sign(signing_key, None).public_bytes(Encoding.DER)


def key_usage(*, sign: bool = True, agree: bool = False, certify: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=agree,
        key_cert_sign=certify,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("roles", "is_node"),
    [
        ({Role.WORKER}, True),
        ({Role.COORDINATOR}, True),
        ({Role.WORKER, Role.COORDINATOR}, True),
        ({Role.CLIENT}, False),
        ({Role.ADMIN}, False),
        ({Role.CLIENT, Role.ADMIN}, False),
        ({Role.MONITOR}, False),
    ],
)
def test_an_issued_certificate_gives_back_its_identity(roles: set[Role], is_node: bool) -> None:
    certificate = ours(*roles)
    identity = identity_of(certificate, cluster="home")
    assert identity.cluster == "home"
    assert identity.roles == roles
    assert identity.node_id == "pi1"
    assert identity.is_node is is_node
    assert int(identity.serial, 16) == x509.load_der_x509_certificate(certificate).serial_number
    assert verify_chain(certificate, CA) == LEAF_KEY.public_key()


def test_a_serial_is_always_forty_digits() -> None:
    assert identity_of(crafted(), cluster="home").serial == "0" * 39 + "7"


def test_an_identity_reads_as_a_sentence_part() -> None:
    identity = identity_of(ours(Role.WORKER, Role.COORDINATOR), cluster="home")
    assert str(identity) == "coordinator+worker pi1 of cluster home"


def test_only_machines_and_persons_combine_roles() -> None:
    allowed = {
        frozenset(roles)
        for count in range(len(Role) + 1)
        for roles in combinations(Role, count)
        if roles_may_combine(roles)
    }
    assert allowed == {
        *(frozenset({role}) for role in Role),
        frozenset({Role.WORKER, Role.COORDINATOR}),
        frozenset({Role.CLIENT, Role.ADMIN}),
    }


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ((), "no readable name"),
        (("ckptd://other/worker/pi1",), "for cluster 'other', not 'home'"),
        (("ckptd://Home/worker/pi1",), "for cluster 'Home'"),
        (("ckptd://home/root/pi1",), "'root' is not a role"),
        (("ckptd://home/WORKER/pi1",), "'WORKER' is not a role"),
        (("ckptd://home/worker/",), "not of the form"),
        (("ckptd://home/worker",), "not of the form"),
        (("ckptd://home/worker/pi1/",), "not of the form"),
        (("ckptd://home/worker/pi1/x",), "not of the form"),
        (("https://home/worker/pi1",), "not of the form"),
        (("CKPTD://home/worker/pi1",), "not of the form"),
        ((" ckptd://home/worker/pi1",), "not of the form"),
        (("ckptd://home/worker/pi1\n",), "node id"),
        (("ckptd://home/worker/..",), "node id"),
        (("ckptd://home/worker/pi1?",), "node id"),
        (("ckptd://home/worker/" + "p" * 64,), "node id"),
        (("ckptd://home/worker/pi1", "ckptd://home/coordinator/pi2"), "one id, not 2"),
        (("ckptd://home/worker/pi1", "ckptd://home/worker/pi1"), "role worker twice"),
        (("ckptd://home/worker/pi1", "ckptd://home/worker/pi2"), "role worker twice"),
        (("ckptd://home/worker/pi1", "ckptd://home/admin/pi1"), "may not combine"),
        (("ckptd://home/worker/pi1", "ckptd://other/coordinator/pi1"), "for cluster 'other'"),
        (("ckptd://home/worker/pi1", x509.DNSName("pi1")), "not a ckptd:// URI"),
        ((x509.DNSName("ckptd://home/worker/pi1"),), "not a ckptd:// URI"),
    ],
)
def test_names_that_are_not_exactly_ours_are_refused(
    names: Sequence[x509.GeneralName | str], reason: str
) -> None:
    with pytest.raises(NotAuthorized) as refusal:
        identity_of(crafted(names), cluster="home")
    assert reason in refusal.value.message


def test_the_common_name_is_never_read() -> None:
    with pytest.raises(NotAuthorized, match="no readable name"):
        identity_of(crafted(()), cluster="home")


@pytest.mark.parametrize(
    "der", [b"", b"\x30", b"not a certificate", ours(Role.WORKER) + b"\0", ours(Role.WORKER)[:-1]]
)
def test_bytes_that_are_no_certificate_are_refused(der: bytes) -> None:
    with pytest.raises(NotAuthorized, match="cannot be read"):
        identity_of(der, cluster="home")
    with pytest.raises(NotAuthorized, match="cannot be read"):
        verify_chain(der, CA)


def test_a_huge_certificate_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(NotAuthorized, match="longer than"):
        identity_of(b"\x30" * (CERTIFICATE_MAX_BYTES + 1), cluster="home")


@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
def test_no_flipped_bit_passes() -> None:
    """Every single bit, because the parser has an exception of its own for many of them."""
    certificate = ours(Role.WORKER)
    for bit in range(len(certificate) * 8):
        flipped = bytearray(certificate)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(NotAuthorized):
            verify_chain(bytes(flipped), CA)
        try:
            identity = identity_of(bytes(flipped), cluster="home")
        except NotAuthorized:
            continue
        assert identity.cluster == "home"


def test_a_certificate_has_one_encoding() -> None:
    """The parser takes a signature whose last bit is said to be unused, if that bit is 0."""
    original = next(
        certificate
        for certificate in (ours(Role.WORKER) for _ in range(1000))
        if certificate[-1] & 1 == 0
    )
    variant = original[:-65] + b"\x01" + original[-64:]
    assert x509.load_der_x509_certificate(variant).serial_number
    assert verify_chain(original, CA)
    with pytest.raises(NotAuthorized, match="encoding"):
        verify_chain(variant, CA)


def test_algorithms_that_nobody_knows_are_refused() -> None:
    ed25519, unknown = b"\x06\x03\x2b\x65\x70", b"\x06\x03\x2b\x65\x7f"
    for count in (1, 2, 3):
        with pytest.raises(NotAuthorized):
            verify_chain(ours(Role.WORKER).replace(ed25519, unknown, count), CA)
    with pytest.raises(NotAuthorized, match="cannot be used"):
        load_ca(
            ssl.DER_cert_to_PEM_cert(
                CA.public_bytes(Encoding.DER).replace(ed25519, unknown)
            ).encode()
        )


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_refused_and_nothing_else_happens(der: bytes) -> None:
    with pytest.raises(NotAuthorized):
        identity_of(der, cluster="home")


def test_another_ca_of_the_same_name_is_not_ours() -> None:
    other_key = Ed25519PrivateKey.from_private_bytes(b"o" * 32)
    assert make_ca_certificate("home", other_key).subject == CA.subject
    with pytest.raises(NotAuthorized, match="not signed by this cluster's CA"):
        verify_chain(crafted(signing_key=other_key), CA)


EC_KEY = ec.derive_private_key(7, ec.SECP256R1())


@pytest.mark.parametrize(
    ("certificate", "reason"),
    [
        (
            crafted(issuer=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "other")])),
            "not one of this cluster",
        ),
        (crafted(constraints=None), "not one of this cluster"),
        (crafted(usage=None), "not one of this cluster"),
        (crafted(constraints=x509.BasicConstraints(ca=True, path_length=0)), "one of a CA"),
        (crafted(usage=key_usage(certify=True)), "not exactly digital signature"),
        (crafted(usage=key_usage(sign=False, agree=True)), "not exactly digital signature"),
        (crafted(leaf_key=EC_KEY), "not Ed25519"),
        (crafted(extra=[CRITICAL_UNKNOWN]), "unknown critical extension 1.2.3.4"),
    ],
)
def test_certificates_that_the_ca_signed_for_another_use_are_refused(
    certificate: bytes, reason: str
) -> None:
    with pytest.raises(NotAuthorized) as refusal:
        verify_chain(certificate, CA)
    assert reason in refusal.value.message


def test_the_cas_own_certificate_is_nobody() -> None:
    der = CA.public_bytes(Encoding.DER)
    with pytest.raises(NotAuthorized, match="one of a CA"):
        verify_chain(der, CA)
    with pytest.raises(NotAuthorized, match="no readable name"):
        identity_of(der, cluster="home")


def test_a_ca_file_is_read_back() -> None:
    assert load_ca(pem(CA)) == CA
    assert cluster_of_ca(CA) == "home"


def test_ca_files_that_cannot_be_used_are_refused() -> None:
    leaf = x509.load_der_x509_certificate(ours(Role.WORKER))
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "home")])
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .serial_number(1)
        .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
        .not_valid_after(VALID_TO)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(certify=True), critical=True)
    )
    other_curve = builder.public_key(EC_KEY.public_key()).sign(EC_KEY, hashes.SHA256())
    not_by_itself = builder.public_key(CA_KEY.public_key()).sign(LEAF_KEY, None)
    for content, reason in [
        (b"", "cannot be used"),
        (b"rubbish", "cannot be used"),
        (pem(CA) * 2, "holds 2 certificates"),
        (pem(leaf), "may not sign others"),
        (pem(other_curve), "not Ed25519"),
        (pem(not_by_itself), "did not sign itself"),
    ]:
        with pytest.raises(NotAuthorized) as refusal:
            load_ca(content)
        assert reason in refusal.value.message


def test_a_ca_without_a_clusters_name_is_refused() -> None:
    two = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, "home"),
            x509.NameAttribute(NameOID.COMMON_NAME, "away"),
        ]
    )
    for name in (x509.Name([]), two):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(CA_KEY.public_key())
            .serial_number(1)
            .not_valid_before(datetime(2020, 1, 1, tzinfo=UTC))
            .not_valid_after(VALID_TO)
            .sign(CA_KEY, None)
        )
        with pytest.raises(NotAuthorized, match="names no cluster"):
            cluster_of_ca(certificate)
    with pytest.raises(NotAuthorized, match="cluster name"):
        cluster_of_ca(make_ca_certificate("Not A Name", CA_KEY))


@pytest.mark.parametrize(("cluster", "node_id"), [("a/b", "pi1"), ("home", "pi/1"), ("", "pi1")])
def test_uris_are_made_for_good_names_only(cluster: str, node_id: str) -> None:
    with pytest.raises(NameRefused):
        identity_uri(cluster, Role.WORKER, node_id)


def test_the_message_about_a_clusters_name_speaks_of_the_cluster() -> None:
    with pytest.raises(NameRefused) as refusal:
        identity_uri("", Role.WORKER, "pi1")
    assert "cluster name" in refusal.value.message
    assert "node id" not in refusal.value.message


@given(st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,60}[a-z0-9])?", fullmatch=True))
def test_every_good_id_survives_the_certificate(node_id: str) -> None:
    identity = identity_of(ours(Role.WORKER, node_id=node_id), cluster="home")
    assert identity == Identity("home", frozenset({Role.WORKER}), node_id, identity.serial)
