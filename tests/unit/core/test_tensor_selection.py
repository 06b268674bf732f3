"""Globs over tensors and files, and the merged safetensors file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core.safetensors_header import parse_header, read_length
from ckptd.core.tensor_index import TensorRecord
from ckptd.core.tensor_selection import (
    MergedFile,
    Segment,
    choose_tensors,
    files_matching,
    merge_tensors,
    nearest_names,
)
from ckptd.errors import HeaderInvalid, NotFound, Refused

save: Callable[..., bytes] = safetensors.numpy.save
load: Callable[[bytes], dict[str, np.ndarray]] = safetensors.numpy.load


def record(name: str, file: str = "m.safetensors", begin: int = 0) -> TensorRecord:
    return TensorRecord(name, file, "U8", (4,), begin, begin + 4)


LAYERS = [record(f"encoder.layer.{i}.{part}", begin=8 * i) for i in range(12) for part in "wb"]


def names(records: list[TensorRecord]) -> list[str]:
    return [r.name for r in records]


def test_a_star_matches_dots_and_nothing_matches_by_prefix_alone() -> None:
    assert names(choose_tensors(LAYERS, ["encoder.layer.0.*"])) == [
        "encoder.layer.0.w",
        "encoder.layer.0.b",
    ]
    assert names(choose_tensors(LAYERS, ["*.1?.w", "*.3.b"])) == [
        "encoder.layer.3.b",
        "encoder.layer.10.w",
        "encoder.layer.11.w",
    ]
    assert choose_tensors(LAYERS, ["*"]) == LAYERS


def test_case_counts() -> None:
    records = [record("Wte"), record("wte", begin=4)]
    assert names(choose_tensors(records, ["w*"])) == ["wte"]


def test_a_name_with_brackets_matches_itself() -> None:
    assert names(choose_tensors([record("a[0]"), record("a0")], ["a[0]"])) == ["a[0]", "a0"]
    assert names(choose_tensors([record("a\nb")], ["a?b"])) == ["a\nb"]


def test_no_match_names_the_nearest() -> None:
    with pytest.raises(NotFound) as missing:
        choose_tensors(LAYERS, ["*", "encoder.layers.11.w"])
    assert missing.value.exit_code == 1
    assert "no tensor matches 'encoder.layers.11.w'" in missing.value.message
    assert "nearest: 'encoder.layer.11.w'" in missing.value.message
    with pytest.raises(NotFound, match=r"nearest: 'config\.json'"):
        files_matching(["model.bin", "config.json"], ["conf.json"])
    with pytest.raises(NotFound, match="the checkpoint has no tensors"):
        choose_tensors([], ["*"])
    with pytest.raises(NotFound) as ugly:
        choose_tensors([record("\x1b[2J" + "x" * 500)], ["y" * 500])
    assert ugly.value.message.isprintable()
    assert len(ugly.value.message) < 600


def test_nearest_names_among_many_share_the_longest_beginning() -> None:
    many = [f"model.layers.{i}.mlp.experts.{j}.weight" for i in range(100) for j in range(1000)]
    found = nearest_names("model.layers.77.mlp.expert.5.*", many)
    assert all(name.startswith("model.layers.77.mlp.experts.") for name in found)
    assert len(found) == 3


def test_one_name_in_two_files_is_refused_only_when_it_is_chosen() -> None:
    records = [record("a"), record("b"), record("a", "other.safetensors")]
    assert names(choose_tensors(records, ["b"])) == ["b"]
    with pytest.raises(Refused, match=r"'a' is in two files, 'm.safetensors' and 'other.safe"):
        choose_tensors(records, ["*"])
    with pytest.raises(HeaderInvalid, match="occurs twice"):
        merge_tensors(records, {})


def test_files_match_by_their_whole_path() -> None:
    paths = ["b/c.json", "a.json", "c.JSON", "b/x.bin"]
    assert files_matching(paths, ["*.json"]) == ["b/c.json", "a.json"]
    assert files_matching(paths, ["b/*", "a.json"]) == ["b/c.json", "a.json", "b/x.bin"]


def test_neighbours_become_one_segment() -> None:
    merged = merge_tensors([record("a", begin=100), record("b", begin=104)], {})
    assert merged.segments == (Segment("m.safetensors", 100, 8, len(merged.header)),)
    merged = merge_tensors([record("a", begin=104), record("b", begin=100)], {})
    assert [s.begin for s in merged.segments] == [104, 100]
    merged = merge_tensors([record("a", begin=100), record("b", "n", begin=104)], {})
    assert [s.file for s in merged.segments] == ["m.safetensors", "n"]


def test_no_tensor_gives_a_valid_empty_file() -> None:
    merged = merge_tensors([], {})
    assert merged == MergedFile(merged.header, (), len(merged.header))
    assert load(merged.header) == {}


def assembled(merged: MergedFile, files: dict[str, bytes]) -> bytes:
    output = bytearray(merged.header)
    for segment in merged.segments:
        assert segment.output_offset == len(output)
        output += files[segment.file][segment.begin : segment.begin + segment.length]
    assert len(output) == merged.size
    return bytes(output)


DTYPES = st.sampled_from(["<f4", "<f2", "<i8", "u1", "?"])
SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)


@given(
    st.dictionaries(
        st.text("ab.é", min_size=1, max_size=4), st.tuples(DTYPES, SHAPES, st.integers(0, 2))
    ),
    st.data(),
)
def test_a_merged_selection_is_the_file_that_the_library_would_write(
    tensors: dict[str, tuple[str, tuple[int, ...], int]], choice: st.DataObject
) -> None:
    arrays = {
        name: np.frombuffer(bytes(i % 2 for i in range(8 * 27)), dtype)[: int(np.prod(shape))]
        .reshape(shape)
        .copy()
        for name, (dtype, shape, _) in tensors.items()
    }
    files: dict[str, bytes] = {}
    records: list[TensorRecord] = []
    for number in range(3):
        inside = {name: arrays[name] for name in tensors if tensors[name][2] == number}
        file = save(inside)
        files[str(number)] = file
        length = read_length(file[:8], len(file))
        header = parse_header(file[8 : 8 + length], len(file))
        records.extend(
            TensorRecord(t.name, str(number), t.dtype, t.shape, t.begin, t.end)
            for t in header.tensors
        )
    wanted = choice.draw(st.sets(st.sampled_from(sorted(tensors)))) if tensors else set()
    chosen = [r for r in records if r.name in wanted]
    merged = merge_tensors(chosen, {"format": "pt"})
    expected = save({name: arrays[name] for name in wanted}, {"format": "pt"})
    assert assembled(merged, files) == expected
