"""Documents that a client writes: their order, who takes them, and lies of nodes about others."""

from __future__ import annotations

import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from msgspec import structs
from tests.cluster.kill_fixtures import BreakableCluster, make_checkpoint, tree, wait_until

from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.documents import confirm, next_order, publish, refusals, stored_on
from ckptd.client.marks import pin, select_for_removal
from ckptd.client.store import store
from ckptd.config import Config, TlsConfig, load
from ckptd.core import documents
from ckptd.core.catalogue import Catalogue
from ckptd.errors import NotAuthorized, NotEnoughNodes, NotFound
from ckptd.net.loop import run as run_on_loop
from ckptd.wire.messages import PutDocumentResult, PutDocuments, PutDocumentsReply

T = TypeVar("T")
NewName = Callable[[], str]
FAR_FUTURE = 2**55


def on(config: Config | BreakableCluster, work: Callable[[Cluster], Awaitable[T]]) -> T:
    """Runs `work` on a connection to the cluster."""
    settings = load(config.config) if isinstance(config, BreakableCluster) else config

    async def connected() -> T:
        async with connect(settings) as cluster:
            return await work(cluster)

    return run_on_loop(connected())


def test_an_order_is_above_all_signed_ones_and_not_below_the_clock(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "a", name, size=4096), name)

    async def work(connected: Cluster) -> None:
        catalogue = await connected.catalogue()
        manifest = await connected.manifest(stored.version)
        assert await next_order(connected, catalogue, FAR_FUTURE) == FAR_FUTURE
        assert await next_order(connected, catalogue, 0) > manifest.order
        # A clock that ran ahead: what was written then stays below what is written now.
        ahead = structs.replace(manifest, order=manifest.order + 10**9, nonce="0" * 32)
        assert len(stored_on(await publish(connected, documents.encode(ahead)))) == 4
        again = await connected.catalogue()
        assert await next_order(connected, again, manifest.order) == ahead.order + 1

    on(cluster, work)


def test_claims_that_nobody_can_prove_do_not_move_the_order(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "a", name, size=4096), name)

    async def work(connected: Cluster) -> None:
        known = await connected.catalogue()
        header = known.version(stored.version)
        assert header is not None
        catalogue = Catalogue(connected.cluster)
        catalogue.add_unverified(structs.replace(header, id="f" * 64, order=FAR_FUTURE))
        catalogue.add_unverified(structs.replace(header, order=FAR_FUTURE + 1))
        order = await next_order(connected, catalogue, header.order + 5)
        assert order == header.order + 5
        assert catalogue.version("f" * 64) is None, "no node can show it"
        assert catalogue.version(stored.version) == header, "now it is what the document says"

    on(cluster, work)


def test_a_node_that_lies_about_a_name_makes_nobody_remove_or_pin_another_checkpoint(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name, decoy = new_name(), new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "a", name, size=4096), name)

    async def work(connected: Cluster) -> None:
        known = await connected.catalogue()
        header = known.version(stored.version)
        assert header is not None

        def told() -> Catalogue:
            """What a client knows after a node told it of the version under another name."""
            catalogue = Catalogue(connected.cluster)
            catalogue.add_unverified(structs.replace(header, name=decoy))
            return catalogue

        with pytest.raises(NotFound, match="under that name"):
            await select_for_removal(connected, told(), [decoy])
        catalogue = told()
        assert [v.name for v in await confirm(connected, catalogue, [header])] == [name]
        assert catalogue.newest(decoy) is None
        assert await select_for_removal(connected, known, [name]) == [header]

    on(cluster, work)


@pytest.mark.parametrize("lie", ["name", "content", "order"])
def test_a_node_that_lies_about_a_version_makes_nobody_take_it_for_a_new_one(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path, lie: str
) -> None:
    """Else what was to be stored would be said to be protected, and be nowhere."""
    name = new_name()
    other = new_name() if lie == "name" else name
    source = make_checkpoint(tmp_path / "a", name, size=4096)
    wanted, old = source, None
    if lie == "order":  # what is old is told of as the newest
        old = cluster.store(source, name)
        wanted = Path(shutil.copytree(source, tmp_path / "b"))
        (source / "trainer_state.json").write_text("{}")
    if lie == "content":  # the same shards, under another file name
        wanted = Path(shutil.copytree(source, tmp_path / "b"))
        (wanted / "optimizer.pt").rename(wanted / "optimizer.bin")
    stored = cluster.store(source, name)
    known = cluster.store(wanted, new_name())

    async def work(connected: Cluster) -> str:
        catalogue = await connected.catalogue()
        header, right = (catalogue.version(each.version) for each in (stored, known))
        assert header is not None and right is not None
        told = Catalogue(connected.cluster)
        lied_about = header
        if old is not None:
            told.add_unverified(header)
            lied_about = catalogue.version(old.version) or header
        false = structs.replace(
            lied_about,
            name=other,
            content_id=right.content_id,
            order=FAR_FUTURE if lie == "order" else header.order,
        )
        told.add_unverified(false)

        async def lying() -> Catalogue:
            return told

        connected.catalogue = lying  # type: ignore[method-assign,assignment]
        return (await store(connected, wanted, name=other)).version

    version = on(cluster, work)
    assert version not in (stored.version, old.version if old is not None else "")
    out = tmp_path / "out"
    assert cluster.command("restore", f"{other}@{version}", "--to", out).code == 0
    assert tree(out) == tree(wanted)


