"""What a pickle's objects become: inert records, descriptions of tensors, plain containers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from loader.weights.formats.allowed import (
    BYTES,
    DICTS,
    DTENSORS,
    DTYPES,
    LISTS,
    RECORDS,
    SETS,
    TENSORS,
    TUPLES,
    WRAPPER,
)
from loader.weights.header import MAX_DIMENSIONS

MOST_RANKS = 1 << 16  # of a job, by whatever a file or its name says


@dataclass(eq=False, slots=True)
class Record:
    """An object of an allowed class, never made: its arguments and its state as they were saved."""

    kind: str
    args: tuple[object, ...] = ()
    state: object = None

    def get(self, field: str) -> object:
        """Return a field of the state, None where it has none."""
        return self.state.get(field) if isinstance(self.state, dict) else None


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage of the archive: ``count`` elements of ``dtype`` ("F32")."""

    key: str
    dtype: str
    count: int


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor that stays where it is; ``offset`` and ``strides`` count elements."""

    storage: StorageRef
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PartRef:
    """What one rank has of a tensor of *shape*: its part, and the ``DTensorSpec`` beside it."""

    shape: tuple[int, ...]
    part: TensorRef
    spec: Record


@dataclass(frozen=True, slots=True)
class Name:
    """An allowed name, not yet called."""

    text: str


def make(name: str, args: tuple[object, ...]) -> object:
    """Return the plain thing that stands for calling the allowed *name* with *args*.

    Raises:
        ValueError: no framework calls it so.
    """
    if name in RECORDS:
        return Record(name, args)
    if name in TENSORS:
        return _make_tensor(name, args)
    if name in BYTES:
        text, encoding = args
        if not isinstance(text, str) or encoding != "latin1":
            raise ValueError(f"bytes of {type(text).__name__} in {encoding!r}")
        return text.encode("latin-1")
    first = args[0] if args else ()
    if len(args) > 1 or not isinstance(first, list | tuple | set | dict):
        raise ValueError(f"{name} of {len(args)} arguments")
    if name in DICTS:
        return dict(first)
    if name in TUPLES:
        return tuple(first)
    if name in LISTS:
        return list(first)
    if name in SETS:
        return set(first)
    raise ValueError(f"a call of {name}")


def _make_tensor(name: str, args: tuple[object, ...]) -> TensorRef | PartRef:
    if name.endswith("_rebuild_parameter"):
        if not isinstance(args[0], TensorRef):
            raise ValueError("a parameter of something else than a tensor")
        return args[0]
    if name.endswith("_rebuild_from_type_v2"):
        # (function, class, its arguments, attributes): what the function would have made.
        function, kind, inner, state = args
        if not isinstance(function, Name) or not isinstance(inner, tuple):
            raise ValueError("a tensor made by something else than an allowed function")
        if function.text == WRAPPER:
            return _make_part(kind, inner, state)
        if function.text not in TENSORS or function.text == name:
            raise ValueError(f"a tensor made by {function.text}")
        return _make_tensor(function.text, inner)
    storage, offset, shape, strides = args[:4]
    if not isinstance(storage, StorageRef) or not is_count(offset):
        raise ValueError("a tensor without storage or offset")
    dtype = args[6] if name.endswith("_v3") else storage.dtype
    if dtype not in DTYPES.values():
        raise ValueError("a tensor without dtype")
    return TensorRef(storage, str(dtype), offset, dimensions(shape), dimensions(strides))


def _make_part(kind: object, args: tuple[object, ...], state: object) -> PartRef:
    """Source: torch/_utils.py, ``_rebuild_wrapper_subclass``; torch/distributed/tensor/_api.py."""
    if not isinstance(kind, Name) or kind.text not in DTENSORS:
        raise ValueError("a wrapper of tensors that is no DTensor")
    fields: dict[object, object] = {}  # attributes, and what the class keeps in slots
    for own in state if isinstance(state, tuple) else (state,):
        fields |= own if isinstance(own, dict) else {}
    part, spec = fields.get("_local_tensor"), fields.get("_spec")
    if not isinstance(part, TensorRef) or not isinstance(spec, Record) or len(args) < 3:
        raise ValueError("a DTensor without its part or its spec")
    return PartRef(dimensions(args[2]), part, spec)


def counts(value: object) -> tuple[int, ...]:
    """Return *value* as a tuple of counts.

    Raises:
        ValueError: it is no list or tuple of non-negative integers below 2**63.
    """
    if not isinstance(value, tuple | list) or not all(is_count(v) for v in value):
        raise ValueError("not a list of counts")
    return tuple(value)


def dimensions(value: object) -> tuple[int, ...]:
    """Return *value* as ``counts`` does, one for each of a tensor's dimensions.

    Raises:
        ValueError: also where there are more of them than any tensor has.
    """
    if isinstance(value, tuple | list) and len(value) > MAX_DIMENSIONS:
        raise ValueError(f"{len(value)} dimensions")
    return counts(value)


def is_count(value: object) -> TypeGuard[int]:
    """Return whether *value* is an integer in [0, 2**63)."""
    return type(value) is int and 0 <= value < 1 << 63
