"""Which checkpoints go into the Truss. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

from loader.errors import ConfigError
from loader.scaffold.selection import LATEST
from loader.scaffold.survey import Found
from loader.types import Kind


def by_step(found: Sequence[Found]) -> list[Found]:
    """Return *found* with the most recent first; names without a number come last."""
    return sorted(found, key=lambda f: (f.step, f.job, f.name), reverse=True)


def choose(found: Sequence[Found], names: Sequence[str]) -> tuple[Found, ...]:
    """Return the checkpoints that *names* mean, each once, in the order of the names.

    A name is ``latest``, the checkpoint's folder or its last part, with or without its job before
    it, or its whole path as ``podloader inspect`` prints it.

    Raises:
        ConfigError: a name that means none or several, or checkpoints that do not go together.
    """
    chosen: dict[str, Found] = {}
    for name in names:
        hits = _latest(found) if name == LATEST else [f for f in found if name in _names(f)]
        if len(hits) != 1:
            listed = hits or by_step(found)
            near = get_close_matches(name, [f.path for f in listed], n=1, cutoff=0)[0]
            raise ConfigError(
                f"{len(hits) or 'no'} checkpoint{'s' if hits else ''} of this name",
                where=f"--checkpoint {name}",
                expected="the name of one",
                problems=[f.path for f in listed],
                next_step=f"write the whole path, such as --checkpoint {near}",
            )
        chosen.setdefault(hits[0].path, hits[0])
    together = tuple(chosen.values())
    check_together(together)
    return together


def check_together(chosen: Sequence[Found]) -> None:
    """Raise ConfigError for several checkpoints that are not all adapters."""
    if len(chosen) > 1 and any(f.kind is not Kind.ADAPTER for f in chosen):
        raise ConfigError(
            "only adapters go together",
            expected="several LoRA checkpoints, or one of another kind",
            problems=[f"{f.kind.value}: {f.path}" for f in chosen],
            next_step="choose one of them with --checkpoint",
        )


def _latest(found: Sequence[Found]) -> list[Found]:
    jobs = sorted({f.job for f in found})
    if len(jobs) > 1:
        raise ConfigError(
            "steps of different jobs cannot be compared",
            where=f"--checkpoint {LATEST}",
            expected="one job",
            got=", ".join(jobs),
            next_step="choose one with --job-id, or name the checkpoints",
        )
    return by_step(found)[:1]


def _names(found: Found) -> set[str]:
    own = {found.name, found.name.rpartition("/")[2], f"rank-{found.rank}/{found.name}"}
    own |= {f"{found.job}/{name}" for name in own if name}
    return (own | {found.path}) - {""}
