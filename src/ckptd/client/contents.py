"""What a source holds, without sending any of it."""

from __future__ import annotations

import threading

from ckptd.client.hashing import hash_file
from ckptd.client.manifest_entries import entries_of
from ckptd.client.source import Source
from ckptd.core.documents import content_id
from ckptd.errors import SourceChanged


def content_id_of(source: Source, stop: threading.Event) -> str:
    """The content id that a version of `source` would have. Reads all of it, blocking.

    Raises SourceChanged when it did not hold still, or when `stop` was set meanwhile.
    """
    hashes = [hash_file(file, stop) for file in source.files]
    for file, expected in zip(source.files, hashes, strict=True):
        if source.is_racy(file) and hash_file(file, stop) != expected:
            raise SourceChanged(f"{file.location} changed while it was being read")
    source.check()
    return content_id(entries_of(source, hashes, (), ()))
