"""What a base is for, where that decides what may happen to its adapters.

An adapter that is attached has to change an answer before the server is ready, and the prompt that
proves it is text to be gone on with. Models of another task get their adapters merged: vLLM takes
a LoRA of Whisper, say, and dies at the first transcription.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loader.adapters.attach import Decision, NamedAdapter, Policy
from loader.errors import AdapterError
from loader.json_text import parse_json
from loader.weights.inspect import MODULES

_OTHER_TASKS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForRewardModel",
    "ForSpeechSeq2Seq",
    "ForCTC",
)
_TALKING_MODELS = ("LMHeadModel", "ChatModel", "ChatGLMModel")


def goes_on_with_text(config: Mapping[str, object]) -> bool:
    """Return whether the model of a config.json answers a text by going on with it."""
    if config.get("is_encoder_decoder") or config.get("model_type") == "whisper":
        return False
    named = config.get("architectures")
    for name in map(str, named if isinstance(named, list) else ()):
        is_bare = name.endswith("Model") and not name.endswith(_TALKING_MODELS)
        if name.endswith(_OTHER_TASKS) or is_bare:
            return False
    return True


def is_pooled(folder: Path | None, engine_args: Mapping[str, object]) -> bool:
    """Return whether vLLM makes embeddings or classes of the model in *folder*, whatever its class.

    Source: vllm ``config/model.py``, ``_get_default_runner_type``.
    """
    asked = {str(engine_args.get(key) or "auto") for key in ("runner", "convert", "task")}
    if asked - {"auto", "none"}:
        return "generate" not in asked
    modules = folder / MODULES if folder else None
    if modules is None or not modules.is_file():
        return False
    try:
        parts = parse_json(modules.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # the engine says more about it
    found = parts if isinstance(parts, list) else []
    types = [str(part.get("type")) for part in found if isinstance(part, dict)]
    return any(name.endswith("Pooling") for name in types)


def decide_for_base(
    decision: Decision,
    policy: Policy,
    adapters: list[NamedAdapter],
    config: Mapping[str, object],
    *,
    pooled: bool = False,
) -> Decision:
    """Return *decision*, or to merge where nothing could prove that attached adapters work.

    Raises:
        AdapterError: the policy is to attach, or there are several of them.
    """
    if decision.mode == "merge" or (goes_on_with_text(config) and not pooled):
        return decision
    kind = str(config.get("model_type") or config.get("architectures"))
    if policy == "attach" or len(adapters) > 1:
        raise AdapterError(
            "adapters over a model of another task than text, which are not attached",
            problems=[adapter.name for adapter in adapters],
            got=kind,
            expected="one adapter, to be merged",
            next_step="serve it alone from the start, with adapter_policy: auto",
        )
    kind = f"{kind}, pooled," if pooled else kind
    return Decision("merge", f"merge: nothing proves an attached adapter of {kind} to work")
