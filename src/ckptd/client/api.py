"""The Python interface: `ckptd.Client` for asyncio, `ckptd.SyncClient` without it.

client = ckptd.SyncClient()
client.store("checkpoints/step-1000", "run1/step-1000")
client.restore("run1/step-1000", "resumed")
weights = client.load_tensors("run1/step-1000", ["model.layers.0.*"])

async with ckptd.Client() as client:
    for row in await client.ls("run1"):
        print(row.name, row.state)
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from ckptd.client.cluster import Cluster
from ckptd.client.connect import connect
from ckptd.client.listing import Checkpoint, list_checkpoints
from ckptd.client.progress import Progress
from ckptd.client.restore import RestoreResult
from ckptd.client.restore import restore as restore_checkpoint
from ckptd.client.store import StoreResult
from ckptd.client.store import store as store_checkpoint
from ckptd.client.tensors import load_tensors as load
from ckptd.client.verification import Verification
from ckptd.client.verification import verify as verify_copies
from ckptd.config import Config, find_config
from ckptd.config import load as load_config
from ckptd.errors import ConfigError, UsageError
from ckptd.net.loop import run as run_on_loop

_T = TypeVar("_T")
PathLike = str | os.PathLike[str]


class Client:
    """An async client of one cluster, connected while its context lasts.

    `config` is a Config, the path of a config file, or None for the one that the command line
    would use (CKPTD_CONFIG, then ~/.config/ckptd/ckptd.yml, then /etc/ckptd/ckptd.yml). Nodes that
    do not answer at the start are not asked; make a new client to try them again. Every method
    raises the errors of `ckptd.errors`; each carries `message`, `next`, `kind` and `exit_code`.
    """

    def __init__(self, config: Config | PathLike | None = None) -> None:
        self._config = config if isinstance(config, Config) else _load(config)
        self._stack = AsyncExitStack()
        self._cluster: Cluster | None = None

    async def __aenter__(self) -> Client:
        self._cluster = await self._stack.enter_async_context(connect(self._config))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cluster = None
        await self._stack.aclose()

    @property
    def _connected(self) -> Cluster:
        if self._cluster is None:
            raise UsageError("the client is not connected: use it as `async with ckptd.Client()`")
        return self._cluster

    async def store(
        self,
        path: PathLike,
        name: str | None = None,
        *,
        copies: int | None = None,
        as_is: bool = False,
        progress: Progress | None = None,
    ) -> StoreResult:
        """Stores the directory or file at `path` and waits for its copies.

        `name` (default: the last part of the path), `copies` (default: the config's). The result's
        `state` is "degraded" when too few nodes took a copy. Raises SourceRefused, SourceChanged,
        NoRoom, NotEnoughNodes.
        """
        return await store_checkpoint(
            self._connected,
            Path(path),
            name=_last_part(path) if name is None else name,
            copies=copies,
            as_is=as_is,
            progress=progress,
        )

    async def restore(
        self,
        name: str,
        to: PathLike | None = None,
        *,
        files: Sequence[str] = (),
        tensors: Sequence[str] = (),
        force: bool = False,
        progress: Progress | None = None,
    ) -> RestoreResult:
        """Brings NAME, NAME@VERSION, RUN@latest or RUN@best back to the directory `to`.

        As `ckptd restore`: `files` and `tensors` are globs that narrow what comes back, `force`
        replaces what is there. Raises NotFound, TargetExists, NoGoodCopy, NotEnoughNodes.
        """
        return await restore_checkpoint(
            self._connected,
            name,
            to=None if to is None else Path(to),
            files=files,
            tensors=tensors,
            force=force,
            progress=progress,
        )

    async def ls(self, run: str | None = None, *, all_versions: bool = False) -> list[Checkpoint]:
        """The checkpoints (of one run), each with its newest version and its state."""
        return await list_checkpoints(self._connected, run, all_versions=all_versions)

    async def verify(
        self, names: Sequence[str] = (), *, progress: Progress | None = None
    ) -> Verification:
        """Lets the nodes read and hash every copy of these versions (of none given: of all)."""
        return await verify_copies(self._connected, names, progress=progress or Progress())

    async def load_tensors(
        self, name: str, globs: Sequence[str] = ("*",), framework: str = "numpy"
    ) -> dict[str, Any]:
        """The tensors whose names match a glob, as arrays of "numpy", "torch" or "mlx".

        Only the shards that hold them are read; every byte is verified.
        """
        return await load(self._connected, name, globs, framework=framework)


class SyncClient:
    """The same without asyncio. Each call connects anew, so one object may live as long as a
    training, and nodes that come back are found. Not to be called from a running event loop."""

    def __init__(self, config: Config | PathLike | None = None) -> None:
        self._config = config if isinstance(config, Config) else _load(config)

    def store(
        self,
        path: PathLike,
        name: str | None = None,
        *,
        copies: int | None = None,
        as_is: bool = False,
        progress: Progress | None = None,
    ) -> StoreResult:
        """As `Client.store`."""
        return self._run(
            lambda client: client.store(path, name, copies=copies, as_is=as_is, progress=progress)
        )

    def restore(
        self,
        name: str,
        to: PathLike | None = None,
        *,
        files: Sequence[str] = (),
        tensors: Sequence[str] = (),
        force: bool = False,
        progress: Progress | None = None,
    ) -> RestoreResult:
        """As `Client.restore`."""
        return self._run(
            lambda client: client.restore(
                name, to, files=files, tensors=tensors, force=force, progress=progress
            )
        )

    def ls(self, run: str | None = None, *, all_versions: bool = False) -> list[Checkpoint]:
        """As `Client.ls`."""
        return self._run(lambda client: client.ls(run, all_versions=all_versions))

    def verify(
        self, names: Sequence[str] = (), *, progress: Progress | None = None
    ) -> Verification:
        """As `Client.verify`."""
        return self._run(lambda client: client.verify(names, progress=progress))

    def load_tensors(
        self, name: str, globs: Sequence[str] = ("*",), framework: str = "numpy"
    ) -> dict[str, Any]:
        """As `Client.load_tensors`."""
        return self._run(lambda client: client.load_tensors(name, globs, framework))

    def _run(self, work: Callable[[Client], Awaitable[_T]]) -> _T:
        async def connected() -> _T:
            async with Client(self._config) as client:
                return await work(client)

        return run_on_loop(connected())


def _last_part(path: PathLike) -> str:
    return Path(path).absolute().name


def _load(path: PathLike | None) -> Config:
    found = find_config(None if path is None else os.fspath(path), os.environ, Path.home())
    if found is None:
        raise ConfigError(
            "", "no config is given and none is found", next="ckptd local up   (to try it out)"
        )
    return load_config(found)
