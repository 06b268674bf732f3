"""Another directory lies where the store was, as below a mount point whose disk was unmounted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptd.errors import IntegrityError, MediumFailed, NotFound, StoreOperationFailed
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.documents import DocumentFiles
from ckptd.store.marker import StoreDirectory, init_store, open_store
from ckptd.store.shards import ShardStore

CONTENT = b"shard" * 1000
DIGEST = hashlib.sha256(CONTENT).digest()
DOCUMENT = b'{"a":1}'
DOCUMENT_ID = hashlib.sha256(DOCUMENT).hexdigest()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StoreDirectory]:
    init_store(str(tmp_path / "store"), store_id="0" * 32)
    with open_store(str(tmp_path / "store")) as opened:
        yield opened


@pytest.fixture
def shards(directory: StoreDirectory) -> ShardStore:
    store = ShardStore(directory, reserve=0)
    incoming = store.begin(DIGEST, len(CONTENT))
    incoming.write(CONTENT)
    incoming.commit()
    return store


@pytest.fixture
def documents(directory: StoreDirectory) -> DocumentFiles:
    files = DocumentFiles(directory)
    files.put(DOCUMENT_ID, DOCUMENT, b"signature")
    return files


def unmount(directory: StoreDirectory) -> Path:
    """Puts an empty directory in the store's place; returns it."""
    place = Path(directory.path)
    place.rename(place.with_name("elsewhere"))
    place.mkdir()
    return place


def test_a_shard_is_not_written_below_the_mount_point(
    directory: StoreDirectory, shards: ShardStore
) -> None:
    place = unmount(directory)
    with pytest.raises(MediumFailed):
        shards.begin(DIGEST, len(CONTENT))
    assert list(place.iterdir()) == []


def test_a_shard_under_way_is_not_acknowledged(
    directory: StoreDirectory, shards: ShardStore
) -> None:
    incoming = shards.begin(DIGEST, len(CONTENT))
    incoming.write(CONTENT)
    unmount(directory)
    with pytest.raises(MediumFailed):
        incoming.commit()
    assert not incoming.committed


def test_a_shard_is_not_said_to_be_gone(directory: StoreDirectory, shards: ShardStore) -> None:
    unmount(directory)
    with pytest.raises(MediumFailed):
        shards.open_read(DIGEST)
    with pytest.raises(MediumFailed):
        shards.has(DIGEST)


def test_a_verification_does_not_forget_the_shard(
    directory: StoreDirectory, shards: ShardStore
) -> None:
    unmount(directory)
    with pytest.raises(MediumFailed):
        shards.verify(DIGEST)


def test_a_document_is_not_said_to_be_corrupt(
    directory: StoreDirectory, documents: DocumentFiles
) -> None:
    unmount(directory)
    with pytest.raises(MediumFailed):
        documents.get(DOCUMENT_ID)


def test_a_file_that_is_missing_in_a_mounted_store_fails_no_disk(
    directory: StoreDirectory, shards: ShardStore, documents: DocumentFiles
) -> None:
    store = Path(directory.path)
    (store / "shards" / DIGEST.hex()[:2] / DIGEST.hex()).unlink()
    (store / "catalogue" / f"{DOCUMENT_ID}.json").unlink()

    assert shards.verify(DIGEST) is VerifyResult.MISSING
    with pytest.raises(NotFound):
        shards.open_read(DIGEST)
    with pytest.raises(IntegrityError):
        documents.get(DOCUMENT_ID)

    assert directory.medium.failed is None


def test_a_missing_path_before_the_store_is_known_is_no_failed_disk(tmp_path: Path) -> None:
    with pytest.raises(StoreOperationFailed):
        init_store(str(tmp_path / "nowhere" / "store"), store_id="0" * 32)