def test_who_may_not_write_a_document_is_told_before_anything_is_sent(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "a", name, size=4096), name)
    settings = load(cluster.config)
    pki = cluster.directory / "pki"
    worker = structs.replace(
        settings, tls=TlsConfig(pki / "ca.pem", pki / "node1.pem", pki / "node1.key")
    )

    async def work(connected: Cluster) -> None:
        with pytest.raises(NotAuthorized, match="may not write this pin document") as caught:
            await pin(connected, name)
        assert caught.value.next.startswith("ckptd pki issue client")
        assert len(connected.workers) == 4

    on(worker, work)

    async def unpinned(connected: Cluster) -> bool:
        return not (await connected.catalogue()).pins(stored.version)

    assert on(settings, unpinned)


def test_a_node_that_confirms_another_document_does_not_count(
    cluster: BreakableCluster, new_name: NewName, tmp_path: Path
) -> None:
    name = new_name()
    stored = cluster.store(make_checkpoint(tmp_path / "a", name, size=4096), name)

    async def work(connected: Cluster) -> None:
        liar = connected.workers[0]
        request = liar.control.request

        async def lie(message: PutDocuments, answer: object, **named: bytes) -> object:
            reply, payload = await request(message, PutDocumentsReply, **named)  # type: ignore[arg-type]
            return structs.replace(reply, results=(PutDocumentResult(bytes(32)),)), payload

        manifest = await connected.manifest(stored.version)
        liar.control.request = lie  # type: ignore[assignment,method-assign]
        raw = documents.encode(structs.replace(manifest, nonce="1" * 32))
        assert liar.id not in stored_on(await publish(connected, raw))
        assert liar.id in connected.absent

    on(cluster, work)


def test_nobody_who_takes_a_document_is_an_error_with_reasons() -> None:
    assert isinstance(refusals({}, "a" * 64), NotEnoughNodes)
    refused = refusals({"n1": PutDocumentResult(bytes(32), refused="no room")}, "a" * 64)
    assert (refused.exit_code, refused.next) == (1, "ckptd doctor")
    assert "n1: no room" in refused.message
    assert stored_on({"n1": PutDocumentResult(bytes(32), refused="no room")}) == []


def test_rotten_manifests_hide_nothing_else_and_are_brought_back_while_the_nodes_run(
    fresh_cluster: BreakableCluster, tmp_path: Path
) -> None:
    kept, rotten = make_checkpoint(tmp_path / "a", "kept"), make_checkpoint(tmp_path / "b", "rot")
    fresh_cluster.store(kept, "kept")
    version = fresh_cluster.store(rotten, "rotten").version
    files = [
        fresh_cluster.store_path(f"node{n}") / "catalogue" / f"{version}.json" for n in range(1, 5)
    ]
    good = files[0].read_bytes()
    for file in files[:3]:
        file.write_bytes(b"rot")
    # Whoever asks finds it out; the node with the last good one brings it to the others.
    assert fresh_cluster.comes_back("rotten", rotten)
    wait_until(
        lambda: all(file.exists() and file.read_bytes() == good for file in files), "healing"
    )
    assert fresh_cluster.command("ls", "rotten").document["checkpoints"][0]["state"] == "protected"
    for file in files:
        file.write_bytes(b"rot")
    lost = fresh_cluster.command("restore", "rotten", "--to", tmp_path / "none")
    assert lost.code == 4 and lost.document["error"]["kind"] == "no_good_copy"
    assert fresh_cluster.command("verify", "--all").document["unrecoverable"] == [
        f"rotten@{version}"
    ]
    assert fresh_cluster.comes_back("kept", kept)
    assert fresh_cluster.store(rotten, "rotten").state == "protected"
    assert fresh_cluster.comes_back("rotten", rotten)
