"""Adapters and their base -> ReadyModel: checked by headers, fetched, then attached or merged.

::

    <cache folder>/
      merge-<digest>/               a merged model; the digest is of what it was made from
      attach-<digest>/              a tokenizer, where neither the base's nor an adapter's will do
      .merging.<random>.partial/    merged while its base arrives, which has no digest yet
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from loader.adapters.attach import (
    Decision,
    NamedAdapter,
    attach,
    check_all,
    decide,
    name_adapters,
)
from loader.adapters.base_task import decide_for_base, is_pooled
from loader.adapters.layers import Ask, Reason, reconsider
from loader.adapters.plan_builder import Base
from loader.adapters.surroundings import has_tokenizer
from loader.arriving.arriving_weights import ArrivingWeights
from loader.arriving.filling import Announce
from loader.config.settings import Settings
from loader.errors import CheckpointError
from loader.fetch.progress import LogProgress, Progress
from loader.prepare.bases import FoundBase, HubBase, LocalBase, find_base
from loader.prepare.checkpoint_sources import BaseModel, Source
from loader.prepare.consolidated import (
    cache_folder,
    give_name,
    is_made,
    output_folder,
    prove_kept,
)
from loader.prepare.fits import check_size
from loader.prepare.inputs import UnprovedError, proving
from loader.prepare.named_base import named_base, named_revision
from loader.prepare.wholeness import WholenessCheck
from loader.stores.registry import is_remote
from loader.timeline import Timeline
from loader.types import ReadyModel
from loader.weights.architecture import is_at_hand, read_architecture
from loader.weights.header import TensorInfo
from loader.weights.publishing import check_room, scratch_folder, sweep, use
from loader.weights.quantised import (
    check_dequantisable,
    plain_dtype,
    plain_tensors,
    quantisation_of,
    read_model_config,
)
from loader.weights.stored_forms import Packed

if TYPE_CHECKING:
    from loader.weights.readers import SafetensorsReader  # torch
    from loader.weights.writer import CheckpointWriter

_CONFIG = "config.json"
_MERGING = "merging"
_log = logging.getLogger("podloader")


def make_adapted(
    settings: Settings,
    base: FoundBase | None,
    sources: Sequence[Source],
    timeline: Timeline,
    progress: Progress | None,
    ask: Ask | None,
    announce: Announce | None,
    check: WholenessCheck,
) -> ReadyModel:
    """Return *base*, else the model that the settings or the adapters name, with *sources*.

    *base* is a checkpoint. *progress* is told of the download of another one. *ask* is the engine's
    word on what it has layers for; *announce* is told of what is on its way. The base goes through
    *check*.

    Raises:
        AdapterError: adapters that do not fit the base or each other.
        LoaderError: the base is not to be had, or the disk refused.
    """
    named = name_adapters([(source.job, Path(source.place)) for source in sources])
    adapters = [
        NamedAdapter(n.name, s.checkpoint.path) for n, s in zip(named, sources, strict=True)
    ]
    name = settings.base_model or ""
    if base is None and not name:
        bases = {s.place: s.checkpoint.detail.get("base_model") for s in sources}
        chosen = named_base(bases, settings)
        name, settings = chosen.name, chosen.over(settings)
    if base is None and settings.base_revision is None:
        about = {s.place: s.checkpoint.detail for s in sources}
        settings = replace(settings, base_revision=named_revision(about, name))
    comes_along = base is not None or is_remote(name)
    decision = decide(settings.adapter_policy, adapters, base_is_fetched=comes_along)
    _log.info("adapters: %s", decision.why)
    job = _Job(settings, adapters, decision, timeline, progress, announce, check)
    sweep(job.cache, _MERGING)
    with contextlib.ExitStack() as stack:
        if base is None:
            with timeline.stage("base model"):
                base = find_base(settings, name, timeline, progress, stack)
            if not isinstance(base, LocalBase):
                job.tell_config(base.path)
        job.know_base(base.path)
        if not has_tokenizer(base.path, *(adapter.folder for adapter in adapters)):
            raise lacks_tokenizer(str(base.path), has_base=True)
        plain = _check_base(job, base)
        if base.weights is not None:
            check.begin(str(base.path), base.path, base.weights)
        with timeline.stage("base model"):
            base.begin()
        if job.decision.mode == "attach" and settings.engine == "vllm":
            _reconsider(job, base.path, ask)
        return _make(job, base, plain, sources, stack)


def lacks_tokenizer(where: str, *, has_base: bool) -> CheckpointError:
    """Return the error for a model that nobody has a tokenizer for, nor its base if it has one."""
    return CheckpointError(
        "the model came without a tokenizer",
        where=where,
        expected="tokenizer.json, tokenizer.model, vocab.json, tekken.json or the like",
        next_step="save the tokenizer beside what was trained, in the training job"
        if has_base
        else "set base_model to the model it was trained from: its tokenizer is taken",
    )


def _make(
    job: _Job,
    base: FoundBase,
    plain: Mapping[str, TensorInfo] | None,
    sources: Sequence[Source],
    stack: contextlib.ExitStack,
) -> ReadyModel:
    """Return the model of *base*, whose weights, *plain* by their headers, may be on their way."""
    merged = None
    if isinstance(base.weights, ArrivingWeights) and plain is not None:
        folder = stack.enter_context(scratch_folder(job.cache, _MERGING))
        if job.is_merge:
            reader = stack.enter_context(contextlib.closing(base.weights.open_reader()))
            with job.timeline.stage("merge"):
                merged = _merge(job, base.path, folder / "model", reader)
        elif job.announce:
            _announce_attached(job, base.weights, base.path, plain, folder)
    whole = base.identify(weights=job.is_merge)
    if base.weights is None and not (isinstance(base, LocalBase) and base.source):
        job.whole.begin(str(base.path), base.path)  # one that was consolidated was compared then
    made_from = job.describe(whole, sources)
    output = output_folder(job.settings, job.decision.mode, made_from)
    if merged is not None:
        prove_kept(job.settings, whole, *sources)
        job.whole.wait()
        ready = _named(merged, output)
    else:
        with job.timeline.stage(job.decision.mode):
            if job.is_merge:
                ready = _merge_proved(job, base, whole, sources, output)
            else:
                prove_kept(job.settings, *sources)
                allow_pickle = job.settings.allow_pickle
                ready = attach(whole.path, job.adapters, output, allow_pickle=allow_pickle)
    job.whole.wait()
    if output.is_dir():
        use(output)
    provenance = ready.provenance | {"why": job.decision.why, "made_from": made_from}
    if job.is_merge:
        provenance["name"] = job.adapters[0].name
    return replace(ready, provenance=provenance)


@dataclass(slots=True)
class _Job:
    """What is to be done with which adapters; the base may change the decision."""

    settings: Settings
    adapters: list[NamedAdapter]
    decision: Decision
    timeline: Timeline
    progress: Progress | None
    announce: Announce | None
    whole: WholenessCheck

    @property
    def cache(self) -> Path:
        return cache_folder(self.settings)

    @property
    def is_merge(self) -> bool:
        return self.decision.mode == "merge"

    def know_base(self, folder: Path) -> None:
        """Decide by what the base in *folder* is for; its small files are there."""
        config = read_model_config(folder)
        policy = self.settings.adapter_policy
        pooled = is_pooled(folder, self.settings.engine_args)
        settled = decide_for_base(self.decision, policy, self.adapters, config, pooled=pooled)
        if settled != self.decision:
            _log.info("adapters: %s", settled.why)
        self.decision = settled

    def tell_config(self, folder: Path) -> None:
        """Tell that the base's small files are in *folder*, its weights not yet."""
        if self.progress:
            self.progress.found_config(folder / _CONFIG)

    def describe(self, base: BaseModel, sources: Sequence[Source]) -> dict[str, object]:
        """Return what the outcome is made from."""
        made_from: dict[str, object] = {
            "mode": self.decision.mode,
            "base": base.identity,
            "adapters": {
                a.name: dict(s.files) for a, s in zip(self.adapters, sources, strict=True)
            },
        }
        if self.is_merge:
            exact, dequantise = self.settings.exact, self.settings.dequantise
            made_from |= {"exact": exact, "dequantise": dequantise}
        return made_from


