"""What `threading` and the thread pool of `concurrent.futures` offer, for simulated threads.

The loop's own thread never blocks here: when it needs a lock that somebody holds, the holder runs
until it has given it back. Whoever would make it wait for anything else has found a fault.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading as real
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

from tests.simulation.kernel import Kernel, ProcessDied, SimulatedThread, current_process

_T = TypeVar("_T")

KERNEL: list[Kernel] = []


def kernel() -> Kernel:
    return KERNEL[-1]


def _me() -> SimulatedThread | None:
    return KERNEL[-1].current if KERNEL else None


class Lock:
    """As threading.Lock; `owner` is a simulated thread, "loop", or None."""

    reentrant = False

    def __init__(self) -> None:
        self.owner: SimulatedThread | str | None = None
        self._count = 0
        self._waiting: deque[SimulatedThread] = deque()

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        me = _me()
        key = me if me is not None else "loop"
        if self.owner == key and self.reentrant:
            self._count += 1
            return True
        if self.owner is None:
            self.owner, self._count = key, 1
            return True
        if not blocking:
            return False
        if me is None:
            while self.owner is not None:
                if not isinstance(self.owner, SimulatedThread):
                    raise AssertionError("the event loop waits for itself")
                if self.owner.ended:
                    break
                kernel().hurry(self.owner)
        else:
            while self.owner is not None:
                self._waiting.append(me)
                woken = kernel().block(None if timeout < 0 else timeout, "lock", self)
                if not woken:
                    return False
        self.owner, self._count = key, 1
        return True

    def release(self) -> None:
        self._count -= 1
        if self._count > 0:
            return
        if self.owner is None:
            raise RuntimeError("release unlocked lock")
        self.owner = None
        while self._waiting:
            thread = self._waiting.popleft()
            if thread.parked and thread.waits_for is self:
                kernel().wake(thread)
                break

    def locked(self) -> bool:
        return self.owner is not None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class RLock(Lock):
    reentrant = True


class Condition:
    """As threading.Condition."""

    def __init__(self, lock: Lock | None = None) -> None:
        self._lock = RLock() if lock is None else lock
        self._waiting: list[SimulatedThread] = []
        self.acquire = self._lock.acquire
        self.release = self._lock.release

    def __enter__(self) -> bool:
        return self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self, timeout: float | None = None) -> bool:
        me = _me()
        if me is None:
            raise AssertionError("the event loop would wait for a condition")
        count, self._lock._count = self._lock._count, 1
        self._lock.release()
        self._waiting.append(me)
        try:
            return kernel().block(timeout, "condition")
        finally:
            if me in self._waiting:
                self._waiting.remove(me)
            try:
                self._lock.acquire()
            except ProcessDied:
                self._lock.owner = me
            self._lock._count = count

    def wait_for(self, predicate: Callable[[], _T], timeout: float | None = None) -> _T:
        result = predicate()
        end_s = None if timeout is None else kernel().now_s + timeout
        while not result:
            left_s = None if end_s is None else end_s - kernel().now_s
            if left_s is not None and left_s <= 0:
                break
            self.wait(left_s)
            result = predicate()
        return result

    def notify(self, n: int = 1) -> None:
        while self._waiting and n > 0:
            kernel().wake(self._waiting.pop(0))
            n -= 1

    def notify_all(self) -> None:
        self.notify(len(self._waiting))


class Event:
    """As threading.Event."""

    def __init__(self) -> None:
        self._condition = Condition(Lock())
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True
        self._condition.notify_all()

    def clear(self) -> None:
        self._set = False

    def wait(self, timeout: float | None = None) -> bool:
        with self._condition:
            return self._condition.wait_for(self.is_set, timeout)


class Semaphore:
    """As threading.Semaphore."""

    def __init__(self, value: int = 1) -> None:
        self._value = value
        self._condition = Condition(Lock())

    def acquire(self, blocking: bool = True, timeout: float | None = None) -> bool:
        if not blocking:
            timeout = 0.0
        with self._condition:
            if not self._value and not self._condition.wait_for(lambda: self._value, timeout):
                return False
            self._value -= 1
            return True

    def release(self, n: int = 1) -> None:
        with self._condition:
            self._value += n
            self._condition.notify(n)

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


class Thread:
    """As threading.Thread."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        self.name = name or "thread"
        self.daemon = bool(daemon)
        self._target = target
        self._arguments = args, kwargs or {}
        self._simulated: SimulatedThread | None = None
        self._ended = Event()

    def start(self) -> None:
        self._simulated = SimulatedThread(self._run, self.name, current_process())
        kernel().start_thread(self._simulated)

    def _run(self) -> None:
        try:
            self.run()
        finally:
            self._ended.set()

    def run(self) -> None:
        if self._target is not None:
            self._target(*self._arguments[0], **self._arguments[1])

    def join(self, timeout: float | None = None) -> None:
        self._ended.wait(timeout)

    def is_alive(self) -> bool:
        return self._simulated is not None and not self._ended.is_set()


