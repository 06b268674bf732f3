"""What people and trainers do: each act begins a command, and says what must come of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tests.simulation.faults import Faults
from tests.simulation.world import World

from ckptd.client import marks, node_marks
from ckptd.client.cluster import Cluster
from ckptd.client.progress import Progress
from ckptd.client.prune import prune
from ckptd.client.restore import restore
from ckptd.client.store import store
from ckptd.client.verification import verify
from ckptd.core import documents
from ckptd.errors import CkptdError, NoGoodCopy
from ckptd.wire import messages

NAMES: Final = ("a/step-1", "a/step-2", "a/step-3", "b/latest", "b/final", "c")
_SIZES: Final = (0, 7, 900, 5_000, 40_000, 66_000, 140_000)


class Commands:
    """Acts of people, as methods that can be drawn."""

    def __init__(self, world: World, faults: Faults) -> None:
        self.world = world
        self.faults = faults
        self.rng = world.rng
        self.cluster = world.cluster
        self.ledger = world.ledger
        self.guarantees = world.guarantees
        self.begin = world.begin

    def choices(self) -> list[Callable[[], None]]:
        return [
            *(4 * [self.store]), self.store_again, self.store_changing,
            self.store_while_a_node_dies, self.rot_while_off, *(2 * [self.restore]), self.remove,
            self.pin, self.unpin, self.undelete, self.verify, self.forge,
            self.prune, self.bring_news, self.drain, self.undrain, self.maintain, self.forget,
        ]  # fmt: skip

    def _content(self, name: str) -> dict[str, bytes]:
        """New content: mostly that of before, with some files changed."""
        before = self.ledger.contents.get(name, [{}])[-1]
        content = dict(before) if self.rng.random() < 0.7 else {}
        for number in range(self.rng.randint(1, 3)):
            path = f"{self.rng.choice(('', 'sub/'))}file{number}.bin"
            content[path] = self.rng.randbytes(self.rng.choice(_SIZES))
        return content

    def _write(self, content: dict[str, bytes]) -> Path:
        root = self.world.new_directory()
        root.mkdir()
        for path, data in content.items():
            place = root / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
        return root

    def store(self) -> None:
        name = self.rng.choice(NAMES)
        self._store_content(name, self._content(name))

    def store_again(self) -> None:
        """Content that was stored before, so that it is there already, or was removed."""
        name = self.rng.choice(NAMES)
        known = self.ledger.contents.get(name)
        if known:
            self._store_content(name, self.rng.choice(known))

    def _store_content(self, name: str, content: dict[str, bytes]) -> None:
        self.ledger.contents.setdefault(name, []).append(content)
        root = self._write(content)
        known = self._newest_that_is_reachable(name)
        before = set(self.guarantees.media.versions)

        began_s = self.world.now_s

        def done(result: Any) -> None:
            self.ledger.of_version[result.version] = content
            self._check_content(result.version, [content])
            if result.state == "protected":
                self.guarantees.check_announced(result.version, began_s)
            version = self.guarantees.media.versions.get(result.version)
            new = result.version not in before  # else it is the same content once more
            if version and known and version.order <= known[1] and new:
                self.world.fail(
                    f"{name}@{result.version[:12]} was stored after {known[0][:12]}, and its "
                    "order is not higher"
                )

        self.begin(f"store {name}", lambda cluster: store(cluster, root, name=name), done)

    def store_changing(self) -> None:
        """A trainer writes into two files while they are being stored."""
        name = self.rng.choice(NAMES)
        before = {path: self.rng.randbytes(200_000) for path in ("big.bin", "other.bin")}
        position = self.rng.randrange(200_000)
        after = {path: _changed(data, position) for path, data in before.items()}
        if self.rng.random() < 0.7:
            # Then nothing is sent, for which files are opened anew and seen to have changed.
            for content in (before, after):
                self._store_content(name, content)
                self.cluster.run(5.0)
        self.ledger.contents.setdefault(name, []).extend([before, after])
        root = self._write(before)
        time.sleep(0.006)  # so that the real file system gives the change a later time

        def change() -> None:
            for path, data in after.items():
                with open(root / path, "r+b") as file:
                    file.seek(position)
                    file.write(data[position:])

        began_s = self.world.now_s

        def done(result: Any) -> None:
            self._check_content(result.version, [before, after])
            if result.state == "protected":
                self.guarantees.check_announced(result.version, began_s)

        command = self.begin(f"store {name}", lambda cluster: store(cluster, root, name=name), done)
        command.process.at_read = (self.rng.randint(1, 10), change)

    def _check_content(self, version_id: str, known: list[dict[str, bytes]]) -> None:
        """What a new version says of its files is what was there at one moment."""
        self.guarantees.media.look()
        manifest = self.guarantees.media.documents.get(version_id)
        if manifest is None:
            return  # on no medium any more
        files = {e["path"]: e["sha256"] for e in manifest["entries"] if e["kind"] == "file"}
        hashes = [
            {path: hashlib.sha256(data).hexdigest() for path, data in content.items()}
            for content in known
        ]
        if files not in hashes:
            self.world.fail(f"{version_id[:12]} was stored with files as they never were")

    def store_while_a_node_dies(self) -> None:
        """A node dies at some call to its disk, comes back, and the same is stored again."""
        name = self.rng.choice(NAMES)
        content = self._content(name)
        node = self.rng.choice(self.cluster.workers)
        if not node.running:
            return
        power_cut = self.rng.random() < 0.5
        disk = node.disk
        call = self.rng.choice(("pwrite", "fsync", "rename", "rename", "fsync_directory"))
        disk.last_call = (call, self.rng.randint(1, 12))

        def die() -> None:
            self.world.note(f"{node.name} dies after a call of {call}")
            node.crash(power_cut=power_cut)

        disk.on_last_call = die
        self._store_content(name, content)
        self.cluster.run(self.rng.uniform(1.0, 5.0))
        disk.last_call = None
        node.start()
        self.cluster.run(self.rng.uniform(1.0, 20.0))
        self._store_content(self.rng.choice(NAMES), content)

    def rot_while_off(self) -> None:
        """A copy rots while its node is off; then the same content is stored once more."""
        live = [v for v in self.guarantees.live_protected() if v.id in self.ledger.of_version]
        if not live:
            return
        version = self.rng.choice(sorted(live, key=lambda version: version.id))
        look = self.guarantees.media.look()
        holders = [
            (node, shard)
            for node in self.cluster.workers
            for shard in version.shards
            if shard in look.shards[node.name] and node.host.asleep_since_s is None
        ]
        if not holders:
            return
        node, shard = self.rng.choice(holders)
        if not self.guarantees.may_damage(node, [shard]):
            return
        node.crash(power_cut=False)
        if shard not in self.guarantees.media.good_shards(node):
            return
        self.faults.damage(node, shard)
        self.cluster.run(1.0)
        node.start()
        self.cluster.run(self.rng.uniform(5.0, 30.0))
        self._store_content("copy/of-it", self.ledger.of_version[version.id])

    def _newest_that_is_reachable(self, name: str) -> tuple[str, int] | None:
        """The newest version of a name that every worker has, while all are in reach: what is
        stored from now on must come after it."""
        if self.cluster.network.blocked or not all(n.running for n in self.cluster.workers):
            return None
        look = self.guarantees.media.look()
        everywhere = set.intersection(*(look.documents[n.name] for n in self.cluster.workers))
        found = [
            (version.order, version.id)
            for version in self.guarantees.media.versions.values()
            if version.name == name and version.id in everywhere
        ]
        return (max(found)[1], max(found)[0]) if found else None

    def restore(self) -> None:
        name = self.rng.choice(NAMES)
        if name in self.ledger.contents:
            self.restore_version(name)

    def restore_version(self, selector: str, version_id: str | None = None) -> None:
        target = self.world.new_directory()
        name = selector.partition("@")[0]

        def done(result: Any) -> None:
            found = {
                str(path.relative_to(target)): path.read_bytes()
                for path in target.rglob("*")
                if path.is_file()
            }
            expected = self.ledger.of_version.get(result.version)
            known = [expected] if expected is not None else self.ledger.contents[name]
            if found not in known:
                self.world.fail(f"{selector} was restored with other bytes than were stored")
            shutil.rmtree(target, ignore_errors=True)

        def failed(error: CkptdError) -> None:
            self.guarantees.media.look()
            if version_id is not None and not self.guarantees.is_dead(version_id):
                self.world.fail(f"{selector} cannot be restored: {error.message}")
            elif isinstance(error, NoGoodCopy):
                self.world.note(f"no good copy is said of {selector}")

        self.begin(
            f"restore {selector}",
            lambda cluster: restore(cluster, selector, to=target),
            done,
            failed,
        )

    def _live_name(self) -> str | None:
        live = sorted({version.name for version in self.guarantees.live_protected()})
        return self.rng.choice(live) if live else None

    def remove(self) -> None:
        name = self._live_name()
        if name is None:
            return

        async def work(cluster: Cluster) -> None:
            catalogue = await cluster.catalogue()
            versions = await marks.select_for_removal(cluster, catalogue, [name])
            if self.rng.random() < 0.5:
                versions = versions[:1]
            self.ledger.removable.update(version.id for version in versions)
            await marks.remove(cluster, catalogue, versions)

        self.begin(f"rm {name}", work)

    def pin(self) -> None:
        name = self._live_name()
        if name is not None:
            self.begin(f"pin {name}", lambda cluster: marks.pin(cluster, name))

    def unpin(self) -> None:
        name = self._live_name()
        if name is not None:
            self.begin(f"unpin {name}", lambda cluster: marks.unpin(cluster, name))

    def undelete(self) -> None:
        removed = sorted(self.ledger.removable & self.guarantees.media.versions.keys())
        if not removed:
            return
        version = self.guarantees.media.versions[self.rng.choice(removed)]

        began_s = self.world.now_s

        def done(result: Any) -> None:
            content = self.ledger.of_version.get(version.id)
            if content is not None:
                self.ledger.of_version[result.version] = content
            if result.state == "protected":
                self.guarantees.check_announced(result.version, began_s, hashed=False)

        self.begin(
            f"undelete {version.name}",
            lambda cluster: marks.undelete(cluster, f"{version.name}@{version.id}"),
            done,
        )

    def verify(self) -> None:
        self.begin("verify all", lambda cluster: verify(cluster, [], progress=Progress()))

    def bring_news(self) -> None:
        """A person with a newer ckptd writes a document that this one cannot read."""
        if self.rng.random() < 0.85:
            return
        fields = {"kind": "hologram", "format": 7, "cluster": "home", "order": 5, "nonce": "a"}
        raw = json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()
        signed = messages.SignedDocument(raw, self.cluster.pki.signer("person").sign(raw))
        self.begin("news", lambda cluster: self._put(cluster, signed))

    async def _put(self, cluster: Cluster, signed: messages.SignedDocument) -> None:
        payload = messages.encode_documents((signed,))
        for node in cluster.workers:
            await node.control.request(
                messages.PutDocuments(1), messages.PutDocumentsReply, payload=payload
            )

    def prune(self) -> None:
        confirmed = self.rng.random() < 0.5
        self.begin("prune", lambda cluster: prune(cluster, dry_run=False, confirmed=confirmed))

    def drain(self) -> None:
        node = self.rng.choice(self.cluster.workers).name
        self.begin(f"drain {node}", lambda cluster: node_marks.drain(cluster, node))

    def undrain(self) -> None:
        node = self.rng.choice(self.cluster.workers).name
        self.begin(f"undrain {node}", lambda cluster: node_marks.undrain(cluster, node))

    def maintain(self) -> None:
        node = self.rng.choice(self.cluster.workers).name
        for_s = self.rng.choice((0.0, 60.0, 600.0, 3600.0))
        self.begin(f"maintenance {node}", lambda cluster: node_marks.maintain(cluster, node, for_s))

    def forget(self) -> None:
        """A machine dies for good, and somebody says so; once, as fewer nodes prove less."""
        lost = [node for node in self.cluster.nodes.values() if node.forgotten]
        if not lost:
            node = self.rng.choice(self.cluster.workers)
            enough = len(self.cluster.workers) > self.cluster.settings.copies + 1
            if not enough or not self.faults.loses(node):
                return
            node.crash(power_cut=True)
            node.forgotten = True
            lost = [node]
        name = lost[0].name

        async def work(cluster: Cluster) -> None:
            await node_marks.forget(cluster, await node_marks.consider_forgetting(cluster, name))

        self.begin(f"forget {name}", work)

    def forge(self) -> None:
        """A stolen worker brings documents that it may not write, and one that nobody signed."""
        worker = self.cluster.pki.signer("mallory")
        live = self.guarantees.live_protected()
        nonce = f"{self.rng.getrandbits(128):032x}"
        fields: dict[str, Any] = {
            "format": 1, "cluster": "home", "order": self.rng.randrange(1, 2**50),
            "created": "2026-01-01T00:00:00Z", "nonce": nonce,
        }  # fmt: skip
        versions = (self.rng.choice(live).id,) if live else ("0" * 64,)
        forged = [
            documents.encode(documents.Tombstone(**fields, reason="rm", versions=versions)),
            documents.encode(documents.Pin(**fields, version=versions[0])),
            json.dumps(
                {"kind": "hologram", **fields, "format": 7}, sort_keys=True, separators=(",", ":")
            ).encode(),
        ]
        raw = self.rng.choice(forged)
        envelope = worker.sign(raw)
        if raw is forged[-1] or self.rng.random() < 0.3:
            envelope = worker.sign(raw + b" ")  # of other bytes
        self.ledger.forged.add(documents.document_id(raw))
        signed = messages.SignedDocument(raw, envelope)
        self.begin("forge document", lambda cluster: self._put(cluster, signed))


def _changed(data: bytes, position: int) -> bytes:
    return data[:position] + bytes(byte ^ 255 for byte in data[position:])
