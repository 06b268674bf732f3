"""What follows the writer of a shard: from memory while it keeps up, from the file when not."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.unit.store.workload import make_store

from ckptd.core.limits import BULK_BUFFER_BYTES as PIECE
from ckptd.errors import CkptdError
from ckptd.node.forwarder import BehindWriter
from ckptd.node.recent_pieces import RecentPieces
from ckptd.store.filesystem import OPERATING_SYSTEM
from ckptd.store.shard_io import IncomingShard, ShardReader
from ckptd.store.shards import ShardStore

CONTENT = os.urandom(6 * PIECE + 12345)


class Arriving:
    """A shard that comes in piece by piece, and whoever follows it."""

    def __init__(self, incoming: IncomingShard) -> None:
        self.incoming = incoming
        self.recent = RecentPieces(3)
        self.behind = BehindWriter(incoming, self.recent, timeout_s=10)

    def receive(self, size: int) -> None:
        """The next piece, or the beginning of it."""
        start = self.incoming.written
        view = self.recent.next_piece()[:size]
        view[:] = CONTENT[start : start + size]
        self.incoming.write(view)

    def take(self, offset: int, size: int = PIECE) -> None:
        piece = self.behind.piece(offset, size)
        assert 0 < len(piece) <= size
        assert piece == CONTENT[offset : offset + len(piece)]


@pytest.fixture
def arriving(tmp_path: Path) -> Iterator[Arriving]:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as directory:
        store = ShardStore(directory, reserve=0)
        incoming = store.begin(hashlib.sha256(CONTENT).digest(), len(CONTENT))
        arriving = Arriving(incoming)
        try:
            yield arriving
        finally:
            arriving.behind.close()
            incoming.abort()


def test_one_that_keeps_up_reads_no_file(
    arriving: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ShardReader, "read_into")
    for number in range(6):
        arriving.receive(PIECE)
        arriving.take(number * PIECE)
        arriving.take(number * PIECE + 100, size=50)
    arriving.receive(12345)
    arriving.take(6 * PIECE)


def test_one_that_is_behind_reads_the_file_and_catches_up(
    arriving: Arriving, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(5):
        arriving.receive(PIECE)
    arriving.take(0)
    arriving.take(PIECE, size=1000)
    monkeypatch.delattr(ShardReader, "read_into")
    arriving.take(2 * PIECE)
    arriving.take(4 * PIECE)


def test_what_is_being_sent_is_not_overwritten(arriving: Arriving) -> None:
    for _ in range(3):
        arriving.receive(PIECE)
    piece = arriving.behind.piece(0, PIECE)
    for _ in range(3):
        arriving.receive(PIECE)
    assert piece == CONTENT[:PIECE]
    arriving.take(PIECE)


def test_it_waits_for_what_is_not_there_yet(arriving: Arriving) -> None:
    later = threading.Timer(0.1, arriving.receive, args=(PIECE,))
    later.start()
    arriving.take(0)
    later.join()


def test_a_shard_that_will_never_be_complete_is_an_error(arriving: Arriving) -> None:
    arriving.receive(1000)
    arriving.take(0)
    later = threading.Timer(0.1, arriving.incoming.abort)
    later.start()
    with pytest.raises(CkptdError, match="did not come in completely"):
        arriving.take(1000)
    later.join()
