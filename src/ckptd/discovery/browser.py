"""Listens for announcements of nodes, and fills the hints with them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog
from zeroconf import DNSQuestionType, ServiceStateChange, Zeroconf, current_time_millis
from zeroconf._dns import DNSQuestion  # in the library's documentation, but in no __all__
from zeroconf._protocol.outgoing import DNSOutgoing
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo

from ckptd.core import limits
from ckptd.discovery import records
from ckptd.discovery.hints import Hints
from ckptd.discovery.interfaces import Interface, nearest_first
from ckptd.discovery.multicast import Multicast

_log = structlog.get_logger(__name__)

# Of RFC 1035: flags of a question, the type and the class of what is asked for.
_QUERY = 0x0000
_POINTER = 12
_INTERNET = 1


class Browser:
    """Hears announcements until it is closed. `now_s` is the clock of `hints`; `on_news` is called
    when a node or an address of one was heard of that was not known."""

    def __init__(
        self,
        multicast: Multicast,
        hints: Hints,
        interfaces: list[Interface],
        now_s: Callable[[], float],
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        self._library = multicast.library.zeroconf
        self._loopback = all(address.startswith("127.") for address in multicast.addresses)
        self._hints = hints
        self._interfaces = interfaces
        self._now_s = now_s
        self._on_news = on_news
        self._nodes: dict[str, str] = {}  # by the name of their service
        self._resolving: dict[str, asyncio.Task[None]] = {}
        # Questions to all (QM): an answer to us alone would be given to any program on this
        # machine that listens on the port, which all of them share.
        self._browser = AsyncServiceBrowser(
            self._library,
            records.SERVICE,
            handlers=[self._on_change],
            question_type=DNSQuestionType.QM,
        )

    async def close(self) -> None:
        """Stops listening. The hints stay as they are."""
        await self._browser.async_cancel()
        for task in list(self._resolving.values()):
            task.cancel()
        await asyncio.gather(*self._resolving.values(), return_exceptions=True)

    def ask(self) -> None:
        """Asks the network once more; only who is not known answers.

        Announcements get lost, and are lost for good when the network was parted while they were
        made. What was heard of a node is asked for again when it has run out.
        """
        question = DNSOutgoing(_QUERY)
        question.add_question(DNSQuestion(records.SERVICE, _POINTER, _INTERNET))
        now_ms = current_time_millis()
        known = self._library.cache.get_all_by_details(records.SERVICE, _POINTER, _INTERNET)
        for record in known[: limits.ANNOUNCED_NODES_MAX]:
            if not record.is_stale(now_ms):
                question.add_answer_at_time(record, now_ms)
        self._library.async_send(question)
        for instance in list(self._nodes):
            self._look_up(instance)

    def _on_change(
        self,
        zeroconf: Zeroconf,
        service_type: str,
        name: str,
        state_change: ServiceStateChange,
    ) -> None:
        if state_change is ServiceStateChange.Removed:
            node = self._nodes.pop(name.lower(), None)
            if node is not None:
                self._hints.withdraw(node, self._now_s())
                _log.debug("announcement_gone", node=node)
        else:
            self._look_up(name)

    def _look_up(self, name: str) -> None:
        service = AsyncServiceInfo(records.SERVICE, name)
        if service.load_from_cache(self._library):
            self._take(service)
        elif name not in self._resolving and len(self._resolving) < limits.MDNS_RESOLVING_MAX:
            task = asyncio.create_task(self._resolve(service), name=f"resolve {name}")
            self._resolving[name] = task
            task.add_done_callback(lambda _: self._resolving.pop(name, None))

    async def _resolve(self, service: AsyncServiceInfo) -> None:
        """Asks for what was not in the announcement itself."""
        timeout_ms = limits.MDNS_RESOLVE_TIMEOUT_S * 1000
        if await service.async_request(self._library, timeout_ms, question_type=DNSQuestionType.QM):
            self._take(service)

    def _take(self, service: AsyncServiceInfo) -> None:
        instance = service.name.lower()
        try:
            heard = records.read(
                service.name,
                service.properties,
                service.port,
                nearest_first(service.parsed_addresses(), self._interfaces),
                loopback=self._loopback,
            )
        except records.AnnouncementRefused as error:
            _log.debug("announcement_refused", instance=service.name[:80], reason=str(error))
            return
        if self._hints.hear(heard, self._now_s()):
            _log.debug("announcement", node=heard.node, addresses=[str(a) for a in heard.addresses])
            self._on_news()
        if heard.cluster == self._hints.cluster and (
            instance in self._nodes or len(self._nodes) < limits.ANNOUNCED_NODES_MAX
        ):
            self._nodes[instance] = heard.node
