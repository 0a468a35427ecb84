from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ServerState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SERVER_STATE_UNSPECIFIED: _ClassVar[ServerState]
    SERVER_STATE_LOADING: _ClassVar[ServerState]
    SERVER_STATE_SERVING: _ClassVar[ServerState]
    SERVER_STATE_SLEEPING: _ClassVar[ServerState]
    SERVER_STATE_DRAINING: _ClassVar[ServerState]
SERVER_STATE_UNSPECIFIED: ServerState
SERVER_STATE_LOADING: ServerState
SERVER_STATE_SERVING: ServerState
SERVER_STATE_SLEEPING: ServerState
SERVER_STATE_DRAINING: ServerState

class SleepRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SleepResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ServerState
    def __init__(self, state: _Optional[_Union[ServerState, str]] = ...) -> None: ...

class WakeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WakeResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: ServerState
    def __init__(self, state: _Optional[_Union[ServerState, str]] = ...) -> None: ...

class ScoreSequencesRequest(_message.Message):
    __slots__ = ("model", "expected_fingerprint", "temperature", "top_k", "request_id", "max_chunk_bytes", "sequence_lengths", "token_ids", "span_counts", "span_starts", "span_ends", "candidate_count", "candidate_ids", "prefix_lengths", "prefix_replaced", "prefix_token_ids", "payload_crc")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SPAN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    SPAN_STARTS_FIELD_NUMBER: _ClassVar[int]
    SPAN_ENDS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_IDS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_REPLACED_FIELD_NUMBER: _ClassVar[int]
    PREFIX_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_CRC_FIELD_NUMBER: _ClassVar[int]
    model: str
    expected_fingerprint: str
    temperature: float
    top_k: int
    request_id: str
    max_chunk_bytes: int
    sequence_lengths: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    span_counts: _containers.RepeatedScalarFieldContainer[int]
    span_starts: _containers.RepeatedScalarFieldContainer[int]
    span_ends: _containers.RepeatedScalarFieldContainer[int]
    candidate_count: int
    candidate_ids: _containers.RepeatedScalarFieldContainer[int]
    prefix_lengths: _containers.RepeatedScalarFieldContainer[int]
    prefix_replaced: _containers.RepeatedScalarFieldContainer[int]
    prefix_token_ids: _containers.RepeatedScalarFieldContainer[int]
    payload_crc: int
    def __init__(self, model: _Optional[str] = ..., expected_fingerprint: _Optional[str] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., request_id: _Optional[str] = ..., max_chunk_bytes: _Optional[int] = ..., sequence_lengths: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., span_counts: _Optional[_Iterable[int]] = ..., span_starts: _Optional[_Iterable[int]] = ..., span_ends: _Optional[_Iterable[int]] = ..., candidate_count: _Optional[int] = ..., candidate_ids: _Optional[_Iterable[int]] = ..., prefix_lengths: _Optional[_Iterable[int]] = ..., prefix_replaced: _Optional[_Iterable[int]] = ..., prefix_token_ids: _Optional[_Iterable[int]] = ..., payload_crc: _Optional[int] = ...) -> None: ...

class ScoreSequencesResponse(_message.Message):
    __slots__ = ("sequence_indexes", "first_targets", "target_counts", "token_crcs", "logprobs", "top_ids", "top_logprobs", "candidate_logprobs", "model", "fingerprint", "tokenizer_fingerprint", "temperature", "payload_crc")
    SEQUENCE_INDEXES_FIELD_NUMBER: _ClassVar[int]
    FIRST_TARGETS_FIELD_NUMBER: _ClassVar[int]
    TARGET_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_CRCS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_CRC_FIELD_NUMBER: _ClassVar[int]
    sequence_indexes: _containers.RepeatedScalarFieldContainer[int]
    first_targets: _containers.RepeatedScalarFieldContainer[int]
    target_counts: _containers.RepeatedScalarFieldContainer[int]
    token_crcs: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedScalarFieldContainer[float]
    top_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    candidate_logprobs: _containers.RepeatedScalarFieldContainer[float]
    model: str
    fingerprint: str
    tokenizer_fingerprint: str
    temperature: float
    payload_crc: int
    def __init__(self, sequence_indexes: _Optional[_Iterable[int]] = ..., first_targets: _Optional[_Iterable[int]] = ..., target_counts: _Optional[_Iterable[int]] = ..., token_crcs: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[float]] = ..., top_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ..., candidate_logprobs: _Optional[_Iterable[float]] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., temperature: _Optional[float] = ..., payload_crc: _Optional[int] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("server_version", "instance_id", "engine", "engine_version", "models", "max_request_bytes", "state", "can_sleep", "wake_on_score", "max_queued_tokens")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    MAX_REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CAN_SLEEP_FIELD_NUMBER: _ClassVar[int]
    WAKE_ON_SCORE_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    instance_id: str
    engine: str
    engine_version: str
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    max_request_bytes: int
    state: ServerState
    can_sleep: bool
    wake_on_score: bool
    max_queued_tokens: int
    def __init__(self, server_version: _Optional[str] = ..., instance_id: _Optional[str] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., max_request_bytes: _Optional[int] = ..., state: _Optional[_Union[ServerState, str]] = ..., can_sleep: bool = ..., wake_on_score: bool = ..., max_queued_tokens: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("model", "fingerprint", "tokenizer_fingerprint", "vocab_size", "max_sequence_length", "max_top_k", "max_candidate_count", "any_temperature", "dtype", "base_model")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_SEQUENCE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_CANDIDATE_COUNT_FIELD_NUMBER: _ClassVar[int]
    ANY_TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int
    max_sequence_length: int
    max_top_k: int
    max_candidate_count: int
    any_temperature: bool
    dtype: str
    base_model: str
    def __init__(self, model: _Optional[str] = ..., fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_sequence_length: _Optional[int] = ..., max_top_k: _Optional[int] = ..., max_candidate_count: _Optional[int] = ..., any_temperature: bool = ..., dtype: _Optional[str] = ..., base_model: _Optional[str] = ...) -> None: ...
