"""LoRA on stacked experts (PEFT's ``target_parameters``): which parameter, which orientation.

PEFT wraps a module once for each of its parameters, so the tensors of all but the last are named
``<module>.base_layer…``: the first parameter of the module is the innermost. Source: peft
``tuners/lora/layer.py``, ``ParamWrapper``, and ``tuners/tuners_utils.py``, ``_inject_parameters``.
"""

from __future__ import annotations

from dataclasses import replace

from loader.adapters.edits import ExpertLowRank
from loader.adapters.parts import ModuleParts
from loader.adapters.plan_builder import Draft, Place
from loader.weights.architecture import Piece


def plan_experts(draft: Draft, module: ModuleParts) -> None:
    """Take the edits of one stacked parameter into *draft*, or say why they do not fit."""
    a, b = module.parts["lora_A"], module.parts["lora_B"]
    path, depth = module.module, 0
    while path.endswith(".base_layer"):
        path, depth = path.removesuffix(".base_layer"), depth + 1
    place = _find_parameter(draft, path, depth)
    if place is None:
        draft.blame(f"no target_parameters entry names a parameter of {path}", a, b)
        return
    shape_a, shape_b = draft.tensors[a].shape, draft.tensors[b].shape
    name = f"{path}.{place.name.rpartition('.')[2]}"
    rank, experts = draft.config.rank_of(name), place.shape[0]
    if shape_a[0] != rank * experts or shape_b[1] != rank * experts:
        draft.blame(f"{shape_a} and {shape_b} are not {experts} experts of rank {rank}", a, b)
        return
    architecture = draft.base.architecture
    assert architecture is not None
    turned = place.name.rpartition(".")[0] in architecture.transposed
    inner = (shape_a[1], shape_b[0]) if turned else (shape_b[0], shape_a[1])
    if place.shape != (experts, *inner):
        draft.blame(f"change {(experts, *inner)}, the base has {place.shape}", a, b)
    elif not place.pieces:
        draft.leave(f"the base stores {place.name} in a layout of its own", a, b)
    else:
        edit = ExpertLowRank("", a, b, draft.config.scaling_of(name), experts, turned)
        for piece in place.pieces:
            draft.take(_cut(edit, piece))


def _cut(edit: ExpertLowRank, piece: Piece) -> ExpertLowRank:
    transposed = edit.transposed is not piece.turned
    made = replace(edit, target=piece.tensor, transposed=transposed)
    if piece.expert is None:
        return made
    end = piece.offset + piece.end - piece.start
    return replace(made, expert=piece.expert, start=piece.offset, end=end)


def _find_parameter(draft: Draft, path: str, depth: int) -> Place | None:
    """Return the stacked parameter of the module *path* that is wrapped at *depth* from outside."""
    architecture = draft.base.architecture
    if architecture is None:
        return None
    owner = architecture.find_module(path)
    wanted = []
    for name in architecture.shapes:
        own, _, parameter = name.rpartition(".")
        full = f"{path}.{parameter}"
        if own == owner and any(
            full == key or full.endswith(f".{key}") for key in draft.config.target_parameters
        ):
            wanted.append(parameter)
    return draft.find(path, wanted[-1 - depth]) if depth < len(wanted) else None
