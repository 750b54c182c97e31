"""LoRA on stacked experts (PEFT's ``target_parameters``): which parameter, which orientation.

PEFT wraps a module once for each of its parameters, so the tensors of all but the last are named
``<module>.base_layer…``: the first parameter of the module is the innermost. Source: peft
``tuners/lora/layer.py``, ``ParamWrapper``, and ``tuners/tuners_utils.py``, ``_inject_parameters``.
"""

from __future__ import annotations

from loader.adapters.edits import ExpertLowRank
from loader.adapters.names import count_experts, find_experts, find_tensor
from loader.adapters.parts import ModuleParts
from loader.adapters.plan_builder import Draft

# The order in which every transformers 5 experts module declares its parameters.
_DECLARED = ("gate_up_proj", "up_proj", "down_proj")
# Modules that store (experts, in, out); transformers 5.19, @use_experts_implementation.
_TRANSPOSED_TYPES = ("gpt_oss", "openai_privacy_filter", "aria", "aria_text")


def plan_experts(draft: Draft, module: ModuleParts) -> None:
    """Take the edits of one stacked parameter into *draft*, or say why they do not fit."""
    a, b = module.parts["lora_A"], module.parts["lora_B"]
    path, parameter = _find_parameter(draft, module.module)
    if not parameter:
        draft.blame(f"no target_parameters entry names a parameter of {path}", a, b)
        return
    shape_a, shape_b = draft.tensors[a].shape, draft.tensors[b].shape
    name = f"{path}.{parameter}"
    rank = draft.config.rank_of(name)
    stack = find_tensor(draft.base.tensors, path, parameter)
    experts = draft.shape_of(stack)[0] if stack else count_experts(draft.base.tensors, path)
    if not experts or shape_a[0] != rank * experts or shape_b[1] != rank * experts:
        draft.blame(f"{shape_a} and {shape_b} are not {experts} experts of rank {rank}", a, b)
        return
    scaling = draft.config.scaling_of(name)
    if stack:
        turned = draft.base.model_type in _TRANSPOSED_TYPES
        inner = (shape_a[1], shape_b[0]) if turned else (shape_b[0], shape_a[1])
        if draft.shape_of(stack) != (experts, *inner):
            have = draft.shape_of(stack)
            draft.blame(f"change {(experts, *inner)}, the base has {have}", a, b)
            return
        draft.add(ExpertLowRank(stack, a, b, scaling, experts, turned))
        return
    slices = find_experts(draft.base.tensors, path, parameter, experts)
    for piece in slices:
        height = shape_b[0] // piece.parts
        have = draft.shape_of(piece.name)
        if have != (height, shape_a[1]):
            draft.blame(f"change {(height, shape_a[1])} of {piece.name}, which is {have}", a, b)
            return
        start = piece.part * height
        expert = (piece.expert, start, start + height)
        draft.add(ExpertLowRank(piece.name, a, b, scaling, experts, False, *expert))
    if not slices:
        draft.blame(f"the base has no {name}", a, b)


def _find_parameter(draft: Draft, module: str) -> tuple[str, str]:
    """Return the experts module and which of its parameters the tensors of *module* mean."""
    path = module
    depth = 0
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
        depth += 1
    found = set()
    for target in draft.config.target_parameters:
        owner, _, parameter = target.rpartition(".")
        if path == owner or path.endswith(f".{owner}") or not owner:
            found.add(parameter)
    if not found <= set(_DECLARED) and len(found) > 1:
        return path, ""
    ordered = sorted(found, key=lambda p: _DECLARED.index(p) if p in _DECLARED else 0)
    return path, ordered[-1 - depth] if depth < len(ordered) else ""
