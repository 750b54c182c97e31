"""Megatron's files by model-parallel rank: known, and refused with what would be needed.

::

    iter_0000010/mp_rank_<tensor>[_<pipeline>[_<expert>]]/model_optim_rng.pt

Each holds its rank's part of every tensor, and nothing says along which dimension it was cut.
"""

from __future__ import annotations

from loader.errors import UnsupportedError
from loader.types import Checkpoint


def refuse_ranks(checkpoint: Checkpoint) -> UnsupportedError:
    """Return the error that names the ranks found, and what can be consolidated instead."""
    ranks = checkpoint.detail.get("model_ranks")
    found = [str(rank) for rank in ranks] if isinstance(ranks, list | tuple) else []
    return UnsupportedError(
        "a Megatron checkpoint of a file per model-parallel rank, which does not say how its "
        "tensors were cut",
        where=str(checkpoint.path),
        expected="Megatron's distributed format, whose .metadata describes every tensor: "
        "--ckpt-format torch_dist",
        got=f"{len(found)} ranks: {', '.join(found[:8])}",
        next_step="save with --ckpt-format torch_dist, or convert the checkpoint in the training "
        "job with Megatron's tools/checkpoint/convert.py or Megatron Bridge",
    )
