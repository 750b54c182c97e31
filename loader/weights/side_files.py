"""Which files beside a model's weights an engine reads: one rule for what is fetched and made."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from loader.weights.byte_files import regular_files

_SIDE_FILE = re.compile(
    r"[^/.][^/]*\.(json|txt|model(\.v\w+)?|jinja|tiktoken|py|bpe|spm|vocab|codes)"
    r"|additional_chat_templates/[^/]+\.jinja"
)
# What trainers say of their own runs; everything else of these sorts may be a server's.
_OF_TRAINERS = re.compile(
    r"(trainer_state|training_args|fsdp_config|metadata|[^/]*results)\.json"
    r"|zero_to_(fp32|torch)\.py|latest_checkpointed_iteration\.txt"
)
# What sentence-transformers puts behind a model, each part in a folder of its own: how it pools,
# and projections with weights of their own. modules.json names the folders.
_MODULES, _INDEX = "modules.json", ".index.json"
_PART = re.compile(r"[^/]+/config\.json|\d+_[^/]*/([^/]+\.json|model\.safetensors)")
_PICKLED_PART = re.compile(r"(?P<folder>\d+_[^/]*)/pytorch_model\.bin")


def is_side_file(name: str) -> bool:
    """Return whether a file of this name is a config, a tokenizer, a template, an index or code."""
    return bool(_SIDE_FILE.fullmatch(name)) and not _OF_TRAINERS.fullmatch(name)


def side_files(names: Iterable[str]) -> tuple[str, ...]:
    """Return configs, tokenizers, templates, code, and the parts that modules.json speaks of."""
    found = set(names)
    side = set(filter(is_side_file, found))
    if _MODULES in found:
        side |= {name for name in found if _PART.fullmatch(name)}
        pickled = filter(None, map(_PICKLED_PART.fullmatch, found))
        side |= {m[0] for m in pickled if f"{m['folder']}/model.safetensors" not in found}
    return tuple(sorted(side))


def list_side_files(
    folder: Path, leave_out: Callable[[str], bool] = lambda name: False
) -> dict[str, Path]:
    """Return those of a model's folder by name, but for indexes and what to *leave_out*.

    Raises:
        FormatError: one of them is no file.
    """
    paths = [path for pattern in ("*", "*/*") for path in folder.glob(pattern)]
    found = {path.relative_to(folder).as_posix(): path for path in paths}
    names = [n for n in side_files(found) if not n.endswith(_INDEX) and not leave_out(n)]
    return {p.relative_to(folder).as_posix(): p for p in regular_files(found[n] for n in names)}
