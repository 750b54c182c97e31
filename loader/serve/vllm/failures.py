"""vLLM's failures at its start as podloader's error."""

from __future__ import annotations

from loader.errors import EngineError
from loader.serve.vllm.caches import unwritable_cache
from loader.serve.vllm.releases import RANGE


def import_failure(error: ImportError) -> EngineError:
    """Return the error for a vLLM that cannot be imported."""
    return EngineError(
        "vLLM cannot be imported",
        got=str(error),
        next_step=f"install vllm{RANGE}, or set engine: transformers",
    )


def start_failure(error: Exception, where: str) -> EngineError:
    """Return the error for an engine over the model in *where* that did not come up."""
    return EngineError(
        "vLLM did not start",
        where=where,
        got=f"{type(error).__name__}: {error}",
        problems=[why] if (why := unwritable_cache()) else [],
        next_step="the engine's own log lines above name the cause; memory is set by "
        "engine_args gpu_memory_utilization and max_model_len, without a GPU by "
        "VLLM_CPU_KVCACHE_SPACE, too",
    )
