"""Recovery codes and bundles: three different faults, three different answers."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.client.recovery import new_code, read_code, seal, unseal
from ckptd.core.limits import RECOVERY_BUNDLE_MAX_BYTES, RECOVERY_FILES_MAX
from ckptd.errors import IntegrityError, NotAuthorized, Refused, UsageError

GOLDEN = Path(__file__).parents[2] / "golden" / "recovery-1"
GOLDEN_CODE = "0123-4567-89AB-CDEF-GHJK-MNPQ-RSTV-NGBY"
CODE = GOLDEN_CODE
FILES = {"ca.pem": b"certificate", "ca.key": b"key \x00\xff"}
BUNDLE = seal("home", FILES, CODE)


def changed(**fields: object) -> bytes:
    return msgspec.json.encode({**json.loads(BUNDLE), **fields}, order="sorted")


def test_the_golden_bundle_opens() -> None:
    bundle = (GOLDEN / "recovery.bundle").read_bytes()
    assert unseal(bundle, GOLDEN_CODE) == (
        "home",
        {"ca.pem": b"golden certificate\n", "ca.key": b"golden key\n"},
    )
    assert list(json.loads(bundle)) == ["cluster", "content", "format", "nonce", "salt", "sha256"]


def test_a_new_code_has_eight_groups_and_is_never_the_same() -> None:
    codes = {new_code() for _ in range(100)}
    assert len(codes) == 100
    for code in codes:
        assert [len(group) for group in code.split("-")] == [4] * 8
        assert read_code(code) == code


def test_a_code_may_be_typed_as_it_reads() -> None:
    typed = CODE.lower().replace("-", "  ").replace("0", "o").replace("1", "l") + "\n"
    assert read_code(typed) == CODE
    assert read_code(CODE.replace("1", "I").replace("-", "")) == CODE


@given(st.integers(0, 31), st.sampled_from("0123456789ABCDEFGHJKMNPQRSTVWXYZ"))
def test_a_wrong_character_is_a_typing_error(position: int, typed: str) -> None:
    characters = list(CODE.replace("-", ""))
    if characters[position] == typed:
        typed = "Z" if typed != "Z" else "Y"
    characters[position] = typed
    with pytest.raises(UsageError, match="typing error"):
        read_code("".join(characters))


@pytest.mark.parametrize(
    ("typed", "reason"),
    [
        ("", "this one has 0"),
        (CODE[:-1], "this one has 31"),
        (CODE + "0", "this one has 33"),
        (CODE.replace("A", "U"), "never contains U"),
        (CODE.replace("A", "!"), "never contains !"),
        (CODE.replace("A", "ß", 1), "this one has 33"),
        ("1023" + CODE[4:], "typing error"),
    ],
)
def test_what_cannot_be_a_code_is_refused(typed: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_code(typed)


@settings(max_examples=5)
@given(
    st.dictionaries(
        st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        st.binary(max_size=200),
        max_size=5,
    )
)
def test_what_was_sealed_comes_back(files: dict[str, bytes]) -> None:
    code = new_code()
    assert unseal(seal("home", files, code), code.lower()) == ("home", files)


def test_nothing_secret_is_readable() -> None:
    assert b"certificate" not in BUNDLE
    assert json.loads(BUNDLE)["cluster"] == "home"
    assert seal("home", FILES, CODE) != BUNDLE


def test_a_mistyped_code_is_said_to_be_one() -> None:
    with pytest.raises(UsageError, match="typing error"):
        unseal(BUNDLE, "1" + CODE[1:])


def test_the_code_of_another_bundle_is_said_to_be_one() -> None:
    with pytest.raises(NotAuthorized, match="does not open this bundle of cluster home"):
        unseal(BUNDLE, new_code())


def test_a_bundle_renamed_to_another_cluster_does_not_open() -> None:
    with pytest.raises(NotAuthorized):
        unseal(changed(cluster="away"), CODE)


@pytest.mark.parametrize(
    "bundle",
    [
        b"",
        BUNDLE[:-1],
        BUNDLE + b"x",
        b"\xff" * 10,
        changed(format="ckptd-recovery-2"),
        changed(nonce="AAAA"),
        changed(more=1),
        changed(content="AAAA"),
        changed(sha256="0" * 64),
        b" " * (RECOVERY_BUNDLE_MAX_BYTES + 1),
    ],
)
def test_a_damaged_bundle_is_said_to_be_damaged(bundle: bytes) -> None:
    with pytest.raises(IntegrityError) as fault:
        unseal(bundle, CODE)
    assert "another worker" in fault.value.next


@pytest.mark.parametrize("name", ["", "..", "../ca.key", "/etc/passwd", "a/b", ".hidden", "a\n"])
def test_names_that_lead_elsewhere_are_not_sealed(name: str) -> None:
    with pytest.raises(Refused, match="not a plain file name"):
        seal("home", {name: b""}, CODE)


def test_a_bundle_has_a_largest_size() -> None:
    with pytest.raises(Refused, match="too much"):
        seal("home", {"big": bytes(RECOVERY_BUNDLE_MAX_BYTES)}, CODE)
    with pytest.raises(Refused, match="too much"):
        seal("home", {str(i): b"" for i in range(RECOVERY_FILES_MAX + 1)}, CODE)
