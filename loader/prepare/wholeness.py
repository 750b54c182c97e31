"""Whether a model has all of its tensors, found out while its weights come or are merged.

::

    <download folder>/.podloader/whole/<digest>     empty: tensors of these names and shapes are
                                                    all that a model needs
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from concurrent.futures import Future
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread
from typing import Self

from loader.arriving.arriving_weights import StoredWeights
from loader.config.settings import Settings
from loader.errors import CheckpointError, LoaderError
from loader.fetch.files import STATE
from loader.timeline import Timeline
from loader.weights.byte_files import LocalFile
from loader.weights.formats.archive import Archive
from loader.weights.formats.learning import GapLearner
from loader.weights.formats.records import TensorRef
from loader.weights.gaps import Gaps, Shapes
from loader.weights.header import TensorInfo
from loader.weights.quantised import find_packed, plain_dtype, plain_tensors, read_model_config
from loader.weights.stored import find_weight_files, list_tensors, read_bytes
from loader.weights.stored_forms import Packed

_MOST_SHOWN = 5
_log = logging.getLogger("podloader")


class WholenessCheck:
    """A model's tensors are compared from ``begin`` on; ``wait`` before anybody gets it.

    A context manager; with *ahead*, a process that will be asked begins its imports at once. What
    is found whole is remembered where *settings* are those of a start.
    """

    def __init__(
        self, timeline: Timeline, settings: Settings | None = None, *, ahead: bool = False
    ) -> None:
        self._timeline = timeline
        self._seen = settings and settings.training.download_folder / STATE / "whole"
        self._text_only = settings is not None and _is_text_only(settings.engine_args)
        self._answer: Future[None] | None = None
        self._learner = GapLearner()
        if ahead:
            self._learner.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._learner.close()

    def begin(self, place: str, folder: Path, weights: StoredWeights | None = None) -> None:
        """Have the model at *place* compared with what the config in *folder* describes.

        Its *weights* are in the folder, too, if they are not given. Files that cannot be read are
        left to whoever needs what is in them.
        """
        answer: Future[None] = Future()
        self._answer = answer

        def compare() -> None:
            try:
                self._compare(place, folder, weights)
                answer.set_result(None)
            except BaseException as error:
                answer.set_exception(error)

        Thread(target=compare, name="whole", daemon=True).start()

    def wait(self) -> None:
        """Return when it is known that nothing is lacking, or nothing was begun.

        Raises:
            CheckpointError: tensors are missing, or of another size.
        """
        if self._answer is not None and not self._answer.done():
            with self._timeline.stage("tensors"):
                self._answer.result()
        elif self._answer is not None:
            self._answer.result()

    def _compare(self, place: str, folder: Path, weights: StoredWeights | None) -> None:
        try:
            config = read_model_config(folder)
            if weights is not None:
                shapes = plain_shapes(config, weights.tensors, weights.find_packed(config))
            else:
                shapes = read_shapes(folder, config)
        except LoaderError:
            return
        seen = self._seen and self._seen / _digest(config, shapes, self._text_only)
        if not shapes or (seen and seen.exists()):
            return
        place_of_config, text_only = folder / "config.json", self._text_only
        gaps = self._learner.learn(place_of_config, config, shapes, text_only=text_only)
        check_gaps(place, gaps)
        if seen and not (gaps.extra or gaps.doubts):  # which are told at every start
            with contextlib.suppress(OSError):
                seen.parent.mkdir(parents=True, exist_ok=True)
                seen.touch()


def check_gaps(place: str, gaps: Gaps) -> None:
    """Tell what is odd about the tensors of the model at *place*.

    Raises:
        CheckpointError: some are missing, or of another size.
    """
    if gaps.missing or gaps.unlike:
        raise CheckpointError(
            "a model that lacks tensors, which an engine would make up",
            where=place,
            expected="every tensor of the model that its config.json describes",
            got=f"{len(gaps.missing)} missing, {len(gaps.unlike)} of another size, "
            f"{len(gaps.extra)} that it has no use for",
            problems=[
                *(f"missing: {name}" for name in gaps.missing),
                *(f"another size: {text}" for text in gaps.unlike),
                *(f"no use for: {name}" for name in gaps.extra),
            ],
            next_step="save the whole model again with save_pretrained, with the config.json of "
            "the model that was trained",
        )
    for names, text in (
        (gaps.doubts, "layers lack what all of their siblings have"),
        (gaps.extra, "the model has no use for these tensors, an engine may leave them out"),
    ):
        if names:
            shown = ", ".join(names[:_MOST_SHOWN]) + (", …" if len(names) > _MOST_SHOWN else "")
            _log.warning("%s: %s (%d): %s", place, text, len(names), shown)


def read_shapes(folder: Path, config: Mapping[str, object]) -> Shapes:
    """Return the tensors of the model in *folder* as ``plain_shapes`` does; none if they hide.

    Raises:
        FormatError: a header is broken, or files are missing.
    """
    files = find_weight_files(folder)
    if files.pickled:
        return _pickled_shapes(files.paths)
    stored = list_tensors(files)
    tensors = {name: tensor.info for name, tensor in stored.items()}
    packed = find_packed(config, tensors, lambda name: read_bytes(stored[name]))
    return plain_shapes(config, tensors, packed)


def plain_shapes(
    config: Mapping[str, object], tensors: Mapping[str, TensorInfo], packed: Mapping[str, Packed]
) -> Shapes:
    """Return name -> shape of *tensors*, the quantised ones as what they stand for.

    None stands for the shape of what is packed: how, is not always known.
    """
    plain = plain_tensors(tensors, packed, plain_dtype(config))
    unsure = {name for name, one in packed.items() if one.form == "packed" or one.lacks}
    return {name: None if name in unsure else info.shape for name, info in plain.items()}


def _pickled_shapes(paths: tuple[Path, ...]) -> Shapes:
    found: dict[str, tuple[int, ...]] = {}
    for path in paths:
        with contextlib.closing(LocalFile(path)) as file:
            value = Archive(file).value
        if not isinstance(value, Mapping):
            return {}
        found |= {str(n): ref.shape for n, ref in value.items() if isinstance(ref, TensorRef)}
    return found


def _is_text_only(engine_args: Mapping[str, object]) -> bool:
    """Return whether vLLM leaves out towers: nothing but text may be asked."""
    limits = engine_args.get("limit_mm_per_prompt")
    none = isinstance(limits, Mapping) and bool(limits) and not any(limits.values())
    return none or engine_args.get("language_model_only") is True


def _digest(config: Mapping[str, object], shapes: Shapes, text_only: bool) -> str:
    try:
        by = version("transformers")
    except PackageNotFoundError:
        by = ""
    asked = [by, text_only, config, sorted(shapes.items())]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
