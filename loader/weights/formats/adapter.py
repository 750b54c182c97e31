"""A sharded checkpoint that holds a LoRA: from the trainer's names to those of a PEFT adapter.

::

    <lead>base_model.model.<module>.lora_A.<adapter>.weight      in the model while it is trained
          base_model.model.<module>.lora_A.weight                in adapter_model.safetensors

Source of the names: peft/utils/save_and_load.py, ``get_peft_model_state_dict``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from loader.errors import CheckpointError, UnsupportedError
from loader.weights.formats.tensor_names import is_of_model, strip_wrappers
from loader.weights.inspect import ADAPTER_CONFIG, read_json

_ROOT = "base_model.model."
_LORA = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)"
    r"(\.(?!weight$)(?P<adapter>[^.]+))?(?P<weight>\.weight)?$"
)
_SAVED = re.compile(r"\.modules_to_save\.(?P<adapter>[^.]+)\.")
_TOKENS = re.compile(r"\.(trainable_tokens_delta)\.(?P<adapter>[^.]+)$")
_PARTNERS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


def has_adapter(names: Iterable[str]) -> bool:
    """Return whether any of a checkpoint's tensors is a LoRA's."""
    return any(_LORA.search(name) for name in names if is_of_model(name))


def match_adapter(
    found: Mapping[str, tuple[int, ...]], sidecars: Mapping[str, Path], where: str
) -> Mapping[str, str]:
    """Return name in ``adapter_model.safetensors`` -> name in the checkpoint.

    Frozen weights of the base model that were saved along are left out.

    Raises:
        CheckpointError: no adapter_config.json, or matrices without their partner (all listed).
        UnsupportedError: several adapters, or trained biases.
    """
    if ADAPTER_CONFIG not in sidecars:
        raise CheckpointError(
            "a sharded LoRA without its adapter_config.json",
            where=where,
            expected=f"{ADAPTER_CONFIG} on some rank: the tensors do not tell lora_alpha",
            next_step="save it in the training job with model.peft_config['default']"
            ".save_pretrained(folder)",
        )
    config = read_json(sidecars[ADAPTER_CONFIG])
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            "a sharded LoRA with trained biases",
            where=str(sidecars[ADAPTER_CONFIG]),
            expected='"bias": "none"',
            got=str(config.get("bias")),
            next_step="save the adapter with save_pretrained in the training job",
        )
    names: dict[str, str] = {}
    adapters: set[str] = set()
    for name in found:
        if is_of_model(name) and (renamed := _rename(strip_wrappers(name), adapters)):
            names[renamed] = name
    if len(adapters) > 1:
        raise UnsupportedError(
            "a sharded checkpoint of several adapters",
            where=where,
            expected="one adapter",
            got=", ".join(sorted(adapters)),
            next_step="save each adapter with save_pretrained in the training job",
        )
    if alone := sorted(_without_partner(names)):
        raise CheckpointError("a LoRA with holes", where=where, problems=alone)
    return MappingProxyType(names)


def _rename(name: str, adapters: set[str]) -> str | None:
    """Return the adapter's name of a tensor, None for the base model's; notes whose it is."""
    _, root, rest = name.partition(_ROOT)
    for pattern, kept in ((_LORA, r".\1\g<weight>"), (_SAVED, "."), (_TOKENS, r".\1")):
        if match := pattern.search(rest):
            adapters.add(match["adapter"])
            short = pattern.sub(kept, rest)
            # PEFT saves DoRA's vector without the suffix.
            return root + short.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    return None


def _without_partner(names: Mapping[str, str]) -> Iterable[str]:
    for name in names:
        for one, other in _PARTNERS.items():
            for this, that in ((one, other), (other, one)):
                partner = name.replace(f".{this}", f".{that}")
                if f".{this}" in name and partner not in names:
                    yield f"{partner}: missing beside {name}"