def _reconsider(job: _Job, base: Path, ask: Ask | None) -> None:
    """Decide anew where vLLM would not use all of an adapter."""
    from loader.serve.vllm.forkserver import ask_forked

    def ask_beside(model: Path, adapters: Mapping[str, Sequence[str]]) -> Mapping[str, Reason]:
        return ask_forked(model, job.settings.engine_args, adapters)

    with job.timeline.stage("adapter layers"):
        decision = reconsider(
            job.decision,
            job.settings.adapter_policy,
            job.adapters,
            base,
            ask or ask_beside,
            allow_pickle=job.settings.allow_pickle,
        )
    if decision is not job.decision:
        _log.warning("adapters: %s", decision.why)
    job.decision = decision


def _check_base(job: _Job, base: FoundBase) -> Mapping[str, TensorInfo] | None:
    """Check, before they are fetched, that the adapters fit weights that are not here.

    Returns these as what they stand for, None where they are here or cannot be told.
    """
    config = read_model_config(base.path)
    weights = base.weights
    if weights is None:
        return None
    with job.timeline.stage("fit"):
        packed = weights.find_packed(config)
        plain = _check_fit(job, str(base.path), config, weights.tensors, packed)
    served = plain if job.is_merge else weights.tensors
    _check_room_to_serve(job, str(base.path), config, served)
    if job.is_merge:
        made_bytes = sum(info.size_bytes for info in plain.values())
        check_room([(base.path, weights.missing_bytes), (job.cache, made_bytes)])
    return plain


