"""Which files of a model's folder an engine needs: no weights twice."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from itertools import islice

from loader.errors import FetchError

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5,9}-of-\d{5,9}\.safetensors")
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_NUMBERED = re.compile(
    r"(?P<stem>model|pytorch_model)-\d{5,9}-of-(?P<n>\d{5,9})(?P<end>\.safetensors|\.bin)"
)
_MOST_SHARDS = 100_000
_PICKLE = re.compile(r"(pytorch_model|model)(-\d{5,9}-of-\d{5,9})?\.bin")


def find_index(names: Iterable[str], *, allow_pickle: bool = False) -> str | None:
    """Return the index that says which files the weights are; None where none is to be read."""
    beside = {name for name in names if "/" not in name}
    if _INDEX in beside:
        return _INDEX
    others = any(name.endswith(".safetensors") for name in beside)
    return _PICKLED_INDEX if allow_pickle and not others and _PICKLED_INDEX in beside else None


def weight_files(
    names: Iterable[str], *, allow_pickle: bool = False, indexed: Collection[str] = ()
) -> tuple[str, ...]:
    """Return the weights, once: ``model.safetensors``, the *indexed*, or others beside config.json.

    Repositories hold them again as ``original/``, ``consolidated.safetensors``, in other precisions
    or pickled. Pickles are taken only where there is nothing else and *allow_pickle* is set.
    *indexed* are the files that the index names, where it has been read.
    """
    beside = sorted(name for name in names if "/" not in name)
    if indexed and (_WHOLE not in beside or _WHOLE in indexed):
        return tuple(sorted(set(indexed)))
    if _WHOLE in beside:
        return (_WHOLE,)
    shards = tuple(name for name in beside if _SHARD.fullmatch(name))
    if shards and _INDEX in beside:
        return shards
    others = tuple(name for name in beside if name.endswith(".safetensors"))
    pickles = tuple(name for name in beside if _PICKLE.fullmatch(name))
    return others or (pickles if allow_pickle else ())


def missing_files(
    weights: Iterable[str], names: Iterable[str], *, indexed: Collection[str] = ()
) -> tuple[str, ...]:
    """Return which of *weights* are not among *names*; without an index their numbers count."""
    there = set(names)
    wanted = set(weights)
    matches = filter(None, map(_NUMBERED.fullmatch, () if indexed else wanted))
    sets = sorted({match.group("stem", "n", "end") for match in matches})
    counted = (
        f"{stem}-{i:05d}-of-{n}{end}"
        for stem, n, end in sets
        for i in range(int(n) + 1)
        if i != (int(n) if f"{stem}-{0:05d}-of-{n}{end}" in wanted else 0)
    )
    return tuple(sorted(wanted.union(islice(counted, _MOST_SHARDS)) - there))


def absent_shards(where: str, missing: Iterable[str]) -> FetchError:
    """Return the error for a base whose weight files are not all there."""
    return FetchError(
        "the base model lacks weight files that its index or their numbers name",
        where=where,
        problems=tuple(missing),
        next_step="bring the missing files there, or name a base that is whole",
    )
