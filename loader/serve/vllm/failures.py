"""vLLM's failures at its start as podloader's error."""

from __future__ import annotations

from collections.abc import Mapping

from loader.errors import EngineError
from loader.serve.machine import read_machine
from loader.serve.room import describe_short, engine_room
from loader.serve.vllm.caches import unwritable_cache
from loader.serve.vllm.releases import RANGE


def import_failure(error: ImportError) -> EngineError:
    """Return the error for a vLLM that cannot be imported."""
    return EngineError(
        "vLLM cannot be imported",
        got=str(error),
        next_step=f"install vllm{RANGE}, or set engine: transformers",
    )


def start_failure(error: Exception, where: str, args: Mapping[str, object]) -> EngineError:
    """Return the error for an engine over the model in *where* that did not come up.

    *args* are vLLM's, by their names in ``engine_args``.
    """
    short = [room for room in engine_room("vllm", args, 0, read_machine()) if room.is_short]
    return EngineError(
        "vLLM did not start",
        where=where,
        got=f"{type(error).__name__}: {error}",
        problems=[*filter(None, [unwritable_cache()]), *map(describe_short, short)],
        next_step="the engine's own log lines above name the cause; memory is set by "
        "engine_args gpu_memory_utilization and max_model_len, without a GPU by "
        "VLLM_CPU_KVCACHE_SPACE, too",
    )
