"""One file-system call fails, for every call and every way to fail: the error is reported, nothing
that was acknowledged is lost, and the disk counts as failed exactly when it is to blame."""

from __future__ import annotations

import errno

import pytest
from tests.model_disk import ModelDisk
from tests.unit.store.call_hooks import Hooked, fails_at
from tests.unit.store.workload import STORE_ID, faults, fill, whole_life

from ckptd.errors import CkptdError, MediumFailed, NoRoom
from ckptd.store.marker import StoreDirectory, init_store, open_store

PATH = "/disk/store"


def new_disk() -> ModelDisk:
    disk = ModelDisk()
    disk.mkdir("/disk")
    return disk


def count_calls() -> int:
    hooked = Hooked(new_disk())
    whole_life(hooked.port, PATH, lambda label: None)
    return len(hooked.calls)


CALLS = range(1, count_calls() + 1)
# Closing the lock at the very end can fail without harm: the process gives it up in any case.
# Every other failure must come out as an error.
HARMLESS = ("close",)


@pytest.mark.parametrize("done", [False, True], ids=["not-done", "done-all-the-same"])
@pytest.mark.parametrize("code", [errno.EIO, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_an_error_at_every_call(code: int, done: bool) -> None:
    expected = NoRoom if code in (errno.ENOSPC, errno.EDQUOT) else MediumFailed
    for number in CALLS:
        disk = new_disk()
        said: set[str] = set()
        hooked = fails_at(disk, number, code, done=done)
        failed_call = None
        opened: list[StoreDirectory] = []
        try:
            init_store(PATH, store_id=STORE_ID, filesystem=hooked.port)
            said.add("init")
            opened.append(open_store(PATH, filesystem=hooked.port))
            fill(opened[0], said.add)
            opened[0].close()
        except CkptdError as error:
            assert type(error) is expected, (hooked.calls[number - 1], error)
            assert errno.errorcode[code] in error.message
            assert error.next
        else:
            failed_call = hooked.calls[number - 1]
            failed_by_itself = done and number not in hooked.results
            assert failed_by_itself or failed_call.name in HARMLESS, failed_call
        if opened and failed_call is None:
            if expected is NoRoom and not (done and hooked.calls[number - 1].name == "open"):
                # At once, and not only at the next start: the room is needed.
                assert disk.list_directory(opened[0].incoming) == [], hooked.calls[number - 1]
            check_after_error(opened[0], said, must_have_failed=expected is MediumFailed)
        disk.restart_process()
        assert faults(disk, PATH, said) == [], hooked.calls[number - 1]


def check_after_error(directory: StoreDirectory, said: set[str], must_have_failed: bool) -> None:
    """A failed disk refuses everything; a full one goes on as soon as there is room."""
    assert (directory.medium.failed is not None) == must_have_failed
    if must_have_failed:
        assert directory.medium.check() is False
        with pytest.raises(MediumFailed):
            fill(directory, said.add)
    else:
        assert directory.medium.check() is True
        fill(directory, said.add)
        assert said == {"init", "first", "document", "same", "other"}


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES])
def test_an_error_that_says_nothing_about_the_disk_is_no_failure_of_it(code: int) -> None:
    for number in CALLS:
        disk = new_disk()
        said: set[str] = set()
        hooked = fails_at(disk, number, code, done=False)
        try:
            whole_life(hooked.port, PATH, said.add)
        except CkptdError as error:
            assert error.kind == "store_operation_failed", error
        disk.restart_process()
        assert faults(disk, PATH, said) == [], hooked.calls[number - 1]
