"""Copying a directory slowly, as rsync does: by rsync, or on a machine without it in its way.

As a script: `slow_copy.py [--inplace] SOURCE TARGET`. What rsync does to files is all that matters
here: `.NAME.XXXXXX` beside the target and renamed at the end, or with --inplace the target itself,
times last.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import time
from pathlib import Path

_BYTES_PER_S = 1_500 * 1024
_PIECE_S = 0.1


def slow_copy(source: Path, target: Path, *, in_place: bool) -> subprocess.Popen[bytes]:
    """A process that copies the directory `source` to `target`, 1500 KiB in a second."""
    how = ["--inplace"] if in_place else []
    rsync = shutil.which("rsync")
    if rsync is None:
        return subprocess.Popen([sys.executable, __file__, *how, str(source), str(target)])
    rate = f"--bwlimit={_BYTES_PER_S // 1024}"
    return subprocess.Popen([rsync, "-a", rate, *how, f"{source}/", f"{target}/"])


def _copy(source: Path, target: Path, *, in_place: bool) -> None:
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy(path, target / path.name, in_place=in_place)
            continue
        final = target / path.name
        written = final if in_place else target / f".{path.name}.{secrets.token_hex(3)}"
        with path.open("rb") as reading, written.open("wb", buffering=0) as writing:
            while piece := reading.read(int(_BYTES_PER_S * _PIECE_S)):
                writing.write(piece)
                time.sleep(_PIECE_S)
        shutil.copystat(path, written)
        os.replace(written, final)
    shutil.copystat(source, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--inplace", action="store_true")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    typed = parser.parse_args()
    _copy(typed.source, typed.target, in_place=typed.inplace)
