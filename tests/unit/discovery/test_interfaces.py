"""Which interfaces and addresses are chosen, on machines as they are."""

from ipaddress import ip_interface

import pytest

from ckptd.discovery.interfaces import (
    LOOPBACK_NAMES,
    Choice,
    Interface,
    choose,
    nearest_first,
    read_interfaces,
)


def interface(name: str, *addresses: str) -> Interface:
    return Interface(name, tuple(ip_interface(address) for address in addresses))


LO = interface("lo", "127.0.0.1/8", "::1/128")
ETH = interface("eth0", "192.168.1.11/24", "fd00::11/64", "fe80::11/64")
WLAN = interface("wlan0", "192.168.1.12/24", "fe80::12/64")
DOCKER = interface("docker0", "172.17.0.1/16", "fe80::42/64")
PI = [
    LO,
    ETH,
    WLAN,
    DOCKER,
    interface("br-3f2a", "172.18.0.1/16"),
    interface("veth9", "fe80::9/64"),
]


def test_a_pi_with_containers_speaks_on_its_network_alone() -> None:
    assert choose(PI) == Choice(("192.168.1.11", "192.168.1.12"), ("192.168.1.11", "192.168.1.12"))


@pytest.mark.parametrize(
    "name",
    ["docker0", "docker_gwbridge", "br-0a1b2c", "veth12ab", "virbr0", "lxcbr0", "podman1", "cni0",
     "cali12", "flannel.1", "bridge100", "vmnet8", "tun0", "tap3", "wg0", "utun4", "ppp0",
     "tailscale0", "zt7nnig34", "awdl0", "llw0", "ifb1", "dummy0"],
)  # fmt: skip
def test_bridges_of_containers_and_tunnels_are_left_out_unless_they_are_named(name: str) -> None:
    machine = [LO, ETH, interface(name, "10.8.0.2/24")]
    assert choose(machine).multicast == ("192.168.1.11",)
    assert choose(machine, [name]) == Choice(("10.8.0.2",), ("10.8.0.2",))


@pytest.mark.parametrize(
    "name", ["eth0", "enp3s0", "wlan0", "wlp2s0", "en0", "end0", "br0", "bond0"]
)
def test_interfaces_of_home_networks_are_taken(name: str) -> None:
    assert choose([LO, interface(name, "10.0.0.5/8")]).advertised == ("10.0.0.5",)


def test_a_machine_without_a_network_has_no_choice() -> None:
    assert choose([LO, DOCKER]) == Choice((), ())
    assert choose([]) == Choice((), ())
    assert choose(PI, ["eth9"]) == Choice((), ())


def test_interfaces_are_named_by_name_pattern_or_address() -> None:
    assert choose(PI, ["wlan0"]).advertised == ("192.168.1.12",)
    assert choose(PI, ["w*", "docker?"]).multicast == ("192.168.1.12", "172.17.0.1")
    assert choose(PI, ["192.168.1.11"]).advertised == ("192.168.1.11",)


def test_of_two_addresses_the_named_one_is_taken_alone() -> None:
    two = [interface("eth0", "192.168.1.11/24", "10.1.1.1/24")]
    assert choose(two, ["10.1.1.1"]) == Choice(("10.1.1.1",), ("10.1.1.1",))
    # One socket for each interface is enough to speak on it.
    assert choose(two) == Choice(("192.168.1.11",), ("192.168.1.11", "10.1.1.1"))


def test_an_interface_with_link_local_addresses_alone_is_left_out_unless_it_is_named() -> None:
    cable = [interface("eth0", "169.254.7.7/16", "fe80::1/64")]
    assert choose(cable) == Choice((), ())
    assert choose(cable, ["eth0"]) == Choice(("169.254.7.7",), ("169.254.7.7",))


def test_the_address_of_the_own_host_name_is_never_told() -> None:
    debian = [interface("lo", "127.0.0.1/8", "127.0.1.1/8")]
    assert choose(debian, ["lo"]) == Choice(("127.0.0.1",), ("127.0.0.1",))
    assert choose(debian, ["127.0.1.1"]).advertised == ("127.0.0.1",)
    assert choose([interface("eth0", "127.0.1.1/8", "127.0.0.1/8")], ["eth0"]) == Choice((), ())


@pytest.mark.parametrize("address", ["0.0.0.0/0", "224.0.0.251/4", "ff02::fb/16", "::/0"])
def test_what_is_no_address_of_a_machine_is_not_taken(address: str) -> None:
    assert choose([interface("eth0", address)], ["eth0"]) == Choice((), ())


def test_ipv6_is_told_only_where_the_node_listens_on_it() -> None:
    assert choose([ETH], listen="::").advertised == ("192.168.1.11", "fd00::11")
    assert choose([ETH], listen="").advertised == ("192.168.1.11",)
    six = [interface("eth0", "fd00::11/64", "fe80::11/64")]
    assert choose(six, listen="::") == Choice(("fd00::11",), ("fd00::11",))
    assert choose(six, listen="0.0.0.0") == Choice(("fd00::11",), ())


def test_a_node_bound_to_one_address_is_told_there_alone() -> None:
    assert choose(PI, listen="192.168.1.12") == Choice(("192.168.1.12",), ("192.168.1.12",))
    assert choose([ETH], listen="fd00::11") == Choice(("192.168.1.11",), ("fd00::11",))
    assert choose(PI, listen="127.0.0.1") == Choice((), ())
    assert choose(PI, ["lo"], listen="127.0.0.1") == Choice(("127.0.0.1",), ("127.0.0.1",))
    assert choose(PI, listen="fe80::11%eth0") == Choice((), ())


def test_addresses_of_the_own_networks_are_tried_first() -> None:
    told = ["172.17.0.1", "10.0.0.1", "192.168.1.99", "fd00::9"]
    assert nearest_first(told, [ETH]) == ["192.168.1.99", "fd00::9", "172.17.0.1", "10.0.0.1"]
    assert nearest_first(told, []) == told


def test_the_interfaces_of_this_machine_are_read() -> None:
    found = {interface.name: interface for interface in read_interfaces()}
    (loopback,) = (name for name in LOOPBACK_NAMES if name in found)
    assert ip_interface("127.0.0.1/8") in found[loopback].addresses
    assert choose(list(found.values()), [loopback]).multicast == ("127.0.0.1",)
