"""What transformers' own class says of a model, asked on the meta device: no weight is needed.

A checkpoint bears the names and the layout that it was saved with; an adapter those of the process
that trained it. transformers knows how the one becomes the other (``conversion_mapping.py``, 5.x),
and its modules know whether they store (in, out), and which parameters are one and the same.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loader.import_lock import importing
from loader.weights.header import TensorInfo
from loader.weights.meta_models import build_on_meta, check_counts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, ...]
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class Piece:
    """Where rows of a run-time parameter lie: rows [start, end) of *tensor* in the checkpoint.

    They are the parameter's rows from ``offset`` on or, with ``expert``, rows of that matrix of a
    stack. ``turned``: the last two dimensions are exchanged. ``is_whole``: tensor and parameter are
    the same.
    """

    tensor: str
    start: int
    end: int
    offset: int = 0
    expert: int | None = None
    turned: bool = False
    is_whole: bool = False

    @classmethod
    def whole(cls, tensor: str, shape: Shape) -> Piece:
        """Return a parameter that is *tensor*, of *shape*."""
        return cls(tensor, 0, shape[0] if shape else 1, is_whole=True)


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model as its class has it at run time, over the tensors of one checkpoint.

    ``shapes`` are its parameters and buffers; ``pieces`` say where each lies, and lack what the
    checkpoint does not hold or holds in an order that is not known here. ``tied`` gives the others
    that are the same parameter. ``conv1d`` are modules that store (in, out), ``transposed`` stacks
    of (experts, in, out). ``embedding`` and ``head`` are parameters.
    """

    shapes: Mapping[str, Shape]
    pieces: Mapping[str, tuple[Piece, ...]]
    tied: Mapping[str, tuple[str, ...]]
    conv1d: frozenset[str]
    transposed: frozenset[str]
    embedding: str | None
    head: str | None
    decoder: str
    rename: Callable[[str], str]
    stored_name: Callable[[str], str]

    def find(self, name: str) -> str | None:
        """Return the parameter that *name* means, of this class, an older one or an inner one."""
        return next((n for n in self._spellings(name) if n in self.shapes), None)

    def find_module(self, path: str) -> str | None:
        """Return what this class calls the module *path*, which has parameters of its own."""
        leaves = dict.fromkeys(name.rpartition(".")[2] for name in self.shapes)
        found = filter(None, (self.find(f"{path}.{leaf}") for leaf in leaves))
        return next((name.rpartition(".")[0] for name in found), None)

    def _spellings(self, name: str) -> Iterator[str]:
        yield name
        yield self.rename(name)
        if name.startswith("model."):  # trained over the text model alone
            yield f"{self.decoder}{name.removeprefix('model')}"


def is_at_hand() -> bool:
    """Return whether asking takes no time: transformers is imported, and nothing else just now."""
    if not importing.acquire(blocking=False):
        return False
    try:
        return "transformers.modeling_utils" in sys.modules
    finally:
        importing.release()


def read_architecture(
    config: Mapping[str, object], tensors: Mapping[str, TensorInfo]
) -> Architecture | None:
    """Return what the class in *config* says of a checkpoint with *tensors*.

    None where transformers is not installed, or has no such class.
    """
    try:
        model = build_model(config)
    except Exception as error:  # a config may fail in as many ways as there are models
        _log.debug(
            "transformers makes no model of this config: %s: %s", type(error).__name__, error
        )
        return None
    return _describe(model, tensors)


def build_model(config: Mapping[str, object]) -> PreTrainedModel:
    """Return the model that a ``config.json`` is of, without weights and as if none was quantised.

    Raises:
        Exception: whatever transformers, or a class of it, has against the config.
    """
    check_counts(config)
    with importing:
        import transformers
        import transformers.conversion_mapping

        plain = {key: value for key, value in config.items() if key != "quantization_config"}
        config_class = transformers.CONFIG_MAPPING[str(config.get("model_type"))]
    return build_on_meta(config_class.from_dict(config_class._decode_special_floats(plain)))


def _describe(model: PreTrainedModel, tensors: Mapping[str, TensorInfo]) -> Architecture:
    import torch
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.pytorch_utils import Conv1D

    modules = dict(model.named_modules())
    state = model.state_dict()
    places = {id(tensor): name for name, tensor in reversed(list(model.named_parameters()))}
    ends = [model.get_input_embeddings, model.get_output_embeddings]
    embedding, head = (places.get(id(_weight_of(get))) for get in ends)
    conversions = Conversions(model, state)
    decoder = quietly(model.get_decoder)

    def stored_name(parameter: str) -> str:
        fake = torch.empty(state[parameter].shape, device="meta")
        names: Mapping[str, Any] = revert_weight_conversion(model, {parameter: fake})
        return next(iter(names))

    return Architecture(
        MappingProxyType({name: tuple(tensor.shape) for name, tensor in state.items()}),
        MappingProxyType(conversions.place(tensors)),
        _tied(model),
        frozenset(name for name, module in modules.items() if isinstance(module, Conv1D)),
        frozenset(n for n, m in modules.items() if getattr(m, "is_transposed", False)),
        embedding,
        _head_name(model) if head == embedding else head,
        next((name for name, module in modules.items() if module is decoder and name), "model"),
        conversions.rename,
        stored_name,
    )


def quietly(get: Callable[[], Any]) -> Any:
    """Return what *get* does, None where the class has no such part."""
    try:
        return get()
    except (NotImplementedError, AttributeError):
        return None


def _weight_of(get: Callable[[], Any]) -> Any:
    return getattr(quietly(get), "weight", None)


