"""Who belongs to the cluster, and what its admins said about nodes: from documents alone.

Part of the catalogue, and like it a grow-only set: the order in which documents arrive plays no
part. A node is remembered as long as one of its member documents was signed with a certificate
that no `forget` lists. A machine that is set up anew under an old id gets a new certificate, and so
is a member again.

What is read here from other threads is replaced as a whole, never changed in place.
"""

from __future__ import annotations

from datetime import datetime

from msgspec import Struct

from ckptd.core.documents import Drain, Forget, Maintenance, Member, MemberMark, Undrain
from ckptd.core.identity import Identity


class MaintenanceMark(Struct, frozen=True):
    """Somebody works on a node for `seconds` from `created_s` on (seconds since 1970, by the clock
    of who said so). `id` is that of the document."""

    id: str
    created_s: float
    seconds: int


class _Said(Struct, frozen=True):
    """The newest member document of a node that one certificate signed."""

    age: tuple[int, str]
    member: Member


class Roster:
    """The members of one cluster, as far as they are known here."""

    def __init__(self) -> None:
        self._said: dict[str, dict[str, _Said]] = {}  # by node, by serial of the certificate
        self._members: dict[str, Member] = {}
        self._drains: dict[str, dict[str, None]] = {}  # by node, in the order of arrival
        self._ended: frozenset[str] = frozenset()
        self._maintenance: dict[str, tuple[tuple[int, str], MaintenanceMark]] = {}
        self._forgotten: frozenset[str] = frozenset()
        self._forgotten_serials: frozenset[str] = frozenset()

    # -- growing

    def add_member(self, document_id: str, member: Member, *, author: Identity) -> None:
        """Adds what a node said of itself, signed with the certificate of `author`."""
        said = self._said.get(member.node, {})
        known = said.get(author.serial)
        age = (member.order, document_id)
        if known is None or age > known.age:
            self._said = {
                **self._said,
                member.node: {**said, author.serial: _Said(age, member)},
            }
            self._look_again([member.node])

    def add_mark(self, document_id: str, mark: MemberMark) -> None:
        """Adds what an admin said about a node."""
        match mark:
            case Drain():
                known = self._drains.get(mark.node, {})
                self._drains = {**self._drains, mark.node: {**known, document_id: None}}
            case Undrain():
                self._ended = self._ended.union(mark.drains)
            case Forget():
                self._ended = self._ended.union(mark.drains)
                self._forgotten = self._forgotten | {mark.node}
                self._forgotten_serials = self._forgotten_serials.union(mark.serials)
                self._look_again(list(self._said))
            case _:
                self._add_maintenance((mark.order, document_id), mark)

    def _add_maintenance(self, age: tuple[int, str], mark: Maintenance) -> None:
        known = self._maintenance.get(mark.node)
        if known is None or age > known[0]:
            created_s = datetime.fromisoformat(mark.created).timestamp()
            found = MaintenanceMark(age[1], created_s, mark.seconds)
            self._maintenance = {**self._maintenance, mark.node: (age, found)}

    def _look_again(self, nodes: list[str]) -> None:
        members = dict(self._members)
        for node in nodes:
            said = [s for serial, s in self._said[node].items() if not self.refuses(serial)]
            if said:
                members[node] = max(said, key=lambda each: each.age).member
            else:
                members.pop(node, None)
        self._members = members

    # -- members

    def members(self) -> dict[str, Member]:
        """By node id, what each remembered node last said of itself."""
        members = self._members
        return {node: members[node] for node in sorted(members)}

    def workers(self) -> frozenset[str]:
        """The remembered workers."""
        return frozenset(node for node, m in self._members.items() if "worker" in m.roles)

    def forgotten(self) -> frozenset[str]:
        """The nodes that were forgotten, without those that are members again."""
        gone = {node for node in self._said if node not in self._members}
        return (self._forgotten | gone).difference(self._members)

    def last_said(self, node: str) -> Member | None:
        """What a node last said of itself, also when it is forgotten; None for an unknown one."""
        said = self._said.get(node)
        return max(said.values(), key=lambda each: each.age).member if said else None

    # -- certificates

    @property
    def forgotten_serials(self) -> frozenset[str]:
        """The serial numbers of certificates that nobody accepts any more."""
        return self._forgotten_serials

    def refuses(self, serial: str) -> bool:
        """Whether a certificate is one that was forgotten."""
        return serial in self._forgotten_serials

    def serials(self, node: str) -> tuple[str, ...]:
        """The certificates that a node has spoken with and that are not forgotten, sorted."""
        said = self._said.get(node, {})
        return tuple(sorted(serial for serial in said if not self.refuses(serial)))

    def newest_serial(self, node: str) -> str | None:
        """The certificate that signed the newest member document of a remembered node."""
        said = [(s.age, serial) for serial, s in self._said.get(node, {}).items()]
        left = [(age, serial) for age, serial in said if not self.refuses(serial)]
        return max(left)[1] if left else None

    # -- marks

    def drains(self, node: str) -> tuple[str, ...]:
        """The ids of the drains of a node that nothing has ended, sorted."""
        return tuple(sorted(d for d in self._drains.get(node, {}) if d not in self._ended))

    def is_draining(self, node: str) -> bool:
        """Whether a node is to give its copies away."""
        return bool(self.drains(node))

    def draining(self) -> frozenset[str]:
        """The remembered nodes that are draining."""
        return frozenset(node for node in self._drains if self.is_draining(node)).intersection(
            self._members
        )

    def maintenance(self, node: str) -> MaintenanceMark | None:
        """The newest word on maintenance of a node, whether it is over or not."""
        found = self._maintenance.get(node)
        return None if found is None else found[1]
