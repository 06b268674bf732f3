"""A power cut at any moment leaves the old or the new state, and every single flush is needed."""

from __future__ import annotations

import ast
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.model_disk import File, ModelDisk
from tests.unit.store.call_hooks import FLUSHES, Call, Hooked, ProcessDied, dies_at
from tests.unit.store.workload import (
    FIRST,
    LATER,
    SHARDS,
    STORE_ID,
    digest_of,
    faults,
    fill,
    make_store,
    put_shard,
    whole_life,
)

import ckptd.store
from ckptd.store.copy_reader import VerifyResult
from ckptd.store.documents import DocumentFiles
from ckptd.store.filesystem import OPERATING_SYSTEM, FileSystem
from ckptd.store.marker import init_store, open_store
from ckptd.store.shards import ShardStore

PATH = "/disk/store"
Acknowledge = Callable[[str], None]
Action = Callable[[FileSystem, Acknowledge], None]


class FaultFound(BaseException):
    """Ends a run that has shown what it was to show."""


def new_disk() -> ModelDisk:
    disk = ModelDisk()
    disk.mkdir("/disk")
    disk.make_all_durable()
    return disk


_seen: dict[tuple[object, frozenset[str]], list[str]] = {}


def cut_faults(disk: ModelDisk, acknowledged: set[str]) -> list[str]:
    """Everything that may be wrong when power is lost now."""
    found: list[str] = []
    for cut in disk.after_power_cut():
        # Many cuts leave the same disk; one look at each will do.
        key = (cut.fingerprint(), frozenset(acknowledged))
        if key not in _seen:
            _seen[key] = faults(cut, PATH, set(acknowledged))
        found += _seen[key]
    return found


def explore(
    disk: ModelDisk, action: Action, *, leave_out: int = 0, acknowledged: frozenset[str]
) -> tuple[list[str], Hooked]:
    """Run `action` and cut the power after every call. `leave_out`: ordinal of a flush that is
    not done, from 1 on; then it ends at the first fault. Returns what is wrong, and the calls."""
    found: list[str] = []
    said = set(acknowledged)
    flushes = 0

    def before(call: Call) -> bool:
        nonlocal flushes
        flushes += call.name in FLUSHES
        return call.name in FLUSHES and flushes == leave_out

    def after(call: Call, result: Any) -> None:
        if call.name in ("open", "pwrite", "rename", "mkdir", "unlink", *FLUSHES):
            look(f"after call {call.number}")

    def acknowledge(label: str) -> None:
        said.add(label)
        look(f"after {label}")

    def look(when: str) -> None:
        found.extend(f"{when}: {each}" for each in cut_faults(disk, said))
        if found and leave_out:
            raise FaultFound

    hooked = Hooked(disk, before, after)
    with contextlib.suppress(FaultFound):
        action(hooked.port, acknowledge)
    return found, hooked


# What a store does, each from a state on disk that is durable


def initialise(filesystem: FileSystem, acknowledge: Acknowledge) -> None:
    init_store(PATH, store_id=STORE_ID, filesystem=filesystem)
    acknowledge("init")


def open_and_fill(filesystem: FileSystem, acknowledge: Acknowledge) -> None:
    with open_store(PATH, filesystem=filesystem) as directory:
        fill(directory, acknowledge)


def _flushes_of(disk: ModelDisk, action: Action) -> list[str]:
    hooked = Hooked(disk)
    action(hooked.port, lambda label: None)
    return [call.site for call in hooked.calls if call.name in FLUSHES]


def initialised_disk() -> ModelDisk:
    disk = new_disk()
    init_store(PATH, store_id=STORE_ID, filesystem=disk)
    disk.make_all_durable()
    return disk


INIT_FLUSHES = _flushes_of(new_disk(), initialise)
FILL_FLUSHES = _flushes_of(initialised_disk(), open_and_fill)


def is_scan(site: str) -> bool:
    """Flushes of the scan matter only after a process was killed: see the tests further below."""
    return site.startswith("_scan:")


def test_a_power_cut_at_any_moment_of_a_stores_life_leaves_old_or_new() -> None:
    def whole(filesystem: FileSystem, acknowledge: Acknowledge) -> None:
        whole_life(filesystem, PATH, acknowledge)

    found, hooked = explore(new_disk(), whole, acknowledged=frozenset())
    assert found == []
    assert sum(call.name in FLUSHES for call in hooked.calls) == len(INIT_FLUSHES + FILL_FLUSHES)


@pytest.mark.parametrize("ordinal", range(1, len(INIT_FLUSHES) + 1))
def test_every_flush_of_init_is_needed(ordinal: int) -> None:
    found, _ = explore(new_disk(), initialise, leave_out=ordinal, acknowledged=frozenset())
    assert found != []


