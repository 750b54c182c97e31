"""Which files of a model's folder an engine needs: no weights twice. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SIDE_FILE = re.compile(
    r"[^/]+\.(json|txt|model|jinja|tiktoken|py)|additional_chat_templates/[^/]+\.jinja"
)
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_PICKLE = re.compile(r"(pytorch_model|model)(-\d{5,}-of-\d{5,})?\.bin")


def side_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return configs, tokenizers, templates and code."""
    return tuple(sorted(name for name in names if _SIDE_FILE.fullmatch(name)))


def weight_files(names: Iterable[str], *, allow_pickle: bool = False) -> tuple[str, ...]:
    """Return the weights, once: ``model.safetensors``, its shards, or others beside the config.

    Repositories hold them again as ``original/``, ``consolidated.safetensors``, in other precisions
    or pickled. Pickles are taken only where there is nothing else and *allow_pickle* is set.
    """
    beside = sorted(name for name in names if "/" not in name)
    if _WHOLE in beside:
        return (_WHOLE,)
    shards = tuple(name for name in beside if _SHARD.fullmatch(name))
    if shards and _INDEX in beside:
        return shards
    others = tuple(name for name in beside if name.endswith(".safetensors"))
    pickles = tuple(name for name in beside if _PICKLE.fullmatch(name))
    return others or (pickles if allow_pickle else ())
