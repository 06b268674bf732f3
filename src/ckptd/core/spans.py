"""How pure code asks for bytes of a file: it yields a span and is sent what lies there."""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """Bytes of a file that are wanted. At the end of the file there may be fewer."""

    offset: int
    length: int


class Unfinished(Exception):
    """The file ends before its own structure does, or that is not whole: its writer may still be
    at work. The text completes a sentence that begins with the file's name."""