def _head_name(model: PreTrainedModel) -> str | None:
    """Return the head's parameter, which is the embedding's too where they are tied."""
    head = quietly(model.get_output_embeddings)
    names = (name for name, module in model.named_modules() if module is head and head is not None)
    return next((f"{name}.weight" for name in names), None)


def _tied(model: PreTrainedModel) -> Mapping[str, tuple[str, ...]]:
    """Return for each parameter that has several names the others, by the object that it is."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    return MappingProxyType(
        {name: tuple(n for n in group if n != name) for group in groups for name in group}
    )


@dataclass(frozen=True, slots=True)
class Converted:
    """Parameters that transformers computes from the tensors *names*, gathered by pattern."""

    targets: Sequence[str]
    names: Sequence[Sequence[str]]
    operations: Sequence[Any]


class Conversions:
    """How transformers turns the names and tensors of a checkpoint into those of *model*."""

    def __init__(self, model: PreTrainedModel, state: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        found = get_model_conversion_mapping(model)
        self._prefix, self._state = model.base_model_prefix, state
        self._renamings = [entry for entry in found if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in found if isinstance(entry, WeightConverter)]

    def rename(self, name: str) -> str:
        """Return what the model calls the checkpoint's tensor *name*."""
        return self._rename(name)[0]

    def _rename(self, name: str) -> tuple[str, str | None]:
        """Return it, with the pattern of the converter that made it, None where it was no more.

        Source: transformers ``core_model_loading.py``, ``convert_and_load_state_dict_in_model``.
        """
        from transformers.core_model_loading import rename_source_key

        renamed: tuple[str, str | None] = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        if renamed[0] not in self._state and name in self._state:
            renamed = rename_source_key(name, [], [], self._prefix, self._state)
        return renamed

    def place(self, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[Piece, ...]]:
        """Return where every parameter lies in a checkpoint of *tensors*."""
        plain, converted = self.gather(tensors)
        found: dict[str, tuple[Piece, ...]] = {
            t: (Piece.whole(name, tensors[name].shape),) for t, name in plain.items()
        }
        for one in converted:
            found |= self._undo(one.operations, one.names, one.targets, tensors)
        return found

    def gather(self, names: Iterable[str]) -> tuple[dict[str, str], list[Converted]]:
        """Return what *names* of a checkpoint become: parameter -> name, and what is computed."""
        from transformers.core_model_loading import dot_natural_key

        plain: dict[str, str] = {}
        gathered: dict[tuple[str, int], dict[str, list[str]]] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = self._rename(name)
            if pattern is None:
                plain[target] = name
                continue
            number = next(i for i, c in enumerate(self._converters) if pattern in c.source_patterns)
            gathered.setdefault((target, number), {}).setdefault(pattern, []).append(name)
        converted = []
        for (target, number), by_pattern in gathered.items():
            converter = self._converters[number]
            ordered = [by_pattern[p] for p in converter.source_patterns if p in by_pattern]
            targets = _expand(converter.target_patterns, target)
            converted.append(Converted(targets, ordered, converter.operations))
        return plain, converted

    def _undo(
        self,
        operations: Sequence[Any],
        names: Sequence[Sequence[str]],
        targets: Sequence[str],
        tensors: Mapping[str, TensorInfo],
    ) -> dict[str, tuple[Piece, ...]]:
        """Return where *targets* lie in the tensors *names*, gathered by pattern.

        Empty for operations that keep rows neither whole nor in order.
        """
        steps = [(type(op).__name__, getattr(op, "dim", None)) for op in operations]
        first = names[0][0]
        shape = tensors[first].shape
        match steps:
            case [("MergeModulelist", 0)] | [("MergeModulelist", 0), ("Concatenate", 1)]:
                return {targets[0]: _stacked(names, tensors)}
            case [("Concatenate", 0)]:
                return {targets[0]: _joined(list(chain(*names)), tensors)}
            case [("Chunk", 0)] if len(names) == 1 and len(names[0]) == 1:
                rows = shape[0] // len(targets)
                return {
                    target: (Piece(first, i * rows, (i + 1) * rows),)
                    for i, target in enumerate(targets)
                }
            case [("Transpose", None)] if len(names) == 1 and len(names[0]) == 1:
                (step,) = operations
                expected = self._state[targets[0]].shape
                turned = not step.check_dims or tuple(shape) != tuple(expected)
                if {step.dim0, step.dim1} != {len(shape) - 2, len(shape) - 1}:
                    return {}
                return {targets[0]: (Piece(first, 0, shape[0], turned=turned),)}
        return {}


def _expand(patterns: Sequence[str], target: str) -> list[str]:
    """Return the full names of all *patterns*, of which *target* is made with the first."""
    before, _, after = target.partition(patterns[0])
    return [before + pattern + after for pattern in patterns] if len(patterns) > 1 else [target]


def _stacked(
    names: Sequence[Sequence[str]], tensors: Mapping[str, TensorInfo]
) -> tuple[Piece, ...]:
    """Return the pieces of a stack; each pattern's tensors are rows of its matrices, in order."""
    pieces = []
    offset = 0
    for of_pattern in names:
        rows = tensors[of_pattern[0]].shape[0]
        pieces += [Piece(name, 0, rows, offset, expert) for expert, name in enumerate(of_pattern)]
        offset += rows
    return tuple(pieces)


def _joined(names: Sequence[str], tensors: Mapping[str, TensorInfo]) -> tuple[Piece, ...]:
    pieces = []
    offset = 0
    for name in names:
        rows = tensors[name].shape[0]
        pieces.append(Piece(name, 0, rows, offset))
        offset += rows
    return tuple(pieces)
