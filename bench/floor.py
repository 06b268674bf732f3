"""The floor: what the passes over the bytes cost alone, with everything around them free.

A pass is a SHA-256 of all bytes, their encryption or decryption by TLS, or one copy in memory. Its
price is CPU seconds per GiB on this machine, in buffers of the size that the bulk path uses. The
number of passes follows from the way of a byte (docs/architecture.md).
"""

from __future__ import annotations

import hashlib
import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import msgspec

from ckptd.client import pki
from ckptd.core.identity import Role
from ckptd.core.limits import BULK_BUFFER_BYTES
from ckptd.net.tls import client_context, server_context

GIB: Final = 2**30
_SAMPLE_BYTES: Final = 256 * 2**20
_REPEATS: Final = 3
_COPY_BYTES: Final = 32 * 2**20  # far more than the caches near a core hold


class Passes(msgspec.Struct, frozen=True):
    """How often one side has to go over all bytes of the checkpoint in one leg."""

    sha256: int
    encrypt: int
    decrypt: int
    copies: int
    why: str


class Prices(msgspec.Struct, frozen=True):
    """CPU seconds per GiB of each pass; `new_file` is writing and fsyncing one new file.

    `new_file` stands apart: it depends on the disk and on how this machine gives out memory. Its
    wall time is `new_file_wall`.
    """

    sha256: float
    encrypt: float
    decrypt: float
    copy: float
    new_file: float
    new_file_wall: float
    cipher: str

    def of(self, passes: Passes) -> float:
        """CPU seconds per GiB of all passes together."""
        return (
            passes.sha256 * self.sha256
            + passes.encrypt * self.encrypt
            + passes.decrypt * self.decrypt
            + passes.copies * self.copy
        )


PASSES: Final = {
    "store": {
        "ckptd": Passes(
            sha256=4,
            encrypt=2,
            decrypt=2,
            copies=6,
            why="SHA-256 of each shard and of the file by the client, of each shard by both "
            "receivers; TLS on two hops; copies: source read for hashing and for sending, two "
            "sockets in and out; files are written past the page cache",
        ),
        "rsync": Passes(
            sha256=0,
            encrypt=0,
            decrypt=0,
            copies=8,
            why="twice: source read, socket in and out, file written (its own checksum, one pass "
            "at either end, is not counted)",
        ),
    },
    "restore": {
        "ckptd": Passes(
            sha256=1,
            encrypt=1,
            decrypt=1,
            copies=3,
            why="SHA-256 of each shard; TLS on one hop; copies: socket in and out, received bytes "
            "put in whole blocks; shards are read and the file is written past the page cache",
        ),
        "rsync": Passes(
            sha256=0,
            encrypt=0,
            decrypt=0,
            copies=4,
            why="file read, socket in and out, file written (its own checksum not counted)",
        ),
    },
}


def measure_prices(directory: Path) -> Prices:
    """Measures all prices, in the calling thread; the best of a few repetitions of each.

    `directory` is an empty directory on the file system that the legs use.
    """
    encrypt, decrypt, cipher = _tls(directory / "pki")
    new_file, new_file_wall = _new_file(directory / "new")
    return Prices(_sha256(), encrypt, decrypt, _copy(), new_file, new_file_wall, cipher)


def _best(work: Callable[[], int]) -> float:
    """CPU seconds per GiB of `work`, which returns how many bytes it handled."""
    prices = []
    for _ in range(_REPEATS):
        started_s = time.thread_time()
        handled = work()
        prices.append((time.thread_time() - started_s) * GIB / handled)
    return min(prices)


def _sha256() -> float:
    buffer = os.urandom(BULK_BUFFER_BYTES)

    def work() -> int:
        hashed = hashlib.sha256()
        for _ in range(_SAMPLE_BYTES // BULK_BUFFER_BYTES):
            hashed.update(buffer)
        return _SAMPLE_BYTES

    return _best(work)


def _copy() -> float:
    source = memoryview(os.urandom(_COPY_BYTES))
    target = memoryview(bytearray(os.urandom(_COPY_BYTES)))  # its pages exist before the clock runs

    def work() -> int:
        for _ in range(_SAMPLE_BYTES // _COPY_BYTES):
            for start in range(0, _COPY_BYTES, BULK_BUFFER_BYTES):
                end = start + BULK_BUFFER_BYTES
                target[start:end] = source[start:end]
        return _SAMPLE_BYTES

    return _best(work)


def _tls(directory: Path) -> tuple[float, float, str]:
    """Encrypting, decrypting, and the cipher that the two sides agree on."""
    sender, receiver, link = _connected(directory)
    plain = os.urandom(BULK_BUFFER_BYTES)
    opened = bytearray(BULK_BUFFER_BYTES)
    encrypting, decrypting = [], []
    for _ in range(_REPEATS):
        encrypt_s = decrypt_s = 0.0
        for _ in range(_SAMPLE_BYTES // BULK_BUFFER_BYTES):
            started_s = time.thread_time()
            sender.write(plain)
            middle_s = time.thread_time()
            link()
            moved_s = time.thread_time()
            left = BULK_BUFFER_BYTES
            while left:
                left -= cast(int, receiver.read(left, opened))  # with a buffer it counts
            decrypt_s += time.thread_time() - moved_s
            encrypt_s += middle_s - started_s
        encrypting.append(encrypt_s * GIB / _SAMPLE_BYTES)
        decrypting.append(decrypt_s * GIB / _SAMPLE_BYTES)
    cipher = sender.cipher()
    return min(encrypting), min(decrypting), cipher[0] if cipher else "unknown"


def _connected(directory: Path) -> tuple[ssl.SSLObject, ssl.SSLObject, Callable[[], None]]:
    """Two ends of a TLS connection in memory, with contexts as on the bulk path, and the function
    that carries what the first end has written to the second."""
    pki.init_cluster(directory, "bench")
    pki.issue(directory, [Role.WORKER], "node1")
    ca = directory / "ca.pem"
    client = client_context(ca, directory / "client.pem", directory / "client.key")
    server = server_context(ca, directory / "node1.pem", directory / "node1.key")
    forward, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    arriving, leaving = ssl.MemoryBIO(), ssl.MemoryBIO()
    sender = client.wrap_bio(back, forward)
    receiver = server.wrap_bio(arriving, leaving, server_side=True)

    def link() -> None:
        arriving.write(forward.read())

    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for end in (sender, receiver):
            try:
                end.do_handshake()
                done.add(end)
            except ssl.SSLWantReadError:
                pass  # its peer's answer comes with the next round
        link()
        back.write(leaving.read())
    return sender, receiver, link


def _new_file(path: Path) -> tuple[float, float]:
    """CPU and wall seconds per GiB of writing and fsyncing a new file."""
    buffer = os.urandom(BULK_BUFFER_BYTES)
    results = []
    for _ in range(_REPEATS):
        os.sync()
        wall_s, cpu_s = time.monotonic(), time.thread_time()
        with open(path, "xb", buffering=0) as file:
            for _ in range(_SAMPLE_BYTES // BULK_BUFFER_BYTES):
                file.write(buffer)
            os.fsync(file.fileno())
        results.append((time.thread_time() - cpu_s, time.monotonic() - wall_s))
        path.unlink()
    scale = GIB / _SAMPLE_BYTES
    return min(cpu for cpu, _ in results) * scale, min(wall for _, wall in results) * scale
