"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``).

It stays out of the way where nobody asked for it: no room is imported.
"""

from __future__ import annotations

import os

from loader.types import CONFIG_VARIABLE, STREAM_VARIABLE


def register() -> None:
    """Let this process's vLLM follow weights and fetch adapters, where podloader started it so."""
    if os.environ.get(STREAM_VARIABLE):
        from loader.serve.vllm.streamed_weights import register_load_format

        register_load_format()
    if config := os.environ.get(CONFIG_VARIABLE):
        from loader.pod.live_adapters import teach_vllm

        teach_vllm(config)
