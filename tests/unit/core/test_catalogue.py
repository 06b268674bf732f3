"""The catalogue: union in any order, and the questions that it answers."""

from __future__ import annotations

import hashlib
import math
import random
import tracemalloc
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Struct
from msgspec.structs import replace

from ckptd.core.catalogue import Catalogue, TombstoneHeader, VersionHeader
from ckptd.core.documents import (
    DirectoryEntry,
    Document,
    FileEntry,
    Manifest,
    Member,
    Pin,
    RemovedContent,
    ShardReference,
    Tombstone,
    UnknownDocument,
    Unpin,
    content_id,
    document_id,
    encode,
)
from ckptd.core.headers import removed_contents, version_header
from ckptd.core.identity import Identity, Role
from ckptd.core.names import Selector
from ckptd.errors import DocumentRefused, NameRefused, NotFound

CLUSTER = "home"
TIME = "2026-01-02T03:04:05Z"
CLIENT = Identity(CLUSTER, frozenset({Role.CLIENT}), "laptop", "00" * 20)
WORKER = Identity(CLUSTER, frozenset({Role.WORKER}), "pi1", "01" * 20)
BOTH = Identity(CLUSTER, frozenset({Role.WORKER, Role.COORDINATOR}), "mac", "02" * 20)


def manifest(
    name: str = "run/a", order: int = 1, *, nonce: int = 0, metrics: dict[str, float] | None = None
) -> Manifest:
    entries = (
        DirectoryEntry(path="d", mode=0o755),
        FileEntry(path="f", mode=0o644, size=0, sha256=hashlib.sha256(b"").hexdigest(), parts=()),
    )
    return Manifest(
        format=1,
        cluster=CLUSTER,
        name=name,
        order=order,
        created=TIME,
        host="laptop",
        nonce=f"{nonce:032x}",
        unit="directory",
        content_id=content_id(entries),
        copies=2,
        redundancy="copies",
        mode=0o755,
        entries=entries,
        shards=(ShardReference("ab" * 32, 5),),
        step=7,
        metrics=metrics or {},
    )


def tombstone(
    *versions: str, order: int = 50, reason: Literal["rm", "retention"] = "rm"
) -> Tombstone:
    return Tombstone(
        format=1,
        cluster=CLUSTER,
        order=order,
        created=TIME,
        nonce="0" * 32,
        reason=reason,
        versions=versions,
        justified_by="ee" * 32 if reason == "retention" else None,
    )


def pin(version: str, order: int = 60) -> Pin:
    return Pin(
        format=1, cluster=CLUSTER, order=order, created=TIME, nonce="0" * 32, version=version
    )


def unpin(*pins: str, order: int = 70) -> Unpin:
    return Unpin(format=1, cluster=CLUSTER, order=order, created=TIME, nonce="0" * 32, pins=pins)


def member(node: str, order: int, address: str = "10.0.0.1:7701", cluster: str = CLUSTER) -> Member:
    return Member(
        format=1,
        cluster=cluster,
        order=order,
        created=TIME,
        node=node,
        roles=("worker",),
        address=address,
        bulk_port=7702,
    )


def identified(document: Document) -> str:
    return document_id(encode(document))


def catalogue_of(*documents: Document) -> Catalogue:
    catalogue = Catalogue(CLUSTER)
    for document in documents:
        assert catalogue.add(identified(document), document, author=CLIENT)
    return catalogue


def answers(catalogue: Catalogue) -> tuple[object, ...]:
    """Everything that can be asked, to compare catalogues."""
    names = [*catalogue.names(), "run/none"]
    versions = catalogue.live_versions()
    return (
        len(catalogue),
        catalogue.ids(),
        catalogue.digest(),
        catalogue.highest_order,
        catalogue.has_unknown,
        catalogue.members(),
        catalogue.dead_ids,
        names,
        [catalogue.versions(name) for name in names],
        [catalogue.versions(name, include_dead=True) for name in names],
        [catalogue.newest(name) for name in names],
        versions,
        [catalogue.pins(version.id) for version in versions],
        [catalogue.tombstones_of(dead) for dead in sorted(catalogue.dead_ids)],
        catalogue.latest("run"),
        catalogue.headers_after("", 1000),
    )


