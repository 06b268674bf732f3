"""Which version is meant by what a user typed, and its manifest."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
from cryptography import x509

from ckptd.client.cluster import Cluster
from ckptd.client.documents import confirm
from ckptd.client.progress import Progress
from ckptd.config import Config
from ckptd.core import limits
from ckptd.core.admission import admit
from ckptd.core.catalogue import Best, Catalogue
from ckptd.core.documents import Document, Manifest, Member, Tombstone, UnknownDocument, decode
from ckptd.core.headers import VersionHeader, version_header
from ckptd.core.identity import Identity, Role, load_ca
from ckptd.core.names import Selector, parse_selector
from ckptd.errors import (
    CkptdError,
    DocumentRefused,
    NoGoodCopy,
    NotEnoughNodes,
    NotFound,
    Refused,
)
from ckptd.store import layout

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Chosen:
    """A version and its manifest. `known_nodes`: how many nodes the documents name."""

    version: str
    manifest: Manifest
    known_nodes: int


async def choose_in_cluster(cluster: Cluster, selector: str, progress: Progress) -> Chosen:
    """The version that `selector` means, its manifest checked.

    RUN@latest and RUN@best mean the newest or best version of which every shard has a copy on a
    node that answers. Raises NameRefused, NotFound, NotEnoughNodes, and NoGoodCopy when nodes list
    what is wanted and none of them has a good manifest of it.
    """
    wanted = parse_selector(selector)
    catalogue = await cluster.catalogue()
    answering = len(cluster.workers)
    incomplete: set[str] = set()
    unproved: list[str] = []
    while True:
        try:
            header = _resolve(catalogue, wanted, cluster.config, incomplete)
        except NotFound as error:
            if unproved:
                raise _nothing_proved(cluster, unproved) from error
            raise
        confirmed = await confirm(cluster, catalogue, [header])
        if not confirmed:
            # Its only proof may be on a node that has just gone: then an older one will not do.
            if len(cluster.workers) < answering:
                raise NotEnoughNodes(
                    f"the manifest of {header.label} cannot be had any more", next="ckptd nodes"
                )
            progress.note(
                f"{header.label} is passed over: nodes list it, and none can show its manifest"
            )
            unproved.append(header.label)
            continue
        if confirmed[0].name != header.name:
            continue  # a node told of it under a wrong name: what it means is decided anew
        manifest = await cluster.manifest(header.id)
        if wanted.which is None or await _is_complete(cluster, manifest):
            return Chosen(header.id, manifest, len(cluster.nodes) + len(cluster.absent))
        progress.note(f"{header.label} is newer or better, but not complete: it is passed over")
        incomplete.add(header.id)


def _nothing_proved(cluster: Cluster, labels: list[str]) -> CkptdError:
    what = f"nodes list {', '.join(labels)}, and none that answers can show a good manifest of it"
    if cluster.all_answered:
        return NoGoodCopy(what, next="ckptd doctor   (damaged documents lie in STORE/quarantine)")
    return NotEnoughNodes(what, next="ckptd nodes; start those that are down, then restore again")


def _resolve(
    catalogue: Catalogue, selector: Selector, config: Config | None, incomplete: set[str]
) -> VersionHeader:
    return catalogue.resolve(
        selector,
        best=best_metric(selector, config),
        accept=lambda version: version.id not in incomplete,
    )


def best_metric(selector: Selector, config: Config | None) -> Best | None:
    """The metric that the config's first fitting retention rule names for a run."""
    for rule in config.retention if config is not None else ():
        if rule.keep_best is not None and fnmatch.fnmatchcase(selector.name, rule.runs):
            return rule.keep_best.metric, rule.keep_best.mode
    return None


async def _is_complete(cluster: Cluster, manifest: Manifest) -> bool:
    shards = [bytes.fromhex(reference.shard) for reference in manifest.shards]
    for start in range(0, len(shards), limits.SHARDS_PER_QUESTION):
        holders = await cluster.holders(shards[start : start + limits.SHARDS_PER_QUESTION])
        if not all(holders):
            return False
    return True


