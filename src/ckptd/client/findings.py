"""What a look at this machine and the cluster found."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

State = Literal["ok", "warning", "error"]


class Finding(Struct, frozen=True):
    """One thing that was looked at. `next` is the command to type, or "" when all is well."""

    check: str
    state: State
    message: str
    next: str = ""
