"""Every limit on lengths, counts and waits, in one place. All of them are security limits:
whatever a peer, a file or a config claims, no more than this is allocated, read or waited for.

Units stand last in the name. Binary units throughout.
"""

from typing import Final

KIB: Final = 1024
MIB: Final = 1024 * KIB
GIB: Final = 1024 * MIB
TIB: Final = 1024 * GIB

# Names
NAME_MAX_BYTES: Final = 1024
NAME_SEGMENTS_MAX: Final = 32
NAME_SEGMENT_MAX_BYTES: Final = 255
NODE_ID_MAX_BYTES: Final = 63
PATH_IN_CHECKPOINT_MAX_BYTES: Final = 4096

# Documents
DOCUMENT_MAX_BYTES: Final = 16 * MIB  # a manifest of 1 TiB at 32 MiB a shard has about 3 MiB
TOMBSTONE_VERSIONS_MAX: Final = 10_000
DEAD_VERSIONS_MAX: Final = 1024 * KIB  # ids that a node keeps of versions it has dropped
SHARDS_PER_MANIFEST_MAX: Final = 256 * KIB
MARKS_MAX: Final = 1024  # drains that one document ends, serial numbers that one lists
METRICS_MAX: Final = 256
METRIC_NAME_MAX_CHARACTERS: Final = 256
ENTRIES_MAX: Final = 200_000  # files, directories and symlinks of one checkpoint

# Shards
SHARD_SIZE_MIN_BYTES: Final = 64 * KIB
SHARD_SIZE_MAX_BYTES: Final = 256 * MIB
SHARD_SIZE_DEFAULT_BYTES: Final = 32 * MIB
CHECKPOINT_MAX_BYTES: Final = 4 * TIB
SAFETENSORS_HEADER_MAX_BYTES: Final = 100_000_000  # the limit of the safetensors library
TENSOR_INDEX_MAX_BYTES: Final = 256 * MIB  # uncompressed
TENSORS_PER_FILE_MAX: Final = 250_000  # about 90 MB once parsed
TENSORS_PER_CHECKPOINT_MAX: Final = 1_000_000
TENSOR_NAME_MAX_BYTES: Final = 4096
TENSOR_DESCRIPTION_MAX_BYTES: Final = 64 * KIB  # JSON of one tensor in a safetensors header
TENSOR_DIMENSIONS_MAX: Final = 64  # numpy and torch stop there too
SAFETENSORS_METADATA_MAX_BYTES: Final = 16 * MIB

# Frames
FRAME_BODY_MAX_BYTES: Final = 4 * MIB
FRAME_PAYLOAD_MAX_BYTES: Final = SHARD_SIZE_MAX_BYTES
SHARDS_PER_MESSAGE_MAX: Final = 8192
DOCUMENTS_PER_MESSAGE_MAX: Final = 4096
VERSIONS_PER_MESSAGE_MAX: Final = 1024
CHAIN_HOPS_MAX: Final = 4
HOST_MAX_CHARACTERS: Final = 255  # of a host name or address in a chain

# Control frames: far below those of shards, because they are collected in memory.
REQUEST_BODY_MAX_BYTES: Final = 512 * KIB  # 8192 digests are 280 KiB
DOCUMENTS_PAYLOAD_MAX_BYTES: Final = DOCUMENT_MAX_BYTES + DOCUMENT_MAX_BYTES // 4
CATALOGUE_DOCUMENTS_MAX: Final = 256 * KIB  # ids in one SyncReply
CONTROL_REQUESTS_MAX: Final = 64  # unanswered on one connection
CONTROL_UNANSWERED_MAX_BYTES: Final = 24 * MIB  # bodies and payloads of these together

# Memory of all control connections of a node together. A worker has 96 MiB for everything.
CONTROL_REQUESTS_POOL_BYTES: Final = 21 * MIB  # the largest request, or several smaller ones
CONTROL_ANSWERS_POOL_BYTES: Final = 12 * MIB
CONTROL_ANSWER_BYTES: Final = 4 * MIB  # of one large answer, until its size is known
CONTROL_FREE_BYTES: Final = 32 * KIB  # of each connection, not counted
CONTROL_WRITE_BYTES: Final = 256 * KIB  # handed to TLS at a time
CONTROL_FRAME_TIMEOUT_S: Final = 12.0  # from the first byte of a frame to its last
INVENTORY_PER_REPLY_BYTES: Final = 1 * MIB  # of bitmaps; the first one always fits
HEADERS_PER_REPLY_BYTES: Final = 1 * MIB
REFUSED_TEXT_MAX: Final = 500  # characters that say why a document was refused
DOCUMENTS_FETCHED_PER_SYNC: Final = 4096  # what is left comes with the next heartbeat
# A worker writes nothing but what it is and where: no more is kept of one, or even parsed.
WORKER_DOCUMENT_MAX_BYTES: Final = 64 * KIB
WORKER_DOCUMENTS_MAX: Final = 1024