def _check_fit(
    job: _Job,
    where: str,
    config: Mapping[str, object],
    tensors: Mapping[str, TensorInfo],
    packed: Mapping[str, Packed] | None,
) -> Mapping[str, TensorInfo]:
    """Check the adapters against headers; return the tensors as what they stand for.

    ``packed`` is None where it is not known yet which of them stand for what.
    """
    if job.is_merge and quantisation_of(config) is not None:
        asked_for = job.settings.dequantise
        check_dequantisable(where, config, tensors, packed, asked_for=asked_for)
    if packed is None:
        return tensors
    plain = plain_tensors(tensors, packed, plain_dtype(config))
    # The download does not wait for transformers: what takes its word is checked beside it.
    base = Base(plain, config, quick=not is_at_hand())
    if not check_all(job.adapters, base, allow_pickle=job.settings.allow_pickle):
        beside = Thread(target=read_architecture, args=(config, {}), name="fit", daemon=True)
        beside.start()  # the imports, and the model's own module
    return plain


def _check_room_to_serve(
    job: _Job, where: str, config: Mapping[str, object], tensors: Mapping[str, TensorInfo]
) -> None:
    """Raise EngineError where what is to be served of *tensors* will not fit this machine."""
    from loader.serve.size import served_bytes  # the first request is ahead of it

    args = job.settings.engine_args
    size = served_bytes(config, sum(t.size_bytes for t in tensors.values()), args.get("dtype"))
    for warning in check_size(job.settings, size, where):
        _log.warning("this may be too little: %s", warning)


def _announce_attached(
    job: _Job,
    weights: ArrivingWeights,
    base: Path,
    plain: Mapping[str, TensorInfo],
    aside: Path,
) -> None:
    """Announce *base* with its adapters, unless something has to be written beside them first."""
    allow_pickle = job.settings.allow_pickle
    early = attach(base, job.adapters, aside / "model", allow_pickle=allow_pickle, tensors=plain)
    folders = (early.tokenizer, *(adapter.path for adapter in early.adapters))
    if job.announce and not any(folder.is_relative_to(aside) for folder in folders):
        job.announce(weights, early)


def _merge_proved(
    job: _Job, base: FoundBase, whole: BaseModel, sources: Sequence[Source], output: Path
) -> ReadyModel:
    """Return the merged model in *output*, made there from what is proved to be its inputs."""
    if is_made(output):  # its name is the digest of what it was made from
        _log.info("the merged model is here already: %s", output)
        return ReadyModel(output, (), None, output, {})
    check = partial(prove_kept, job.settings, whole, *sources)
    try:
        with scratch_folder(job.cache, _MERGING) as folder, proving(check) as wait:
            try:
                is_sure = not isinstance(base, HubBase)
                merged = _merge(job, whole.path, folder / "model", is_sure=is_sure)
            finally:  # files that rotted may be why a merge fails
                wait()
            check()  # nor were they written to since; nothing else is read again
            job.whole.wait()
            return _named(merged, output)
    except UnprovedError:
        if not isinstance(base, HubBase):
            raise
    _log.warning("the base model is not what the Hub declares; it is fetched again")
    base.begin(only=None)
    job.whole.begin(str(base.path), base.path)
    with scratch_folder(job.cache, _MERGING) as folder:
        check()
        return _named(_merge(job, whole.path, folder / "model"), output)


def _named(merged: ReadyModel, output: Path) -> ReadyModel:
    path = give_name(merged.path, output)
    return replace(merged, path=path, tokenizer=path)


def _merge(
    job: _Job,
    base: Path,
    output: Path,
    weights: SafetensorsReader | None = None,
    *,
    is_sure: bool = True,
) -> ReadyModel:
    """Return *base* merged; announced where it *is_sure* that nothing of it is made again."""
    from loader.adapters.merge import WeightedAdapter, merge  # torch

    def begin(writer: CheckpointWriter) -> None:
        if is_sure and job.announce:
            provenance: dict[str, object] = {"name": job.adapters[0].name}
            job.announce(writer.fill(), ReadyModel(output, (), None, output, provenance))

    with (job.progress or LogProgress()).working("merged") as report:
        return merge(
            base,
            [WeightedAdapter(adapter.folder) for adapter in job.adapters],
            output,
            exact=job.settings.exact,
            dequantise=job.settings.dequantise,
            allow_pickle=job.settings.allow_pickle,
            weights=weights,
            on_progress=report,
            on_begin=begin,
        )
