"""What the product gets in place of clocks, chance, threads, sockets, TLS and system calls.

Modules are substituted by name in each module of ckptd, once in a process; nothing of the product
itself is replaced, but for its HTTP pages, which nobody reads here.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures._base
import datetime as real_datetime
import importlib
import inspect
import os as real_os
import pkgutil
import random as real_random
import re
import secrets as real_secrets
import select as real_select
import socket as real_socket
import sys
import threading as real_threading
import time as real_time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Final

import structlog
from tests.simulation import disk, threads
from tests.simulation.kernel import BOOT_MONOTONIC_S, FIRST_WALL_S, current_process
from tests.simulation.network import (
    SimulatedSelect,
    SimulatedSocketModule,
    SimulatedSsl,
    SimulatedTlsStream,
)
from tests.simulation.threads import KERNEL, Pool, SimulatedThreading

import ckptd
from ckptd.net.tls_stream import TlsStream

_REAL: Final = ("time", "random", "secrets", "select", "_thread")
# Parts that no simulated process runs.
_NOT_SIMULATED: Final = ("ckptd.cli.", "ckptd.__main__")


def _wall_s() -> float:
    process = current_process()
    now_s = KERNEL[-1].now_s if KERNEL else 0.0
    return FIRST_WALL_S + now_s if process is None else process.host.wall_s(now_s)


def _monotonic_s() -> float:
    process = current_process()
    now_s = KERNEL[-1].now_s if KERNEL else 0.0
    return BOOT_MONOTONIC_S + now_s if process is None else process.host.monotonic_s(now_s)


class SimulatedTime:
    """The module `time` as the product sees it."""

    time = staticmethod(_wall_s)
    monotonic = staticmethod(_monotonic_s)
    perf_counter = staticmethod(_monotonic_s)
    time_ns = staticmethod(lambda: int(_wall_s() * 1e9))
    monotonic_ns = staticmethod(lambda: int(_monotonic_s() * 1e9))

    @staticmethod
    def sleep(seconds: float) -> None:
        KERNEL[-1].block(seconds, "sleep")

    def __getattr__(self, name: str) -> Any:
        return getattr(real_time, name)


class SimulatedDatetime(real_datetime.datetime):
    """`datetime.datetime` as the product sees it."""

    @classmethod
    def now(cls, tz: real_datetime.tzinfo | None = None) -> Any:
        return real_datetime.datetime.fromtimestamp(_wall_s(), tz)


class SeededRandom(real_random.Random):
    """A generator that nobody has seeded gets its seed from that of the simulation."""

    def __init__(self, seed: Any = None) -> None:
        super().__init__(KERNEL[-1].rng.getrandbits(64) if seed is None and KERNEL else seed)


class SimulatedRandom:
    """The module `random` as the product sees it."""

    Random = SeededRandom

    def __getattr__(self, name: str) -> Any:
        return getattr(KERNEL[-1].rng if KERNEL else real_random, name)


class SimulatedSecrets:
    """The module `secrets` as the product sees it."""

    @staticmethod
    def token_hex(size: int = 16) -> str:
        return KERNEL[-1].rng.randbytes(size).hex()

    @staticmethod
    def token_bytes(size: int = 16) -> bytes:
        return KERNEL[-1].rng.randbytes(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(real_secrets, name)


class SimulatedOs:
    """The module `os` where a command reads what it stores: real files, but each read takes time,
    and something may happen to them after one."""

    @staticmethod
    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        _pause_of_read()
        return _was_read(real_os.preadv(descriptor, buffers, offset))

    @staticmethod
    def readv(descriptor: int, buffers: Sequence[memoryview]) -> int:
        _pause_of_read()
        return _was_read(real_os.readv(descriptor, buffers))

    def __getattr__(self, name: str) -> Any:
        return getattr(real_os, name)


def _pause_of_read() -> None:
    if KERNEL[-1].current is not None:
        KERNEL[-1].block(KERNEL[-1].rng.uniform(0.0, 0.005), "disk")


def _was_read(count: int) -> int:
    process = current_process()
    if process is not None and process.at_read is not None:
        left, happens = process.at_read
        process.at_read = (left - 1, happens) if left > 1 else None
        if left <= 1:
            happens()
    return count


class _NoPages:
    """HttpServer that serves nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.address = ("127.0.0.1", 0)

    async def start(self) -> None:
        pass

    async def close(self) -> None:
        pass


