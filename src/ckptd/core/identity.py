"""Who a certificate speaks for, and whether the cluster's CA really said so.

A leaf certificate carries one or more subject alternative names `ckptd://CLUSTER/ROLE/ID` and no
other name. The common name is decoration and never read. Format: docs/formats/certificates.md.

Everything here works on bytes and reads no clock. Validity in time is left to the TLS handshake:
a document that was signed before its author's certificate expired stays valid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import StrEnum
from typing import Final

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import ExtensionOID

from ckptd.core.limits import CERTIFICATE_MAX_BYTES
from ckptd.core.names import check_node_id
from ckptd.errors import NameRefused, NotAuthorized


class Role(StrEnum):
    """What a certificate may be used for; `ckptd.core.permissions` says what each may do."""

    WORKER = "worker"
    COORDINATOR = "coordinator"
    CLIENT = "client"
    ADMIN = "admin"
    MONITOR = "monitor"


NODE_ROLES: Final = frozenset({Role.WORKER, Role.COORDINATOR})
"""Roles of machines that run the daemon; only they may answer connections."""

_PERSON_ROLES: Final = frozenset({Role.CLIENT, Role.ADMIN})
_MONITOR_ROLES: Final = frozenset({Role.MONITOR})

_URI = re.compile(r"ckptd://([^/]+)/([^/]+)/([^/]+)", re.ASCII)

_KNOWN_CRITICAL_EXTENSIONS: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    }
)


class Identity(msgspec.Struct, frozen=True):
    """What a certificate says about its holder.

    `serial` is the certificate's serial number as 40 lower-case hex digits, the form in which a
    `forget` document lists it.
    """

    cluster: str
    roles: frozenset[Role]
    node_id: str
    serial: str

    @property
    def is_node(self) -> bool:
        """Whether the holder may run the daemon, and so may answer as the node `node_id`."""
        return bool(self.roles & NODE_ROLES)

    def __str__(self) -> str:
        roles = "+".join(sorted(role.value for role in self.roles))
        return f"{roles} {self.node_id} of cluster {self.cluster}"


def roles_may_combine(roles: Iterable[Role]) -> bool:
    """Whether one certificate may carry these roles.

    A machine may be worker and coordinator, a person client and admin. Nothing else combines, so
    that a stolen worker can never hold a key that deletes.
    """
    wanted = frozenset(roles)
    return bool(wanted) and any(
        wanted <= allowed for allowed in (NODE_ROLES, _PERSON_ROLES, _MONITOR_ROLES)
    )


def identity_uri(cluster: str, role: Role, node_id: str) -> str:
    """The subject alternative name for one role. Raises NameRefused for names that break the rules.

    The inverse of what `identity_of` reads.
    """
    _check_cluster(cluster)
    check_node_id(node_id)
    return f"ckptd://{cluster}/{role.value}/{node_id}"


def load_ca(pem: bytes) -> x509.Certificate:
    """The cluster's CA certificate from its PEM file (exactly one certificate).

    Raises NotAuthorized if it is not the Ed25519 certificate of a CA that signed itself.
    """
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        if len(certificates) != 1:
            raise NotAuthorized(f"the CA file holds {len(certificates)} certificates, not one")
        ca = certificates[0]
        if not isinstance(ca.public_key(), Ed25519PublicKey):
            raise NotAuthorized("the CA's key is not Ed25519")
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = ca.extensions.get_extension_for_class(x509.KeyUsage).value
        if not (constraints.ca and usage.key_cert_sign):
            raise NotAuthorized("the CA file holds a certificate that may not sign others")
        ca.verify_directly_issued_by(ca)
    except _UNREADABLE as error:
        raise NotAuthorized(f"the CA certificate cannot be used: {error}") from error
    except InvalidSignature as error:
        raise NotAuthorized("the CA certificate did not sign itself") from error
    return ca


def cluster_of_ca(ca: x509.Certificate) -> str:
    """The cluster that a CA certificate is for, from its common name.

    Raises NotAuthorized if there is none. Only the tools that issue certificates need it; nodes
    take the cluster's name from their config.
    """
    names = ca.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    if len(names) != 1:
        raise NotAuthorized("the CA certificate names no cluster")
    cluster = str(names[0].value)
    try:
        return _check_cluster(cluster)
    except NameRefused as error:
        raise NotAuthorized(f"the CA certificate names no cluster: {error}") from error


def identity_of(certificate_der: bytes, *, cluster: str) -> Identity:
    """The identity in a leaf certificate, if it is one of `cluster` and exactly of our form.

    Says nothing about who signed it: that is `verify_chain`, or the TLS handshake. Raises
    NotAuthorized for anything else: another cluster, unknown roles, roles that do not combine,
    names that disagree, names of other kinds, repeated or unreadable ones.
    """
    certificate = _load(certificate_der)
    try:
        names = list(
            certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    except _UNREADABLE as error:
        raise NotAuthorized(f"the certificate carries no readable name: {error}") from error
    roles: set[Role] = set()
    ids: set[str] = set()
    for name in names:
        if not isinstance(name, x509.UniformResourceIdentifier):
            raise NotAuthorized("the certificate carries a name that is not a ckptd:// URI")
        role, node_id = _role_and_id(name.value, cluster)
        if role in roles:
            raise NotAuthorized(f"the certificate carries the role {role.value} twice")
        roles.add(role)
        ids.add(node_id)
    if len(ids) != 1:
        raise NotAuthorized(f"the certificate must carry one id, not {len(ids)}")
    if not roles_may_combine(roles):
        combined = ", ".join(sorted(roles))
        raise NotAuthorized(f"one certificate may not combine the roles {combined}")
    return Identity(
        cluster=cluster,
        roles=frozenset(roles),
        node_id=ids.pop(),
        serial=serial_text(certificate),
    )


def verify_chain(certificate_der: bytes, ca: x509.Certificate) -> Ed25519PublicKey:
    """The certificate's public key, if `ca` signed it as a leaf that may sign data.

    `ca` is one that `load_ca` returned. Checked: the CA's signature and name, an Ed25519 key, not
    a CA itself, key usage digital signature and no other, no critical extension that we do not
    know (RFC 5280, section 4.2). Raises NotAuthorized. Time is not checked.
    """
    certificate = _load(certificate_der)
    try:
        certificate.verify_directly_issued_by(ca)
        key = certificate.public_key()
        extensions = certificate.extensions
        constraints = extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = extensions.get_extension_for_class(x509.KeyUsage).value
    except InvalidSignature as error:
        raise NotAuthorized("the certificate was not signed by this cluster's CA") from error
    except _UNREADABLE as error:
        raise NotAuthorized(f"the certificate is not one of this cluster: {error}") from error
    if certificate_der != _only_encoding(certificate):
        raise NotAuthorized("the certificate's encoding is not the one that the CA made")
    if not isinstance(key, Ed25519PublicKey):
        raise NotAuthorized("the certificate's key is not Ed25519")
    if constraints.ca:
        raise NotAuthorized("the certificate is one of a CA, not of a node or person")
    if usage != LEAF_KEY_USAGE:
        raise NotAuthorized("the certificate's key usage is not exactly digital signature")
    for extension in extensions:
        if extension.critical and extension.oid not in _KNOWN_CRITICAL_EXTENSIONS:
            oid = extension.oid.dotted_string
            raise NotAuthorized(f"the certificate has the unknown critical extension {oid}")
    return key


def serial_text(certificate: x509.Certificate) -> str:
    """The serial number as 40 lower-case hex digits (RFC 5280 allows at most 20 bytes)."""
    return f"{certificate.serial_number:040x}"


LEAF_KEY_USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
"""The key usage of every leaf certificate: it signs handshakes and documents, nothing else."""

# What the parser raises for bytes that are no certificate, for versions and algorithms that it
# does not know, and for extensions missing, repeated, of unknown name kinds, or not encodable as
# ASCII. TypeError: a key type that cannot verify.
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


def _load(certificate_der: bytes) -> x509.Certificate:
    if len(certificate_der) > CERTIFICATE_MAX_BYTES:
        raise NotAuthorized(f"the certificate is longer than {CERTIFICATE_MAX_BYTES} bytes")
    try:
        return x509.load_der_x509_certificate(certificate_der)
    except _UNREADABLE as error:
        raise NotAuthorized(f"the certificate cannot be read: {error}") from error


def _only_encoding(certificate: x509.Certificate) -> bytes:
    """The bytes that an Ed25519 certificate has in DER (RFC 5280 section 4.1, RFC 8410).

    The CA's signature covers the inner part alone. Around it a parser may tolerate variants, such
    as a count of unused bits in the signature, and one certificate would have several encodings.
    """
    body = (
        certificate.tbs_certificate_bytes
        + b"\x30\x05\x06\x03\x2b\x65\x70"  # the algorithm: Ed25519, without parameters
        + b"\x03\x41\x00"  # a bit string: 65 bytes follow, the first says that no bit is unused
        + certificate.signature
    )
    return b"\x30\x82" + len(body).to_bytes(2) + body


def _role_and_id(uri: str, cluster: str) -> tuple[Role, str]:
    match = _URI.fullmatch(uri)
    if match is None:
        raise NotAuthorized(f"{uri!r} is not of the form ckptd://CLUSTER/ROLE/ID")
    named_cluster, role_word, node_id = match.groups()
    if named_cluster != cluster:
        raise NotAuthorized(f"the certificate is for cluster {named_cluster!r}, not {cluster!r}")
    if role_word not in Role.__members__.values():
        raise NotAuthorized(f"{role_word!r} is not a role")
    try:
        check_node_id(node_id)
    except NameRefused as error:
        raise NotAuthorized(f"the certificate's {error}") from error
    return Role(role_word), node_id


def _check_cluster(cluster: str) -> str:
    try:
        return check_node_id(cluster)
    except NameRefused as error:
        # The same rule as for node ids, but the message must not send the reader to the node.
        raise NameRefused(error.message.replace("node id", "cluster name", 1)) from error
