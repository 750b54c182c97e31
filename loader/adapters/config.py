"""What an adapter says of itself in ``adapter_config.json``, as PEFT 0.21 reads it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeGuard

from loader.adapters.module_patterns import (
    check_suffix,
    check_whole,
    matches_suffix,
    pattern_problem,
)
from loader.errors import AdapterError
from loader.weights.inspect import ADAPTER_CONFIG, read_json

# vllm/lora/peft_helper.py: initialisations that leave the base as it is.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga", "true", "false")
# Features whose presence changes what the tensors mean; neither vLLM nor a merge honours them.
_FOREIGN = {
    "alora_invocation_tokens": "activated LoRA (aLoRA)",
    "layer_replication": "layer_replication",
    "use_bdlora": "block-diagonal LoRA (BD-LoRA)",
    "use_qalora": "QALoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_MOST_RANK = 1 << 20
_MOST_PATTERNS = 10_000
_MOST_ALPHA = 3e38  # float32's
MERGEABLE_TYPES = ("LORA", "LOHA", "LOKR", "IA3", "VERA")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of one adapter; ``extra`` is the whole JSON object."""

    folder: Path
    peft_type: str
    base_model: str | None
    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    fan_in_fan_out: bool
    bias: str
    use_dora: bool
    lora_bias: bool
    extra: Mapping[str, object]

    def rank_of(self, module: str) -> int:
        """Return the rank that the config gives to *module*, a dotted path in the base."""
        return int(_match(self.rank_pattern, module, self.rank))

    def alpha_of(self, module: str) -> float:
        """Return the alpha that the config gives to *module*."""
        return _match(self.alpha_pattern, module, self.alpha)

    def scaling_of(self, module: str) -> float:
        """Return what B·A is multiplied by: alpha/r, with rsLoRA alpha/sqrt(r).

        Source: peft ``tuners/lora/layer.py``, ``update_layer``.
        """
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)

    @property
    def max_rank(self) -> int:
        """The largest rank that the config names, as vLLM counts it."""
        return max([self.rank, *self.rank_pattern.values()])

    def check_patterns(self, modules: Sequence[str]) -> None:
        """Raise AdapterError where PEFT or vLLM would match *modules* with a pattern for ever."""
        for pattern in {**self.rank_pattern, **self.alpha_pattern}:
            check_suffix(pattern, modules)
        for key in ("target_modules", "exclude_modules"):
            if isinstance(whole := self.extra.get(key), str):
                check_whole(whole, modules)

    def may_be_over(self, base: Path) -> bool:
        """Return whether the base that the config names, where it does, is called like *base*."""
        named = (self.base_model or "").rstrip("/").rpartition("/")[2]
        return not named or named in str(base)

    def attach_obstacles(self) -> tuple[str, ...]:
        """Return why vLLM's ``PEFTHelper`` would refuse this adapter; empty when it would not."""
        if self.peft_type != "LORA":
            return (f"it is {self.peft_type}, vLLM attaches LoRA only",)
        found = self._foreign_features()
        heads = [m for m in self.modules_to_save if m not in ("classifier", "score")]
        if heads:
            found.append(f"modules_to_save ({', '.join(heads)})")
        if self.extra.get("trainable_token_indices"):
            found.append("trainable_token_indices")
        if self.use_dora:
            found.append("DoRA")
        if self.lora_bias:
            found.append("lora_bias")
        if self.bias != "none":
            found.append(f"bias: {self.bias}")
        return tuple(found)

    def merge_obstacles(self) -> tuple[str, ...]:
        """Return why this adapter cannot be folded into weights; empty when it can."""
        if self.peft_type not in MERGEABLE_TYPES:
            return (f"{self.peft_type} does not fold into weights here",)
        return tuple(self._foreign_features())

    def _foreign_features(self) -> list[str]:
        found = [text for key, text in _FOREIGN.items() if self.extra.get(key)]
        init = self.extra.get("init_lora_weights", True)
        if isinstance(init, str) and init.lower() not in _PLAIN_INITS:
            found.append(
                f"init_lora_weights: {init}, which changes the base (convert it with PEFT)"
            )
        return found


