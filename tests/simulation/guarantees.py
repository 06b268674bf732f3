"""What must hold at any moment, read from the media of all nodes and from nothing that they say.

Only what is flushed counts. Each check has the number of the promise in docs/guarantees.md or of
the design that it stands for in its name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from tests.model_disk import File
from tests.simulation.cluster import SimulatedCluster, SimulatedNode
from tests.simulation.disk import STORE

from ckptd.core.availability import MANIFEST_COPIES_MIN

RECENT_DAMAGE_S: Final = 900.0
"""A promise to keep a copy cannot know of damage that we do; for so long it is not held against
whoever relied on it."""
_LAST_ANSWER_S: Final = 60.0
"""So long what was on its way may still arrive."""

_ASKED_WITHIN_S: Final = 120.0
"""What retention writes it has asked about so recently, at most."""


@dataclass
class Version:
    """A version as its manifest tells, and what is known of it from outside."""

    id: str
    name: str
    order: int
    content_id: str
    copies: int
    shards: tuple[str, ...]
    protected: bool = False  # somebody was told so

    @property
    def enough(self) -> int:
        """The copies with which it is protected. One without any shard is all in its manifest, of
        which two are enough: everybody gets it anyway."""
        return self.copies if self.shards else min(MANIFEST_COPIES_MIN, self.copies)


@dataclass
class Ledger:
    """What commands were told, and what was written: the memory of the outside world."""

    contents: dict[str, list[dict[str, bytes]]] = field(default_factory=dict)  # by name
    of_version: dict[str, dict[str, bytes]] = field(default_factory=dict)
    protected: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)  # ids of documents that somebody has
    removable: set[str] = field(default_factory=set)  # by a command that was begun
    pinned: set[str] = field(default_factory=set)
    forged: set[str] = field(default_factory=set)  # ids of documents that nobody may admit
    # When we damaged a copy, by (node, shard); when reads of a node began to go wrong.
    flipped: dict[tuple[str, str], float] = field(default_factory=dict)
    misread_at_s: dict[str, float] = field(default_factory=dict)
    lost_at_s: float = -1e9  # when we last destroyed a whole disk
    lost_documents: set[str] = field(default_factory=set)  # that nobody else had then
    damaged_at_s: dict[str, float] = field(default_factory=dict)  # by shard


class Media:
    """Reads the disks. What did not change is not read twice."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._hashes: dict[int, tuple[bytes, str]] = {}
        self.documents: dict[str, dict[str, Any]] = {}  # every one that was ever on a disk
        self.versions: dict[str, Version] = {}
        self.tombstones: dict[str, set[str]] = {}  # by version
        self.new_documents: list[str] = []

    def hash_of(self, file: File) -> str:
        known = self._hashes.get(id(file.durable))
        if known is None or known[0] is not file.durable:
            known = (file.durable, hashlib.sha256(file.durable).hexdigest())
            self._hashes[id(file.durable)] = known
        return known[1]

    def good_shards(self, node: SimulatedNode) -> set[str]:
        """Shards with a whole copy on this medium."""
        return {name for name, file in node.disk.shards().items() if self.hash_of(file) == name}

    def bad_shards(self, node: SimulatedNode) -> set[str]:
        return {name for name, file in node.disk.shards().items() if self.hash_of(file) != name}

    def set_aside(self, node: SimulatedNode) -> set[str]:
        """Shards, and documents, that lie whole in quarantine: their reading was bad, not they."""
        found = node.disk.quarantined()
        return {name for name in found if any(self.hash_of(file) == name for file in found[name])}

    def document_ids(self, node: SimulatedNode) -> set[str]:
        """Documents that are on this medium with their signatures, whole."""
        place = STORE if node.is_worker else str(self._cluster.pki.state(node.name) / "documents")
        files = node.disk.durable_files(f"{place}/catalogue")
        found = set()
        for name, file in files.items():
            stem, _, suffix = name.partition(".")
            if suffix != "json" or f"{stem}.sig" not in files or self.hash_of(file) != stem:
                continue
            found.add(stem)
            if stem not in self.documents:
                self._learn(stem, json.loads(file.durable))
        return found

    def _learn(self, document_id: str, document: dict[str, Any]) -> None:
        self.documents[document_id] = document
        self.new_documents.append(document_id)
        if document["kind"] == "manifest" and document["format"] == 1:
            self.versions[document_id] = Version(
                document_id,
                document["name"],
                document["order"],
                document["content_id"],
                max(document["copies"], self._cluster.settings.copies),
                tuple(shard for shard, _ in document["shards"]),
            )
        elif document["kind"] == "tombstone":
            for version in document["versions"]:
                self.tombstones.setdefault(version, set()).add(document_id)

    def look(self) -> Look:
        workers = self._cluster.workers
        return Look(
            {node.name: self.good_shards(node) for node in workers},
            {node.name: self.document_ids(node) for node in self._cluster.living},
        )


