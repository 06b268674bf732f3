"""The shards of one store: which ones are here, reading, receiving and verifying them.

A shard counts as here only when its file has the right size and was flushed together with its
name; the scan at the start flushes every directory before it believes its names.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

from ckptd.clock import SYSTEM_CLOCK
from ckptd.core import limits
from ckptd.errors import NotFound, Refused, ShardCorrupt
from ckptd.store import check_record, durable, layout
from ckptd.store.copy_reader import Look, VerifyResult, read_copy
from ckptd.store.durable import NewFile
from ckptd.store.filesystem import FileIdentity
from ckptd.store.index import LastCheck, ShardIndex
from ckptd.store.marker import StoreDirectory
from ckptd.store.quarantine import QuarantinedFile
from ckptd.store.room import Room, RoomKeeper
from ckptd.store.shard_io import IncomingShard, ShardReader

_RECALLED_AT_ONCE = 256
_VERIFY_ATTEMPTS = 3  # each fails only when the file was replaced while it was read


@dataclass(slots=True)
class StoreCounters:
    """Counts since the start. They only grow."""

    shards_written: int = 0
    bytes_written: int = 0
    shards_discarded: int = 0  # received, and not the announced bytes
    shards_corrupt: int = 0  # stored, and moved to quarantine
    shards_unreadable: int = 0
    bad_reads_not_repeated: int = 0  # one read had another hash, the next one was good
    bytes_verified: int = 0
    shards_collected: int = 0  # removed, because nothing needs them any more
    bytes_collected: int = 0


class CheckSurvey(NamedTuple):
    """The shards that were hashed longest ago; bytes in the store, and how many of them were
    hashed within the time that was asked for."""

    oldest: list[LastCheck]
    total_bytes: int
    checked_bytes: int


class ShardStore:
    """The shards below one store directory. Thread-safe; nothing here knows an event loop.

    `directory` is the opened store. `reserve` is room that shards leave alone: a count of bytes
    (`int`) or a fraction of the file system (`float`). `clock` gives the time in seconds for
    `verified_at` and `touched_at`; it never steps back. The constructor scans the store (errors:
    `MediumFailed`, `StoreOperationFailed`). After an I/O error every method raises `MediumFailed`.
    """

    def __init__(
        self,
        directory: StoreDirectory,
        *,
        reserve: int | float,
        clock: Callable[[], float] = SYSTEM_CLOCK.monotonic_s,
    ) -> None:
        self._directory = directory
        self._path = directory.path
        self._filesystem = directory.filesystem
        self._medium = directory.medium
        self._clock = clock
        self._keeper = RoomKeeper(self._path, self._filesystem, reserve)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._index = ShardIndex()
        self._counters = StoreCounters()
        # Renamed, but not yet in the index: their files must stay where they are.
        self._committing: Counter[bytes] = Counter()
        self._directories: set[int] = set()  # first bytes whose directory is durable
        self._making_directory = threading.Lock()
        self._ignored: list[str] = []
        self._ignored_count = 0
        with self._medium.operation("scan the shards"):
            self._scan()

    # What is here

    def has(self, digest: bytes, size: int | None = None) -> bool:
        """Whether the shard is here, durably, with this size in bytes (None: any size)."""
        found = self.size(digest)
        return found is not None and (size is None or found == size)

    def size(self, digest: bytes) -> int | None:
        """Size of the shard's file in bytes; None when it is not here."""
        self._medium.require()
        with self._lock:
            return self._index.size(digest)

    def verified_at(self, digest: bytes) -> float | None:
        """When the bytes were last hashed: received, or re-read. None since the start: never."""
        self._medium.require()
        with self._lock:
            return self._index.verified_at(digest)

    def last_checks(self, shards: Iterable[tuple[bytes, int]], wall_s: float) -> list[float | None]:
        """For each (digest, size in bytes) the seconds since its bytes were last hashed, before
        this process included; infinite when nobody knows, None when the shard is not here with
        that size. `wall_s` is the wall clock's time. Not for deciding whether a copy counts."""
        self._medium.require()
        now = self._clock()
        with self._lock:
            return [self._index.last_check(digest, size, now, wall_s) for digest, size in shards]

    def survey_checks(self, count: int, wall_s: float, *, within_s: float) -> CheckSurvey:
        """Which `count` shards were hashed longest ago, before this process included (those of
        which nobody knows come first), and how much was hashed within `within_s` seconds."""
        total = checked = 0

        def all_checks() -> Iterator[LastCheck]:
            nonlocal total, checked
            for check in self._all_last_checks(self._clock(), wall_s):
                total += check.size_bytes
                if check.age_s <= within_s:
                    checked += check.size_bytes
                yield check

        oldest = heapq.nsmallest(
            count, all_checks(), key=lambda check: (-check.age_s, check.digest)
        )
        return CheckSurvey(oldest, total, checked)

    def _all_last_checks(self, now: float, wall_s: float) -> Iterator[LastCheck]:
        for first_byte in range(256):
            self._medium.require()
            with self._lock:
                checks = self._index.last_checks(first_byte, now, wall_s)
            yield from checks

    def check_record(self, wall_s: float) -> bytes:
        """When each shard was last hashed, to be kept over a restart for `recall_checks`."""
        return check_record.encode(
            (check.digest, wall_s - check.age_s)
            for check in self._all_last_checks(self._clock(), wall_s)
        )

    def recall_checks(self, record: bytes) -> bool:
        """Takes in what `check_record` of a process before this one gave; whether that was whole.
        It serves the order of scrubbing and people: `verified_at` does not know of it."""
        checks = check_record.decode(record)
        if checks is None:
            return False
        while part := list(itertools.islice(checks, _RECALLED_AT_ONCE)):
            with self._lock:
                for prefix, at_s in part:
                    self._index.recall(prefix, at_s)
        return True

    def now(self) -> float:
        """The time by the clock of `verified_at` and `touched_at`."""
        return self._clock()

    def touch(self, digest: bytes) -> bool:
        """Record that a store wants this shard now; False: not here."""
        self._medium.require()
        with self._lock:
            return self._index.touch(digest, self._clock())

    def confirm(self, shards: Iterable[tuple[bytes, int]]) -> list[bool]:
        """Which of these shards (digest, size in bytes) are here. Those are touched in the same
        moment: what is confirmed to somebody is not collected before another grace is over."""
        self._medium.require()
        with self._lock:
            now = self._clock()
            return [
                self._index.size(digest) == size and self._index.touch(digest, now)
                for digest, size in shards
            ]

    def remove(self, digest: bytes, *, untouched_since: float) -> int:
        """Remove a shard that nothing names, unless somebody touched it after `untouched_since`
        (by the store's clock) or it is coming in anew; how many bytes that made free.

        The look and the removal are one step: nobody is told in between that it is here. Not
        flushed, as a file that comes back by a power cut does no harm.
        """
        with self._medium.operation(f"remove shard {digest.hex()}"), self._lock:
            touched_at = self._index.touched_at(digest)
            if touched_at is None or touched_at > untouched_since or self._committing[digest]:
                return 0
            size = self._index.size(digest) or 0
            self._index.remove(digest)
            with contextlib.suppress(FileNotFoundError):
                self._filesystem.unlink(self._shard_path(digest))
            self._counters.shards_collected += 1
            self._counters.bytes_collected += size
            return size

    def touched_at(self, digest: bytes) -> float | None:
        """When the shard was last wanted, received, or found by the scan; None: not here."""
        self._medium.require()
        with self._lock:
            return self._index.touched_at(digest)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards that are here."""
        return self._index.total_bytes

    def __len__(self) -> int:
        return len(self._index)

    def digests(self) -> Iterator[bytes]:
        """All digests in order. What changes meanwhile may or may not be seen."""
        for first_byte in range(256):
            self._medium.require()
            with self._lock:
                digests = self._index.bucket_digests(first_byte)
            yield from digests

    def room(self) -> Room:
        """Room on the disk, in bytes."""
        with self._medium.operation("ask for the free room"):
            return self._keeper.room(
                self._index.total_bytes + self._directory.quarantine.total_bytes
            )

    @property
    def counters(self) -> StoreCounters:
        """The counts as they are now."""
        with self._lock:
            return replace(self._counters)

    @property
    def ignored(self) -> tuple[int, list[str]]:
        """Count and first few paths of what the scan found below shards/ and is no shard."""
        return self._ignored_count, list(self._ignored)

    def quarantined(self) -> list[QuarantinedFile]:
        """Everything that lies in quarantine."""
        with self._medium.operation("list the quarantine"):
            return self._directory.quarantine.files()

    def index_memory_bytes(self) -> int:
        """Bytes that the index takes."""
        with self._lock:
            return self._index.memory_bytes()

    # Reading and receiving

    def open_read(self, digest: bytes) -> ShardReader:
        """Open a shard for reading. Errors: `NotFound`; `ShardCorrupt` when the file's size is
        not the recorded one (call `verify` then); `MediumFailed`, `StoreOperationFailed`."""
        recorded = self.size(digest)
        if recorded is None:
            raise NotFound(f"shard {digest.hex()} is not in {self._path}")
        with self._medium.operation(f"open shard {digest.hex()}"):
            try:
                descriptor = self._filesystem.open(self._shard_path(digest), os.O_RDONLY)
            except FileNotFoundError as error:
                self._forget_if_missing(digest)
                raise NotFound(f"shard {digest.hex()} is gone from {self._path}") from error
            found = self._filesystem.identify(descriptor).size_bytes
        reader = ShardReader(self._filesystem, self._medium, descriptor, digest, found)
        if found != recorded:
            reader.close()
            raise ShardCorrupt(digest.hex())
        return reader

    def begin(self, digest: bytes, size: int) -> IncomingShard:
        """Prepare to receive a shard of `size` bytes. Several may receive the same one at once.

        Errors: `NoRoom` before anything is written, `Refused` when `size` is over the limit,
        `MediumFailed`, `StoreOperationFailed`.
        """
        if not 0 <= size <= limits.SHARD_SIZE_MAX_BYTES:
            raise Refused(
                f"a shard of {size} bytes: the limit is {limits.SHARD_SIZE_MAX_BYTES}",
                next="lower replication.shard_size, then ckptd config check",
            )
        with self._medium.operation(f"receive shard {digest.hex()}"):
            reservation = self._keeper.take(size)
            try:
                path = durable.temporary_path(self._directory.incoming, digest.hex())
                file = NewFile(self._filesystem, path)
                on_disk = file.reserve(size)
                file.bypass_cache()
            except OSError:
                reservation.release()
                raise
        if on_disk:  # the file system counts it as taken already
            reservation.release()
        return IncomingShard(
            digest,
            size,
            file=file,
            reservation=reservation,
            filesystem=self._filesystem,
            medium=self._medium,
            publish=self._publish,
            discarded=self._count_discarded,
        )

    def _publish(self, file: NewFile, digest: bytes, size: int) -> None:
        storing = self._medium.operation(f"store shard {digest.hex()}")
        with self._committed(digest, size), storing:
            self._make_shard_directory(digest)
            file.publish(self._shard_path(digest), renaming=self._lock)
        with self._lock:
            self._counters.shards_written += 1
            self._counters.bytes_written += size

    @contextmanager
    def _committed(self, digest: bytes, size: int) -> Iterator[None]:
        """Around what gives a whole file a shard's name, durably: then the shard is here."""
        with self._lock:
            self._committing[digest] += 1
        try:
            yield
            with self._lock:
                now = self._clock()
                self._index.set(digest, size, verified_at=now, touched_at=now)
        finally:
            with self._changed:
                self._committing[digest] -= 1
                if not self._committing[digest]:
                    del self._committing[digest]
                self._changed.notify_all()

    def _make_shard_directory(self, digest: bytes) -> None:
        # One at a time: a second writer must not trust the name before it is flushed.
        with self._making_directory:
            if digest[0] not in self._directories:
                durable.make_directory(self._filesystem, layout.shard_directory(self._path, digest))
                self._directories.add(digest[0])

    def _count_discarded(self) -> None:
        with self._lock:
            self._counters.shards_discarded += 1

    # Verifying

    def verify(self, digest: bytes, *, pause_s: float = limits.VERIFY_PAUSE_S) -> VerifyResult:
        """Read the copy from the medium, past the page cache, and hash it.

        A bad read is repeated after `pause_s` seconds; two bad reads move the file to quarantine.
        Blocks for as long as that takes. Raises `MediumFailed` when the disk had failed before or
        fails at the move, `NoRoom` and `StoreOperationFailed` when the move fails; the copy does
        not count as here any more in all these cases.
        """
        for _ in range(_VERIFY_ATTEMPTS):
            look = self.look(digest)
            if look.result is not VerifyResult.CORRUPT:
                return look.result
            time.sleep(pause_s)
            result = self.look_again(digest, look)
            if result is not None:
                return result
        return VerifyResult.UNREADABLE

    def look(self, digest: bytes, *, salt: bytes = b"") -> Look:
        """Read the copy once, and hash it behind `salt`, too, if there is one. A bad one is CORRUPT
        and stays where it is, but counts as unchecked until a reading was good: `look_again`
        decides. Blocks; raises `MediumFailed`."""
        look = self._read(digest, salt)
        if look.result is VerifyResult.CORRUPT:
            with self._lock:
                self._index.set_unverified(digest)
        else:
            self._conclude(digest, look)
        return look

    def look_again(self, digest: bytes, before: Look) -> VerifyResult | None:
        """Read a copy again that `look` found CORRUPT, seconds later: still bad, it goes to
        quarantine. None when another file has its name by now, so that nothing is decided.
        Blocks; errors are those of `verify`."""
        look = self._read(digest)
        if look.result is not VerifyResult.CORRUPT:
            if look.result is VerifyResult.OK:
                with self._lock:
                    self._counters.bad_reads_not_repeated += 1
            self._conclude(digest, look)
            return look.result
        if before.identity is None or look.identity is None:
            return None
        if not look.identity.same_file(before.identity):
            return None
        return VerifyResult.CORRUPT if self._quarantine(digest, look.identity) else None

    def _read(self, digest: bytes, salt: bytes = b"") -> Look:
        if not self.has(digest):
            return Look(VerifyResult.MISSING)
        path = self._shard_path(digest)
        look = read_copy(self._filesystem, self._medium, path, digest, salt=salt)
        with self._lock:
            self._counters.bytes_verified += look.read_bytes
        return look

    def _conclude(self, digest: bytes, look: Look) -> None:
        if look.result is VerifyResult.MISSING:
            self._forget_if_missing(digest)
            return
        with self._lock:
            if look.result is VerifyResult.OK and look.identity is not None:
                self._index.set_verified(digest, look.identity.size_bytes, self._clock())
            else:
                self._counters.shards_unreadable += 1

    def _quarantine(self, digest: bytes, identity: FileIdentity) -> bool:
        """Move the file that was read to quarantine; False when another one has its name now."""
        path = self._shard_path(digest)
        quarantine = self._directory.quarantine
        with self._medium.operation(f"quarantine shard {digest.hex()}"):
            with self._changed:
                self._changed.wait_for(lambda: not self._committing[digest])
                try:
                    current = self._filesystem.identify_path(path)
                except FileNotFoundError:
                    return False
                if not current.same_file(identity):
                    return False
                # First, so that it does not count any more whatever happens to the move.
                self._index.remove(digest)
                self._counters.shards_corrupt += 1
                target = quarantine.rename_into(path, current.size_bytes)
            quarantine.flush(path, target)
        return True

    def retry_quarantined(self, file: QuarantinedFile) -> bool:
        """Read a quarantined shard again; if its bytes are right by now (the reading had been bad,
        not they) and no other copy has taken its place, it is one again. Whether it is. Blocks;
        raises `MediumFailed`, `StoreOperationFailed`."""
        digest = bytes.fromhex(file.id)
        self._medium.require()
        look = read_copy(self._filesystem, self._medium, file.path, digest)
        with self._lock:
            self._counters.bytes_verified += look.read_bytes
        if look.result is not VerifyResult.OK or self.has(digest):
            return False
        path = self._shard_path(digest)
        with (
            self._committed(digest, look.read_bytes),
            self._medium.operation(f"put shard {digest.hex()} back"),
        ):
            self._make_shard_directory(digest)
            with self._lock:
                self._directory.quarantine.rename_out(file, path)
            self._directory.quarantine.flush(file.path, path)
        return True

    def drop_quarantined(self, file: QuarantinedFile) -> None:
        """Delete a quarantined file, whose bytes are known to be good elsewhere. Raises
        `MediumFailed`, `StoreOperationFailed`."""
        with self._medium.operation(f"drop {file.path}"):
            self._directory.quarantine.remove(file)

    def _forget_if_missing(self, digest: bytes) -> None:
        self._medium.confirm()
        with self._changed:
            self._changed.wait_for(lambda: not self._committing[digest])
            try:
                self._filesystem.identify_path(self._shard_path(digest))
            except FileNotFoundError:
                self._index.remove(digest)

    # The scan

    def _scan(self) -> None:
        root = os.path.join(self._path, layout.SHARDS)
        self._filesystem.fsync_directory(root)
        now = self._clock()
        for entry in sorted(self._filesystem.list_directory(root), key=lambda found: found.name):
            if entry.is_file or not layout.is_shard_directory_name(entry.name):
                self._ignore(os.path.join(layout.SHARDS, entry.name))
                continue
            self._filesystem.fsync_directory(os.path.join(root, entry.name))
            self._index.load(self._shards_in(root, entry.name), now)
            self._directories.add(int(entry.name, 16))

    def _shards_in(self, root: str, name: str) -> Iterator[tuple[bytes, int]]:
        entries = self._filesystem.list_directory(os.path.join(root, name))
        for entry in sorted(entries, key=lambda found: found.name):
            digest = layout.digest_of_shard_name(name, entry.name)
            if digest is None or not entry.is_file:
                self._ignore(os.path.join(layout.SHARDS, name, entry.name))
            else:
                yield digest, entry.size_bytes

    def _ignore(self, path: str) -> None:
        self._ignored_count += 1
        if len(self._ignored) < limits.STORE_IGNORED_NAMES_MAX:
            self._ignored.append(path)

    def _shard_path(self, digest: bytes) -> str:
        return layout.shard_path(self._path, digest)