def is_adapter(folder: Path) -> bool:
    """Return whether what lies in *folder* calls itself an adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Return the settings of the adapter in *folder*.

    Raises:
        AdapterError: no ``adapter_config.json``, or values that PEFT would refuse (all listed).
        FormatError: it is no JSON object.
    """
    path = folder / ADAPTER_CONFIG
    if not is_adapter(folder):
        raise AdapterError(
            "missing adapter_config.json",
            where=str(folder),
            expected=ADAPTER_CONFIG,
            got=", ".join(sorted(p.name for p in folder.glob("*"))[:10]) or "nothing",
            next_step="fetch the adapter's whole folder",
        )
    return parse_adapter_config(read_json(path), folder)


def parse_adapter_config(values: Mapping[str, object], folder: Path) -> AdapterConfig:
    """Return the settings in *values*, the content of ``adapter_config.json``.

    Raises:
        AdapterError: values that PEFT would refuse (all are listed).
    """
    problems: list[str] = []
    peft_type = str(values.get("peft_type") or "").upper()
    if not peft_type:
        problems.append("peft_type: missing")
    rank = values.get("r", 8 if peft_type != "IA3" else 1)
    alpha = values.get("lora_alpha", values.get("alpha", 8))
    if peft_type in ("", *MERGEABLE_TYPES):  # to others, such as OFT, ``r`` means something else
        if not _is_rank(rank):
            problems.append(f"r: expected a positive whole number, got {reprlib.repr(rank)}")
        if _as_number(alpha) is None:
            problems.append(f"lora_alpha: expected a number, got {reprlib.repr(alpha)}")
    config = AdapterConfig(
        folder=folder,
        peft_type=peft_type,
        base_model=_text(values.get("base_model_name_or_path")),
        rank=rank if _is_rank(rank) else 1,
        alpha=_as_number(alpha) or 0.0,
        use_rslora=bool(values.get("use_rslora")),
        rank_pattern={k: int(v) for k, v in _pattern(values, "rank_pattern", problems).items()},
        alpha_pattern=_pattern(values, "alpha_pattern", problems),
        target_parameters=_names(values.get("target_parameters")),
        modules_to_save=_names(values.get("modules_to_save")),
        fan_in_fan_out=bool(values.get("fan_in_fan_out")),
        bias=str(values.get("bias") or "none"),
        use_dora=bool(values.get("use_dora")),
        lora_bias=bool(values.get("lora_bias")),
        extra=MappingProxyType(dict(values)),
    )
    if problems:
        raise AdapterError(
            "adapter_config.json with values that PEFT refuses",
            where=str(folder / ADAPTER_CONFIG),
            problems=problems,
            next_step="save the adapter again with PEFT's save_pretrained",
        )
    return config


def _match(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the value of the first key that is a suffix of *module* from a dot on.

    Source: peft ``utils/other.py``, ``get_pattern_key``; keys are regular expressions.
    """
    for key, value in pattern.items():
        if matches_suffix(key, module):
            return value
    return default


def _pattern(values: Mapping[str, object], key: str, problems: list[str]) -> dict[str, float]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        problems.append(f"{key}: expected a map, got {reprlib.repr(found)}")
        return {}
    if len(found) > _MOST_PATTERNS:  # each is matched with every module
        problems.append(f"{key}: more than {_MOST_PATTERNS} entries")
        return {}
    for name, value in found.items():
        if problem := pattern_problem(name):
            problems.append(f"{key}: {reprlib.repr(name)} is {problem}")
        is_rank = key == "rank_pattern"
        if _as_number(value) is None or (is_rank and not _is_rank(value)):
            problems.append(
                f"{key}: {reprlib.repr(name)}: expected a positive number, got "
                f"{reprlib.repr(value)}"
            )
    return found if not problems else {}


def _is_rank(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value <= _MOST_RANK


def _as_number(value: object) -> float | None:
    """Return a number that float32 holds, too; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= _MOST_ALPHA else None


def _text(value: object) -> str | None:
    return str(value) if value else None


def _names(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    return tuple(map(str, value)) if isinstance(value, list) else ()
