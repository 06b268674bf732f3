"""What is in the store, receiving, reading, room; from one thread and from many."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.model_disk import ModelDisk
from tests.unit.store.call_hooks import Hooked
from tests.unit.store.workload import (
    DOCUMENT,
    DOCUMENT_ID,
    FIRST,
    SAME_DIRECTORY,
    SIGNATURE,
    digest_of,
    get_shard,
    make_store,
    put_shard,
)

from ckptd.core import limits
from ckptd.errors import NoRoom, NotFound, Refused, ShardCorrupt
from ckptd.store import layout
from ckptd.store.filesystem import (
    BLOCK_BYTES,
    OPERATING_SYSTEM,
    OperatingSystem,
    Volume,
    aligned_buffer,
)
from ckptd.store.marker import StoreDirectory, open_store
from ckptd.store.shards import ShardStore


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StoreDirectory]:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as opened:
        yield opened


@pytest.fixture
def store(directory: StoreDirectory) -> ShardStore:
    return ShardStore(directory, reserve=0, clock=lambda: 1000.0)


def test_a_copy_is_one_file_named_by_its_hash(store: ShardStore, directory: StoreDirectory) -> None:
    put_shard(store, FIRST)
    digest = digest_of(FIRST)
    path = Path(directory.path, "shards", digest.hex()[:2], digest.hex())
    assert path.read_bytes() == FIRST
    assert str(path) == layout.shard_path(directory.path, digest)


def test_has_asks_for_the_right_size(store: ShardStore) -> None:
    put_shard(store, FIRST)
    digest = digest_of(FIRST)
    assert store.has(digest) and store.has(digest, len(FIRST))
    assert not store.has(digest, len(FIRST) - 1)
    assert not store.has(digest_of(SAME_DIRECTORY))
    assert store.size(digest) == len(FIRST)
    assert list(store.digests()) == [digest] and len(store) == 1


def test_the_time_of_a_touch_is_read_where_it_is_recorded(directory: StoreDirectory) -> None:
    """Read before the lock, it could be recorded after a later one, and a collection that ran in
    between would have been told an age that is too great."""
    held = []

    def clock() -> float:
        def is_locked() -> bool:
            free = locked._lock.acquire(blocking=False)
            if free:
                locked._lock.release()
            return not free

        with ThreadPoolExecutor(1) as other:
            held.append(other.submit(is_locked).result())
        return 1000.0

    locked = ShardStore(directory, reserve=0, clock=lambda: 1000.0)
    locked._clock = clock
    put_shard(locked, FIRST)
    locked.touch(digest_of(FIRST))
    locked.confirm([(digest_of(FIRST), len(FIRST))])
    assert held == [True, True, True]


def test_times_of_hash_and_touch(store: ShardStore, directory: StoreDirectory) -> None:
    put_shard(store, FIRST)
    digest = digest_of(FIRST)
    assert store.verified_at(digest) == 1000.0 and store.touched_at(digest) == 1000.0
    store._clock = lambda: 1234.0
    assert store.touch(digest) and store.touched_at(digest) == 1234.0
    assert not store.touch(digest_of(SAME_DIRECTORY))
    again = ShardStore(directory, reserve=0, clock=lambda: 2000.0)
    assert again.verified_at(digest) is None and again.touched_at(digest) == 2000.0
    assert again.verify(digest, pause_s=0) == "ok"
    assert again.verified_at(digest) == 2000.0


def test_a_reader_behind_the_writer_sees_what_is_written(store: ShardStore) -> None:
    incoming = store.begin(digest_of(FIRST), len(FIRST))
    with incoming.reader() as reader:
        incoming.write(FIRST[:700])
        assert incoming.written == 700 and incoming.wait_written(0, 0) == 700
        assert reader.read(5000, 0) == FIRST[:700]
        incoming.write(bytearray(FIRST[700:]))
        incoming.commit()
        assert incoming.ended and incoming.committed
        assert incoming.wait_written(len(FIRST), 60) == len(FIRST)  # returns: nothing more comes
        assert reader.read(len(FIRST), 600) == FIRST[600:]


def test_a_forwarder_in_another_thread_gets_all_bytes(store: ShardStore) -> None:
    data = os.urandom(3 << 20)
    incoming = store.begin(digest_of(data), len(data))
    received = bytearray()

    def forward() -> None:
        with incoming.reader() as reader:
            ready.set()
            while len(received) < len(data):
                written = incoming.wait_written(len(received), 30)
                received.extend(reader.read(written - len(received), len(received)))

    ready = threading.Event()
    thread = threading.Thread(target=forward)
    thread.start()
    assert ready.wait(30)
    for start in range(0, len(data), 1 << 16):
        incoming.write(memoryview(data)[start : start + (1 << 16)])
    incoming.commit()
    thread.join(30)
    assert received == data


def test_a_reader_outlives_an_abort(store: ShardStore, directory: StoreDirectory) -> None:
    incoming = store.begin(digest_of(FIRST), len(FIRST))
    incoming.write(FIRST)
    with incoming.reader() as reader:
        incoming.abort()
        incoming.abort()
        assert reader.read(len(FIRST), 0) == FIRST
    assert incoming.ended and not incoming.committed
    assert os.listdir(directory.incoming) == [] and not store.has(digest_of(FIRST))


@pytest.mark.parametrize("sent", [FIRST[:-1], FIRST[:-1] + b"?", FIRST + b"?", b""])
def test_other_bytes_than_announced_are_discarded(
    store: ShardStore, directory: StoreDirectory, sent: bytes
) -> None:
    incoming = store.begin(digest_of(FIRST), len(FIRST))
    with pytest.raises(ShardCorrupt) as caught:
        incoming.write(sent)
        incoming.commit()
    assert caught.value.shard == digest_of(FIRST).hex()
    assert not store.has(digest_of(FIRST)) and os.listdir(directory.incoming) == []
    assert store.counters.shards_discarded == 1 and store.quarantined() == []
    put_shard(store, FIRST)
    assert get_shard(store, digest_of(FIRST)) == FIRST


def test_the_announced_size_counts_also_where_the_hash_is_right(
    store: ShardStore, directory: StoreDirectory
) -> None:
    longer = store.begin(digest_of(FIRST), len(FIRST) + 1)
    longer.write(FIRST)
    with pytest.raises(ShardCorrupt):
        longer.commit()
    shorter = store.begin(digest_of(FIRST), len(FIRST) - 1)
    shorter.write(FIRST[:1])
    with pytest.raises(ShardCorrupt):  # before a byte is written for which no room was taken
        shorter.write(FIRST[1:])
    assert shorter.written == 1
    assert not store.has(digest_of(FIRST)) and os.listdir(directory.incoming) == []


def test_a_commit_cannot_be_repeated(store: ShardStore) -> None:
    incoming = store.begin(digest_of(FIRST), len(FIRST))
    incoming.write(FIRST)
    incoming.commit()
    incoming.abort()
    with pytest.raises(ValueError):
        incoming.commit()
    assert get_shard(store, digest_of(FIRST)) == FIRST


@pytest.mark.parametrize("size", [-1, limits.SHARD_SIZE_MAX_BYTES + 1, 2**63])
def test_absurd_sizes_are_refused(store: ShardStore, size: int) -> None:
    with pytest.raises(Refused):
        store.begin(digest_of(FIRST), size)


def test_what_is_not_here_cannot_be_read(store: ShardStore, directory: StoreDirectory) -> None:
    with pytest.raises(NotFound):
        store.open_read(digest_of(FIRST))
    put_shard(store, FIRST)
    os.unlink(layout.shard_path(directory.path, digest_of(FIRST)))
    with pytest.raises(NotFound):
        store.open_read(digest_of(FIRST))
    assert not store.has(digest_of(FIRST)), "a file that is gone counts no more"


def test_a_file_of_another_size_is_not_served(store: ShardStore, directory: StoreDirectory) -> None:
    put_shard(store, FIRST)
    os.truncate(layout.shard_path(directory.path, digest_of(FIRST)), 10)
    with pytest.raises(ShardCorrupt):
        store.open_read(digest_of(FIRST))
    again = ShardStore(directory, reserve=0)
    assert not again.has(digest_of(FIRST), len(FIRST)), "the scan records sizes"


def test_16_threads_write_equal_and_distinct_shards(
    store: ShardStore, directory: StoreDirectory
) -> None:
    shards = [os.urandom(20_000) for _ in range(40)]
    work = [data for data in shards for _ in range(4)]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(lambda data: put_shard(store, data), work))
    assert len(store) == len(shards)
    assert all(get_shard(store, digest_of(data)) == data for data in shards)
    assert os.listdir(directory.incoming) == [] and store.ignored == (0, [])
    assert store.counters.shards_written == len(work)
    assert store.room().bytes_used == sum(map(len, shards))
    assert sorted(ShardStore(directory, reserve=0).digests()) == sorted(map(digest_of, shards))


def test_a_shard_that_is_verified_while_it_is_replaced_stays(store: ShardStore) -> None:
    put_shard(store, FIRST)
    with ThreadPoolExecutor(8) as threads:
        writes = [threads.submit(put_shard, store, FIRST) for _ in range(30)]
        checks = [threads.submit(store.verify, digest_of(FIRST), pause_s=0) for _ in range(30)]
    assert all(write.exception() is None for write in writes)
    assert {check.result() for check in checks} == {"ok"}
    assert store.quarantined() == []


# The scan


def test_the_scan_finds_shards_and_reports_the_rest(
    store: ShardStore, directory: StoreDirectory
) -> None:
    put_shard(store, FIRST)
    name = digest_of(FIRST).hex()
    shards = Path(directory.path, "shards")
    (shards / "5a" / name.upper()).write_bytes(FIRST)
    (shards / "5a" / ("00" + name[2:])).write_bytes(FIRST)
    (shards / "5a" / f"{name}.tmp").write_bytes(FIRST)
    (shards / "5a" / ("5a" + "1" * 62)).symlink_to("/etc/passwd")
    (shards / "5a" / ("5a" + "2" * 62)).mkdir()
    (shards / "zz").mkdir()
    (shards / "note").write_text("by hand")
    again = ShardStore(directory, reserve=0)
    assert list(again.digests()) == [digest_of(FIRST)]
    count, names = again.ignored
    assert count == 7 and len(names) == 7 and f"shards/5a/{name}.tmp" in names


def test_the_report_of_foreign_names_is_bounded(directory: StoreDirectory) -> None:
    shards = Path(directory.path, "shards")
    for number in range(limits.STORE_IGNORED_NAMES_MAX + 5):
        (shards / f"foreign-{number}").touch()
    count, names = ShardStore(directory, reserve=0).ignored
    assert count == limits.STORE_IGNORED_NAMES_MAX + 5
    assert len(names) == limits.STORE_IGNORED_NAMES_MAX


def test_a_store_of_20000_shards_starts_in_two_seconds(directory: StoreDirectory) -> None:
    for first_byte in range(256):
        os.mkdir(layout.shard_directory(directory.path, bytes([first_byte])))
    for number in range(20_000):
        digest = hashlib.sha256(number.to_bytes(4, "big")).digest()
        path = layout.shard_path(directory.path, digest)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT))
    os.sync()
    started_cpu, started = time.process_time(), time.monotonic()
    store = ShardStore(directory, reserve=0)
    assert len(store) == 20_000
    # What other programs do meanwhile is not the store's time.
    taken_s = min(time.process_time() - started_cpu, time.monotonic() - started)
    shutil.rmtree(directory.path)  # pytest would keep so many files for three runs
    assert taken_s < 2.0


# Room


class SmallDisk(OperatingSystem):
    """The real file system, as if it were this small."""

    def __init__(self, total: int, free: int, *, can_allocate: bool = False) -> None:
        self.figures = Volume(total_bytes=total, free_bytes=free, block_bytes=4096)
        self.can_allocate = can_allocate

    def volume(self, path: str) -> Volume:
        return self.figures

    def fallocate(self, descriptor: int, size_bytes: int) -> bool:
        return self.can_allocate and super().fallocate(descriptor, size_bytes)


def small_store(tmp_path: Path, disk: SmallDisk, reserve: int | float) -> ShardStore:
    return ShardStore(make_store(str(tmp_path / "small"), disk), reserve=reserve)


@pytest.mark.parametrize("reserve", [50_000, 0.05])
def test_shards_leave_the_reserve_alone(tmp_path: Path, reserve: int | float) -> None:
    store = small_store(tmp_path, SmallDisk(1_000_000, 90_960), reserve)
    assert store.room().bytes_free == 40_960 and store.room().bytes_total == 1_000_000
    with pytest.raises(NoRoom) as caught:
        store.begin(digest_of(FIRST), 40_961)
    assert caught.value.next
    assert os.listdir(tmp_path / "small" / "incoming") == [], "refused before a byte was accepted"
    store.begin(digest_of(FIRST), 40_960).abort()


def test_room_that_was_promised_is_not_promised_again(tmp_path: Path) -> None:
    store = small_store(tmp_path, SmallDisk(1_000_000, 3 * 4096), 0)
    first = store.begin(digest_of(FIRST[:2500]), 2500)
    second = store.begin(digest_of(SAME_DIRECTORY), 2 * 4096)
    assert store.room().bytes_free == 0
    with pytest.raises(NoRoom):
        store.begin(digest_of(b"third"), 1)
    second.abort()
    assert store.room().bytes_free == 2 * 4096
    first.write(FIRST[:2500])
    first.commit()
    assert store.room().bytes_free == 3 * 4096, "what is written shows in the disk's own figures"


def test_room_that_the_disk_has_set_aside_is_not_counted_twice(tmp_path: Path) -> None:
    store = small_store(tmp_path, SmallDisk(1_000_000, 4096, can_allocate=True), 0)
    incoming = store.begin(digest_of(FIRST), 2500)
    allocated = os.stat(incoming._file.path)
    if allocated.st_blocks:
        assert store.room().bytes_free == 4096
    assert allocated.st_size == 0, "a reservation writes nothing"
    incoming.abort()


def test_documents_may_use_the_reserve(tmp_path: Path) -> None:
    from ckptd.store.documents import DocumentFiles

    disk = SmallDisk(1_000_000, 10_000)
    with make_store(str(tmp_path / "small"), disk) as directory:
        with pytest.raises(NoRoom):
            put_shard(ShardStore(directory, reserve=20_000), FIRST)
        documents = DocumentFiles(directory)
        documents.put(DOCUMENT_ID, DOCUMENT, SIGNATURE)
        assert documents.get(DOCUMENT_ID) == (DOCUMENT, SIGNATURE)


@pytest.mark.parametrize("reserve", [-1, 1.0, 1.5, -0.1])
def test_a_senseless_reserve_is_a_mistake(directory: StoreDirectory, reserve: int | float) -> None:
    with pytest.raises(ValueError):
        ShardStore(directory, reserve=reserve)


def test_nothing_is_written_to_reserve_room_where_the_disk_cannot_do_it() -> None:
    disk = ModelDisk(can_allocate=False)
    disk.mkdir("/disk")
    hooked = Hooked(disk)
    store = ShardStore(make_store("/disk/store", hooked.port), reserve=0)
    earlier = len(hooked.calls)
    incoming = store.begin(digest_of(FIRST), len(FIRST))
    names = [call.name for call in hooked.calls[earlier:]]
    assert "fallocate" in names and "pwrite" not in names
    incoming.write(FIRST)
    incoming.commit()
    assert get_shard(store, digest_of(FIRST)) == FIRST


def test_short_writes_are_completed() -> None:
    class ShortWrites(ModelDisk):
        def pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
            return super().pwrite(descriptor, data[:7], offset)

    disk = ShortWrites()
    disk.mkdir("/disk")
    with make_store("/disk/store", disk) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        assert get_shard(store, digest_of(FIRST)) == FIRST
    open_store("/disk/store", filesystem=disk).close()


@pytest.mark.parametrize("can_bypass", [True, False])
def test_a_reader_past_the_cache_reads_every_byte_whatever_is_asked(
    tmp_path: Path, can_bypass: bool
) -> None:
    class Disk(OperatingSystem):
        def bypass_cache(self, descriptor: int, on: bool) -> bool:
            return can_bypass and super().bypass_cache(descriptor, on)

    data = os.urandom(3 * BLOCK_BYTES + 77)
    with make_store(str(tmp_path / "store"), Disk()) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, data)
        buffer = aligned_buffer(2 * BLOCK_BYTES)
        with store.open_read(digest_of(data)) as reader:
            reader.bypass_cache()
            for offset in (0, 2 * BLOCK_BYTES, BLOCK_BYTES, 3 * BLOCK_BYTES, len(data)):
                count = reader.read_into(buffer, offset)
                assert bytes(buffer[:count]) == data[offset : offset + len(buffer)]
            assert reader.read(100, 5) == data[5:105], "odd offsets and sizes, too"
            assert reader.read_into(buffer, 0) == len(buffer)
            for offset, size in ((0, 100), (BLOCK_BYTES, 2 * BLOCK_BYTES), (3 * BLOCK_BYTES, 9999)):
                assert bytes(reader.piece(offset, size)) == data[offset : offset + size]
            with pytest.raises(ShardCorrupt):
                reader.piece(len(data), 1)
