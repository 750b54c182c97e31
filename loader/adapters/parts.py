"""The names in an adapter's weight file: ``base_model.model.<module>.<part>``, taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

_PREFIX = re.compile(r"^base_model\.model\.")
# Tensors of PEFT 0.21's methods; ".default" is left in files that no save_pretrained wrote.
_PART = re.compile(
    r"^(?P<module>.+?)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector"
    r"|hada_(?:t1|t2|w[12]_[ab])|lokr_(?:t2|w[12](?:_[ab])?)|ia3_l|vera_lambda_[bd])"
    r"(?:\.default)?(?P<leaf>\.weight|\.bias)?$"
)
_TOKENS = re.compile(r"^(?P<module>.+?)\.(?:token_adapter\.)?trainable_tokens_delta(?:\.default)?$")
_WHOLE = re.compile(
    r"^(?P<module>.+?)(?:\.token_adapter)?"
    r"(?:\.(?P<holder>base_layer|original_module|modules_to_save)(?:\.default)?)?"
    r"\.(?P<leaf>[^.]+)$"
)
# A module may be saved several times over, under the names of its holders: the last one counts.
_HOLDERS = ("original_module", "base_layer", "modules_to_save", None)
_SHARED = re.compile(r"^base_model\.(vera_[AB])(?:\.default)?$")


@dataclass(frozen=True, slots=True)
class ModuleParts:
    """The adapter's tensors for one module: parts by PEFT's name of them, whole ones by leaf.

    ``spare`` are copies of the whole ones that count for nothing.
    """

    module: str
    parts: Mapping[str, str]
    whole: Mapping[str, str]
    spare: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """All tensors of an adapter by module; ``shared`` are those that all modules use (VeRA)."""

    modules: tuple[ModuleParts, ...]
    shared: Mapping[str, str]


def group_parts(names: Iterable[str]) -> AdapterParts:
    """Return the tensors called *names*, by the module that they belong to."""
    parts: dict[str, dict[str, str]] = {}
    held: dict[str, dict[str, dict[str | None, str]]] = {}
    shared: dict[str, str] = {}
    for name in sorted(names):
        if match := _SHARED.match(name):
            shared[match[1]] = name
            continue
        plain = _PREFIX.sub("", name)
        if match := _PART.match(plain):
            leaf = ".bias" if match["leaf"] == ".bias" else ""
            parts.setdefault(match["module"], {})[match["part"] + leaf] = name
        elif match := _TOKENS.match(plain):
            parts.setdefault(match["module"], {})["tokens"] = name
        elif match := _WHOLE.match(plain):
            leaves = held.setdefault(match["module"], {})
            leaves.setdefault(match["leaf"], {})[match["holder"]] = name
        else:
            held.setdefault(plain, {})[""] = {None: name}
    modules = tuple(
        _gather(module, parts.get(module, {}), held.get(module, {}))
        for module in sorted({*parts, *held})
    )
    return AdapterParts(modules, MappingProxyType(shared))


def _gather(
    module: str, parts: Mapping[str, str], held: Mapping[str, Mapping[str | None, str]]
) -> ModuleParts:
    whole, spare = {}, []
    for leaf, copies in held.items():
        *rest, whole[leaf] = [copies[holder] for holder in _HOLDERS if holder in copies]
        spare += rest
    return ModuleParts(module, MappingProxyType(dict(parts)), MappingProxyType(whole), tuple(spare))