class Pool:
    """As concurrent.futures.ThreadPoolExecutor."""

    def __init__(self, max_workers: int = 8, thread_name_prefix: str = "pool", **_: Any) -> None:
        self._name = thread_name_prefix
        self._free = max_workers
        self._queue: deque[Callable[[], None]] = deque()
        self._closed = False
        self._running = 0
        self._idle = Condition()

    def submit(self, work: Callable[..., _T], /, *args: Any, **named: Any) -> Future[_T]:
        future: Future[_T] = Future()
        context = contextvars.copy_context()
        self.start(lambda: context.run(_complete, future, work, args, named))
        return future

    def start(self, work: Callable[[], None]) -> None:
        """Has `work` done, which tells nobody."""
        if self._closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        self._queue.append(work)
        self._start()

    def map(self, work: Callable[..., _T], *arguments: Iterable[Any]) -> Iterator[_T]:
        futures = [self.submit(work, *each) for each in zip(*arguments, strict=False)]
        return (future.result() for future in futures)

    def _start(self) -> None:
        if self._free and self._queue:
            self._free -= 1
            self._running += 1
            kernel().start_thread(SimulatedThread(self._run, self._name, current_process()))

    def _run(self) -> None:
        try:
            while self._queue:
                self._queue.popleft()()
        finally:
            self._free += 1
            self._running -= 1
            self._idle.notify_all()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._closed = True
        if cancel_futures:
            self._queue.clear()
        if wait and _me() is not None:
            with self._idle:
                self._idle.wait_for(lambda: not self._running)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _complete(
    future: Future[_T], work: Callable[..., _T], args: tuple[Any, ...], named: dict[str, Any]
) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work(*args, **named)
    except ProcessDied:
        raise
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)


def run_in_thread(
    loop: Kernel, executor: Any, work: Callable[..., _T], arguments: tuple[Any, ...]
) -> asyncio.Future[_T]:
    """As loop.run_in_executor."""
    future: asyncio.Future[_T] = loop.create_future()

    def run() -> None:
        if future.cancelled():
            return
        try:
            result = work(*arguments)
        except ProcessDied:
            raise
        except BaseException as error:
            if not future.done():
                future.set_exception(error)
        else:
            if not future.done():
                future.set_result(result)

    if isinstance(executor, Pool):
        executor.start(run)
    else:
        loop.start_thread(SimulatedThread(run, "to_thread", current_process()))
    return future


class SimulatedThreading:
    """The module `threading` as the product sees it."""

    Lock = Lock
    RLock = RLock
    Condition = Condition
    Event = Event
    Semaphore = Semaphore
    BoundedSemaphore = Semaphore
    Thread = Thread
    local = real.local
    get_ident = staticmethod(lambda: id(_me()))
    current_thread = staticmethod(real.current_thread)
    TIMEOUT_MAX = real.TIMEOUT_MAX
