"""What a forwarder finds in memory of a shard that is coming in."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ckptd.core.limits import BULK_BUFFER_BYTES as PIECE
from ckptd.node.recent_pieces import RecentPieces


def fill(pieces: RecentPieces, number: int) -> None:
    pieces.next_piece()[:] = bytes([number + 1]) * PIECE


def found(pieces: RecentPieces, offset: int, end: int) -> bytes:
    view = bytes(pieces.hold(offset, end))
    assert not pieces.hold(1000 * PIECE, 1001 * PIECE)  # nothing is held any more
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
    pieces.next_piece()[:] = (content := os.urandom(PIECE))
    assert found(pieces, 2 * PIECE + 100, 2 * PIECE + 200) == content[100:200]


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
    assert found(pieces, 0, 11 * PIECE) == b"", "no longer held, it is gone like any other"
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


class Between(list[int]):
    """The numbers of pieces by place; another thread does something while one looks or writes."""

    def __init__(self, numbers: list[int], work: Callable[[], object]) -> None:
        super().__init__(numbers)
        self.thread = threading.Thread(target=work)

    def _meanwhile(self) -> None:
        if self.thread.ident is None:
            self.thread.start()
            self.thread.join(0.2)  # it has to wait until this thread is done

    def index(self, *arguments: Any) -> int:
        place = super().index(*arguments)
        self._meanwhile()
        return place

    def __setitem__(self, *arguments: Any) -> None:
        self._meanwhile()
        super().__setitem__(*arguments)


def test_a_piece_is_not_overwritten_while_it_is_looked_for() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    numbers = pieces._pieces = Between(pieces._pieces, lambda: fill(pieces, 2))
    held = pieces.hold(0, 2 * PIECE)
    numbers.thread.join(10)
    assert bytes(held) == b"\x01" * PIECE
    assert found(pieces, 2 * PIECE, 3 * PIECE) == b"\x03" * PIECE


def test_a_piece_whose_place_is_given_away_is_not_held() -> None:
    pieces = RecentPieces(2)
    fill(pieces, 0)
    fill(pieces, 1)
    held: list[memoryview] = []
    numbers = Between(pieces._pieces, lambda: held.append(pieces.hold(0, 2 * PIECE)))
    pieces._pieces = numbers
    pieces.next_piece()
    numbers.thread.join(10)
    assert [len(view) for view in held] == [0]
