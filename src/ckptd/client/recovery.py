"""The recovery bundle: what a cluster needs when the machine that ran `ckptd pki` is gone.

A bundle is one JSON file that anyone may keep and nobody can read without the recovery code: the
content is encrypted with ChaCha20-Poly1305 (RFC 8439) under a key that scrypt (RFC 7914) makes of
the code. The code has 140 random bits, so that guessing is hopeless even without scrypt, and 20
bits of checksum, so that a slip of the pen is told apart from the code of another bundle. Format:
docs/formats/certificates.md.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from ckptd.core.limits import RECOVERY_BUNDLE_MAX_BYTES, RECOVERY_FILES_MAX
from ckptd.errors import IntegrityError, NotAuthorized, Refused, UsageError

# Crockford's base 32: no I, L, O and U, which hands and eyes mistake for 1, 1, 0 and V.
_ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_LOOKALIKES: Final = str.maketrans({"I": "1", "L": "1", "O": "0"})
_SECRET_CHARACTERS: Final = 28
_CHECK_CHARACTERS: Final = 4
_GROUP: Final = 4
_CHECK_CONTEXT: Final = b"ckptd-recovery-code-1\0"

# 32 MiB and about half a second on a Raspberry Pi 4. Fixed for format 1, so that a forged bundle
# cannot ask for more.
_SCRYPT_N: Final = 2**15
_SCRYPT_R: Final = 8
_SCRYPT_P: Final = 1

_FILE_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


class _Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    cluster: Annotated[str, msgspec.Meta(max_length=255)]
    content: bytes
    format: Literal["ckptd-recovery-1"]
    nonce: Annotated[bytes, msgspec.Meta(min_length=12, max_length=12)]
    salt: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    files: Annotated[dict[str, bytes], msgspec.Meta(max_length=RECOVERY_FILES_MAX)]


_ENCODER: Final = msgspec.json.Encoder(order="sorted")
_BUNDLE_DECODER: Final = msgspec.json.Decoder(_Bundle)
_CONTENT_DECODER: Final = msgspec.json.Decoder(_Content)


def new_code() -> str:
    """A fresh recovery code: 8 groups of 4 characters, joined by `-`. 140 bits are random."""
    secret = "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_CHARACTERS))
    return _grouped(secret + _check_of(secret))


def read_code(typed: str) -> str:
    """The recovery code that was typed, in the form in which it was printed.

    Upper or lower case, spaces, and the letters I, L and O do not matter. Raises UsageError when
    it cannot be a recovery code: wrong length, a foreign character, or a checksum that shows a
    typing error.
    """
    characters = re.sub(r"[\s-]", "", typed).upper().translate(_LOOKALIKES)
    wanted = _SECRET_CHARACTERS + _CHECK_CHARACTERS
    if len(characters) != wanted:
        raise UsageError(
            f"a recovery code has {wanted} letters and digits, this one has {len(characters)}"
        )
    foreign = sorted(set(characters) - set(_ALPHABET))
    if foreign:
        raise UsageError(f"a recovery code never contains {' '.join(foreign)}")
    secret, check = characters[:_SECRET_CHARACTERS], characters[_SECRET_CHARACTERS:]
    if not hmac.compare_digest(check, _check_of(secret)):
        raise UsageError("the recovery code has a typing error: compare it group by group")
    return _grouped(characters)


def seal(cluster: str, files: Mapping[str, bytes], code: str) -> bytes:
    """The bundle that holds `files` (plain names, no directories), opened by `code` alone.

    `cluster` stands in it readable. Raises Refused when the bundle would be over its limit or a
    name is not plain.
    """
    for name in files:
        _check_file_name(name)
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    content = ChaCha20Poly1305(_key(code, salt)).encrypt(
        nonce, _ENCODER.encode(_Content(files=dict(files))), _associated(cluster)
    )
    bundle = _ENCODER.encode(
        _Bundle(
            cluster=cluster,
            content=content,
            format="ckptd-recovery-1",
            nonce=nonce,
            salt=salt,
            sha256=hashlib.sha256(content).hexdigest(),
        )
    )
    if len(bundle) > RECOVERY_BUNDLE_MAX_BYTES or len(files) > RECOVERY_FILES_MAX:
        raise Refused("too much for one recovery bundle")
    return bundle


def unseal(bundle: bytes, code: str) -> tuple[str, dict[str, bytes]]:
    """The cluster and the files in a bundle.

    Three faults are told apart: UsageError, the code was mistyped; IntegrityError, the bundle is
    damaged (another worker has a copy); NotAuthorized, code and bundle are whole but do not
    belong together.
    """
    canonical_code = read_code(code)
    decoded = _decode(bundle)
    try:
        plain = ChaCha20Poly1305(_key(canonical_code, decoded.salt)).decrypt(
            decoded.nonce, decoded.content, _associated(decoded.cluster)
        )
    except InvalidTag as error:
        raise NotAuthorized(
            f"this recovery code does not open this bundle of cluster {decoded.cluster}: "
            "it belongs to another one"
        ) from error
    try:
        files = _CONTENT_DECODER.decode(plain).files
    except msgspec.DecodeError as error:
        raise IntegrityError(f"the recovery bundle's content cannot be read: {error}") from error
    for name in files:
        _check_file_name(name)
    return decoded.cluster, files


def _decode(bundle: bytes) -> _Bundle:
    elsewhere = "take the copy of recovery.bundle from another worker's store"
    if len(bundle) > RECOVERY_BUNDLE_MAX_BYTES:
        raise IntegrityError("the recovery bundle is too long to be one", next=elsewhere)
    try:
        decoded = _BUNDLE_DECODER.decode(bundle)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise IntegrityError(f"the recovery bundle is damaged: {error}", next=elsewhere) from error
    if hashlib.sha256(decoded.content).hexdigest() != decoded.sha256:
        raise IntegrityError("the recovery bundle is damaged: wrong SHA-256", next=elsewhere)
    return decoded


def _key(code: str, salt: bytes) -> bytes:
    secret = code.replace("-", "")[:_SECRET_CHARACTERS]
    kdf = Scrypt(salt=salt, length=32, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P)
    return kdf.derive(secret.encode("ascii"))


def _associated(cluster: str) -> bytes:
    return b"ckptd-recovery-1\0" + cluster.encode()


def _check_of(secret: str) -> str:
    digest = hashlib.sha256(_CHECK_CONTEXT + secret.encode("ascii")).digest()
    number = int.from_bytes(digest[:3]) >> 4
    shifts = range(5 * (_CHECK_CHARACTERS - 1), -1, -5)
    return "".join(_ALPHABET[number >> shift & 31] for shift in shifts)


def _grouped(characters: str) -> str:
    starts = range(0, len(characters), _GROUP)
    return "-".join(characters[start : start + _GROUP] for start in starts)


def _check_file_name(name: str) -> None:
    if _FILE_NAME.fullmatch(name) is None:
        raise Refused(f"{name!r} is not a plain file name: not for a recovery bundle")
