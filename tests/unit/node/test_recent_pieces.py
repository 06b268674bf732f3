"""What a forwarder finds in memory of a shard that is coming in."""

from __future__ import annotations

import threading

from ckptd.core.limits import BULK_BUFFER_BYTES as PIECE
from ckptd.node.recent_pieces import RecentPieces


def fill(pieces: RecentPieces, number: int) -> None:
    pieces.next_piece()[:] = bytes([number + 1]) * PIECE


def found(pieces: RecentPieces, offset: int, end: int) -> bytes:
    view = bytes(pieces.hold(offset, end))
    pieces.let_go()
    return view


def test_the_last_pieces_can_be_held_and_older_ones_are_gone() -> None:
    pieces = RecentPieces(3)
    for number in range(5):
        fill(pieces, number)
        for older in range(number + 1):
            here = found(pieces, older * PIECE, (number + 1) * PIECE)
            assert here == (bytes([older + 1]) * PIECE if older > number - 3 else b"")


def test_what_is_held_ends_with_the_piece_and_what_was_received() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    assert found(pieces, PIECE - 10, 2 * PIECE) == b"\x01" * 10
    assert found(pieces, 0, 7) == b"\x01" * 7
    assert found(pieces, PIECE, PIECE + 3) == b"\x02" * 3


def test_the_piece_that_is_being_received_takes_the_place_of_the_oldest() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    pieces.next_piece()  # nothing is in it yet, but it may be at any moment
    assert found(pieces, 0, 2 * PIECE) == b""
    assert found(pieces, PIECE, 2 * PIECE) == b"\x02" * PIECE


def test_what_is_held_stays_while_everything_else_is_overwritten() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    held = pieces.hold(0, 2 * PIECE)
    for number in range(2, 9):
        fill(pieces, number)
    assert bytes(held) == b"\x01" * PIECE
    assert found(pieces, 8 * PIECE, 9 * PIECE) == b"\x09" * PIECE, "the other place goes round"
    for number in range(9, 11):
        fill(pieces, number)
    assert found(pieces, 0, 11 * PIECE) == b"", "let go, it is gone like any other"
    assert found(pieces, 9 * PIECE, 11 * PIECE) == b"\x0a" * PIECE
    assert found(pieces, 10 * PIECE, 11 * PIECE) == b"\x0b" * PIECE


def test_whoever_holds_another_piece_lets_go_of_the_first() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    first = pieces.hold(0, 2 * PIECE)
    second = pieces.hold(PIECE, 2 * PIECE)
    fill(pieces, 2)
    assert bytes(first) == b"\x03" * PIECE
    assert bytes(second) == b"\x02" * PIECE
    assert not pieces.hold(0, 3 * PIECE)  # and of what is gone nothing is held
    fill(pieces, 3)
    assert bytes(second) == b"\x04" * PIECE


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
            held = pieces.hold(number * PIECE, (number + 1) * PIECE)
            if held:
                assert bytes(held) == bytes([number % 250 + 1]) * PIECE
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
