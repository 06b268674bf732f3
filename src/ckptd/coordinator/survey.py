"""How all versions are, looked at again and again by the one node that tells of it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

import structlog

from ckptd.client.cluster import Cluster
from ckptd.client.survey import survey
from ckptd.core import limits
from ckptd.core.availability import State
from ckptd.core.catalogue import Catalogue
from ckptd.core.headers import run_of
from ckptd.errors import CkptdError

_log = structlog.get_logger(__name__)


def unprotected_steps(
    catalogue: Catalogue, waiting: Iterable[tuple[str, int | None]]
) -> int | None:
    """By how many training steps the newest checkpoint that waits is ahead of the newest version
    of its run: of the run that has most. `waiting` are names and steps. 0 when none waits, None
    when steps are not known."""
    names = list(waiting)
    if not names:
        return 0
    newest: dict[str, int] = {}
    for name, step in names:
        if step is not None:
            run = run_of(name)
            newest[run] = max(step, newest.get(run, 0))
    if not newest:
        return None
    return max(max(0, step - _stored_step(catalogue, run)) for run, step in newest.items())


def _stored_step(catalogue: Catalogue, run: str) -> int:
    return max((v.step for v in catalogue.run_versions(run) if v.step is not None), default=0)


class VersionCounts:
    """Counts the versions of the cluster by state, as long as `is_wanted` says so."""

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[Cluster]],
        is_wanted: Callable[[], bool],
        told: Callable[[dict[str, int] | None], None],
    ) -> None:
        self._connect = connect
        self._is_wanted = is_wanted
        self._told = told

    async def run(self) -> None:
        """Looks at least limits.SURVEY_INTERVAL_MIN_S apart, and for a small share of the time."""
        while True:
            took_s = 0.0
            if self._is_wanted():
                started_s = time.monotonic()
                try:
                    self._told(await self._count())
                except CkptdError as error:
                    # What was true may not be any more: no number is better than a wrong one.
                    _log.debug("survey_failed", reason=error.message)
                    self._told(None)
                took_s = time.monotonic() - started_s
            else:
                self._told(None)
            await asyncio.sleep(max(limits.SURVEY_INTERVAL_MIN_S, took_s / limits.SURVEY_SHARE_MAX))

    async def _count(self) -> dict[str, int]:
        async with self._connect() as cluster:
            found = await survey(cluster)
            counts = Counter(version.state for version in found.versions.values())
            for unstored in await cluster.watched():
                counts[State.STORING if unstored.state == "storing" else State.PENDING] += 1
        return {state.value: counts[state] for state in State if state is not State.UNREACHABLE}
