"""Which tensor of the base an adapter's module means, where the two were named differently.

An adapter bears the names that the modules had in the process that trained it; a checkpoint bears
those that it was saved with. They differ for multimodal models and for experts, whose runtime names
transformers 5 changed while checkpoints kept theirs. The differences are a table, taken from
transformers 5.19 ``conversion_mapping.py``; a name is mapped only to a tensor that exists.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from loader.weights.header import TensorInfo

# Prefixes that mean the same, one row per layout; each may turn into any other of its row.
_PREFIXES = (
    ("model.language_model.", "language_model.model.", "model."),
    ("lm_head.", "language_model.lm_head.", "embed_out."),
    ("model.visual.", "visual."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.audio_tower.", "audio_tower."),
    ("transformer.", ""),
)
HEADS = ("lm_head", "language_model.lm_head", "embed_out", "output", "proj_out")
EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings")

# Stacked at run time -> (leaf of one expert on disk, which equal part of the stacked rows it is).
_EXPERT_PARTS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
# The blocks that hold experts and their router: run time, and Mixtral's checkpoints.
_BLOCKS = (".mlp.", ".block_sparse_moe.")


@dataclass(frozen=True, slots=True)
class ExpertSlice:
    """One expert's own matrix on disk: of ``parts`` equal shares of the stack's rows, ``part``."""

    name: str
    expert: int
    part: int
    parts: int


def find_tensor(base: Collection[str], module: str, leaf: str = "weight") -> str | None:
    """Return the tensor of *base* that ``<module>.<leaf>`` means, None when there is none."""
    return next((name for name in _spellings(f"{module}.{leaf}") if name in base), None)


def _spellings(name: str) -> Iterator[str]:
    yield from _prefixed(name)
    if _BLOCKS[0] in name:
        yield from _prefixed(name.replace(*_BLOCKS))


def _prefixed(name: str) -> Iterator[str]:
    yield name
    for row in _PREFIXES:
        for prefix in row:
            if name.startswith(prefix):
                yield from (other + name[len(prefix) :] for other in row if other != prefix)
                break


def find_experts(
    base: Mapping[str, TensorInfo], module: str, parameter: str, experts: int
) -> tuple[ExpertSlice, ...]:
    """Return the experts' own matrices that a stacked *parameter* means; empty if one lacks."""
    for leaves in _EXPERT_PARTS.get(parameter, ()):
        found = [
            (find_tensor(base, f"{module}.{expert}.{leaf}"), expert, part)
            for expert in range(experts)
            for part, leaf in enumerate(leaves)
        ]
        if found and all(name for name, _, _ in found):
            return tuple(ExpertSlice(str(n), e, p, len(leaves)) for n, e, p in found)
    return ()


def count_experts(base: Collection[str], module: str) -> int:
    """Return how many experts lie on disk under *module*, each by itself."""
    numbers = set()
    for spelled in _spellings(f"{module}."):
        pattern = re.compile(re.escape(spelled) + r"(\d+)\.")
        numbers |= {int(m[1]) for m in map(pattern.match, base) if m}
    return len(numbers)


def is_head(module: str) -> bool:
    """Return whether *module* is the output head."""
    return module in HEADS


def is_embedding(module: str) -> bool:
    """Return whether *module* is the input embedding."""
    return module.rpartition(".")[2] in EMBEDDINGS


def find_embedding(base: Collection[str]) -> str | None:
    """Return the tensor of the input embedding, None when none bears a known name."""
    found = [n for n in base if n.endswith(".weight") and is_embedding(n.removesuffix(".weight"))]
    return min(found, key=len) if found else None
