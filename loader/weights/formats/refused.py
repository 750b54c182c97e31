"""Checkpoints that are known and not served, each refused by what it is; torch stays out.

::

    iter_0000010/mp_rank_<tensor>[_<pipeline>[_<expert>]]/model_optim_rng.pt    Megatron, by rank
    <checkpoint>/optimizer_0/…                                an optimizer's state, no weights
    <checkpoint>/latest, latest_checkpointed_iteration.txt    names what is not there
    <checkpoint>/{pytorch_model_fsdp_0, pytorch_model_fsdp_1} several models, as accelerate saves
    <checkpoint>/{model.safetensors, model_1.safetensors}     likewise
"""

from __future__ import annotations

from loader.errors import CheckpointError, LoaderError, UnsupportedError
from loader.types import Checkpoint, Kind

_WHOLE_FOLDER = "choose the checkpoint's whole folder in paths, with / at its end"


def find_refusal(checkpoint: Checkpoint) -> LoaderError | None:
    """Return the error that a checkpoint is refused with before it is read, None where it is not.

    It names what was found, and what to do instead.
    """
    if checkpoint.kind is Kind.UNKNOWN:
        return _unknown(checkpoint)
    if checkpoint.kind is Kind.OPTIMIZER:
        return optimizer_alone(str(checkpoint.path), _listed(checkpoint, "found"))
    if checkpoint.kind is Kind.MEGATRON:
        return _megatron_by_rank(checkpoint)
    if checkpoint.detail.get("tags") and (refusal := _without_its_tag(checkpoint)):
        return refusal
    models = _listed(checkpoint, "models")
    return _several_models(checkpoint, models) if len(models) > 1 else None


def optimizer_alone(where: str, found: list[str]) -> UnsupportedError:
    """Return the error of a checkpoint that holds the state of an optimizer and no weights."""
    return UnsupportedError(
        "the state of an optimizer, without the weights of a model",
        where=where,
        expected="the checkpoint's weights, which lie beside it (model.safetensors, "
        "pytorch_model_fsdp_0/, …)",
        got=", ".join(found[:8]),
        next_step="choose the folder above it, or the model's own folder",
    )


def _unknown(checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        "no checkpoint that podloader knows",
        where=str(checkpoint.path),
        expected=str(checkpoint.detail.get("lacks", "a model or an adapter")),
        got=", ".join(_listed(checkpoint, "found")[:8]) or "nothing",
        next_step=str(checkpoint.detail.get("next_step", _WHOLE_FOLDER)),
    )


def _megatron_by_rank(checkpoint: Checkpoint) -> UnsupportedError:
    """Each file holds its rank's part of every tensor; nothing says along which dimension."""
    ranks = _listed(checkpoint, "model_ranks")
    return UnsupportedError(
        "a Megatron checkpoint of a file per model-parallel rank, which does not say how its "
        "tensors were cut",
        where=str(checkpoint.path),
        expected="Megatron's distributed format, whose .metadata describes every tensor: "
        "--ckpt-format torch_dist",
        got=f"{len(ranks)} ranks: {', '.join(ranks[:8])}",
        next_step="save with --ckpt-format torch_dist, or convert the checkpoint in the training "
        "job with Megatron's tools/checkpoint/convert.py or Megatron Bridge",
    )


def _without_its_tag(checkpoint: Checkpoint) -> CheckpointError | None:
    tag, tags = checkpoint.detail.get("tag"), _listed(checkpoint, "tags")
    if not tags or tag in tags:
        return None
    pointer = checkpoint.detail.get("pointer", "latest")
    return CheckpointError(
        f"a checkpoint whose file `{pointer}` names one that is not there",
        where=str(checkpoint.path),
        expected=f"{tag}/" if tag else f"the name of a folder in `{pointer}`",
        got=", ".join(f"{name}/" for name in tags),
        next_step=f"take {tag or 'it'}/ into the paths, or leave `{pointer}` out of them and "
        "choose one that is there",
    )


def _several_models(checkpoint: Checkpoint, models: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{len(models)} models in one checkpoint, where one is served",
        where=str(checkpoint.path),
        problems=models,
        next_step="leave the others out of the paths: they are files of one folder"
        if models[0].endswith((".bin", ".safetensors"))
        else f"choose one of them by its own folder in the paths, rank-*/{models[0]}/, beside the "
        "files of the folder above it",
    )


def _listed(checkpoint: Checkpoint, key: str) -> list[str]:
    found = checkpoint.detail.get(key)
    return list(map(str, found)) if isinstance(found, list | tuple) else []
