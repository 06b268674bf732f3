"""From parts of files to writes of shards: what is written is what was cut."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.cutting import SourceFile, cut, tensor_cuts
from ckptd.core.layout import Write, byte_ranges, whole_files
from ckptd.core.tensor_selection import Segment

SHARD_SIZE = 32


class Part(NamedTuple):
    shard_index: int
    offset: int
    length: int


class Stored(NamedTuple):
    contents: list[bytes]
    parts: list[list[Part]]
    shards: list[bytes]


@st.composite
def stored_files(draw: st.DrawFn) -> Stored:
    """Files as a store leaves them: cut for real, equal shards kept once."""
    files = []
    for index in range(draw(st.integers(0, 5))):
        sizes = draw(st.lists(st.integers(0, 3 * SHARD_SIZE), min_size=1, max_size=4))
        size = sum(sizes)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        cuts = tensor_cuts(ends[0], ends[1:]) if draw(st.booleans()) else None
        files.append(SourceFile(str(index), size, cuts))
    rng = random.Random(draw(st.integers(0, 3)))
    contents = [
        bytes(file.size) if draw(st.booleans()) else rng.randbytes(file.size) for file in files
    ]
    shards: dict[bytes, int] = {}
    placed: list[list[tuple[int, Part]]] = [[] for _ in files]
    for plan in cut(files, SHARD_SIZE):
        shard = b"".join(
            contents[p.file_index][p.offset : p.offset + p.length] for p in plan.pieces
        )
        shard_index = shards.setdefault(shard, len(shards))
        offset = 0
        for piece in plan.pieces:
            part = Part(shard_index, offset, piece.length)
            placed[piece.file_index].append((piece.offset, part))
            offset += piece.length
    parts = [[part for _, part in sorted(of_file)] for of_file in placed]
    return Stored(contents, parts, list(shards))


def apply(
    writes: dict[int, list[Write]], shards: list[bytes], outputs: Iterable[bytearray]
) -> list[bytearray]:
    """Carry the writes out, and see that no byte is written twice."""
    outputs = list(outputs)
    written = [bytearray(len(output)) for output in outputs]
    for shard_index, of_shard in writes.items():
        assert of_shard, "a shard without wanted bytes is listed"
        assert [w.shard_offset for w in of_shard] == sorted(w.shard_offset for w in of_shard)
        for output_index, output_offset, shard_offset, length in of_shard:
            assert length > 0
            data = shards[shard_index][shard_offset : shard_offset + length]
            assert len(data) == length
            outputs[output_index][output_offset : output_offset + length] = data
            for position in range(output_offset, output_offset + length):
                written[output_index][position] += 1
    assert all(set(counts) <= {0, 1} for counts in written)
    return outputs


@given(stored_files(), st.data())
def test_whole_files_come_back_byte_for_byte(stored: Stored, choice: st.DataObject) -> None:
    wanted = (
        choice.draw(st.lists(st.sampled_from(range(len(stored.contents))), unique=True))
        if (stored.contents)
        else []
    )
    writes = whole_files([stored.parts[index] for index in wanted])
    assert set(writes) == {part.shard_index for i in wanted for part in stored.parts[i]}
    outputs = apply(writes, stored.shards, (bytearray(len(stored.contents[i])) for i in wanted))
    assert outputs == [stored.contents[i] for i in wanted]


@given(stored_files(), st.data())
def test_ranges_of_files_come_back_and_no_shard_is_read_for_nothing(
    stored: Stored, choice: st.DataObject
) -> None:
    segments: list[Segment] = []
    expected = bytearray(b"header")
    for index in choice.draw(st.permutations(range(len(stored.contents)))):
        content = stored.contents[index]
        for _ in range(choice.draw(st.integers(0, 3))):
            begin = choice.draw(st.integers(0, len(content)))
            length = choice.draw(st.integers(0, len(content) - begin))
            segments.append(Segment(str(index), begin, length, len(expected)))
            expected += content[begin : begin + length]
    files = {str(index): parts for index, parts in enumerate(stored.parts)}
    writes = byte_ranges(files, segments)
    start = bytearray(b"header") + bytearray(len(expected) - 6)
    assert apply(writes, stored.shards, [start]) == [expected]
    assert sum(w.length for of_shard in writes.values() for w in of_shard) == len(expected) - 6


def test_shards_come_in_the_order_of_first_need() -> None:
    files = [[Part(5, 3, 2), Part(1, 0, 4)], [Part(5, 0, 3)], []]
    writes = whole_files(files)
    assert list(writes.items()) == [
        (5, [Write(1, 0, 0, 3), Write(0, 0, 3, 2)]),
        (1, [Write(0, 2, 0, 4)]),
    ]


@pytest.mark.parametrize(("begin", "length"), [(-1, 1), (4, 3), (7, 0)])
def test_a_range_outside_its_file_is_an_error(begin: int, length: int) -> None:
    with pytest.raises(ValueError, match="of 6"):
        byte_ranges({"f": [Part(0, 0, 4), Part(1, 0, 2)]}, [Segment("f", begin, length, 0)])


def test_many_tiny_files_are_laid_out_in_one_pass() -> None:
    files = [[Part(i // 1000, i % 1000 * 10, 10)] for i in range(100_000)]
    writes = whole_files(files)
    assert len(writes) == 100
    assert sum(len(of_shard) for of_shard in writes.values()) == 100_000
