"""What a model calls its tensors, asked of transformers: the model is built without weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loader.errors import ConfigError, FormatError, UnsupportedError
from loader.import_lock import importing
from loader.weights.inspect import read_json
from loader.weights.meta_models import build_on_meta, check_counts, read_model_config


@dataclass(frozen=True, slots=True)
class ModelNames:
    """A model's parameters and persistent buffers: name -> shape, in the model's own order.

    ``tied`` names a tensor and the one it is the same as; ``droppable`` are names that old
    checkpoints hold and the model makes by itself; ``prefix`` is the inner model's ("model").
    """

    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, str] = field(default_factory=dict)
    droppable: frozenset[str] = frozenset()
    droppable_patterns: tuple[re.Pattern[str], ...] = ()
    prefix: str = ""

    def is_droppable(self, name: str) -> bool:
        """Return whether the model makes this tensor by itself."""
        return name in self.droppable or any(p.search(name) for p in self.droppable_patterns)

    def to_json(self) -> dict[str, object]:
        """Return it in JSON's types."""
        return {
            "shapes": dict(self.shapes),
            "tied": dict(self.tied),
            "droppable": sorted(self.droppable),
            "droppable_patterns": [pattern.pattern for pattern in self.droppable_patterns],
            "prefix": self.prefix,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelNames:
        """Return what ``to_json`` was called on."""
        return cls(
            MappingProxyType({name: tuple(shape) for name, shape in fields["shapes"].items()}),
            MappingProxyType(fields["tied"]),
            frozenset(fields["droppable"]),
            tuple(re.compile(pattern) for pattern in fields["droppable_patterns"]),
            fields["prefix"],
        )


def read_model_names(folder: Path) -> ModelNames:
    """Return the names of the model that ``config.json`` in *folder* describes.

    Raises:
        UnsupportedError: transformers does not know the architecture, or it needs code of its own.
        ConfigError: transformers is not installed.
    """
    try:
        check_counts(read_json(folder / "config.json"))
        with importing:
            config = read_model_config(folder, trust_remote_code=False)
        model = build_on_meta(config)
    except FormatError:
        raise
    except ImportError as error:
        raise ConfigError(
            "the checkpoint's tensor names cannot be checked without transformers",
            got=str(error).splitlines()[0],
            next_step="pip install accelerate peft transformers",
        ) from error
    except Exception as error:  # a config may fail in as many ways as there are models
        raise UnsupportedError(
            "a config.json of which transformers makes no model",
            where=str(folder / "config.json"),
            expected="an architecture of transformers itself",
            got=f"{type(error).__name__}: {error}"[:300],
            next_step="save the model with save_pretrained in the training job",
        ) from error
    state = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()} - set(state)
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return ModelNames(
        MappingProxyType({name: tuple(t.shape) for name, t in state.items()}),
        MappingProxyType(dict(getattr(model, "all_tied_weights_keys", None) or {})),
        frozenset(buffers),
        tuple(re.compile(pattern) for pattern in sorted(patterns)),
        model.base_model_prefix or "",
    )
