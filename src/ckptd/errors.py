"""Every error that ckptd raises on purpose: one class per decision that a caller can take.

    CkptdError
    ├── UsageError                 the request itself is wrong: correct it (exit 2)
    │   └── NameRefused            a checkpoint, node or file name breaks the rules
    ├── ConfigError                a config key is wrong; carries the key's path (exit 2)
    ├── Refused                    not done, nothing was changed (exit 1)
    │   ├── TargetExists           a restore would overwrite something
    │   ├── NotFound               no such checkpoint, version, file, tensor or node
    │   ├── SourceRefused          a source file cannot be stored (kind, header, torn)
    │   │   └── HeaderInvalid      a safetensors header is not valid
    │   ├── SourceChanged          the source changed while it was read: try again later
    │   └── RootUnreadable         a watched root cannot be read: try again later
    ├── NoRoom                     the store's room above the reserve does not suffice (exit 1)
    ├── Draining                   the node gives its copies away: place new ones elsewhere
    ├── MediumFailed               the disk below the store fails: the node takes no more work
    ├── StoreOperationFailed       a file of the store cannot be used, though its disk works
    ├── StoreMarkerMissing         the store directory is not a store (unmounted?): never guess
    ├── StoreLocked                another process holds the store
    ├── DiscoveryFailed            mDNS cannot be used here: configured peers still can
    ├── IntegrityError             bytes do not have their recorded hash (exit 4)
    │   ├── ShardCorrupt           one copy is bad
    │   └── NoGoodCopy             no node has a good copy, and all have answered
    ├── NotEnoughNodes             copies may exist on nodes that do not answer (exit 5)
    ├── Degraded                   done or readable, but a copy is missing (exit 3)
    ├── PeerError                  something is wrong with one peer; others may do
    │   ├── PeerUnreachable        no connection: retry elsewhere, later here
    │   ├── PeerBusy               a hint to place elsewhere or come again, not a failure
    │   ├── PeerStalled            no progress within the deadline; carries the node
    │   ├── PeerRefused            the peer answered with an error frame
    │   └── ProtocolError          the peer broke the protocol: close the connection
    │       └── LimitExceeded      a length, count or wait over its limit
    └── NotAuthorized              certificate, role or signature does not allow it
        └── DocumentRefused        a document is malformed, unsigned, or its author's role is wrong

Each carries `message` (what failed, on which node or file) and `next` (the command to type next,
may be empty); `exit_code` and `kind` are fixed per class and part of the command line interface.
"""

from __future__ import annotations


class CkptdError(Exception):
    """Base of all errors raised on purpose.

    `message` names what failed and where; `next` is the exact command to type next, or "".
    """

    exit_code = 1
    kind = "failed"

    def __init__(self, message: str, *, next: str = "") -> None:  # noqa: A002 (contract's word)
        super().__init__(message)
        self.message = message
        self.next = next


class UsageError(CkptdError):
    exit_code = 2
    kind = "usage"


class NameRefused(UsageError):
    kind = "name_refused"


class ConfigError(CkptdError):
    """A config is wrong. `key` is the dotted path of the offending key, "" for the whole file."""

    exit_code = 2
    kind = "config"

    def __init__(
        self,
        key: str,
        message: str,
        *,
        next: str = "ckptd config check",  # noqa: A002
    ) -> None:
        super().__init__(f"{key}: {message}" if key else message, next=next)
        self.key = key
        self.reason = message


class Refused(CkptdError):
    kind = "refused"


class TargetExists(Refused):
    kind = "target_exists"


class NotFound(Refused):
    kind = "not_found"


class SourceRefused(Refused):
    kind = "source_refused"


class HeaderInvalid(SourceRefused):
    """A safetensors header is not valid. The message names the fault, not the file."""

    kind = "header_invalid"


class SourceChanged(Refused):
    kind = "source_changed"


class RootUnreadable(Refused):
    kind = "root_unreadable"


class NoRoom(CkptdError):
    kind = "no_room"


class Draining(CkptdError):
    kind = "draining"


class MediumFailed(CkptdError):
    kind = "medium_failed"


class StoreOperationFailed(CkptdError):
    kind = "store_operation_failed"


class StoreMarkerMissing(CkptdError):
    kind = "store_marker_missing"


class StoreLocked(CkptdError):
    kind = "store_locked"


class DiscoveryFailed(CkptdError):
    kind = "discovery_failed"


class IntegrityError(CkptdError):
    exit_code = 4
    kind = "integrity"


class ShardCorrupt(IntegrityError):
    """One copy of `shard` (64 hex digits) does not have its hash. `node` is "" when it is local."""

    kind = "shard_corrupt"

    def __init__(self, shard: str, *, node: str = "", next: str = "") -> None:  # noqa: A002
        where = f" on {node}" if node else ""
        super().__init__(f"the copy of shard {shard}{where} is corrupt", next=next)
        self.shard = shard
        self.node = node


class NoGoodCopy(IntegrityError):
    kind = "no_good_copy"


class NotEnoughNodes(CkptdError):
    exit_code = 5
    kind = "not_enough_nodes"


class Degraded(CkptdError):
    exit_code = 3
    kind = "degraded"


class PeerError(CkptdError):
    """Something is wrong with one peer. `node` is its id, or its address while unknown."""

    exit_code = 5
    kind = "peer"

    def __init__(self, node: str, message: str, *, next: str = "") -> None:  # noqa: A002
        super().__init__(f"{node}: {message}", next=next)
        self.node = node
        self.reason = message


class PeerUnreachable(PeerError):
    kind = "peer_unreachable"


class PeerBusy(PeerError):
    kind = "peer_busy"


class PeerStalled(PeerError):
    kind = "peer_stalled"


class PeerRefused(PeerError):
    """The peer answered with an error frame; `code` is its stable word."""

    kind = "peer_refused"

    def __init__(self, node: str, code: str, message: str, *, next: str = "") -> None:  # noqa: A002
        super().__init__(node, message, next=next)
        self.code = code


class ProtocolError(PeerError):
    kind = "protocol"


class LimitExceeded(ProtocolError):
    kind = "limit_exceeded"


class NotAuthorized(CkptdError):
    kind = "not_authorized"


class DocumentRefused(NotAuthorized):
    kind = "document_refused"