@pytest.mark.parametrize(
    "ordinal",
    [number for number, site in enumerate(FILL_FLUSHES, start=1) if not is_scan(site)],
)
def test_every_flush_of_shards_and_documents_is_needed(ordinal: int) -> None:
    disk = initialised_disk()
    found, _ = explore(disk, open_and_fill, leave_out=ordinal, acknowledged=frozenset({"init"}))
    assert found != []


def test_the_trace_has_the_flushes_that_the_tests_above_take_out() -> None:
    # init: parent, marker, directory. Then: directories of the store; first shard of a new
    # directory 3, document 4, second shard of it 2, first shard of another one 3.
    assert len(INIT_FLUSHES) == 3
    assert len([site for site in FILL_FLUSHES if not is_scan(site)]) == 1 + 3 + 4 + 2 + 3


def test_the_calls_made_to_the_real_file_system_survive_the_model(tmp_path: Path) -> None:
    real = str(tmp_path / "store")
    recorded = Hooked(OPERATING_SYSTEM)
    acknowledged_at: dict[int, str] = {}
    whole_life(
        recorded.port,
        real,
        lambda label: acknowledged_at.__setitem__(len(recorded.calls), label),
    )
    disk = new_disk()
    descriptors: dict[int, int] = {}
    said: set[str] = set()
    for call in recorded.calls:
        if call.number in recorded.results:
            result = recorded.results[call.number]
            replay(disk, call, result, str(tmp_path), descriptors)
        if call.number in acknowledged_at:
            said.add(acknowledged_at[call.number])
        assert cut_faults(disk, said) == [], call
    assert said == {"init", "first", "document", "same", "other"}


def replay(
    disk: ModelDisk, call: Call, result: Any, real_root: str, descriptors: dict[int, int]
) -> None:
    """Do to the model what was done to the real disk, if it changes anything."""
    arguments: list[Any] = [
        each.replace(real_root, "/disk") if isinstance(each, str) else each
        for each in call.arguments
    ]
    if call.name in ("mkdir", "rename", "unlink", "fsync_directory"):
        getattr(disk, call.name)(*arguments)
    elif call.name == "open":
        descriptors[result] = disk.open(*arguments)
    elif call.name == "pwrite":
        disk.pwrite(descriptors[arguments[0]], memoryview(arguments[1])[:result], arguments[2])
    elif call.name == "fsync":
        disk.fsync(descriptors[arguments[0]])
    elif call.name == "close":
        disk.close(descriptors.pop(arguments[0]))


# A process that was killed has left names that no flush has reached


def start_after_a_kill(filesystem: FileSystem, acknowledge: Acknowledge) -> None:
    """What a started store says of the shards and documents that it finds, and adds to them."""
    with open_store(PATH, filesystem=filesystem) as directory:
        store = ShardStore(directory, reserve=0)
        for label, data in SHARDS.items():
            if store.has(digest_of(data), len(data)):
                acknowledge(label)
        if DocumentFiles(directory).ids():
            acknowledge("document")
        acknowledge("what was found")
        put_shard(store, LATER)
        acknowledge("later")


def killed_disks() -> list[ModelDisk]:
    """The disk as the next process sees it, for a kill in front of each call."""
    counted = Hooked(new_disk())
    whole_life(counted.port, PATH, lambda label: None)
    disks = []
    for number in range(1, len(counted.calls) + 1):
        disk = new_disk()
        with pytest.raises(ProcessDied):
            whole_life(dies_at(disk, number).port, PATH, lambda label: None)
        disk.restart_process()
        disks.append(disk)
    return disks


LOOK_AFTER = ("init", "what was found", "later")


def faults_of_a_restart(action: Action, needs_marker: bool, leave_out: int) -> list[str]:
    """As `explore`, over all killed disks, with power cuts at the moments of LOOK_AFTER."""
    found: list[str] = []
    for disk in killed_disks():
        if not needs_marker or _has_marker(disk):
            found += _faults_of_one_restart(disk, action, leave_out)
        if found:
            break
    return found


def _faults_of_one_restart(disk: ModelDisk, action: Action, leave_out: int) -> list[str]:
    said = {"init"}
    found: list[str] = []
    flushes = 0

    def before(call: Call) -> bool:
        nonlocal flushes
        flushes += call.name in FLUSHES
        return call.name in FLUSHES and flushes == leave_out

    def acknowledge(label: str) -> None:
        if label != "what was found":
            said.add(label)
        if label in LOOK_AFTER:
            found.extend(cut_faults(disk, said))

    action(Hooked(disk, before).port, acknowledge)
    return found


def _has_marker(disk: ModelDisk) -> bool:
    try:
        return any(entry.name == "ckptd-store.json" for entry in disk.list_directory(PATH))
    except FileNotFoundError:
        return False


def filled_disk() -> ModelDisk:
    disk = new_disk()
    whole_life(disk, PATH, lambda label: None)
    return disk


