"""Whether DeepSpeed's files are of one run: as many ranks as they say, and cuts that add up.

A tag that is saved again by fewer ranks, in another stage or in another dtype keeps files of the
earlier run. Source: deepspeed/utils/zero_to_fp32.py, ``parse_optim_states`` and the sanity checks
of both merges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from loader.errors import CheckpointError
from loader.weights.formats.zerostates import ModelStates, OptimStates

_MOST_ABSENT = 1000  # that are told one by one


def check_partitions(
    states: ModelStates, ranks: Sequence[OptimStates | str], tag: str
) -> Sequence[OptimStates | str]:
    """Return *ranks*: as many as there are partitions, the text of why for one that is missing.

    Raises:
        CheckpointError: files of more ranks than there are partitions, or partitions that do not
            make up the parameter groups.
    """
    known = [rank for rank in ranks if isinstance(rank, OptimStates)]
    if not known:
        return ranks
    first = known[0]
    count = first.ranks
    problems = [
        f"{rank.archive.where}: partition_count {rank.ranks} in stage {rank.stage}"
        for number, rank in enumerate(ranks)
        if isinstance(rank, OptimStates)
        and (number >= count or (rank.ranks, rank.stage) != (count, first.stage))
    ]
    if problems:
        expected = f"{count} partitions in stage {first.stage}, as {first.archive.where} says"
        raise other_run(tag, problems, expected)
    refuse_many_absent(len(known), count, tag)
    absent = f"no rank has …zero_pp_rank_{{}}_mp_rank_00_optim_states.pt of {count}"
    ranks = [*ranks[:count], *(absent.format(n) for n in range(len(ranks), count))]
    check = _check_each if first.stage == 3 else _check_flattened
    if problems := list(check(states, ranks, first)):
        raise other_run(tag, problems, "partitions that make up the parameters")
    return ranks


def refuse_many_absent(here: int, count: int, tag: str) -> None:
    """Raise CheckpointError where so many of *count* ranks are missing that none is named."""
    if count - here > _MOST_ABSENT:
        raise other_run(tag, [f"{here} of them are here"], f"{count} partitions")


def other_run(tag: str, problems: Sequence[str], expected: str = "") -> CheckpointError:
    """Return the error that says which files cannot be of one and the same run."""
    return CheckpointError(
        "DeepSpeed files of several runs under one tag, or some that were overwritten",
        where=tag,
        expected=expected or "one file of each sort for a rank",
        problems=problems,
        next_step="leave out the files that an earlier run wrote under this tag, or choose "
        "another tag",
    )


def _check_each(
    states: ModelStates, ranks: Sequence[OptimStates | str], first: OptimStates
) -> Iterator[str]:
    """Give what is wrong in stage 3: on each rank lies an equal part of every parameter."""
    shapes = [shape for group in states.groups for shape in group.values()]
    wanted = sum(math.ceil(math.prod(shape) / len(ranks)) for shape in shapes)
    for rank in ranks:
        if isinstance(rank, OptimStates) and (
            sum(rank.sizes) != wanted or rank.sizes != first.sizes
        ):
            yield f"{rank.archive.where}: groups of {list(rank.sizes)} elements, {wanted} wanted"


def _check_flattened(
    states: ModelStates, ranks: Sequence[OptimStates | str], first: OptimStates
) -> Iterator[str]:
    """Give what is wrong in stages 1 and 2: all ranks together hold each group and its padding."""
    known = [rank for rank in ranks if isinstance(rank, OptimStates)]
    for rank in known:
        if len(rank.groups) != len(states.groups) or (
            rank.paddings and list(map(len, rank.paddings)) != list(map(len, states.groups))
        ):
            yield f"{rank.archive.where}: {len(rank.groups)} groups of other parameters"
            return
    found = [sum(rank.sizes[group] for rank in known) for group in range(len(states.groups))]
    wanted = [sum(map(math.prod, shapes.values())) for shapes in states.groups]
    if first.paddings:
        wanted = [count + sum(p) for count, p in zip(wanted, first.paddings, strict=True)]
    pairs = list(zip(found, wanted, strict=True))
    if len(known) < len(ranks):  # what is missing is named later, by tensor
        fits = [any(have < count for have, count in pairs)] * len(pairs)
    else:
        fits = [_aligned(have, len(ranks)) == _aligned(count, len(ranks)) for have, count in pairs]
    for group, (have, count) in enumerate(pairs):
        if not fits[group]:
            yield f"group {group}: {have} elements on {len(known)} ranks, {count} wanted"


def _aligned(count: int, ranks: int) -> int:
    return -(-count // (2 * ranks)) * 2 * ranks
