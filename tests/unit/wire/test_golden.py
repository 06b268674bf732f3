"""Golden frames: the bytes on the wire do not change without somebody deciding it.

Each file under tests/golden/wire holds one frame as hex digits: header, body and payload, with a
comment in front of each. A difference means another format: nodes of the last version cannot read
it. When that is meant, `PYTHONPATH=src python tests/unit/wire/test_golden.py` writes them anew.
"""

from pathlib import Path

import msgspec
import pytest

from ckptd.wire import frames, messages
from ckptd.wire.messages import CopyReport, Hop, Message, PeerView, SignedDocument

DIRECTORY = Path(__file__).parents[2] / "golden" / "wire"
BYTES_PER_LINE = 32

SHARD = bytes(range(32))
OTHER = bytes(range(32, 64))
VERSION = bytes(range(64, 96))
CHAIN = (Hop("pi2", "192.168.1.12", 7702), Hop("pi3", "fe80::1", 7702))
REPORTS = (
    CopyReport("pi1", "durable", 33_554_432),
    CopyReport("pi2", "failed", 1_048_576, "no_room", "pi2: no room above the reserve"),
)
SIGNED = (SignedDocument(b'{"kind":"pin"}', b"\x01\x02\x03"),)

SAMPLES: dict[str, tuple[Message, bytes]] = {
    "hello": (
        messages.Hello(
            cluster="home",
            node="pi1",
            roles=("worker", "coordinator"),
            software="0.1.0",
            clock_ms=1_767_323_045_000,
            highest_order=1_767_323_045_001,
            boot_id="6f1c9f2e-7c1c-4a0e-9d51-0a4a7a0e4c11",
            zone="shelf-a",
            address="192.168.1.11:7701",
            bulk_port=7702,
        ),
        b"",
    ),
    "error": (
        messages.Error("not_found", "no such version", "pi1", "ckptd ls"),
        b"",
    ),
    "busy": (messages.Busy("no slot for hop 1", 0.5), b""),
    "ping": (messages.Ping(), b""),
    "get_status": (messages.GetStatus(), b""),
    "node_status": (
        messages.NodeStatus(
            node="pi1",
            state="up",
            bytes_total=64_000_000_000,
            bytes_used=1_000_000_000,
            bytes_free=63_000_000_000,
            write_bytes_per_s=35e6,
            queued_bytes=33_554_432,
            shards=31,
            quarantined=1,
            documents=7,
            unknown_documents=1,
            documents_digest=OTHER,
            highest_order=1_767_323_045_001,
            software="0.1.0",
            clock_ms=1_767_323_045_000,
            uptime_s=86_400.25,
            failed_reason="",
            peers=(PeerView("pi2", "192.168.1.12:7701", 7702, "down", 12.5, ("worker",), "b"),),
            jobs=(messages.JobView("scrub", "running", 1_000, 2_000, "pi1: no room"),),
        ),
        b"",
    ),
    "have": (messages.Have((SHARD, OTHER), touch=True), b""),
    "have_reply": (messages.HaveReply(b"\x01", (3600.0, -1.0)), b""),
    "inventory": (messages.Inventory((VERSION,)), b""),
    "inventory_reply": (messages.InventoryReply((b"\xff\x03", None), (3600.5, -1.0)), b""),
    "list_documents": (messages.ListDocuments(VERSION), b""),
    "document_headers": (
        messages.DocumentHeaders(
            headers=(
                messages.DocumentHeader(
                    id=VERSION,
                    kind="manifest",
                    order=1_767_323_045_001,
                    name="minilm/checkpoint-500",
                    created="2026-01-02T03:04:05Z",
                    content_id=OTHER,
                    size=90_000_000,
                    files=6,
                    shards=3,
                    copies=2,
                    step=500,
                    metrics={"loss": 0.25},
                ),
            ),
            more=True,
        ),
        b"",
    ),
    "get_documents": (messages.GetDocuments((VERSION,)), b""),
    "documents": (messages.Documents(1, (OTHER,)), messages.encode_documents(SIGNED)),
    "put_documents": (messages.PutDocuments(1), messages.encode_documents(SIGNED)),
    "put_documents_reply": (
        messages.PutDocumentsReply(
            (
                messages.PutDocumentResult(VERSION, bitmap=b"\x07"),
                messages.PutDocumentResult(OTHER, refused="a worker signs no manifests"),
            )
        ),
        b"",
    ),
    "sync": (messages.Sync(OTHER), b""),
    "sync_reply": (
        messages.SyncReply(False, 2),
        messages.encode_document_ids((VERSION, OTHER)),
    ),
    "prune": (messages.Prune(dry_run=True, confirmed=True), b""),
    "prune_reply": (
        messages.PruneReply(
            (messages.PruneRow(VERSION, "not among the newest 3"),),
            (messages.PruneRow(OTHER, "among the newest 3"),),
            1,
            1,
            False,
        ),
        b"",
    ),
    "set_job": (messages.SetJob("scrub", paused=True), b""),
    "verify": (messages.Verify((SHARD, OTHER)), b""),
    "verify_reply": (messages.VerifyReply(("ok", "corrupt")), b""),
    "report_corrupt": (messages.ReportCorrupt(SHARD), b""),
    "get_watched": (messages.GetWatched(), b""),
    "watched": (
        messages.Watched(
            (
                messages.Unstored(
                    "minilm/step-1",
                    "/home/me/checkpoints/minilm/step-1",
                    "pending",
                    "model-00002-of-00003.safetensors has 1.2 of 2.4 GB",
                    "2026-01-02T03:04:05Z",
                    1_200_000_000,
                    1,
                ),
            ),
            1,
            True,
        ),
        b"",
    ),
    "copy_shards": (messages.CopyShards(VERSION, (SHARD, OTHER), "pi3", 20e6), b""),
    "copy_shards_reply": (messages.CopyShardsReply(REPORTS), b""),
    "promise": (messages.Promise(VERSION, (SHARD, OTHER), 600.0, b"n" * 32), b""),
    "promise_reply": (messages.PromiseReply((b"p" * 32, b"")), b""),
    "surplus": (messages.Surplus(VERSION, (SHARD,)), b""),
    "surplus_reply": (messages.SurplusReply(1), b""),
    "put_shard": (messages.PutShard(SHARD, 33_554_432, CHAIN), b""),
    "ready": (messages.Ready(True, (CopyReport("pi3", "busy"),)), b""),
    "progress": (messages.Progress((CopyReport("pi1", "receiving", 262_144),)), b""),
    "put_result": (messages.PutResult(REPORTS), b""),
    "get_shard": (messages.GetShard(SHARD), b""),
    "shard_data": (messages.ShardData(SHARD), b"the bytes of a shard"),
    "push_shard": (messages.PushShard(SHARD, 33_554_432, CHAIN[:1]), b""),
}
REQUEST_ID = 0x01020304


