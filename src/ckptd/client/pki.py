"""The cluster's CA and its certificates, for people who do not use Ansible.

    DIR/ca.pem ca.key            the CA; its key never leaves DIR except inside the bundle
    DIR/client.pem client.key    may store and restore
    DIR/admin.pem admin.key      may decide (drain, forget, remove), reads no checkpoint bytes
    DIR/recovery.bundle          CA and client, encrypted with the recovery code

Every file appears whole and durable under its name or not at all, nothing is ever overwritten, and
private keys are readable by their owner alone. Certificates: docs/formats/certificates.md.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ckptd.client.exclusive_files import create_files
from ckptd.client.recovery import new_code, seal, unseal
from ckptd.core.identity import (
    LEAF_KEY_USAGE,
    NODE_ROLES,
    Role,
    cluster_of_ca,
    identity_uri,
    load_ca,
    roles_may_combine,
)
from ckptd.core.limits import RECOVERY_BUNDLE_MAX_BYTES
from ckptd.errors import IntegrityError, NotAuthorized, NotFound, Refused, TargetExists, UsageError

VALID_FROM: Final = datetime(2020, 1, 1, tzinfo=UTC)
"""Long past, because a Raspberry Pi boots with a clock that may be years behind."""

CA_VALID_TO: Final = datetime(2070, 1, 1, tzinfo=UTC)
"""A CA that expired would take every checkpoint's protection with it on one day."""

LEAF_LIFETIME: Final = timedelta(days=3652)

CA_FILES: Final = ("ca.pem", "ca.key")
CLIENT_FILES: Final = ("client.pem", "client.key")
ADMIN_FILES: Final = ("admin.pem", "admin.key")
BUNDLE_FILE: Final = "recovery.bundle"


@dataclass(frozen=True)
class IssuedFiles:
    """Where one identity's files lie: what the config's `tls` section names."""

    ca: Path
    cert: Path
    key: Path


def init_cluster(directory: Path, cluster: str, *, now: datetime | None = None) -> str:
    """Makes the CA of a new cluster with a client, an admin and the recovery bundle.

    `directory` is made (0700) if it is not there. Returns the recovery code, which is kept
    nowhere. Raises TargetExists if any of the files is there already, UsageError for a name that
    cannot name a cluster.
    """
    identity_uri(cluster, Role.CLIENT, "client")
    _refuse_existing(directory, (*CA_FILES, *CLIENT_FILES, *ADMIN_FILES, BUNDLE_FILE))
    ca_key = Ed25519PrivateKey.generate()
    ca = make_ca_certificate(cluster, ca_key)
    files = {"ca.key": _key_pem(ca_key), "ca.pem": ca.public_bytes(Encoding.PEM)}
    for role, names in ((Role.CLIENT, CLIENT_FILES), (Role.ADMIN, ADMIN_FILES)):
        files.update(_identity_files(names, cluster, {role}, role.value, ca, ca_key, now))
    code = new_code()
    sealed = {name: files[name] for name in (*CA_FILES, *CLIENT_FILES)}
    files[BUNDLE_FILE] = seal(cluster, sealed, code)
    # The CA certificate comes last: as long as it is missing, nothing was issued.
    create_files(directory, [*_private(files, except_for="ca.pem"), ("ca.pem", files["ca.pem"])])
    return code


def issue(
    directory: Path,
    roles: Collection[Role],
    node_id: str,
    *,
    out: Path | None = None,
    now: datetime | None = None,
) -> IssuedFiles:
    """Makes a key and a certificate signed by the CA in `directory`.

    `roles` are those that one certificate may carry together: worker and coordinator, or client
    and admin, or one alone. The files `NODE_ID.pem`, `NODE_ID.key` and a copy of `ca.pem` go to
    `out` (default: `directory`). The certificate is valid from 2020 until ten years after `now`
    (default: this machine's clock).

    Raises UsageError for roles or an id that break the rules, NotFound if there is no CA,
    NotAuthorized if it cannot be used, TargetExists if one of the files is there already.
    """
    if not roles_may_combine(roles):
        raise UsageError(
            f"one certificate cannot carry the roles {', '.join(sorted(roles))}: a node is worker, "
            "coordinator or both; a person is client, admin or both; a monitor is nothing else"
        )
    if node_id == "ca":
        raise UsageError("the id 'ca' is taken: its files would be those of the CA")
    ca, ca_key = _load_ca_pair(directory)
    cluster = cluster_of_ca(ca)
    names = (f"{node_id}.pem", f"{node_id}.key")
    files = _identity_files(names, cluster, roles, node_id, ca, ca_key, now)
    target = directory if out is None else out
    _refuse_existing(target, names)
    ca_pem = ca.public_bytes(Encoding.PEM)
    ca_copy = target / "ca.pem"
    to_create = _private(files)
    if not ca_copy.exists():
        to_create.append(("ca.pem", ca_pem))
    elif load_ca(_read(ca_copy)) != ca:
        raise TargetExists(f"{ca_copy} is the certificate of another CA")
    create_files(target, to_create)
    return IssuedFiles(ca=ca_copy, cert=target / names[0], key=target / names[1])


