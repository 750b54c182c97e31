"""The names that a pickle may mention. All of them; anything else is refused.

A name here never leads to the thing it names: the unpickler makes a ``Record``, a ``TensorRef``, a
dtype code or a plain container out of it, and nothing of torch or DeepSpeed is imported for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

# Dtypes, as torch pickles them by name; the codes are those of safetensors.
DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "torch.bool": "BOOL",
        "torch.uint8": "U8",
        "torch.int8": "I8",
        "torch.int16": "I16",
        "torch.int32": "I32",
        "torch.int64": "I64",
        "torch.uint16": "U16",
        "torch.uint32": "U32",
        "torch.uint64": "U64",
        "torch.float16": "F16",
        "torch.bfloat16": "BF16",
        "torch.float32": "F32",
        "torch.float64": "F64",
        "torch.complex64": "C64",
        "torch.float8_e4m3fn": "F8_E4M3",
        "torch.float8_e5m2": "F8_E5M2",
        "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
        "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    }
)

# Storage classes; an untyped storage is bytes, and its tensor names the dtype.
STORAGES: Mapping[str, str] = MappingProxyType(
    {
        "torch.BoolStorage": "BOOL",
        "torch.ByteStorage": "U8",
        "torch.CharStorage": "I8",
        "torch.ShortStorage": "I16",
        "torch.IntStorage": "I32",
        "torch.LongStorage": "I64",
        "torch.HalfStorage": "F16",
        "torch.BFloat16Storage": "BF16",
        "torch.FloatStorage": "F32",
        "torch.DoubleStorage": "F64",
        "torch.ComplexFloatStorage": "C64",
        "torch.storage.UntypedStorage": "U8",
    }
)

# Functions that make tensors: taken apart into descriptions of tensors.
TENSORS = frozenset(
    {
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._tensor._rebuild_from_type_v2",
    }
)

# A tensor of which each rank has a part: taken apart into this rank's part and the spec beside it.
WRAPPER = "torch._utils._rebuild_wrapper_subclass"
DTENSORS = frozenset(
    {
        "torch.distributed.tensor.DTensor",
        "torch.distributed.tensor._api.DTensor",
        "torch.distributed._tensor.api.DTensor",
        "torch.distributed._tensor.DTensor",
    }
)

# Classes that such a function is told to make: mentioned, never called.
TYPES = frozenset({"torch.Tensor", "torch.nn.parameter.Parameter"}) | DTENSORS

# Plain containers: dictionaries, tuples and sets of what is allowed.
DICTS = frozenset({"collections.OrderedDict", "builtins.dict", "__builtin__.dict"})
TUPLES = frozenset({"torch.Size", "builtins.tuple", "__builtin__.tuple"})
SETS = frozenset({"builtins.set", "__builtin__.set", "builtins.frozenset", "__builtin__.frozenset"})
LISTS = frozenset({"builtins.list", "__builtin__.list"})

# How old protocols write bytes: text, to be encoded as Latin-1.
BYTES = frozenset({"_codecs.encode"})

# Objects of the two frameworks that stand around the tensors: kept as inert records.
RECORDS = frozenset(
    {
        "pathlib.PosixPath",
        "pathlib.PurePosixPath",
        "pathlib.WindowsPath",
        "pathlib._local.PosixPath",
        "torch.device",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.metadata.Metadata",
        "torch.distributed.checkpoint.metadata.MetadataIndex",
        "torch.distributed.checkpoint.metadata.StorageMeta",
        "torch.distributed.checkpoint.metadata.TensorStorageMetadata",
        "torch.distributed.checkpoint.metadata.BytesStorageMetadata",
        "torch.distributed.checkpoint.metadata.ChunkStorageMetadata",
        "torch.distributed.checkpoint.metadata.TensorProperties",
        "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING",
        # Megatron-Core keeps every rank's plan in .metadata.
        "torch.distributed.checkpoint.planner.SavePlan",
        "torch.distributed.checkpoint.planner.WriteItem",
        "torch.distributed.checkpoint.planner.WriteItemType",
        "torch.distributed.checkpoint.planner.TensorWriteData",
        "torch.distributed.checkpoint.planner.BytesIOWriteData",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        "torch.distributed.checkpoint.filesystem._StoragePrefix",
        # What stands around a DTensor, in the places where versions of torch have had it.
        "torch.distributed.device_mesh.DeviceMesh",
        "torch.distributed._mesh_layout._MeshLayout",
        "torch.distributed._mesh_layout._FlatLayout",
        *(
            f"torch.distributed.{module}.{name}"
            for module in (
                "tensor._dtensor_spec",
                "tensor.placement_types",
                "_tensor._dtensor_spec",
                "_tensor.placement_types",
            )
            for name in (
                "DTensorSpec",
                "TensorMeta",
                "ShardOrderEntry",
                "Shard",
                "_StridedShard",
                "Replicate",
                "Partial",
                "_Partial",
            )
        ),
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
        "deepspeed.utils.tensor_fragment.tensor_fragment",
    }
)

ALLOWED = (
    frozenset(DTYPES)
    | frozenset(STORAGES)
    | TENSORS
    | {WRAPPER}
    | TYPES
    | DICTS
    | TUPLES
    | SETS
    | LISTS
    | BYTES
    | RECORDS
)
