"""A plan while it is made: the base as headers and classes show it, the edits, what was wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from loader.adapters.config import AdapterConfig, is_adapter
from loader.adapters.edits import CombinedLowRank, Edit, ExpertLowRank, LowRank, Part, Replace
from loader.errors import AdapterError
from loader.weights.architecture import Architecture, Piece, read_architecture
from loader.weights.header import TensorInfo
from loader.weights.inspect import ADAPTER_CONFIG

Shapes = Mapping[str, TensorInfo]
# Families whose blocks are plain: what an adapter calls a layer is what the checkpoint calls it,
# every one is a Linear, nothing of it is shared. They need not be asked of transformers, whose
# import takes seconds; that all this holds is tested on its classes.
PLAIN_FAMILIES = frozenset(
    (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite"),
        *("olmo", "olmo2", "olmo3", "smollm3", "starcoder2", "cohere", "cohere2", "helium", "glm"),
        *("glm4", "seed_oss", "ernie4_5", "exaone4"),
    )
)
PLAIN_LAYERS = frozenset(
    (
        *("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"),
        *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "c_fc", "c_proj"),
    )
)
# What the same block is called in the classes that a text model may have been trained as.
_INNER = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor that a module has at run time, and what the checkpoint holds of it.

    ``conv1d``: whether it is stored (in, out), None where its class is not known. ``shared``: how
    many more parameters of the model are the very same.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    conv1d: bool | None = False
    is_vocabulary: bool = False
    shared: int = 0

    @property
    def whole(self) -> str | None:
        """The checkpoint's tensor that it is, None where it is a part of one or made of several."""
        whole = len(self.pieces) == 1 and self.pieces[0].is_whole
        return self.pieces[0].tensor if whole else None


class UnaskedError(Exception):
    """It takes transformers' class to say."""


@dataclass(frozen=True)
class Base:
    """What is known of the base before its weights are read: tensors and ``config.json``.

    With ``quick``, transformers is not asked, and what it would have to say raises UnaskedError.
    """

    tensors: Shapes
    config: Mapping[str, object]
    quick: bool = False

    @property
    def model_type(self) -> str:
        """The architecture's name."""
        return str(self.config.get("model_type") or "")

    @cached_property
    def architecture(self) -> Architecture | None:
        """What the model's own class says, None where transformers has none."""
        if self.quick:
            raise UnaskedError
        return read_architecture(self.config, self.tensors)

    def find(self, module: str, leaf: str = "weight") -> Place | None:
        """Return what ``<module>.<leaf>`` means, None when the base has nothing of that name."""
        name = f"{module}.{leaf}"
        if self.model_type in PLAIN_FAMILIES and module.rpartition(".")[2] in PLAIN_LAYERS:
            return self._find_plain(name)
        architecture = self.architecture
        if architecture is None:
            return self._on_disk(name, conv1d=None)
        found = architecture.find(name)
        if found is None:
            return self._on_disk(name, conv1d=False)
        owner = found.rpartition(".")[0]
        place = Place(
            found,
            architecture.shapes[found],
            architecture.pieces.get(found, ()),
            owner in architecture.conv1d,
            found in (architecture.embedding, architecture.head),
            len(architecture.tied.get(found, ())),
        )
        if place.whole is None:
            return place
        # The tensor's own shape: a vocabulary may have been resized since.
        return replace(place, shape=self.tensors[place.whole].shape)

    def _find_plain(self, name: str) -> Place | None:
        prefix = next(prefix for prefix in _INNER if name.startswith(prefix))
        names = (name, f"model.{name.removeprefix(prefix)}")
        return next((p for n in names if (p := self._on_disk(n, conv1d=False))), None)

    def _on_disk(self, name: str, *, conv1d: bool | None) -> Place | None:
        if name not in self.tensors:
            return None
        shape = self.tensors[name].shape
        return Place(name, shape, (Piece.whole(name, shape),), conv1d)


def check_base_folder(base: Path, named: str | None = None) -> None:
    """Check that a model is in *base*; *named* is what an adapter says that it was trained over.

    Raises:
        AdapterError: there is none.
    """
    if not (base / "config.json").is_file():
        raise AdapterError(
            "the base model is missing",
            where=str(base),
            expected="a folder with config.json and weights",
            got="an adapter"
            if is_adapter(base)
            else "no config.json"
            if base.is_dir()
            else "no such folder",
            next_step="give the base model that the adapter was trained over"
            + (f", such as {named}" if named else ""),
        )


