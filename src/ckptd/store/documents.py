"""The documents of one store as files: canonical JSON named by its SHA-256, signature beside it.

A document exists when its `.json` exists; the `.sig` is durable before that. What the JSON means
and whether the signature holds is not decided here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Final

from ckptd.core import limits
from ckptd.errors import DocumentRefused, IntegrityError, NotFound
from ckptd.store import durable, layout
from ckptd.store.dead_versions import DeadVersions
from ckptd.store.marker import StoreDirectory

_SIGNATURE_MAX_BYTES: Final = limits.SIGNATURE_ENVELOPE_MAX_BYTES


class DocumentFiles:
    """The files in catalogue/. Thread-safe.

    `directory` is the opened store. Documents may use the reserve. The constructor reads the names
    (not the bytes) and flushes them first. Errors of all methods: `MediumFailed`, `NoRoom`,
    `StoreOperationFailed`.
    """

    def __init__(self, directory: StoreDirectory) -> None:
        self._directory = directory
        self._path = directory.path
        self._filesystem = directory.filesystem
        self._medium = directory.medium
        self._lock = threading.Lock()  # of `_known`
        # Writing and moving away exclude each other: a file that was just written anew must not
        # be moved to quarantine by somebody who has read the bad one.
        self._changing = threading.RLock()
        self._known: set[bytes] = set()
        self._ignored: list[str] = []
        self._ignored_count = 0
        self._dropped = DeadVersions(directory)
        with self._medium.operation("read the catalogue's names"):
            self._scan()

    @property
    def ignored(self) -> tuple[int, list[str]]:
        """Count and first few paths of what lies in catalogue/ and is no document."""
        return self._ignored_count, list(self._ignored)

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, document_id: str) -> bool:
        return layout.is_document_id(document_id) and bytes.fromhex(document_id) in self._known

    def ids(self) -> list[str]:
        """Ids of all documents that are here, in order."""
        self._medium.require()
        with self._lock:
            return [digest.hex() for digest in sorted(self._known)]

    def __iter__(self) -> Iterator[tuple[str, bytes, bytes]]:
        """(id, document, signature) of all documents, in order of ids, one in memory at a time.

        Raises as `get` does; the ids that follow can be read by `get` all the same.
        """
        for document_id in self.ids():
            yield (document_id, *self.get(document_id))

    def put(self, document_id: str, document: bytes, signature: bytes) -> None:
        """Make a document durable; nothing is written when it is here already.

        `signature` is certificate and signature as one sequence of bytes. `DocumentRefused` when
        either is too long, or when the document was dropped, `IntegrityError` when the bytes do not
        hash to the id.
        """
        self._medium.require()
        if len(document) > limits.DOCUMENT_MAX_BYTES:
            raise DocumentRefused(f"document {document_id} has {len(document)} bytes: too long")
        if len(signature) > limits.SIGNATURE_ENVELOPE_MAX_BYTES:
            raise DocumentRefused(f"signature of {document_id} has {len(signature)} bytes")
        if hashlib.sha256(document).hexdigest() != document_id:
            raise IntegrityError(f"the bytes offered as document {document_id} have another hash")
        if document_id in self._dropped:
            raise DocumentRefused(f"document {document_id} was removed, and dropped here for good")
        with self._changing, self._medium.operation(f"store document {document_id}"):
            if document_id in self:
                return
            # The signature's name is flushed before the document's: no power cut leaves a
            # document without a signature.
            self._write(layout.signature_path(self._path, document_id), signature)
            self._write(layout.document_path(self._path, document_id), document)
            with self._lock:
                self._known.add(bytes.fromhex(document_id))

    def get(self, document_id: str) -> tuple[bytes, bytes]:
        """(document, signature) as they were put.

        `NotFound` when it is not here. `IntegrityError` when two reads of the file did not have
        the hash in its name, or when its signature is gone: the file is in quarantine then.
        """
        self._medium.require()
        if document_id not in self:
            raise NotFound(f"document {document_id} is not in {self._path}")
        document, signature = self._read_both(document_id, uncached=False)
        if document is not None and signature is not None:
            return document, signature
        with self._changing:
            document, signature = self._read_both(document_id, uncached=True)
            if document is not None and signature is not None:
                return document, signature
            self._medium.confirm()
            self.quarantine(document_id)
        fault = "has another hash" if document is None else "has no signature"
        raise IntegrityError(
            f"document {document_id} in {self._path} {fault}: moved to quarantine",
            next="ckptd status (other nodes bring it back)",
        )

    def quarantine(self, document_id: str) -> None:
        """Move both files of a document to quarantine, durably: its signature does not hold, or
        its bytes are bad. Afterwards `put` writes it anew."""
        with self._changing, self._medium.operation(f"quarantine document {document_id}"):
            with self._lock:
                self._known.discard(bytes.fromhex(document_id))
            self._move_to_quarantine(layout.document_path(self._path, document_id))
            self._move_to_quarantine(layout.signature_path(self._path, document_id))

    def lost(self) -> set[str]:
        """Ids of documents that went to quarantine and have not been put again since."""
        with self._medium.operation("list the quarantine"):
            found = self._directory.quarantine.files()
        suffix = layout.DOCUMENT_SUFFIX
        return {each.id for each in found if each.suffix == suffix and each.id not in self}

    def set_aside(self, document_id: str) -> tuple[bytes, list[bytes]] | None:
        """What lies in quarantine of a document, if its bytes can be read right by now: these, and
        the signatures there, of which one may hold. None when there is nothing such. Nothing is
        moved: `put` writes it anew."""
        with self._medium.operation(f"read document {document_id} in quarantine"):
            found = [f for f in self._directory.quarantine.files() if f.id == document_id]
            signatures = [
                signature
                for each in found
                if each.suffix == layout.SIGNATURE_SUFFIX
                and (signature := self._read(each.path, _SIGNATURE_MAX_BYTES, uncached=True))
            ]
            for each in found:
                if each.suffix != layout.DOCUMENT_SUFFIX:
                    continue
                document = self._read(each.path, limits.DOCUMENT_MAX_BYTES, uncached=True)
                if document is not None and hashlib.sha256(document).hexdigest() == document_id:
                    return (document, signatures) if signatures else None
        return None

    def drop(self, document_ids: Sequence[str]) -> None:
        """Remove documents for ever: `is_dropped` is durable before the first one goes."""
        self._dropped.add(document_ids)
        for document_id in document_ids:
            with self._changing, self._medium.operation(f"remove document {document_id}"):
                with self._lock:
                    self._known.discard(bytes.fromhex(document_id))
                self._unlink_both(document_id)

    def is_dropped(self, document_id: str) -> bool:
        """Whether `drop` was called for this document, at any time."""
        return document_id in self._dropped

    def _unlink_both(self, document_id: str) -> None:
        # The signature last: alone, it is removed by the next start.
        for path in (
            layout.document_path(self._path, document_id),
            layout.signature_path(self._path, document_id),
        ):
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.unlink(path)

    def _move_to_quarantine(self, source: str) -> None:
        try:
            size_bytes = self._filesystem.identify_path(source).size_bytes
        except FileNotFoundError:
            return
        target = self._directory.quarantine.rename_into(source, size_bytes)
        self._directory.quarantine.flush(source, target)

    def _write(self, target: str, data: bytes) -> None:
        label = os.path.basename(target)
        temporary = durable.temporary_path(self._directory.incoming, label)
        durable.write_file(self._filesystem, temporary, target, data)

    def _read_both(self, document_id: str, *, uncached: bool) -> tuple[bytes | None, bytes | None]:
        """Document and signature; None for one that is missing or has the wrong hash."""
        document_path = layout.document_path(self._path, document_id)
        signature_path = layout.signature_path(self._path, document_id)
        with self._medium.operation(f"read document {document_id}"):
            document = self._read(document_path, limits.DOCUMENT_MAX_BYTES, uncached=uncached)
            signature = self._read(signature_path, _SIGNATURE_MAX_BYTES, uncached=uncached)
        if document is not None and hashlib.sha256(document).hexdigest() != document_id:
            document = None
        return document, signature

    def _read(self, path: str, max_bytes: int, *, uncached: bool) -> bytes | None:
        """The file's bytes; None when it is missing or longer than any that is written here."""
        try:
            return durable.read_file(self._filesystem, path, max_bytes, uncached=uncached)
        except (FileNotFoundError, durable.FileTooLong):
            return None

    def _scan(self) -> None:
        root = os.path.join(self._path, layout.CATALOGUE)
        self._filesystem.fsync_directory(root)
        signatures: set[bytes] = set()
        for entry in self._filesystem.list_directory(root):
            parsed = layout.parse_catalogue_name(entry.name)
            if parsed is None or not entry.is_file:
                self._ignored_count += 1
                if len(self._ignored) < limits.STORE_IGNORED_NAMES_MAX:
                    self._ignored.append(os.path.join(layout.CATALOGUE, entry.name))
                continue
            document_id, suffix = parsed
            names = self._known if suffix == layout.DOCUMENT_SUFFIX else signatures
            names.add(bytes.fromhex(document_id))
        # What was dropped, and came back by a power cut, goes again.
        for digest in [each for each in self._known if each.hex() in self._dropped]:
            self._known.discard(digest)
            self._unlink_both(digest.hex())
        suffix = layout.DOCUMENT_SUFFIX
        aside = {each.id for each in self._directory.quarantine.files() if each.suffix == suffix}
        for document_id in sorted(digest.hex() for digest in signatures - self._known):
            if document_id in aside:
                # Its document was moved, and then the process died.
                self._move_to_quarantine(layout.signature_path(self._path, document_id))
            else:
                # What a write leaves that was cut off; the next one would replace it.
                self._filesystem.unlink(layout.signature_path(self._path, document_id))
