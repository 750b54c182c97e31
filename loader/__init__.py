"""podloader: from training-checkpoint storage to a model that answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loader.nodes.together import prepare_on_ray as prepare_on_ray
    from loader.pod.live_adapters import LiveAdapters as LiveAdapters
    from loader.serve.vllm.inprocess import VLLMModel as VLLMModel
    from loader.truss.checkpoints import fetch_checkpoints as fetch_checkpoints
    from loader.truss.hook import TrussModel as TrussModel

__version__ = "0.1.0"

_ROOMS = {
    "LiveAdapters": "loader.pod.live_adapters",
    "TrussModel": "loader.truss.hook",
    "VLLMModel": "loader.serve.vllm.inprocess",
    "fetch_checkpoints": "loader.truss.checkpoints",
    "prepare_on_ray": "loader.nodes.together",
}


def __getattr__(name: str) -> object:
    """Import a name when it is asked for: ``import loader`` itself costs nothing."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'loader' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_ROOMS[name]), name)