def rendered(message: Message, payload: bytes) -> str:
    """The text of a golden file."""
    hop = 1 if isinstance(message, messages.PutShard) else 0
    frame = frames.encode_frame(message, REQUEST_ID, len(payload), hop=hop)
    header, body = frame[: frames.HEADER_BYTES], frame[frames.HEADER_BYTES :]
    lines = [f"# header of {type(message).__name__}", header.hex()]
    lines += ["# body", *hex_lines(body)]
    if payload:
        lines += ["# payload", *hex_lines(payload)]
    return "\n".join(lines) + "\n"


def hex_lines(raw: bytes) -> list[str]:
    return [
        raw[start : start + BYTES_PER_LINE].hex() for start in range(0, len(raw), BYTES_PER_LINE)
    ]


def stored_bytes(name: str) -> bytes:
    lines = (DIRECTORY / f"{name}.hex").read_text().splitlines()
    return bytes.fromhex("".join(line for line in lines if not line.startswith("#")))


@pytest.mark.parametrize("name", SAMPLES)
def test_frames_are_encoded_to_the_golden_bytes(name: str) -> None:
    assert rendered(*SAMPLES[name]) == (DIRECTORY / f"{name}.hex").read_text()


@pytest.mark.parametrize("name", SAMPLES)
def test_golden_bytes_are_decoded_to_the_sample(name: str) -> None:
    raw = memoryview(stored_bytes(name))
    message, payload = SAMPLES[name]
    header = frames.parse_header(raw[: frames.HEADER_BYTES], peer="golden")
    body_end = frames.HEADER_BYTES + header.body_bytes
    body = raw[frames.HEADER_BYTES : body_end]
    assert messages.decode(header.type, body, peer="golden") == message
    assert raw[body_end:] == payload and header.payload_bytes == len(payload)
    assert header.request_id == REQUEST_ID


def test_every_type_has_a_golden_file_and_every_file_a_type() -> None:
    assert {type(message) for message, _ in SAMPLES.values()} == set(messages.TYPES.values())
    assert {path.name for path in DIRECTORY.iterdir()} == {f"{name}.hex" for name in SAMPLES}


def test_the_samples_fill_every_field() -> None:
    """A field at its default would hide a change of its name's meaning behind an equal value."""
    for message, _ in SAMPLES.values():
        if not isinstance(message, messages.NodeStatus | messages.Ready):
            for field in msgspec.structs.fields(message):
                if not field.required:
                    assert getattr(message, field.name) != field.default, (message, field.name)


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for sample_name, sample in SAMPLES.items():
        (DIRECTORY / f"{sample_name}.hex").write_text(rendered(*sample))
