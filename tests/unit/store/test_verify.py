"""Bad copies are never reported ok, never served, and set aside without being deleted."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.unit.store.call_hooks import Call, Hooked
from tests.unit.store.workload import (
    FIRST,
    SAME_DIRECTORY,
    digest_of,
    get_shard,
    make_store,
    put_shard,
)

from ckptd.errors import MediumFailed, NotFound
from ckptd.store import layout
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.filesystem import OPERATING_SYSTEM, OperatingSystem
from ckptd.store.marker import StoreDirectory, open_store
from ckptd.store.shards import ShardStore

DIGEST = digest_of(FIRST)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[StoreDirectory]:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as opened:
        store = ShardStore(opened, reserve=0)
        put_shard(store, FIRST)
        put_shard(store, SAME_DIRECTORY)
        yield opened


def truncated(path: Path) -> None:
    os.truncate(path, len(FIRST) // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def zeroed(path: Path) -> None:
    path.write_bytes(bytes(len(FIRST)))


def bit_flipped(path: Path) -> None:
    path.write_bytes(FIRST[:-1] + bytes([FIRST[-1] ^ 1]))


def grown(path: Path) -> None:
    path.write_bytes(FIRST + b"\0")


def swapped(path: Path) -> None:
    path.write_bytes(SAME_DIRECTORY)


def huge(path: Path) -> None:
    os.truncate(path, 1 << 40)


DAMAGES = [truncated, emptied, zeroed, bit_flipped, grown, swapped, huge]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_a_damaged_copy_goes_to_quarantine(
    directory: StoreDirectory, damage: Callable[[Path], None], restarted: bool
) -> None:
    path = Path(layout.shard_path(directory.path, DIGEST))
    store = ShardStore(directory, reserve=0)
    damage(path)
    if restarted:
        store = ShardStore(directory, reserve=0)
    size = path.stat().st_size
    used = store.room().bytes_used
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT
    assert not store.has(DIGEST)
    with pytest.raises(NotFound):
        store.open_read(DIGEST)
    (bad,) = store.quarantined()
    assert (bad.id, bad.suffix, bad.size_bytes) == (DIGEST.hex(), "", size)
    assert Path(bad.path) == Path(directory.path, "quarantine", f"{DIGEST.hex()}.0")
    assert os.stat(bad.path).st_size == size and not path.exists()
    assert store.counters.shards_corrupt == 1
    assert abs(store.room().bytes_used - used) <= abs(size - len(FIRST)), "it still takes room"
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.MISSING
    assert store.verify(digest_of(SAME_DIRECTORY), pause_s=0) is VerifyResult.OK


def test_quarantine_survives_a_restart_and_keeps_every_bad_copy(directory: StoreDirectory) -> None:
    store = ShardStore(directory, reserve=0)
    path = Path(layout.shard_path(directory.path, DIGEST))
    for _ in range(3):
        put_shard(store, FIRST)
        bit_flipped(path)
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT
    put_shard(store, FIRST)
    assert get_shard(store, DIGEST) == FIRST
    directory.close()
    with open_store(directory.path) as again:
        names = [os.path.basename(bad.path) for bad in ShardStore(again, reserve=0).quarantined()]
        assert again.quarantine.total_bytes == 3 * len(FIRST)
    assert names == [f"{DIGEST.hex()}.{number}" for number in range(3)]


def test_verify_counts_and_dates_good_reads(directory: StoreDirectory) -> None:
    store = ShardStore(directory, reserve=0, clock=lambda: 77.0)
    assert store.verified_at(DIGEST) is None
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.OK
    assert store.verified_at(DIGEST) == 77.0
    assert store.counters.bytes_verified == len(FIRST)


def test_a_missing_file_is_missing(directory: StoreDirectory) -> None:
    store = ShardStore(directory, reserve=0)
    os.unlink(layout.shard_path(directory.path, DIGEST))
    assert store.has(DIGEST)
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.MISSING
    assert not store.has(DIGEST)


def test_a_copy_put_back_by_hand_counts_with_its_real_size(directory: StoreDirectory) -> None:
    path = Path(layout.shard_path(directory.path, DIGEST))
    truncated(path)
    store = ShardStore(directory, reserve=0)
    path.write_bytes(FIRST)
    assert not store.has(DIGEST, len(FIRST))
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.OK
    assert store.has(DIGEST, len(FIRST))


class LyingReads(OperatingSystem):
    """A disk whose next `lies` reads return a flipped bit."""

    lies = 0

    def pread_into(self, descriptor: int, buffer: memoryview, offset: int) -> int:
        count = super().pread_into(descriptor, buffer, offset)
        if self.lies and count:
            self.lies -= 1
            buffer[0] ^= 1
        return count


def test_one_bad_read_alone_moves_nothing(tmp_path: Path) -> None:
    disk = LyingReads()
    with make_store(str(tmp_path / "store"), disk) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        disk.lies = 1
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.OK
        assert store.counters.bad_reads_not_repeated == 1 and store.quarantined() == []
        disk.lies = 2
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT


def test_every_read_goes_past_the_cache(tmp_path: Path) -> None:
    hooked = Hooked(OPERATING_SYSTEM)
    with make_store(str(tmp_path / "store"), hooked.port) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        earlier = len(hooked.calls)
        store.verify(DIGEST, pause_s=0)
    names = [call.name for call in hooked.calls[earlier:]]
    assert names.index("drop_cache") < names.index("pread_into")


@pytest.mark.parametrize(
    ("code", "fails"), [(errno.EIO, True), (errno.EACCES, False), (errno.EMFILE, False)]
)
def test_a_copy_that_cannot_be_read_is_not_called_corrupt(
    tmp_path: Path, code: int, fails: bool
) -> None:
    failing = False

    def before(call: Call) -> None:
        if failing and call.name == "pread_into":
            raise OSError(code, os.strerror(code))

    hooked = Hooked(OPERATING_SYSTEM, before)
    with make_store(str(tmp_path / "store"), hooked.port) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        failing = True
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.UNREADABLE
        failing = False
        assert (directory.medium.failed is not None) == fails
        assert store.counters.shards_unreadable == 1
        assert Path(layout.shard_path(directory.path, DIGEST)).read_bytes() == FIRST
        if fails:
            with pytest.raises(MediumFailed):
                store.verify(DIGEST, pause_s=0)
            with pytest.raises(MediumFailed):
                store.has(DIGEST)
        else:
            assert store.verify(DIGEST, pause_s=0) is VerifyResult.OK


def test_a_good_copy_written_between_read_and_move_stays(tmp_path: Path) -> None:
    """The file that was read is bad, the one that has its name at the move is another one."""
    replaced = False

    def before(call: Call) -> None:
        nonlocal replaced
        if call.name == "identify_path" and not replaced:
            replaced = True
            other = tmp_path / "whole"
            other.write_bytes(FIRST)
            os.rename(other, layout.shard_path(str(tmp_path / "store"), DIGEST))

    hooked = Hooked(OPERATING_SYSTEM, before)
    with make_store(str(tmp_path / "store"), hooked.port) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        bit_flipped(Path(layout.shard_path(directory.path, DIGEST)))
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.OK
        assert replaced and store.quarantined() == []
        assert get_shard(store, DIGEST) == FIRST


def test_a_copy_that_cannot_be_moved_counts_no_more(tmp_path: Path) -> None:
    failing = False

    def before(call: Call) -> None:
        if failing and call.name == "rename":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    hooked = Hooked(OPERATING_SYSTEM, before)
    with make_store(str(tmp_path / "store"), hooked.port) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        bit_flipped(Path(layout.shard_path(directory.path, DIGEST)))
        failing = True
        with pytest.raises(MediumFailed):
            store.verify(DIGEST, pause_s=0)
        assert len(store) == 0


def test_a_copy_moved_while_it_is_committed_is_not_counted_afterwards(tmp_path: Path) -> None:
    """A commit between rename and index, and a verify that finds the new file bad: whatever the
    order, the store must not count a file that lies in quarantine."""
    renamed, go_on = threading.Event(), threading.Event()
    disk = LyingReads()
    writer: threading.Thread | None = None

    def before(call: Call) -> None:
        if call.name == "fsync_directory" and threading.current_thread() is writer:
            renamed.set()
            assert go_on.wait(30)

    with make_store(str(tmp_path / "store"), Hooked(disk, before).port) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        writer = threading.Thread(target=put_shard, args=(store, FIRST))
        writer.start()
        assert renamed.wait(30)
        disk.lies = 2
        checker = threading.Thread(target=store.verify, args=(DIGEST,), kwargs={"pause_s": 0})
        checker.start()
        # Until it waits for the commit, or (which would be wrong) has not waited for it.
        while checker.is_alive() and not getattr(store._changed, "_waiters"):  # noqa: B009
            checker.join(0.001)
        go_on.set()
        writer.join(30)
        checker.join(30)
        assert len(store.quarantined()) == 1
        assert not store.has(DIGEST)


def test_a_bad_look_decides_nothing_but_counts_no_more(directory: StoreDirectory) -> None:
    store = ShardStore(directory, reserve=0)
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.OK
    bit_flipped(Path(layout.shard_path(directory.path, DIGEST)))
    look = store.look(DIGEST)
    assert look.result is VerifyResult.CORRUPT and look.read_bytes == len(FIRST)
    assert store.has(DIGEST) and store.quarantined() == []
    assert store.verified_at(DIGEST) is None, "nobody may count on it until it was read well"
    assert store.look_again(DIGEST, look) is VerifyResult.CORRUPT
    assert not store.has(DIGEST) and len(store.quarantined()) == 1


def test_a_second_look_at_another_file_decides_nothing(directory: StoreDirectory) -> None:
    store = ShardStore(directory, reserve=0)
    path = Path(layout.shard_path(directory.path, DIGEST))
    bit_flipped(path)
    look = store.look(DIGEST)
    other = path.with_name("other")
    bit_flipped(other)
    os.rename(other, path)
    assert store.look_again(DIGEST, look) is None
    assert store.has(DIGEST) and store.quarantined() == []


def quarantined(store: ShardStore, path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT


def test_a_quarantined_copy_that_reads_well_is_one_again(tmp_path: Path) -> None:
    disk = LyingReads()
    with make_store(str(tmp_path / "store"), disk) as directory:
        store = ShardStore(directory, reserve=0, clock=lambda: 7.0)
        put_shard(store, FIRST)
        disk.lies = 2
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT
        (file,) = store.quarantined()
        disk.lies = 1
        assert not store.retry_quarantined(file)
        assert not store.has(DIGEST)
        assert store.retry_quarantined(file)
        assert store.has(DIGEST, len(FIRST)) and store.verified_at(DIGEST) == 7.0
        assert get_shard(store, DIGEST) == FIRST
        assert store.quarantined() == [] and directory.quarantine.total_bytes == 0
    with open_store(str(tmp_path / "store")) as directory:
        assert get_shard(ShardStore(directory, reserve=0), DIGEST) == FIRST


def test_a_quarantined_copy_does_not_take_the_place_of_another_one(tmp_path: Path) -> None:
    disk = LyingReads()
    with make_store(str(tmp_path / "store"), disk) as directory:
        store = ShardStore(directory, reserve=0)
        put_shard(store, FIRST)
        disk.lies = 2
        assert store.verify(DIGEST, pause_s=0) is VerifyResult.CORRUPT
        put_shard(store, FIRST)
        (file,) = store.quarantined()
        assert not store.retry_quarantined(file)
        assert store.quarantined() == [file]


def test_a_dropped_copy_gives_its_room_back(directory: StoreDirectory) -> None:
    store = ShardStore(directory, reserve=0)
    quarantined(store, Path(layout.shard_path(directory.path, DIGEST)), b"?" * 100)
    (file,) = store.quarantined()
    assert directory.quarantine.total_bytes == 100
    store.drop_quarantined(file)
    assert store.quarantined() == [] and directory.quarantine.total_bytes == 0
    assert not Path(file.path).exists()