def check_roles(base: Path, adapters: Sequence[Path]) -> None:
    """Check that no whole model is among the *adapters*.

    Raises:
        AdapterError: one is; *base* may be the adapter then.
    """
    for folder in adapters:
        if is_adapter(folder) or not (folder / "config.json").is_file():
            continue
        swapped = is_adapter(base)
        raise AdapterError(
            "base and adapter are swapped" if swapped else "a whole model in an adapter's place",
            where=str(folder),
            expected=f"a folder with {ADAPTER_CONFIG}",
            got="config.json and no adapter_config.json",
            next_step=f"swap them: --base {folder} --adapter {base}"
            if swapped
            else "give what was trained over the base, such as a checkpoint of PEFT's",
        )


@dataclass(slots=True)
class Draft:
    """A plan while it is made, and what was found wrong so far.

    ``tied`` is a pair that is one tensor: the head, as the checkpoint would call it, and the
    embedding that holds both. Set when one of them is found.
    """

    config: AdapterConfig
    base: Base
    tensors: Shapes
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    unmergeable: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied: tuple[str, str] | None = None

    def add(self, edit: Edit, place: Place) -> None:
        """Take *edit* of *place* into the plan, or say why it cannot be made on what is stored."""
        if place.whole is not None:
            self.take(replace(edit, target=place.whole))
            return
        if not place.pieces:
            self.leave(f"the base stores {place.name} in a layout of its own", *edit.inputs)
            return
        for piece in place.pieces:
            made = _cut(edit, piece, is_all=len(place.pieces) == 1)
            if made is None:
                self.leave(f"the base stores {place.name} in parts or turned", *edit.inputs)
                return
            self.take(made)

    def take(self, edit: Edit) -> None:
        """Take an *edit* of a tensor of the checkpoint into the plan."""
        self.edits.setdefault(edit.target, []).append(edit)
        self.used.update(edit.inputs)

    def blame(self, text: str, *names: str) -> None:
        """Say what is wrong with the adapter's tensors *names*."""
        self.problems.append(f"{', '.join(names)}: {text}")
        self.used.update(names)

    def leave(self, text: str, *names: str) -> None:
        """Say why the adapter's tensors *names*, which fit the base, cannot be merged into it."""
        self.unmergeable.append(f"{', '.join(names)}: {text}")
        self.used.update(names)

    def shape_of(self, target: str) -> tuple[int, ...]:
        """The shape that *target*, a tensor of the checkpoint, will have."""
        origin = self.origins.get(target, target)
        return self.shapes.get(target) or self.base.tensors[origin].shape

    def find(self, module: str, leaf: str = "weight") -> Place | None:
        """Return what ``<module>.<leaf>`` of the base means; an untied head becomes one."""
        place = self.base.find(module, leaf)
        if place is not None and place.shared:
            place = self._find_shared(place)
        if place is None or not (resized := self.shapes.get(place.whole or "")):
            return place
        return replace(place, shape=resized)

    def _find_shared(self, place: Place) -> Place:
        """Return a parameter that is another one's, too; of a pair, note which is the head."""
        architecture = self.base.architecture
        assert architecture is not None
        if place.shared > 1:
            return place
        (other,) = architecture.tied[place.name]
        stored = architecture.pieces.get(place.name) or architecture.pieces.get(other, ())
        if len(stored) != 1:
            return place
        is_head = place.name == architecture.head or not place.pieces
        head = architecture.stored_name(place.name if is_head else other)
        origin = architecture.pieces.get(other, stored)[0].tensor if is_head else stored[0].tensor
        self.tied = (head, origin)
        if not is_head:
            return place
        self.origins[head] = origin
        shape = self.shape_of(head)
        return replace(place, shape=shape, pieces=(Piece.whole(head, shape),))


def _cut(edit: Edit, piece: Piece, *, is_all: bool) -> Edit | None:
    """Return *edit* as it changes one *piece*, None where it cannot be cut that way."""
    if isinstance(edit, CombinedLowRank | ExpertLowRank | Part) or piece.expert is not None:
        return None
    plain = isinstance(edit, LowRank) and not (edit.magnitude and edit.transposed)
    if piece.turned:
        if not isinstance(edit, LowRank) or edit.magnitude:
            return None
        return replace(edit, target=piece.tensor, transposed=not edit.transposed)
    if not is_all and not (plain or isinstance(edit, Replace)):
        return None
    return Part(piece.tensor, edit, piece.start, piece.end, piece.offset)
