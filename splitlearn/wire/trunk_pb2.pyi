from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    FLOAT32: _ClassVar[Dtype]
    BFLOAT16: _ClassVar[Dtype]
    FLOAT16: _ClassVar[Dtype]
    INT8_BLOCKS: _ClassVar[Dtype]
DTYPE_UNSPECIFIED: Dtype
FLOAT32: Dtype
BFLOAT16: Dtype
FLOAT16: Dtype
INT8_BLOCKS: Dtype

class DescribeRequest(_message.Message):
    __slots__ = ("padding", "answer_padding", "costs")
    PADDING_FIELD_NUMBER: _ClassVar[int]
    ANSWER_PADDING_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    padding: bytes
    answer_padding: int
    costs: bool
    def __init__(self, padding: _Optional[bytes] = ..., answer_padding: _Optional[int] = ..., costs: _Optional[bool] = ...) -> None: ...

class MetricsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DropRequest(_message.Message):
    __slots__ = ("key", "step_id")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    step_id: int
    def __init__(self, key: _Optional[bytes] = ..., step_id: _Optional[int] = ...) -> None: ...

class DropReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class MetricsText(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class FlagState(_message.Message):
    __slots__ = ("name", "unavailable")
    NAME_FIELD_NUMBER: _ClassVar[int]
    UNAVAILABLE_FIELD_NUMBER: _ClassVar[int]
    name: str
    unavailable: str
    def __init__(self, name: _Optional[str] = ..., unavailable: _Optional[str] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("protocol", "model", "digest", "start", "end", "n_layers", "dtype", "device", "hidden_size", "max_length", "threads", "flags", "machine", "padding", "costs")
    class MachineEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: str
    digest: str
    start: int
    end: int
    n_layers: int
    dtype: str
    device: str
    hidden_size: int
    max_length: int
    threads: int
    flags: _containers.RepeatedCompositeFieldContainer[FlagState]
    machine: _containers.ScalarMap[str, str]
    padding: bytes
    costs: Costs
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., digest: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., n_layers: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., hidden_size: _Optional[int] = ..., max_length: _Optional[int] = ..., threads: _Optional[int] = ..., flags: _Optional[_Iterable[_Union[FlagState, _Mapping]]] = ..., machine: _Optional[_Mapping[str, str]] = ..., padding: _Optional[bytes] = ..., costs: _Optional[_Union[Costs, _Mapping]] = ...) -> None: ...

class Costs(_message.Message):
    __slots__ = ("decode_s", "prefill_s", "memory_bytes", "base_bytes", "weight_bytes")
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    BASE_BYTES_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_BYTES_FIELD_NUMBER: _ClassVar[int]
    decode_s: float
    prefill_s: float
    memory_bytes: int
    base_bytes: int
    weight_bytes: int
    def __init__(self, decode_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., base_bytes: _Optional[int] = ..., weight_bytes: _Optional[int] = ...) -> None: ...

class ClientMessage(_message.Message):
    __slots__ = ("open", "step", "keep", "forward", "feed", "done")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FEED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    step: Step
    keep: Keep
    forward: Forward
    feed: Feed
    done: Done
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., keep: _Optional[_Union[Keep, _Mapping]] = ..., forward: _Optional[_Union[Forward, _Mapping]] = ..., feed: _Optional[_Union[Feed, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "result", "closed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    result: StepResult
    closed: Closed
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., closed: _Optional[_Union[Closed, _Mapping]] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "model", "digest", "start", "end", "n_layers", "dtype", "max_length", "flags", "timeout_s", "prefix_keys", "forwards", "fed", "batch", "forward_to")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_LENGTH_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    PREFIX_KEYS_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    FED_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    FORWARD_TO_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    model: str
    digest: str
    start: int
    end: int
    n_layers: int
    dtype: str
    max_length: int
    flags: _containers.RepeatedScalarFieldContainer[str]
    timeout_s: float
    prefix_keys: bytes
    forwards: bool
    fed: bool
    batch: bool
    forward_to: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, protocol: _Optional[int] = ..., model: _Optional[str] = ..., digest: _Optional[str] = ..., start: _Optional[int] = ..., end: _Optional[int] = ..., n_layers: _Optional[int] = ..., dtype: _Optional[str] = ..., max_length: _Optional[int] = ..., flags: _Optional[_Iterable[str]] = ..., timeout_s: _Optional[float] = ..., prefix_keys: _Optional[bytes] = ..., forwards: _Optional[bool] = ..., fed: _Optional[bool] = ..., batch: _Optional[bool] = ..., forward_to: _Optional[_Iterable[str]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("threads", "load_s", "import_rss_bytes", "queue_s", "max_tensor_bytes", "key", "cached_tokens")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    IMPORT_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    MAX_TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    threads: int
    load_s: float
    import_rss_bytes: int
    queue_s: float
    max_tensor_bytes: int
    key: bytes
    cached_tokens: int
    def __init__(self, threads: _Optional[int] = ..., load_s: _Optional[float] = ..., import_rss_bytes: _Optional[int] = ..., queue_s: _Optional[float] = ..., max_tensor_bytes: _Optional[int] = ..., key: _Optional[bytes] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Keep(_message.Message):
    __slots__ = ("prefix_keys",)
    PREFIX_KEYS_FIELD_NUMBER: _ClassVar[int]
    prefix_keys: bytes
    def __init__(self, prefix_keys: _Optional[bytes] = ...) -> None: ...

class Forward(_message.Message):
    __slots__ = ("address", "key", "max_tensor_bytes")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    MAX_TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    address: str
    key: bytes
    max_tensor_bytes: int
    def __init__(self, address: _Optional[str] = ..., key: _Optional[bytes] = ..., max_tensor_bytes: _Optional[int] = ...) -> None: ...

class Feed(_message.Message):
    __slots__ = ("protocol", "key")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    key: bytes
    def __init__(self, protocol: _Optional[int] = ..., key: _Optional[bytes] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("sequence_id", "step_id", "position", "hidden", "more", "truncate", "answer_last", "fork_of", "uncertain", "rope_length", "hops", "dropped")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    TRUNCATE_FIELD_NUMBER: _ClassVar[int]
    ANSWER_LAST_FIELD_NUMBER: _ClassVar[int]
    FORK_OF_FIELD_NUMBER: _ClassVar[int]
    UNCERTAIN_FIELD_NUMBER: _ClassVar[int]
    ROPE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    step_id: int
    position: int
    hidden: Tensor
    more: bool
    truncate: bool
    answer_last: int
    fork_of: bytes
    uncertain: bool
    rope_length: int
    hops: _containers.RepeatedCompositeFieldContainer[HopTiming]
    dropped: bool
    def __init__(self, sequence_id: _Optional[int] = ..., step_id: _Optional[int] = ..., position: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., more: _Optional[bool] = ..., truncate: _Optional[bool] = ..., answer_last: _Optional[int] = ..., fork_of: _Optional[bytes] = ..., uncertain: _Optional[bool] = ..., rope_length: _Optional[int] = ..., hops: _Optional[_Iterable[_Union[HopTiming, _Mapping]]] = ..., dropped: _Optional[bool] = ...) -> None: ...

class HopTiming(_message.Message):
    __slots__ = ("decode_s", "queue_s", "trunk_s", "encode_s", "compile_s")
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TRUNK_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    COMPILE_S_FIELD_NUMBER: _ClassVar[int]
    decode_s: float
    queue_s: float
    trunk_s: float
    encode_s: float
    compile_s: float
    def __init__(self, decode_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., trunk_s: _Optional[float] = ..., encode_s: _Optional[float] = ..., compile_s: _Optional[float] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("sequence_id", "step_id", "position", "hidden", "more", "decode_s", "queue_s", "trunk_s", "encode_s", "compile_s", "dropped", "hops")
    SEQUENCE_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    DECODE_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    TRUNK_S_FIELD_NUMBER: _ClassVar[int]
    ENCODE_S_FIELD_NUMBER: _ClassVar[int]
    COMPILE_S_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    HOPS_FIELD_NUMBER: _ClassVar[int]
    sequence_id: int
    step_id: int
    position: int
    hidden: Tensor
    more: bool
    decode_s: float
    queue_s: float
    trunk_s: float
    encode_s: float
    compile_s: float
    dropped: bool
    hops: _containers.RepeatedCompositeFieldContainer[HopTiming]
    def __init__(self, sequence_id: _Optional[int] = ..., step_id: _Optional[int] = ..., position: _Optional[int] = ..., hidden: _Optional[_Union[Tensor, _Mapping]] = ..., more: _Optional[bool] = ..., decode_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., trunk_s: _Optional[float] = ..., encode_s: _Optional[float] = ..., compile_s: _Optional[float] = ..., dropped: _Optional[bool] = ..., hops: _Optional[_Iterable[_Union[HopTiming, _Mapping]]] = ...) -> None: ...

class Closed(_message.Message):
    __slots__ = ("peak_rss_bytes",)
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    peak_rss_bytes: int
    def __init__(self, peak_rss_bytes: _Optional[int] = ...) -> None: ...
