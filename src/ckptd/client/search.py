"""How a client finds the nodes of its cluster.

The configured peers are asked first, then everybody whom those that answer remember. mDNS is
listened to only when that leaves something to be wished for: no peers are configured, or a node
does not answer where it should be. Commands are short, so listening is: it ends as soon as a node
that has been up for a while misses nobody any more, or when nothing new is heard.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, Final

import structlog

from ckptd.client.nodes import AbsentNode, Node
from ckptd.config import DiscoveryConfig
from ckptd.core import limits
from ckptd.core.quantities import Address, parse_address
from ckptd.errors import CkptdError, DiscoveryFailed, PeerError, PeerUnreachable
from ckptd.wire import messages

if TYPE_CHECKING:
    from ckptd.discovery.service import Lookout

_log = structlog.get_logger(__name__)

_FORGOTTEN: Final = "forgotten"
_MAINTENANCE: Final = "maintenance"
_PATIENCE_S: Final = 0.3  # with a known address, before mDNS is listened to as well
_LATELY_S: Final = 120.0
_ACQUAINTED_S: Final = 5.0  # after its start a node has met the others, if it ever will at once
_MOMENT_S: Final = 0.1  # between two looks at whether to go on

Reach = Callable[[Address, str], Coroutine[Any, Any, Node]]
"""Connects to an address. With a node id, whoever answers must prove to be that node."""


class Search:
    """Fills `nodes` with those that answer and `absent` with those that should and do not."""

    def __init__(
        self,
        cluster: str,
        discovery: DiscoveryConfig,
        nodes: dict[str, Node],
        absent: dict[str, AbsentNode],
        reach: Reach,
    ) -> None:
        self._cluster = cluster
        self._discovery = discovery
        self._nodes = nodes
        self._absent = absent
        self._reach = reach
        self._remembered: dict[str, messages.PeerView] = {}
        self._started_s = 0.0
        self._tried: set[str] = set()
        self._failures: dict[str, str] = {}
        self._known: dict[asyncio.Task[Node], tuple[str, str]] = {}  # (node or "", address)
        self._announced: dict[asyncio.Task[Node], str] = {}
        self._announced_tried: dict[str, set[Address]] = {}
        self._announced_failures: dict[str, AbsentNode] = {}
        self._at_once = asyncio.Semaphore(limits.ANNOUNCED_CONNECTS_MAX)
        self.outcome = ""
        """What to tell when nobody was found although nothing failed."""

    async def run(self, addresses: Iterable[str]) -> None:
        """Looks for nodes at `addresses`, at those where the nodes found so far see others, and on
        the local network. Call it again to look again for whoever is absent."""
        self._started_s = time.monotonic()
        self._tried.clear()
        self._failures.clear()
        self._announced_tried.clear()
        self._announced_failures.clear()
        try:
            for address in addresses:
                self._try_known("", address)
            async with contextlib.AsyncExitStack() as stack:
                await self._look(stack)
        finally:
            await self._drop_rest()
        await self._drop_forgotten()
        self._note_absent()

    async def again(self, addresses: Iterable[str]) -> None:
        """As `run`, for a search that is long ago: what the nodes that answer remembered then no
        longer counts, only what they say now."""
        self._remembered.clear()
        for node in self._nodes.values():
            self._remember(node)
        seen = (view.address for view in self._unmet() if view.address)
        await self.run([*addresses, *seen])

    async def _look(self, stack: contextlib.AsyncExitStack) -> None:
        lookout: Lookout | None = None
        may_listen = self._discovery.mdns
        self.outcome = "no peers are known" if not may_listen else ""
        opened_s = news_s = 0.0
        while True:
            if lookout is None and may_listen and self._is_lacking():
                may_listen = False
                lookout = await self._listen(stack)
                opened_s = news_s = time.monotonic()
            if lookout is not None and self._try_announced(lookout):
                news_s = time.monotonic()
            if not self._known and (lookout is None or self._is_settled(lookout, opened_s, news_s)):
                return
            await self._next_event(lookout)

    def _is_lacking(self) -> bool:
        """Whether known addresses do not lead to all nodes, at least not at once."""
        if self._known:
            return time.monotonic() - self._started_s >= _PATIENCE_S
        return not self._knows_others() or bool(self._missing())

    def _missing(self) -> set[str]:
        """Nodes that are somewhere, but not where we looked. One that nobody has heard of for
        long is not announced either: the others listen all the time."""
        seen = {
            node for node, view in self._remembered.items() if 0 <= view.last_seen_s < _LATELY_S
        }
        wanted = {node.id for node in self._absent.values() if node.id}
        return (seen | wanted) - self._nodes.keys()

    def _is_settled(self, lookout: Lookout, opened_s: float, news_s: float) -> bool:
        """Whether listening any longer is of no use."""
        if self._knows_others() and not self._missing():
            return True
        now_s = time.monotonic()
        waited_s = now_s - opened_s
        if self._announced:
            return waited_s >= limits.DISCOVERY_WAIT_S + limits.ANNOUNCED_CONNECT_TIMEOUT_S
        if not self._nodes:
            # Whoever was heard told lies: true answers may come late, where others asked before.
            return waited_s >= 2 * limits.DISCOVERY_WAIT_S
        return waited_s >= limits.DISCOVERY_WAIT_S or (
            bool(lookout.hints.nodes(now_s)) and now_s - news_s >= limits.DISCOVERY_QUIET_S
        )

    def _knows_others(self) -> bool:
        """Whether a node was found that can tell who else there is: one that has just started has
        heard of nobody yet, though it may be the first that is heard of."""
        return any(node.status.uptime_s >= _ACQUAINTED_S for node in self._nodes.values())

    async def _listen(self, stack: contextlib.AsyncExitStack) -> Lookout | None:
        # Takes a noticeable part of a second on a Pi; most commands do without.
        from ckptd.discovery.service import look_out

        try:
            lookout = await stack.enter_async_context(
                look_out(self._cluster, self._discovery.interfaces)
            )
        except DiscoveryFailed as error:
            _log.debug("mdns_unavailable", reason=error.message)
            self.outcome = error.message
            return None
        self.outcome = f"none was heard by mDNS on {', '.join(lookout.choice.multicast)}"
        return lookout

    async def _next_event(self, lookout: Lookout | None) -> None:
        """Waits for an answer, for news or for a moment, and takes note of answers."""
        news: asyncio.Task[bool] | None = None
        waiting: list[asyncio.Task[Any]] = [*self._known, *self._announced]
        if lookout is not None:
            news = asyncio.create_task(lookout.news.wait(), name="news of nodes")
            waiting.append(news)
        try:
            await asyncio.wait(waiting, timeout=_MOMENT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if news is not None:
                news.cancel()
        for task in [task for task in self._known if task.done()]:
            _, address = self._known.pop(task)
            await self._note_answer(task, address)
        for task in [task for task in self._announced if task.done()]:
            node = self._announced.pop(task)
            await self._note_answer(task, node, announced=True)
        for task, (node, _) in list(self._known.items()):
            if node in self._nodes:  # found elsewhere: it need not answer here
                task.cancel()

    async def _note_answer(
        self, task: asyncio.Task[Node], address: str, *, announced: bool = False
    ) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            await self._adopt(task.result())
        elif not isinstance(error, CkptdError):
            raise error
        elif not announced:
            self._failures[address] = _reason(error)
        else:
            _log.debug("announced_unreachable", node=address, reason=error.message)
            self._announced_failures[address] = AbsentNode(address, "", _reason(error))

    async def _adopt(self, node: Node) -> None:
        if node.id in self._nodes:
            await node.control.close()
            return
        self._nodes[node.id] = node
        self._remember(node)
        for view in self._unmet():
            if view.address:
                self._try_known(view.node, view.address)

    def _remember(self, node: Node) -> None:
        """Notes what `node` knows of others, as far as it is the newest that is known."""
        for view in node.status.peers:
            best = self._remembered.get(view.node)
            if best is None or _is_better(view, best):
                self._remembered[view.node] = view

    def _unmet(self) -> list[messages.PeerView]:
        return [
            view
            for view in self._remembered.values()
            if view.node not in self._nodes and view.state != _FORGOTTEN
        ]

    @property
    def forgotten(self) -> list[messages.PeerView]:
        """The nodes of which all that answer say that they were forgotten."""
        return [view for view in self._remembered.values() if view.state == _FORGOTTEN]

    async def _drop_forgotten(self) -> None:
        """A machine that was given up may still answer; it is none of the cluster."""
        for view in self.forgotten:
            if (node := self._nodes.pop(view.node, None)) is not None:
                await node.control.close()

    def _try_known(self, node: str, address: str) -> None:
        if address in self._tried:
            return
        self._tried.add(address)
        with contextlib.suppress(ValueError):
            where = parse_address(address)
            # Whoever answers there is welcome, if he is of this cluster: machines swap addresses.
            task = asyncio.create_task(self._reach(where, ""), name=f"reach {address}")
            self._known[task] = (node, address)

    def _try_announced(self, lookout: Lookout) -> bool:
        """Tries what was announced and not tried yet; whether there was any such thing."""
        lookout.news.clear()
        now_s = time.monotonic()
        fresh = False
        for node in lookout.hints.nodes(now_s):
            tried = self._announced_tried.setdefault(node, set())
            new = [a for a in lookout.hints.addresses(node, now_s) if a not in tried]
            if new:
                fresh = True
                tried.update(new)
                if node not in self._nodes:
                    task = asyncio.create_task(self._reach_one(node, new), name=f"find {node}")
                    self._announced[task] = node
        return fresh

    async def _reach_one(self, node: str, addresses: list[Address]) -> Node:
        """The node at the first of `addresses` where it proves to be there."""
        failure = ""
        for address in addresses:
            try:
                async with self._at_once, asyncio.timeout(limits.ANNOUNCED_CONNECT_TIMEOUT_S):
                    return await self._reach(address, node)
            except CkptdError as error:
                failure = error.message
            except TimeoutError:
                failure = f"no answer at {address}"
        raise PeerUnreachable(node, f"announced, but not there: {failure}")

    async def _drop_rest(self) -> None:
        """Ends what is still being tried. Who answered in the same moment is welcome."""
        rest = [*self._known, *self._announced]
        self._known.clear()
        self._announced.clear()
        for task in rest:
            task.cancel()
        for answer in await asyncio.gather(*rest, return_exceptions=True):
            if isinstance(answer, Node) and self._nodes.setdefault(answer.id, answer) != answer:
                await answer.control.close()

    def _note_absent(self) -> None:
        lost = {node.id: node for node in self._absent.values() if node.id}
        self._absent.clear()
        for node_id, view in self._remembered.items():
            if node_id not in self._nodes and view.state != _FORGOTTEN:
                reason = self._failures.pop(view.address, "does not answer")
                seen = None if view.last_seen_s < 0 else view.last_seen_s
                self._absent[node_id] = AbsentNode(
                    node_id,
                    view.address,
                    reason,
                    seen,
                    view.roles,
                    view.zone,
                    view.state == _MAINTENANCE,
                )
        for node_id, node in lost.items():
            if node_id not in self._nodes:
                self._absent[node_id] = node
        known = {absent.address for absent in self._absent.values()}
        known.update(view.address for view in self.forgotten)
        for address, reason in self._failures.items():
            if address not in known and not self._answers_elsewhere(address):
                self._absent[address] = AbsentNode("", address, reason)
        if not self._nodes:
            # An announcement proves nothing: a stranger's must not make a cluster look degraded.
            # It is shown only where there is nothing else to go by.
            self._absent.update(self._announced_failures)

    def _answers_elsewhere(self, address: str) -> bool:
        """Whether a node that was remembered at this address has been found at another one."""
        return any(
            view.address == address and node in self._nodes
            for node, view in self._remembered.items()
        )


def _reason(error: CkptdError) -> str:
    return error.reason if isinstance(error, PeerError) else error.message


def _is_better(view: messages.PeerView, other: messages.PeerView) -> bool:
    """Whether `view` says more of a node than `other` does. A single node that does not know yet,
    or lies, makes nobody disappear: forgotten is who is so for all that answer."""
    if _FORGOTTEN in (view.state, other.state):
        return view.state != _FORGOTTEN
    if view.last_seen_s < 0:
        return False
    return other.last_seen_s < 0 or view.last_seen_s < other.last_seen_s
