"""Are two checkpoints the same, byte for byte? Independent of how they were stored."""

from __future__ import annotations

import os
from pathlib import Path

_BLOCK_BYTES = 1024 * 1024


def differences(left: Path, right: Path) -> list[str]:
    """What differs between the trees (or files) `left` and `right`: names, kinds, permissions,
    link targets, bytes. Empty when they are the same."""
    if left.is_file() and right.is_dir():
        right = right / left.name
    if left.is_file():
        return _compare("", left, right)
    found = []
    ours, theirs = _paths(left), _paths(right)
    found += [f"{path} is missing" for path in sorted(ours - theirs)]
    found += [f"{path} was not there before" for path in sorted(theirs - ours)]
    for path in sorted(ours & theirs):
        found += _compare(path, left / path, right / path)
    return found


def _paths(root: Path) -> set[str]:
    found = set()
    for directory, directories, files in os.walk(root):
        for name in [*directories, *files]:
            found.add(os.path.relpath(os.path.join(directory, name), root))
    return found


def _compare(path: str, left: Path, right: Path) -> list[str]:
    # A link that leaves the checkpoint is stored as the file that it points to.
    if right.is_symlink():
        if not left.is_symlink() or os.readlink(left) != os.readlink(right):
            return [f"{path}: another link"]
        return []
    if left.is_dir() != right.is_dir():
        return [f"{path}: another kind"]
    if (left.stat().st_mode ^ right.stat().st_mode) & 0o777:
        return [f"{path}: other permissions"]
    if left.is_dir():
        return []
    with open(left, "rb") as one, open(right, "rb") as other:
        while True:
            block = one.read(_BLOCK_BYTES)
            if block != other.read(_BLOCK_BYTES):
                return [f"{path}: other bytes"]
            if not block:
                return []
