"""Whether an engine can load a model while its weights arrive: one table says where not, and why.

What the settings or vLLM's arguments say against it is in ``loader.serve.vllm.streaming``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Self

from loader.arriving.filling import Announce, FillingFolder
from loader.prepare.checkpoint_sources import SHARDED
from loader.types import ReadyModel

Base = Literal["", "local", "url", "hub", "checkpoint"]
_CONSOLIDATED = "consolidate-"
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """The weights that an engine is given.

    ``mode``: ``as it is``, ``attach`` or ``merge``; ``base``: where that of adapters comes from;
    ``is_sharded``: they, or those of the base, are consolidated; ``is_pickled``: in ``.bin`` files;
    ``is_here``: nothing of them has to be brought or made.
    """

    mode: str
    base: Base = ""
    is_sharded: bool = False
    is_pickled: bool = False
    is_here: bool = False

    @classmethod
    def of(cls, ready: ReadyModel) -> Self:
        """Return those of *ready*."""
        made_from = ready.provenance.get("made_from")
        is_pickled = not any(ready.path.glob("*.safetensors"))
        if not isinstance(made_from, Mapping):
            kind = ready.provenance.get("kind")
            is_sharded = any(kind == one.value for one in SHARDED)
            return cls("as it is", is_sharded=is_sharded, is_pickled=is_pickled)
        bases: tuple[Base, ...] = ("hub", "url", "checkpoint")
        return cls(
            str(made_from["mode"]),
            next((base for base in bases if base in made_from["base"]), "local"),
            is_sharded=ready.path.name.startswith(_CONSOLIDATED),
            is_pickled=is_pickled,
        )


FROM_FILES: Mapping[str, Callable[[ServedWeights], bool]] = {
    "the base lies on this machine": lambda w: w.mode == "attach" and w.base == "local",
    "all of them are here": lambda w: w.is_here,
    "a base is consolidated before adapters are attached": (
        lambda w: w.mode == "attach" and w.is_sharded
    ),
    "huggingface-hub brings whole files, which are proved before they are used": (
        lambda w: w.base == "hub"
    ),
    "pickled weights have no headers that tell of them before": (
        lambda w: w.is_pickled and not w.is_sharded and w.mode != "merge"
    ),
}
"""Why weights are waited for, and when; whatever else there is, an engine can follow."""


def why_files(weights: ServedWeights) -> str:
    """Return why *weights* are loaded when all are here; empty where they can be followed."""
    return next((why for why, holds in FROM_FILES.items() if holds(weights)), "")


class Announcement:
    """Passes an announcement on to *announce*; ``tell`` logs why there was none."""

    def __init__(self, announce: Announce) -> None:
        self._announce = announce
        self._is_made = False

    def __call__(self, filling: FillingFolder, ready: ReadyModel) -> None:
        self._is_made = True
        self._announce(filling, ready)

    def tell(self, ready: ReadyModel) -> None:
        """Log why *ready* was not announced, if it was not."""
        if not self._is_made:
            why = why_files(ServedWeights.of(ready)) or "all of them are here"
            _log.info("engine start: files: %s", why)
