"""When a checkpoint is complete, and what is said of one that is not."""

from __future__ import annotations

import pytest
from tests.layouts import LAYOUTS, archive, dcp_metadata, safetensors, weight_index
from tests.unit.core.snapshots import Contents, examined, snapshot_of, unit_of

from ckptd.core.checkpoint_units import DONE_MARKER, Entry, Kind
from ckptd.core.completeness import (
    Assessment,
    Complete,
    Incomplete,
    LeftOut,
    assess,
    temporary_part,
    to_examine,
)

CHANGED_NS = 10**18
SECOND_NS = 10**9


def assessed(
    contents: Contents, path: str = "step-1", *, later_s: float = 1.0, unchanged_s: float = 1.0
) -> Assessment:
    """What is decided `later_s` after the last change."""
    unit, found = unit_of(snapshot_of(contents, changed_ns=CHANGED_NS), path)
    return assess(
        unit,
        found,
        examined(unit, found, contents),
        wall_ns=CHANGED_NS + int(later_s * SECOND_NS),
        unchanged_s=unchanged_s,
    )


def reason(contents: Contents, path: str = "step-1", **times: float) -> str:
    """Why it is not complete."""
    found = assessed(contents, path, **times)
    assert isinstance(found, Incomplete)
    return found.reason


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_trainers_write_is_complete_in_the_end(layout: str) -> None:
    made = LAYOUTS[layout]()
    for path in made.checkpoints:
        assert isinstance(assessed(made.contents(), path), Complete), path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_file_of_a_layout_may_be_cut(layout: str) -> None:
    made = LAYOUTS[layout]()
    decisive = (".safetensors", ".pt", ".pth", ".ckpt", ".gguf", ".index.json", "r_state.json")
    for path, content in made.writes:
        if not path.endswith(decisive):
            continue
        for unit in made.checkpoints:
            below = path.removeprefix(f"{unit}/") if path != unit else path.rpartition("/")[2]
            if below in made.checkpoints[unit]:
                cut = made.contents() | {path: content[: len(content) // 2]}
                assert below in reason(cut, unit)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_can_tell_are_incomplete_until_their_last_file(layout: str) -> None:
    made = LAYOUTS[layout]()
    for unit, last in made.incomplete_until.items():
        written: dict[str, bytes] = {}
        for path, content in made.writes:
            written[path] = content
            if path == last:
                break
            if any(one == unit or one.startswith(f"{unit}/") for one in written):
                assert isinstance(assessed(written, unit), Incomplete)
        assert isinstance(assessed(written, unit), Complete)


def test_the_reason_names_the_file_and_how_much_is_there() -> None:
    content = safetensors(2_400_000)[:1_200_000]
    name = "model-00002-of-00003.safetensors"
    assert reason({f"step-1/{name}": content}) == f"{name} has 1.2 of 2.4 MB"


def test_what_an_index_names_must_be_there() -> None:
    contents = {
        "step-1/sub/a.safetensors": safetensors(),
        "step-1/sub/x.safetensors.index.json": weight_index(["a.safetensors", "b.safetensors"]),
    }
    expected = "sub/b.safetensors is not there yet: sub/x.safetensors.index.json names it"
    assert reason(contents) == expected
    contents["step-1/sub/b.safetensors/"] = b""
    assert reason(contents) == expected
    del contents["step-1/sub/b.safetensors/"]
    contents["step-1/sub/b.safetensors"] = safetensors()
    assert isinstance(assessed(contents), Complete)


def test_of_numbered_files_all_must_be_there() -> None:
    contents: dict[str, bytes] = {"step-1/w-00002-of-00003.pt": archive()}
    assert reason(contents) == "w-00001-of-00003.pt is not there yet"
    contents["step-1/w-00001-of-00003.pt"] = archive()
    assert reason(contents) == "w-00003-of-00003.pt is not there yet"
    contents["step-1/w-00003-of-00003.pt"] = archive()
    assert isinstance(assessed(contents), Complete)


@pytest.mark.parametrize(
    ("stem", "suffix", "count", "needed"),
    [
        ("model", ".safetensors", 2, True),
        ("pytorch_model", ".bin", 2, True),
        ("diffusion_pytorch_model", ".safetensors", 2, True),
        ("model", ".safetensors", 1, False),
        ("model", ".pt", 2, False),
        ("consolidated", ".safetensors", 2, False),
    ],
)
def test_numbered_files_need_an_index_where_libraries_always_write_one(
    stem: str, suffix: str, count: int, needed: bool
) -> None:
    content = safetensors() if suffix == ".safetensors" else archive()
    names = [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]
    contents = {f"step-1/{name}": content for name in names}
    if needed:
        assert reason(contents) == f"{stem}{suffix}.index.json is not there yet"
        contents[f"step-1/{stem}{suffix}.index.json"] = weight_index(names)
    assert isinstance(assessed(contents), Complete)


def test_a_trainers_checkpoint_with_an_optimizer_needs_its_state() -> None:
    contents = {"run/checkpoint-5/optimizer.pt": archive()}
    assert reason(contents, "run/checkpoint-5") == "trainer_state.json is not there yet"
    contents["run/checkpoint-5/trainer_state.json"] = b"{}"
    assert isinstance(assessed(contents, "run/checkpoint-5"), Complete)
    assert isinstance(assessed({"step-5/optimizer.pt": archive()}, "step-5"), Complete)
    nested = {"step-1/checkpoint-5/optimizer.pt": archive()}
    assert reason(nested) == "checkpoint-5/trainer_state.json is not there yet"


def test_distributed_checkpoints_need_their_metadata_and_all_files() -> None:
    contents = {"step-1/m/__0_0.distcp": b"x"}
    assert reason(contents) == "m/.metadata is not there yet: it is written last"
    contents["step-1/m/.metadata"] = dcp_metadata(["__0_0.distcp", "__1_0.distcp"])
    assert reason(contents) == "m/__1_0.distcp is not there yet: m/.metadata names it"


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Kind.DANGLING_LINK, "a link to nothing"),
        (Kind.SPECIAL, "a device, fifo or socket"),
        (Kind.UNREADABLE, "cannot be read"),
    ],
)
def test_what_cannot_be_stored_is_named(kind: Kind, words: str) -> None:
    contents: Contents = {"step-1/w.npy": b"x", "step-1/odd\n": Entry(kind)}
    assert reason(contents).startswith("'odd\\n' ")
    assert words in reason(contents)


