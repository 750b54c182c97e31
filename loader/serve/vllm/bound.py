"""Which tensors of an adapter vLLM would use: it leaves out in silence what it has no layer for.

Told twice by vLLM's own code. Before anything is loaded, over the model built on the meta device in
a process that ends with the answer (``ask_unbound``): so an adapter can be merged in time. And by
every worker, of every adapter that it takes, at the start or while it serves (``prove_adapters``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from loader.json_text import parse_json

Names = Mapping[str, Sequence[str]]
"""The names of an adapter's tensors, by the adapter's."""

Reason = tuple[str, bool]
"""Why vLLM would not use all of it, and whether that is sure: a model may fail to be built."""

_STACKED = ".base_layer"  # the first parameter of stacked experts, as PEFT wraps them
_TOWERS = "enable_tower_connector_lora"


def find_unbound(lora_manager: Any, modules: Iterable[str]) -> list[str]:
    """Return those of *modules*, as vLLM calls them, that no wrapped layer of it takes.

    Layers of another pipeline stage are another worker's.
    """
    wrapped = lora_manager.modules
    packed = {member for members in lora_manager.packed_modules.values() for member in members}
    elsewhere = tuple(
        f"{name}."
        for name, module in lora_manager.model.named_modules()
        if type(module).__name__ == "PPMissingLayer"
    )
    names = set(modules)

    def is_bound(name: str) -> bool:
        spelled = {name, f"model.{name}"} if lora_manager.is_pooling_model else {name}
        owner = name.removesuffix(_STACKED)
        kind = type(wrapped.get(owner)).__name__
        if kind.startswith("FusedMoE"):
            both = {owner, owner + _STACKED} <= names
            return both and kind == "FusedMoE3DWithLoRA"
        return bool(spelled & packed or any(n in wrapped for n in spelled))

    return sorted(n for n in names if not is_bound(n) and not f"{n}.".startswith(elsewhere))


def prove_adapters() -> None:
    """Let the workers of this process refuse every adapter that they would use in part."""
    from loader.serve.vllm.private import WorkerLoRAManager

    load = WorkerLoRAManager._load_adapter
    if getattr(load, "proves", False):
        return

    def load_proved(self: Any, lora_request: Any) -> Any:
        loaded_lora = load(self, lora_request)
        unbound = find_unbound(self._adapter_manager, loaded_lora.loras)
        if unbound:
            raise ValueError(
                f"vLLM has no layer for {len(unbound)} of {len(loaded_lora.loras)} modules of "
                f"{lora_request.lora_path}, and would leave them out: {', '.join(unbound[:5])}"
            )
        return loaded_lora

    load_proved.proves = True  # type: ignore[attr-defined]
    WorkerLoRAManager._load_adapter = load_proved


def ask_unbound(
    model: Path, engine_args: Mapping[str, object], adapters: Names
) -> dict[str, Reason]:
    """Return why vLLM would not use all of an adapter, by its name; none where it would.

    *model* is a folder with a ``config.json``. In a process with vLLM imported and no threads: what
    vLLM builds, it builds in a fork of it.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)  # vLLM's log lines would look like those of the engine itself
            found = _tell_unbound(model, engine_args, adapters)
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"[:300]
            found = dict.fromkeys(adapters, (text, type(error).__name__ == "NoLoRAError"))
        with os.fdopen(writer, "w") as answer:
            json.dump(found, answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    if not text:
        return dict.fromkeys(adapters, ("its model cannot be built", False))
    return read_reasons(parse_json(text))


def read_reasons(found: Mapping[str, Sequence[Any]]) -> dict[str, Reason]:
    """Return what came through JSON."""
    return {name: (str(text), bool(certain)) for name, (text, certain) in found.items()}


def _tell_unbound(
    model: Path, engine_args: Mapping[str, object], adapters: Names
) -> dict[str, Reason]:
    import torch

    from loader.serve.vllm.private import (
        LoRAModelManager,
        built_on_meta,
        parse_fine_tuned_lora_name,
    )

    towers = bool(engine_args.get(_TOWERS))
    with built_on_meta(model, towers=towers) as (vllm_config, built):
        lora_manager = LoRAModelManager(
            built,
            1,
            8,
            vllm_config.model_config.get_vocab_size(),
            vllm_config.lora_config,
            torch.device("meta"),
            vllm_config,
        )
        mapper = getattr(built, "hf_to_vllm_mapper", None)
        mapper = mapper and mapper.get_rename_mapper()
        found = {}
        for adapter, names in adapters.items():
            parts = [name for name in names if ".lora_" in name]
            modules = {parse_fine_tuned_lora_name(name, mapper)[0] for name in parts}
            if unbound := find_unbound(lora_manager, modules):
                shown = ", ".join(unbound[:3]) + (", …" if len(unbound) > 3 else "")
                text = f"{len(unbound)} modules that it would leave out ({shown})"
                found[adapter] = (text, True)
        return found
