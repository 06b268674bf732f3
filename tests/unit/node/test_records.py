"""Documents of a node: admitted one at a time, bounded for each worker, healed when damaged."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.node.running_nodes import RunningNode, identity

from ckptd.core import admission, documents, limits
from ckptd.core.signing import Signer
from ckptd.errors import DocumentRefused
from ckptd.node import records as records_module
from ckptd.node.peers import missing_ids
from ckptd.store.documents import DocumentFiles


def signer(node: RunningNode, name: str) -> Signer:
    return signer_of(node.pki, name)


def signer_of(pki: Path, name: str) -> Signer:
    files = identity(pki, name)
    return Signer.from_pem(files.cert.read_bytes(), files.key.read_bytes())


def member(order: int, *, name: str = "mallory", zone: str = "") -> bytes:
    return documents.encode(
        documents.Member(
            format=1,
            cluster="home",
            order=order,
            created="2026-01-01T00:00:00Z",
            node=name,
            roles=("worker",),
            address="127.0.0.1:1",
            bulk_port=1,
            zone=zone,
        )
    )


def test_a_worker_may_write_only_so_many_documents(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "WORKER_DOCUMENTS_MAX", 3)
    records, worker = node.node.records, signer(node, "mallory")
    for order in range(1, 4):
        records.write(member(order), worker)
    with pytest.raises(DocumentRefused, match="over 3"):
        records.write(member(9), worker)
    records.write(member(1), worker)  # known already: confirmed as it is
    records.write(member(10, name="pi1"), signer(node, "pi1"))


def test_a_full_catalogue_takes_no_more(node: RunningNode, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CATALOGUE_DOCUMENTS_MAX", len(node.node.records.catalogue))
    with pytest.raises(DocumentRefused, match="documents"):
        node.node.records.write(member(1), signer(node, "mallory"))


def test_a_long_document_of_a_worker_is_refused_before_it_is_parsed(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = b"x" * (limits.WORKER_DOCUMENT_MAX_BYTES + 1)
    parsed: list[object] = []
    monkeypatch.setattr(records_module, "admit", lambda *a, **k: parsed.append(a))
    with pytest.raises(DocumentRefused, match="over the limit"):
        node.node.records.put(memoryview(raw), signer(node, "mallory").sign(raw))
    assert not parsed


def test_one_document_is_parsed_at_a_time(
    node: RunningNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, worker = node.node.records, signer(node, "mallory")
    inside, most, lock = 0, 0, threading.Lock()
    original = admission.admit

    def admit(*arguments: object, **named: object) -> object:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        try:
            return original(*arguments, **named)  # type: ignore[arg-type]
        finally:
            with lock:
                inside -= 1

    monkeypatch.setattr(records_module, "admit", admit)
    threads = [
        threading.Thread(target=records.write, args=(member(order), worker))
        for order in range(1, 30)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(records.catalogue) == 30


def test_a_damaged_document_is_written_anew_when_it_is_brought_again(node: RunningNode) -> None:
    records, worker = node.node.records, signer(node, "mallory")
    raw = member(1)
    document_id = records.write(raw, worker)
    path = Path(node.store, "catalogue", f"{document_id}.json")
    path.write_bytes(b"\0" * len(raw))
    assert records.get(document_id) is None
    assert records.write(raw, worker) == document_id
    assert path.read_bytes() == raw


def test_a_damaged_document_is_no_longer_among_those_that_others_need_not_bring(
    node: RunningNode,
) -> None:
    records, worker = node.node.records, signer(node, "mallory")
    whole = records.packed_ids()
    raw = member(1)
    document_id = records.write(raw, worker)
    with_it = (records.packed_ids(), records.digest())
    Path(node.store, "catalogue", f"{document_id}.json").write_bytes(b"rot")
    for _ in range(2):  # once it is bad, from then on it is gone
        assert records.get(document_id) is None
        assert records.packed_ids() == whole
        assert records.digest() == hashlib.sha256(whole).digest()
    records.write(raw, worker)
    assert (records.packed_ids(), records.digest()) == with_it
    assert records.get(document_id) is not None


def test_a_document_that_cannot_be_opened_is_written_anew_when_it_is_brought_again(
    node: RunningNode,
) -> None:
    records, worker = node.node.records, signer(node, "mallory")
    raw = member(1)
    document_id = records.write(raw, worker)
    path = Path(node.store, "catalogue", f"{document_id}.json")
    path.unlink()
    path.symlink_to(node.store)
    assert records.get(document_id) is None
    assert node.worker.shards.room().bytes_total  # that says nothing of the disk
    path.unlink()
    records.write(raw, worker)
    assert path.read_bytes() == raw and records.get(document_id) is not None


def test_a_document_with_a_bad_signature_is_written_anew_when_it_is_brought_again(
    node: RunningNode,
) -> None:
    records, worker = node.node.records, signer(node, "mallory")
    raw = member(1)
    document_id = records.write(raw, worker)
    path = Path(node.store, "catalogue", f"{document_id}.sig")
    good = path.read_bytes()
    path.write_bytes(worker.sign(b"something else"))

    def restarted() -> records_module.Records:
        files = DocumentFiles(node.worker.shards._directory)  # as after a restart
        found = records_module.Records(files, cluster="home", ca=records._ca, shards=None)
        found.load()
        return found

    after = restarted()
    assert after.unreadable == {document_id} and document_id not in after.catalogue
    after.put(raw, good)
    assert path.read_bytes() == good and not after.unreadable
    assert document_id in restarted().catalogue


@pytest.mark.parametrize("fault", ["", "document", "signature"])
def test_a_document_that_was_read_wrong_is_read_again_and_comes_back(
    node: RunningNode, fault: str
) -> None:
    records, worker = node.node.records, signer(node, "mallory")
    raw = member(1)
    document_id = records.write(raw, worker)
    path = Path(node.store, "catalogue", f"{document_id}.json")
    path.write_bytes(b"as it was read")
    assert records.get(document_id) is None and records.lost() == {document_id}
    assert records.look_aside() == 0, "it still reads wrong"
    aside = Path(node.store, "quarantine")
    if fault != "document":
        (aside / f"{document_id}.json.0").write_bytes(raw)
    if fault == "signature":
        (aside / f"{document_id}.sig.0").write_bytes(worker.sign(b"something else"))
    assert records.look_aside() == (0 if fault else 1)
    assert records.lost() == ({document_id} if fault else set())
    assert (records.get(document_id) is None) == bool(fault)
    assert path.exists() != bool(fault)


def test_what_cannot_be_read_and_is_dead_leaves_no_doubt(node: RunningNode) -> None:
    """Nobody brings it again: where it was whole it is dropped in the end."""
    records, lost = node.node.records, "ab" * 32
    records.unreadable |= {lost, "cd" * 32}
    assert records.doubt().startswith("2 documents cannot be read")
    removal = documents.Tombstone(
        format=1,
        cluster="home",
        order=2,
        created="2026-01-02T03:04:05Z",
        nonce="0" * 32,
        reason="rm",
        versions=(lost,),
    )
    records.write(documents.encode(removal), signer(node, "client"))
    assert records.doubt().startswith("1 documents cannot be read")
    records.unreadable.discard("cd" * 32)
    assert records.doubt() == ""


IDS = st.frozensets(st.binary(min_size=32, max_size=32), max_size=12)


@given(IDS, IDS, IDS)
def test_what_each_side_lacks(
    common: frozenset[bytes], a: frozenset[bytes], b: frozenset[bytes]
) -> None:
    ours, theirs = common | a, common | b
    packed = [b"".join(sorted(ids)) for ids in (ours, theirs)]
    here, there = missing_ids(packed[0], memoryview(packed[1]), 100)
    assert (here, there) == (sorted(theirs - ours), sorted(ours - theirs))
    here, there = missing_ids(packed[0], memoryview(packed[1]), 2)
    assert (here, there) == (sorted(theirs - ours)[:2], sorted(ours - theirs)[:2])
