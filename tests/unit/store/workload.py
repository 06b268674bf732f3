"""What the fault tests let a store do, and what must be true of the store afterwards."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable

from ckptd.errors import NoRoom, StoreMarkerMissing
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.documents import DocumentFiles
from ckptd.store.filesystem import BLOCK_BYTES, FileSystem, aligned_buffer
from ckptd.store.marker import StoreDirectory, init_store, open_store
from ckptd.store.shards import ShardStore

STORE_ID = "0123456789abcdef" * 2
PIECE = BLOCK_BYTES


def shard(label: str, first_byte: int | None = None) -> bytes:
    """Some bytes without zeros; with `first_byte`, such that their digest begins with it."""
    for number in itertools.count():
        text = f"{label} {number} ".encode()
        data = (text * (3 * PIECE // len(text) + 1))[: 2 * PIECE + 500]
        if first_byte in (None, hashlib.sha256(data).digest()[0]):
            return data
    raise AssertionError


FIRST = shard("first", 0x5A)
SAME_DIRECTORY = shard("second", 0x5A)
LATER = shard("later", 0x5A)
OTHER_DIRECTORY = shard("other", 0xC3)
SHARDS = {"first": FIRST, "same": SAME_DIRECTORY, "other": OTHER_DIRECTORY, "later": LATER}
DOCUMENT = b'{"format":"example","order":1}'
DOCUMENT_ID = hashlib.sha256(DOCUMENT).hexdigest()
SIGNATURE = b"certificate and signature"


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def put_shard(store: ShardStore, data: bytes) -> None:
    """Receive one shard in pieces, as a connection does: whole blocks in an aligned buffer, and
    what is left."""
    incoming = store.begin(digest_of(data), len(data))
    buffer = aligned_buffer(PIECE)
    for start in range(0, len(data), PIECE):
        piece = data[start : start + PIECE]
        buffer[: len(piece)] = piece
        incoming.write(buffer[: len(piece)])
    incoming.commit()


def get_shard(store: ShardStore, digest: bytes) -> bytes:
    with store.open_read(digest) as reader:
        return reader.read(reader.size, 0)


def make_store(path: str, filesystem: FileSystem) -> StoreDirectory:
    """A new store, opened."""
    init_store(path, store_id=STORE_ID, filesystem=filesystem)
    return open_store(path, filesystem=filesystem)


def fill(directory: StoreDirectory, acknowledge: Callable[[str], None]) -> None:
    """Start on an opened store and write into it what the fault tests look for."""
    store = ShardStore(directory, reserve=0)
    documents = DocumentFiles(directory)
    put_shard(store, FIRST)
    acknowledge("first")
    documents.put(DOCUMENT_ID, DOCUMENT, SIGNATURE)
    acknowledge("document")
    for label in ("same", "other"):
        put_shard(store, SHARDS[label])
        acknowledge(label)
    if get_shard(store, digest_of(FIRST)) != FIRST:
        raise AssertionError("other bytes than those that were stored")


def whole_life(filesystem: FileSystem, path: str, acknowledge: Callable[[str], None]) -> None:
    """A store from nothing: made, opened, filled."""
    init_store(path, store_id=STORE_ID, filesystem=filesystem)
    acknowledge("init")
    with open_store(path, filesystem=filesystem) as directory:
        fill(directory, acknowledge)


def faults(filesystem: FileSystem, path: str, acknowledged: set[str]) -> list[str]:
    """What is wrong with the store at `path`, opened as after a restart: torn, lost or left over.

    Also writes into it, because a store that cannot go on is wrong, too.
    """
    try:
        directory = open_store(path, filesystem=filesystem)
    except StoreMarkerMissing as error:
        if acknowledged:
            return [f"the store is gone: {error}"]
        try:
            directory = make_store(path, filesystem)
        except StoreMarkerMissing as again:
            return [f"the marker is torn: {again}"]
    found = []
    with directory:
        store = ShardStore(directory, reserve=0)
        documents = DocumentFiles(directory)
        found += [
            f"{label} is lost" for label in acknowledged if not _is_here(label, store, documents)
        ]
        for digest in store.digests():
            if store.verify(digest, pause_s=0) is not VerifyResult.OK:
                found.append(f"shard {digest.hex()} is torn")
        for document_id in documents.ids():
            try:
                if documents.get(document_id) != (DOCUMENT, SIGNATURE):
                    found.append("the document has another signature")
            except Exception as error:
                found.append(f"the document is torn: {error}")
        if filesystem.list_directory(directory.incoming):
            found.append("a temporary file is left over")
        if store.ignored[0] or documents.ignored[0]:
            found.append(f"foreign names: {store.ignored} {documents.ignored}")
        put_shard(store, LATER)
        documents.put(DOCUMENT_ID, DOCUMENT, SIGNATURE)
        if get_shard(store, digest_of(LATER)) != LATER or len(documents) != 1:
            found.append("the store cannot go on")
    return found


def _is_here(label: str, store: ShardStore, documents: DocumentFiles) -> bool:
    if label == "init":
        return True
    if label == "document":
        return DOCUMENT_ID in documents
    data = SHARDS[label]
    return store.has(digest_of(data), len(data))


def fill_until_no_room(directory: StoreDirectory, *, reserve: int, shard_bytes: int) -> list[bytes]:
    """Store random shards until the store refuses; returns the digests of those it took.

    For a real small file system. Checks that all of them are whole and that documents still fit.
    """
    store = ShardStore(directory, reserve=reserve)
    taken: list[bytes] = []
    while True:
        data = os.urandom(shard_bytes)
        try:
            put_shard(store, data)
        except NoRoom:
            break
        taken.append(digest_of(data))
    assert directory.medium.failed is None
    assert all(store.verify(digest, pause_s=0) is VerifyResult.OK for digest in taken)
    assert directory.filesystem.list_directory(directory.incoming) == []
    DocumentFiles(directory).put(DOCUMENT_ID, DOCUMENT, SIGNATURE)
    return taken
