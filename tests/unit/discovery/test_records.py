"""What is announced, and what of strangers' announcements is believed to be one."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.core import limits
from ckptd.core.quantities import Address
from ckptd.discovery import records
from ckptd.discovery.records import Announcement, AnnouncementRefused, read

NAME = records.instance_name("home", "pi1")


def told(**changes: bytes | None) -> dict[bytes, bytes | None]:
    own = records.text("home", "pi1", "0.1.0", ["worker"])
    txt: dict[bytes, bytes | None] = {key.encode(): value.encode() for key, value in own.items()}
    return txt | {key.encode(): value for key, value in changes.items()}


def heard(**changes: Any) -> Announcement:
    arguments: dict[str, Any] = {
        "instance": NAME,
        "txt": told(),
        "port": 7701,
        "addresses": ["192.168.1.11"],
        "loopback": False,
    }
    return read(**arguments | changes)


def test_what_a_node_tells_is_read_back() -> None:
    assert heard() == Announcement(
        "pi1", "home", "0.1.0", ("worker",), (Address("192.168.1.11", 7701),)
    )


@given(
    cluster=st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True),
    node=st.from_regex(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?", fullmatch=True),
)
def test_every_id_fits_into_one_label_and_is_read_back(cluster: str, node: str) -> None:
    label = records.label(cluster, node)
    assert len(label) <= 63 and "." not in label and label.isascii()
    assert label.startswith(node[:10].replace(".", "-").replace("_", "-").rstrip("-"))
    txt = {k.encode(): v.encode() for k, v in records.text(cluster, node, "1", ["worker"]).items()}
    name = records.instance_name(cluster, node).upper()  # names are compared without case
    found = read(name, dict(txt), 1, ["10.0.0.1"], loopback=False)
    assert (found.cluster, found.node) == (cluster, node)


def test_equal_ids_of_two_clusters_have_names_of_their_own() -> None:
    names = {records.label(cluster, node) for cluster in ("a", "b") for node in ("p.1", "p-1")}
    assert len(names) == 4
    assert records.host_name("a", "p") == f"{records.label('a', 'p')}.local."


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"txt": {}}, "txtvers"),
        ({"txt": told(txtvers=b"2")}, "txtvers"),
        ({"txt": told(txtvers=None)}, "txtvers"),
        ({"txt": told(id=b"Pi 1")}, "node id"),
        ({"txt": told(id=b"\xff\xfe")}, "node id"),
        ({"txt": told(id=None)}, "node id"),
        ({"txt": told(cluster=b"../x")}, "node id"),
        ({"txt": told(id=b"pi2")}, "is not the name of pi2"),
        ({"txt": told(cluster=b"work")}, "is not the name of pi1 of work"),
        ({"instance": "x._ckptd._tcp.local."}, "is not the name"),
        ({"port": 0}, "port"),
        ({"port": 65536}, "port"),
        ({"port": None}, "port"),
        ({"addresses": []}, "no address"),
        ({"addresses": ["127.0.0.1", "127.0.1.1", "::1", "0.0.0.0", "::"]}, "no address"),
        ({"addresses": ["224.0.0.251", "ff02::1", "255.255.255.255", "fe80::1"]}, "no address"),
        ({"addresses": ["home.example", ""]}, "no address"),
    ],
)
def test_what_breaks_the_rules_is_no_announcement(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(AnnouncementRefused, match=why):
        heard(**changes)


def test_loopback_counts_on_loopback_alone() -> None:
    assert heard(addresses=["127.0.0.1"], loopback=True).addresses == (Address("127.0.0.1", 7701),)


def test_addresses_are_told_once_and_a_few_at_most() -> None:
    many = [f"10.0.0.{number % 100}" for number in range(250)]
    found = heard(addresses=many).addresses
    assert len(found) == limits.ANNOUNCED_ADDRESSES_MAX == len(set(found))


def test_texts_of_strangers_are_cut_and_made_printable() -> None:
    found = heard(txt=told(version=b"1\x1b[31m" + b"x" * 200, roles=b"admin,worker,worker,root"))
    assert len(found.software) <= 32 and found.software.isprintable()
    assert found.roles == ("worker",)
