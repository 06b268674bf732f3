"""The pages that a node serves over HTTP: what is there, who may see it, what it says.

No sockets here: a request line and an identity go in, an answer comes out. docs/reference/http.md
is the description for users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final
from urllib.parse import urlsplit

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from ckptd.core.identity import Identity
from ckptd.core.permissions import Action, may
from ckptd.core.quantities import Address

PATHS: Final = ("/metrics", "/healthz", "/sd")
METHODS: Final = ("GET", "HEAD")
_PROTECTED_PATHS: Final = frozenset({"/metrics", "/sd"})

_TEXT: Final = "text/plain; charset=utf-8"
_JSON: Final = "application/json"


class Health(msgspec.Struct, frozen=True):
    """Whether this node can do its roles: for each role the reasons why it cannot, if any."""

    roles: Mapping[str, Sequence[str]]

    @property
    def ok(self) -> bool:
        """True when there is a role and none has a reason against it."""
        return bool(self.roles) and not any(self.roles.values())


class Target(msgspec.Struct, frozen=True):
    """One node as Prometheus should scrape it. `address` is that of its own pages."""

    node: str
    address: Address
    roles: Sequence[str]
    cluster: str
    tls: bool = True


class Answer(msgspec.Struct, frozen=True):
    """What goes back: a status code, a content type, the body, and further headers."""

    status: int
    content_type: str
    body: bytes
    headers: tuple[tuple[str, str], ...] = ()


def plain(status: int, text: str, *headers: tuple[str, str]) -> Answer:
    """An answer of one line of text."""
    return Answer(status, _TEXT, f"{text}\n".encode(), headers)


class Pages:
    """The three pages. The callables are asked at each request and must not block.

    `metrics` gives Prometheus text, `health` and `targets` what /healthz and /sd show.
    `loopback`: only this machine reaches the pages, so they tell everything to everybody. Else
    /healthz says one word, and the others want a certificate whose role may scrape and whose
    serial number is not `forgotten`.
    """

    def __init__(
        self,
        *,
        loopback: bool,
        metrics: Callable[[], bytes],
        health: Callable[[], Health],
        targets: Callable[[], Sequence[Target]],
        forgotten: Callable[[str], bool],
    ) -> None:
        self._loopback = loopback
        self._metrics = metrics
        self._health = health
        self._targets = targets
        self._forgotten = forgotten

    def answer(self, method: str, target: str, identity: Identity | None) -> Answer:
        """The answer to a request. `identity` is the peer's, None without a usable certificate.

        `target` is as it stood in the request line (RFC 9112, section 3.2).
        """
        try:
            path = urlsplit(target).path
        except ValueError:
            return plain(400, "the request's target is no path or address")
        if path not in PATHS:
            return plain(404, f"only {', '.join(PATHS)} are here")
        if method not in METHODS:
            return plain(405, "only GET and HEAD work here", ("Allow", ", ".join(METHODS)))
        if path in _PROTECTED_PATHS and not self._may_scrape(identity):
            return plain(403, "this needs a certificate of the cluster with the role monitor")
        if path == "/metrics":
            return Answer(200, CONTENT_TYPE_PLAIN_0_0_4, self._metrics())
        if path == "/sd":
            return Answer(200, _JSON, _service_discovery(self._targets()))
        return self._healthz()

    def _may_scrape(self, identity: Identity | None) -> bool:
        if self._loopback:
            return True
        if identity is None or self._forgotten(identity.serial):
            return False
        return may(identity.roles, Action.SCRAPE)

    def _healthz(self) -> Answer:
        health = self._health()
        status = 200 if health.ok else 503
        if not self._loopback:
            return plain(status, "ok" if health.ok else "not ok")
        roles = {
            role: {"ok": not reasons, "reasons": list(reasons)}
            for role, reasons in sorted(health.roles.items())
        }
        body = msgspec.json.encode({"ok": health.ok, "roles": roles})
        return Answer(status, _JSON, body + b"\n")


def _service_discovery(targets: Sequence[Target]) -> bytes:
    """Prometheus' `http_sd` format: https://prometheus.io/docs/prometheus/latest/http_sd/"""
    groups = [
        {
            "targets": [str(target.address)],
            "labels": {
                "node": target.node,
                # With commas around, so that a relabelling rule can match ",worker,".
                "roles": f",{','.join(sorted(target.roles))},",
                "cluster": target.cluster,
                "__scheme__": "https" if target.tls else "http",
            },
        }
        for target in sorted(targets, key=lambda each: each.node)
    ]
    return msgspec.json.encode(groups) + b"\n"
