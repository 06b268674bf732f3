"""Names and paths: what may be called what, and how a user picks a version.

Checkpoint names, node ids and paths inside a checkpoint arrive from command lines, configs, peers
and documents. Everything that becomes part of a file-system path passes through this module first.

A path inside a checkpoint is whatever the file system allows except NUL, so it need not be UTF-8.
In memory it is a `str` whose undecodable bytes are lone surrogates (PEP 383, what `os.listdir`
gives on a UTF-8 system); `path_to_json` and `path_from_json` carry it through JSON, which has no
lone surrogates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from ckptd.core import limits
from ckptd.errors import NameRefused

VERSION_PREFIX_MIN_DIGITS: Final = 8
VERSION_DIGITS: Final = 64

_VERSION_PREFIX = re.compile(
    rf"[0-9a-fA-F]{{{VERSION_PREFIX_MIN_DIGITS},{VERSION_DIGITS}}}", re.ASCII
)
_NODE_ID = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_UNDECODABLE = re.compile("[\udc80-\udcff]")
_JSON_ESCAPE = re.compile("\0(..)?", re.DOTALL)
_JSON_ESCAPE_DIGITS = re.compile(r"[89a-f][0-9a-f]", re.ASCII)


class Selector(msgspec.Struct, frozen=True):
    """Which version of which checkpoint a user means.

    `version_prefix` is 8 to 64 lower-case hex digits. With `which`, `name` is a run. With neither,
    the newest version of the name is meant (or all of them, where a command says so).
    """

    name: str
    version_prefix: str | None = None
    which: Literal["latest", "best"] | None = None


def check_name(name: str) -> str:
    """Return `name` if it may name a checkpoint, else raise `NameRefused` that says why.

    A name is 1 to 32 segments joined by "/", at most 1024 bytes of UTF-8. A segment has 1 to 255
    bytes, no control character, no "@", is not "." or ".." and does not start with "~".
    """
    encoded_bytes = _utf8_length(name)
    if encoded_bytes > limits.NAME_MAX_BYTES:
        raise NameRefused(
            f"name {_shown(name)} has {encoded_bytes} bytes, more than {limits.NAME_MAX_BYTES}"
        )
    segments = name.split("/")
    if len(segments) > limits.NAME_SEGMENTS_MAX:
        raise NameRefused(
            f"name {_shown(name)} has {len(segments)} segments, "
            f"more than {limits.NAME_SEGMENTS_MAX}"
        )
    for segment in segments:
        fault = _segment_fault(segment)
        if fault:
            raise NameRefused(f"name {_shown(name)}: {fault}")
    return name


def parse_selector(text: str) -> Selector:
    """Parse NAME, NAME@VERSION, RUN@latest or RUN@best; raise `NameRefused` for anything else."""
    name, at, version = text.partition("@")
    check_name(name)
    if not at:
        return Selector(name)
    if version == "latest":
        return Selector(name, which="latest")
    if version == "best":
        return Selector(name, which="best")
    if not _VERSION_PREFIX.fullmatch(version):
        raise NameRefused(
            f"{_shown(text)}: after @ stand latest, best, or the first "
            f"{VERSION_PREFIX_MIN_DIGITS} or more hex digits of a version",
            next=f"ckptd show {name}",
        )
    return Selector(name, version_prefix=version.lower())


def check_node_id(node_id: str) -> str:
    """Return `node_id` if it may name a node, else raise `NameRefused`.

    Node ids stand in certificates, mDNS names and metric labels: at most 63 characters out of
    a-z, 0-9, ".", "_", "-", the first and last one a letter or a digit.
    """
    if len(node_id) > limits.NODE_ID_MAX_BYTES or not _NODE_ID.fullmatch(node_id):
        raise NameRefused(
            f"node id {_shown(node_id)} is not 1 to {limits.NODE_ID_MAX_BYTES} characters out of "
            "a-z, 0-9 and . _ - that start and end with a letter or digit"
        )
    return node_id


def check_path(path: str) -> str:
    """Return `path` if it is a relative path that stays inside a checkpoint, else `NameRefused`.

    Segments are joined by "/"; none is empty, "." or "..". NUL is refused, and so is a spelling
    that the file system would hand back differently (surrogates that are no undecodable bytes, or
    that spell valid UTF-8). At most 4096 bytes.
    """
    encoded = _path_bytes(path)
    if len(encoded) > limits.PATH_IN_CHECKPOINT_MAX_BYTES:
        raise NameRefused(
            f"path {_shown(path)} has {len(encoded)} bytes, "
            f"more than {limits.PATH_IN_CHECKPOINT_MAX_BYTES}"
        )
    for segment in path.split("/"):
        if segment in ("", ".", ".."):
            raise NameRefused(f"path {_shown(path)} has an empty, . or .. segment")
    return path


def path_to_json(path: str) -> str:
    """The form of a path or link target that JSON can carry: U+0000 and two hex digits stand for
    each byte that is not UTF-8. NUL is in no file name, so nothing else needs escaping."""
    return _UNDECODABLE.sub(lambda found: f"\0{ord(found[0]) - 0xDC00:02x}", path)


def path_from_json(text: str) -> str:
    """Undo `path_to_json`. `NameRefused` for a text that `path_to_json` makes of no path, so that
    each path has exactly one form in a document."""
    path = _JSON_ESCAPE.sub(_undecodable_byte, text)
    _path_bytes(path)
    if path_to_json(path) != text:
        raise NameRefused(f"path {_shown(text)} has a surrogate that JSON cannot carry")
    return path


def symlink_stays_inside(path: str, target: str) -> bool:
    """Whether the symlink at `path` (relative to the checkpoint) can only lead inside it.

    Decided from the text alone, and sound also when the target passes through other links that
    stay inside: ".." counts only in front, where it leaves real directories. A target with ".."
    after a name is not provable and counts as leaving.
    """
    if target.startswith("/"):
        return False
    depth = path.count("/")
    named = False
    for segment in target.split("/"):
        if segment in ("", "."):
            continue
        if segment != "..":
            named = True
        elif named or depth == 0:
            return False
        else:
            depth -= 1
    return True


def check_symlink_target(path: str, target: str) -> str:
    """Return `target` if the symlink at `path` may be created with it, else raise `NameRefused`:
    it is empty, no file-system text, over 4096 bytes, or may leave the checkpoint."""
    encoded = _path_bytes(target)
    if not encoded:
        raise NameRefused(f"symlink {_shown(path)} has an empty target")
    if len(encoded) > limits.PATH_IN_CHECKPOINT_MAX_BYTES:
        raise NameRefused(f"symlink {_shown(path)} has a target of {len(encoded)} bytes")
    if not symlink_stays_inside(path, target):
        raise NameRefused(f"symlink {_shown(path)} leaves the checkpoint: {_shown(target)}")
    return target


def colliding(
    paths: Iterable[str], *, case_insensitive: bool, normalize: bool
) -> list[tuple[str, str]]:
    """Pairs of different paths that one file system would take for the same, in input order.

    `case_insensitive` and `normalize` describe the target: it ignores case, it ignores the Unicode
    form (APFS does both by default). Directories count also when only files below them are given:
    `A/x` and `a/y` give the pair (`A`, `a`).
    """
    first_spelling: dict[str, str] = {}
    pairs: dict[tuple[str, str], None] = {}
    for path in paths:
        end = 0
        while end != len(path):
            found = path.find("/", end + 1)
            end = len(path) if found < 0 else found
            prefix = path[:end]
            same_as = first_spelling.setdefault(
                _folded(prefix, case_insensitive, normalize), prefix
            )
            if same_as != prefix:
                pairs[same_as, prefix] = None
                break  # what lies below collides because of this prefix, which is reported
    return list(pairs)


def _segment_fault(segment: str) -> str:
    if not segment:
        return "a segment is empty"
    if segment in (".", ".."):
        return f"a segment is {segment}"
    if segment.startswith("~"):
        return f"segment {_shown(segment)} starts with ~"
    if "@" in segment:
        return f"segment {_shown(segment)} has an @"
    if _CONTROL.search(segment):
        return f"segment {_shown(segment)} has a control character"
    encoded_bytes = _utf8_length(segment)
    if encoded_bytes > limits.NAME_SEGMENT_MAX_BYTES:
        return (
            f"segment {_shown(segment)} has {encoded_bytes} bytes, "
            f"more than {limits.NAME_SEGMENT_MAX_BYTES}"
        )
    return ""


def _utf8_length(name: str) -> int:
    try:
        return len(name.encode())
    except UnicodeEncodeError:
        raise NameRefused(f"name {_shown(name)} is not UTF-8") from None


def _path_bytes(path: str) -> bytes:
    """The bytes that the file system sees, refused unless reading them back gives `path` again."""
    try:
        encoded = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise NameRefused(f"path {_shown(path)} has a surrogate that stands for no byte") from None
    if encoded.decode("utf-8", "surrogateescape") != path:
        raise NameRefused(f"path {_shown(path)} spells UTF-8 as undecodable bytes")
    if b"\0" in encoded:
        raise NameRefused(f"path {_shown(path)} has a NUL")
    return encoded


def _undecodable_byte(found: re.Match[str]) -> str:
    digits = found[1]
    if digits is None or not _JSON_ESCAPE_DIGITS.fullmatch(digits):
        raise NameRefused(f"path {_shown(found.string)} has a NUL")
    return chr(0xDC00 + int(digits, 16))


def _folded(path: str, case_insensitive: bool, normalize: bool) -> str:
    if case_insensitive:
        path = path.casefold()
    if normalize:
        path = unicodedata.normalize("NFD", path)
    # Folding can undo a normal form and the other way round: a second pass settles both.
    return path.casefold() if case_insensitive else path


def _shown(text: str) -> str:
    """A name in a message: quoted, printable, and not longer than a line or two."""
    quoted = ascii(text) if not text.isprintable() else f"'{text}'"
    return quoted if len(quoted) <= 200 else f"{quoted[:150]}…{quoted[-40:]}"
