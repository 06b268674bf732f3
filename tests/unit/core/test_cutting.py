"""Cuts: every byte once, stable where nothing changed, and not many more shards than needed."""

from __future__ import annotations

import hashlib
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.cutting import Piece, ShardPlan, SourceFile, cut, tensor_cuts

SHARD_SIZE = 64

SIZES = st.integers(0, 5 * SHARD_SIZE) | st.sampled_from(
    (1, 15, 16, 17, SHARD_SIZE - 1, SHARD_SIZE, SHARD_SIZE + 1, 2 * SHARD_SIZE)
)


@st.composite
def source_files(draw: st.DrawFn) -> list[SourceFile]:
    files = []
    for index in range(draw(st.integers(0, 6))):
        if draw(st.booleans()):
            files.append(SourceFile(f"{index}.json", draw(SIZES)))
            continue
        ends = [draw(SIZES)]
        for size in draw(st.lists(SIZES, max_size=8)):
            ends.append(ends[-1] + size)
        cuts = tensor_cuts(ends[0], ends[1:])
        files.append(SourceFile(f"{index}.safetensors", cuts[-1], cuts))
    return files


def contents(files: list[SourceFile], seed: int = 0) -> list[bytearray]:
    rng = random.Random(seed)
    return [bytearray(rng.randbytes(file.size)) for file in files]


def shard_of(plan: ShardPlan, data: list[bytearray]) -> bytes:
    return b"".join(bytes(data[p.file_index][p.offset : p.offset + p.length]) for p in plan.pieces)


def hashes(files: list[SourceFile], data: list[bytearray]) -> list[bytes]:
    return [hashlib.sha256(shard_of(plan, data)).digest() for plan in cut(files, SHARD_SIZE)]


def tensors(files: list[SourceFile]) -> list[tuple[int, int, int]]:
    """(file index, begin, end) of every tensor that is not empty."""
    return [
        (index, begin, end)
        for index, file in enumerate(files)
        for begin, end in pairwise(file.cuts or ())
    ]


def holds(plan: ShardPlan, file_index: int, begin: int, end: int) -> bool:
    return any(
        piece.file_index == file_index
        and piece.offset < end
        and begin < piece.offset + piece.length
        for piece in plan.pieces
    )


@given(source_files())
def test_cut_then_join_is_identity(files: list[SourceFile]) -> None:
    data = contents(files)
    joined = [bytearray(file.size) for file in files]
    covered = [bytearray(file.size) for file in files]
    for plan in cut(files, SHARD_SIZE):
        shard = shard_of(plan, data)
        assert 0 < len(shard) == plan.size <= SHARD_SIZE
        start = 0
        for file_index, offset, length in plan.pieces:
            assert length > 0
            joined[file_index][offset : offset + length] = shard[start : start + length]
            for position in range(offset, offset + length):
                covered[file_index][position] += 1
            start += length
    assert joined == data
    assert all(set(counts) <= {1} for counts in covered)


@given(source_files(), st.data())
def test_one_changed_byte_changes_only_the_shards_that_hold_its_tensor(
    files: list[SourceFile], choice: st.DataObject
) -> None:
    candidates = tensors(files)
    if not candidates:
        return
    file_index, begin, end = choice.draw(st.sampled_from(candidates))
    data = contents(files)
    before = hashes(files, data)
    data[file_index][choice.draw(st.integers(begin, end - 1))] ^= 1
    after = hashes(files, data)
    for plan, old, new in zip(cut(files, SHARD_SIZE), before, after, strict=True):
        assert old == new or holds(plan, file_index, begin, end)
    assert sum(old != new for old, new in zip(before, after, strict=True)) == 1


@given(source_files(), st.data())
def test_unchanged_tensors_keep_their_shards(
    files: list[SourceFile], choice: st.DataObject
) -> None:
    """New bytes in some tensors, and in every other file and header: shards that hold none of
    these bytes stay, and tensors never share a shard with other bytes."""
    candidates = tensors(files)
    changed = choice.draw(st.sets(st.sampled_from(candidates))) if candidates else set()
    data = contents(files)
    other = contents(files, seed=1)
    mixed = contents(files)
    for index, file in enumerate(files):
        header = file.size if file.cuts is None else file.cuts[0]
        mixed[index][:header] = other[index][:header]
    for index, begin, end in changed:
        mixed[index][begin:end] = other[index][begin:end]
    for plan, old, new in zip(
        cut(files, SHARD_SIZE), hashes(files, data), hashes(files, mixed), strict=True
    ):
        of_tensors = [holds(plan, *tensor) for tensor in candidates]
        if any(of_tensors):
            assert (
                sum(
                    end - begin
                    for (_, begin, end), held in zip(candidates, of_tensors, strict=True)
                    if held
                )
                >= plan.size
            )
            if not any(holds(plan, *tensor) for tensor in changed):
                assert old == new


