"""Checkpoints with everything that makes a restore go wrong."""

from __future__ import annotations

import os
import random
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from ckptd.client.progress import Progress

TENSOR_TYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "BOOL": np.dtype(np.bool_),
}


def make_odd_checkpoint(directory: Path, seed: int) -> Path:
    """Two safetensors files, nested and empty directories, symlinks, empty files, odd names and
    modes: about 6 MB, all of which follow from `seed`."""
    generator = random.Random(seed)
    directory.mkdir(parents=True)
    write_tensors(directory / "model-1.safetensors", seed, [f"layer.{n}.weight" for n in range(12)])
    write_tensors(directory / "model-2.safetensors", seed + 1, ["lm_head.weight", "norm.bias"])
    (directory / "optimizer.pt").write_bytes(generator.randbytes(2_500_001))
    same = generator.randbytes(700_000)
    (directory / "same-1.bin").write_bytes(same)
    (directory / "same-2.bin").write_bytes(same)
    (directory / f"zeros-{seed}.bin").write_bytes(bytes(60_000))
    (directory / "empty.bin").touch()
    (directory / "nothing" / "below").mkdir(parents=True)
    deep = directory.joinpath(*[f"level{depth}" for depth in range(12)])
    deep.mkdir(parents=True)
    (deep / "state.json").write_text('{"step": 7}')
    for number in range(30):
        (directory / f"part-{number}.json").write_text("x" * number)
    (directory / "name with spaces, ünïcödé 名前 and\nnewline").write_bytes(generator.randbytes(99))
    Path(os.fsdecode(os.fsencode(directory) + b"/not-utf8-\xff\xfe")).write_bytes(b"bytes")
    (directory / "-rf").write_text("dash")
    (directory / "link").symlink_to("model-1.safetensors")
    (directory / "level0" / "up").symlink_to("../empty.bin")
    (directory / "directory-link").symlink_to("level0")
    (directory / "optimizer.pt").chmod(0o640)
    (directory / "empty.bin").chmod(0o755)
    (directory / "part-3.json").chmod(0o400)
    (directory / "nothing" / "below").chmod(0o711)
    (directory / "level0").chmod(0o750)
    directory.chmod(0o705)
    return directory


def write_tensors(path: Path, seed: int, names: list[str]) -> None:
    """A safetensors file by the library, with one tensor of each type in turn."""
    generator = np.random.default_rng(seed)
    kinds = list(TENSOR_TYPES.values())
    tensors = {}
    for number, name in enumerate(names):
        raw = generator.integers(-99, 99, size=(100, 500 + number))
        tensors[name] = raw.astype(kinds[number % len(kinds)])
    save_file(tensors, str(path), metadata={"format": "pt"})


class Recorded(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.wanted = 0
        self.done = 0
        self.notes: list[str] = []

    def total(self, size: int) -> None:
        self.wanted = size

    def advance(self, size: int) -> None:
        self.done += size

    def note(self, text: str) -> None:
        self.notes.append(text)
