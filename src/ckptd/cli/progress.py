"""Progress of long work on stderr: lines that redraw on a terminal, nothing elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import click

from ckptd.cli.session import is_terminal
from ckptd.client.progress import Progress


class _Plain(Progress):
    """Not on a terminal: only what the user should know."""

    def note(self, text: str) -> None:
        click.echo(f"ckptd: {text}", err=True)


@contextmanager
def shown_progress(what: str) -> Iterator[Progress]:
    """Progress that is shown while the context lasts: bytes, speed, time left, a line a node."""
    if not is_terminal():
        yield _Plain()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bars

    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    main = bars.add_task(what, total=None)

    class _Shown(Progress):
        def __init__(self) -> None:
            self._lock = threading.Lock()
            self._nodes: dict[str, object] = {}

        def total(self, size: int) -> None:
            bars.update(main, total=size)

        def advance(self, size: int) -> None:
            bars.update(main, advance=size)

        def node(self, node: str, size: int) -> None:
            with self._lock:
                if node not in self._nodes:
                    self._nodes[node] = bars.add_task(f"  {node}", total=None)
                bars.update(self._nodes[node], advance=size)  # type: ignore[arg-type]

        def note(self, text: str) -> None:
            bars.console.print(f"ckptd: {text}", markup=False, highlight=False)

    with bars:
        yield _Shown()
