"""Trainers of different habits, each a script: how they write, when, and what they leave.

    python -m tests.cluster.trainers HABIT ROOT

Everything that a habit writes follows from its name and a number, so that a test knows what each
version must hold.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.layouts import archive, safetensors, trainer_state, weight_index

NUMBERS: Final = 12
"""How many checkpoints, or overwrites of one, each of them leaves."""
KEPT: Final = 8
"""How many a trainer keeps that deletes old ones."""
SIZE: Final = 600_000
STEP_S: Final = 4.0  # of training, between two checkpoints
FILE_S: Final = 0.02  # between two files

Contents = Mapping[str, bytes]


def contents(habit: str, number: int) -> Contents:
    """The files of checkpoint `number`, in the order in which they are written."""
    seed = sum(habit.encode()) * 1000 + number
    weights = safetensors(SIZE, seed)
    state = {"trainer_state.json": trainer_state(number), "optimizer.pt": archive(SIZE, seed)}
    names = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
    shards = {name: safetensors(SIZE, seed + part) for part, name in enumerate(names)}
    index = {"model.safetensors.index.json": weight_index(names)}
    inner = f"global_step{number}"
    match habit:
        case "index_first":
            return {**index, **shards}
        case "index_last":
            return {**shards, **index}
        case "deepspeed":
            return {
                "model.safetensors": weights,
                f"{inner}/mp_rank_00_model_states.pt": archive(SIZE, seed),
                f"{inner}/zero_pp_rank_0_mp_rank_00_optim_states.pt": archive(SIZE, seed + 1),
                "latest": inner.encode(),
                "trainer_state.json": trainer_state(number),
            }
        case _:
            return {"config.json": b"{}", "model.safetensors": weights, **state}


def place(habit: str, number: int) -> str:
    """Where checkpoint `number` lies, below the root."""
    return f"{habit}/latest" if habit == "overwriting" else f"{habit}/checkpoint-{number}"


def _write_file(path: Path, content: bytes) -> None:
    """In pieces, as a program that has more to do."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for start in range(0, len(content), 200_000):
            file.write(content[start : start + 200_000])
            file.flush()
            time.sleep(FILE_S)  # who watches shall see the file grow


def _in_place(target: Path, files: Contents) -> None:
    for name, content in files.items():
        _write_file(target / name, content)


def _renamed_whole(target: Path, files: Contents) -> None:
    """The Hugging Face Trainer: tmp-checkpoint-N becomes checkpoint-N; what is old is deleted."""
    staged = target.with_name(f"tmp-{target.name}")
    _in_place(staged, files)
    os.rename(staged, target)
    step = int(target.name.rpartition("-")[2])
    shutil.rmtree(target.with_name(f"checkpoint-{step - KEPT}"), ignore_errors=True)


def _renamed_files(target: Path, files: Contents) -> None:
    """Each file under another name first."""
    for name, content in files.items():
        _write_file(target / f"{name}.tmp", content)
        os.rename(target / f"{name}.tmp", target / name)


HABITS: Final[Mapping[str, Callable[[Path, Contents], None]]] = {
    "hugging_face": _renamed_whole,
    "overwriting": _in_place,
    "index_first": _in_place,
    "index_last": _in_place,
    "file_by_file": _renamed_files,
    "deepspeed": _in_place,
}


def train(habit: str, root: Path) -> None:
    """Writes all checkpoints of a training."""
    for number in range(1, NUMBERS + 1):
        HABITS[habit](root / place(habit, number), contents(habit, number))
        time.sleep(STEP_S)  # the training itself


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]))
