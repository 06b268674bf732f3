"""A `FileSystem` that lets a test see, refuse, skip or follow every call to another one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from ckptd.store.filesystem import FileSystem

FLUSHES = ("fsync", "fsync_directory")


class ProcessDied(BaseException):
    """Stands for the end of the process: nothing below may catch it."""


@dataclass(frozen=True)
class Call:
    """One call: its number from 1 on, its arguments, and the place in the store that made it."""

    number: int
    name: str
    arguments: tuple[Any, ...]
    site: str


class Hooked:
    """Calls `before` ahead of every call (True: leave the call out) and `after` behind it."""

    def __init__(
        self,
        inner: FileSystem,
        before: Callable[[Call], bool | None] = lambda call: None,
        after: Callable[[Call, Any], None] = lambda call, result: None,
    ) -> None:
        self._inner = inner
        self._before = before
        self._after = after
        self.calls: list[Call] = []
        self.results: dict[int, Any] = {}  # of the calls that did not fail, by number

    def __getattr__(self, name: str) -> Callable[..., Any]:
        inner = getattr(self._inner, name)

        def hooked(*arguments: Any) -> Any:
            frame = sys._getframe(1)
            site = f"{frame.f_code.co_name}:{frame.f_lineno}"
            frozen = tuple(
                bytes(each) if name == "pwrite" and isinstance(each, memoryview) else each
                for each in arguments
            )
            call = Call(len(self.calls) + 1, name, frozen, site)
            self.calls.append(call)
            result = None if self._before(call) else inner(*arguments)
            self.results[call.number] = result
            self._after(call, result)
            return result

        return hooked

    @property
    def port(self) -> FileSystem:
        """This object as what it stands for."""
        return cast(FileSystem, self)


def dies_at(inner: FileSystem, number: int, die: Callable[[], None] | None = None) -> Hooked:
    """The process dies in front of this call: it and all later ones do nothing."""

    def before(call: Call) -> None:
        if call.number >= number:
            if die is not None:
                die()
            raise ProcessDied

    return Hooked(inner, before)


def fails_at(inner: FileSystem, number: int, code: int, *, done: bool) -> Hooked:
    """This one call fails with `code`, `done` or not done; all others work."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    def before(call: Call) -> None:
        if call.number == number and not done:
            fail()

    def after(call: Call, result: Any) -> None:
        if call.number == number and done:
            if call.name == "open":  # nobody gets to know the descriptor
                inner.close(result)
            fail()

    return Hooked(inner, before, after)
