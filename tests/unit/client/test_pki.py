"""The CA in its directory: complete, private, durable, and never written twice."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from ckptd.client.exclusive_files import create_files
from ckptd.client.pki import (
    CA_FILES,
    CA_VALID_TO,
    CLIENT_FILES,
    LEAF_LIFETIME,
    VALID_FROM,
    init_cluster,
    issue,
    recover,
)
from ckptd.client.recovery import new_code, seal, unseal
from ckptd.core.identity import Role, identity_of, load_ca, verify_chain
from ckptd.core.signing import Signer, verify
from ckptd.errors import (
    ConfigError,
    IntegrityError,
    NotAuthorized,
    NotFound,
    Refused,
    TargetExists,
    UsageError,
)

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ALL_FILES = {
    "ca.key",
    "ca.pem",
    "client.key",
    "client.pem",
    "admin.key",
    "admin.pem",
    "recovery.bundle",
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    directory = tmp_path / "new" / "home"
    init_cluster(directory, "home", now=NOW)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_init_makes_everything_readable_by_the_owner_alone(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "home"
    before = os.umask(0)
    try:
        code = init_cluster(directory, "home")
    finally:
        os.umask(before)
    assert {path.name for path in directory.iterdir()} == ALL_FILES
    assert mode(directory) == mode(directory.parent) == 0o700
    assert {mode(directory / name) for name in ALL_FILES} == {0o600}
    assert all(code.encode() not in content for content in contents(directory).values())


def test_client_and_admin_sign_documents_of_the_cluster(home: Path) -> None:
    ca = load_ca((home / "ca.pem").read_bytes())
    for role in (Role.CLIENT, Role.ADMIN):
        signer = Signer.from_pem(
            (home / f"{role}.pem").read_bytes(), (home / f"{role}.key").read_bytes()
        )
        author = verify(b"document", signer.sign(b"document"), ca, "home")
        assert (author.roles, author.node_id) == (frozenset({role}), role.value)


def test_init_refuses_where_anything_is_already_there(tmp_path: Path, home: Path) -> None:
    before = contents(home)
    with pytest.raises(TargetExists, match="never overwritten"):
        init_cluster(home, "home")
    assert contents(home) == before
    for name in sorted(ALL_FILES - {"ca.pem"}):
        directory = tmp_path / name
        directory.mkdir()
        (directory / name).symlink_to(directory / "nowhere")
        with pytest.raises(TargetExists, match="cut off"):
            init_cluster(directory, "home")
        assert [path.name for path in directory.iterdir()] == [name]


@pytest.mark.parametrize("cluster", ["", "a/b", "Home", "home\n", "x" * 64])
def test_init_refuses_names_that_cannot_name_a_cluster(tmp_path: Path, cluster: str) -> None:
    with pytest.raises(UsageError, match="cluster name"):
        init_cluster(tmp_path / "home", cluster)
    assert not (tmp_path / "home").exists()


def test_init_keeps_other_files_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "ckptd.yml").write_text("cluster: home\n")
    init_cluster(tmp_path, "home")
    assert (tmp_path / "ckptd.yml").read_text() == "cluster: home\n"


def test_issue_makes_what_a_nodes_config_names(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "pi1"
    issued = issue(home, {Role.WORKER, Role.COORDINATOR}, "pi1", out=out, now=NOW)
    assert (issued.ca, issued.cert, issued.key) == (
        out / "ca.pem",
        out / "pi1.pem",
        out / "pi1.key",
    )
    assert {path.name for path in out.iterdir()} == {"ca.pem", "pi1.pem", "pi1.key"}
    assert {mode(path) for path in out.iterdir()} == {0o600}
    assert issued.ca.read_bytes() == (home / "ca.pem").read_bytes()
    der = Signer.from_pem(issued.cert.read_bytes(), issued.key.read_bytes()).certificate_der
    verify_chain(der, load_ca(issued.ca.read_bytes()))
    assert identity_of(der, cluster="home").roles == {Role.WORKER, Role.COORDINATOR}


def test_issue_writes_next_to_the_ca_by_default(home: Path) -> None:
    issued = issue(home, {Role.MONITOR}, "prometheus")
    assert {path.name for path in home.iterdir()} == ALL_FILES | {
        "prometheus.pem",
        "prometheus.key",
    }
    assert issued.ca == home / "ca.pem"


def test_only_nodes_may_serve(home: Path) -> None:
    for role, purposes in [
        (Role.WORKER, [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
        (Role.COORDINATOR, [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
        (Role.CLIENT, [ExtendedKeyUsageOID.CLIENT_AUTH]),
        (Role.ADMIN, [ExtendedKeyUsageOID.CLIENT_AUTH]),
        (Role.MONITOR, [ExtendedKeyUsageOID.CLIENT_AUTH]),
    ]:
        leaf = certificate(issue(home, {role}, f"a-{role}").cert)
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert list(usage) == purposes


@pytest.mark.parametrize(
    ("now", "valid_to"),
    [
        (NOW, NOW + LEAF_LIFETIME),
        (datetime(1970, 1, 1, tzinfo=UTC), VALID_FROM + LEAF_LIFETIME),
        (datetime(2069, 1, 1, tzinfo=UTC), CA_VALID_TO),
    ],
)
def test_certificates_are_valid_since_long_ago_for_ten_years(
    home: Path, now: datetime, valid_to: datetime
) -> None:
    leaf = certificate(issue(home, {Role.WORKER}, "pi1", now=now).cert)
    assert leaf.not_valid_before_utc == VALID_FROM
    assert leaf.not_valid_after_utc == valid_to
    assert certificate(home / "ca.pem").not_valid_after_utc == CA_VALID_TO


def test_without_a_given_time_the_clock_counts(home: Path) -> None:
    began = datetime.now(UTC).replace(microsecond=0)
    leaf = certificate(issue(home, {Role.WORKER}, "pi1").cert)
    expected = leaf.not_valid_after_utc - LEAF_LIFETIME
    assert began <= expected <= datetime.now(UTC) + timedelta(seconds=1)


def test_issue_refuses_to_overwrite(home: Path, tmp_path: Path) -> None:
    issue(home, {Role.WORKER}, "pi1")
    before = contents(home)
    with pytest.raises(TargetExists, match=r"pi1\.pem"):
        issue(home, {Role.WORKER}, "pi1")
    with pytest.raises(TargetExists, match=r"client\.pem"):
        issue(home, {Role.WORKER}, "client")
    assert contents(home) == before
    init_cluster(tmp_path / "other", "home")
    with pytest.raises(TargetExists, match="another CA"):
        issue(home, {Role.WORKER}, "pi2", out=tmp_path / "other")
    assert not (tmp_path / "other" / "pi2.key").exists()


def test_issue_into_a_directory_that_has_our_ca_already(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    issue(home, {Role.WORKER}, "pi1", out=out)
    issue(home, {Role.WORKER}, "pi2", out=out)
    assert {path.name for path in out.iterdir()} == {
        "ca.pem",
        "pi1.pem",
        "pi1.key",
        "pi2.pem",
        "pi2.key",
    }


@pytest.mark.parametrize(
    ("roles", "node_id", "reason"),
    [
        (set(), "pi1", "cannot carry the roles"),
        ({Role.WORKER, Role.CLIENT}, "pi1", "cannot carry the roles client, worker"),
        ({Role.COORDINATOR, Role.ADMIN}, "pi1", "cannot carry the roles"),
        ({Role.WORKER}, "../pi1", "node id"),
        ({Role.WORKER}, "", "node id"),
        ({Role.WORKER}, "Pi1", "node id"),
        ({Role.WORKER}, "ca", "'ca' is taken"),
    ],
)
def test_issue_refuses_what_no_certificate_should_say(
    home: Path, tmp_path: Path, roles: set[Role], node_id: str, reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        issue(home, roles, node_id, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_issue_needs_a_whole_ca(home: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"ca\.pem"):
        issue(tmp_path / "nothing", {Role.WORKER}, "pi1")
    other = tmp_path / "other"
    init_cluster(other, "home")
    for content, reason in [
        ((other / "ca.key").read_bytes(), "is not the key of"),
        (b"rubbish", "no usable private key"),
    ]:
        (home / "ca.key").write_bytes(content)
        with pytest.raises(NotAuthorized, match=reason):
            issue(home, {Role.WORKER}, "pi1")
    (home / "ca.key").write_bytes(bytes(65 * 1024))
    with pytest.raises(Refused, match="longer than"):
        issue(home, {Role.WORKER}, "pi1")
    (home / "ca.key").unlink()
    (home / "ca.key").mkdir()
    with pytest.raises(Refused, match="cannot be read"):
        issue(home, {Role.WORKER}, "pi1")


def test_recover_brings_back_a_ca_that_issues(tmp_path: Path) -> None:
    lost, found = tmp_path / "lost", tmp_path / "found"
    code = init_cluster(lost, "home")
    written = recover(lost / "recovery.bundle", code, found)
    assert {path.name for path in written} == {*CA_FILES, *CLIENT_FILES, "recovery.bundle"}
    assert contents(found) == {path.name: (lost / path.name).read_bytes() for path in written}
    assert {mode(path) for path in written} == {0o600}
    issued = issue(found, {Role.WORKER}, "pi1")
    der = Signer.from_pem(issued.cert.read_bytes(), issued.key.read_bytes()).certificate_der
    verify_chain(der, load_ca((lost / "ca.pem").read_bytes()))


def test_recover_next_to_the_bundle(tmp_path: Path) -> None:
    code = init_cluster(tmp_path / "lost", "home")
    found = tmp_path / "found"
    found.mkdir()
    (found / "recovery.bundle").write_bytes((tmp_path / "lost/recovery.bundle").read_bytes())
    recover(found / "recovery.bundle", code, found)
    assert {path.name for path in found.iterdir()} == {
        *CA_FILES,
        *CLIENT_FILES,
        "recovery.bundle",
    }


def test_recover_refuses_and_writes_nothing(tmp_path: Path) -> None:
    lost, found = tmp_path / "lost", tmp_path / "found"
    code = init_cluster(lost, "home")
    bundle = lost / "recovery.bundle"
    with pytest.raises(UsageError):
        recover(bundle, code[:-1], found)
    with pytest.raises(NotAuthorized):
        recover(bundle, new_code(), found)
    with pytest.raises(NotFound):
        recover(tmp_path / "nothing", code, found)
    assert not found.exists()
    before = contents(lost)
    with pytest.raises(TargetExists):
        recover(bundle, code, lost)
    assert contents(lost) == before


def test_recover_refuses_a_bundle_that_does_not_hold_one_whole_ca(tmp_path: Path) -> None:
    code = init_cluster(tmp_path / "one", "home")
    init_cluster(tmp_path / "two", "home")
    _, files = unseal((tmp_path / "one/recovery.bundle").read_bytes(), code)
    mixed = {**files, "ca.key": (tmp_path / "two/ca.key").read_bytes()}
    partial = {name: content for name, content in files.items() if name != "client.key"}
    for cluster, content, reason in [
        ("home", mixed, "do not belong together"),
        ("away", files, "do not belong together"),
        ("home", partial, r"does not hold client\.key"),
    ]:
        bundle = tmp_path / "bundle"
        bundle.write_bytes(seal(cluster, content, code))
        with pytest.raises(IntegrityError, match=reason):
            recover(bundle, code, tmp_path / "found")
        assert not (tmp_path / "found").exists()


def test_files_are_never_replaced_even_in_a_race(tmp_path: Path) -> None:
    (tmp_path / "second").write_bytes(b"mine")
    with pytest.raises(TargetExists, match="second"):
        create_files(tmp_path, [("first", b"1"), ("second", b"2"), ("third", b"3")])
    assert contents(tmp_path) == {"first": b"1", "second": b"mine"}


def test_a_directory_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Refused, match="cannot be written"):
        create_files(tmp_path / "file" / "below", [("a", b"")])


def test_a_private_key_is_of_its_certificate_only(home: Path) -> None:
    assert load_pem_private_key((home / "client.key").read_bytes(), None)
    with pytest.raises(ConfigError, match="does not belong"):
        Signer.from_pem((home / "client.pem").read_bytes(), (home / "admin.key").read_bytes())
