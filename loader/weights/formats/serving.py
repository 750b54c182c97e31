"""Which files of a checkpoint a server needs, from their names alone. Pure; torch stays out.

Optimizer, scheduler and RNG state, logs and trainer arguments are left out: they are never read,
so they need not be fetched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from loader.weights.frameworks import DTENSOR_FILE, TRACKER
from loader.weights.side_files import is_side_file

_WHOLE_WEIGHTS = re.compile(r"\.safetensors$|^(pytorch_model|adapter_model)[^/]*\.bin$")
_DCP = re.compile(r"^(\.metadata|__\d+_\d+\.distcp|common\.pt|run_config\.yaml)$")  # Megatron's too
_DCP_SAFETENSORS = re.compile(r"^shard-\d+-model-\d+-of-\d+\.safetensors$")
_DCP_OPTIMIZER = re.compile(r"(^|/)optim(izer)?(_\d+)?/[^/]+$")
_ZERO_MODEL = re.compile(r"mp_rank_\d+_model_states\.pt$")
_ZERO_PARTITION = re.compile(r"mp_rank_\d+_optim_states\.pt$")
_UNIVERSAL = re.compile(r"(^|/)zero/[^/]+/fp32\.pt$")
_ZERO_STAGE_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt$")


def is_shard(name: str) -> bool:
    """Return whether a file of this name holds a part of weights that are sharded over ranks."""
    base = name.rpartition("/")[2]
    dcp = base.endswith(".distcp") or _DCP_SAFETENSORS.match(base)
    zero = _ZERO_MODEL.search(base) or _ZERO_PARTITION.search(base) or _UNIVERSAL.search(name)
    return bool(dcp or zero or DTENSOR_FILE.match(base))


def serving_files(names: Iterable[str], *, partitions: bool = False) -> frozenset[str]:
    """Return those of *names* (paths of files, ``/`` between parts) that serving needs.

    ZeRO 1 and 2 keep the model whole beside the partitions: then the optimizer files stay out,
    unless *partitions* are wanted. In ZeRO 3 they hold the weights and are needed, though only a
    part of each is read.
    """
    names = tuple(names)
    whole = {_run(name) for name in names if _ZERO_MODEL.search(name) and not partitions}
    whole -= {_run(name) for name in names if _ZERO_STAGE_3.search(name)}
    return frozenset(name for name in names if _is_needed(name, whole))


def _is_needed(name: str, whole: set[str]) -> bool:
    base = name.rpartition("/")[2]
    if _ZERO_PARTITION.search(base):
        return _run(name) not in whole
    if _DCP.match(base):
        return not _DCP_OPTIMIZER.search(name)
    if _ZERO_MODEL.search(base) or base in ("latest", TRACKER) or _UNIVERSAL.search(name):
        return True
    if DTENSOR_FILE.match(base):
        return True
    if is_side_file(base):
        return True
    return bool(_WHOLE_WEIGHTS.search(base)) and not base.startswith(("optimizer", "scheduler"))


def _run(name: str) -> str:
    """Return the folder of a file without its rank: what all nodes of a run have in common."""
    return re.sub(r"(^|/)rank-\d+/", r"\1", name).rpartition("/")[0]
