"""What the doctor says about the files and the hearing of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest

from ckptd.client import pki
from ckptd.client.findings import Finding
from ckptd.client.machine_checks import (
    Heard,
    check_certificate,
    check_cipher,
    check_config,
    check_mdns,
)
from ckptd.config import Config, DiscoveryConfig, NodeConfig, TlsConfig
from ckptd.core.identity import Role
from ckptd.core.quantities import Address

TEN_YEARS_S = 10 * 366 * 86_400.0


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pki")
    pki.init_cluster(directory, "home")
    pki.issue(directory, [Role.WORKER], "pi1")
    pki.issue(directory, [Role.MONITOR], "watcher")
    return directory


def config(authority: Path, name: str = "client", *, node: NodeConfig | None = None) -> Config:
    return Config(
        cluster="home",
        tls=TlsConfig(authority / "ca.pem", authority / f"{name}.pem", authority / f"{name}.key"),
        node=node,
        discovery=DiscoveryConfig(peers=(Address("pi1", 7701),)),
    )


def worker(node_id: str) -> NodeConfig:
    return NodeConfig(node_id, ("worker",), Address("0.0.0.0", 7701), 7702)


def states(findings: Iterable[Finding]) -> list[str]:
    return [finding.state for finding in findings]


def test_a_good_certificate_is_told_with_its_end(authority: Path) -> None:
    (found,) = check_certificate(config(authority), time.time())
    assert (found.state, found.next) == ("ok", "")
    assert "client client of cluster home, until 20" in found.message


@pytest.mark.parametrize(
    ("ahead_s", "state", "words"),
    [
        (-100 * TEN_YEARS_S / 10, "error", "not valid yet"),
        (TEN_YEARS_S - 30 * 86_400, "warning", "ends"),
        (TEN_YEARS_S, "error", "ended at"),
    ],
)
def test_certificates_that_end_or_have_not_begun(
    authority: Path, ahead_s: float, state: str, words: str
) -> None:
    now = max(0.0, time.time() + ahead_s)
    (found,) = check_certificate(config(authority), now)
    assert (found.state, words in found.message) == (state, True), found
    assert found.next


def test_a_certificate_of_somebody_else(authority: Path) -> None:
    found = list(check_certificate(config(authority, "pi1", node=worker("pi2")), time.time()))
    assert states(found) == ["error", "ok"]
    assert found[0].next == "ckptd pki issue worker pi2"
    assert states(
        list(check_certificate(config(authority, "pi1", node=worker("pi1")), time.time()))
    ) == ["ok"]


def test_a_certificate_that_may_not_read(authority: Path) -> None:
    found = list(check_certificate(config(authority, "watcher"), time.time()))
    assert states(found) == ["ok", "warning"]
    assert found[1].next == "ckptd pki issue client ID"


def test_certificates_that_cannot_be_used(authority: Path, tmp_path: Path) -> None:
    missing = config(authority, "nobody")
    (found,) = check_certificate(missing, time.time())
    assert (found.state, "nobody.pem" in found.message) == ("error", True)
    broken = tmp_path / "client.pem"
    broken.write_text("no certificate")
    tls = TlsConfig(authority / "ca.pem", broken, authority / "client.key")
    (found,) = check_certificate(Config(cluster="home", tls=tls), time.time())
    assert found.state == "error"
    other = tmp_path / "other"
    pki.init_cluster(other, "elsewhere")
    foreign = TlsConfig(authority / "ca.pem", other / "client.pem", other / "client.key")
    (found,) = check_certificate(Config(cluster="home", tls=foreign), time.time())
    assert found.state == "error"


def test_a_config_without_peers_finds_nobody(authority: Path) -> None:
    tls = config(authority).tls
    alone = Config(cluster="home", tls=tls, discovery=DiscoveryConfig(mdns=False))
    assert states(check_config(alone)) == ["error", "ok"]
    assert states(check_config(config(authority))) == ["ok"]
    listening = Config(cluster="home", tls=tls)
    assert states(check_config(listening)) == ["ok"]


def test_processors_without_aes_get_a_hint() -> None:
    slow = "Features\t: fp asimd evtstrm crc32 cpuid\n"
    (found,) = check_cipher(slow, {})
    assert found.next.startswith("export OPENSSL_CONF=/")
    assert list(check_cipher(slow, {"OPENSSL_CONF": "/etc/mine.cnf"})) == []
    assert list(check_cipher("Features\t: fp asimd aes\n", {})) == []
    assert list(check_cipher("", {})) == []


def on_mdns(authority: Path, *, mdns: bool = True, peers: tuple[Address, ...] = ()) -> Config:
    return msgspec.structs.replace(
        config(authority), discovery=DiscoveryConfig(mdns=mdns, peers=peers)
    )


HERE = ("192.168.1.5",)


@pytest.mark.parametrize(
    ("heard", "answering", "state", "words"),
    [
        (
            Heard(HERE, ("pi1", "pi2")),
            {"pi1", "pi2"},
            "ok",
            "heard pi1, pi2 on 192.168.",
        ),
        (Heard(HERE, ("pi1",), ("work",)), {"pi1"}, "ok", "besides: work"),
        (Heard(HERE), {"pi1"}, "error", "1 answer: multicast does not get through"),
        (Heard(HERE), set(), "error", "no node of cluster"),
        (
            Heard(failure="no interface is left"),
            set(),
            "error",
            "no interface is left",
        ),
    ],
)
def test_what_mdns_brings(
    authority: Path, heard: Heard, answering: set[str], state: str, words: str
) -> None:
    (finding,) = check_mdns(on_mdns(authority), heard, answering, platform="linux")
    assert (finding.check, finding.state) == ("mdns", state)
    assert words in finding.message
    assert bool(finding.next) == (state != "ok")
    peers = on_mdns(authority, peers=(Address("pi1", 7701),))
    (finding,) = check_mdns(peers, heard, answering, platform="linux")
    assert finding.state == ("ok" if state == "ok" else "warning")


def test_without_mdns_nothing_is_expected_of_it(authority: Path) -> None:
    off = on_mdns(authority, mdns=False)
    (finding,) = check_mdns(off, Heard(), set())
    assert finding.state == "ok" and "discovery.peers" in finding.message


def test_the_advice_fits_the_system(authority: Path) -> None:
    silent = Heard(HERE)
    advice = {
        platform: next(check_mdns(on_mdns(authority), silent, (), platform=platform)).next
        for platform in ("darwin", "linux")
    }
    assert "Local Network" in advice["darwin"]
    assert "UDP port 5353" in advice["linux"]
