"""State of the disk below a store: once it has failed, the store takes no more work.

A disk that returned one I/O error may have lost anything that was acknowledged before, so the node
must stop to vouch for its copies. The state is left only by a restart, which scans the store anew.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from ckptd.errors import CkptdError, MediumFailed, NoRoom, StoreOperationFailed

FAILED_ERRNOS: Final = frozenset(
    {
        errno.EIO,
        errno.EROFS,
        errno.ENODEV,
        errno.ENXIO,
        errno.ESTALE,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        getattr(errno, "ENOMEDIUM", errno.EIO),
        getattr(errno, "EUCLEAN", errno.EIO),  # Linux: the file system's structure is damaged
        getattr(errno, "EREMOTEIO", errno.EIO),
        getattr(errno, "EBADMSG", errno.EIO),  # XFS, ext4: checksum of metadata is wrong
        getattr(errno, "EDEVERR", errno.EIO),  # macOS
    }
)
# A path below the store that leads nowhere: the file may be gone, or the file system below it.
PATH_LOST_ERRNOS: Final = frozenset({errno.ENOENT, errno.ENOTDIR})
NO_ROOM_ERRNOS: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


class Medium:
    """The disk below one store, as far as its errors tell. Thread-safe.

    `path` is the store's directory (for messages); `probe` reads the store's marker past the page
    cache and raises when that is impossible or when it is another store's. It is asked at intervals
    and whenever a path of the store leads nowhere.
    """

    def __init__(self, path: str, probe: Callable[[], None]) -> None:
        self.path = path
        self._probe = probe
        self._lock = threading.Lock()
        self._failed: str | None = None

    @property
    def failed(self) -> str | None:
        """Why this disk counts as failed; None while it does not."""
        return self._failed

    def require(self) -> None:
        """Raise `MediumFailed` when the disk has failed."""
        if self._failed is not None:
            raise self._failure(self._failed)

    def fail(self, reason: str) -> None:
        """Set the failed state. The first reason stays."""
        with self._lock:
            if self._failed is None:
                self._failed = reason

    def check(self) -> bool:
        """Read the marker uncached; False when the disk has failed, now or before.

        To be called every `limits.MEDIUM_CHECK_INTERVAL_S` from a thread that may block.
        """
        if self._failed is not None:
            return False
        try:
            self._probe()
        except (OSError, CkptdError) as error:
            self.fail(f"the store's marker cannot be read: {error}")
        return self._failed is None

    def confirm(self) -> None:
        """Read the marker uncached, and raise `MediumFailed` when the disk has failed.

        To be called before a file that is missing is believed to be gone: below an unmounted disk
        every file is missing.
        """
        self.check()
        self.require()

    @contextmanager
    def operation(self, what: str) -> Iterator[None]:
        """Run a block of file-system calls; `what` names it in messages ("store shard 12ab…").

        `OSError` leaves it as `NoRoom`, as `MediumFailed` (then the state is set, too), or as
        `StoreOperationFailed` when it says nothing about the disk. Nothing runs when the disk has
        failed before, and nothing succeeds when it failed meanwhile in another thread.
        """
        self.require()
        try:
            yield
        except OSError as error:
            raise self.translate(what, error) from error
        self.require()

    def translate(self, what: str, error: OSError) -> CkptdError:
        """The error of our tree for `error`; sets the failed state when the disk is to blame."""
        reason = f"{what}: {error.strerror or error} ({errno_name(error)})"
        if error.errno in NO_ROOM_ERRNOS:
            return NoRoom(
                f"no room in {self.path}: {reason}",
                next=f"df -h {self.path}; then ckptd prune --dry-run",
            )
        if error.errno in FAILED_ERRNOS:
            self.fail(reason)
            return self._failure(reason)
        if error.errno in PATH_LOST_ERRNOS and not self.check():
            return self._failure(self._failed or reason)
        return StoreOperationFailed(
            f"{self.path}: {reason}", next=f"ls -la {self.path}; ckptd doctor"
        )

    def _failure(self, reason: str) -> MediumFailed:
        return MediumFailed(
            f"the disk below {self.path} has failed: {reason}",
            next="dmesg | tail; check disk, cable and power supply, then restart ckptd",
        )


def errno_name(error: OSError) -> str:
    """ "EIO" and the like; the class's name when the error carries no number."""
    if error.errno is None:
        return type(error).__name__
    return errno.errorcode.get(error.errno, os.strerror(error.errno))
