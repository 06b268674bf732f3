"""Whether somebody can be changing a file at this moment."""

from __future__ import annotations

import signal
import sys

if sys.platform == "linux":
    import fcntl


def nobody_writes(descriptor: int) -> bool:
    """Whether no process has the file open for writing, or mapped so, at this moment.

    False also where that cannot be told: for files of other users, on file systems without leases,
    on other systems than Linux. `descriptor` is open for reading only.

    Linux gives a read lease (fcntl(2), F_SETLEASE) only on a file that nobody can write to; it is
    given back at once.
    """
    if sys.platform != "linux":
        return False
    try:
        # Who opens the file for writing in between waits for us to give it back, and we are told
        # so: by a signal that does nothing, as the one by default would end the process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True
