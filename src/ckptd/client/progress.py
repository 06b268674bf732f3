"""What long work tells whoever shows it."""

from __future__ import annotations


class Progress:
    """Receives the progress of one piece of work; this one shows nothing.

    The methods may be called from several threads, and must return at once.
    """

    def total(self, size: int) -> None:
        """There are `size` bytes to do, as far as is known by now."""

    def advance(self, size: int) -> None:
        """`size` more bytes are done for good."""

    def node(self, node: str, size: int) -> None:
        """`size` more bytes went to `node`, or came from it."""

    def note(self, text: str) -> None:
        """Something that the user should know, in one line."""