def test_long_names_are_cut_in_messages() -> None:
    name = "step-1/" + "/".join(["d" * 200, "e" * 50])
    assert len(reason({name: Entry(Kind.DANGLING_LINK)})) < 300


def test_without_any_file_it_is_not_complete() -> None:
    assert reason({"step-1/sub/": b""}) == "holds no file yet"
    assert reason({"step-1/a.tmp": b"x"}, later_s=600) == "holds no file yet"


# -- temporary names


def test_a_temporary_file_makes_it_incomplete_until_it_is_stale() -> None:
    contents = {"step-1/w.npy": b"x", "step-1/sub/a.tmp": b"x"}
    assert reason(contents, later_s=599) == "sub/a.tmp is a temporary name: it is not finished"
    found = assessed(contents, later_s=600)
    assert isinstance(found, Complete)
    assert found.excluded == {"sub/a.tmp"}
    assert "sub/a.tmp" in found.warnings[0]


def test_a_temporary_file_from_the_future_is_stale_once_nobody_changed_it() -> None:
    contents = {"step-1/w.npy": b"x", "step-1/a.part": b"x"}
    assert reason(contents, later_s=-9999, unchanged_s=599)
    assert isinstance(assessed(contents, later_s=-9999, unchanged_s=600), Complete)


def test_a_temporary_directory_counts_with_all_below_it() -> None:
    contents: dict[str, bytes | Entry] = {
        "step-1/w.npy": b"x",
        "step-1/.~tmp~/a": b"x",
        "step-1/.~tmp~/b.tmp": b"x",
    }
    found = assessed(contents, later_s=600)
    assert isinstance(found, Complete)
    assert found.excluded == {".~tmp~"}
    changed_ns = CHANGED_NS + 500 * SECOND_NS
    contents["step-1/.~tmp~/deep/c"] = Entry(Kind.FILE, 1, changed_ns, changed_ns, 1)
    assert reason(contents, later_s=600)


def test_what_rsync_writes_is_told_by_the_name_it_will_have() -> None:
    contents = {"step-1/w.npy": b"x", "step-1/d/.model.safetensors.Ab3dEf": b"12345"}
    assert reason(contents) == "d/model.safetensors is being written, 5 bytes so far"


def test_temporary_files_are_not_examined() -> None:
    contents = {"step-1/tmp-a.safetensors": b"x", "step-1/b.tmp/c.pt": b"x", "step-1/d.pt": b"x"}
    _, found = unit_of(snapshot_of(contents), "step-1")
    assert to_examine(found) == {"d.pt": "zip"}
    torn: Contents = {
        "step-1/w.npy": b"x",
        "step-1/tmp-x/w-00001-of-00002.pt": archive(),
        "step-1/tmp-x/__0_0.distcp": b"x",
    }
    assert isinstance(assessed(torn, later_s=600), Complete)


def test_a_checkpoint_with_a_temporary_name_is_never_stored() -> None:
    contents = {"run/tmp-checkpoint-5/model.safetensors": safetensors()}
    path = "run/tmp-checkpoint-5"
    assert reason(contents, path).startswith("run/tmp-checkpoint-5 is a temporary name")
    found = assessed(contents, path, later_s=600)
    assert isinstance(found, LeftOut)
    assert path in found.warning
    above = {"run.tmp/step-1/w.npy": b"x"}
    assert reason(above, "run.tmp/step-1").startswith("run.tmp is a temporary name")


def test_directories_of_their_own_and_stale_files_are_excluded_together() -> None:
    contents = {"run/w.bin": archive(), "run/step-2/w.bin": archive(), "run/a.tmp": b"x"}
    found = assessed(contents, "run", later_s=600)
    assert isinstance(found, Complete)
    assert found.excluded == {"step-2", "a.tmp"}


def test_a_done_marker_is_told() -> None:
    contents = {"step-1/w.npy": b"x", f"step-1/{DONE_MARKER}": b""}
    assert assessed(contents) == Complete(done=True)
    torn = {"step-1/w.pt": archive()[:-1], f"step-1/{DONE_MARKER}": b""}
    assert reason(torn)


@pytest.mark.parametrize(
    ("path", "part"),
    [("", ""), ("a/b", ""), ("a/tmp-b/c.tmp", "a/tmp-b"), ("a/b.part", "a/b.part")],
)  # fmt: skip
def test_the_first_temporary_part_counts(path: str, part: str) -> None:
    assert temporary_part(path) == part
