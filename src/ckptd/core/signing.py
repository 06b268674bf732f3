"""Signatures on catalogue documents: who wrote one can be told without any connection.

The author signs `SIGNATURE_CONTEXT` followed by the document's exact bytes with the key of its
certificate (Ed25519, RFC 8032). Certificate and signature travel next to the document, in an
envelope of their own, so that the document's id is the hash of the document alone and two authors
of equal bytes agree on it. Format of the envelope: docs/formats/certificates.md.
"""

from __future__ import annotations

import functools
from typing import Annotated, Final, Literal

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ckptd.core.identity import Identity, identity_of, verify_chain
from ckptd.core.limits import (
    CERTIFICATE_MAX_BYTES,
    SIGNATURE_AUTHORS_CACHED_MAX,
    SIGNATURE_ENVELOPE_MAX_BYTES,
)
from ckptd.errors import ConfigError, DocumentRefused, NotAuthorized

SIGNATURE_CONTEXT: Final = b"ckptd-document-v1\0"
"""Comes before the document in what is signed, so that a signature made for one purpose (a TLS
handshake, another format) never serves for another."""


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    certificate: Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_MAX_BYTES)]
    format: Literal["ckptd-signature-1"]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


_ENCODER: Final = msgspec.json.Encoder(order="sorted")
_DECODER: Final = msgspec.json.Decoder(_Envelope)


class Signer:
    """Signs documents as the holder of one certificate."""

    def __init__(self, private_key: Ed25519PrivateKey, certificate_der: bytes) -> None:
        """`private_key` belongs to the certificate; else NotAuthorized."""
        try:
            certified = x509.load_der_x509_certificate(certificate_der).public_key()
        except ValueError as error:
            raise NotAuthorized(f"the certificate cannot be read: {error}") from error
        if certified != private_key.public_key():
            raise NotAuthorized("the private key does not belong to the certificate")
        self._private_key = private_key
        self.certificate_der = certificate_der

    @classmethod
    def from_pem(cls, certificate_pem: bytes, key_pem: bytes) -> Signer:
        """A signer from the contents of the files that `tls.cert` and `tls.key` name.

        Raises ConfigError with the key whose file cannot be used.
        """
        try:
            key = load_pem_private_key(key_pem, password=None)
        except (ValueError, TypeError) as error:
            raise ConfigError("tls.key", "not an unencrypted private key (PEM)") from error
        if not isinstance(key, Ed25519PrivateKey):
            raise ConfigError("tls.key", "not an Ed25519 key")
        try:
            certificate = x509.load_pem_x509_certificate(certificate_pem)
        except ValueError as error:
            raise ConfigError("tls.cert", f"not a certificate (PEM): {error}") from error
        try:
            return cls(key, certificate.public_bytes(Encoding.DER))
        except NotAuthorized as error:
            raise ConfigError("tls.key", error.message) from error

    def sign(self, document: bytes) -> bytes:
        """The envelope for `document`, its exact canonical bytes. Equal input, equal output."""
        signature = self._private_key.sign(SIGNATURE_CONTEXT + document)
        return _ENCODER.encode(
            _Envelope(
                certificate=self.certificate_der,
                format="ckptd-signature-1",
                signature=signature,
            )
        )


def verify(document: bytes, envelope: bytes, ca: x509.Certificate, cluster: str) -> Identity:
    """The author of `document`, if the envelope proves it.

    `document` are the exact bytes as stored or received, `envelope` what `Signer.sign` returned,
    `ca` comes from `load_ca`. Raises DocumentRefused if the envelope is too long, not canonical or
    of an unknown format, if the certificate is not one of this cluster, or if the signature is not
    of these bytes.

    Not decided here: whether the author's role may write such a document (`may_author`), and
    whether its certificate was forgotten (`Identity.serial`).
    """
    decoded = _decode(envelope)
    try:
        identity, key = _author(decoded.certificate, ca, cluster)
    except NotAuthorized as error:
        raise DocumentRefused(f"the document's author is not known here: {error}") from error
    try:
        key.verify(decoded.signature, SIGNATURE_CONTEXT + document)
    except InvalidSignature as error:
        raise DocumentRefused(f"the document is not what {identity} signed") from error
    return identity


def author_of(envelope: bytes, ca: x509.Certificate, cluster: str) -> Identity:
    """Whose certificate an envelope carries. That they signed anything is not proved by this: it
    serves to refuse what they may not write before it is read. Raises DocumentRefused."""
    try:
        return _author(_decode(envelope).certificate, ca, cluster)[0]
    except NotAuthorized as error:
        if isinstance(error, DocumentRefused):
            raise
        raise DocumentRefused(f"the document's author is not known here: {error}") from error


def _decode(envelope: bytes) -> _Envelope:
    if len(envelope) > SIGNATURE_ENVELOPE_MAX_BYTES:
        raise DocumentRefused(
            f"the signature of a document is longer than {SIGNATURE_ENVELOPE_MAX_BYTES} bytes"
        )
    try:
        decoded = _DECODER.decode(envelope)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DocumentRefused(f"the signature of a document is malformed: {error}") from error
    # One signature, one encoding: nobody can multiply a document's envelopes.
    if _ENCODER.encode(decoded) != envelope:
        raise DocumentRefused("the signature of a document is not in its canonical form")
    return decoded


# A catalogue of thousands of documents has a handful of authors. Refusals are never cached.
@functools.lru_cache(maxsize=SIGNATURE_AUTHORS_CACHED_MAX)
def _author(
    certificate_der: bytes, ca: x509.Certificate, cluster: str
) -> tuple[Identity, Ed25519PublicKey]:
    key = verify_chain(certificate_der, ca)
    return identity_of(certificate_der, cluster=cluster), key
