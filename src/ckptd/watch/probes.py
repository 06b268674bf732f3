"""Reads what the examinations of files ask for. Opens files for reading only, never waits."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict

from ckptd.core import limits
from ckptd.core.checkpoint_units import Entry, Members, Unit
from ckptd.core.completeness import to_examine
from ckptd.core.file_examination import Examination, Format, examine
from ckptd.core.pending import Key
from ckptd.core.training_state import (
    METRICS_FILE,
    TRAINER_STATE,
    TrainingState,
    sources,
    training_state,
)


class Probes:
    """Examines files, and remembers for the checkpoints that were last looked at what it found in
    files that have not changed since."""

    def __init__(self) -> None:
        self._known: OrderedDict[Key, dict[str, tuple[Entry, Examination]]] = OrderedDict()

    def examine(self, key: Key, unit: Unit, members: Members) -> dict[str, Examination]:
        """What the files of a checkpoint say of themselves. Blocks on the disk."""
        before = self._known.pop(key, {})
        found: dict[str, tuple[Entry, Examination]] = {}
        for path, file_format in to_examine(members).items():
            entry = members.entries[path]
            known = before.get(path)
            if known is not None and known[0] == entry:
                found[path] = known
            else:
                location = location_of(key, unit, path)
                found[path] = entry, examine_file(location, entry, file_format)
        self._known[key] = found
        while len(self._known) > limits.EXAMINED_CHECKPOINTS_MAX:
            self._known.popitem(last=False)
        return {path: examination for path, (_, examination) in found.items()}

    def forget(self, key: Key) -> None:
        """The checkpoint is stored or gone."""
        self._known.pop(key, None)


def location_of(key: Key, unit: Unit, path: str) -> str:
    """Where a member of a unit lies; `path` is relative to the unit."""
    if unit.kind == "file":
        return os.path.join(key.root, unit.path)
    return os.path.join(key.root, unit.path, path)


def examine_file(location: str, entry: Entry, file_format: Format) -> Examination:
    """The examination of one file as the scan saw it. One that changed since says so."""
    try:
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        return Examination(f"cannot be read: {error.strerror}")
    try:
        seen = os.fstat(descriptor)
        if not stat.S_ISREG(seen.st_mode) or seen.st_size != entry.size:
            return Examination("is changing")
        examining = examine(file_format, entry.size)
        span = next(examining)
        while True:
            span = examining.send(os.pread(descriptor, span.length, span.offset))
    except StopIteration as end:
        result: Examination = end.value
        return result
    except OSError as error:
        return Examination(f"cannot be read: {error.strerror}")
    finally:
        os.close(descriptor)


def read_training_state(key: Key, unit: Unit, members: Members) -> TrainingState:
    """Step and metrics of a checkpoint, as far as its files tell. Blocks on the disk."""
    raw: dict[str, bytes | None] = {}
    texts = []
    for path in sources(members):
        location = location_of(key, unit, path)
        if path in (TRAINER_STATE, METRICS_FILE):
            raw[path] = _read(location)
        else:
            texts.append(examine_file(location, members.entries[path], "safetensors").texts)
    return training_state(
        unit, trainer_state=raw.get(TRAINER_STATE), metrics=raw.get(METRICS_FILE), texts=texts
    )


def _read(location: str) -> bytes | None:
    try:
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            return file.read(limits.TRAINING_STATE_MAX_BYTES)
    except OSError:
        return None
