"""Faults planted in the product on purpose: each must be found by some of the first seeds.

A mutant changes one line of one named function. When the line is no longer there, the mutant does
not apply, and that is an error: it would prove nothing.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any, Final

_FUTURE: Final = "from __future__ import annotations\n"


@dataclass(frozen=True)
class Mutant:
    """`old` in the source of `function` (module:qualified name) becomes `new`."""

    name: str
    function: str
    old: str
    new: str
    also: Mutant | None = None  # where two lines guard the same

    def plant(self) -> None:
        """Changes the product of this process, for good."""
        if self.also is not None:
            self.also.plant()
        module, owner, name = self._place()
        changed = self._source().replace(self.old, self.new)
        found: dict[str, Any] = {}
        exec(compile(_FUTURE + changed, f"<{self.name}>", "exec"), module.__dict__, found)
        found[name].planted = changed
        _replace(owner, name, found[name])

    def check(self) -> None:
        """Raises LookupError unless the mutant applies."""
        if self.also is not None:
            self.also.check()
        self._source()

    def _place(self) -> tuple[Any, Any, str]:
        """The module, the function's owner, and the function's name."""
        module_name, _, path = self.function.partition(":")
        module = importlib.import_module(module_name)
        owner: Any = module
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return module, owner, name

    def _source(self) -> str:
        _, owner, name = self._place()
        try:
            original = inspect.unwrap(inspect.getattr_static(owner, name))
        except AttributeError as error:
            raise LookupError(f"mutant {self.name!r}: there is no {self.function}") from error
        source = getattr(original, "planted", None) or textwrap.dedent(inspect.getsource(original))
        if source.count(self.old) != 1:
            raise LookupError(
                f"mutant {self.name!r}: {self.function} has {self.old!r} "
                f"{source.count(self.old)} times"
            )
        return str(source)


def _replace(owner: Any, name: str, changed: Any) -> None:
    """Sets the function, also where other modules have imported it by name."""
    original = inspect.getattr_static(owner, name)
    setattr(owner, name, changed)
    if inspect.ismodule(owner):
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("ckptd") and module.__dict__.get(name) is original:
                module.__dict__[name] = changed


MUTANTS: Final = (
    Mutant(
        "acknowledged before the flush",
        "ckptd.store.durable:NewFile.publish",
        "self._filesystem.fsync(self._opened())",
        "pass",
    ),
    Mutant(
        "acknowledged before the directory is flushed",
        "ckptd.store.durable:NewFile.publish",
        "self._filesystem.fsync_directory(os.path.dirname(target))",
        "pass",
    ),
    Mutant(
        "a new directory is never flushed into its parent",
        "ckptd.store.durable:make_directory",
        "filesystem.fsync_directory(os.path.dirname(path))",
        "pass",
    ),
    Mutant(
        "the start believes names that were not flushed",
        "ckptd.store.shards:ShardStore._scan",
        "self._filesystem.fsync_directory(os.path.join(root, entry.name))",
        "pass",
    ),
    Mutant(
        "renamed before the hash was compared",
        "ckptd.store.shard_io:IncomingShard.commit",
        "if self.written != self.size or self._hash.digest() != self.digest:",
        "if False:",
    ),
    Mutant(
        "protected is said before the last copy is there",
        "ckptd.client.store:_Store.run",
        '"protected" if reached >= self._copies else "degraded"',
        '"protected"',
    ),
    Mutant(
        "copies are confirmed that are not there",
        "ckptd.node.records:Records.confirm",
        "bitmaps.pack(self._shards.confirm(references))",
        "bitmaps.pack([True] * len(references))",
    ),
    Mutant(
        "copies are confirmed before the manifest is stored",
        "ckptd.node.records:Records._admit",
        "self._files.put(found, raw, signature)",
        "pass",
    ),
    Mutant(
        "order by the wall clock",
        "ckptd.client.documents:next_order",
        "return max(now_ms, 1 + catalogue.highest_order)",
        "return now_ms",
    ),
    Mutant(
        "an unsigned document is admitted",
        "ckptd.core.signing:verify",
        "key.verify(decoded.signature, SIGNATURE_CONTEXT + document)",
        "pass",
    ),
    Mutant(
        "whoever signed may write anything",
        "ckptd.core.admission:admit",
        "if not _may_say(author, document):",
        "if False:",
    ),
    Mutant(
        "a tombstone is lost that comes before its manifest",
        "ckptd.core.catalogue:Catalogue._index_tombstone",
        "for version_id in set(document.versions):",
        "for version_id in set(document.versions) & self._headers.keys():",
    ),
    Mutant(
        "corrupt copies are deleted",
        "ckptd.store.shards:ShardStore._quarantine",
        "target = quarantine.rename_into(path, current.size_bytes)",
        "self._filesystem.unlink(path); return True",
    ),
    Mutant(
        "what was restored is not hashed",
        "ckptd.client.pull_threads:PullThreads._receive_all",
        "if digest.digest() != shard.digest:",
        "if False:",
    ),
    Mutant(
        "nobody looks whether the source held still",
        "ckptd.client.store:_Store.run",
        "await asyncio.to_thread(source.check)",
        "pass",
        also=Mutant(
            "nor its files",
            "ckptd.client.hashing:SourceHasher.check_fresh",
            "if self._source.is_racy(file) and hash_file(file, stop) != hashed:",
            "if False:",
        ),
    ),
    Mutant(
        "the fingerprint of a file is not compared once it was read",
        "ckptd.client.source:File.check",
        "if Fingerprint.of(found) != self.fingerprint:",
        "if False:",
        also=Mutant(  # the clock of the laptop is behind the real files, so that it reads again
            "nor is a file that changed just now read again",
            "ckptd.client.hashing:SourceHasher.check_fresh",
            "if self._source.is_racy(file) and hash_file(file, stop) != hashed:",
            "if False:",
        ),
    ),
    Mutant(
        "a copy counts that was not hashed since the start",
        "ckptd.client.store:_Store._trust",
        "if 0 <= age_s <= oldest_s:",
        "if True:",
    ),
    Mutant(
        "garbage is collected without the grace",
        "ckptd.node.collector:Collector._pass",
        "heard_s - self._grace_s",
        "heard_s",
    ),
    Mutant(
        "garbage is collected by one that hears nobody",
        "ckptd.node.collector:Collector._heard_by_half_s",
        "return heard_s",
        "return self._clock.monotonic_s()",
    ),
    Mutant(
        "garbage is collected in spite of documents that cannot be read",
        "ckptd.node.collector:Collector.step",
        "if doubt := self._records.doubt():",
        "if doubt := '':",
    ),
    Mutant(
        "copies are dropped without promises",
        "ckptd.core.trimming:is_surplus",
        "if len(others) < claim.copies:",
        "if False:",
    ),
    Mutant(
        "what was promised is dropped",
        "ckptd.core.trimming:Promises.begin",
        "if self.wait_s(now_s) or shard in self._until_s or shard in self._asking:",
        "if shard in self._asking:",
    ),
    Mutant(
        "retention relies on what is not protected",
        "ckptd.node.confirmation:Confirmation.protected",
        "if await self._on_disk(partial(self._is_protected, version)):",
        "if True:",
    ),
    Mutant(
        "quarantined copies are given up at once",
        "ckptd.core.scrubbing:decide_quarantined",
        "if healed_for_s is not None and healed_for_s >= grace_s:",
        "if True:",
    ),
    Mutant(
        "the scrub finds nothing",
        "ckptd.node.scrubber:Scrubber._look",
        "if look.result is VerifyResult.CORRUPT:",
        "if False:",
    ),
    Mutant(
        "missing copies are not made anew",
        "ckptd.node.repairer:Repairer.step",
        "moved = await self._repair(sight) if self._queue else False",
        "moved = False",
    ),
)
