"""Files that appear whole and durable, or not at all, and never replace another one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ckptd.errors import Refused, TargetExists
from ckptd.store.filesystem import OperatingSystem

PRIVATE_MODE: Final = 0o600
_SYSTEM: Final = OperatingSystem()  # whose fsync reaches the medium on macOS too


def create_files(directory: Path, files: Sequence[tuple[str, bytes]]) -> list[Path]:
    """Writes each (name, content) below `directory`, in order, readable by the owner alone.

    `directory` is made with mode 0700 if it is not there. Each file is written under a temporary
    name, fsynced, linked to its own name and the directory fsynced, before the next one begins.
    Returns the paths. Raises TargetExists for a name that is taken, Refused for other errors of
    the file system; the files before it stay.
    """
    try:
        _make_directory(directory)
        return [_create(directory, name, content) for name, content in files]
    except OSError as error:
        raise Refused(f"{directory} cannot be written: {error.strerror}") from error


def _create(directory: Path, name: str, content: bytes) -> Path:
    target = directory / name
    temporary = directory / f".{name}.{secrets.token_hex(8)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_MODE)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            _SYSTEM.fsync(file.fileno())
        # link() fails where rename() would replace: nobody's key is ever lost to a race.
        os.link(temporary, target)
    except FileExistsError as error:
        raise TargetExists(f"{target} is already there, and is never overwritten") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _SYSTEM.fsync_directory(str(directory))
    return target


def _make_directory(directory: Path) -> None:
    if directory.is_dir():
        return
    if not directory.parent.is_dir():
        _make_directory(directory.parent)
    directory.mkdir(mode=0o700, exist_ok=True)
    _SYSTEM.fsync_directory(str(directory.parent))