# Connections of one node
UNAUTHENTICATED_CONNECTIONS_MAX: Final = 64
UNAUTHENTICATED_CONNECTIONS_PER_ADDRESS_MAX: Final = 8
HANDSHAKE_TIMEOUT_S: Final = 5.0
HANDSHAKE_TRIES_MAX: Final = 6  # of a connection that is cut off before it is authenticated
HANDSHAKE_RETRY_MIN_S: Final = 0.05  # doubled after each try
CONTROL_CONNECTIONS_MAX: Final = 256
CONTROL_CONNECTIONS_PER_PEER_MAX: Final = 32
BULK_SLOTS_PER_HOP: Final = 8
BULK_SLOTS_PER_PEER_MAX: Final = 6  # of these, so that nobody takes all
BULK_CONNECTIONS_PER_HOP_MAX: Final = 16
BULK_CONNECTIONS_PER_PEER_MAX: Final = 24
BULK_BODY_MAX_BYTES: Final = 256 * KIB  # of frames on bulk connections
BULK_BUFFER_BYTES: Final = 512 * KIB
BULK_PIECES_FOR_FORWARDER: Final = 5  # of a buffer each, kept for one that passes a shard on
PIECE_LATE_S: Final = 4.0  # then a part of a buffer is written, told of and passed on as well
BULK_IDLE_TIMEOUT_S: Final = 120.0
CONNECT_TIMEOUT_S: Final = 5.0
REQUEST_TIMEOUT_S: Final = 30.0  # a control request without any answer
PROGRESS_INTERVAL_S: Final = 1.0
# Deadlines mean lack of progress, and are shorter further down the chain, so that the error names
# the node that stalled and not everybody before it.
STALL_TIMEOUT_S: Final = 20.0
STALL_TIMEOUT_STEP_PER_HOP_S: Final = 4.0
# Once all bytes are there, a bad card may take long to make those of several shards durable.
FLUSH_TIMEOUT_S: Final = 120.0
# Of one shard, after the first STALL_TIMEOUT_S. A card that writes 7 MB/s for 8 shards at once, or
# a 100 Mb/s link shared by 16 transfers, gives over ten times that.
TRANSFER_MIN_BYTES_PER_S: Final = 32 * KIB
LAST_WORDS_TIMEOUT_S: Final = 2.0  # for a peer to read why a transfer ended before its time
EVICT_HANDSHAKE_AFTER_S: Final = 1.0  # one that takes longer makes room when there is none

CLUSTER_NODES_MAX: Final = 64

# Membership
MAINTENANCE_MAX_S: Final = 86_400  # missing copies are not replaced meanwhile
FLAP_WINDOW_S: Final = 600.0  # how long it is remembered that a node fell silent
FLAPS_FREE: Final = 3  # so often within that it may, and be up again at once
FLAP_STEADY_MAX_S: Final = 30.0  # the longest that it must then be heard without a gap
SLEEP_GAP_S: Final = 10.0  # wall clock ahead of the monotonic one since the last look: asleep

# Config
COPIES_MAX: Final = 8
CONFIG_MAX_BYTES: Final = 256 * KIB
CONFIG_DEPTH_MAX: Final = 16
CONFIG_LIST_MAX: Final = 256  # peers, watched roots, retention rules
CONFIG_TEXT_MAX: Final = 1024  # characters of one value
QUANTITY_MAX_BYTES: Final = 1024 * TIB
QUANTITY_MAX_S: Final = 3650 * 86_400

# Identities and signatures
CERTIFICATE_MAX_BYTES: Final = 4 * KIB  # DER; ours have about 500 bytes
SIGNATURE_ENVELOPE_MAX_BYTES: Final = 8 * KIB
SIGNATURE_AUTHORS_CACHED_MAX: Final = 256
RECOVERY_BUNDLE_MAX_BYTES: Final = MIB
RECOVERY_FILES_MAX: Final = 64
BULK_READ_SLOTS: Final = 8  # shards being sent to readers at the same time
SHUTDOWN_TIMEOUT_S: Final = 10.0  # transfers under way may finish within this at a stop
BUSY_RETRY_S: Final = 0.2

# Store
STORE_MARKER_MAX_BYTES: Final = 4 * KIB
STORE_READ_PIECE_BYTES: Final = 1 * MIB  # of what is re-read and hashed
STORE_IGNORED_NAMES_MAX: Final = 100  # files that are not ours: kept for the report, rest counted
VERIFY_PAUSE_S: Final = 2.0  # between two bad reads, so that one dip of the supply is not two
MEDIUM_CHECK_INTERVAL_S: Final = 30.0

