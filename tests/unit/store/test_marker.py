"""A directory becomes a store once and on purpose, and one process at a time opens it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.model_disk import ModelDisk
from tests.unit.store.workload import STORE_ID

from ckptd.errors import Refused, StoreLocked, StoreMarkerMissing, StoreOperationFailed
from ckptd.store.marker import init_store, open_store, read_marker

OTHER_ID = "f" * 32


def test_the_marker_is_what_the_format_says(tmp_path: Path) -> None:
    assert init_store(str(tmp_path / "store"), store_id=STORE_ID) == STORE_ID
    marker = tmp_path / "store" / "ckptd-store.json"
    assert marker.read_bytes() == (
        b'{"format": "ckptd-store-1", "store_id": "0123456789abcdef0123456789abcdef"}\n'
    )
    assert os.listdir(tmp_path / "store") == ["ckptd-store.json"]


def test_init_of_a_store_leaves_it_as_it_is(tmp_path: Path) -> None:
    init_store(str(tmp_path), store_id=STORE_ID)
    open_store(str(tmp_path)).close()
    assert init_store(str(tmp_path), store_id=OTHER_ID) == STORE_ID
    assert read_marker(str(tmp_path)) == STORE_ID


@pytest.mark.parametrize("allowed", ["lost+found", "ckptd-store.json.new"])
def test_init_accepts_a_fresh_disk_and_an_init_that_was_cut_off(
    tmp_path: Path, allowed: str
) -> None:
    if allowed == "lost+found":
        (tmp_path / allowed).mkdir()
    else:
        (tmp_path / allowed).write_text("{")
    assert init_store(str(tmp_path), store_id=STORE_ID) == STORE_ID
    assert "ckptd-store.json.new" not in os.listdir(tmp_path)


@pytest.mark.parametrize("foreign", ["photo.jpg", "shards", ".hidden"])
def test_init_refuses_a_directory_with_other_content(tmp_path: Path, foreign: str) -> None:
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(Refused) as caught:
        init_store(str(tmp_path), store_id=STORE_ID)
    assert foreign in caught.value.message and caught.value.next
    assert os.listdir(tmp_path) == [foreign]


def test_init_makes_the_directory_but_not_its_parents(tmp_path: Path) -> None:
    with pytest.raises(StoreOperationFailed):
        init_store(str(tmp_path / "not" / "there"), store_id=STORE_ID)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("store_id", ["", "G" * 32, "0" * 31, "0" * 32 + "\n"])
def test_a_malformed_store_id_is_a_mistake(tmp_path: Path, store_id: str) -> None:
    with pytest.raises(ValueError):
        init_store(str(tmp_path), store_id=store_id)


def test_without_a_marker_nothing_is_opened_and_nothing_written(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(StoreMarkerMissing) as caught:
            open_store(str(path))
        assert "Is the disk mounted?" in caught.value.message
        assert "ckptd serve --init" in caught.value.next
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"format": "ckptd-store-2", "store_id": "0123456789abcdef0123456789abcdef"}',
        b'{"format": "ckptd-store-1", "store_id": "short"}',
        b'{"format": "ckptd-store-1", "store_id": 7}',
    ],
)
def test_a_damaged_marker_is_neither_trusted_nor_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ckptd-store.json").write_bytes(content)
    for attempt in (
        lambda: open_store(str(tmp_path)),
        lambda: init_store(str(tmp_path), store_id=STORE_ID),
    ):
        with pytest.raises(StoreMarkerMissing):
            attempt()
    assert (tmp_path / "ckptd-store.json").read_bytes() == content


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    init_store(str(tmp_path), store_id=STORE_ID)
    first = open_store(str(tmp_path))
    with pytest.raises(StoreLocked) as caught:
        open_store(str(tmp_path))
    assert caught.value.next
    first.close()
    first.close()
    open_store(str(tmp_path)).close()


def test_opening_empties_incoming(tmp_path: Path) -> None:
    init_store(str(tmp_path), store_id=STORE_ID)
    open_store(str(tmp_path)).close()
    (tmp_path / "incoming" / "half").write_bytes(b"half a shard")
    with open_store(str(tmp_path)) as directory:
        assert os.listdir(directory.incoming) == []
        assert directory.store_id == STORE_ID


def test_a_parent_that_may_not_be_read_does_not_stop_init() -> None:
    class ClosedParent(ModelDisk):
        def fsync_directory(self, path: str) -> None:
            if path == "/disk":
                raise PermissionError(errno.EACCES, "not permitted", path)
            super().fsync_directory(path)

    disk = ClosedParent()
    disk.mkdir("/disk")
    disk.mkdir("/disk/store")
    assert init_store("/disk/store", store_id=STORE_ID, filesystem=disk) == STORE_ID
