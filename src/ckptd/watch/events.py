"""File events, to look at once where something happened.

They are a hint: without them (no inotify watches left, a network file system, an operating system
that reports nothing) the periodic scans find everything, only later.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Final

import structlog
from watchdog.events import FileSystemEvent, FileSystemEventHandler
from watchdog.observers import Observer
from watchdog.observers.api import BaseObserver, ObservedWatch

_log = structlog.get_logger(__name__)
# Directories made faster than they are followed: it says so on stderr, and goes on rightly.
warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"watchdog\.")
_READ_ONLY: Final = frozenset({"opened", "closed_no_write"})

OnEvent = Callable[[str, str], None]


class RootEvents:
    """Events below the watched roots. `on_event(root, path)` is called on another thread, with a
    path relative to the root."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._observer: BaseObserver | None = None
        self._watches: dict[str, ObservedWatch] = {}

    def follow(self, root: str) -> bool:
        """Begins, or begins anew after the root was away; whether events will come."""
        self.leave(root)
        try:
            if self._observer is None:
                self._observer = Observer()
                self._observer.daemon = True
                self._observer.start()
            handler = _Handler(root, self._on_event)
            self._watches[root] = self._observer.schedule(handler, root, recursive=True)
        except Exception as error:  # whatever the platform's way of failing is
            _log.warning(
                "no_file_events",
                root=root,
                reason=str(error),
                next="nothing is lost, scans find changes; on Linux raise "
                "fs.inotify.max_user_watches",
            )
            return False
        return True

    def leave(self, root: str) -> None:
        """No more events of a root that is away."""
        watch = self._watches.pop(root, None)
        if watch is None or self._observer is None:
            return
        try:
            self._observer.unschedule(watch)
        except (KeyError, OSError):
            pass  # its thread had ended with the root

    def close(self) -> None:
        """Ends all threads."""
        if self._observer is not None:
            self._observer.stop()
            self._observer.join()
            self._observer = None
            self._watches.clear()


class _Handler(FileSystemEventHandler):
    def __init__(self, root: str, on_event: OnEvent) -> None:
        self._root = root
        self._on_event = on_event

    def dispatch(self, event: FileSystemEvent) -> None:
        if event.event_type in _READ_ONLY:
            return
        for path in (event.src_path, event.dest_path):
            if path:
                relative = os.path.relpath(os.fsdecode(path), self._root)
                if not relative.startswith(".."):
                    self._on_event(self._root, "" if relative == "." else relative)
