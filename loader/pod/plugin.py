"""What vLLM calls in each of its processes (entry point ``vllm.general_plugins``).

It stays out of the way where nobody asked for it: no room is imported.
"""

from __future__ import annotations

import os

from loader.types import CONFIG_VARIABLE, PROVE_VARIABLE


def register() -> None:
    """Let this process's vLLM prove adapters and fetch them, where podloader asked for it."""
    if os.environ.get(PROVE_VARIABLE):
        from loader.serve.vllm.bound import prove_adapters

        prove_adapters()
    if config := os.environ.get(CONFIG_VARIABLE):
        from loader.pod.live_adapters import teach_vllm

        teach_vllm(config)
