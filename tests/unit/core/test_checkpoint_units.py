"""Which directories and files are checkpoints, what belongs to them, and what they are called."""

from __future__ import annotations

import pytest
from tests.layouts import LAYOUTS
from tests.unit.core.snapshots import Contents, snapshot_of, unit_of

from ckptd.core.checkpoint_units import (
    CHECKPOINT_MARKER,
    DONE_MARKER,
    Entry,
    Kind,
    Members,
    Unit,
    find_units,
    is_own_leftover,
    is_temporary,
    members,
    step_of,
)


def found(contents: Contents, *, prefix: str = "", pattern: str = "") -> list[str]:
    """The paths of the checkpoints."""
    units = find_units(snapshot_of(contents), prefix=prefix, pattern=pattern)
    assert not units.refused
    return [unit.path for unit in units.units]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_trainers_write_is_found_with_what_belongs_to_it(layout: str) -> None:
    made = LAYOUTS[layout]()
    snapshot = snapshot_of(made.contents())
    units = find_units(snapshot)
    assert not units.refused
    belongs = {}
    for unit in units.units:
        content = members(snapshot, unit)
        assert content is not None
        belongs[unit.path] = set(content.entries)
    assert belongs == made.checkpoints


@pytest.mark.parametrize(
    "name",
    ["checkpoint-1", "step-2", "step_3", "epoch-4", "epoch_5", "iter_6", "global_step7", "ckpt-8"],
)
def test_a_directory_named_as_a_step_is_a_checkpoint_whatever_it_holds(name: str) -> None:
    assert found({f"run/{name}/state.msgpack": b"x"}) == [f"run/{name}"]
    assert found({f"run/{name}/": b""}) == [f"run/{name}"]
    assert found({f"{name}/sub/step-1/model.safetensors": b"x"}) == [name]
    assert step_of(f"run/{name}") == int(name[-1])


@pytest.mark.parametrize(
    "name", ["checkpoint", "checkpoint-", "checkpoint-1a", "Step-1", "iter-1", "global_step_1",
             "my-step-1", "step-1-old", "step-١", "step-" + "1" * 19]
)  # fmt: skip
def test_other_names_are_no_steps(name: str) -> None:
    assert found({f"run/{name}/notes.txt": b"x"}) == []
    assert step_of(name) is None


@pytest.mark.parametrize(
    "name", ["a.safetensors", "a.pt", "a.pth", "a.bin", "a.ckpt", "a.npz", "a.gguf",
             "model_index.json"]
)  # fmt: skip
def test_a_directory_that_directly_holds_checkpoint_files_is_one(name: str) -> None:
    assert found({f"run/x/{name}": b"x", "run/other/notes.txt": b"x"}) == ["run/x"]
    link = Entry(Kind.FILE_LINK, 1, 1, 1, 1)
    assert found({f"run/x/{name}": link}) == ["run/x"]


def test_distributed_checkpoints_need_both_kinds_of_files() -> None:
    assert found({"a/.metadata": b"x", "a/__0_0.distcp": b"x"}) == ["a"]
    assert found({"a/.metadata": b"x"}) == []
    assert found({"a/__0_0.distcp": b"x"}) == []


def test_only_files_count_not_directories_or_links_to_directories() -> None:
    assert found({"a/model.bin/": b""}) == []
    assert found({"a/model.bin": Entry(Kind.DIRECTORY_LINK)}) == []
    assert found({"a/model.bin": Entry(Kind.SPECIAL)}) == []


def test_single_files_count_in_the_root_alone() -> None:
    assert found({"a.safetensors": b"x", "b.txt": b"x", "model_index.json": b"{}"}) == [
        "a.safetensors"
    ]
    assert found({".metadata": b"x", "__0_0.distcp": b"x"}) == []