@dataclass
class Look:
    """All media at one moment."""

    shards: dict[str, set[str]]  # by worker
    documents: dict[str, set[str]]  # by node

    def holders(self, shard: str, among: Iterable[str] | None = None) -> set[str]:
        nodes = self.shards if among is None else among
        return {node for node in nodes if shard in self.shards[node]}

    def manifest_holders(self, version: str) -> set[str]:
        return {node for node in self.shards if version in self.documents[node]}

    def copies(self, version: Version) -> int:
        """The smallest number of counted copies: on nodes that have the manifest, too."""
        among = self.manifest_holders(version.id)
        if not version.shards:
            return len(among)
        return min(len(self.holders(shard, among)) for shard in version.shards)


class Guarantees:
    """Checks, after each step and at each announcement."""

    def __init__(self, cluster: SimulatedCluster, ledger: Ledger) -> None:
        self.cluster = cluster
        self.ledger = ledger
        self.media = Media(cluster)
        self.unheard_since_s: dict[tuple[str, str], float] = {}  # by listener and speaker
        self.remembered: dict[str, frozenset[str]] = {}  # by node, the workers at the last check
        # Also in the middle of a step: a node that comes back in it is heard at once.
        cluster.on_topology = self.note_topology
        self.checked_s = 0.0

    def check(self) -> None:
        """Everything that must hold always."""
        look = self.media.look()
        self.check_protected_versions_exist(look)
        self.check_no_bad_copy_by_itself(look)
        self.check_documents(look)
        self.check_runs(look)
        self.remembered = {
            node.name: frozenset(node.node.members.roster.workers())
            for node in self.cluster.workers
            if node.node is not None
        }
        self.checked_s = self.cluster.kernel.now_s

    def live_protected(self) -> list[Version]:
        """Versions that were announced as protected and that nobody has removed."""
        found = []
        for version_id in self.ledger.protected:
            version = self.media.versions.get(version_id)
            if version is None:
                self.cluster.fail(f"protected version {version_id[:12]} was on no medium")
            elif not self.is_dead(version_id):
                found.append(version)
        return found

    def is_dead(self, version_id: str) -> bool:
        return version_id in self.media.tombstones or version_id in self.ledger.removable

    # Guarantee 3: no protected version is lost.
    def check_protected_versions_exist(self, look: Look) -> None:
        for version in self.live_protected():
            if not look.manifest_holders(version.id) and not self._is_set_aside(version.id):
                self.cluster.fail(f"no medium has the manifest of {version.name}@{version.id[:12]}")
            for shard in version.shards:
                if not look.holders(shard) and not self._is_set_aside(shard):
                    self.cluster.fail(
                        f"no medium has shard {shard[:12]} of {version.name}@{version.id[:12]}"
                    )
                    return

    def _is_set_aside(self, shard: str) -> bool:
        """Whether the last whole copy (or manifest) went to quarantine because we had it read wrong
        again and again. It is not lost: what lies there is read once more later, and is a copy
        again; that it comes to that is seen at rest. A node whose reads we left alone has no
        reason to set a whole copy aside."""
        return any(
            shard in self.media.set_aside(node)
            for node in self.cluster.workers
            if node.name in self.ledger.misread_at_s
        )

    # Guarantees 2 and 5, and the durable write: what lies under a name has that hash.
    def check_no_bad_copy_by_itself(self, look: Look) -> None:
        for node in self.cluster.workers:
            for shard in self.media.bad_shards(node):
                if (node.name, shard) not in self.ledger.flipped:
                    self.cluster.fail(f"{node.name} has a wrong file as shard {shard[:12]}")

    # Guarantee 6: nobody forges.
    def check_documents(self, look: Look) -> None:
        for node, ids in look.documents.items():
            for forged in ids & self.ledger.forged:
                kind = self.media.documents[forged]["kind"]
                self.cluster.fail(f"{node} admitted a forged {kind} {forged[:12]}")
        new, self.media.new_documents = self.media.new_documents, []
        for document_id in new:
            document = self.media.documents[document_id]
            if document["kind"] == "tombstone":
                self.check_tombstone(look, document_id, document)

    # Guarantee 4: retention never removes the last protected version of a run.
    def check_tombstone(self, look: Look, document_id: str, document: dict[str, Any]) -> None:
        for version in document["versions"]:
            if document["reason"] == "rm":
                if version not in self.ledger.removable and document_id not in self.ledger.forged:
                    self.cluster.fail(f"{version[:12]} was removed, and nobody asked for it")
            elif version in self.ledger.pinned:
                self.cluster.fail(f"retention removed {version[:12]}, which is pinned")
        if document["reason"] != "retention":
            return
        justified_by = self.media.versions.get(document["justified_by"])
        if justified_by is None:
            self.cluster.fail("retention is justified by a version that is on no medium")
            return
        for version_id in document["versions"]:
            dropped = self.media.versions.get(version_id)
            if dropped is not None and (dropped.order, dropped.id) >= (
                justified_by.order,
                justified_by.id,
            ):
                self.cluster.fail(
                    f"retention dropped {dropped.id[:12]} for the sake of an older one"
                )
        if self.is_dead(justified_by.id):
            return
        copies = look.copies(justified_by)
        if copies < 1 or (copies < justified_by.enough and not self._may_have_shrunk(justified_by)):
            self.cluster.fail(
                f"retention is justified by {justified_by.name}@{justified_by.id[:12]}, and of "
                f"{justified_by.enough} copies media have {copies}"
            )

    def _may_have_shrunk(self, version: Version) -> bool:
        """Whether a version may have been protected when retention relied on it, since the last
        check, and was damaged then or is in a way that nobody has found."""
        since_s = self.checked_s - _ASKED_WITHIN_S
        shards = set(version.shards)
        return (
            self.ledger.lost_at_s >= since_s
            or any(shard in shards for _, shard in self.ledger.flipped)
            or any(self.ledger.damaged_at_s.get(shard, -1e9) >= since_s for shard in shards)
        )

    # Guarantee 4, too: of each run something stays that was protected, unless people removed it.
    def check_runs(self, look: Look) -> None:
        runs: dict[str, list[Version]] = {}
        for version_id in self.ledger.protected:
            if version := self.media.versions.get(version_id):
                runs.setdefault(version.name.rpartition("/")[0], []).append(version)
        for run, versions in runs.items():
            touched = any(version.id in self.ledger.removable for version in versions)
            if touched or not all(self.is_dead(version.id) for version in versions):
                continue
            left = [
                version
                for version in self.media.versions.values()
                if version.name.rpartition("/")[0] == run
                and not self.is_dead(version.id)
                and look.copies(version)
            ]
            if not left:
                self.cluster.fail(f"retention has left nothing of the run {run!r}")

    # Guarantee 1: "protected" is said of what is flushed on enough nodes.
    def check_announced(self, version_id: str, since_s: float, *, hashed: bool = True) -> None:
        """Called in the moment in which a command, begun at `since_s`, says it. Without `hashed` it
        counts, as `ckptd status` does, what nodes have, and not what they have read again."""
        look = self.media.look()
        version = self.media.versions.get(version_id)
        if version is None:
            self.cluster.fail(f"{version_id[:12]} is said to be protected, and on no medium")
            return
        self.ledger.protected.add(version_id)
        if self.is_dead(version_id):
            return
        copies = look.copies(version)
        if copies < version.enough and not self._is_excused(version.shards, since_s, hashed=hashed):
            self.cluster.fail(
                f"{version.name}@{version_id[:12]} is said to be protected with {version.enough} "
                f"copies, and media have {copies}"
            )

    def _is_excused(self, shards: Iterable[str], since_s: float, *, hashed: bool) -> bool:
        """Whether a copy was damaged since its node last hashed it: that is found by the next
        scrub. One that was damaged before the node's start is never believed unhashed, unless
        the command saw it whole before."""
        if self.ledger.lost_at_s >= since_s:
            return True
        for node in self.cluster.workers:
            if self.ledger.misread_at_s.get(node.name, -1e9) > self.cluster.kernel.now_s - 300:
                return True
            for shard in shards:
                at_s = self.ledger.flipped.get((node.name, shard))
                # A node may believe what it has hashed in the life in which it is asked.
                believed_s = min(node.ran_since(since_s), since_s)
                if at_s is not None and (not hashed or at_s >= believed_s):
                    return True
        return False

    # Guarantee 5, and design 3: what a node may remove from its medium.
    def check_removed(self, node: SimulatedNode, path: str, content: bytes) -> None:
        """Called when a node has just removed the name of a copy."""
        shard = path.rpartition("/")[2][:64]
        whole = hashlib.sha256(content).hexdigest() == shard
        look = self.media.look()
        live = [version for version in self.live_protected() if shard in version.shards]
        others = look.holders(shard) - {node.name}
        if "/quarantine/" in path:
            self._check_grace(node, path, f"gave up a quarantined copy of shard {shard[:12]}")
            if not whole and live and not look.holders(shard):
                self.cluster.fail(f"{node.name} gave up on the last copy of shard {shard[:12]}")
            return
        if not whole:  # nobody need know that, where others have enough
            if any(len(others) < version.copies for version in live):
                self.cluster.fail(f"{node.name} deleted a corrupt copy of shard {shard[:12]}")
            return
        since_s = self.cluster.kernel.now_s - RECENT_DAMAGE_S
        if self.ledger.damaged_at_s.get(shard, -1e9) >= since_s:
            return
        for version in live:
            if len(others) < version.copies:
                self.cluster.fail(
                    f"{node.name} dropped shard {shard[:12]} of {version.name}@"
                    f"{version.id[:12]}, and only {sorted(others)} have it"
                )
        known = look.documents[node.name]
        named = any(
            shard in version.shards
            for key, version in self.media.versions.items()
            if key in known and known.isdisjoint(self.media.tombstones.get(key, ()))
        )
        if not named:
            self._check_collected(node, shard, known)
        elif self._has_promised(node, shard):
            self.cluster.fail(
                f"{node.name} dropped shard {shard[:12]}, and had promised to keep it"
            )

    def _has_promised(self, node: SimulatedNode, shard: str) -> bool:
        """Whether somebody may still rely on a node's copy. No medium tells; who asks relies on it
        in ways in which nobody need be harmed by one that is broken."""
        background = node.node.background if node.node is not None else None
        if background is None:
            return False
        now_s = node.host.monotonic_s(self.cluster.kernel.now_s)
        return background._upkeep.trimmer._promises.promised(bytes.fromhex(shard), now_s)

    # Design 3: what garbage collection waits for.
    def _check_collected(self, node: SimulatedNode, shard: str, known: set[str]) -> None:
        grace_s = self.cluster.settings.gc_grace_s
        begun_s = self._check_grace(node, shard, f"collected shard {shard[:12]}")
        assert node.node is not None
        workers = node.node.members.roster.workers()
        # Who was forgotten in the middle of a pass still counted when it began.
        asked = [workers, self.remembered.get(node.name, workers)]
        found = [self._heard_since(node, others, begun_s + grace_s) for others in asked]
        if all(heard < needed for heard, needed in found):
            heard, needed = found[0]
            self.cluster.fail(
                f"{node.name} collected shard {shard[:12]}, and had heard of {heard} others after "
                f"its grace, not of {needed}"
            )
        if any(self.media.documents[each]["kind"] == "hologram" for each in known):
            self.cluster.fail(
                f"{node.name} collected shard {shard[:12]}, and has a document it cannot read"
            )

    def _check_grace(self, node: SimulatedNode, name: str, what: str) -> float:
        """What a node saw of a copy it has forgotten at its start. Returns when its grace began."""
        begun_s = max(node.started_s, node.disk.arrived_s.get(name, 0.0))
        since_s = self.cluster.kernel.now_s - begun_s
        if since_s < self.cluster.settings.gc_grace_s:
            self.cluster.fail(f"{node.name} {what} {since_s:.0f} s after it came")
        return begun_s

    def _heard_since(
        self, node: SimulatedNode, workers: Collection[str], moment_s: float
    ) -> tuple[int, int]:
        """How many other ones of these workers a node may have heard of after a moment, and how
        many half of them are."""
        others = set(workers) - {node.name}
        heard = 0
        for other in others:
            unheard_s = self.unheard_since_s.get((node.name, other))
            heard += unheard_s is None or unheard_s + _LAST_ANSWER_S >= moment_s
        return heard, max(1, (len(others) + 1) // 2)

    def note_topology(self) -> None:
        """To be called whenever machines or links came or went: who can hear of whom."""
        workers = self.cluster.workers
        blocked = self.cluster.network.blocked
        for node in workers:
            for other in workers:
                pair = node.name, other.name
                if (
                    other.running
                    and other.host.asleep_since_s is None
                    and not other.disk.fault
                    and pair not in blocked
                    and pair[::-1] not in blocked
                ):
                    self.unheard_since_s.pop(pair, None)
                else:
                    self.unheard_since_s.setdefault(pair, self.cluster.kernel.now_s)

    def may_damage(self, node: SimulatedNode, shards: Iterable[str]) -> bool:
        """Whether the guarantees survive the loss of these copies: we never destroy the last
        good one of a protected version, as that is not promised."""
        look = self.media.look()
        lost = set(shards)
        for version in self.live_protected():
            if not look.manifest_holders(version.id) - {node.name}:
                return False
            for shard in lost.intersection(version.shards):
                if not look.holders(shard) - {node.name}:
                    return False
        return True
