"""One thread, one virtual clock: an event loop and blocking threads that take turns.

Everything that runs in a simulation belongs to a `Process` of some `Host`; a context variable says
to which. The loop is asyncio's own, with a selector that waits for nothing but virtual time. A
simulated thread holds the turn: it runs until it blocks in one of our primitives, then the loop
goes on. So at any moment one thread runs, and the order is decided here alone. Its stack is a
greenlet's where that package is installed, and a real thread's elsewhere: the same happens, but
each turn takes far longer then.
"""

from __future__ import annotations

import _thread
import asyncio
import contextvars
import heapq
import importlib
import importlib.util
import random
from asyncio import events
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

_T = TypeVar("_T")

# Of a clock that is right, when a simulation begins. Before the times of the real files that are
# stored, so that the product takes their times for no proof that they held still.
FIRST_WALL_S: Final = 1_400_000_000.0
BOOT_MONOTONIC_S: Final = 100.0

_TURN_S: Final = (
    1e-6  # that a turn of the loop takes: no time at all could be waited for without end
)
_SPIN_TURNS: Final = 100_000
_SKIPPED_S: Final = 60.0

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class ProcessDied(BaseException):
    """Unwinds whatever still runs of a process that is dead."""


class Host:
    """A machine: its clocks, and whether it has power and is awake."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.powered = True
        self.boots = 0
        self.wall_offset_s = 0.0
        self.slept_s = 0.0
        self.asleep_since_s: float | None = None
        self.boot_s = 0.0
        self._deferred: list[events.Handle] = []

    def wall_s(self, now_s: float) -> float:
        """What the machine believes: never before 1970."""
        return max(1.0, FIRST_WALL_S + now_s + self.wall_offset_s)

    def monotonic_s(self, now_s: float) -> float:
        """Stands still while the machine sleeps."""
        awake_s = now_s if self.asleep_since_s is None else self.asleep_since_s
        return BOOT_MONOTONIC_S + awake_s - self.boot_s - self.slept_s

    def sleep(self, now_s: float) -> None:
        self.asleep_since_s = now_s

    def wake(self, kernel: Kernel) -> None:
        if self.asleep_since_s is None:
            return
        self.slept_s += kernel.now_s - self.asleep_since_s
        self.asleep_since_s = None
        kernel.run_again(self._deferred)
        self._deferred = []

    def power_off(self) -> None:
        self.powered = False
        self.asleep_since_s = None
        self._deferred = []

    def power_on(self, now_s: float) -> None:
        self.powered = True
        self.boots += 1
        self.boot_s = now_s
        self.slept_s = 0.0

    def defer(self, handle: events.Handle) -> None:
        self._deferred.append(handle)


class Process:
    """A daemon or command on a host. Once dead, nothing of it runs or reaches anything."""

    def __init__(self, host: Host, name: str) -> None:
        self.host = host
        self.name = name
        self.alive = True
        self._tasks: list[asyncio.Task[Any]] = []
        self._tidy_at = 64
        self.threads: dict[SimulatedThread, None] = {}
        self.when_dead: list[Callable[[], None]] = []
        self.disk: Any = None
        self.at_read: tuple[int, Callable[[], None]] | None = None
        """Happens after so many reads of the real files that it stores."""
        self.context = contextvars.copy_context()
        """For what the loop calls on behalf of it, and nobody else runs."""
        self.context.run(PROCESS.set, self)

    def add_task(self, task: asyncio.Task[Any]) -> None:
        """Without a callback at its end: that would be every tenth thing that happens."""
        if len(self._tasks) >= self._tidy_at:
            self._tasks = self.tasks()
            self._tidy_at = 2 * len(self._tasks) + 64
        self._tasks.append(task)

    def tasks(self) -> list[asyncio.Task[Any]]:
        """Those that have not ended."""
        return [task for task in self._tasks if not task.done()]

    def __repr__(self) -> str:
        return f"<{self.name}>"


def current_process() -> Process | None:
    return PROCESS.get()


class SimulatedThread:
    """A blocking piece of work, on a carrier thread that has the turn while it runs."""

    def __init__(self, work: Callable[[], object], name: str, process: Process | None) -> None:
        self.name = name
        self.process = process
        self.context = contextvars.copy_context()
        # Of what the loop does for it.
        self.turns = contextvars.copy_context() if process is None else process.context
        self.work = work
        self.ended = False
        self.parked = False  # blocked, and nobody has woken it yet
        self.woken = False  # by somebody, not by its timeout
        self.pausable: str = "start"  # what it is blocked in: "disk" and locks may be hurried
        self.waits_for: object = None  # the lock that it waits for
        self.serial = 0
        self.stack: Any = None  # where it goes on, as _Greenlets or _RealThreads know it


class _Greenlets:
    """Simulated threads on stacks of their own in the loop's one real thread."""

    def __init__(self, run: Callable[[SimulatedThread], None]) -> None:
        module = importlib.import_module("greenlet")
        self._run = run
        self._greenlet = module.greenlet
        self._loop = module.getcurrent()

    def begin(self, thread: SimulatedThread) -> None:
        """Lets a new thread run until it gives its turn back or ends."""
        thread.stack = self._greenlet(self._run, self._loop)
        thread.stack.gr_context = thread.context
        thread.stack.switch(thread)

    def go_on(self, thread: SimulatedThread) -> None:
        thread.stack.switch()

    def give_turn_back(self, thread: SimulatedThread) -> None:
        """On the thread's own stack: returns at its next turn."""
        self._loop.switch()

    def stop(self) -> None:
        """Nothing is kept."""