def test_steps_below_a_model_are_checkpoints_of_their_own() -> None:
    snapshot = snapshot_of(
        {
            "run/model.bin": b"x",
            "run/logs/events": b"x",
            "run/checkpoint-1/model.bin": b"x",
            "run/deep/step-2/sub/model.bin": b"x",
            "run/deep/more/model.bin": b"x",
        }
    )
    assert [unit.path for unit in find_units(snapshot).units] == [
        "run",
        "run/checkpoint-1",
        "run/deep/step-2",
    ]
    _, content = unit_of(snapshot, "run")
    assert set(content.entries) == {
        "model.bin", "logs", "logs/events", "deep", "deep/more", "deep/more/model.bin"
    }  # fmt: skip
    assert content.excluded == {"checkpoint-1", "deep/step-2"}
    assert content.size == 3


def test_a_marker_makes_a_checkpoint_with_all_below_it() -> None:
    contents = {
        f"odd/{CHECKPOINT_MARKER}": b"",
        "odd/step-1/x": b"x",
        "model/weights.bin": b"x",
        f"model/lora/{CHECKPOINT_MARKER}": b"",
    }
    assert found(contents) == ["model", "model/lora", "odd"]
    _, content = unit_of(snapshot_of(contents), "odd")
    assert set(content.entries) == {CHECKPOINT_MARKER, "step-1", "step-1/x"}
    _, content = unit_of(snapshot_of(contents), "model")
    assert set(content.entries) == {"weights.bin"}


def test_a_marker_with_content_or_of_another_kind_is_none() -> None:
    assert found({f"odd/{CHECKPOINT_MARKER}": b"x", "odd/y": b"y"}) == []
    assert found({f"odd/{CHECKPOINT_MARKER}/": b"", "odd/y": b"y"}) == []


def test_a_marker_in_the_root_needs_a_prefix_as_name() -> None:
    snapshot = snapshot_of({CHECKPOINT_MARKER: b"", "step-1/x": b"x"})
    (unit,) = find_units(snapshot, prefix="mine/all").units
    assert (unit.path, unit.name) == ("", "mine/all")
    content = members(snapshot, unit)
    assert content is not None
    assert set(content.entries) == {CHECKPOINT_MARKER, "step-1", "step-1/x"}
    units = find_units(snapshot)
    assert not units.units
    assert "prefix" in units.refused[0].reason


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*/final", ["a/final", "b/final"]),
        ("a/*", ["a/final", "a/step-1"]),
        ("**/best", ["b/deep/best"]),
        ("**/*.onnx", ["b/deep/model.onnx"]),
        ("?/step-?", ["a/step-1"]),
        ("*", ["a", "b"]),
        ("/a/", ["a"]),
        ("a.final", []),
    ],
)
def test_a_pattern_replaces_recognition(pattern: str, expected: list[str]) -> None:
    contents = {
        "a/final/x": b"x",
        "a/step-1/model.bin": b"x",
        "b/final/x": b"x",
        "b/deep/best/x": b"x",
        "b/deep/model.onnx": b"x",
    }
    assert found(contents, pattern=pattern) == expected


def test_a_marker_counts_beside_a_pattern() -> None:
    assert found({f"x/{CHECKPOINT_MARKER}": b"", "y/a.bin": b"x"}, pattern="z") == ["x"]


def test_names_are_paths_below_the_prefix() -> None:
    snapshot = snapshot_of({"run/step-1/x": b"x"})
    assert find_units(snapshot).units == [Unit("run/step-1", "run/step-1", "directory")]
    assert find_units(snapshot, prefix="mac/a").units[0].name == "mac/a/run/step-1"


def test_what_cannot_be_a_name_is_refused_with_the_reason() -> None:
    units = find_units(snapshot_of({"a@b/step-1/x": b"x", "~c/step-2/x": b"x", "d/step-3/x": b""}))
    assert [unit.path for unit in units.units] == ["d/step-3"]
    assert [(unit.path, "@" in unit.reason) for unit in units.refused] == [
        ("a@b/step-1", True),
        ("~c/step-2", False),
    ]
    undecodable = find_units(snapshot_of({"\udcff/step-1/x": b"x"}))
    assert "UTF-8" in undecodable.refused[0].reason


def test_what_cannot_be_read_is_refused_unless_it_lies_in_a_checkpoint() -> None:
    unreadable = Entry(Kind.UNREADABLE)
    units = find_units(snapshot_of({"a/secret": unreadable, "m/w.bin": b"x", "m/s": unreadable}))
    assert [unit.path for unit in units.refused] == ["a/secret"]
    assert [unit.path for unit in units.units] == ["m"]


