"""What a forwarder finds in memory of a shard that is coming in."""

from __future__ import annotations

import threading

from ckptd.core.limits import BULK_BUFFER_BYTES as PIECE
from ckptd.node.recent_pieces import RecentPieces


def fill(pieces: RecentPieces, number: int) -> None:
    pieces.next_piece()[:] = bytes([number + 1]) * PIECE


def copied(pieces: RecentPieces, offset: int, end: int, size: int = PIECE) -> bytes:
    buffer = memoryview(bytearray(size))
    return bytes(buffer[: pieces.copy(buffer, offset, end)])


def test_the_last_pieces_can_be_copied_and_older_ones_are_gone() -> None:
    pieces = RecentPieces(3)
    for number in range(5):
        fill(pieces, number)
        for older in range(number + 1):
            found = copied(pieces, older * PIECE, (number + 1) * PIECE)
            assert found == (bytes([older + 1]) * PIECE if older > number - 3 else b"")


def test_a_copy_ends_with_the_piece_the_buffer_and_what_was_received() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    assert copied(pieces, PIECE - 10, 2 * PIECE) == b"\x01" * 10
    assert copied(pieces, 0, 2 * PIECE, size=7) == b"\x01" * 7
    assert copied(pieces, PIECE, PIECE + 3) == b"\x02" * 3


def test_the_piece_that_is_being_received_takes_the_place_of_the_oldest() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    pieces.next_piece()  # nothing is in it yet, but it may be at any moment
    assert copied(pieces, 0, 2 * PIECE) == b""
    assert copied(pieces, PIECE, 2 * PIECE) == b"\x02" * PIECE


def test_a_reader_in_another_thread_gets_old_bytes_or_none_and_never_a_mixture() -> None:
    pieces = RecentPieces(2)
    rounds = 400
    seen: list[int] = []
    begun = threading.Event()

    def read() -> None:
        begun.set()
        number = 0
        while number < rounds:
            if number >= done[0]:
                continue
            found = copied(pieces, number * PIECE, (number + 1) * PIECE)
            if found:
                assert found == bytes([number % 250 + 1]) * PIECE
                seen.append(number)
            number = max(number + 1, done[0] - 2)

    done = [0]
    failed: list[BaseException] = []

    def guarded() -> None:
        try:
            read()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    assert begun.wait(10)
    for number in range(rounds):
        pieces.next_piece()[:] = bytes([number % 250 + 1]) * PIECE
        done[0] = number + 1
    thread.join(30)
    assert not thread.is_alive() and not failed and seen