class Recipe(Struct):
    """What to build documents from: numbers refer to versions, or to pins for `unpinned`."""

    versions: list[tuple[str, int]]
    dead: set[int]
    pinned: set[int]
    unpinned: set[int]
    moves: list[tuple[str, int]]
    unknown: bool


recipes = st.builds(
    Recipe,
    versions=st.lists(
        st.tuples(st.sampled_from(["run/a", "run/b", "solo", "run/a/b"]), st.integers(0, 5)),
        max_size=8,
    ),
    dead=st.sets(st.integers(0, 7), max_size=4),
    pinned=st.sets(st.integers(0, 7), max_size=4),
    unpinned=st.sets(st.integers(0, 3), max_size=2),
    moves=st.lists(st.tuples(st.sampled_from(["pi1", "pi2"]), st.integers(0, 4)), max_size=5),
    unknown=st.booleans(),
)


def build(recipe: Recipe) -> list[tuple[str, Document | UnknownDocument, Identity]]:
    made: list[Document] = [
        manifest(name, o, nonce=i) for i, (name, o) in enumerate(recipe.versions)
    ]
    version_ids = [identified(document) for document in made] + ["cc" * 32] * 8
    for number in recipe.dead:
        made.append(tombstone(version_ids[number], "dd" * 32, order=50 + number))
    pins = [pin(version_ids[number], 60 + number) for number in sorted(recipe.pinned)]
    made += pins
    pin_ids = [identified(document) for document in pins] + ["bb" * 32] * 4
    made += [unpin(pin_ids[number], order=70 + number) for number in recipe.unpinned]
    made += [member(node, o, f"10.0.0.{i}:1") for i, (node, o) in enumerate(recipe.moves)]
    rows: list[tuple[str, Document | UnknownDocument, Identity]] = [
        (identified(document), document, WORKER if isinstance(document, Member) else CLIENT)
        for document in made
    ]
    if recipe.unknown:
        rows.append(("aa" * 32, UnknownDocument("drain", 1, 9), CLIENT))
    return rows