@given(source_files())
def test_a_tensor_is_split_only_when_it_is_too_large_and_then_shares_nothing(
    files: list[SourceFile],
) -> None:
    plans = list(cut(files, SHARD_SIZE))
    for tensor in tensors(files):
        file_index, begin, end = tensor
        holding = [plan for plan in plans if holds(plan, *tensor)]
        if end - begin <= SHARD_SIZE:
            assert len(holding) == 1
        else:
            assert [plan.pieces for plan in holding] == [
                (Piece(file_index, offset, min(SHARD_SIZE, end - offset)),)
                for offset in range(begin, end, SHARD_SIZE)
            ]


@given(source_files())
def test_there_are_not_many_more_shards_than_bytes_need(files: list[SourceFile]) -> None:
    """Each shard but the last pack of a kind is filled to a quarter, unless it is the remainder of
    a large tensor; two neighbouring groups of tensors together exceed a shard."""
    total = sum(file.size for file in files)
    large = sum(end - begin > SHARD_SIZE for _, begin, end in tensors(files))
    tails = sum(file.size >= SHARD_SIZE // 4 for file in files)
    groups = sum(len(file.cuts) > 1 for file in files if file.cuts)
    count = len(list(cut(files, SHARD_SIZE)))
    assert count <= 2 * total / SHARD_SIZE + 2 * large + tails + groups + 2


@given(source_files())
def test_cuts_follow_from_the_sizes_alone_and_appending_files_keeps_full_shards(
    files: list[SourceFile],
) -> None:
    plans = list(cut(files, SHARD_SIZE))
    assert plans == list(cut(iter(files), SHARD_SIZE))
    longer = set(cut([*files, SourceFile("z.json", 3)], SHARD_SIZE))
    assert len(set(plans) - longer) <= 1  # the open pack of tiny files


def test_twenty_json_files_cost_one_shard() -> None:
    files = [SourceFile(f"{i}.json", 3) for i in range(20)]
    (plan,) = cut(files, SHARD_SIZE)
    assert plan == ShardPlan(tuple(Piece(i, 0, 3) for i in range(20)))


def test_headers_are_packed_with_tiny_files_and_small_groups_with_each_other() -> None:
    files = [
        SourceFile("a.safetensors", 30, [10, 20, 30]),
        SourceFile("b.json", 5),
        SourceFile("c.safetensors", 22, [12, 22]),
    ]
    assert list(cut(files, SHARD_SIZE)) == [
        ShardPlan((Piece(0, 10, 20),)),
        ShardPlan((Piece(2, 12, 10),)),
        ShardPlan((Piece(0, 0, 10), Piece(1, 0, 5), Piece(2, 0, 12))),
    ]


def test_small_tensors_between_large_ones_share_a_shard() -> None:
    """The layer norms of a transformer, in the order in which libraries write them."""
    cuts = tensor_cuts(8, [8 + 2, 8 + 2 + 100, 8 + 4 + 100, 8 + 4 + 200])
    plans = list(cut([SourceFile("m.safetensors", cuts[-1], cuts)], SHARD_SIZE))
    assert plans == [
        ShardPlan((Piece(0, 10, 64),)),
        ShardPlan((Piece(0, 74, 36),)),
        ShardPlan((Piece(0, 112, 64),)),
        ShardPlan((Piece(0, 176, 36),)),
        ShardPlan((Piece(0, 8, 2), Piece(0, 110, 2))),
        ShardPlan((Piece(0, 0, 8),)),
    ]


def test_empty_files_and_empty_tensors_have_no_pieces() -> None:
    assert tensor_cuts(8, [8, 10, 10]) == [8, 10]
    assert list(cut([SourceFile("e", 0), SourceFile("s", 0, [0])], SHARD_SIZE)) == []


def test_a_shard_size_of_one_byte_still_cuts() -> None:
    assert [plan.size for plan in cut([SourceFile("a", 3), SourceFile("b", 2, [0, 2])], 1)] == [
        1
    ] * 5


@pytest.mark.parametrize("cuts", [[], [4, 9], [-1, 10], [4, 4, 10], [6, 5, 10], [11, 10]])
def test_cuts_that_do_not_describe_the_file_are_refused(cuts: list[int]) -> None:
    with pytest.raises(ValueError, match="cuts"):
        list(cut([SourceFile("a", 10, cuts)], SHARD_SIZE))


def test_a_terabyte_and_many_tiny_files_are_cut_lazily() -> None:
    shard_size = 32 * 2**20
    terabyte = iter(cut([SourceFile("optimizer.pt", 2**40)], shard_size))
    assert next(terabyte) == ShardPlan((Piece(0, 0, shard_size),))
    assert sum(1 for _ in terabyte) == 2**40 // shard_size - 1
    tiny = cut((SourceFile(str(i), 1000) for i in range(200_000)), shard_size)
    assert [len(plan.pieces) for plan in tiny] == [33_554] * 5 + [32_230]
