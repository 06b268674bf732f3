"""A node's small files: the old one or the new one, whatever happens, and nothing else."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from tests.model_disk import ModelDisk
from tests.unit.store.call_hooks import ProcessDied, dies_at
from tests.unit.store.workload import STORE_ID, make_store

from ckptd.errors import StoreOperationFailed
from ckptd.store.filesystem import OPERATING_SYSTEM
from ckptd.store.marker import StoreDirectory, init_store, open_store
from ckptd.store.state_file import StateFile

PATH = "/disk/store"


def state_file(directory: StoreDirectory, max_bytes: int = 100) -> StateFile:
    return StateFile(directory, "some.json", max_bytes=max_bytes)


def new_disk() -> ModelDisk:
    disk = ModelDisk()
    disk.mkdir("/disk")
    init_store(PATH, store_id=STORE_ID, filesystem=disk)
    open_store(PATH, filesystem=disk).close()
    disk.make_all_durable()
    return disk


def read_after_start(disk: ModelDisk) -> bytes | None:
    with open_store(PATH, filesystem=disk) as directory:
        return state_file(directory).read()


def test_what_was_written_last_is_read(tmp_path: Path) -> None:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as directory:
        file = state_file(directory)
        assert file.read() is None
        file.write(b"one")
        file.write(b"two")
        assert file.read() == b"two"
        assert os.listdir(directory.incoming) == []


def test_what_is_too_long_is_neither_written_nor_read(tmp_path: Path) -> None:
    with make_store(str(tmp_path / "store"), OPERATING_SYSTEM) as directory:
        file = state_file(directory, max_bytes=3)
        with pytest.raises(StoreOperationFailed):
            file.write(b"four")
        assert file.read() is None
        Path(file.path).write_bytes(b"four")
        assert file.read() is None


def test_a_power_cut_at_any_call_leaves_the_old_or_the_new() -> None:
    for number in itertools.count(1):
        disk = new_disk()
        with open_store(PATH, filesystem=disk) as directory:
            state_file(directory).write(b"old")
        hooked = dies_at(disk, number)
        written = False
        try:
            with open_store(PATH, filesystem=hooked.port) as directory:
                state_file(directory).write(b"new")
                written = True
        except ProcessDied:
            pass
        found = {read_after_start(cut) for cut in disk.after_power_cut()}
        assert found <= ({b"new"} if written else {b"old", b"new"})
        if written:
            return
