"""The catalogue: the documents that a node or client knows, as headers, and what follows from them.

It is a grow-only set: adding documents in any order, any number of times, gives the same
catalogue, so that two nodes agree as soon as they know the same ids. Nothing is stored that can be
computed: the newest version of a name, whether a version is dead, pins and members are answers to
questions. Bodies of manifests are not kept.

Ids are 64 lower-case hex digits everywhere except in `packed_ids` and `digest`.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable
from sys import intern
from typing import Final, Literal, TypeAlias

from ckptd.core.documents import (
    Document,
    Manifest,
    Member,
    Pin,
    RemovedContent,
    Tombstone,
    UnknownDocument,
    Unpin,
)
from ckptd.core.headers import (
    DocumentHeader,
    TombstoneHeader,
    VersionHeader,
    age_of,
    run_of,
    version_header,
)
from ckptd.core.identity import Identity, Role
from ckptd.core.names import Selector, check_name, parse_selector
from ckptd.core.roster import Roster
from ckptd.core.training_state import best_of, is_finite, shown_metrics
from ckptd.errors import DocumentRefused, NameRefused, NotFound

_SUGGESTIONS_MAX: Final = 5


__all__ = ["Accept", "Best", "Catalogue", "DocumentHeader", "TombstoneHeader", "VersionHeader"]

Accept: TypeAlias = Callable[[VersionHeader], bool]
Best: TypeAlias = tuple[str, Literal["min", "max"]]


class Catalogue:
    """The documents of one cluster, as far as they are known here."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self._headers: dict[str, DocumentHeader] = {}
        self._sorted_ids: list[str] = []
        self._digest: bytes | None = None
        self._unverified: set[str] = set()
        self._highest_order = 0
        self._unknown = 0
        self._versions: dict[str, list[VersionHeader]] = {}  # by name, oldest first
        self._tombstones: dict[str, tuple[TombstoneHeader, ...]] = {}  # by dead version
        self._removed_contents: set[bytes] = set()  # hash of name, and content id
        self._removed_names: set[bytes] = set()
        self._pins: dict[str, list[DocumentHeader]] = {}  # by version
        self._unpinned: set[str] = set()
        self.roster = Roster()
        """Who belongs to the cluster, and what its admins said about nodes."""

    # -- growing

    def add(
        self, document_id: str, document: Document | UnknownDocument, *, author: Identity
    ) -> bool:
        """Adds an admitted document; False if it was known already.

        `author` is who signed it. The orders of documents that a mere worker wrote do not count
        for `highest_order`: else a stolen one could use up the range of orders for everybody.
        Raises DocumentRefused for a document of another cluster.
        """
        if not isinstance(document, UnknownDocument) and document.cluster != self.cluster:
            raise DocumentRefused(
                f"a document belongs to cluster {document.cluster!r}, not {self.cluster!r}"
            )
        if document_id in self._unverified:
            self.withdraw(document_id)
        if document_id in self._headers:
            return False
        self._insert(self._index(document_id, document, author))
        if author.roles - {Role.WORKER}:
            self._highest_order = max(self._highest_order, document.order)
        return True

    def add_unverified(self, header: VersionHeader) -> bool:
        """Adds a manifest that a node told of, without its signed document; False if known.

        For clients, which do not fetch every manifest. Such a header is a hint: its order does
        not count for `highest_order`; `add` replaces it by what the signed document says, and
        `withdraw` takes it back when no node can show a valid document. Raises DocumentRefused
        for a name that no manifest may have, or a time that could confuse a terminal.
        """
        if header.id in self._headers:
            return False
        try:
            check_name(header.name)
        except NameRefused as error:
            raise DocumentRefused(f"a manifest's header is refused: {error}") from error
        if not header.created.isprintable():
            raise DocumentRefused(f"a manifest's header has the time {header.created!a}")
        self._insert(header)
        self._insert_version(header)
        self._unverified.add(header.id)
        return True

    def withdraw(self, version_id: str) -> None:
        """Takes back what `add_unverified` added. Raises KeyError for anything else."""
        self._unverified.remove(version_id)
        header = self._headers[version_id]
        assert isinstance(header, VersionHeader)
        self._remove_version(header)

    def _remove_version(self, header: VersionHeader) -> None:
        del self._headers[header.id]
        del self._sorted_ids[bisect_left(self._sorted_ids, header.id)]
        self._digest = None
        versions = self._versions[header.name]
        versions.remove(header)
        if not versions:
            del self._versions[header.name]

    def drop(self, version_id: str) -> None:
        """Forgets the manifest of a dead version; that it is dead stays known. Raises KeyError for
        a version that is not known or not dead."""
        header = self._headers[version_id]
        if not isinstance(header, VersionHeader) or version_id not in self._tombstones:
            raise KeyError(version_id)
        self._remove_version(header)

    def unverified_above(self, order: int) -> list[VersionHeader]:
        """Headers added unverified that claim an order above `order`, newest first.

        A writer whose clock reads `order` verifies these before it chooses its own.
        """
        claims = (self._headers[version_id] for version_id in self._unverified)
        above = [c for c in claims if isinstance(c, VersionHeader) and c.order > order]
        return sorted(above, key=age_of, reverse=True)

    def _insert(self, header: DocumentHeader) -> None:
        self._headers[header.id] = header
        insort(self._sorted_ids, header.id)
        self._digest = None

    def _insert_version(self, header: VersionHeader) -> None:
        insort(self._versions.setdefault(header.name, []), header, key=age_of)

    def _index(
        self, document_id: str, document: Document | UnknownDocument, author: Identity
    ) -> DocumentHeader:
        """Files the document under everything that it is asked for by; returns its header."""
        match document:
            case Manifest():
                version = version_header(document_id, document)
                self._insert_version(version)
                return version
            case UnknownDocument():
                self._unknown += 1
                return DocumentHeader(document_id, intern(document.kind), document.order, "")
            case Tombstone():
                return self._index_tombstone(document_id, document)
            case Pin():
                header = DocumentHeader(document_id, "pin", document.order, document.created)
                insort(self._pins.setdefault(document.version, []), header, key=age_of)
                return header
            case Unpin():
                self._unpinned.update(document.pins)
                return DocumentHeader(document_id, "unpin", document.order, document.created)
            case Member():
                self.roster.add_member(document_id, document, author=author)
            case _:
                self.roster.add_mark(document_id, document)
        kind = str(document.__struct_config__.tag)
        return DocumentHeader(document_id, kind, document.order, document.created)

    def _index_tombstone(self, document_id: str, document: Tombstone) -> TombstoneHeader:
        header = TombstoneHeader(
            document_id,
            "tombstone",
            document.order,
            document.created,
            document.reason,
            document.justified_by,
        )
        for removed in document.contents:
            self._removed_contents.add(_packed(removed))
            self._removed_names.add(_packed(removed)[:32])
        for version_id in set(document.versions):
            tombstones = (*self._tombstones.get(version_id, ()), header)
            self._tombstones[version_id] = tuple(sorted(tombstones, key=age_of))
        return header

    # -- what is known

    def __len__(self) -> int:
        return len(self._headers)

    def __contains__(self, document_id: object) -> bool:
        return document_id in self._headers

    def header(self, document_id: str) -> DocumentHeader | None:
        """The header of a document, None if it is not known."""
        return self._headers.get(document_id)

    def ids(self) -> tuple[str, ...]:
        """All document ids, sorted."""
        return tuple(self._sorted_ids)

    def shared_ids(self) -> list[str]:
        """The ids of the documents that nodes bring each other, sorted: all but manifests of dead
        versions. Those may be dropped on one node and not yet on the next, and nobody needs to get
        one that it does not have."""
        return [each for each in self._sorted_ids if each not in self._tombstones]

    def packed_ids(self) -> bytes:
        """`shared_ids`, 32 bytes each."""
        return bytes.fromhex("".join(self.shared_ids()))

    def digest(self) -> bytes:
        """SHA-256 over `packed_ids`: equal digests mean equal catalogues."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.packed_ids()).digest()
        return self._digest

    def headers_after(self, document_id: str, limit: int) -> tuple[list[DocumentHeader], bool]:
        """Up to `limit` headers with an id above `document_id` ("": from the start), by id, and
        whether there are more."""
        start = bisect_right(self._sorted_ids, document_id)
        page = self._sorted_ids[start : start + limit]
        return [self._headers[i] for i in page], start + limit < len(self._sorted_ids)

    @property
    def highest_order(self) -> int:
        """The highest order of any signed document that not a mere worker wrote; 0 for none."""
        return self._highest_order

    @property
    def has_unknown(self) -> bool:
        """Whether there is a document that this version of ckptd cannot read."""
        return self._unknown > 0

    def members(self) -> dict[str, Member]:
        """By node id, what each remembered node last said of itself."""
        return self.roster.members()

    # -- versions

    def version(self, version_id: str) -> VersionHeader | None:
        """The header of a version, live or dead; None if its manifest is not known."""
        header = self._headers.get(version_id)
        return header if isinstance(header, VersionHeader) else None

    def versions(self, name: str, *, include_dead: bool = False) -> list[VersionHeader]:
        """The versions of a name, newest first."""
        found = reversed(self._versions.get(name, ()))
        return [v for v in found if include_dead or v.id not in self._tombstones]

    def newest(self, name: str) -> VersionHeader | None:
        """The newest live version of a name."""
        found = reversed(self._versions.get(name, ()))
        return next((v for v in found if v.id not in self._tombstones), None)

    def names(self, run: str | None = None) -> list[str]:
        """The names with a live version, sorted; only those of one run if it is given."""
        return sorted(
            name
            for name in self._versions
            if (run is None or run_of(name) == run) and self.newest(name) is not None
        )

    def live_versions(self) -> list[VersionHeader]:
        """All live versions, newest first."""
        return self._newest_first(self._versions)

    def run_versions(self, run: str) -> list[VersionHeader]:
        """The live versions of all names of a run, newest first."""
        return self._newest_first(name for name in self._versions if run_of(name) == run)

    def latest(self, run: str, *, accept: Accept | None = None) -> VersionHeader | None:
        """The newest live version of a run that `accept` takes (None: any). Never one that was
        stored with a loss that is not finite."""
        versions = self.run_versions(run)
        return next(
            (v for v in versions if is_finite(v.metrics) and (accept is None or accept(v))), None
        )

    def _newest_first(self, names: Iterable[str]) -> list[VersionHeader]:
        return sorted((v for name in names for v in self.versions(name)), key=age_of, reverse=True)

    # -- marks

    def is_dead(self, version_id: str) -> bool:
        """Whether a tombstone names the version, known or not."""
        return version_id in self._tombstones

    def is_dead_content(self, name: str, content_id: str) -> bool:
        """Whether a tombstone says that a version of `name` with this content is dead, known or
        not."""
        return _packed(RemovedContent.of(name, content_id)) in self._removed_contents

    def has_dead_content(self, name: str) -> bool:
        """Whether there is any content for which `is_dead_content` is true."""
        return hashlib.sha256(name.encode()).digest() in self._removed_names

    @property
    def dead_ids(self) -> frozenset[str]:
        """All version ids that tombstones name."""
        return frozenset(self._tombstones)

    def tombstones_of(self, version_id: str) -> tuple[TombstoneHeader, ...]:
        """The tombstones that name a version, oldest first."""
        return self._tombstones.get(version_id, ())

    def pins(self, version_id: str) -> list[DocumentHeader]:
        """The pins of a version that no unpin names, oldest first."""
        return [pin for pin in self._pins.get(version_id, ()) if pin.id not in self._unpinned]

    # -- selectors

    def resolve(
        self,
        selector: str | Selector,
        *,
        best: Best | None = None,
        accept: Accept | None = None,
        include_dead: bool = False,
    ) -> VersionHeader:
        """The version that NAME, NAME@PREFIX, RUN@latest or RUN@best means.

        `best` is the metric that decides RUN@best, and whether its minimum or maximum is wanted;
        without it, what the trainer itself looks for, in the newest version that records that.
        `accept` narrows RUN@latest and RUN@best, which mean complete versions. With
        `include_dead`, NAME and NAME@PREFIX find removed versions too. Raises NameRefused when
        the text has none of these forms, NotFound when it fits no version or several.
        """
        if isinstance(selector, str):
            selector = parse_selector(selector)
        if selector.which == "latest":
            return self._by_latest(selector.name, accept)
        if selector.which == "best":
            return self._by_best(selector.name, best, accept)
        if selector.version_prefix is not None:
            return self._by_prefix(selector.name, selector.version_prefix, include_dead)
        return self._by_name(selector.name, include_dead)

    def _by_name(self, name: str, include_dead: bool) -> VersionHeader:
        everything = self._known(name)
        found = everything if include_dead else self.versions(name)
        if not found:
            raise self._removed(everything[0])
        return found[0]

    def _by_prefix(self, name: str, prefix: str, include_dead: bool) -> VersionHeader:
        everything = self._known(name)
        fitting = [v for v in everything if v.id.startswith(prefix)]
        found = [v for v in fitting if include_dead or not self.is_dead(v.id)]
        if len(found) == 1:
            return found[0]
        if found:
            candidates = ", ".join(v.id for v in found)
            raise NotFound(f"{name}@{prefix} fits {len(found)} versions: {candidates}; add digits")
        if fitting:
            raise self._removed(fitting[0])
        candidates = ", ".join(v.id[:12] for v in everything[:_SUGGESTIONS_MAX])
        raise NotFound(
            f"{name} has no version {prefix}; its newest are {candidates}",
            next=f"ckptd show {name}",
        )

    def _by_latest(self, run: str, accept: Accept | None) -> VersionHeader:
        self._known_run(run)
        found = self.latest(run, accept=accept)
        if found is None:
            raise NotFound(f"no checkpoint of run {run} is complete", next="ckptd status")
        return found

    def _by_best(self, run: str, best: Best | None, accept: Accept | None) -> VersionHeader:
        versions = self._known_run(run)
        best = best or next(filter(None, (best_of(v.metrics) for v in versions)), None)
        recorded = sorted({m for version in versions for m in shown_metrics(version.metrics)})
        listing = f"recorded metrics: {', '.join(recorded)}" if recorded else "none is recorded"
        if best is None:
            raise NotFound(
                f"nothing says which metric decides {run}@best; {listing}",
                next=f"ckptd ls {run} --all-versions",
            )
        metric, mode = best
        sign = 1.0 if mode == "max" else -1.0
        found = [
            (sign * version.metrics[metric], age_of(version), version)
            for version in versions
            if not math.isnan(version.metrics.get(metric, math.nan))
            and is_finite(version.metrics)
            and (accept is None or accept(version))
        ]
        if not found:
            raise NotFound(
                f"no complete checkpoint of run {run} has the metric {metric}; {listing}",
                next=f"ckptd ls {run} --all-versions",
            )
        return max(found)[2]

    def _known(self, name: str) -> list[VersionHeader]:
        versions = self.versions(name, include_dead=True)
        if not versions:
            raise self._no_such("checkpoint", name, self.names())
        return versions

    def _known_run(self, run: str) -> list[VersionHeader]:
        versions = self.run_versions(run)
        if versions:
            return versions
        if self.newest(run) is not None:
            raise NotFound(
                f"{run} is a checkpoint, not a run; its newest version is {run} without @",
                next=f"ckptd show {run}",
            )
        runs = {run_of(name) for name in self.names()} - {""}
        raise self._no_such("run", run, sorted(runs))

    @staticmethod
    def _no_such(what: str, wanted: str, known: list[str]) -> NotFound:
        near = difflib.get_close_matches(wanted, known, n=_SUGGESTIONS_MAX, cutoff=0.5)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        return NotFound(f"there is no {what} {wanted}{hint}", next="ckptd ls")

    @staticmethod
    def _removed(version: VersionHeader) -> NotFound:
        return NotFound(f"{version.label} was removed", next=f"ckptd undelete {version.label}")


def _packed(removed: RemovedContent) -> bytes:
    return bytes.fromhex(removed.name_sha256 + removed.content_id)
