"""Planning to fetch single tensors: the index says where they are, headers what goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptd.client.memory_outputs import MemoryOutputs
from ckptd.client.pull import Pull
from ckptd.client.pull_threads import WantedShard
from ckptd.client.restore_plan import RestorePlan, file_parts, plan_tensors, wanted_shards
from ckptd.core import tensor_index
from ckptd.core.documents import Manifest
from ckptd.core.layout import Write, byte_ranges
from ckptd.core.safetensors_header import LENGTH_BYTES, parse_header
from ckptd.core.tensor_index import TensorRecord
from ckptd.core.tensor_selection import Segment, choose_tensors
from ckptd.errors import NotFound


def plan_for_tensors(pull: Pull, manifest: Manifest, globs: Sequence[str]) -> RestorePlan:
    """One safetensors file of the tensors whose names match any of `globs`.

    Fetches the index, and the headers of the files that the tensors come from. NotFound with the
    nearest names when a glob matches none, Refused when one name is in two files.
    """
    records = read_tensor_index(pull, manifest)
    chosen = choose_tensors(records, globs)
    metadata = _common_metadata(pull, manifest, records, {record.file for record in chosen})
    return plan_tensors(manifest, chosen, metadata)


def read_tensor_index(pull: Pull, manifest: Manifest) -> list[TensorRecord]:
    """All tensors of the checkpoint. NotFound when it has no safetensors file."""
    if manifest.tensor_index is None:
        raise NotFound(
            f"{manifest.name} has no safetensors file, so no tensor can be picked from it",
            next=f"ckptd show {manifest.name}",
        )
    reference = manifest.shards[manifest.tensor_index]
    outputs = MemoryOutputs([reference.size])
    writes = [Write(0, 0, 0, reference.size)]
    pull.run([WantedShard(bytes.fromhex(reference.shard), reference.size, writes)], outputs)
    return tensor_index.decode(bytes(outputs.buffers[0]))


def _common_metadata(
    pull: Pull, manifest: Manifest, records: Sequence[TensorRecord], files: set[str]
) -> Mapping[str, str]:
    """The metadata that the headers of all `files` agree on.

    Loaders want it: transformers refuses a file without its `format`.
    """
    starts: dict[str, int] = {}
    for record in records:
        if record.file in files:
            starts[record.file] = min(starts.get(record.file, record.begin), record.begin)
    segments = []
    size = 0
    for file, start in starts.items():
        segments.append(Segment(file, 0, start, size))
        size += start
    outputs = MemoryOutputs([size])
    parts = file_parts(manifest)
    pull.run(wanted_shards(manifest, byte_ranges(parts, segments)), outputs)
    common: dict[str, str] | None = None
    for segment in segments:
        head = outputs.buffers[0][segment.output_offset : segment.output_offset + segment.length]
        file_size = sum(part.length for part in parts[segment.file])
        found = parse_header(bytes(head[LENGTH_BYTES:]), file_size).metadata
        common = (
            found
            if common is None
            else {key: text for key, text in common.items() if found.get(key) == text}
        )
    return common or {}
