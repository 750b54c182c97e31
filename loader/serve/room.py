"""What an engine will want of this machine, beside what there is: known before a download.

Only the least is counted, so that what is refused would have failed: the weights as they are
served, and a floor beside them for the runtime and a first block of the KV cache.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loader.errors import EngineError
from loader.serve.machine import Machine, read_machine
from loader.serve.vllm.releases import is_cpu_build
from loader.units import show_bytes

_FLOOR_BYTES = 10**9
_UTILIZATION = 0.92  # vllm/config/cache.py, gpu_memory_utilization
_CPU_SPACE = "VLLM_CPU_KVCACHE_SPACE"  # vllm/platforms/cpu.py: in GiB, and over the argument
# vllm/distributed/device_communicators/shm_broadcast.py: a ring of so many chunks between the
# processes; and what NCCL takes beside it, for each of them.
_QUEUE_BYTES, _NCCL_BYTES = 10 * (16 << 20), 32 << 20
# With these, weights take another room than their files do, or lie elsewhere, but for the values.
_ELSEWHERE: Mapping[str, tuple[object, ...]] = {
    "quantization": (),
    "cpu_offload_gb": (),
    "hf_overrides": (),
    "load_format": ("auto", "safetensors"),
    "data_parallel_size": (1,),
    "enable_expert_parallel": (),
    "model_loader_extra_config": (),
    "offload_backend": (),
    "pipeline_parallel_size": (1,),
    "nnodes": (1,),
    "config": (),  # more arguments, in a file of vLLM's
}


@dataclass(frozen=True, slots=True)
class Room:
    """So much is needed, and so much is to be had, None where that is not known.

    ``is_sure``: with less the engine does not start, or the disk is full. ``folder``: whose disk.
    """

    what: str
    needed_bytes: int
    have_bytes: int | None
    why: str
    is_sure: bool = True
    folder: Path | None = None

    @property
    def is_short(self) -> bool:
        """Whether there is too little."""
        return self.have_bytes is not None and self.have_bytes < self.needed_bytes


def engine_room(
    engine: Literal["vllm", "transformers"],
    engine_args: Mapping[str, object],
    weight_bytes: int,
    machine: Machine,
) -> tuple[Room, ...]:
    """Return what *engine* will want for weights of *weight_bytes*, as they are served."""
    on_cpu = (engine == "vllm" and is_cpu_build()) or not machine.gpus
    if not on_cpu:
        return (*_gpu_room(engine_args, weight_bytes, machine), *_shared(engine_args, machine))
    if engine == "vllm" and not is_cpu_build():
        return ()  # made ready here, to be served elsewhere
    why = f"weights {show_bytes(weight_bytes)}, at least {show_bytes(_FLOOR_BYTES)} beside them"
    needed = weight_bytes + _FLOOR_BYTES
    return (
        Room("memory", needed, machine.memory_bytes, why, _are_whole(engine_args)),
        *(_free_room(engine_args, weight_bytes, machine) if engine == "vllm" else ()),
        *_shared(engine_args, machine),
    )


def _free_room(
    engine_args: Mapping[str, object], weight_bytes: int, machine: Machine
) -> Iterator[Room]:
    """Yield what has to be free where vLLM's CPU build starts; by then it may be more, or less.

    Source: vllm/v1/worker/cpu_worker.py.
    """
    if machine.node is None:
        return
    total = machine.node.memory_bytes
    share = engine_args.get("gpu_memory_utilization", _UTILIZATION)
    given = engine_args.get("kv_cache_memory_bytes")
    cache_bytes = int(str(given)) if str(given).isdecimal() else None
    if space := os.environ.get(_CPU_SPACE):
        given, cache_bytes = space, int(space) << 30 if space.isdecimal() else None
    if cache_bytes is not None:
        needed = cache_bytes + weight_bytes
        why = f"weights {show_bytes(weight_bytes)}, KV cache {show_bytes(cache_bytes)}"
    elif given is None and isinstance(share, int | float):
        needed = math.ceil(total * share)
        why = f"vLLM takes {share:.0%} of all, unless {_CPU_SPACE} says how many GiB"
    else:
        return  # "2G", or what vLLM will refuse
    yield Room("memory now", needed, machine.node.free_bytes, why, is_sure=False)


def _gpu_room(
    engine_args: Mapping[str, object], weight_bytes: int, machine: Machine
) -> tuple[Room, ...]:
    count = _number(engine_args, "tensor_parallel_size")
    stages = _number(engine_args, "pipeline_parallel_size")
    share = weight_bytes // (count * stages)
    each = f" on each of {count * stages}" if count * stages > 1 else ""
    why = f"weights {show_bytes(share)}, at least {show_bytes(_FLOOR_BYTES)} beside them{each}"
    used = [gpu.memory_bytes for gpu in machine.gpus[: count * stages]]
    told = [memory for memory in used if memory is not None]
    part = engine_args.get("gpu_memory_utilization", _UTILIZATION)
    if not isinstance(part, int | float) or engine_args.get("kv_cache_memory_bytes"):
        part = 1.0
    have = int(min(told) * part) if told and len(told) == len(used) else None
    return (Room("GPU memory", share + _FLOOR_BYTES, have, why, _are_whole(engine_args)),)


def _are_whole(engine_args: Mapping[str, object]) -> bool:
    """Return whether the weights take the room of their files, all of it there."""
    return not any(
        engine_args.get(name) and engine_args[name] not in usual
        for name, usual in _ELSEWHERE.items()
    )


def _shared(engine_args: Mapping[str, object], machine: Machine) -> tuple[Room, ...]:
    workers = _number(engine_args, "tensor_parallel_size")
    workers *= _number(engine_args, "pipeline_parallel_size")
    if workers == 1:
        return ()
    needed = _QUEUE_BYTES + workers * _NCCL_BYTES
    why = f"messages between {workers} workers"
    return (Room("/dev/shm", needed, machine.shm_bytes, why, is_sure=False),)


def _number(engine_args: Mapping[str, object], name: str) -> int:
    value = engine_args.get(name)
    return value if isinstance(value, int) and value > 0 else 1


def check_engine_room(
    engine: Literal["vllm", "transformers"],
    engine_args: Mapping[str, object],
    weight_bytes: int,
    where: str,
) -> tuple[str, ...]:
    """Return what may be too little, a line each. Asks what the machine has.

    Raises:
        EngineError: the model at *where* does not fit this machine.
    """
    short = [
        room
        for room in engine_room(engine, engine_args, weight_bytes, read_machine())
        if room.is_short
    ]
    if sure := [room for room in short if room.is_sure]:
        raise EngineError(
            "the model does not fit this machine",
            where=where,
            problems=[describe_short(room) for room in sure],
            next_step="take a machine with more, more GPUs by engine_args.tensor_parallel_size, or "
            "a smaller model; `podloader fetch` brings the files all the same",
        )
    return tuple(map(describe_short, short))


def describe_short(room: Room) -> str:
    """Return how much there is too little of, in one line."""
    have = "?" if room.have_bytes is None else show_bytes(room.have_bytes)
    place = f" in {room.folder}" if room.folder else ""
    return f"{room.what}{place}: {show_bytes(room.needed_bytes)} wanted ({room.why}), {have} there"