@given(recipes, st.randoms(use_true_random=False))
def test_merging_is_a_union_whatever_the_order(recipe: Recipe, rng: random.Random) -> None:
    rows = build(recipe)
    straight, shuffled = Catalogue(CLUSTER), Catalogue(CLUSTER)
    for row in rows:
        straight.add(row[0], row[1], author=row[2])
    again = rows + rng.sample(rows, len(rows) // 2)
    rng.shuffle(again)
    added = [shuffled.add(row[0], row[1], author=row[2]) for row in again]
    assert sum(added) == len({row[0] for row in rows})
    assert answers(shuffled) == answers(straight)


@given(recipes, st.integers(0, 20))
def test_two_halves_that_exchange_what_they_lack_agree(recipe: Recipe, cut: int) -> None:
    rows = build(recipe)
    left, right = Catalogue(CLUSTER), Catalogue(CLUSTER)
    for row in rows[:cut]:
        left.add(row[0], row[1], author=row[2])
    for row in rows[cut:]:
        right.add(row[0], row[1], author=row[2])
    lacks = {i for i in left.ids() if i not in right}, {i for i in right.ids() if i not in left}
    for row in rows:
        if row[0] in lacks[0]:
            assert right.add(row[0], row[1], author=row[2])
        if row[0] in lacks[1]:
            assert left.add(row[0], row[1], author=row[2])
    assert answers(left) == answers(right)


def test_the_digest_is_over_the_sorted_raw_ids_and_follows_every_change() -> None:
    catalogue = Catalogue(CLUSTER)
    assert catalogue.digest() == hashlib.sha256(b"").digest()
    first, second = manifest(order=1), manifest(order=2)
    for document in (first, second):
        catalogue.add(identified(document), document, author=CLIENT)
        raw = b"".join(sorted(bytes.fromhex(i) for i in catalogue.ids()))
        assert catalogue.packed_ids() == raw
        assert catalogue.digest() == hashlib.sha256(raw).digest() == catalogue.digest()


def test_a_manifest_header_says_what_ls_shows() -> None:
    document = manifest("run/a", 3, metrics={"loss": 0.5})
    catalogue = catalogue_of(document)
    header = catalogue.version(identified(document))
    assert header == version_header(identified(document), document)
    assert header is not None
    assert (header.name, header.run, header.order, header.created) == ("run/a", "run", 3, TIME)
    assert (header.size, header.files, header.shards, header.copies) == (0, 1, 1, 2)
    assert (header.step, header.metrics) == (7, {"loss": 0.5})
    assert header.label == f"run/a@{header.id[:8]}"
    assert catalogue.header(header.id) is header
    assert catalogue.header("00" * 32) is None
    mark = pin(header.id)
    catalogue.add(identified(mark), mark, author=CLIENT)
    assert catalogue.version(identified(mark)) is None


def test_equal_orders_are_sorted_by_id() -> None:
    documents = [manifest(order=4, nonce=n) for n in range(5)]
    catalogue = catalogue_of(*documents)
    ids = sorted((identified(d) for d in documents), reverse=True)
    assert [v.id for v in catalogue.versions("run/a")] == ids
    assert catalogue.newest("run/a") == catalogue.version(ids[0])


def test_a_tombstone_works_before_its_manifest_arrives() -> None:
    old, new = manifest(order=1), manifest(order=2)
    grave = tombstone(identified(new), reason="retention")
    catalogue = catalogue_of(grave)
    assert catalogue.is_dead(identified(new))
    assert catalogue.names() == []
    for document in (old, new):
        catalogue.add(identified(document), document, author=CLIENT)
    assert [v.id for v in catalogue.versions("run/a")] == [identified(old)]
    assert [v.id for v in catalogue.versions("run/a", include_dead=True)] == [
        identified(new),
        identified(old),
    ]
    assert catalogue.tombstones_of(identified(new)) == (
        TombstoneHeader(
            identified(grave), "tombstone", 50, TIME, reason="retention", justified_by="ee" * 32
        ),
    )
    assert catalogue.tombstones_of(identified(old)) == ()


def test_a_name_whose_versions_are_all_dead_is_no_name() -> None:
    document = manifest()
    catalogue = catalogue_of(document, tombstone(identified(document)))
    assert (catalogue.names(), catalogue.newest("run/a"), catalogue.live_versions()) == (
        [],
        None,
        [],
    )


def test_an_unpin_takes_back_exactly_the_pins_that_it_names() -> None:
    document = manifest()
    first, second = pin(identified(document), 60), pin(identified(document), 61)
    catalogue = catalogue_of(document, unpin(identified(first)), second, first)
    assert [p.id for p in catalogue.pins(identified(document))] == [identified(second)]
    assert catalogue.pins("00" * 32) == []


def test_the_newest_word_of_a_node_counts() -> None:
    catalogue = catalogue_of(member("pi2", 1), member("pi1", 5, "new:1"), member("pi1", 4, "old:1"))
    assert {n: m.address for n, m in catalogue.members().items()} == {
        "pi1": "new:1",
        "pi2": "10.0.0.1:7701",
    }


def test_a_worker_cannot_use_up_the_range_of_orders() -> None:
    catalogue = Catalogue(CLUSTER)
    for document in (member("pi1", 2**62), UnknownDocument("strange", 9, 2**62)):
        catalogue.add(hashlib.sha256(repr(document).encode()).hexdigest(), document, author=WORKER)
    assert catalogue.highest_order == 0
    catalogue.add("00" * 32, UnknownDocument("drain", 1, 8), author=BOTH)
    assert catalogue.highest_order == 8
    catalogue.add(identified(manifest(order=5)), manifest(order=5), author=CLIENT)
    assert catalogue.highest_order == 8


def test_unknown_documents_are_counted_and_listed() -> None:
    assert not catalogue_of(manifest()).has_unknown
    catalogue = catalogue_of(manifest())
    catalogue.add("00" * 32, UnknownDocument("manifest", 2, 8), author=CLIENT)
    assert catalogue.has_unknown
    assert "00" * 32 in catalogue.ids()
    header = catalogue.header("00" * 32)
    assert header is not None
    assert (header.kind, header.order) == ("manifest", 8)


def test_a_document_of_another_cluster_is_refused() -> None:
    catalogue = Catalogue(CLUSTER)
    foreign = member("pi1", 1, cluster="other")
    with pytest.raises(DocumentRefused, match="other"):
        catalogue.add(identified(foreign), foreign, author=WORKER)
    assert len(catalogue) == 0


@given(st.integers(0, 9), st.integers(1, 4))
def test_headers_come_in_pages(count: int, limit: int) -> None:
    catalogue = catalogue_of(*(manifest(order=n) for n in range(count)))
    seen: list[str] = []
    more, after = True, ""
    while more:
        page, more = catalogue.headers_after(after, limit)
        assert len(page) == limit or not more
        seen += [header.id for header in page]
        after = seen[-1] if seen else ""
    assert tuple(seen) == catalogue.ids()


def test_names_and_runs() -> None:
    names = ["solo", "run/a", "run/b", "run/sub/c"]
    catalogue = catalogue_of(*(manifest(name, order) for order, name in enumerate(names)))
    assert catalogue.names() == sorted(names)
    assert catalogue.names("run") == ["run/a", "run/b"]
    assert catalogue.names("") == ["solo"]
    assert [v.name for v in catalogue.run_versions("run")] == ["run/b", "run/a"]
    newest = catalogue.latest("run", accept=lambda version: version.name != "run/b")
    assert newest is not None
    assert newest.name == "run/a"
    assert catalogue.latest("none") is None


# -- unverified headers


def header_of(document: Manifest) -> VersionHeader:
    return version_header(identified(document), document)


def test_an_unverified_header_is_a_hint_until_its_document_is_added() -> None:
    catalogue = Catalogue(CLUSTER)
    real = manifest("run/a", 7)
    lie = version_header(identified(real), manifest("run/lie", 2**61))
    assert catalogue.add_unverified(lie)
    assert not catalogue.add_unverified(lie)
    assert catalogue.names() == ["run/lie"]
    assert catalogue.highest_order == 0
    assert catalogue.unverified_above(100) == [lie]
    assert catalogue.unverified_above(2**61) == []
    assert catalogue.add(identified(real), real, author=CLIENT)
    assert catalogue.names() == ["run/a"]
    assert catalogue.highest_order == 7
    assert catalogue.unverified_above(0) == []
    assert answers(catalogue) == answers(catalogue_of(real))
    assert not catalogue.add_unverified(lie)


def test_an_unverified_header_can_be_withdrawn_and_nothing_else() -> None:
    kept, lie = manifest("run/a", 1), manifest("run/a", 9)
    catalogue = catalogue_of(kept)
    digest = catalogue.digest()
    catalogue.add_unverified(header_of(lie))
    assert catalogue.digest() != digest
    newest = catalogue.newest("run/a")
    assert newest is not None and newest.order == 9
    catalogue.withdraw(identified(lie))
    assert answers(catalogue) == answers(catalogue_of(kept))
    with pytest.raises(KeyError):
        catalogue.withdraw(identified(kept))


@pytest.mark.parametrize("change", [{"name": "a//b"}, {"name": "\x1b[2J"}, {"created": "\x1b[2J"}])
def test_an_unverified_header_that_no_manifest_could_have_is_refused(
    change: dict[str, str],
) -> None:
    catalogue = Catalogue(CLUSTER)
    with pytest.raises(DocumentRefused, match="header"):
        catalogue.add_unverified(replace(header_of(manifest()), **change))
    assert len(catalogue) == 0


# -- selectors


def versions_with_ids(*ids: str, name: str = "run/a") -> Catalogue:
    catalogue = Catalogue(CLUSTER)
    for order, version_id in enumerate(ids):
        catalogue.add(version_id, manifest(name, order), author=CLIENT)
    return catalogue


FIRST, SECOND, THIRD = "abcdef0011".ljust(64, "0"), "abcdef0022".ljust(64, "0"), "1" * 64


def test_a_name_means_its_newest_live_version() -> None:
    catalogue = versions_with_ids(FIRST, SECOND, THIRD)
    assert catalogue.resolve("run/a").id == THIRD
    catalogue.add("2" * 64, tombstone(THIRD), author=CLIENT)
    assert catalogue.resolve("run/a").id == SECOND
    assert catalogue.resolve("run/a", include_dead=True).id == THIRD


def test_a_prefix_means_one_version_or_the_candidates_are_listed() -> None:
    catalogue = versions_with_ids(FIRST, SECOND, THIRD)
    assert catalogue.resolve("run/a@11111111").id == THIRD
    assert catalogue.resolve("run/a@ABCDEF0022").id == SECOND
    with pytest.raises(NotFound) as several:
        catalogue.resolve("run/a@abcdef00")
    assert FIRST in str(several.value) and SECOND in str(several.value)
    with pytest.raises(NotFound, match="no version 99999999") as none:
        catalogue.resolve("run/a@99999999")
    assert FIRST[:12] in str(none.value)
    assert none.value.next == "ckptd show run/a"


def test_removed_versions_say_how_they_come_back() -> None:
    catalogue = versions_with_ids(FIRST, SECOND)
    catalogue.add("2" * 64, tombstone(FIRST), author=CLIENT)
    assert catalogue.resolve("run/a@abcdef00").id == SECOND
    assert catalogue.resolve("run/a@abcdef0011", include_dead=True).id == FIRST
    with pytest.raises(NotFound, match="removed") as one:
        catalogue.resolve("run/a@abcdef0011")
    assert one.value.next == "ckptd undelete run/a@abcdef00"
    catalogue.add("3" * 64, tombstone(SECOND), author=CLIENT)
    with pytest.raises(NotFound, match="removed") as all_of_them:
        catalogue.resolve("run/a")
    assert all_of_them.value.next == "ckptd undelete run/a@abcdef00"


def test_an_unknown_name_brings_the_nearest_ones() -> None:
    catalogue = versions_with_ids(FIRST, name="minilm/v1")
    with pytest.raises(NotFound, match="nearest: minilm/v1"):
        catalogue.resolve("minlm/v1")
    with pytest.raises(NotFound) as nothing_near:
        catalogue.resolve("zzzz")
    assert "nearest" not in str(nothing_near.value)
    with pytest.raises(NotFound, match="no run minilmm; nearest: minilm"):
        catalogue.resolve("minilmm@latest")


@pytest.mark.parametrize("selector", ["", "a//b", "run/a@", "run/a@abc", "run/a@newest", "a@b@c"])
def test_other_forms_are_refused(selector: str) -> None:
    with pytest.raises(NameRefused):
        versions_with_ids(FIRST).resolve(selector)


def test_latest_of_a_run() -> None:
    catalogue = catalogue_of(manifest("run/a", 1), manifest("run/b", 2), manifest("else/c", 3))
    assert catalogue.resolve("run@latest").name == "run/b"
    assert catalogue.resolve("run@latest", accept=lambda v: v.order < 2).name == "run/a"
    with pytest.raises(NotFound, match="complete"):
        catalogue.resolve("run@latest", accept=lambda v: False)
    assert catalogue.resolve(Selector("run", which="latest")).name == "run/b"
    with pytest.raises(NotFound, match="is a checkpoint, not a run"):
        catalogue.resolve("run/a@latest")


def test_best_of_a_run() -> None:
    catalogue = catalogue_of(
        manifest("run/a", 1, metrics={"loss": 0.5, "accuracy": 0.7}),
        manifest("run/b", 2, metrics={"loss": 0.1}),
        manifest("run/c", 3, metrics={"loss": 0.5, "accuracy": math.nan}),
        manifest("run/d", 4),
    )
    assert catalogue.resolve("run@best", best=("loss", "min")).name == "run/b"
    assert catalogue.resolve("run@best", best=("loss", "max")).name == "run/c", "newest of equals"
    assert catalogue.resolve("run@best", best=("accuracy", "max")).name == "run/a"
    complete = catalogue.resolve("run@best", best=("loss", "min"), accept=lambda v: v.order != 2)
    assert complete.name == "run/c"
    with pytest.raises(NotFound, match="recorded metrics: accuracy, loss"):
        catalogue.resolve("run@best")
    with pytest.raises(NotFound, match="has the metric f1; recorded metrics: accuracy, loss"):
        catalogue.resolve("run@best", best=("f1", "max"))
    with pytest.raises(NotFound, match="none is recorded"):
        catalogue_of(manifest("run/a")).resolve("run@best")


def test_ten_thousand_versions_fit_into_a_few_megabytes() -> None:
    body = manifest()
    catalogue = Catalogue(CLUSTER)
    tracemalloc.start()
    try:
        for number in range(10_000):
            digest = hashlib.sha256(str(number).encode()).hexdigest()
            document = replace(
                body,
                name=f"run/checkpoint-{number}",
                created=f"2026-01-02T03:04:{number:05}Z",
                content_id=digest[::-1],
                metrics={"loss": number / 7},
            )
            catalogue.add(digest, document, author=CLIENT)
        used_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert len(catalogue.live_versions()) == 10_000
    assert used_bytes < 12 * 1024 * 1024, used_bytes


def test_removed_content_is_known_by_its_name() -> None:
    known = Catalogue(CLUSTER)
    version = document_id(encode(manifest("run/a", 1)))
    known.add(version, manifest("run/a", 1), author=CLIENT)
    content = manifest().content_id
    assert not known.is_dead_content("run/a", content)
    assert not known.has_dead_content("run/a")
    removal = replace(tombstone(version), contents=(RemovedContent.of("run/a", content),))
    known.add(document_id(encode(removal)), removal, author=CLIENT)
    assert known.is_dead_content("run/a", content)
    assert known.has_dead_content("run/a")
    assert not known.is_dead_content("run/a", "00" * 32)
    assert not known.is_dead_content("run/b", content), "only that name was removed"
    assert not known.has_dead_content("run/b")


def test_removed_content_is_known_by_its_name_when_its_manifest_is_not() -> None:
    known = Catalogue(CLUSTER)
    content = manifest().content_id
    removal = replace(tombstone("77" * 32), contents=(RemovedContent.of("run/a", content),))
    known.add(document_id(encode(removal)), removal, author=CLIENT)
    assert known.is_dead_content("run/a", content)
    assert not known.is_dead_content("run/b", content), "equal content under another name is alive"
    assert not known.has_dead_content("run/b")


def test_only_the_manifest_of_a_dead_version_can_be_dropped_and_it_stays_dead() -> None:
    dead, alive = manifest("run/a", 1), manifest("run/a", 2)
    grave = tombstone(identified(dead))
    known = catalogue_of(dead, alive, grave)
    for kept in (identified(alive), identified(grave), "ee" * 32):
        with pytest.raises(KeyError):
            known.drop(kept)
    known.drop(identified(dead))
    assert known.is_dead(identified(dead))
    assert known.version(identified(dead)) is None
    assert [version.id for version in known.live_versions()] == [identified(alive)]
    with pytest.raises(KeyError):
        known.drop(identified(dead))


def test_what_a_tombstone_says_of_contents_names_each_once_in_order() -> None:
    contents = ("11" * 32, "22" * 32, "11" * 32)
    versions = [
        header_of(replace(manifest("run/a", order), content_id=content))
        for order, content in enumerate(contents, 1)
    ]
    told = removed_contents(reversed(versions))
    assert told == tuple(RemovedContent.of("run/a", content) for content in sorted({*contents}))
