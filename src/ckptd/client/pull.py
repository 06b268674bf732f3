"""Pulls shards from all places at once until each is verified and written, or cannot be had."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Final

from ckptd.client.progress import Progress
from ckptd.client.pull_schedule import Schedule
from ckptd.client.pull_threads import Outputs, PullThreads, WantedShard
from ckptd.client.shard_sources import ShardSources
from ckptd.errors import CkptdError, NoGoodCopy, NotEnoughNodes

_ROUNDS_MAX: Final = 16


class Stopped(CkptdError):
    """The pull was called off."""

    kind = "interrupted"


class Pull:
    """Pulls shards into outputs, as often as it is asked to.

    `received` counts verified bytes by place, `fallbacks` how often something else had to be asked
    because a copy was bad or missing, a connection broke, or a place was slow. When `stop` is set,
    `run` ends with Stopped.
    """

    def __init__(self, sources: ShardSources, *, progress: Progress, stop: threading.Event) -> None:
        self.sources = sources
        self.progress = progress
        self.stop = stop
        self.received: Counter[str] = Counter()
        self.fallbacks = 0

    def run(self, shards: Sequence[WantedShard], outputs: Outputs) -> None:
        """Returns when every shard is verified and written.

        Raises NoGoodCopy when a shard has no good copy and every place has answered, NotEnoughNodes
        when one has not, Stopped, and whatever `outputs` raises.
        """
        bad: dict[int, set[str]] = {}
        unreadable: set[int] = set()
        done: set[int] = set()

        for _ in range(_ROUNDS_MAX):
            todo = [index for index in range(len(shards)) if index not in done]
            if not todo:
                return
            # Asked anew in each round: copies may have moved, and nodes may have died.
            held = self.sources.holders([shards[index].digest for index in todo])
            places = [
                [place for place in holders if place not in bad.get(index, ())]
                for index, holders in zip(todo, held, strict=True)
            ]
            nowhere = [index for index, holders in zip(todo, places, strict=True) if not holders]
            if nowhere:
                break
            schedule = Schedule([shards[index].size for index in todo], places)
            threads = PullThreads(
                self.sources,
                [shards[index] for index in todo],
                schedule,
                outputs,
                progress=self.progress,
                on_done=lambda number, todo=todo: done.add(todo[number]),  # type: ignore[misc]
                stop=self.stop,
            )
            try:
                threads.run()
            finally:
                self.received.update(schedule.received())
                self.fallbacks += schedule.fallbacks
            if self.stop.is_set():
                raise Stopped("the restore was interrupted")
            for number, index in enumerate(todo):
                if excluded := schedule.excluded(number):
                    bad.setdefault(index, set()).update(excluded)
            unreadable.update(todo[number] for number in threads.unreadable)
            nowhere = [todo[number] for number in schedule.hopeless]
        raise self._no_good_copy(shards, nowhere, bad, unreadable)

    def _no_good_copy(
        self,
        shards: Sequence[WantedShard],
        nowhere: list[int],
        bad: dict[int, set[str]],
        unreadable: set[int],
    ) -> CkptdError:
        self.sources.flush()
        absent = self.sources.absent()
        what = f"shard {shards[nowhere[0]].digest.hex()}"
        if len(nowhere) > 1:
            what += f" and {len(nowhere) - 1} others"
        places = sorted({place for index in nowhere for place in bad.get(index, ())})
        known = f" (bad or gone on {', '.join(places)})" if places else ""
        if absent or not unreadable.isdisjoint(nowhere):
            why = f"not reached: {'; '.join(absent)}" if absent else "reading it broke off"
            return NotEnoughNodes(
                f"no good copy of {what} can be reached{known}; {why}",
                next=self.sources.how_to_reach,
            )
        return NoGoodCopy(
            f"there is no good copy of {what}{known}, and all nodes have answered",
            next="ckptd verify --all",
        )
