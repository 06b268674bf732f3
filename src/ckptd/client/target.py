"""The place that a restore writes to: refused before the first byte, or exchanged in one step."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import structlog

from ckptd.client.output_files import disk_error
from ckptd.core import limits
from ckptd.core.names import colliding
from ckptd.errors import Refused, TargetExists
from ckptd.store.filesystem import OPERATING_SYSTEM

_log = structlog.get_logger(__name__)

Found = Literal["nothing", "empty", "something"]
STAGING_VERSION_DIGITS: Final = 8


@dataclass(frozen=True)
class Target:
    """Where a restore ends up.

    `path` is absolute, its directory real. `found` is what lay there. `replaces`: "all" swaps the
    whole of it, "files" only the files that are restored.
    """

    path: str
    staging: str
    found: Found
    replaces: Literal["all", "files"]


def choose_target(
    to: Path, version: str, *, force: bool, replaces: Literal["all", "files"], is_file: bool
) -> Target:
    """The target at `to`, a directory unless `is_file`. Nothing is changed.

    `replaces` is what `force` permits. Raises TargetExists, or Refused for places that are never
    swapped.
    """
    path = os.path.realpath(to)
    if path == os.path.sep:
        raise Refused("the root directory cannot be a target", next="choose --to DIR")
    found = _look(path, is_file)
    if found == "something":
        if not force:
            raise TargetExists(
                f"{path} is already there" + ("" if is_file else " and is not empty"),
                next="choose another --to, or add --force to replace "
                + ("it" if replaces == "all" else "the files in it that are restored"),
            )
        if is_file and os.path.isdir(path):
            raise TargetExists(f"{path} is a directory, not a file", next="choose another --to")
        if replaces == "all":
            _refuse_unswappable(path)
    if found == "empty" and os.path.ismount(path):
        raise Refused(
            f"{path} is a mount point, which cannot be replaced",
            next=f"choose a directory below it: --to {os.path.join(path, 'restored')}",
        )
    if found != "something" or not os.path.isdir(path):
        replaces = "all"
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        raise Refused(f"{parent} is not there", next=f"mkdir -p {parent}")
    staging = _beside(path, f"ckptd-restore-{version[:STAGING_VERSION_DIGITS]}")
    return Target(path, staging, found, replaces)


def _beside(path: str, mark: str) -> str:
    """A hidden place next to `path`, the same each time. A name that leaves no room for `mark` in
    what a file system takes is cut, and told apart by its hash."""
    parent, name = os.path.split(path)
    room = limits.NAME_SEGMENT_MAX_BYTES - len(f"..{mark}")
    if len(os.fsencode(name)) > room:
        mark = f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}.{mark}"
        room = limits.NAME_SEGMENT_MAX_BYTES - len(f"..{mark}")
        while len(os.fsencode(name)) > room:
            name = name[:-1]
    return os.path.join(parent, f".{name}.{mark}")


def _look(path: str, is_file: bool) -> Found:
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        raise disk_error(path, error) from error
    if is_file or not stat.S_ISDIR(found.st_mode):
        return "something"
    try:
        with os.scandir(path) as entries:
            return "something" if next(entries, None) is not None else "empty"
    except OSError as error:
        raise disk_error(path, error) from error


def _refuse_unswappable(path: str) -> None:
    """What is swapped out is removed: never a home, a mount point, or where somebody stands."""
    for place, what in ((os.path.expanduser("~"), "home"), (os.getcwd(), "current")):
        real = os.path.realpath(place)
        if real == path or real.startswith(path + os.path.sep):
            raise Refused(
                f"{path} is or holds the {what} directory, and is not replaced",
                next="choose another --to",
            )
    if os.path.ismount(path):
        raise Refused(f"{path} is a mount point, which cannot be replaced")


def check_names(parent: str, paths: Sequence[str]) -> None:
    """Raises Refused when the file system of `parent` would take two of `paths` for one.

    Its behaviour is tried out, not guessed: one machine may have several kinds mounted.
    """
    try:
        probe = tempfile.mkdtemp(prefix=".ckptd-probe-", dir=parent)
    except OSError as error:
        raise disk_error(parent, error) from error
    try:
        pairs = colliding(
            paths,
            case_insensitive=_same(probe, "case", "CASE"),
            normalize=_same(probe, "\u00e9", "e\u0301"),
        )
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if pairs:
        first, second = pairs[0]
        raise Refused(
            f"{parent} cannot hold both {first!r} and {second!r}: its file system takes them for "
            "one name",
            next="restore to a file system that tells them apart, or pick files with --file",
        )


def _same(directory: str, one: str, other: str) -> bool:
    try:
        os.close(os.open(os.path.join(directory, one), os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        return os.path.lexists(os.path.join(directory, other))
    except OSError:  # it cannot hold such names at all: making the files will say so
        return False


def check_replaceable(target: Target, paths: Sequence[str]) -> None:
    """Raises Refused when a file below the target could only be replaced through a symlink, or by
    removing a directory."""
    for path in paths:
        place = target.path
        *parents, name = path.split("/")
        for segment in parents:
            place = os.path.join(place, segment)
            mode = _mode(place)
            if mode is not None and not stat.S_ISDIR(mode):
                raise Refused(f"{place} is not a directory: nothing is written through it")
        mode = _mode(os.path.join(place, name))
        if mode is not None and stat.S_ISDIR(mode):
            raise Refused(f"{os.path.join(place, name)} is a directory, and is not replaced")


def _mode(path: str) -> int | None:
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def put_in_place(target: Target, staged: str) -> None:
    """Gives `staged` (a directory or file) the target's name, durably and in one step.

    What lay there is removed afterwards. Raises TargetExists when something has come up there
    since `choose_target` looked.
    """
    try:
        if target.found == "something":
            _swap(staged, target.path)
        elif target.found == "empty" and _is_current_directory(target.path):
            # Whoever stands in it would be left in a directory that is gone.
            for name in os.listdir(staged):
                os.rename(os.path.join(staged, name), os.path.join(target.path, name))
            OPERATING_SYSTEM.fsync_directory(target.path)
            os.rmdir(staged)
        else:
            _rename_new(staged, target.path)
        OPERATING_SYSTEM.fsync_directory(os.path.dirname(target.path))
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
            raise TargetExists(
                f"{target.path} was made by somebody else meanwhile; what was restored is in "
                f"{staged}",
                next="restore again with another --to",
            ) from error
        raise disk_error(target.path, error) from error


def _is_current_directory(path: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(path, os.getcwd())
    return False


def _rename_new(source: str, target: str) -> None:
    if os.path.isdir(source):
        os.rename(source, target)  # fails unless there is nothing or an empty directory
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise
        # No hard links here: look, then rename.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "exists", target) from error
        os.rename(source, target)
        return
    os.unlink(source)


def _swap(source: str, target: str) -> None:
    """Exchanges two names, and removes what `target` was."""
    old = _beside(target, f"ckptd-old-{secrets.token_hex(4)}")
    if os.path.isfile(source) and not os.path.isdir(target):
        os.replace(source, target)
        return
    if _exchange(source, target):
        os.rename(source, old)
    else:
        # Two steps where the file system has no exchange; between them the target is missing.
        os.rename(target, old)
        try:
            os.rename(source, target)
        except OSError:
            os.rename(old, target)
            raise
    OPERATING_SYSTEM.fsync_directory(os.path.dirname(target))
    remove_tree(old)


def replace_files(target: Target, staged: str, paths: Sequence[str], modes: dict[str, int]) -> None:
    """Moves the files `paths` from `staged` into the existing directory of the target, each in one
    step, never through a symlink. `modes` gives the modes of directories that are made."""
    for path in paths:
        *parents, name = path.split("/")
        directory = os.open(target.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for depth, segment in enumerate(parents, start=1):
                below = _open_directory(directory, segment, modes["/".join(parents[:depth])])
                os.close(directory)
                directory = below
            os.rename(os.path.join(staged, path), name, dst_dir_fd=directory)
            OPERATING_SYSTEM.fsync(directory)
        except OSError as error:
            raise disk_error(os.path.join(target.path, path), error) from error
        finally:
            os.close(directory)
    remove_tree(staged)


def _open_directory(above: int, name: str, mode: int) -> int:
    with contextlib.suppress(FileExistsError):
        os.mkdir(name, mode, dir_fd=above)
        OPERATING_SYSTEM.fsync(above)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=above)


def remove_tree(path: str) -> None:
    """Removes a directory or file, whatever the modes in it. What resists is left, and logged."""

    def retry(function: object, place: str, _: object) -> None:
        try:
            os.chmod(os.path.dirname(place), 0o700)
            if os.path.isdir(place) and not os.path.islink(place):
                os.chmod(place, 0o700)
                shutil.rmtree(place, ignore_errors=True)
            else:
                os.unlink(place)
        except OSError as error:
            _log.warning("not_removed", path=place, reason=error.strerror, next=f"rm -rf {path}")

    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path, onerror=retry)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD: Final = -2 if sys.platform == "darwin" else -100
_EXCHANGE: Final = 2  # RENAME_EXCHANGE of Linux, RENAME_SWAP of macOS
_NO_EXCHANGE: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)


def _exchange(one: str, other: str) -> bool:
    """Swaps two names in one step; False where the system or file system cannot."""
    call = getattr(_LIBC, "renameatx_np" if sys.platform == "darwin" else "renameat2", None)
    if call is None:
        return False
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    call.restype = ctypes.c_int
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), other)
