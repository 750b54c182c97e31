"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``).

It stays out of the way where nobody asked for it: no room is imported.
"""

from __future__ import annotations

import os

from loader.types import CONFIG_VARIABLE


def register() -> None:
    """Let this process's vLLM fetch adapters, where ``podloader serve`` asked for it."""
    if config := os.environ.get(CONFIG_VARIABLE):
        from loader.pod.live_adapters import teach_vllm

        teach_vllm(config)
