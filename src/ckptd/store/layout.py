"""Names of the files and directories of a store, and nothing else. See docs/formats/disk.md.

Names are strict in both directions: what a function here makes, its counterpart reads, and every
other name is not ours.
"""

from __future__ import annotations

import os
import re
from typing import Final

MARKER: Final = "ckptd-store.json"
MARKER_NEW: Final = "ckptd-store.json.new"  # what a cut-off `ckptd serve --init` leaves behind
LOCK: Final = "ckptd-store.lock"
RECOVERY_BUNDLE: Final = "recovery.bundle"
PAUSED_JOBS: Final = "jobs.json"
CHECK_RECORD: Final = "checks"
SHARDS: Final = "shards"
CATALOGUE: Final = "catalogue"
QUARANTINE: Final = "quarantine"
INCOMING: Final = "incoming"
DIRECTORIES: Final = (SHARDS, CATALOGUE, QUARANTINE, INCOMING)

DOCUMENT_SUFFIX: Final = ".json"
SIGNATURE_SUFFIX: Final = ".sig"

_HEX_ID = re.compile(r"[0-9a-f]{64}\Z")
_PREFIX = re.compile(r"[0-9a-f]{2}\Z")
_QUARANTINED = re.compile(r"([0-9a-f]{64})(\.json|\.sig)?\.(0|[1-9][0-9]{0,8})\Z")


def shard_directory(store: str, digest: bytes) -> str:
    """Path of the directory that holds the shard of this 32-byte digest."""
    return os.path.join(store, SHARDS, digest[:1].hex())


def shard_path(store: str, digest: bytes) -> str:
    """Path of the file that holds exactly the bytes of the shard of this 32-byte digest."""
    if len(digest) != 32:
        raise ValueError(f"a digest has 32 bytes, not {len(digest)}")
    return os.path.join(store, SHARDS, digest[:1].hex(), digest.hex())


def is_shard_directory_name(name: str) -> bool:
    """Whether `name` is two lower-case hex digits."""
    return _PREFIX.match(name) is not None


def digest_of_shard_name(directory_name: str, name: str) -> bytes | None:
    """The digest that a file name below shards/ stands for; None when it is not a shard's name."""
    if _HEX_ID.match(name) is None or not name.startswith(directory_name):
        return None
    return bytes.fromhex(name)


def is_document_id(text: str) -> bool:
    """Whether `text` is 64 lower-case hex digits."""
    return _HEX_ID.match(text) is not None


def document_path(store: str, document_id: str) -> str:
    """Path of a document's canonical JSON. `ValueError` when the id is not 64 hex digits."""
    return os.path.join(store, CATALOGUE, _checked(document_id) + DOCUMENT_SUFFIX)


def signature_path(store: str, document_id: str) -> str:
    """Path of a document's certificate and signature. `ValueError` on a malformed id."""
    return os.path.join(store, CATALOGUE, _checked(document_id) + SIGNATURE_SUFFIX)


def parse_catalogue_name(name: str) -> tuple[str, str] | None:
    """(document id, suffix) of a file name in catalogue/; None when it is not ours."""
    stem, dot, suffix = name.partition(".")
    if dot + suffix not in (DOCUMENT_SUFFIX, SIGNATURE_SUFFIX) or not is_document_id(stem):
        return None
    return stem, dot + suffix


def quarantine_path(store: str, file_name: str, number: int) -> str:
    """Path that the `number`-th bad file called `file_name` gets in quarantine."""
    return os.path.join(store, QUARANTINE, f"{file_name}.{number}")


def parse_quarantine_name(name: str) -> tuple[str, str, int] | None:
    """(64 hex digits, "" or ".json" or ".sig", number) of a name in quarantine/; None otherwise."""
    found = _QUARANTINED.match(name)
    if found is None:
        return None
    return found[1], found[2] or "", int(found[3])


def _checked(document_id: str) -> str:
    # The id becomes part of a path: nothing but 64 hex digits may pass, whoever sent it.
    if not is_document_id(document_id):
        raise ValueError("a document id has 64 lower-case hex digits")
    return document_id
