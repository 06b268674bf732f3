"""Restoring a checkpoint: choose the version, pull its shards, check its files, put it in place.

Nothing appears at the target before every byte is verified and durable. A restore that is cut off
leaves a staging directory beside the target, and the next one goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ckptd.client.choose_version import choose_in_cluster, choose_in_stores
from ckptd.client.cluster import Cluster
from ckptd.client.progress import Progress
from ckptd.client.pull import Pull
from ckptd.client.restore_plan import MERGED_NAME, RestorePlan, plan_files, plan_whole
from ckptd.client.shard_sources import DirectorySources, NodeSources, ShardSources
from ckptd.client.staging import Staging
from ckptd.client.target import (
    Target,
    check_names,
    check_replaceable,
    choose_target,
    put_in_place,
    replace_files,
)
from ckptd.client.tensor_plan import plan_for_tensors
from ckptd.config import Config
from ckptd.core.documents import Manifest
from ckptd.errors import CkptdError, UsageError

_T = TypeVar("_T")


@dataclass(frozen=True)
class RestoreResult:
    """What a restore did.

    `to` is the absolute path of the directory or file. `bytes` counts what is there now,
    `sources` the verified bytes that came from each node (or store directory), `fallbacks` how
    often something else had to be asked. `verified`: every byte has the hash in the manifest.
    `signed`: the manifest's signature was checked, which needs the cluster's CA.
    """

    name: str
    version: str
    to: str
    bytes: int
    seconds: float
    sources: dict[str, int]
    fallbacks: int
    verified: bool
    signed: bool

    def as_json(self) -> dict[str, Any]:
        """As `ckptd restore --json` prints it."""
        return {field: getattr(self, field) for field in self.__dataclass_fields__}


async def restore(
    cluster: Cluster,
    selector: str,
    *,
    to: Path | None = None,
    files: Sequence[str] = (),
    tensors: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> RestoreResult:
    """Restores the version that `selector` (NAME, NAME@VERSION, RUN@latest, RUN@best) means.

    `to` is the directory that becomes the checkpoint (default: the last part of the name, in the
    current directory); a checkpoint of a single file becomes a file in it. `files` are globs: only
    what matches is restored. `tensors` are globs: one safetensors file of the tensors that match,
    which is `to` itself when that ends in .safetensors. `force` replaces what is there.

    Raises NotFound, TargetExists, Refused or NoRoom before the first byte; NoGoodCopy,
    NotEnoughNodes or IntegrityError when it cannot be done: then nothing is at the target, and
    what was verified is kept beside it.
    """
    shown = progress or Progress()
    cluster.require_nodes()
    chosen = await choose_in_cluster(cluster, selector, shown)
    sources = NodeSources(cluster)

    def work(stop: threading.Event) -> RestoreResult:
        job = _Restore(chosen.version, chosen.manifest, sources, shown, stop, signed=True)
        return job.run(to, files, tensors, force)

    return await in_thread(work)


async def restore_from_stores(
    stores: Sequence[Path],
    selector: str,
    *,
    config: Config | None = None,
    to: Path | None = None,
    files: Sequence[str] = (),
    tensors: Sequence[str] = (),
    force: bool = False,
    progress: Progress | None = None,
) -> RestoreResult:
    """As `restore`, from the store directories of mounted disks: without network and daemons.

    Without `config` there is no CA to check signatures against; every hash is checked all the
    same.
    """
    shown = progress or Progress()

    def work(stop: threading.Event) -> RestoreResult:
        chosen = choose_in_stores(stores, selector, config, shown)
        sources = DirectorySources(stores, known_nodes=chosen.known_nodes)
        job = _Restore(
            chosen.version, chosen.manifest, sources, shown, stop, signed=config is not None
        )
        return job.run(to, files, tensors, force)

    return await in_thread(work)


async def in_thread(work: Callable[[threading.Event], _T]) -> _T:
    """Runs blocking work beside the loop; a cancellation stops it, and waits until it has."""
    stop = threading.Event()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        with contextlib.suppress(CkptdError):
            await running
        raise


class _Restore:
    """One restore of one version."""

    def __init__(
        self,
        version: str,
        manifest: Manifest,
        sources: ShardSources,
        progress: Progress,
        stop: threading.Event,
        *,
        signed: bool,
    ) -> None:
        self._version = version
        self._manifest = manifest
        self._sources = sources
        self._progress = progress
        self._stop = stop
        self._signed = signed
        self._pull = Pull(sources, progress=progress, stop=stop)

    def run(
        self, to: Path | None, files: Sequence[str], tensors: Sequence[str], force: bool
    ) -> RestoreResult:
        started_s = time.monotonic()
        if files and tensors:
            raise UsageError(
                "--file and --tensor pick different things", next="give only one of them"
            )
        to = to or Path(self._manifest.name.rpartition("/")[2])
        is_file = bool(tensors) and to.name.endswith(".safetensors")
        partial_ = bool(files or tensors) or self._manifest.unit == "file"
        replaces: Literal["all", "files"] = "files" if partial_ and not is_file else "all"
        target = choose_target(to, self._version, force=force, replaces=replaces, is_file=is_file)
        plan = self._make_plan(files, tensors)
        check_names(os.path.dirname(target.path), plan.paths)
        if target.replaces == "files":
            check_replaceable(target, [file.path for file in plan.files])
        self._fetch(target, plan, is_file=is_file)
        seconds = time.monotonic() - started_s
        self._sources.flush()
        return RestoreResult(
            name=self._manifest.name,
            version=self._version,
            to=target.path,
            bytes=plan.size,
            seconds=seconds,
            sources=dict(sorted(self._pull.received.items())),
            fallbacks=self._pull.fallbacks,
            verified=True,
            signed=self._signed,
        )

    def _make_plan(self, files: Sequence[str], tensors: Sequence[str]) -> RestorePlan:
        if files:
            return plan_files(self._manifest, files)
        if tensors:
            return plan_for_tensors(self._pull, self._manifest, tensors)
        return plan_whole(self._manifest)

    def _fetch(self, target: Target, plan: RestorePlan, *, is_file: bool) -> None:
        staging = Staging(target.staging, plan)
        before = sum(self._pull.received.values())
        try:
            staging.prepare()
            self._fill(staging, plan)
            staging.finish()
            if target.replaces == "files":
                modes = dict(plan.directories)
                replace_files(target, staging.path, [file.path for file in plan.files], modes)
            elif is_file:
                put_in_place(target, os.path.join(staging.path, MERGED_NAME))
                os.rmdir(staging.path)
            else:
                put_in_place(target, staging.path)
        except CkptdError as error:
            if staging.resumed or sum(self._pull.received.values()) > before:
                error.next = error.next or "restore again"
                self._progress.note(
                    f"nothing is at {target.path}; what was verified is kept in {staging.path} "
                    "and used by the next restore"
                )
            else:
                staging.discard()
            raise
        finally:
            staging.close()

    def _fill(self, staging: Staging, plan: RestorePlan) -> None:
        """Fetches what is not in the staging directory yet. Afterwards every byte of every file has
        come from a shard with the recorded hash, at the place that the manifest gives it."""
        self._progress.total(plan.fetched_size)
        present = staging.present(self._stop)
        self._progress.advance(sum(plan.shards[index].size for index in present))
        missing = [shard for index, shard in enumerate(plan.shards) if index not in present]
        self._pull.run(missing, staging.files)