RAM_DIRECTORY: Final = re.compile(r"/\S*ckptd-sim-\w+")  # another one each time
_installed = False
_trace: list[Callable[[str], None]] = []


def trace_to(write: Callable[[str], None] | None) -> None:
    """Where log lines go; None: nowhere."""
    _trace[:] = [] if write is None else [write]


def _log_line(logger: object, level: str, event: Any) -> Any:
    process = current_process()
    if _trace and (process is None or process.alive):
        now_s = KERNEL[-1].now_s if KERNEL else 0.0
        what = event.pop("event", "")
        error = event.pop("exc_info", None)
        fields = " ".join(f"{key}={_short(value)}" for key, value in event.items())
        _trace[-1](f"{now_s:12.3f} {(process and process.name) or '-':10} {what} {fields}")
        if error:
            import traceback

            shown = sys.exc_info()[1] if error is True else error
            if isinstance(shown, BaseException):
                _trace[-1]("".join(traceback.format_exception(shown)))
    raise structlog.DropEvent


def _short(value: object) -> str:
    text = RAM_DIRECTORY.sub("…", str(value))
    return text[:16] if len(text) == 64 else text


def install() -> None:
    """Replaces; once in a process, for good."""
    global _installed
    if _installed:
        return
    _installed = True
    substitutes: list[tuple[str, object, object]] = [
        ("time", real_time, SimulatedTime()),
        ("threading", real_threading, SimulatedThreading),
        ("random", real_random, SimulatedRandom()),
        ("secrets", real_secrets, SimulatedSecrets()),
        ("select", real_select, SimulatedSelect),
        ("socket", real_socket, SimulatedSocketModule()),
        ("datetime", real_datetime.datetime, SimulatedDatetime),
        ("ThreadPoolExecutor", concurrent.futures.ThreadPoolExecutor, Pool),
        ("Random", real_random.Random, SeededRandom),
        ("TlsStream", TlsStream, SimulatedTlsStream),
    ]
    for module in _modules():
        _refuse_captured(module)
        for name, real, substitute in substitutes:
            if module.__dict__.get(name) is real:
                module.__dict__[name] = substitute
    sys.modules["ckptd.net.tls"].__dict__["ssl"] = SimulatedSsl()
    sys.modules["ckptd.client.hashing"].__dict__["os"] = SimulatedOs()
    sys.modules["ckptd.observe.http"].__dict__["HttpServer"] = _NoPages
    sys.modules["ckptd.observe.http"].__dict__["tls_context"] = lambda *_: None
    concurrent.futures._base.__dict__["threading"] = SimulatedThreading
    disk.route_calls()
    # What is left of killed processes is collected after their loop is closed.
    sys.unraisablehook = lambda _: None
    warnings.simplefilter("ignore", RuntimeWarning)
    structlog.configure(processors=[_log_line], cache_logger_on_first_use=False)


def _refuse_captured(module: Any) -> None:
    """A default argument keeps the real clock, or real chance, whatever is substituted later."""
    for owner in [module, *filter(inspect.isclass, vars(module).values())]:
        for name, function in list(vars(owner).items()):
            if not inspect.isfunction(function):
                continue
            defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            real = [each for each in defaults if getattr(each, "__module__", "") in _REAL]
            assert not real, f"{module.__name__}.{name} has {real[0]} as a default"


def _modules() -> list[Any]:
    found = []
    for info in pkgutil.walk_packages(ckptd.__path__, "ckptd."):
        if not info.name.startswith(_NOT_SIMULATED):
            found.append(importlib.import_module(info.name))
    return [sys.modules["ckptd"], *found]


__all__ = ["SimulatedTime", "install", "threads", "trace_to"]