class _RealThreads:
    """Simulated threads on real ones, of which one at a time holds the turn."""

    def __init__(self, run: Callable[[SimulatedThread], None]) -> None:
        self.run = run
        self.idle: list[_Carrier] = []
        self.turn = _thread.allocate_lock()
        self.turn.acquire()

    def begin(self, thread: SimulatedThread) -> None:
        thread.stack = _thread.allocate_lock()
        thread.stack.acquire()
        carrier = self.idle.pop() if self.idle else _Carrier(self)
        carrier.begin(thread)
        self.turn.acquire()

    def go_on(self, thread: SimulatedThread) -> None:
        thread.stack.release()
        self.turn.acquire()

    def give_turn_back(self, thread: SimulatedThread) -> None:
        self.turn.release()
        thread.stack.acquire()

    def stop(self) -> None:
        for carrier in self.idle:
            carrier.stop()
        self.idle.clear()


class _Carrier:
    """A real thread that runs simulated ones, one after the other."""

    def __init__(self, stacks: _RealThreads) -> None:
        self._stacks = stacks
        self._start = _thread.allocate_lock()
        self._start.acquire()
        self._thread: SimulatedThread | None = None
        _thread.start_new_thread(self._run, ())

    def begin(self, thread: SimulatedThread) -> None:
        self._thread = thread
        self._start.release()

    def _run(self) -> None:
        while True:
            self._start.acquire()
            thread = self._thread
            if thread is None:
                return
            thread.context.run(self._stacks.run, thread)
            self._thread = None
            self._stacks.idle.append(self)
            self._stacks.turn.release()

    def stop(self) -> None:
        self._start.release()


def has_greenlets() -> bool:
    return importlib.util.find_spec("greenlet") is not None


