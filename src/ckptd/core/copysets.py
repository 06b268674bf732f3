"""Few sets of nodes that together are nearly as fast as all of them.

The more different sets of nodes hold shards, the more combinations of dead nodes lose data. So
shards go to few sets (copysets: Cidon et al., "Copysets: Reducing the Frequency of Data Loss in
Cloud Storage", USENIX ATC 2013): as few as need at most `SLOWDOWN_MAX` times the best time.

With speeds v and k copies of each byte, the best time for one byte is the smallest t with
sum(min(1, v_i * t)) = k, because a node takes a byte once. The same formula over free bytes gives
the room that can be used. All functions here take speeds and rooms per group, where a group is what
must not hold two copies: a machine, or a zone.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Final, TypeAlias, TypeVar

SLOWDOWN_MAX: Final = 1.25
_ROUNDING: Final = 1e-9
_PREFERRED_MAX: Final = 16  # each is tried out, so there must not be many

_ALIKE: Final = 1.5

Copyset: TypeAlias = frozenset[str]
_Key = TypeVar("_Key", bound=Hashable)


def attainable_room(free_bytes: Sequence[int], copies: int) -> int:
    """The largest r with sum(min(free_i, r)) >= copies * r: bytes that fit, each `copies` times.

    `free_bytes` holds one number per machine. It is the minimum, over the b largest machines set
    aside, of what the others have divided by the copies that they must take.
    """
    rooms = sorted(free_bytes, reverse=True)
    return min(sum(rooms[big:]) // (copies - big) for big in range(copies))


def best_bytes_per_s(speeds: Sequence[float], copies: int) -> float:
    """How fast groups of these speeds (bytes per second) can take data, `copies` times each byte.

    0.0 when there are fewer groups than copies.
    """
    fastest = sorted(speeds, reverse=True)
    return min(sum(fastest[big:]) / (copies - big) for big in range(copies))


def fewest_copysets(
    speeds: Mapping[str, float],
    groups: Mapping[str, Hashable],
    copies: int,
    preferred: Sequence[Copyset] = (),
) -> list[Copyset]:
    """Few sets of `copies` nodes, no two of one group, within `SLOWDOWN_MAX` of the best time.

    Every node is in a set: a card that stayed idle would never be measured, and would have to be
    paired with everything once the others are full.

    `speeds` (bytes per second, above 0) and `groups` are by node id; there are at least `copies`
    groups. As many as possible of the sets are `preferred` ones, which hold shards already. The
    result depends on the arguments alone, and small differences in speed rarely change it.
    """
    preferred = list(dict.fromkeys(preferred))
    families = list(_families(speeds, groups, copies, preferred))
    known = set(preferred)
    return min(families, key=lambda family: (len(set(family) - known), len(family)))


def finish_s(family: Sequence[Copyset], speeds: Mapping[str, float], count: int) -> float:
    """Seconds until `count` bytes, each sent to the set that is done with it first, are stored."""
    queued = dict.fromkeys(speeds, 0)
    for _ in range(count):
        best = min(family, key=lambda copyset: soonest(copyset, speeds, queued, 1))
        for node in best:
            queued[node] += 1
    return max(queued[node] / speeds[node] for node in speeds)


def soonest(
    copyset: Copyset, speeds: Mapping[str, float], queued: Mapping[str, int], size_bytes: int
) -> tuple[float, float]:
    """When the slowest node of the set would be done with `size_bytes` more, in seconds; and the
    sum over its nodes, which decides between sets that are done at the same time."""
    times = [(queued[node] + size_bytes) / speeds[node] for node in copyset]
    return max(times), sum(sorted(times))


def _families(
    speeds: Mapping[str, float],
    groups: Mapping[str, Hashable],
    copies: int,
    preferred: Sequence[Copyset],
) -> Iterator[list[Copyset]]:
    """Families of sets that keep within the time. The last construction always succeeds."""
    by_group: dict[Hashable, float] = {}
    for node, speed in speeds.items():
        by_group[groups[node]] = by_group.get(groups[node], 0.0) + speed
    needed = best_bytes_per_s(list(by_group.values()), copies) / SLOWDOWN_MAX
    usable = [
        copyset
        for copyset in preferred
        if copyset <= speeds.keys()
        and len(copyset) == len({groups[node] for node in copyset}) == copies
    ]
    if usable:
        family = _covering(usable[:_PREFERRED_MAX], speeds, groups, copies)
        if _sample_bytes_per_s(family, speeds) >= needed:
            yield _without_spare(family, speeds, needed)
    for order in (_fastest_first(speeds), _fastest_first(speeds, alike=1.0)):
        for family in _disjoint(order, groups, copies):
            slowest = (min(speeds[node] for node in copyset) for copyset in family)
            if sum(slowest) >= needed * (1 - _ROUNDING):
                yield _covering(family, speeds, groups, copies)
                break
    for family in _overlapping(speeds, groups, copies, by_group, needed):
        yield _covering(family, speeds, groups, copies)


def _covering(
    family: list[Copyset],
    speeds: Mapping[str, float],
    groups: Mapping[str, Hashable],
    copies: int,
) -> list[Copyset]:
    """The family with sets of the nodes that are in none, so that no card stays idle: like speeds
    together, completed by the slowest of the others."""
    fastest_first = _fastest_first(speeds)
    covered = frozenset[str]().union(*family)
    idle = [node for node in fastest_first if node not in covered]
    while idle:
        others = [node for node in reversed(fastest_first) if node not in idle]
        copyset = _first_of_groups([*idle, *others], groups, copies)
        family = [*family, copyset]
        idle = [node for node in idle if node not in copyset]
    return family


def _first_of_groups(nodes: Sequence[str], groups: Mapping[str, Hashable], copies: int) -> Copyset:
    """The first `copies` nodes of different groups; fewer if there are not as many groups."""
    chosen: dict[Hashable, str] = {}
    for node in nodes:
        if len(chosen) < copies:
            chosen.setdefault(groups[node], node)
    return frozenset(chosen.values())


def _without_spare(
    family: list[Copyset], speeds: Mapping[str, float], needed: float
) -> list[Copyset]:
    """The family without sets that it can do without, the last ones going first."""
    for copyset in reversed(family):
        rest = [other for other in family if other != copyset]
        idle = copyset.difference(*rest)
        if not idle and _sample_bytes_per_s(rest, speeds) >= needed:
            family = rest
    return family


def _sample_bytes_per_s(family: Sequence[Copyset], speeds: Mapping[str, float]) -> float:
    count = 8 * len(family) + 24
    return count / finish_s(family, speeds, count)


def _fastest_first(speeds: Mapping[_Key, float], *, alike: float = _ALIKE) -> list[_Key]:
    """Sorted by speed; those that differ by less than the factor `alike` from the fastest of them
    are sorted by id, so that two measurements of the same cards give the same order."""
    exact = sorted(speeds, key=lambda key: (-speeds[key], str(key)))
    order: list[_Key] = []
    while exact:
        bound = speeds[exact[0]] / alike
        order += sorted((key for key in exact if speeds[key] >= bound), key=str)
        exact = [key for key in exact if speeds[key] < bound]
    return order


def _disjoint(
    order: Sequence[str], groups: Mapping[str, Hashable], copies: int
) -> Iterator[list[Copyset]]:
    """One set, two, three…, of neighbours in `order`: with like speeds together, the sum of the
    slowest is largest."""
    left = list(order)
    family: list[Copyset] = []
    while len(copyset := _first_of_groups(left, groups, copies)) == copies:
        family = [*family, copyset]
        left = [node for node in left if node not in copyset]
        yield family


def _overlapping(
    speeds: Mapping[str, float],
    groups: Mapping[str, Hashable],
    copies: int,
    by_group: Mapping[Hashable, float],
    needed: float,
) -> Iterator[list[Copyset]]:
    """Families in which nodes are in several sets, by McNaughton's wrap-around rule.

    A round of `slots` shards is a table of `copies` rows. Each node fills as many cells as it has
    time for, running on into the next row; the columns are the sets. The cells of a group follow
    each other and are at most `slots`, so that no column holds a group twice.
    """
    rank = {group: place for place, group in enumerate(_fastest_first(by_group))}
    order = sorted(speeds, key=lambda node: (rank[groups[node]], node))
    slots = 0
    while True:
        slots += 1
        cells: list[str] = []
        filled: dict[Hashable, int] = {}
        for node in order:
            group = groups[node]
            possible = int(slots * speeds[node] / needed + _ROUNDING)
            count = min(possible, slots - filled.get(group, 0))
            filled[group] = filled.get(group, 0) + count
            cells += [node] * count
        if len(cells) < slots * copies:
            continue
        columns = [frozenset(cells[slot : slots * copies : slots]) for slot in range(slots)]
        yield list(dict.fromkeys(columns))
        if slots > 4 * len(speeds):
            return
