"""transformers' classes, built without weights from configs that anybody may have written.

No code of a checkpoint runs, nothing is fetched, and a config that asks for a billion layers is
refused before they are made.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loader.import_lock import importing

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_MOST_MODULES = 1_000_000  # DeepSeek-V3 has 60,000
_MOST_COUNTED = 100_000
_COUNT = re.compile(r"layer|block|depth|expert|head|stage|group|loops?_num|num_")


def read_model_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Return transformers' config of the model in *folder*, without its wishes for kernels."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    drop_wishes(config)
    return config


def drop_wishes(config: PretrainedConfig) -> None:
    """Take out of *config* which implementations are to compute attention and experts.

    One may be of the Hub's kernels, whose code is then fetched and run. ``save_pretrained`` writes
    none: they say nothing about the weights.
    """
    config._attn_implementation = config._experts_implementation = None


def check_counts(config: Mapping[str, object]) -> None:
    """Raise ValueError where a ``config.json`` wants more of something than any model has."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value)
        elif type(value) is int and value > _MOST_COUNTED and _COUNT.search(key):
            raise ValueError(f"{key} is {str(value)[:40]}")


def build_on_meta(config: PretrainedConfig) -> PreTrainedModel:
    """Return the model that *config* is of, on the meta device.

    Raises:
        Exception: whatever a class has against its config.
    """
    with importing:
        import torch
        import transformers

        drop_wishes(config)
        names = config.architectures
        name = str(names[0]) if isinstance(names, list) and names else ""
        found = getattr(transformers, name, None)  # which imports the model's own module
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            found = None
        auto = transformers.AutoModelForCausalLM
        if type(config) not in auto._model_mapping:
            auto = transformers.AutoModel
    with _counted_modules(), torch.device("meta"):
        if found is not None:
            return found(config)
        return auto.from_config(config, trust_remote_code=False)


@contextlib.contextmanager
def _counted_modules() -> Iterator[None]:
    """Let this thread make no more modules than any model has."""
    from torch.nn.modules.module import register_module_module_registration_hook

    thread, made = threading.get_ident(), 0

    def count(*_: object) -> None:
        nonlocal made
        made += threading.get_ident() == thread
        if made > _MOST_MODULES:
            raise ValueError(f"more than {_MOST_MODULES} modules")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