class Kernel(asyncio.BaseEventLoop):
    """The event loop of a whole simulated cluster, on virtual time."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self._noticed_s = 0.0
        self._turns = 0
        self.steps = 0
        self._soon: deque[events.Handle] = deque()
        self._timers: list[tuple[float, int, events.TimerHandle]] = []
        self._timers_made = 0
        self.stacks: _Greenlets | _RealThreads = (
            _Greenlets(self.run_thread) if has_greenlets() else _RealThreads(self.run_thread)
        )
        self.current: SimulatedThread | None = None
        self.failures: list[str] = []
        self.set_task_factory(self._make_task)  # type: ignore[arg-type]
        self.set_exception_handler(self._note_failure)

    # -- asyncio's side: what BaseEventLoop does, without what a simulation has no use for

    def time(self) -> float:
        return self.now_s

    def call_soon(  # type: ignore[override]
        self,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.Handle:
        handle = events.Handle(callback, args, self, context)
        self._soon.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_at(  # type: ignore[override]
        self,
        when: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.TimerHandle:
        handle = events.TimerHandle(when, callback, args, self, context)
        self._timers_made += 1
        heapq.heappush(self._timers, (when, self._timers_made, handle))
        return handle

    def call_later(  # type: ignore[override]
        self,
        delay: float,
        callback: Callable[..., object],
        *args: Any,
        context: contextvars.Context | None = None,
    ) -> events.TimerHandle:
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def _run_once(self) -> None:
        soon, timers = self._soon, self._timers
        self._turns += 1
        if self._turns % _SPIN_TURNS == 0:
            self._notice_spinning()
        now_s = self.now_s + _TURN_S
        if not soon:
            while timers and timers[0][2]._cancelled:
                heapq.heappop(timers)
            if timers:
                now_s = max(now_s, timers[0][0])
        self.now_s = now_s
        while timers and timers[0][0] <= now_s:
            soon.append(heapq.heappop(timers)[2])
        for _ in range(len(soon)):
            handle: Any = soon.popleft()
            if handle._cancelled:
                continue
            process = handle._context.get(PROCESS)
            if process is not None and process.host.asleep_since_s is not None:
                process.host.defer(handle)
                continue
            self.steps += 1
            try:
                handle._context.run(handle._callback, *handle._args)
            except Exception as error:
                self._note_failure(self, {"message": repr(handle), "exception": error})

    def _notice_spinning(self) -> None:
        """Work without end while time stands still would hang the simulation, and burn a core."""
        passed_s = self.now_s - self._noticed_s
        if passed_s < 2 * _SPIN_TURNS * _TURN_S:
            handles: list[Any] = list(self._soon)
            processes = [handle._context.get(PROCESS) for handle in handles]
            busy = {process.name for process in processes if process is not None}
            self.failures.append(
                f"something spins: {_SPIN_TURNS} turns of the loop in {passed_s:.3f} s, "
                f"with work of {', '.join(sorted(busy))}"
            )
            self.now_s += _SKIPPED_S  # what was to be waited for ends at some time
        self._noticed_s = self.now_s

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _timer_handle_cancelled(self, handle: events.TimerHandle) -> None:
        pass

    def run_again(self, handles: list[events.Handle]) -> None:
        """Puts back what was held while a host slept."""
        self._soon.extend(handles)

    def _make_task(
        self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, _T], **named: Any
    ) -> asyncio.Task[_T]:
        task = asyncio.Task(work, loop=loop, **named)
        context = named.get("context")
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            process.add_task(task)
            if not process.alive:
                task.cancel()
        return task

    def _asyncgen_finalizer_hook(self, agen: object) -> None:
        """Only what a killed process has left behind is collected: nothing of it runs again."""

    def _note_failure(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        process = PROCESS.get()
        if process is not None and not process.alive:
            return
        error = context.get("exception")
        if isinstance(error, ProcessDied):
            return
        self.failures.append(f"{context.get('message')}: {error!r}")

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, work: Callable[..., _T], *arguments: Any
    ) -> Any:
        from tests.simulation.threads import run_in_thread

        return run_in_thread(self, executor, work, arguments)

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        pass

    # -- threads

    def start_thread(self, thread: SimulatedThread) -> None:
        """Lets a new thread run from the next turn on."""
        if thread.process is not None:
            thread.process.threads[thread] = None
        thread.parked = False
        self._resume_soon(thread)

    def _resume_soon(self, thread: SimulatedThread) -> None:
        thread.serial += 1
        self.call_soon(self._resume, thread, thread.serial, context=thread.turns)

    def _resume(self, thread: SimulatedThread, serial: int) -> None:
        if thread.serial == serial and not thread.ended:
            self._run_until_it_blocks(thread)

    def _run_until_it_blocks(self, thread: SimulatedThread) -> None:
        assert self.current is None, "only the loop gives turns"
        thread.serial += 1
        self.current = thread
        if thread.pausable == "start":
            thread.pausable = ""
            self.stacks.begin(thread)
        else:
            self.stacks.go_on(thread)
        self.current = None

    def run_thread(self, thread: SimulatedThread) -> None:
        """On a stack of its own: all of a thread's life."""
        try:
            if thread.process is None or thread.process.alive:
                thread.work()
        except ProcessDied:
            pass
        except BaseException as error:
            self.failures.append(f"thread {thread.name} failed: {error!r}")
        finally:
            thread.ended = True
            if thread.process is not None:
                thread.process.threads.pop(thread, None)

    def block(self, timeout_s: float | None, why: str, waits_for: object = None) -> bool:
        """In a simulated thread: waits for `wake` or until `timeout_s` have passed; whether it was
        woken. Raises ProcessDied when its process has died."""
        thread = self.current
        assert thread is not None, "only a simulated thread may block"
        if thread.process is not None and not thread.process.alive:
            raise ProcessDied
        thread.parked, thread.woken, thread.pausable = True, False, why
        thread.waits_for = waits_for
        timer = None
        if timeout_s is not None:
            timer = self.call_later(
                max(0.0, timeout_s), self._expire, thread, thread.serial, context=thread.turns
            )
        self.stacks.give_turn_back(thread)
        thread.waits_for = None
        thread.pausable = ""
        if timer is not None:
            timer.cancel()
        if thread.process is not None and not thread.process.alive:
            raise ProcessDied
        return thread.woken

    def _expire(self, thread: SimulatedThread, serial: int) -> None:
        if thread.parked and thread.serial == serial:
            thread.parked = False
            self._run_until_it_blocks(thread)

    def wake(self, thread: SimulatedThread) -> None:
        """Ends the wait of a blocked thread; it runs at its next turn."""
        if thread.parked:
            thread.parked = False
            thread.woken = True
            self._resume_soon(thread)

    def hurry(self, thread: SimulatedThread) -> None:
        """The loop itself needs a lock that this thread holds: it runs now, without the pause of
        its disk. A real loop would wait for it just so."""
        seen = [thread]
        while thread.parked and thread.waits_for is not None:
            owner = getattr(thread.waits_for, "owner", None)
            if not isinstance(owner, SimulatedThread) or owner in seen:
                break
            thread = owner
            seen.append(thread)
        if thread.ended:
            return
        if thread.parked and thread.pausable not in ("disk", "lock"):
            raise AssertionError(
                f"the event loop waits for a lock of {thread.name}, which waits for"
                f" {thread.pausable}"
            )
        thread.parked = False
        self._run_until_it_blocks(thread)

    # -- processes

    def in_process(self, process: Process | None) -> contextvars.Context:
        """A context in which code belongs to `process`."""
        context = contextvars.copy_context()
        context.run(PROCESS.set, process)
        return context

    def kill(self, process: Process) -> None:
        """The process is dead from now on. What still runs of it is unwound, and reaches nothing:
        its disk, its sockets and its clock are gone."""
        if not process.alive:
            return
        process.alive = False
        for callback in process.when_dead:
            callback()
        for task in sorted(process.tasks(), key=lambda task: task.get_name()):
            task.cancel()
        for thread in list(process.threads):
            if thread.parked:
                thread.parked = False
                self._resume_soon(thread)

    def stop_stacks(self) -> None:
        self.stacks.stop()
