"""Who fetches which shard from where, decided without clock, threads or sockets.

Every place (a node, or a store directory) takes the next shard that it holds as soon as it has
finished one, so that places do work in proportion to their speed. A place that has nothing left
takes over what another one is stuck with. A shard is fetched by one place at a time: whoever takes
it over owns it from then on, and what the former owner still receives is thrown away.

Times are seconds on any clock that only goes forward.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

STALLED_AFTER_S: Final = 2.0
"""A shard of which nothing arrived for this long may be taken over."""
SLOWER_FACTOR: Final = 4.0
"""A shard may be taken over when what is left of it takes this many times longer than the whole of
it from the place that has nothing to do."""
WORTH_TAKING_OVER_S: Final = 1.0
"""What is finished sooner than this is left where it is."""
_SPEED_MEMORY: Final = 0.5  # weight of the speeds before the newest one


@dataclass(eq=False)
class Attempt:
    """One fetch of shard number `shard` from `place`. Its owner updates `received`, `moved_s`."""

    shard: int
    place: str
    size: int
    began_s: float
    moved_s: float
    received: int = 0
    cancelled: bool = False

    def moved(self, size: int, now_s: float) -> None:
        """`size` more bytes have arrived."""
        self.received += size
        self.moved_s = now_s

    def left_s(self, now_s: float) -> float:
        """How long the rest takes at the speed so far."""
        if not self.received:
            return float("inf") if now_s - self.began_s >= STALLED_AFTER_S else 0.0
        return (self.size - self.received) * (now_s - self.began_s) / self.received


@dataclass
class _Shard:
    size: int
    places: tuple[str, ...]
    excluded: tuple[str, ...] = ()  # do not have it, or have it corrupt
    avoided: tuple[str, ...] = ()  # failed, or were too slow with it
    done: bool = False


@dataclass
class _Place:
    queue: deque[int]
    unfinished: int
    speed: float = 0.0  # bytes per second of one fetch; 0 while unknown
    failed_once: bool = False
    lost: bool = False
    received: int = 0  # bytes of verified shards


@dataclass
class Schedule:
    """The state of one restore. Not thread-safe: the caller holds a lock.

    `sizes` in bytes and `places` are given for each shard, in the order of wish. `fallbacks`
    counts how often something else had to be asked: for a bad or missing copy, a broken
    connection, a slow place, and a place that could not be reached.
    """

    sizes: Sequence[int]
    places: Sequence[Sequence[str]]
    fallbacks: int = 0
    _shards: list[_Shard] = field(init=False)
    _places: dict[str, _Place] = field(init=False)
    _running: set[Attempt] = field(default_factory=set, init=False)
    _done: int = field(default=0, init=False)
    _hopeless: set[int] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        self._shards = [
            _Shard(size, tuple(places))
            for size, places in zip(self.sizes, self.places, strict=True)
        ]
        self._places = {}
        for index, shard in enumerate(self._shards):
            for place in shard.places:
                queue = self._places.setdefault(place, _Place(deque(), 0))
                queue.queue.append(index)
                queue.unfinished += 1
            if not shard.places:
                self._hopeless.add(index)

    @property
    def everywhere(self) -> list[str]:
        """All places that hold anything, sorted."""
        return sorted(self._places)

    @property
    def finished(self) -> bool:
        """Whether every shard is done."""
        return self._done == len(self._shards)

    @property
    def hopeless(self) -> list[int]:
        """Shards that no place is left for."""
        return sorted(self._hopeless)

    def received(self) -> dict[str, int]:
        """By place, the bytes of the verified shards that came from there."""
        return {name: place.received for name, place in self._places.items() if place.received}

    def lost(self) -> list[str]:
        """Places that were given up."""
        return sorted(name for name, place in self._places.items() if place.lost)

    def excluded(self, shard: int) -> tuple[str, ...]:
        """Places whose copy of the shard is bad or missing."""
        return self._shards[shard].excluded

    def needed(self, place: str) -> bool:
        """Whether there is still something that `place` could be asked for."""
        found = self._places[place]
        return not found.lost and found.unfinished > 0

    # -- fetching

    def take(self, place: str, now_s: float) -> Attempt | None:
        """The next fetch for `place`; None when it has nothing to do at the moment.

        It may displace another attempt at the same shard, which is `cancelled` then: its owner has
        to be stopped first.
        """
        own = self._places[place]
        while own.queue and not own.lost:
            index = own.queue.popleft()
            shard = self._shards[index]
            if self._is_waiting(index) and place in self._candidates(shard):
                return self._begin(index, place, now_s)
        if own.lost:
            return None
        return self._take_over(place, own, now_s)

    def _take_over(self, place: str, own: _Place, now_s: float) -> Attempt | None:
        stuck = [
            attempt
            for attempt in self._running
            if attempt.place != place
            and place in self._usable(self._shards[attempt.shard])
            and place not in self._shards[attempt.shard].avoided
            and self._is_stuck(attempt, own.speed, now_s)
        ]
        if not stuck:
            return None
        worst = max(stuck, key=lambda attempt: attempt.left_s(now_s))
        self._cancel(worst)
        self._shards[worst.shard].avoided += (worst.place,)
        self.fallbacks += 1
        return self._begin(worst.shard, place, now_s)

    @staticmethod
    def _is_stuck(attempt: Attempt, own_speed: float, now_s: float) -> bool:
        if now_s - attempt.moved_s >= STALLED_AFTER_S:
            return True
        if not own_speed or now_s - attempt.began_s < WORTH_TAKING_OVER_S:
            return False
        left_s = attempt.left_s(now_s)
        whole_s = attempt.size / own_speed
        return left_s > WORTH_TAKING_OVER_S and left_s > SLOWER_FACTOR * whole_s

    def _begin(self, index: int, place: str, now_s: float) -> Attempt:
        attempt = Attempt(index, place, self._shards[index].size, now_s, now_s)
        self._running.add(attempt)
        return attempt

    def _cancel(self, attempt: Attempt) -> None:
        attempt.cancelled = True
        self._running.discard(attempt)

    def finish(self, attempt: Attempt, now_s: float) -> bool:
        """The shard has arrived and is verified. False when it was taken over: not counted."""
        if attempt.cancelled:
            return False
        shard = self._shards[attempt.shard]
        self._running.discard(attempt)
        shard.done = True
        self._done += 1
        for name in shard.places:
            if name not in shard.excluded:
                self._places[name].unfinished -= 1
        place = self._places[attempt.place]
        place.received += attempt.size
        speed = attempt.size / max(now_s - attempt.began_s, 1e-6)
        place.speed = (
            _SPEED_MEMORY * place.speed + (1 - _SPEED_MEMORY) * speed if place.speed else speed
        )
        return True

    def fail(self, attempt: Attempt, *, copy_is_bad: bool) -> None:
        """The fetch failed. Other places are asked for the shard first; with `copy_is_bad` this
        one is not asked for it again."""
        self._places[attempt.place].failed_once = True
        if attempt.cancelled:  # counted when it was taken over
            if copy_is_bad:
                self._exclude(attempt.shard, attempt.place)
                self._offer(attempt.shard)  # this may have been the last place for it
            return
        self.fallbacks += 1
        self._running.discard(attempt)
        if copy_is_bad:
            self._exclude(attempt.shard, attempt.place)
        else:
            self._shards[attempt.shard].avoided += (attempt.place,)
        self._offer(attempt.shard)

    def put_back(self, attempt: Attempt) -> None:
        """The place was busy: the shard goes back to whoever can take it, and nothing failed."""
        if not attempt.cancelled:
            self._running.discard(attempt)
            self._offer(attempt.shard)

    def unreachable(self, place: str) -> None:
        """No connection to `place` could be made; it may be tried again."""
        found = self._places[place]
        if not found.failed_once:
            found.failed_once = True
            self.fallbacks += 1

    def lose(self, place: str) -> None:
        """Gives a place up for good."""
        found = self._places[place]
        if found.lost:
            return
        found.lost = True
        for attempt in [a for a in self._running if a.place == place]:
            self._cancel(attempt)
        for index, shard in enumerate(self._shards):
            if place in shard.places:
                self._offer(index)

    # -- inside

    def _is_waiting(self, index: int) -> bool:
        running = any(attempt.shard == index for attempt in self._running)
        return not (self._shards[index].done or running)

    def _usable(self, shard: _Shard) -> list[str]:
        return [
            name
            for name in shard.places
            if name not in shard.excluded and not self._places[name].lost
        ]

    def _candidates(self, shard: _Shard) -> list[str]:
        """Where to ask: slow places only when there is no other."""
        usable = self._usable(shard)
        return [name for name in usable if name not in shard.avoided] or usable

    def _exclude(self, index: int, place: str) -> None:
        shard = self._shards[index]
        if place not in shard.excluded:
            shard.excluded += (place,)
            if not shard.done:
                self._places[place].unfinished -= 1

    def _offer(self, index: int) -> None:
        """Lets every place that may have it take a waiting shard next."""
        if not self._is_waiting(index):
            return
        candidates = self._candidates(self._shards[index])
        if not candidates:
            self._hopeless.add(index)
        for name in candidates:
            self._places[name].queue.appendleft(index)
