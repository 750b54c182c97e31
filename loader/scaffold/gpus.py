"""Which GPUs a model needs: a table of their memory, and a calculation that people can follow.

Where the table comes from:

- names: ``truss.base.truss_config.Accelerator``, which knows no memory;
- what is to be had, and how many of it in one instance: the platform's instance types,
  https://docs.baseten.co/deployment/resources#instance-type-reference, whose memory is nominal (an
  "80 GiB" H100 has 79.2; ``H100MIG`` there is ``H100_40GB`` here, and cannot be had in pairs);
- memory: what CUDA and so torch report as a device's total, as in torch's out-of-memory errors,
  rounded down: T4 14.56, L4 and A10G 22.0, A100 40GB 39.4, L40S 44.3, H100 and A100 80GB 79.1,
  RTX PRO 6000 94.97, H200 139.8, B200 178.35 (https://github.com/pytorch/ao/pull/4002). Of V100 and
  B300 only nvidia-smi's 16160 and 275040 MiB were found, which CUDA does not give whole (compare
  https://github.com/modal-labs/modal-client/pull/2797); a MIG of half an H100 is half of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from loader.errors import ConfigError
from loader.serve.size import ModelSize
from loader.units import show_bytes

GIB = 1 << 30
_UTILIZATION = 0.9  # what is planned with; vLLM's own gpu_memory_utilization is a little more
_RUNTIME_BYTES = 2 * GIB  # CUDA context and graphs, activations, sampling
_COUNTS = (1, 2, 4, 8)  # of one node


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU by Truss's name.

    ``served``: the engine's image has code for it; ``offered``: chosen without being asked for;
    ``most``: that many are chosen for one instance.
    """

    name: str
    memory_gib: int
    bfloat16: bool = True
    offered: bool = False
    served: bool = True
    most: int = _COUNTS[-1]


# T4 and V100 compute no bfloat16 (compute capability < 8.0). For V100 (7.0) PyTorch's builds of
# CUDA 12.8 and later have no kernels (release notes of PyTorch 2.8).
GPUS = (
    Gpu("T4", 14, bfloat16=False, most=4),
    Gpu("V100", 15, bfloat16=False, served=False),
    Gpu("L4", 22, offered=True, most=4),
    Gpu("A10G", 22),
    Gpu("H100_40GB", 39, offered=True, most=1),
    Gpu("A100_40GB", 39),
    Gpu("L40S", 44),
    Gpu("H100", 79, offered=True),
    Gpu("A100", 79),
    Gpu("RTX_PRO_6000", 94),
    Gpu("H200", 139, offered=True),
    Gpu("B200", 178, offered=True),
    Gpu("B300", 267),
    Gpu("GB300", 267),
)


@dataclass(frozen=True, slots=True)
class Load:
    """What is to be served at once: ``requests`` sequences of ``tokens``, ``adapters`` loaded."""

    tokens: int
    requests: int
    rank: int = 0
    adapters: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """GPUs that hold the model, and the calculation, one line of text for each term."""

    gpu: Gpu
    count: int
    calculation: tuple[str, ...]

    @property
    def accelerator(self) -> str:
        """Return it as Truss writes it."""
        return self.gpu.name if self.count == 1 else f"{self.gpu.name}:{self.count}"


def place(size: ModelSize, load: Load, asked: str | None = None) -> Placement:
    """Return the fewest, then smallest GPUs that hold *size* under *load*.

    ``asked`` is a GPU (``H100``) or GPUs (``H100:2``) to use.

    Raises:
        ConfigError: an unknown GPU, a count that does not divide the attention heads, or no room.
    """
    gpu, count = _read(asked) if asked else (None, None)
    tried = []
    for candidate, number in _candidates(gpu, count):
        if size.heads % number:
            tried.append(f"{candidate.name}:{number}: {size.heads} heads cannot be split evenly")
            continue
        needed = _needed(size, load, number)
        room = int(candidate.memory_gib * GIB * _UTILIZATION)
        if needed <= room:
            return Placement(candidate, number, _explain(size, load, candidate, number))
        tried.append(
            f"{candidate.name}:{number}: {show_bytes(needed)} needed, {show_bytes(room)} usable"
        )
    raise ConfigError(
        "the model does not fit",
        where=asked or "one node",
        expected=f"{show_bytes(size.weight_bytes)} of weights and "
        f"{load.requests} x {load.tokens} tokens",
        problems=tried[-8:],
        next_step="give a smaller --max-model-len or --requests, or larger GPUs by --accelerator",
    )


def fitting(size: ModelSize, load: Load) -> tuple[str, ...]:
    """Return the GPUs that hold *size* under *load*, the fewest of each that do, as Truss's."""
    found = []
    for gpu in GPUS:
        if gpu.served:
            with contextlib.suppress(ConfigError):
                found.append(place(size, load, gpu.name).accelerator)
    return tuple(found)


def _read(asked: str) -> tuple[Gpu, int | None]:
    name, colon, count = asked.partition(":")
    gpu = next((g for g in GPUS if g.name == name.upper().replace("-", "_")), None)
    if gpu is None or not gpu.served or (colon and count not in map(str, _COUNTS)):
        raise ConfigError(
            "an accelerator that the engine has no code for"
            if gpu is not None and not gpu.served
            else "an accelerator that is not known",
            where="--accelerator",
            expected=f"one of {', '.join(g.name for g in GPUS if g.served)}, with :2, :4 or :8 for "
            "several",
            got=asked,
            next_step="correct it; config.yaml can be edited afterwards",
        )
    return gpu, int(count) if colon else None


def _candidates(gpu: Gpu | None, count: int | None) -> Iterator[tuple[Gpu, int]]:
    offered = [gpu] if gpu else sorted((g for g in GPUS if g.offered), key=lambda g: g.memory_gib)
    for number in [count] if count else _COUNTS:
        for candidate in offered:
            if count or number <= candidate.most:
                yield candidate, number


def _needed(size: ModelSize, load: Load, gpus: int) -> int:
    return (
        size.weight_bytes // gpus
        + load.requests * size.kv_bytes(load.tokens, gpus)
        + size.lora_bytes(load.rank, load.adapters, gpus)
        + _RUNTIME_BYTES
    )


def _explain(size: ModelSize, load: Load, gpu: Gpu, gpus: int) -> tuple[str, ...]:
    each = f" / {gpus} GPUs" if gpus > 1 else ""
    kv = load.requests * size.kv_bytes(load.tokens, gpus)
    rows = [(f"weights, {size.weights_from}{each}", size.weight_bytes // gpus)]
    rows.append((f"KV cache of {load.requests} requests of {load.tokens} tokens{each}", kv))
    if load.adapters:
        lora = size.lora_bytes(load.rank, load.adapters, gpus)
        rows.append((f"{load.adapters} adapters of rank {load.rank}{each}", lora))
    rows.append(("CUDA graphs and activations", _RUNTIME_BYTES))
    total = sum(count for _, count in rows)
    lines = [f"{show_bytes(count):>11}  {text}" for text, count in rows]
    usable = f"{_UTILIZATION:.0%} of {gpu.name}'s {show_bytes(gpu.memory_gib * GIB)}"
    room = show_bytes(int(gpu.memory_gib * GIB * _UTILIZATION))
    return (*lines, f"{show_bytes(total):>11}  of {room}, {usable}")
