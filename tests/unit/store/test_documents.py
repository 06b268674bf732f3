"""Documents as files: exact bytes, never trusted when they do not have their hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.unit.store.workload import DOCUMENT, DOCUMENT_ID, SIGNATURE, digest_of, make_store

from ckptd.core import limits
from ckptd.errors import DocumentRefused, IntegrityError, NotFound
from ckptd.store.documents import DocumentFiles
from ckptd.store.filesystem import OPERATING_SYSTEM
from ckptd.store.marker import StoreDirectory


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StoreDirectory]:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as opened:
        yield opened


@pytest.fixture
def catalogue(directory: StoreDirectory) -> Path:
    return Path(directory.path, "catalogue")


def put(documents: DocumentFiles, document: bytes) -> str:
    document_id = digest_of(document).hex()
    documents.put(document_id, document, SIGNATURE)
    return document_id


def test_a_document_is_two_files_with_exactly_its_bytes(
    directory: StoreDirectory, catalogue: Path
) -> None:
    put(DocumentFiles(directory), DOCUMENT)
    assert (catalogue / f"{DOCUMENT_ID}.json").read_bytes() == DOCUMENT
    assert (catalogue / f"{DOCUMENT_ID}.sig").read_bytes() == SIGNATURE
    assert len(os.listdir(catalogue)) == 2 and os.listdir(directory.incoming) == []


def test_documents_are_found_again(directory: StoreDirectory) -> None:
    documents = DocumentFiles(directory)
    ids = sorted(put(documents, f"{{{number}}}".encode()) for number in range(20))
    again = DocumentFiles(directory)
    assert again.ids() == ids and len(again) == 20
    assert [document_id for document_id, _, _ in again] == ids
    assert all(digest_of(document).hex() == name for name, document, _ in again)
    assert ids[0] in again and "0" * 64 not in again and "../etc" not in again


def test_the_first_signature_stays(directory: StoreDirectory) -> None:
    documents = DocumentFiles(directory)
    put(documents, DOCUMENT)
    documents.put(DOCUMENT_ID, DOCUMENT, b"another")
    assert documents.get(DOCUMENT_ID) == (DOCUMENT, SIGNATURE)


def test_bytes_that_are_not_the_document_are_refused(
    directory: StoreDirectory, catalogue: Path
) -> None:
    documents = DocumentFiles(directory)
    with pytest.raises(IntegrityError):
        documents.put(DOCUMENT_ID, DOCUMENT + b" ", SIGNATURE)
    with pytest.raises(IntegrityError):
        documents.put("../../escape", DOCUMENT, SIGNATURE)
    with pytest.raises(DocumentRefused):
        documents.put(DOCUMENT_ID, bytes(limits.DOCUMENT_MAX_BYTES + 1), SIGNATURE)
    with pytest.raises(DocumentRefused):
        documents.put(DOCUMENT_ID, DOCUMENT, bytes(limits.SIGNATURE_ENVELOPE_MAX_BYTES + 1))
    assert os.listdir(catalogue) == [] and documents.ids() == []


def test_what_is_not_here_is_not_found(directory: StoreDirectory) -> None:
    for document_id in (DOCUMENT_ID, "../marker", ""):
        with pytest.raises(NotFound):
            DocumentFiles(directory).get(document_id)


def changed(catalogue: Path) -> None:
    (catalogue / f"{DOCUMENT_ID}.json").write_bytes(DOCUMENT.replace(b"1", b"2"))


def cut(catalogue: Path) -> None:
    os.truncate(catalogue / f"{DOCUMENT_ID}.json", 5)


def huge(catalogue: Path) -> None:
    os.truncate(catalogue / f"{DOCUMENT_ID}.json", 1 << 40)


def without_signature(catalogue: Path) -> None:
    (catalogue / f"{DOCUMENT_ID}.sig").unlink()


def huge_signature(catalogue: Path) -> None:
    os.truncate(catalogue / f"{DOCUMENT_ID}.sig", 1 << 40)


@pytest.mark.parametrize("damage", [changed, cut, huge, without_signature, huge_signature])
def test_a_damaged_document_goes_to_quarantine_and_can_come_back(
    directory: StoreDirectory, catalogue: Path, damage: Callable[[Path], None]
) -> None:
    put(DocumentFiles(directory), DOCUMENT)
    damage(catalogue)
    documents = DocumentFiles(directory)
    with pytest.raises(IntegrityError) as caught:
        documents.get(DOCUMENT_ID)
    assert DOCUMENT_ID in caught.value.message
    assert DOCUMENT_ID not in documents and os.listdir(catalogue) == []
    kept = directory.quarantine.files()
    assert {bad.id for bad in kept} == {DOCUMENT_ID} and ".json" in {bad.suffix for bad in kept}
    with pytest.raises(NotFound):
        documents.get(DOCUMENT_ID)
    put(documents, DOCUMENT)
    assert documents.get(DOCUMENT_ID) == (DOCUMENT, SIGNATURE)


def test_one_bad_document_does_not_hide_the_others(
    directory: StoreDirectory, catalogue: Path
) -> None:
    documents = DocumentFiles(directory)
    other = put(documents, b"{}")
    put(documents, DOCUMENT)
    changed(catalogue)
    read = []
    for document_id in documents.ids():
        try:
            read.append((document_id, documents.get(document_id)))
        except IntegrityError:
            assert document_id == DOCUMENT_ID
    assert read == [(other, (b"{}", SIGNATURE))]


def test_a_document_whose_signature_does_not_hold_can_be_set_aside(
    directory: StoreDirectory, catalogue: Path
) -> None:
    documents = DocumentFiles(directory)
    put(documents, DOCUMENT)
    documents.quarantine(DOCUMENT_ID)
    assert [bad.suffix for bad in directory.quarantine.files()] == [".json", ".sig"]
    assert os.listdir(catalogue) == [] and DOCUMENT_ID not in documents


def test_foreign_names_are_reported_and_left_alone(
    directory: StoreDirectory, catalogue: Path
) -> None:
    for name in ("notes.txt", "A" * 64 + ".json", "1" * 63 + ".json", "1" * 64 + ".json.tmp"):
        (catalogue / name).write_text("by hand")
    (catalogue / ("2" * 64 + ".json")).mkdir()
    documents = DocumentFiles(directory)
    count, names = documents.ignored
    assert count == 5 and "catalogue/notes.txt" in names and documents.ids() == []
    assert len(os.listdir(catalogue)) == 5


def test_a_signature_without_a_document_is_cleared_away(
    directory: StoreDirectory, catalogue: Path
) -> None:
    (catalogue / f"{DOCUMENT_ID}.sig").write_bytes(b"old")
    assert DocumentFiles(directory).ids() == [] and os.listdir(catalogue) == []


def test_a_signature_whose_document_was_moved_to_quarantine_follows_it(
    directory: StoreDirectory, catalogue: Path
) -> None:
    """The process died between the two: without it the document could never come back."""
    put(DocumentFiles(directory), DOCUMENT)
    aside = Path(directory.path, "quarantine")
    os.rename(catalogue / f"{DOCUMENT_ID}.json", aside / f"{DOCUMENT_ID}.json.0")
    documents = DocumentFiles(directory)
    assert os.listdir(catalogue) == [] and documents.lost() == {DOCUMENT_ID}
    assert documents.set_aside(DOCUMENT_ID) == (DOCUMENT, [SIGNATURE])


def test_many_threads_put_and_get(directory: StoreDirectory) -> None:
    documents = DocumentFiles(directory)
    texts = [f'{{"number":{number}}}'.encode() for number in range(10)] * 4
    with ThreadPoolExecutor(16) as threads:
        ids = set(threads.map(lambda text: put(documents, text), texts))
        assert {digest_of(documents.get(each)[0]).hex() for each in ids} == ids
    assert len(ids) == 10 and os.listdir(directory.incoming) == []