def test_leftovers_of_a_restore_are_never_checkpoints() -> None:
    leftover = ".step-1.ckptd-restore-0123abcd"
    assert is_own_leftover(leftover)
    assert is_own_leftover(".x.ckptd-old-0123abcd")
    assert is_own_leftover(".ckptd-probe-x")
    assert not is_own_leftover("ckptd-old-1")
    contents = {f"run/{leftover}/model.bin": b"x", "run/w.bin": b"x"}
    assert found(contents) == ["run"]
    _, content = unit_of(snapshot_of(contents), "run")
    assert set(content.entries) == {"w.bin"}


@pytest.mark.parametrize(
    "name",
    ["tmp-checkpoint-5", "a.tmp", "a.part", "a.incomplete", ".~tmp~", ".model.safetensors.Ab3dEf",
     "tmp-"],
)  # fmt: skip
def test_temporary_names(name: str) -> None:
    assert is_temporary(name)


@pytest.mark.parametrize(
    "name", ["tmp", "atmp-x", "a.tmp.b", "a.parts", "model.Ab3dEf", ".model.Ab3dE", ".Ab3dEf"]
)  # fmt: skip
def test_names_that_are_not_temporary(name: str) -> None:
    assert not is_temporary(name)


def test_a_temporary_file_in_the_root_is_no_checkpoint() -> None:
    assert found({"tmp-a.safetensors": b"x"}) == []


def test_a_unit_that_has_gone_has_no_members() -> None:
    assert members(snapshot_of({}), Unit("a", "a", "directory")) is None
    assert members(snapshot_of({}), Unit("a.pt", "a.pt", "file")) is None
    assert members(snapshot_of({"a.pt/": b""}), Unit("a.pt", "a.pt", "file")) is None
    assert members(snapshot_of({}), Unit("x/a.pt", "x/a.pt", "file")) is None


def entries(**changes: int) -> dict[str, Entry]:
    fields = {"size": 1, "mtime_ns": 2, "ctime_ns": 3, "inode": 4} | changes
    return {"w.bin": Entry(Kind.FILE, **fields)}


def test_the_fingerprint_changes_with_every_change_of_a_file() -> None:
    fingerprints = {
        Members(made).fingerprint()
        for made in (
            entries(),
            entries(size=9),
            entries(mtime_ns=9),
            entries(ctime_ns=9),
            entries(inode=9),
            {"w2.bin": entries()["w.bin"]},
            {"w.bin": Entry(Kind.FILE_LINK, 1, 2, 3, 4)},
            entries() | {"d": Entry(Kind.DIRECTORY, 0, 1, 1, 1)},
            {},
        )
    }
    assert len(fingerprints) == 9


def test_the_fingerprint_ignores_times_of_directories_and_the_marker() -> None:
    one = Members({"d": Entry(Kind.DIRECTORY, 0, 1, 1, 1)})
    assert one.fingerprint() == Members({"d": Entry(Kind.DIRECTORY, 9, 9, 9, 9)}).fingerprint()
    contents = {"step-1/w.bin": b"x"}
    _, without = unit_of(snapshot_of(contents), "step-1")
    _, marked = unit_of(snapshot_of(contents | {f"step-1/{DONE_MARKER}": b""}), "step-1")
    assert marked.fingerprint() == without.fingerprint()
    assert Members({"\udcff": Entry(Kind.FILE)}).fingerprint()


def test_a_done_marker_counts_unless_it_is_older_than_a_file() -> None:
    assert not Members(entries(ctime_ns=5)).is_done
    assert Members(entries(ctime_ns=5), marked_ns=5).is_done
    assert not Members(entries(ctime_ns=5), marked_ns=4).is_done
    assert Members({"d": Entry(Kind.DIRECTORY, 0, 9, 9, 9)}, marked_ns=4).is_done
    deep = {f"step-1/sub/{DONE_MARKER}": b"", "step-1/w": b"x"}
    _, content = unit_of(snapshot_of(deep), "step-1")
    assert content.marked_ns is None
    assert f"sub/{DONE_MARKER}" in content.entries