def choose_in_stores(
    stores: Sequence[Path], selector: str, config: Config | None, progress: Progress
) -> Chosen:
    """As `choose_in_cluster`, from the documents in store directories.

    Signatures are checked when there is a `config`, which names the CA. Raises Refused for a
    directory that is no store, NotFound, NameRefused.
    """
    ca = load_ca(config.tls.ca.read_bytes()) if config is not None else None
    if ca is None:
        progress.note(
            "no config, so no CA: the signatures of the documents are not checked (every hash is)"
        )
    reader = _StoreReader(config, ca)
    for store in stores:
        reader.read(store)
    wanted = parse_selector(selector)
    incomplete: set[str] = set()
    while True:
        header = _resolve(reader.catalogue, wanted, config, incomplete)
        manifest = reader.manifest(header.id)
        here = all(
            any(os.path.isfile(layout.shard_path(str(store), digest)) for store in stores)
            for digest in (bytes.fromhex(reference.shard) for reference in manifest.shards)
        )
        if wanted.which is None or here:
            return Chosen(header.id, manifest, len(reader.workers))
        progress.note(f"{header.label} is newer or better, but not complete: it is passed over")
        incomplete.add(header.id)


class _StoreReader:
    """Collects the documents of store directories. A bad file is passed over: another store may
    have a good one."""

    def __init__(self, config: Config | None, ca: x509.Certificate | None) -> None:
        self._ca = ca
        self._cluster = config.cluster if config is not None else None
        self._paths: dict[str, str] = {}
        self.workers: set[str] = set()
        self.catalogue = Catalogue(self._cluster or "")

    def read(self, store: Path) -> None:
        """Adds the documents of one store. Raises Refused when it is none."""
        place = os.path.join(store, layout.CATALOGUE)
        try:
            names = os.listdir(place)
        except OSError as error:
            raise Refused(
                f"{store} is no store that can be read: {place}: {error.strerror}",
                next=f"ls -la {store}; --from takes the directory that store.path names",
            ) from error
        for name in names:
            parsed = layout.parse_catalogue_name(name)
            if parsed is None or parsed[1] != layout.DOCUMENT_SUFFIX or parsed[0] in self._paths:
                continue
            path = os.path.join(place, name)
            try:
                document, author = self._load(parsed[0], path)
            except (OSError, CkptdError) as error:
                _log.warning("document_not_read", path=path, reason=str(error))
                continue
            self._paths[parsed[0]] = path
            self._add(parsed[0], document, author)

    def manifest(self, version: str) -> Manifest:
        """The manifest of a version that was read."""
        document, _ = self._load(version, self._paths[version])
        if not isinstance(document, Manifest):
            raise NotFound(f"{version} is no manifest")
        return document

    def _add(
        self, document_id: str, document: Document | UnknownDocument, author: Identity | None
    ) -> None:
        if isinstance(document, Member) and "worker" in document.roles:
            self.workers.add(document.node)
        if author is not None:
            self.catalogue.add(document_id, document, author=author)
        elif isinstance(document, Manifest):
            self.catalogue.add_unverified(version_header(document_id, document))
        elif isinstance(document, Tombstone):
            # Nobody vouches for it; yet what was removed is to stay removed.
            nobody = Identity(document.cluster, frozenset({Role.WORKER}), "unknown", "")
            self.catalogue.add(document_id, document, author=nobody)

    def _load(
        self, document_id: str, path: str
    ) -> tuple[Document | UnknownDocument, Identity | None]:
        raw = _read(path, limits.DOCUMENT_MAX_BYTES)
        if hashlib.sha256(raw).hexdigest() != document_id:
            raise DocumentRefused(f"{path} has another hash than its name says")
        if self._cluster is None:
            self._cluster = _cluster_of(raw)
            self.catalogue.cluster = self._cluster
        if self._ca is None:
            return decode(raw, cluster=self._cluster), None
        signature = _read(
            path.removesuffix(layout.DOCUMENT_SUFFIX) + layout.SIGNATURE_SUFFIX,
            limits.SIGNATURE_ENVELOPE_MAX_BYTES,
        )
        _, document, author = admit(raw, signature, cluster=self._cluster, ca=self._ca)
        return document, author


def _read(path: str, max_bytes: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise DocumentRefused(f"{path} is longer than any document")
    return raw


def _cluster_of(raw: bytes) -> str:
    """The cluster that a document names, for stores that are read without a config."""
    try:
        cluster = json.loads(raw)["cluster"]
    except (ValueError, KeyError, TypeError) as error:
        raise DocumentRefused(f"a document cannot be read: {error}") from error
    if not isinstance(cluster, str):
        raise DocumentRefused("a document names no cluster")
    return cluster
