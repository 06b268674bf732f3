"""Names on disk are strict: what is made can be read, and nothing else can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.store import layout


@given(st.binary(min_size=32, max_size=32))
def test_shard_paths_lead_back_to_the_digest(digest: bytes) -> None:
    parts = layout.shard_path("/s", digest).split("/")
    assert parts[:3] == ["", "s", "shards"] and len(parts) == 5
    assert layout.shard_directory("/s", digest) == "/".join(parts[:4])
    assert layout.is_shard_directory_name(parts[3])
    assert layout.digest_of_shard_name(parts[3], parts[4]) == digest


@given(st.binary().filter(lambda digest: len(digest) != 32))
def test_a_digest_of_another_length_has_no_path(digest: bytes) -> None:
    with pytest.raises(ValueError):
        layout.shard_path("/s", digest)


@given(st.text())
def test_other_names_are_not_ours(name: str) -> None:
    assert layout.digest_of_shard_name("ab", name) is None
    assert layout.parse_catalogue_name(name) is None
    assert layout.parse_quarantine_name(name) is None


ID = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "name", [ID.upper(), ID[:-1], ID + "0", ID + "\n", "x" + ID[1:], "", ID + ".json"]
)
def test_ids_are_64_lower_case_hex_digits(name: str) -> None:
    assert not layout.is_document_id(name)
    assert layout.digest_of_shard_name("01", name) is None
    for path in (layout.document_path, layout.signature_path):
        with pytest.raises(ValueError):
            path("/s", name)


def test_a_shard_lies_in_the_directory_of_its_first_byte() -> None:
    assert layout.digest_of_shard_name("01", ID) == bytes.fromhex(ID)
    assert layout.digest_of_shard_name("02", ID) is None
    assert not layout.is_shard_directory_name("0A") and not layout.is_shard_directory_name("01\n")


def test_names_of_documents_and_quarantine() -> None:
    assert layout.document_path("/s", ID) == f"/s/catalogue/{ID}.json"
    assert layout.signature_path("/s", ID) == f"/s/catalogue/{ID}.sig"
    assert layout.parse_catalogue_name(f"{ID}.json") == (ID, ".json")
    assert layout.parse_catalogue_name(f"{ID}.sig") == (ID, ".sig")
    assert layout.parse_catalogue_name(f"{ID}.json.1") is None
    assert layout.quarantine_path("/s", ID, 3) == f"/s/quarantine/{ID}.3"
    assert layout.parse_quarantine_name(f"{ID}.3") == (ID, "", 3)
    assert layout.parse_quarantine_name(f"{ID}.json.0") == (ID, ".json", 0)
    assert layout.parse_quarantine_name(f"{ID}.03") is None
