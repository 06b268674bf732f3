"""TLS for every connection: version 1.3, certificates on both sides, the cluster's CA alone.

Host names play no part. A peer is what its certificate says, so after each handshake the caller
asks `check_peer` for the identity, and the connecting side names the node that it meant to reach.

In TLS 1.3 the client's handshake ends before the server has looked at the client's certificate; a
refusal therefore reaches the client as an error of its first read.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from ckptd.core.identity import Identity, identity_of, load_ca
from ckptd.errors import ConfigError, NotAuthorized

# A config that names other files is a good one for `ckptd config check`, which opens none of them.
_NEXT: Final = "ckptd doctor"
_OPENSSL_CONF: Final = Path(__file__).with_name("openssl-chacha.cnf")


def server_context(ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """The context for accepting connections. `ca`, `cert` and `key` are PEM files.

    Promises: a handshake succeeds only with TLS 1.3 and a certificate of this CA that is meant for
    clients; no session is ever resumed, so every connection proves its certificate anew. Raises
    ConfigError with the key of the file that cannot be used.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, ca, cert, key)
    context.num_tickets = 0
    return context


def client_context(ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    """The context for making connections. `ca`, `cert` and `key` are PEM files.

    Promises: a handshake succeeds only with TLS 1.3 and a certificate of this CA that is meant for
    servers. Which node answered is for `check_peer` to say. Raises ConfigError with the key of the
    file that cannot be used.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, ca, cert, key)


def none_forgotten(_serial: str) -> bool:
    """For whoever knows of no forgotten certificate (yet)."""
    return False


def refuse_forgotten(identity: Identity, forgotten: Callable[[str], bool]) -> None:
    """Raises NotAuthorized when the certificate of `identity` was forgotten: it proves nothing any
    more. `forgotten` says so of a serial number. To be asked at every request, too: a certificate
    may be forgotten while its connection is open."""
    if forgotten(identity.serial):
        roles = ",".join(sorted(role.value for role in identity.roles))
        raise NotAuthorized(
            f"the certificate of {identity} was forgotten",
            next=f"ckptd pki issue {roles} {identity.node_id}   (a new one, if it is to come back)",
        )


def check_peer(
    peer: ssl.SSLSocket | ssl.SSLObject | bytes,
    *,
    cluster: str,
    expected_node_id: str | None = None,
    forgotten: Callable[[str], bool] = none_forgotten,
) -> Identity:
    """The identity of the peer after a completed handshake.

    `peer` is the connection or the peer's certificate (DER). With `expected_node_id` the peer must
    be that node: the certificate has its id and the role of a node (a person may bear the same
    id). The connecting side gives it whenever it knows which node it meant; when it does not, it
    still has to look at `Identity.is_node`. A certificate that is `forgotten` is nobody's.
    Raises NotAuthorized: close the connection.
    """
    certificate_der = peer if isinstance(peer, bytes) else peer.getpeercert(binary_form=True)
    if not certificate_der:
        raise NotAuthorized("the peer presented no certificate")
    identity = identity_of(certificate_der, cluster=cluster)
    refuse_forgotten(identity, forgotten)
    if expected_node_id is None:
        return identity
    if identity.node_id != expected_node_id:
        raise NotAuthorized(
            f"meant to reach node {expected_node_id}, but {identity} answered",
            next="ckptd doctor",
        )
    if not identity.is_node:
        raise NotAuthorized(f"{identity} answered as a node, but its certificate is not a node's")
    return identity


def needs_chacha(cpuinfo_text: str) -> bool:
    """Whether TLS on this machine should use ChaCha20-Poly1305: some core lacks AES instructions.

    `cpuinfo_text` is the content of Linux' /proc/cpuinfo: `Features` on arm64, `flags` on x86-64
    (proc_cpuinfo(5)). Without such a line nothing is known, and the answer is no. On a Raspberry
    Pi 4 AES in software would be the slowest step of a transfer.
    """
    for line in cpuinfo_text.splitlines():
        key, colon, value = line.partition(":")
        if colon and key.strip() in ("Features", "flags") and "aes" not in value.split():
            return True
    return False


def openssl_conf_text() -> str:
    """The OpenSSL configuration that makes this machine offer ChaCha20-Poly1305 first.

    To be named by the environment variable OPENSSL_CONF before the process starts: OpenSSL reads
    it once, and Python has no call for the cipher suites of TLS 1.3. It works from either side: a
    server with it prefers ChaCha20, and a client with it does not offer AES-256, which other
    servers would pick. Format: OpenSSL config(5), SSL_CONF_cmd(3).
    """
    return _OPENSSL_CONF.read_text(encoding="ascii")


def cipher_environment(cpuinfo_text: str, environ: Mapping[str, str]) -> dict[str, str] | None:
    """The environment to start this process with again, or None when it is right as it is.

    Only for a processor that `needs_chacha`; an OPENSSL_CONF that somebody has set stays.
    """
    if not needs_chacha(cpuinfo_text) or "OPENSSL_CONF" in environ:
        return None
    return {**environ, "OPENSSL_CONF": str(_OPENSSL_CONF)}


def _context(protocol: ssl._SSLMethod, ca: Path, cert: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= ssl.VerifyFlags.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION
    context.load_verify_locations(cadata=_ca_der(ca))
    _load_own(context, cert, key)
    return context


def _ca_der(ca: Path) -> bytes:
    pem = _read("tls.ca", ca)
    try:
        return load_ca(pem).public_bytes(Encoding.DER)
    except NotAuthorized as error:
        raise ConfigError("tls.ca", f"{ca}: {error.message}", next=_NEXT) from error


def _load_own(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    _read("tls.cert", cert)
    _read("tls.key", key)
    try:
        # A password would be asked for on the terminal of a daemon: refuse instead.
        context.load_cert_chain(cert, key, password=_refuse_password)
    except ssl.SSLError as error:
        raise ConfigError(
            "tls.cert", f"{cert} and {key} do not belong together: {error}", next=_NEXT
        ) from error
    except _KeyEncrypted as error:
        raise ConfigError(
            "tls.key", f"{key} is encrypted: store it without a password", next=_NEXT
        ) from error


class _KeyEncrypted(Exception):
    """Raised out of OpenSSL's question for a password."""


def _refuse_password() -> str:
    raise _KeyEncrypted


def _read(config_key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(config_key, f"{path}: {error.strerror}", next=_NEXT) from error
