"""vLLM's manager of adapters, in the engine's own processes, with one slot that stays empty.
And no adapter is taken in part (``bound``).

Each of those processes imports this module, as the ``worker_extension_cls`` that podloader's
arguments name. Where vLLM's own server runs, podloader's plugin does.
"""

from __future__ import annotations

from typing import Any

from loader.serve.vllm.bound import prove_adapters
from loader.serve.vllm.releases import is_cpu_build


class AdapterWorker:
    """What vLLM adds to its worker's class."""

    model_runner: Any

    def podloader_clean_cache(self) -> None:
        """Put zeros for what an adapter left that computes NaN or infinity.

        Attention multiplies by zero what lies behind a request's last token in its last block.
        """
        for cache in self.model_runner.kv_caches:
            if cache.is_floating_point():
                cache.nan_to_num_(0.0, 0.0, 0.0)


def keep_a_slot_empty() -> None:
    """Give every layer one slot more than adapters may take; a second call does nothing.

    vLLM's CPU kernels multiply a token that asks for no adapter by what is in the last slot, and
    a slot keeps its weights when its adapter leaves: https://github.com/vllm-project/vllm/pull/48421
    So the last one must never have had any, whichever way adapters come.
    """
    from loader.serve.vllm.private import LRUCacheLoRAModelManager, LRUCacheWorkerLoRAManager

    if LRUCacheWorkerLoRAManager._manager_cls is not LRUCacheLoRAModelManager:
        return

    class Manager(LRUCacheLoRAModelManager):  # type: ignore[misc]
        empty_slots = 0

        @property
        def lora_slots(self) -> Any:
            return super().lora_slots + self.empty_slots

        def _create_lora_modules(self) -> None:
            self.empty_slots = 1
            super()._create_lora_modules()
            self.empty_slots = 0

    LRUCacheWorkerLoRAManager._manager_cls = Manager


prove_adapters()
if is_cpu_build():
    keep_a_slot_empty()
