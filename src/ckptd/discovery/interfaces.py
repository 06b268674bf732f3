"""On which network interfaces nodes are looked for and announced, and at which addresses.

`read_interfaces` asks the system; everything else decides without looking anywhere. Left to
themselves, mDNS libraries also speak on the bridges of containers and into tunnels, and announce
addresses that nobody else can reach.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Address,
    IPv6Interface,
    ip_address,
    ip_interface,
)
from typing import Final, NamedTuple

LOOPBACK_NAMES: Final = ("lo", "lo0")
VIRTUAL_NAMES: Final = (
    # containers and virtual machines
    "docker*", "br-*", "veth*", "virbr*", "vnet*", "vmnet*", "vboxnet*", "lxc*", "lxd*", "incus*",
    "podman*", "cni*", "flannel*", "cali*", "cilium*", "kube*", "nodelocaldns*", "weave*",
    "bridge1[0-9][0-9]", "dummy*", "ifb*",
    # tunnels
    "tun*", "tap*", "wg*", "utun*", "ppp*", "ipsec*", "tailscale*", "zt*", "nordlynx*", "proton*",
    "sit*", "gre*", "ip6tnl*", "gif*", "stf*", "teredo*",
    # Apple's own device-to-device links
    "awdl*", "llw*", "anpi*", "ap[0-9]*",
)  # fmt: skip
"""Patterns of interfaces that are left out unless `discovery.interfaces` names them."""

# Debian writes the host's own name with this address into /etc/hosts: true on that host alone.
_HOST_NAME_ADDRESS: Final = IPv4Address("127.0.1.1")
_ANY: Final = ("", "0.0.0.0", "::")

IpAddress = IPv4Address | IPv6Address
IpInterface = IPv4Interface | IPv6Interface


class Interface(NamedTuple):
    """One interface of this machine: its addresses, each with the network it is in."""

    name: str
    addresses: tuple[IpInterface, ...]


class Choice(NamedTuple):
    """What to do on this machine, all addresses as text. `multicast`: one address of each interface
    to speak mDNS on. `advertised`: where this machine can be reached, the best first."""

    multicast: tuple[str, ...]
    advertised: tuple[str, ...]


def choose(
    interfaces: Iterable[Interface], wanted: Sequence[str] = (), listen: str = "0.0.0.0"
) -> Choice:
    """The interfaces and addresses to use.

    `wanted` is the config's `discovery.interfaces`: names, patterns of names or addresses; empty
    stands for every interface that is no loopback, container bridge or tunnel and has more than
    link-local addresses. `listen` is the address that the node is bound to: only what it accepts
    connections on is advertised. Addresses that other machines cannot use are never advertised.
    """
    chosen = [
        (interface, usable)
        for interface in interfaces
        if _is_wanted(interface, wanted)
        and (usable := _usable(interface, link_local=bool(wanted), asked_for=wanted))
    ]
    bound = _parsed(listen)
    multicast: list[str] = []
    advertised: list[str] = []
    for _, usable in chosen:
        speaking = usable
        if bound is not None:
            speaking = [address for address in usable if address == bound]
        elif listen != "::":
            advertised += [str(address) for address in usable if address.version == 4]
        else:
            advertised += [str(address) for address in usable]
        if speaking:
            multicast.append(str(usable[0]))
            if bound is not None:
                advertised += [str(address) for address in speaking]
    return Choice(tuple(dict.fromkeys(multicast)), tuple(dict.fromkeys(advertised)))


def nearest_first(addresses: Iterable[str], interfaces: Iterable[Interface]) -> list[str]:
    """`addresses` with those first that are in a network of one of `interfaces`."""
    networks = [own.network for interface in interfaces for own in interface.addresses]

    def is_far(text: str) -> bool:
        address = ip_address(text)
        return not any(address in network for network in networks)

    return sorted(addresses, key=is_far)


def read_interfaces() -> list[Interface]:
    """The interfaces that this machine has now, by name."""
    import ifaddr

    found = []
    for adapter in ifaddr.get_adapters():
        addresses: list[IpInterface] = []
        for entry in adapter.ips:
            text = entry.ip if isinstance(entry.ip, str) else entry.ip[0]
            addresses.append(ip_interface(f"{text.partition('%')[0]}/{entry.network_prefix}"))
        found.append(Interface(adapter.name, tuple(sorted(addresses, key=_by_address))))
    return sorted(found)


def _by_address(own: IpInterface) -> tuple[int, int]:
    return own.version, int(own.ip)


def _is_wanted(interface: Interface, wanted: Sequence[str]) -> bool:
    if wanted:
        own = {str(address.ip) for address in interface.addresses}
        return any(entry in own or fnmatch.fnmatchcase(interface.name, entry) for entry in wanted)
    if interface.name in LOOPBACK_NAMES:
        return False
    return not any(fnmatch.fnmatchcase(interface.name, pattern) for pattern in VIRTUAL_NAMES)


def _usable(interface: Interface, *, link_local: bool, asked_for: Sequence[str]) -> list[IpAddress]:
    """The addresses that other machines can use, IPv4 first. When some of them are asked for
    themselves, these alone."""
    usable: list[IpAddress] = []
    for own in interface.addresses:
        address = own.ip
        if address == _HOST_NAME_ADDRESS or address.is_multicast or address.is_unspecified:
            continue
        if address.is_loopback and interface.name not in LOOPBACK_NAMES:
            continue
        if address.is_link_local and (address.version == 6 or not link_local):
            continue  # those of IPv6 mean nothing without the number of an interface
        usable.append(address)
    named = [address for address in usable if str(address) in asked_for]
    return sorted(named or usable, key=lambda address: address.version)


def _parsed(listen: str) -> IpAddress | None:
    """The one address that a node is bound to, None when it is bound to all."""
    return None if listen in _ANY else ip_address(listen.partition("%")[0])
