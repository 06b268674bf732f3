"""What a restore has to write, from the manifest and what was asked for."""

from __future__ import annotations

import hashlib

import pytest

from ckptd.client.restore_plan import (
    MADE_DIRECTORY_MODE,
    MERGED_NAME,
    RestorePlan,
    plan_files,
    plan_tensors,
    plan_whole,
)
from ckptd.core.documents import (
    DirectoryEntry,
    Entry,
    FileEntry,
    Manifest,
    Part,
    ShardReference,
    SymlinkEntry,
    content_id,
)
from ckptd.core.layout import Write
from ckptd.core.tensor_index import TensorRecord
from ckptd.errors import NotFound

SHARDS = (
    ShardReference("11" * 32, 100),
    ShardReference("22" * 32, 50),
    ShardReference("33" * 32, 9),
)


def file(path: str, *parts: Part, mode: int = 0o644) -> FileEntry:
    size = sum(part.length for part in parts)
    return FileEntry(path, mode, size, hashlib.sha256(path.encode()).hexdigest(), parts)


ENTRIES: tuple[Entry, ...] = (
    file("model.safetensors", Part(0, 0, 100), Part(1, 10, 40)),
    file("sub/deep/state.json", Part(1, 0, 10), mode=0o600),
    file("empty"),
    DirectoryEntry("sub", 0o750),
    DirectoryEntry("alone", 0o700),
    SymlinkEntry("sub/link", "../model.safetensors"),
    SymlinkEntry("again", "sub/link"),
    SymlinkEntry("where", "sub"),
    SymlinkEntry("loop", "loop"),
)


def manifest(entries: tuple[Entry, ...] = ENTRIES) -> Manifest:
    return Manifest(
        format=1,
        cluster="home",
        name="run/step-1",
        order=1,
        created="2026-01-01T00:00:00Z",
        host="mac",
        nonce="00" * 16,
        unit="directory",
        content_id=content_id(entries),
        copies=2,
        redundancy="copies",
        mode=0o711,
        entries=entries,
        shards=SHARDS,
        tensor_index=2,
    )


def paths(plan: RestorePlan) -> list[str]:
    return [file.path for file in plan.files]


def test_everything_but_the_tensor_index_is_fetched() -> None:
    plan = plan_whole(manifest())
    assert [shard.size for shard in plan.shards] == [100, 50]
    assert list(plan.shards[1].writes) == [Write(1, 0, 0, 10), Write(0, 100, 10, 40)]
    assert paths(plan) == ["model.safetensors", "sub/deep/state.json", "empty"]
    assert (plan.size, plan.fetched_size, plan.root_mode) == (150, 150, 0o711)
    assert set(plan.symlinks) == {
        ("sub/link", "../model.safetensors"),
        ("again", "sub/link"),
        ("where", "sub"),
        ("loop", "loop"),
    }


def test_directories_come_before_what_is_in_them() -> None:
    plan = plan_whole(manifest())
    # sub/deep is in no entry of its own, and is made all the same.
    assert dict(plan.directories) == {
        "sub": 0o750,
        "alone": 0o700,
        "sub/deep": MADE_DIRECTORY_MODE,
    }
    order = [path for path, _ in plan.directories]
    assert order.index("sub") < order.index("sub/deep")


def test_picked_files_bring_their_directories_and_nothing_else() -> None:
    plan = plan_files(manifest(), ["*.json"])
    assert paths(plan) == ["sub/deep/state.json"]
    assert dict(plan.directories) == {"sub": 0o750, "sub/deep": MADE_DIRECTORY_MODE}
    assert plan.symlinks == ()
    with pytest.raises(NotFound, match="nearest"):
        plan_files(manifest(), ["*.yaml"])


@pytest.mark.parametrize("link", ["sub/link", "again"])
def test_a_picked_link_is_what_it_leads_to(link: str) -> None:
    plan = plan_files(manifest(), [link])
    assert paths(plan) == [link]
    assert plan.files[0].size == 140
    assert [write.output_index for shard in plan.shards for write in shard.writes] == [0, 0]


@pytest.mark.parametrize("link", ["where", "loop"])
def test_links_to_no_file_cannot_be_picked(link: str) -> None:
    with pytest.raises(NotFound):
        plan_files(manifest(), [link])


def test_a_file_behind_a_linked_directory_is_found() -> None:
    entries = (*ENTRIES, SymlinkEntry("through", "where/deep/state.json"))
    plan = plan_files(manifest(entries), ["through"])
    assert [(f.path, f.size, f.mode) for f in plan.files] == [("through", 10, 0o600)]


def test_tensors_become_one_file_with_its_header() -> None:
    record = TensorRecord("w", "model.safetensors", "U8", (30,), 90, 120)
    plan = plan_tensors(manifest(), [record], {"format": "pt"})
    header = plan.heads[0]
    assert paths(plan) == [MERGED_NAME]
    assert plan.size == len(header) + 30
    assert [list(shard.writes) for shard in plan.shards] == [
        [Write(0, len(header), 90, 10)],
        [Write(0, len(header) + 10, 10, 20)],
    ]
