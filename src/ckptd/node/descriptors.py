"""How many files and connections a process may have open at a time."""

from __future__ import annotations

import resource

from ckptd.core import limits


def allow_descriptors(wanted: int = limits.DESCRIPTORS_WANTED) -> int:
    """Raises this process's soft limit (setrlimit(2), RLIMIT_NOFILE) to `wanted`, as far as the
    hard one goes; never lowers it. Returns what holds then.

    A shell gives 1024 on most Linux systems and 256 on macOS, for the sake of programs that use
    select(2); a node has more connections than that when many call at a time.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    except (OSError, ValueError):  # a system that allows less than it says
        return soft
    return wanted
