"""Bitmaps as they travel: bit i is bit i % 8, least significant first, of byte i // 8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


def pack(bits: Iterable[bool]) -> bytes:
    """The bitmap of `bits`, padded with zeros to whole bytes."""
    packed = bytearray()
    for index, bit in enumerate(bits):
        if index % 8 == 0:
            packed.append(0)
        if bit:
            packed[-1] |= 1 << (index % 8)
    return bytes(packed)


def unpack(packed: bytes, count: int) -> Iterator[bool]:
    """The first `count` bits of a bitmap; bits past its end are False, so that a peer that
    sends too short a bitmap claims nothing."""
    for index in range(count):
        byte = index // 8
        yield byte < len(packed) and bool(packed[byte] >> (index % 8) & 1)