# Background jobs
SCRUB_SLICE_BYTES: Final = 32 * MIB  # read at a time, and one shard more
SCRUB_SLICE_COPIES: Final = 64
SCRUB_QUEUE_COPIES: Final = 256  # chosen at a time as those that were checked longest ago
CHECK_RECORD_MAX_BYTES: Final = 16 * MIB  # 12 bytes a shard
JOB_RETRY_MIN_S: Final = 1.0  # after a slice that failed; doubled with each further one
JOB_RETRY_MAX_S: Final = 300.0
JOB_ERROR_TEXT_MAX: Final = 500  # characters of what went wrong, as others are told
JOBS_PER_NODE_MAX: Final = 16
STATE_FILE_MAX_BYTES: Final = 4 * KIB  # of one that names a few things

# HTTP: metrics, health and service discovery. A request is a line and a few headers, no body.
HTTP_CONNECTIONS_MAX: Final = 64
HTTP_BACKLOG_MAX: Final = 128
HTTP_HEAD_MAX_BYTES: Final = 16 * KIB
HTTP_READ_BYTES: Final = 4 * KIB
HTTP_REQUESTS_PER_CONNECTION_MAX: Final = 16
HTTP_REQUEST_TIMEOUT_S: Final = 5.0  # from the first byte (or the accept) to the end of the head
HTTP_IDLE_TIMEOUT_S: Final = 75.0  # between two requests; monitoring asks every 15 to 60 s
HTTP_ANSWER_TIMEOUT_S: Final = 10.0  # until the peer has taken the whole answer
HTTP_CLOSE_TIMEOUT_S: Final = 2.0  # for answers under way when the node stops
BULK_CONNECTIONS_MAX: Final = 96  # threads of a node that serve bulk connections
DESCRIPTORS_WANTED: Final = 4096
"""All connections of a node at a time are below 600, the rest are files: far below."""
BULK_PUSH_SLOTS: Final = 4  # shards that a node sends to others on request, at the same time
DISK_THREADS: Final = 4  # of a node's control side
DOCUMENT_BATCHES_AT_ONCE: Final = 2  # batches of documents that a node reads or writes at a time
DOCUMENTS_PER_REPLY_BYTES: Final = 4 * MIB  # the first document of a reply may be larger
HEADERS_PER_PAGE: Final = 2048
RECONNECT_MAX_S: Final = 10.0  # between two tries to reach a peer that does not answer
DOCUMENTS_PER_SYNC: Final = 256
VERSIONS_PER_QUESTION: Final = 256
SHARDS_PER_QUESTION: Final = 4096

# A store
TRANSFERS_AT_ONCE_MAX: Final = 16
TRANSFER_ATTEMPTS_MAX: Final = 6  # for one shard
RETRY_PAUSE_MIN_S: Final = 0.1
RETRY_PAUSE_MAX_S: Final = 5.0
BUSY_GIVE_UP_S: Final = 300.0  # nodes that are busy with others are waited for this long
TOUCHES_PER_GRACE: Final = 4  # of the shards of a store that is under way
COMMIT_ROUNDS_MAX: Final = 5
SHARDS_AHEAD_MAX: Final = 128  # hashed and waiting to be sent
SHARDS_LEFT_AT_LAST_LOOK: Final = 4  # may be on their way while fresh files are read once more
SHARDS_PER_VERIFY: Final = 64  # in one question

SHARDS_PER_SURVEY: Final = 64 * KIB  # of the versions that a steward asks about together

# Repair, rebalancing, and dropping copies that are too many
SHARDS_PER_COPY_MAX: Final = 256  # in one request
# Of a copy that a steward has made: what takes it slower is broken, or means harm. See
# TRANSFER_MIN_BYTES_PER_S; here others wait for the same holder.
COPY_MIN_BYTES_PER_S: Final = 256 * KIB
COPY_SLOTS_PER_ASKER: Final = 2  # of the BULK_PUSH_SLOTS of a holder
COPY_RATE_SHARES_MAX: Final = 8  # no request gets a smaller part of a holder's rate
COPY_SLICE_S: Final = 5.0  # a holder sends for about so long on one request
REPAIR_LOOK_S: Final = 2.0  # between two looks at the nodes
REPAIR_WAIT_SHOWN_S: Final = 5.0  # before it is told that repair waits for absent nodes
REPAIR_SCAN_GAP_S: Final = 5.0  # between two questions about all versions, at least
REPAIR_SCAN_SLOWDOWN: Final = 10.0  # ... and this many times as long as the last one took
REPAIR_SCAN_INTERVAL_S: Final = 600.0  # when nothing has changed
REPAIR_SURPLUS_INTERVAL_S: Final = 60.0  # ... and some node holds a copy too many
REPAIR_SILENT_INTERVAL_S: Final = 30.0  # ... and some node has not answered for longer
REPAIR_SETTLE_MAX_S: Final = 30.0  # a version that is just being stored is left alone so long
REPAIR_FAILURES_MAX: Final = 3  # in a row, and a node is passed over ...
REPAIR_AVOID_S: Final = 30.0  # ... for so long
SURPLUS_NOTED_MAX: Final = 16 * KIB  # shards that a node was told of and has not looked at
SHARDS_PER_PROMISE_MAX: Final = 1024  # that are asked about together ...
SURPLUS_PER_SLICE_BYTES: Final = 256 * MIB  # ... and how much is read for it on each holder
REBALANCE_LOOK_S: Final = 30.0
REBALANCE_ROUND_BYTES: Final = GIB  # moved before it is looked again who has how much
PROMISES_MAX: Final = 32 * KIB  # of one node at a time, about 150 bytes each

