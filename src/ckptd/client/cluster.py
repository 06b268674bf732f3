"""A client's view of the cluster: which nodes answer, what they know, who is missing.

A client keeps no state: everything is asked anew, from as many nodes as answer. `connect` makes
the connections, `search` tells how nodes are found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import structlog
from cryptography import x509

from ckptd.client.nodes import AbsentNode as AbsentNode
from ckptd.client.nodes import Node as Node
from ckptd.client.search import Search
from ckptd.config import Config
from ckptd.core import bitmaps, limits
from ckptd.core.admission import admit
from ckptd.core.catalogue import Catalogue, VersionHeader
from ckptd.core.documents import Document, Manifest, UnknownDocument
from ckptd.core.identity import Identity
from ckptd.core.signing import Signer
from ckptd.errors import (
    CkptdError,
    DocumentRefused,
    NotEnoughNodes,
    NotFound,
    ProtocolError,
)
from ckptd.net.bulk import BulkConnector
from ckptd.wire import messages

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class Admitted(NamedTuple):
    """A document whose hash, signature and author are good."""

    id: str
    document: Document | UnknownDocument
    author: Identity


class Inventoried(NamedTuple):
    """What a node has of a version: a bitmap over its shards, and the age in seconds of the oldest
    check of these copies (-1: one of them was not checked since the node's start)."""

    bitmap: bytes
    verified_age_s: float


@dataclass
class Cluster:
    """Connections to all nodes that answer. Made by `connect`."""

    config: Config
    identity: Identity
    signer: Signer
    bulk: BulkConnector
    nodes: dict[str, Node]
    absent: dict[str, AbsentNode]
    ca: x509.Certificate = field(repr=False)
    search: Search | None = field(default=None, repr=False)
    """How more nodes are found; None where they are given."""
    first: tuple[str, ...] = ()
    """Addresses to look at first."""
    revoked: set[str] = field(default_factory=set, repr=False)
    """Serial numbers of certificates that were forgotten, as far as that is known."""

    @property
    def cluster(self) -> str:
        return self.config.cluster

    @property
    def workers(self) -> list[Node]:
        """Nodes that keep shards and can do so now, by id."""
        return sorted(
            (
                node
                for node in self.nodes.values()
                if "worker" in node.hello.roles and node.status.state != "failed"
            ),
            key=lambda node: node.id,
        )

    @property
    def all_answered(self) -> bool:
        """Whether every remembered worker answered, so that what nobody has is nowhere."""
        absent = (not node.roles or "worker" in node.roles for node in self.absent.values())
        present = sum("worker" in node.hello.roles for node in self.nodes.values())
        return not any(absent) and len(self.workers) == present

    @property
    def coordinators(self) -> list[Node]:
        """Nodes that watch directories, by id."""
        found = [node for node in self.nodes.values() if "coordinator" in node.hello.roles]
        return sorted(found, key=lambda node: node.id)

    def require_nodes(self) -> None:
        """Raises NotEnoughNodes when no worker answers."""
        if not self.workers:
            details = "; ".join(
                f"{absent.id or absent.address}: {absent.reason}" for absent in self.absent.values()
            )
            raise NotEnoughNodes(
                f"no node of cluster {self.cluster} answers ({details or self._nobody})",
                next="ckptd doctor",
            )

    @property
    def _nobody(self) -> str:
        return self.search.outcome if self.search is not None else "no peers are known"

    async def ask_all(
        self, question: Callable[[Node], Awaitable[_T]], nodes: Iterable[Node] | None = None
    ) -> dict[str, _T]:
        """Asks all workers (or `nodes`) at once; the answers by node id. A node that fails while
        it is asked becomes absent."""
        asked = list(self.workers if nodes is None else nodes)
        answers = await asyncio.gather(*(question(node) for node in asked), return_exceptions=True)
        found: dict[str, _T] = {}
        for node, answer in zip(asked, answers, strict=True):
            if isinstance(answer, CkptdError):
                self.lose(node, answer)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[node.id] = answer
        return found

    def lose(self, node: Node, error: CkptdError) -> None:
        """Notes that a node no longer answers."""
        if self.nodes.pop(node.id, None) is not None:
            _log.info("node_lost", node=node.id, reason=error.message)
            self.absent[node.id] = AbsentNode(
                node.id, node.control.address, error.message, 0.0, node.hello.roles, node.hello.zone
            )

    async def refresh(self) -> None:
        """Asks every node for its state again."""

        async def ask(node: Node) -> messages.NodeStatus:
            status, _ = await node.control.request(messages.GetStatus(), messages.NodeStatus)
            return status

        for node_id, status in (await self.ask_all(ask, list(self.nodes.values()))).items():
            self.nodes[node_id].status = status

    async def rejoin(self) -> None:
        """Asks every node for its state again, and looks anew for those that do not answer: where
        they were, and where the others see them now."""
        await self.refresh()
        if self.search is not None:
            missing = {absent.address for absent in self.absent.values() if absent.address}
            if not self.nodes:
                missing.update(self.first)
            self.absent.clear()
            await self.search.again(missing)

    async def find_again(self, nodes: Collection[str]) -> set[str]:
        """Looks for those of `nodes` that are absent: they may be back, even at another address.
        Returns the ids of those that were found."""
        lost = [self.absent[node].address for node in nodes if node in self.absent]
        if self.search is None or not lost:
            return set()
        await self.search.run(lost)
        return {node for node in nodes if node in self.nodes}

    async def watched(self) -> list[messages.Unstored]:
        """The checkpoints that coordinators see and have not stored yet, by name."""

        async def ask(node: Node) -> messages.Watched:
            reply, _ = await node.control.request(messages.GetWatched(), messages.Watched)
            return reply

        answers = await self.ask_all(ask, self.coordinators)
        found = [unstored for reply in answers.values() for unstored in reply.unstored]
        return sorted(found, key=lambda unstored: (unstored.name, unstored.path))

    # -- documents

    async def headers(self, *, with_dead: bool = False) -> dict[str, messages.DocumentHeader]:
        """The headers of all documents that any node knows, by id. Of dead versions only some may
        be among them, unless `with_dead` says that each node is to be asked: equal digests say
        nothing of those (`Catalogue.shared_ids`)."""

        async def ask(node: Node) -> list[messages.DocumentHeader]:
            found: list[messages.DocumentHeader] = []
            more, after = True, b""
            while more and len(found) < limits.CATALOGUE_DOCUMENTS_MAX:
                page, _ = await node.control.request(
                    messages.ListDocuments(after), messages.DocumentHeaders
                )
                found.extend(page.headers)
                more = page.more and bool(page.headers)
                after = page.headers[-1].id if page.headers else b""
            return found

        merged: dict[str, messages.DocumentHeader] = {}
        asked = self.ask_all(ask) if with_dead else self._ask_distinct_catalogues(ask)
        for headers in (await asked).values():
            for header in headers:
                merged.setdefault(header.id.hex(), header)
        return merged

    async def _ask_distinct_catalogues(
        self, question: Callable[[Node], Awaitable[_T]]
    ) -> dict[str, _T]:
        """Asks one node of each distinct catalogue (nodes with equal digests know the same, but
        for manifests of dead versions). Where that one fails, all others that know the same are
        asked: what they know is not nowhere because one of them fell asleep."""
        distinct: dict[bytes, list[Node]] = {}
        for node in self.workers:
            distinct.setdefault(node.status.documents_digest, []).append(node)
        answers = await self.ask_all(question, [nodes[0] for nodes in distinct.values()])
        silent = [nodes for nodes in distinct.values() if nodes[0].id not in answers]
        return answers | await self.ask_all(question, [n for nodes in silent for n in nodes[1:]])

    async def signed(self, document_id: str) -> messages.SignedDocument:
        """A signed document from any node that has it whole. Raises NotFound."""
        raw_id = bytes.fromhex(document_id)
        for node in self.workers:
            try:
                _, payload = await node.control.request(
                    messages.GetDocuments((raw_id,)), messages.Documents
                )
            except CkptdError as error:
                self.lose(node, error)
                continue
            for signed in messages.decode_documents(memoryview(payload), peer=node.id):
                try:
                    found, _, _ = self.admit(signed)
                except DocumentRefused as error:
                    _log.warning("document_refused", node=node.id, reason=error.message)
                    continue
                if found == document_id:
                    return signed
        raise NotFound(f"no node that answers has document {document_id}", next="ckptd status")

    def admit(
        self, signed: messages.SignedDocument
    ) -> tuple[str, Document | UnknownDocument, Identity]:
        """As `ckptd.core.admission.admit`, in this cluster."""
        return admit(signed.document, signed.signature, cluster=self.cluster, ca=self.ca)

    async def manifest(self, version_id: str) -> Manifest:
        """The manifest of a version: hash, signature and author checked. Raises NotFound."""
        document = self.admit(await self.signed(version_id))[1]
        if not isinstance(document, Manifest):
            raise NotFound(f"document {version_id} is no manifest", next="ckptd ls")
        return document

    async def catalogue(self, *, with_dead: bool = False) -> Catalogue:
        """What the nodes that answer know: tombstones, marks and members fetched and checked one
        by one, manifests as headers (their bodies are checked when they are used). `with_dead`: as
        for `headers`. Raises NotEnoughNodes when no worker answers."""
        self.require_nodes()
        merged = await self.headers(with_dead=with_dead)
        self.require_nodes()  # if none is left that was asked, that does not mean there is nothing
        catalogue = Catalogue(self.cluster)
        small = [key for key, header in merged.items() if header.kind != "manifest"]
        for document_id, document, author in await self.fetch(small):
            catalogue.add(document_id, document, author=author)
        await self._leave_out_forgotten(catalogue)
        for key, header in merged.items():
            if header.kind == "manifest":
                try:
                    catalogue.add_unverified(_version_header(key, header))
                except DocumentRefused as error:
                    _log.warning("document_refused", reason=error.message)
        return catalogue

    async def _leave_out_forgotten(self, catalogue: Catalogue) -> None:
        """Now that it is signed who was forgotten, these are none of the cluster."""
        roster = catalogue.roster
        self.revoked |= roster.forgotten_serials
        for node in [n for n in self.nodes.values() if roster.refuses(n.control.identity.serial)]:
            del self.nodes[node.id]
            await node.control.close()
        for node_id in roster.forgotten():
            self.absent.pop(node_id, None)

    async def fetch(self, wanted: Iterable[str]) -> list[Admitted]:
        """The documents with these ids, hash, signature and author checked, from whichever nodes
        have them. Those that no node can show are left out."""
        left = dict.fromkeys(wanted)
        found: list[Admitted] = []
        for node in self.workers:
            todo = list(left)
            while todo:
                batch = tuple(bytes.fromhex(key) for key in todo[: limits.DOCUMENTS_PER_SYNC])
                try:
                    reply, payload = await node.control.request(
                        messages.GetDocuments(batch), messages.Documents
                    )
                    documents = messages.decode_documents(memoryview(payload), peer=node.id)
                except CkptdError as error:
                    self.lose(node, error)
                    break
                for admitted in self._admitted(node, documents):
                    if admitted.id in left:  # not what nobody asked for, and nothing twice
                        del left[admitted.id]
                        found.append(admitted)
                answered = len(documents) + len(reply.missing)
                if not answered:
                    break
                todo = todo[min(answered, len(batch)) :]
            if not left:
                break
        return found

    def _admitted(
        self, node: Node, documents: Iterable[messages.SignedDocument]
    ) -> Iterator[Admitted]:
        for signed in documents:
            try:
                yield Admitted(*self.admit(signed))
            except DocumentRefused as error:
                _log.warning("document_refused", node=node.id, reason=error.message)

    # -- shards

    async def bitmaps(self, versions: list[VersionHeader]) -> dict[str, dict[str, bytes | None]]:
        """Which shards of each version are where: by version id, then by node id, a bitmap over
        the manifest's shards, or None where the manifest is not."""
        found = await self.inventory(versions)
        return {
            version: {node: answer and answer.bitmap for node, answer in answers.items()}
            for version, answers in found.items()
        }

    async def inventory(
        self, versions: list[VersionHeader]
    ) -> dict[str, dict[str, Inventoried | None]]:
        """As `bitmaps`, and when the copies were last checked."""
        ids = tuple(bytes.fromhex(version.id) for version in versions)

        async def ask(node: Node) -> list[Inventoried | None]:
            answers: list[Inventoried | None] = []
            while len(answers) < len(ids):
                batch = ids[len(answers) : len(answers) + limits.VERSIONS_PER_QUESTION]
                reply, _ = await node.control.request(
                    messages.Inventory(batch), messages.InventoryReply
                )
                if not 0 < len(reply.bitmaps) <= len(batch) or len(reply.verified_age_s) != len(
                    reply.bitmaps
                ):
                    raise ProtocolError(node.id, "answered an inventory with another number")
                answers.extend(
                    None if bitmap is None else Inventoried(bitmap, age_s)
                    for bitmap, age_s in zip(reply.bitmaps, reply.verified_age_s, strict=True)
                )
            return answers

        answers = await self.ask_all(ask)
        return {
            version.id: {node: found[index] for node, found in answers.items()}
            for index, version in enumerate(versions)
        }

    async def holders(self, shards: list[bytes], *, touch: bool = False) -> list[dict[str, float]]:
        """For each shard the nodes that have it, with the age in seconds of their last check of
        its bytes (-1: not since they started)."""

        async def ask(node: Node) -> list[float | None]:
            ages: list[float | None] = []
            for start in range(0, len(shards), limits.SHARDS_PER_QUESTION):
                batch = tuple(shards[start : start + limits.SHARDS_PER_QUESTION])
                reply, _ = await node.control.request(
                    messages.Have(batch, touch), messages.HaveReply
                )
                held = bitmaps.unpack(reply.held, len(batch))
                ages.extend(
                    age if here else None
                    for here, age in zip(
                        held, _padded(reply.verified_age_s, len(batch)), strict=True
                    )
                )
            return ages

        answers = await self.ask_all(ask)
        return [
            {node: age for node, ages in answers.items() if (age := ages[index]) is not None}
            for index in range(len(shards))
        ]

    async def close(self) -> None:
        """Closes all connections."""
        self.bulk.close()
        await asyncio.gather(*(node.control.close() for node in self.nodes.values()))


def _padded(ages: tuple[float, ...], count: int) -> list[float]:
    return [*ages[:count], *([-1.0] * (count - len(ages)))]


def _version_header(version_id: str, header: messages.DocumentHeader) -> VersionHeader:
    """Raises DocumentRefused for counts that no manifest can have: memory follows from them."""
    if header.shards > limits.SHARDS_PER_MANIFEST_MAX or header.copies > limits.CLUSTER_NODES_MAX:
        raise DocumentRefused(f"the header of version {version_id} is over the limits")
    return VersionHeader(
        id=version_id,
        kind="manifest",
        order=header.order,
        created=header.created,
        name=header.name,
        content_id=header.content_id.hex(),
        size=header.size,
        files=header.files,
        shards=header.shards,
        copies=header.copies,
        step=header.step,
        metrics=header.metrics,
    )