def recover(bundle: Path, code: str, directory: Path) -> list[Path]:
    """Opens a recovery bundle and writes its files to `directory`; returns their paths.

    `directory` is made (0700) if it is not there. The bundle itself is written there too, so that
    new workers can be given it. Raises UsageError for a mistyped code, NotAuthorized for the code
    of another bundle, IntegrityError for a damaged bundle, TargetExists if one of the files is
    there already, NotFound if there is no bundle.
    """
    sealed = _read(bundle, limit_bytes=RECOVERY_BUNDLE_MAX_BYTES)
    cluster, files = unseal(sealed, code)
    missing = sorted({*CA_FILES, *CLIENT_FILES} - set(files))
    if missing:
        raise IntegrityError(f"{bundle} does not hold {', '.join(missing)}")
    ca = load_ca(files["ca.pem"])
    if cluster_of_ca(ca) != cluster or _load_key(files["ca.key"], bundle).public_key() != (
        ca.public_key()
    ):
        raise IntegrityError(f"{bundle}: its CA certificate and key do not belong together")
    _refuse_existing(directory, files)
    to_create = _private(files, except_for="ca.pem")
    if not (directory / BUNDLE_FILE).exists():
        to_create.append((BUNDLE_FILE, sealed))
    return create_files(directory, [*to_create, ("ca.pem", files["ca.pem"])])


def make_ca_certificate(cluster: str, key: Ed25519PrivateKey) -> x509.Certificate:
    """The certificate of a cluster's CA, signed by itself, for the given key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, cluster)])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(CA_VALID_TO)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, None)
    )


def make_leaf_certificate(
    cluster: str,
    roles: Collection[Role],
    node_id: str,
    public_key: Ed25519PublicKey,
    *,
    ca: x509.Certificate,
    ca_key: Ed25519PrivateKey,
    valid_to: datetime,
) -> x509.Certificate:
    """A certificate for `public_key`, with one `ckptd://` URI for each role.

    Nodes may answer and make connections, everyone else may only make them (extended key usage).
    Raises NameRefused for names that break the rules. Does not ask whether the roles combine.
    """
    uris = [identity_uri(cluster, role, node_id) for role in sorted(roles)]
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if NODE_ROLES & set(roles):
        purposes.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    ca_identifier = ca.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node_id)]))
        .issuer_name(ca.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(VALID_FROM)
        .not_valid_after(valid_to)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(LEAF_KEY_USAGE, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris]),
            critical=False,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ca_identifier),
            critical=False,
        )
        .sign(ca_key, None)
    )


def _identity_files(
    names: tuple[str, str],
    cluster: str,
    roles: Collection[Role],
    node_id: str,
    ca: x509.Certificate,
    ca_key: Ed25519PrivateKey,
    now: datetime | None,
) -> dict[str, bytes]:
    key = Ed25519PrivateKey.generate()
    # A machine without a clock issues no certificate that is over before it began.
    began = max(VALID_FROM, datetime.now(UTC) if now is None else now)
    certificate = make_leaf_certificate(
        cluster,
        roles,
        node_id,
        key.public_key(),
        ca=ca,
        ca_key=ca_key,
        valid_to=min(began + LEAF_LIFETIME, CA_VALID_TO),
    )
    # The key first: a certificate whose key is missing would look complete.
    return {names[1]: _key_pem(key), names[0]: certificate.public_bytes(Encoding.PEM)}


def _load_ca_pair(directory: Path) -> tuple[x509.Certificate, Ed25519PrivateKey]:
    ca_path, key_path = (directory / name for name in CA_FILES)
    ca = load_ca(_read(ca_path))
    key = _load_key(_read(key_path), key_path)
    if key.public_key() != ca.public_key():
        raise NotAuthorized(f"{key_path} is not the key of {ca_path}")
    return ca, key


def _load_key(pem: bytes, path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise NotAuthorized(f"{path} holds no usable private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise NotAuthorized(f"{path} holds a key that is not Ed25519")
    return key


def _key_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _private(files: Mapping[str, bytes], *, except_for: str = "") -> list[tuple[str, bytes]]:
    return [(name, content) for name, content in files.items() if name != except_for]


def _read(path: Path, *, limit_bytes: int = 64 * 1024) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(limit_bytes + 1)
    except FileNotFoundError as error:
        raise NotFound(f"{path} is not there", next="ckptd pki init --cluster NAME") from error
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > limit_bytes:
        raise Refused(f"{path} is longer than {limit_bytes} bytes")
    return content


def _refuse_existing(directory: Path, names: Collection[str]) -> None:
    existing = sorted(name for name in names if os.path.lexists(directory / name))
    if not existing:
        return
    listed = ", ".join(str(directory / name) for name in existing)
    if "ca.pem" in names and "ca.pem" not in existing:
        raise TargetExists(
            f"{listed}: left by an attempt that was cut off; nothing was issued with it",
            next=f"remove {listed} and type the command again",
        )
    raise TargetExists(f"{listed}: already there, and keys are never overwritten")
