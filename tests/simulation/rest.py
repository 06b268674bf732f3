"""What must come about by itself, once nothing disturbs a cluster any more."""

from __future__ import annotations

from collections.abc import Iterator

from tests.simulation.cluster import SimulatedNode
from tests.simulation.guarantees import Look, Version
from tests.simulation.world import World


class Rest:
    """Says what a cluster has still to do."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._cluster = world.cluster
        self._media = world.guarantees.media

    def left_to_do(self) -> str:
        """One thing of what is not as it must become; "" when the cluster has come to rest."""
        return next(self._unsettled(), "")

    def _unsettled(self) -> Iterator[str]:
        for command in self._world.running:
            yield f"{command.process.name} still runs"
        for node in self._cluster.living:
            if not node.running:
                node.start()  # as its supervisor does
                yield f"{node.name} did not run"
        look = self._media.look()
        yield from self._different_catalogues(look)
        yield from self._wrong_answers(look)
        yield from self._missing_copies(look)
        yield from self._bad_copies()
        if not any(each["kind"] == "hologram" for each in self._media.documents.values()):
            # Else nothing is removed: what cannot be read may name any shard.
            yield from self._surplus_copies(look)
            yield from self._garbage(look)

    def _live(self, look: Look) -> list[Version]:
        """What is on some medium now: a version that was never protected may be lost."""
        known = set.union(*look.documents.values())
        lost = self._world.ledger.lost_documents - known
        dead = {key for key, found in self._media.tombstones.items() if found - lost}
        versions = self._media.versions
        return [v for key, v in versions.items() if key in known and key not in dead]

    def _different_catalogues(self, look: Look) -> Iterator[str]:
        """Everybody has every document; only manifests of dead versions may be gone."""
        droppable = self._media.versions.keys() & self._media.tombstones.keys()
        everything = set.union(*look.documents.values())
        for name, ids in look.documents.items():
            if lacks := everything - ids - droppable:
                yield f"{name} lacks {len(lacks)} documents"

    def _wrong_answers(self, look: Look) -> Iterator[str]:
        """What a catalogue answers follows from the documents alone."""
        live = {version.id for version in self._live(look)}
        for node in self._cluster.living:
            assert node.node is not None
            said = {version.id for version in node.node.records.catalogue.live_versions()}
            if said != live:
                wrong = sorted(version[:12] for version in said ^ live)
                yield f"{node.name} takes {', '.join(wrong)} for live or dead wrongly"

    def _takers(self) -> list[SimulatedNode]:
        """Workers on which copies are to be."""
        assert self._cluster.workers[0].node is not None
        roster = self._cluster.workers[0].node.records.catalogue.roster
        return [node for node in self._cluster.workers if not roster.is_draining(node.name)]

    def _missing_copies(self, look: Look) -> Iterator[str]:
        takers = {node.name for node in self._takers()}
        for version in self._world.guarantees.live_protected():
            wanted = min(version.copies, len(takers))
            counted = look.manifest_holders(version.id) & takers
            for shard in version.shards:
                if len(look.holders(shard, counted)) < wanted:
                    yield (
                        f"shard {shard[:12]} of {version.name}@{version.id[:12]} has copies on "
                        f"{sorted(look.holders(shard))}, and {wanted} of {sorted(takers)} should"
                    )

    def _bad_copies(self) -> Iterator[str]:
        for node in self._cluster.workers:
            if bad := self._media.bad_shards(node):
                yield f"{node.name} has not found {len(bad)} bad copies"

    def _surplus_copies(self, look: Look) -> Iterator[str]:
        takers = {node.name for node in self._takers()}
        wanted: dict[str, int] = {}
        for version in self._live(look):
            for shard in version.shards:
                wanted[shard] = max(wanted.get(shard, 0), version.copies)
        for shard, copies in wanted.items():
            holders = look.holders(shard, takers)
            if len(holders) > copies:
                yield f"shard {shard[:12]} has copies on {sorted(holders)}, and {copies} suffice"

    def _garbage(self, look: Look) -> Iterator[str]:
        """What no live version needs goes after the grace. Versions that retention dropped may
        have to wait for others."""
        media = self._media
        kept = {shard for version in self._live(look) for shard in version.shards}
        for key, tombstones in media.tombstones.items():
            if key in media.versions and all(
                media.documents[each]["reason"] == "retention" for each in tombstones
            ):
                kept.update(media.versions[key].shards)
        for node in self._cluster.workers:
            if garbage := look.shards[node.name] - kept:
                named = sorted(shard[:12] for shard in garbage)
                yield f"{node.name} keeps {', '.join(named)}, which no version needs"
