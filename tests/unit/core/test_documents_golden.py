"""Golden documents: their bytes, and so their ids, never change.

A file under tests/golden/documents is the exact content of a document (no final line feed), and
`sha256sums` lists the ids: `sha256sum -c sha256sums` there says what `ckptd` says. A new field gets
a new format number and new files; what stands here stays readable for ever.
"""

from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect as inspect
import pytest
from msgspec.structs import replace

from ckptd.core import documents
from ckptd.core.documents import (
    DirectoryEntry,
    Document,
    Drain,
    FileEntry,
    Forget,
    Maintenance,
    Manifest,
    Member,
    Part,
    Pin,
    RemovedContent,
    ShardReference,
    SymlinkEntry,
    Tombstone,
    Undrain,
    Unpin,
    content_id,
)

DIRECTORY = Path(__file__).parents[2] / "golden" / "documents"
SHARDS = (
    ShardReference("11" * 32, 33_554_432),
    ShardReference("22" * 32, 1_000),
    ShardReference("33" * 32, 412),
)
ENTRIES = (
    FileEntry("config.json", 0o644, 600, "44" * 32, (Part(1, 0, 600),)),
    FileEntry(
        "model.safetensors",
        0o600,
        33_554_832,
        "55" * 32,
        (Part(0, 0, 33_554_432), Part(1, 600, 400)),
    ),
    FileEntry("empty", 0o644, 0, documents.document_id(b""), ()),
    FileEntry("caf\x00e9.txt", 0o644, 0, documents.document_id(b""), ()),
    DirectoryEntry("états", 0o755),
    SymlinkEntry("latest", "model.safetensors"),
)
COMMON: dict[str, Any] = {"format": 1, "cluster": "home", "order": 1_767_323_045_001}
TIME = "2026-01-02T03:04:05Z"
NONCE = "00112233445566778899aabbccddeeff"
MANIFEST = Manifest(
    **COMMON,
    created=TIME,
    nonce=NONCE,
    name="minilm/checkpoint-500",
    host="mac-mini",
    unit="directory",
    content_id=content_id(ENTRIES),
    copies=2,
    redundancy="copies",
    mode=0o755,
    entries=ENTRIES,
    shards=SHARDS,
    tensor_index=2,
    step=500,
    # Numbers have many spellings: another one would make documents unreadable.
    metrics={
        "accuracy": 100.0,
        "eval_loss": 0.25,
        "largest": 1.7976931348623157e308,
        "learning_rate": 1e-5,
        "learning_rate_min": 1e-6,
        'perplexity "x"\n\x01é': 1 / 3,
        "smallest": 5e-324,
        "tokens": 1e15,
        "tokens_total": 1e16,
        "zero": -0.0,
    },
)
SAMPLES: dict[str, Document] = {
    "manifest": MANIFEST,
    "manifest_of_a_file": replace(
        MANIFEST,
        name="lora.safetensors",
        unit="file",
        entries=ENTRIES[1:2],
        content_id=content_id(ENTRIES[1:2]),
        tensor_index=None,
        step=None,
        metrics={},
    ),
    "tombstone": Tombstone(
        **COMMON,
        created=TIME,
        nonce=NONCE,
        reason="rm",
        versions=("66" * 32, "77" * 32),
        contents=(RemovedContent("55" * 32, "88" * 32),),
    ),
    "tombstone_of_retention": Tombstone(
        **COMMON,
        created=TIME,
        nonce=NONCE,
        reason="retention",
        versions=("66" * 32,),
        contents=(RemovedContent("55" * 32, "88" * 32),),
        justified_by="99" * 32,
    ),
    "pin": Pin(**COMMON, created=TIME, nonce=NONCE, version="66" * 32),
    "unpin": Unpin(**COMMON, created=TIME, nonce=NONCE, pins=("aa" * 32,)),
    "member": Member(
        **COMMON,
        created="2026-01-02T03:04:05.678901Z",
        node="pi1",
        roles=("worker", "coordinator"),
        address="192.168.1.11:7701",
        bulk_port=7702,
        zone="shelf-a",
    ),
    "drain": Drain(**COMMON, created=TIME, nonce=NONCE, node="pi1"),
    "undrain": Undrain(**COMMON, created=TIME, nonce=NONCE, drains=("bb" * 32,)),
    "maintenance": Maintenance(**COMMON, created=TIME, nonce=NONCE, node="pi1", seconds=7_200),
    "forget": Forget(
        **COMMON,
        created=TIME,
        nonce=NONCE,
        node="pi1",
        serials=("0123456789" * 4,),
        drains=("bb" * 32,),
    ),
}


def golden_ids() -> dict[str, str]:
    """The id of each golden file, from `sha256sums`."""
    lines = (DIRECTORY / "sha256sums").read_text().splitlines()
    return {name.removesuffix(".json"): digest for digest, name in map(str.split, lines)}


@pytest.mark.parametrize("name", SAMPLES)
def test_documents_are_encoded_to_the_golden_bytes(name: str) -> None:
    golden = (DIRECTORY / f"{name}.json").read_bytes()
    # First in a form whose difference can be read, then byte by byte.
    indented = msgspec.json.format(documents.encode(SAMPLES[name])).decode()
    assert indented == msgspec.json.format(golden).decode()
    assert documents.encode(SAMPLES[name]) == golden


@pytest.mark.parametrize("name", SAMPLES)
def test_golden_documents_are_decoded_and_have_their_ids(name: str) -> None:
    golden = (DIRECTORY / f"{name}.json").read_bytes()
    assert documents.decode(golden, cluster="home") == SAMPLES[name]
    assert documents.document_id(golden) == golden_ids()[name]


def test_every_kind_has_a_golden_file_and_every_file_a_sample() -> None:
    union = inspect.type_info(Document)
    assert isinstance(union, inspect.UnionType)
    kinds = {info.cls for info in union.types if isinstance(info, inspect.StructType)}
    assert {type(document) for document in SAMPLES.values()} == kinds
    names = {path.name for path in DIRECTORY.iterdir()}
    assert names == {f"{name}.json" for name in SAMPLES} | {"sha256sums"}
    assert golden_ids().keys() == SAMPLES.keys()


if __name__ == "__main__":
    sums = []
    for sample_name, sample in SAMPLES.items():
        raw = documents.encode(sample)
        (DIRECTORY / f"{sample_name}.json").write_bytes(raw)
        sums.append(f"{documents.document_id(raw)}  {sample_name}.json\n")
    (DIRECTORY / "sha256sums").write_text("".join(sums))
