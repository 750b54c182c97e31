"""A ZeRO checkpoint without its frozen parameters, and the base model that still has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from loader.types import Checkpoint
from loader.weights.formats.adapter import has_adapter
from loader.weights.formats.assembly import CASTABLE
from loader.weights.formats.pieces import SourceTensor
from loader.weights.formats.rank_files import Files
from loader.weights.formats.ranks import RankShardsSource
from loader.weights.formats.zero import ZeroSource

FROZEN_LEFT_OUT = (
    "it was saved without its frozen parameters (exclude_frozen_parameters): set base_model to the "
    "model that was trained, with its weights"
)


class FilledSource:
    """The tensors of *trained*, and those that it lacks from the weight files of its base.

    ``names`` are the model's. What comes from the base has the dtype that was trained in, as it had
    in the training.
    """

    def __init__(self, trained: ZeroSource, base: Files, names: Mapping[str, object]) -> None:
        self._trained, self._base = trained, RankShardsSource(base)
        dtypes = {dtype for dtype in trained.dtypes.values() if dtype in CASTABLE}
        of_base = {n: s for n, s in self._base.shapes.items() if n in names}
        # Of two names that mean one tensor of the model the last counts: the trained one.
        self.shapes: Mapping[str, tuple[int, ...]] = {**of_base, **trained.shapes}
        self.dtypes: Mapping[str, str] = {
            **{name: _as_trained(self._base.dtypes[name], dtypes) for name in of_base},
            **trained.dtypes,
        }

    def open(self, names: Sequence[str], dtype: str | None) -> tuple[SourceTensor, ...]:
        """Return the tensors of these names.

        Raises:
            CheckpointError: as ``ZeroSource``.
        """
        ours = [name for name in names if name in self._trained.shapes]
        theirs = [name for name in names if name not in self._trained.shapes]
        opened = dict(zip(ours, self._trained.open(ours, dtype), strict=True))
        opened |= zip(theirs, self._base.open(theirs, dtype), strict=True)
        return tuple(opened[name] for name in names)


def needs_base(checkpoint: Checkpoint, files: Files) -> bool:
    """Return whether the weights of a ZeRO checkpoint's base are needed, too."""
    source = ZeroSource(files, str(checkpoint.detail.get("tag", "")))
    return source.lacks_frozen and not has_adapter(source.shapes)


def _as_trained(dtype: str, trained: set[str]) -> str:
    return next(iter(trained)) if dtype in CASTABLE and len(trained) == 1 else dtype
