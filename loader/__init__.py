"""podloader: from training-checkpoint storage to a model that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loader.checkpoints import fetch_checkpoints as fetch_checkpoints
    from loader.hook import TrussModel as TrussModel
    from loader.serve.vllm.inprocess import VLLMModel as VLLMModel

__version__ = "0.1.0"

_ROOMS = {
    "TrussModel": "loader.hook",
    "VLLMModel": "loader.serve.vllm.inprocess",
    "fetch_checkpoints": "loader.checkpoints",
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: ``import loader`` itself costs nothing."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'loader' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)
