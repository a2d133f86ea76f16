from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Sampling(_message.Message):
    __slots__ = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop_token_ids", "ignore_eos", "logprobs", "json_schema")
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    seed: int
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    json_schema: str
    def __init__(self, max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., repetition_penalty: _Optional[float] = ..., seed: _Optional[int] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., json_schema: _Optional[str] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("protocol_version", "request_id", "token_ids", "num_prompt_tokens", "sampling", "salt", "priority", "prefill")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: Sampling
    salt: bytes
    priority: int
    prefill: PrefillSource
    def __init__(self, protocol_version: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[Sampling, _Mapping]] = ..., salt: _Optional[bytes] = ..., priority: _Optional[int] = ..., prefill: _Optional[_Union[PrefillSource, _Mapping]] = ...) -> None: ...

class PrefillSource(_message.Message):
    __slots__ = ("worker", "address")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    worker: str
    address: str
    def __init__(self, worker: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class GenerateEvent(_message.Message):
    __slots__ = ("started", "token", "finished")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    token: Token
    finished: Finished
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., token: _Optional[_Union[Token, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("cached_tokens", "received_tokens", "received_bytes", "prefill_failure", "remote_cached_tokens")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FAILURE_FIELD_NUMBER: _ClassVar[int]
    REMOTE_CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    received_tokens: int
    received_bytes: int
    prefill_failure: str
    remote_cached_tokens: int
    def __init__(self, cached_tokens: _Optional[int] = ..., received_tokens: _Optional[int] = ..., received_bytes: _Optional[int] = ..., prefill_failure: _Optional[str] = ..., remote_cached_tokens: _Optional[int] = ...) -> None: ...

class Token(_message.Message):
    __slots__ = ("token_id", "logprob", "top")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    top: _containers.RepeatedCompositeFieldContainer[TopLogprob]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., top: _Optional[_Iterable[_Union[TopLogprob, _Mapping]]] = ...) -> None: ...

class TopLogprob(_message.Message):
    __slots__ = ("token_id", "logprob")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class EmbedRequest(_message.Message):
    __slots__ = ("protocol_version", "request_id", "token_ids", "salt", "priority")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    salt: bytes
    priority: int
    def __init__(self, protocol_version: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., salt: _Optional[bytes] = ..., priority: _Optional[int] = ...) -> None: ...

class EmbedReply(_message.Message):
    __slots__ = ("vector", "cached_tokens")
    VECTOR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    vector: _containers.RepeatedScalarFieldContainer[float]
    cached_tokens: int
    def __init__(self, vector: _Optional[_Iterable[float]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("protocol_version", "request_id", "token_ids", "salt", "fingerprint", "num_held_blocks", "lease_epoch", "priority")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NUM_HELD_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    salt: bytes
    fingerprint: str
    num_held_blocks: int
    lease_epoch: int
    priority: int
    def __init__(self, protocol_version: _Optional[int] = ..., request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., salt: _Optional[bytes] = ..., fingerprint: _Optional[str] = ..., num_held_blocks: _Optional[int] = ..., lease_epoch: _Optional[int] = ..., priority: _Optional[int] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("block", "done")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    block: KvBlock
    done: PrefillDone
    def __init__(self, block: _Optional[_Union[KvBlock, _Mapping]] = ..., done: _Optional[_Union[PrefillDone, _Mapping]] = ...) -> None: ...

class KvBlock(_message.Message):
    __slots__ = ("index", "block_hash", "lease_epoch", "first_layer", "num_layers", "payload", "content_digest")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    BLOCK_HASH_FIELD_NUMBER: _ClassVar[int]
    LEASE_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    CONTENT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    index: int
    block_hash: bytes
    lease_epoch: int
    first_layer: int
    num_layers: int
    payload: bytes
    content_digest: bytes
    def __init__(self, index: _Optional[int] = ..., block_hash: _Optional[bytes] = ..., lease_epoch: _Optional[int] = ..., first_layer: _Optional[int] = ..., num_layers: _Optional[int] = ..., payload: _Optional[bytes] = ..., content_digest: _Optional[bytes] = ...) -> None: ...

class PrefillDone(_message.Message):
    __slots__ = ("num_blocks", "cached_tokens")
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    num_blocks: int
    cached_tokens: int
    def __init__(self, num_blocks: _Optional[int] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("protocol_version", "known_prefix_version")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    KNOWN_PREFIX_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    known_prefix_version: int
    def __init__(self, protocol_version: _Optional[int] = ..., known_prefix_version: _Optional[int] = ...) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("worker", "role", "state", "boot_epoch", "fingerprint", "block_size", "num_blocks", "num_free_blocks", "num_running", "num_waiting", "num_waiting_tokens", "max_context_tokens", "prefill_tokens_total", "output_tokens_total", "preemptions_total", "evictions_total", "prefix_version", "prefixes", "handoff_refusals_total", "handoff_bytes_total", "embedding_size", "prefill_threads", "decode_threads", "threads_reason")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BOOT_EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUM_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NUM_RUNNING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_FIELD_NUMBER: _ClassVar[int]
    NUM_WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_VERSION_FIELD_NUMBER: _ClassVar[int]
    PREFIXES_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_REFUSALS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_SIZE_FIELD_NUMBER: _ClassVar[int]
    PREFILL_THREADS_FIELD_NUMBER: _ClassVar[int]
    DECODE_THREADS_FIELD_NUMBER: _ClassVar[int]
    THREADS_REASON_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: str
    state: str
    boot_epoch: int
    fingerprint: str
    block_size: int
    num_blocks: int
    num_free_blocks: int
    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    max_context_tokens: int
    prefill_tokens_total: int
    output_tokens_total: int
    preemptions_total: int
    evictions_total: int
    prefix_version: int
    prefixes: bytes
    handoff_refusals_total: int
    handoff_bytes_total: int
    embedding_size: int
    prefill_threads: int
    decode_threads: int
    threads_reason: str
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., boot_epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., block_size: _Optional[int] = ..., num_blocks: _Optional[int] = ..., num_free_blocks: _Optional[int] = ..., num_running: _Optional[int] = ..., num_waiting: _Optional[int] = ..., num_waiting_tokens: _Optional[int] = ..., max_context_tokens: _Optional[int] = ..., prefill_tokens_total: _Optional[int] = ..., output_tokens_total: _Optional[int] = ..., preemptions_total: _Optional[int] = ..., evictions_total: _Optional[int] = ..., prefix_version: _Optional[int] = ..., prefixes: _Optional[bytes] = ..., handoff_refusals_total: _Optional[int] = ..., handoff_bytes_total: _Optional[int] = ..., embedding_size: _Optional[int] = ..., prefill_threads: _Optional[int] = ..., decode_threads: _Optional[int] = ..., threads_reason: _Optional[str] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("protocol_version", "request_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    request_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., request_id: _Optional[str] = ...) -> None: ...

class AbortReply(_message.Message):
    __slots__ = ("was_running",)
    WAS_RUNNING_FIELD_NUMBER: _ClassVar[int]
    was_running: bool
    def __init__(self, was_running: _Optional[bool] = ...) -> None: ...