# Questions of a client
MANIFEST_ENTRIES_AT_ONCE: Final = 10_000  # shards and files of the manifests in memory together
CLAIMS_CHECKED_AT_ONCE: Final = 8  # manifests with an order ahead of the clock

# A coordinator
PRUNE_ROWS_MAX: Final = 8192  # versions that go, and those that stay, in one answer
PRUNE_REASON_MAX: Final = 160  # characters
UNSTORED_PER_MESSAGE_MAX: Final = 500  # checkpoints that wait, in one answer
RECONNECT_NODES_S: Final = 5.0  # between two tries to reach nodes that did not answer
SURVEY_INTERVAL_MIN_S: Final = 15.0  # between two looks at the state of all versions
SURVEY_SHARE_MAX: Final = 0.02  # of the time that these looks may take
CONTENT_MEMORY_ENTRIES_MAX: Final = 20_000  # checkpoints whose content id is remembered
CONTENT_MEMORY_MAX_BYTES: Final = 8 * MIB

# Watching
WATCHED_ENTRIES_MAX: Final = 500_000  # files and directories below one root
WATCHED_DEPTH_MAX: Final = 64
WATCHED_CHECKPOINTS_MAX: Final = 20_000  # of all roots
EXAMINED_CHECKPOINTS_MAX: Final = 256  # what their files say is kept while they wait
PENDING_ROWS_MAX: Final = 1000
EVENTS_WAITING_MAX: Final = 10_000  # paths; what is beyond is found by the next scan
WEIGHT_INDEX_MAX_BYTES: Final = 32 * MIB  # the index of a sharded model, with 250,000 tensors
TRAINING_STATE_MAX_BYTES: Final = 32 * MIB  # log_history of a very long run
GGUF_HEADER_MAX_BYTES: Final = 512 * MIB  # read in windows, nothing is kept
GGUF_WINDOW_BYTES: Final = 1 * MIB
GGUF_TEXT_MAX_BYTES: Final = 64 * MIB

# Discovery: whoever is on the local network can announce whatever he likes, as often as he likes.
ANNOUNCED_NODES_MAX: Final = 2 * CLUSTER_NODES_MAX  # remembered at a time
ANNOUNCED_ADDRESSES_MAX: Final = 8  # of one node
ANNOUNCEMENT_LINGER_S: Final = 60.0  # an address is still tried for so long after it was taken back
ANNOUNCED_CONNECTS_MAX: Final = 16  # tries at the same time to reach nodes that were announced
ANNOUNCED_CONNECT_TIMEOUT_S: Final = 3.0  # they are on the same network, or nowhere
ANNOUNCED_RETRY_MAX_S: Final = 60.0  # between two tries to reach a node that never answered
MDNS_RESOLVING_MAX: Final = 32  # announcements that came in part, and whose rest is asked for
MDNS_RESOLVE_TIMEOUT_S: Final = 2.0
MDNS_HEARD_MAX_BYTES: Final = 2 * MIB  # of others' records; then everything is forgotten
MDNS_FLOOD_PAUSE_S: Final = 10.0  # without mDNS after that
MDNS_ASK_INTERVAL_S: Final = 30.0  # an announcement may be lost; a network may come together again
INTERFACES_CHECK_INTERVAL_S: Final = 5.0
DISCOVERY_QUIET_S: Final = 0.4  # commands stop listening when nothing new was heard for so long
DISCOVERY_WAIT_S: Final = 1.5  # and after this in any case; answers may lawfully take 1.2 s
# Documents in which a node tells where it is; the pause is doubled, as a network may be broken.
ADDRESS_DOCUMENT_PAUSE_MIN_S: Final = 60.0
ADDRESS_DOCUMENT_PAUSE_MAX_S: Final = 86_400.0