RESTART_FLUSHES = _flushes_of(filled_disk(), start_after_a_kill)
REINIT_FLUSHES = _flushes_of(filled_disk(), initialise)


def test_what_a_restarted_store_vouches_for_survives_a_power_cut() -> None:
    assert faults_of_a_restart(start_after_a_kill, True, leave_out=0) == []
    assert faults_of_a_restart(initialise, False, leave_out=0) == []


@pytest.mark.parametrize("ordinal", range(1, len(RESTART_FLUSHES) + 1))
def test_every_flush_of_a_start_is_needed(ordinal: int) -> None:
    assert faults_of_a_restart(start_after_a_kill, True, leave_out=ordinal) != []


@pytest.mark.parametrize("ordinal", range(1, len(REINIT_FLUSHES) + 1))
def test_every_flush_of_a_second_init_is_needed(ordinal: int) -> None:
    assert faults_of_a_restart(initialise, False, leave_out=ordinal) != []


# Quarantine


def quarantine_faults(leave_out: int) -> tuple[list[str], list[str]]:
    """Power cuts while a bad shard is moved away: (what is wrong, sites of the flushes)."""
    disk = new_disk()
    make_store(PATH, disk).close()
    path = f"{PATH}/shards/5a/{digest_of(FIRST).hex()}"
    disk.mkdir(os.path.dirname(path))
    bad = disk.open(path, os.O_CREAT)
    disk.pwrite(bad, memoryview(FIRST[:-1] + b"?"), 0)
    disk.make_all_durable()
    disk.restart_process()
    found: list[str] = []
    flushes: list[str] = []

    def bad_copies(cut: ModelDisk) -> tuple[int, int]:
        shards = cut._directory(os.path.dirname(path)).seen
        kept = cut._directory(f"{PATH}/quarantine").seen
        return len(shards), sum(isinstance(node, File) for node in kept.values())

    def before(call: Call) -> bool:
        if call.name in FLUSHES:
            flushes.append(call.site)
        return call.name in FLUSHES and len(flushes) == leave_out

    def after(call: Call, result: Any) -> None:
        found.extend("deleted" for cut in disk.after_power_cut() if sum(bad_copies(cut)) == 0)

    with open_store(PATH, filesystem=disk) as directory:
        store = ShardStore(directory, reserve=0)
        hooked = Hooked(disk, before, after)
        store._filesystem = hooked.port
        directory.quarantine._filesystem = hooked.port
        assert store.verify(digest_of(FIRST), pause_s=0) is VerifyResult.CORRUPT
    found.extend("back again" for cut in disk.after_power_cut() if bad_copies(cut) != (0, 1))
    return found, flushes


def test_a_bad_shard_on_its_way_to_quarantine_is_neither_lost_nor_back() -> None:
    found, flushes = quarantine_faults(0)
    assert found == []
    assert len(flushes) == 2


@pytest.mark.parametrize("ordinal", [1, 2])
def test_every_flush_of_a_move_to_quarantine_is_needed(ordinal: int) -> None:
    found, _ = quarantine_faults(ordinal)
    assert found != []


def test_a_shard_on_its_way_out_of_quarantine_is_never_lost() -> None:
    disk = initialised_disk()
    with open_store(PATH, filesystem=disk) as directory:
        put_shard(ShardStore(directory, reserve=0), FIRST)
        digest = digest_of(FIRST)
        source = f"{PATH}/shards/5a/{digest.hex()}"
        disk.rename(source, f"{PATH}/quarantine/{digest.hex()}.0")
        disk.make_all_durable()
        lost = []

        def after(call: Call, result: Any) -> None:
            for cut in disk.after_power_cut():
                with open_store(PATH, filesystem=cut) as again:
                    store = ShardStore(again, reserve=0)
                    if not store.has(digest) and not store.quarantined():
                        lost.append(call)

        store = ShardStore(directory, reserve=0)
        (file,) = store.quarantined()
        hooked = Hooked(disk, after=after)
        store._filesystem = hooked.port
        directory.quarantine._filesystem = hooked.port
        assert store.retry_quarantined(file)
        assert lost == []
        acknowledged = {"init", "first"}
        assert cut_faults(disk, acknowledged) == []


def test_no_place_in_the_store_flushes_that_is_not_tested_here() -> None:
    sites = set(INIT_FLUSHES + FILL_FLUSHES + RESTART_FLUSHES + REINIT_FLUSHES)
    sites |= set(quarantine_faults(0)[1])
    in_source = set()
    for module in Path(ckptd.store.__path__[0]).glob("*.py"):
        if module.name == "filesystem.py":
            continue
        for function in ast.walk(ast.parse(module.read_text())):
            if isinstance(function, ast.FunctionDef):
                in_source |= {
                    f"{function.name}:{node.lineno}"
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in FLUSHES
                }
    assert sites == in_source
