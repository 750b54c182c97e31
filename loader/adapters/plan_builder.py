"""A plan while it is made: the base as its headers show it, the edits so far, what was wrong."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from loader.adapters.config import AdapterConfig
from loader.adapters.edits import Edit
from loader.adapters.names import find_embedding, find_tensor, is_head
from loader.errors import AdapterError
from loader.weights.header import TensorInfo

Shapes = Mapping[str, TensorInfo]
_CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LEAVES = ("c_attn", "c_proj", "c_fc", "q_attn")
# Classes of transformers that classify or embed, and have no head over the vocabulary.
_HEADLESS = re.compile(r"(Classification|QuestionAnswering|(?<!LMHead)Model)$")
_HEAD_NAMES = {"whisper": "proj_out", "gpt_neox": "embed_out"}


@dataclass(frozen=True, slots=True)
class Base:
    """What is known of the base before its weights are read: tensors and ``config.json``."""

    tensors: Shapes
    config: Mapping[str, object]

    @property
    def model_type(self) -> str:
        """The architecture's name."""
        return str(self.config.get("model_type") or "")

    @property
    def writes_text(self) -> bool:
        """Whether the model has an output head over its vocabulary, tied or not."""
        names = self.config.get("architectures")
        return not (isinstance(names, list) and names and _HEADLESS.search(str(names[0])))

    @property
    def head_name(self) -> str:
        """The module of the output head where the checkpoint holds none, being tied."""
        embedding = find_embedding(self.tensors) or ""
        prefix = "language_model." if embedding.startswith("language_model.") else ""
        return f"{prefix}{_HEAD_NAMES.get(self.model_type, 'lm_head')}"

    @property
    def tied_to(self) -> str | None:
        """The embedding that is also the output head, None where the head is its own."""
        if not self.writes_text:
            return None
        text = self.config.get("text_config")
        asked = self.config.get("tie_word_embeddings")
        if asked is None and isinstance(text, dict):
            asked = text.get("tie_word_embeddings")
        has_head = any(is_head(name.removesuffix(".weight")) for name in self.tensors)
        return find_embedding(self.tensors) if asked or not has_head else None


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
            got="no config.json" if base.is_dir() else "no such folder",
            next_step="give the base model that the adapter was trained over"
            + (f", such as {named}" if named else ""),
        )


@dataclass(slots=True)
class Draft:
    """A plan while it is made, and what was found wrong so far."""

    config: AdapterConfig
    base: Base
    tensors: Shapes
    edits: dict[str, list[Edit]] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    origins: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tied_to: str | None = field(init=False)

    def __post_init__(self) -> None:
        self.tied_to = self.base.tied_to  # for every module, and a search each

    def add(self, edit: Edit) -> None:
        """Take *edit* into the plan."""
        self.edits.setdefault(edit.target, []).append(edit)
        self.used.update(edit.inputs)

    def blame(self, text: str, *names: str) -> None:
        """Say what is wrong with the adapter's tensors *names*."""
        self.problems.append(f"{', '.join(names)}: {text}")
        self.used.update(names)

    def shape_of(self, target: str) -> tuple[int, ...]:
        """The shape that *target* will have."""
        origin = self.origins.get(target, target)
        return self.shapes.get(target) or self.base.tensors[origin].shape

    def is_conv1d(self, module: str) -> bool:
        """Return whether *module* stores (in, out), as transformers' Conv1D does."""
        leaf = module.rpartition(".")[2]
        return self.base.model_type in _CONV1D_TYPES and leaf in _CONV1D_LEAVES

    def find(self, module: str, leaf: str = "weight") -> str | None:
        """Return the base's tensor that ``<module>.<leaf>`` means; an untied head becomes one."""
        name = find_tensor(self.base.tensors, module, leaf)
        if self.tied_to and leaf == "weight" and is_head(module):
            name = name or f"{module}.{leaf}"
            self.origins[name] = self.tied_to
        return name
