"""The failed state: what sets it, that it stays, and what does not set it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.model_disk import ModelDisk
from tests.unit.store.call_hooks import Call, Hooked
from tests.unit.store.workload import make_store

from ckptd.errors import CkptdError, MediumFailed, NoRoom, StoreOperationFailed
from ckptd.store.medium import FAILED_ERRNOS, NO_ROOM_ERRNOS, Medium


def good() -> None:
    """A marker that can be read."""


def run(medium: Medium, code: int) -> CkptdError:
    with pytest.raises(CkptdError) as caught, medium.operation("do it"):
        raise OSError(code, os.strerror(code))
    return caught.value


@pytest.mark.parametrize("code", sorted(FAILED_ERRNOS))
def test_errors_of_the_disk_set_the_state_for_good(code: int) -> None:
    medium = Medium("/srv/store", good)
    assert type(run(medium, code)) is MediumFailed
    assert medium.failed is not None and "do it" in medium.failed
    with pytest.raises(MediumFailed), medium.operation("later"):
        pytest.fail("nothing may run on a failed disk")
    assert medium.check() is False, "only a restart ends the state"


@pytest.mark.parametrize("code", sorted(NO_ROOM_ERRNOS))
def test_a_full_disk_has_not_failed(code: int) -> None:
    medium = Medium("/srv/store", good)
    assert type(run(medium, code)) is NoRoom
    assert medium.failed is None and medium.check() is True


@pytest.mark.parametrize("code", [errno.EACCES, errno.EMFILE, errno.ENOMEM, errno.ENOENT])
def test_other_errors_say_nothing_about_the_disk(code: int) -> None:
    medium = Medium("/srv/store", good)
    error = run(medium, code)
    assert type(error) is StoreOperationFailed and error.next
    assert medium.failed is None


def test_an_error_without_a_number_is_told_all_the_same() -> None:
    medium = Medium("/srv/store", good)
    assert "BlockingIOError" in medium.translate("lock", BlockingIOError("busy")).message


def test_an_operation_that_ends_after_a_failure_elsewhere_does_not_succeed() -> None:
    medium = Medium("/srv/store", good)
    with pytest.raises(MediumFailed), medium.operation("slow"):
        medium.fail("first")
        medium.fail("second")
    assert medium.failed == "first"


def test_the_check_reads_the_marker_past_the_cache(tmp_path: Path) -> None:
    disk = ModelDisk()
    disk.mkdir("/disk")
    hooked = Hooked(disk)
    with make_store("/disk/store", hooked.port) as directory:
        earlier = len(hooked.calls)
        assert directory.medium.check() is True
        names = [call.name for call in hooked.calls[earlier:]]
        assert names.index("drop_cache") < names.index("pread_into")


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOENT, errno.EACCES, errno.ESTALE])
def test_a_marker_that_cannot_be_read_fails_the_disk(code: int) -> None:
    failing = False

    def before(call: Call) -> None:
        if failing and call.name == "open":
            raise OSError(code, os.strerror(code))

    disk = ModelDisk()
    disk.mkdir("/disk")
    with make_store("/disk/store", Hooked(disk, before).port) as directory:
        failing = True
        assert directory.medium.check() is False
        failing = False
        assert directory.medium.check() is False


def test_another_store_mounted_in_its_place_fails_the_disk() -> None:
    disk = ModelDisk()
    disk.mkdir("/disk")
    with make_store("/disk/store", disk) as directory:
        marker = disk.open("/disk/store/ckptd-store.json", os.O_RDWR)
        text = b'{"format": "ckptd-store-1", "store_id": "%s"}\n' % (b"f" * 32)
        disk.pwrite(marker, memoryview(text), 0)
        assert directory.medium.check() is False
        assert "another store" in str(directory.medium.failed)
