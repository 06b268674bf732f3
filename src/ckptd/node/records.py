"""The documents of a node: durable on disk, as headers in memory, admitted only when signed."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable

import msgspec
import structlog
from cryptography import x509

from ckptd.core import bitmaps, limits
from ckptd.core.admission import admit, check_size
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.collection import Census, census
from ckptd.core.documents import Document, Manifest, Pin, ShardReference, UnknownDocument
from ckptd.core.identity import Identity, Role
from ckptd.core.signing import Signer
from ckptd.errors import DocumentRefused, IntegrityError, NotFound, StoreOperationFailed
from ckptd.store.documents import DocumentFiles
from ckptd.store.shards import ShardStore

_log = structlog.get_logger(__name__)


class TooManyByWorker(DocumentRefused):
    """A mere worker has written more documents than one may. They say where it is and nothing
    else, so nobody needs them to know what a version is made of."""


class _ManifestShards(msgspec.Struct, frozen=True):
    """The one field of a manifest that an inventory needs."""

    shards: tuple[ShardReference, ...]


_shards_decoder = msgspec.json.Decoder(_ManifestShards)


class Records:
    """All documents that this node knows. Thread-safe; the methods block on the disk.

    `shards` is the node's store of shards, None when it keeps none. A manifest, or a pin that
    speaks for one, becomes known and its shards are touched in one step: whoever sees it here may
    count on them for a grace.
    """

    def __init__(
        self,
        files: DocumentFiles,
        *,
        cluster: str,
        ca: x509.Certificate,
        shards: ShardStore | None,
    ) -> None:
        self._files = files
        self._cluster = cluster
        self._ca = ca
        self._shards = shards
        self._lock = threading.Lock()
        # A parsed manifest takes several times its bytes: one at a time is in memory.
        self._parsing = threading.Lock()
        self._of_worker: Counter[str] = Counter()
        self._damaged: set[str] = set()  # known once, but not on the disk any more
        self.catalogue = Catalogue(cluster)
        self.unreadable: set[str] = set()

    def load(self) -> None:
        """Reads all documents once, at start. What cannot be admitted any more is left on the
        disk and listed in `unreadable`. What was found damaged before the start still is, until
        another node brings it."""
        for document_id in self._files.ids():
            try:
                raw, signature = self._files.get(document_id)
                _, document, author = admit(raw, signature, cluster=self._cluster, ca=self._ca)
            except (DocumentRefused, IntegrityError, StoreOperationFailed) as error:
                self.unreadable.add(document_id)
                _log.error("document_unreadable", document=document_id, reason=error.message)
                continue
            self.catalogue.add(document_id, document, author=author)
            self._count(author)
        self._damaged = self._files.lost()

    def put(self, raw: bytes | memoryview, signature: bytes) -> str:
        """Admits a document and makes it durable; returns its id. Raises DocumentRefused, NoRoom
        or MediumFailed. A document that is here already is confirmed as it is."""
        check_size(len(raw), signature, cluster=self._cluster, ca=self._ca)
        with self._parsing:
            found = hashlib.sha256(raw).hexdigest()
            if self._files.is_dropped(found):
                raise DocumentRefused(f"version {found} was removed, and collected here")
            with self._lock:
                # One that went to quarantine, or cannot be read, is written anew.
                known = found in self.catalogue and found not in self._damaged
                if known and found in self._files:
                    return found
            return self._admit(bytes(raw), signature)

    def _admit(self, raw: bytes, signature: bytes) -> str:
        found, document, author = admit(raw, signature, cluster=self._cluster, ca=self._ca)
        with self._lock:
            self._check_count(author)
        if found in self._files:
            # It cannot be read, or was refused at the start though its bytes are good: then the
            # signature beside them is not. `put` leaves what is there alone, so it goes aside.
            self._files.quarantine(found)
        self._files.put(found, raw, signature)
        wanted = self._wanted_by(document)
        with self._lock:
            self.unreadable.discard(found)
            self._damaged.discard(found)
            if self._shards is not None:
                self._shards.confirm(wanted)
            if self.catalogue.add(found, document, author=author):
                self._count(author)
                kind = type(document).__name__.lower()
                name = document.name if isinstance(document, Manifest) else None
                _log.info("document_stored", kind=kind, document=found, name=name)
        return found

    def _wanted_by(self, document: Document | UnknownDocument) -> list[tuple[bytes, int]]:
        """The shards that may not be collected now because of this document."""
        if isinstance(document, Manifest):
            return _digests(document.shards)
        if isinstance(document, Pin) and self._shards is not None:
            return self._references(document.version) or []
        return []

    def _count(self, author: Identity) -> None:
        if author.roles <= {Role.WORKER}:
            self._of_worker[author.node_id] += 1

    def _check_count(self, author: Identity) -> None:
        """A worker says where it is, a few times in its life; a stolen one shall not fill the
        catalogues of all."""
        if self._of_worker[author.node_id] >= limits.WORKER_DOCUMENTS_MAX:
            raise TooManyByWorker(f"{author} wrote over {limits.WORKER_DOCUMENTS_MAX} documents")
        if len(self.catalogue) >= limits.CATALOGUE_DOCUMENTS_MAX:
            raise DocumentRefused(f"over {limits.CATALOGUE_DOCUMENTS_MAX} documents")

    def digest(self) -> bytes:
        """SHA-256 over `packed_ids`."""
        with self._lock:
            if not self._damaged:
                return self.catalogue.digest()
        return hashlib.sha256(self.packed_ids()).digest()

    def packed_ids(self) -> bytes:
        """As `Catalogue.packed_ids`, without the documents that were found damaged: so that other
        nodes bring them again."""
        with self._lock:
            if not self._damaged:
                return self.catalogue.packed_ids()
            known = self.catalogue.shared_ids()
            return bytes.fromhex("".join(each for each in known if each not in self._damaged))

    def write(self, raw: bytes, signer: Signer) -> str:
        """Signs and keeps a document of this node's own."""
        return self.put(raw, signer.sign(raw))

    def get(self, document_id: str) -> tuple[bytes, bytes] | None:
        """A document and its signature, or None when it is not here (or no longer whole)."""
        if document_id not in self.catalogue:
            return None
        try:
            return self._files.get(document_id)
        except (IntegrityError, NotFound, StoreOperationFailed) as error:
            with self._lock:
                if document_id not in self.catalogue:
                    return None  # dropped meanwhile
                new = document_id not in self._damaged
                self._damaged.add(document_id)
            if new:
                _log.error("document_corrupt", document=document_id, reason=error.message)
            return None

    def lost(self) -> set[str]:
        """The documents that are known to exist, that nobody can read here, and that are needed."""
        with self._lock:
            lost = self.unreadable | self._damaged
        return {each for each in lost if not self.is_dead(each)}

    def look_aside(self) -> int:
        """Reads again what lies in quarantine of the documents that are `lost`: a bad reading may
        have been the reading's fault, and this the only copy that is left. What is whole and holds
        is written anew; how many that were. Raises the store's errors."""
        count = 0
        for document_id in sorted(self.lost()):
            raw, signatures = self._files.set_aside(document_id) or (b"", [])
            for signature in signatures:
                try:
                    self.put(raw, signature)
                except DocumentRefused:
                    continue
                _log.info("document_is_back", document=document_id)
                count += 1
                break
        return count

    def confirm(self, version_id: str) -> bytes | None:
        """Which shards of a version are on this node; None when its manifest is not, or when the
        node keeps no shards. Whoever is told so counts on them: they are touched in the same step
        (`ShardStore.confirm`)."""
        if self._shards is None or (references := self.references(version_id)) is None:
            return None
        return bitmaps.pack(self._shards.confirm(references))

    def inventory(
        self, version_id: str, shards: ShardStore | None, wall_s: float
    ) -> tuple[bytes | None, float]:
        """As `confirm`, without a touch, and the age in seconds of the oldest check of one of these
        copies, those before this node's start included; -1 when of one nobody knows any, or none is
        here. `wall_s` is the wall clock's time."""
        references = self.references(version_id) if shards is not None else None
        if references is None or shards is None:
            return None, -1.0
        ages = shards.last_checks(references, wall_s)
        oldest_s = max((age_s for age_s in ages if age_s is not None), default=math.inf)
        bitmap = bitmaps.pack([age_s is not None for age_s in ages])
        return bitmap, -1.0 if oldest_s == math.inf else oldest_s

    # -- garbage collection

    def is_dead(self, version_id: str) -> bool:
        """Whether a version is dead, by a tombstone or because it was dropped here."""
        return self.catalogue.is_dead(version_id) or self._files.is_dropped(version_id)

    def doubt(self) -> str:
        """Why nobody can say which shards are needed here; "" when all is known and understood."""
        if self.catalogue.has_unknown:
            return "there are documents of a newer version of ckptd: upgrade this node"
        # Of a dead version nobody needs to know more, and others may have dropped its manifest.
        if unreadable := sum(not self.is_dead(each) for each in self.unreadable):
            return f"{unreadable} documents cannot be read: see the node's log"
        with self._lock:
            damaged = sum(not self.catalogue.is_dead(each) for each in self._damaged)
        if len(self.catalogue) >= limits.CATALOGUE_DOCUMENTS_MAX:
            return "the catalogue is full: documents that others know may be missing here"
        if damaged:
            return f"{damaged} documents are damaged, and other nodes did not bring them yet"
        return ""

    def census(self, clock: Callable[[], float]) -> Census:
        """The versions that are known at one moment of `clock`: a manifest that becomes known
        later touches its shards later."""
        with self._lock:
            return census(self.catalogue, clock())

    def live_versions(self) -> list[VersionHeader]:
        """All live versions, newest first."""
        with self._lock:
            return self.catalogue.live_versions()

    def unjustified(self) -> list[VersionHeader]:
        """The dead versions here that nothing live justifies (`Fate.waits_in_vain`)."""
        with self._lock:
            found = census(self.catalogue, 0.0).dead
            vain = [each for each, fate in sorted(found.items()) if fate.waits_in_vain]
            headers = map(self.catalogue.version, vain)
            return [header for header in headers if header is not None]

    def drop(self, version_ids: Iterable[str], protected: Collection[str]) -> list[str]:
        """Forgets the manifests of those of these dead versions that may still go, with the
        versions `protected` confirmed. They are never taken in again. Returns their ids."""
        with self._parsing:  # so that none is taken in between its two ends
            with self._lock:
                dead = census(self.catalogue, 0.0).dead
                gone = [
                    version_id
                    for version_id in sorted(version_ids)
                    if (fate := dead.get(version_id)) and fate.may_go(protected)
                ]
                for version_id in gone:
                    self.catalogue.drop(version_id)
                    self._damaged.discard(version_id)
            self._files.drop(gone)
        return gone

    def references(self, version_id: str) -> list[tuple[bytes, int]] | None:
        """Digest and size of each shard of a version; None when its manifest is not here."""
        if self.catalogue.version(version_id) is None:
            return None
        with self._parsing:
            return self._references(version_id)

    def _references(self, version_id: str) -> list[tuple[bytes, int]] | None:
        found = self.get(version_id)
        if found is None or self.catalogue.version(version_id) is None:
            return None
        return _digests(_shards_decoder.decode(found[0]).shards)


def _digests(shards: Iterable[ShardReference]) -> list[tuple[bytes, int]]:
    return [(bytes.fromhex(reference.shard), reference.size) for reference in shards]
