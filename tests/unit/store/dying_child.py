"""Run as a program: `dying_child.py DIRECTORY`. Lives a store's life in one child process after
another; the k-th ends by `os._exit` in front of its k-th file-system call, until one lives through
all. The k-th child's store is DIRECTORY/k/store, what it acknowledged stands in DIRECTORY/k/said.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from tests.unit.store.call_hooks import dies_at
from tests.unit.store.workload import whole_life

from ckptd.store.filesystem import OPERATING_SYSTEM

DIED = 17
CALLS_MAX = 500


def child(directory: str, number: int) -> NoReturn:
    said = os.open(f"{directory}/said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    hooked = dies_at(OPERATING_SYSTEM, number, lambda: os._exit(DIED))

    def acknowledge(label: str) -> None:
        os.write(said, f"{label} ".encode())

    try:
        whole_life(hooked.port, f"{directory}/store", acknowledge)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def main(directory: str) -> int:
    for number in range(1, CALLS_MAX):
        os.mkdir(f"{directory}/{number}")
        pid = os.fork()
        if pid == 0:
            child(f"{directory}/{number}", number)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != DIED:
            return code
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
