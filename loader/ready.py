"""Checkpoints on disk -> ReadyModel: which one is the base, and what happens to the adapters."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from loader.adapters.attach import NamedAdapter, attach, check_all, decide, name_adapters
from loader.adapters.draft import Base
from loader.adapters.incoming import IncomingWeights
from loader.bases import fetch_base
from loader.errors import AdapterError, CheckpointError, ConfigError, FormatError
from loader.settings import Settings
from loader.sources import (
    BaseModel,
    LateShards,
    Source,
    find_sources,
    give_name,
    make_whole,
    output_folder,
)
from loader.stores.hub import REPO_ID, fetch_model
from loader.stores.sources import is_remote
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, ReadyModel, Snapshot
from loader.weights.consolidate.parallel import refuse_ranks
from loader.weights.header import TensorInfo, size_bytes
from loader.weights.inspect import open_checkpoint, read_json
from loader.weights.listing import StoredTensor
from loader.weights.quantised import quantisation_of

_SERVED = (Kind.FULL, Kind.WHISPER)
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")
_HEARING = ("preprocessor_config.json", "processor_config.json")  # how a Whisper hears
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class Arriving:
    """What a running fetch still brings: the base's weights, and at its end the whole snapshot."""

    weights: IncomingWeights
    wait: Callable[[], Snapshot]


@dataclass(frozen=True, slots=True)
class LateWeights:
    """Weights of the base that are not here: where its tensors will lie, and how to fetch them.

    The fetch runs while the block of ``fetching`` does.
    """

    tensors: Mapping[str, StoredTensor]
    fetching: Callable[[], AbstractContextManager[Arriving]]


def make_ready(
    settings: Settings,
    snapshot: Snapshot,
    checkpoints: Sequence[Checkpoint],
    timeline: Timeline,
    late: LateWeights | None = None,
    shards: LateShards | None = None,
) -> ReadyModel:
    """Return the model that *checkpoints*, those of *snapshot*, make up.

    With ``late``, the snapshot lacks the weights of the base: they are fetched when it is known
    that the adapters fit, and merged into while they arrive. With ``shards`` it lacks weights that
    are sharded over ranks: they are read from there.

    Raises:
        CheckpointError: nothing to serve, or too much.
        AdapterError: adapters that do not fit their base or each other.
    """
    found = find_sources(snapshot, checkpoints, shards.identities if shards else None)
    _refuse_unservable(found)

    def find_small_files() -> BaseModel | None:
        return _find_small_files(settings, found)

    if late is not None and any(s.kind is Kind.RANK_SHARDS for s in found):
        with late.fetching() as arriving:  # consolidated they are the base, not as they arrive
            snapshot = arriving.wait()
        return make_ready(settings, snapshot, checkpoints, timeline)
    sources = [make_whole(source, settings, timeline, find_small_files, shards) for source in found]
    base = _base_source(settings, sources)
    rest = [s for s in sources if s is not base]
    adapters = [s for s in rest if s.checkpoint.kind is Kind.ADAPTER]
    models = [s for s in rest if s.checkpoint.kind in _SERVED]
    if adapters and models:
        raise CheckpointError(
            "full models and adapters together",
            problems=[f"{s.checkpoint.kind}: {s.place}" for s in rest],
            next_step="leave one sort out of the paths, or name the model the adapters were "
            f"trained over: base_model: checkpoint:{models[0].place}/",
        )
    if not adapters:
        return _whole_model(settings, [*models, *([base] if base else [])])
    return _with_adapters(settings, base, adapters, timeline, late)


def _refuse_unservable(sources: Sequence[Source]) -> None:
    for source in sources:
        checkpoint = source.checkpoint
        if checkpoint.kind is Kind.UNKNOWN:
            found = checkpoint.detail.get("found")
            raise CheckpointError(
                "no checkpoint that podloader knows",
                where=source.place,
                expected=str(checkpoint.detail.get("lacks", "a model or an adapter")),
                got=", ".join(map(str, found[:8])) if isinstance(found, list) else "nothing",
                next_step="choose the checkpoint's whole folder in paths, with / at its end",
            )
        if checkpoint.kind is Kind.MEGATRON:
            raise refuse_ranks(checkpoint)
        missing = checkpoint.detail.get("missing")
        if missing and checkpoint.kind is not Kind.RANK_SHARDS:  # there, tensors are named
            raise CheckpointError(
                "shards are missing from the checkpoint",
                where=source.place,
                problems=[str(name) for name in missing] if isinstance(missing, list) else (),
                next_step="widen the pattern until it takes every shard",
            )


def _base_source(settings: Settings, sources: Sequence[Source]) -> Source | None:
    """Return the checkpoint that ``base_model: checkpoint:…`` names, if it names one."""
    name = settings.base_checkpoint
    if name is None:
        return None
    place = f"{name.job}/{name.name}"
    for source in sources:
        if place in source.places:
            if source.checkpoint.kind is Kind.FULL:
                return source
            raise _not_a_base(place, source.checkpoint.kind.value)
    raise _not_a_base(place, "no checkpoint")


def _not_a_base(where: str, got: str) -> ConfigError:
    return ConfigError(
        "the base model is no full model",
        where=where,
        expected="a full Hugging Face model",
        got=got,
        next_step="correct base_model",
    )


def _whole_model(settings: Settings, models: Sequence[Source]) -> ReadyModel:
    if len(models) != 1:
        raise CheckpointError(
            f"{len(models)} full models, where one is served",
            problems=[model.place for model in models],
            next_step="narrow artifact_references[].paths to one of them",
        )
    model = models[0]
    path = model.checkpoint.path
    _check_weights(settings, model.checkpoint)
    tokenizer = path
    if not _has_tokenizer(tokenizer) and settings.base_model and not settings.base_checkpoint:
        tokenizer = _find_base(settings, settings.base_model, weights=False).path
    if not _has_tokenizer(tokenizer):
        raise CheckpointError(
            "the model came without a tokenizer",
            where=model.place,
            expected=" or ".join(_TOKENIZERS),
            next_step="set base_model to the model it was trained from: its tokenizer is taken",
        )
    if model.checkpoint.kind is Kind.WHISPER and not _has_any(path, _HEARING):
        raise CheckpointError(
            "the Whisper model came without its feature extractor",
            where=model.place,
            expected=" or ".join(_HEARING),
            next_step="save the processor beside the model in the training job",
        )
    provenance: dict[str, object] = {
        "kind": model.kind.value,
        "checkpoint": model.place,
        "files": dict(model.files),
    }
    return ReadyModel(path, (), None, tokenizer, provenance)


def _with_adapters(
    settings: Settings,
    base: Source | None,
    sources: Sequence[Source],
    timeline: Timeline,
    late: LateWeights | None,
) -> ReadyModel:
    named = name_adapters([(source.job, Path(source.place)) for source in sources])
    adapters = [
        NamedAdapter(n.name, s.checkpoint.path) for n, s in zip(named, sources, strict=True)
    ]
    decision = decide(settings.adapter_policy, adapters, base_is_fetched=base is not None)
    _log.info("adapters: %s", decision.why)
    if base is not None:
        _check_weights(settings, base.checkpoint)
    merged = None
    if late is not None and base is not None:
        # What the tensors of a quantised model stand for is in part told by the weights alone.
        plain = quantisation_of(read_json(base.checkpoint.path / "config.json")) is None
        if plain:
            with timeline.stage("fit"):
                _check_fit(settings, base.checkpoint, adapters, late)
        with late.fetching() as arriving:
            if decision.mode == "merge" and plain:
                with timeline.stage("merge"):
                    merged = _merge(
                        settings, base.checkpoint.path, adapters, _unnamed(settings), arriving
                    )
            (base,) = find_sources(arriving.wait(), [base.checkpoint])
    if base is None:
        with timeline.stage("base model"):
            name = settings.base_model or _named_base(sources)
            _check_fit_on_hub(settings, name, adapters)
            found = _find_base(settings, name)
    else:
        found = BaseModel(base.checkpoint.path, {"checkpoint": dict(base.files)})
    made_from: dict[str, object] = {
        "mode": decision.mode,
        "base": found.identity,
        "adapters": {a.name: dict(s.files) for a, s in zip(adapters, sources, strict=True)},
    }
    if decision.mode == "merge":
        made_from |= {"exact": settings.exact, "dequantise": settings.dequantise}
    output = output_folder(settings, decision.mode, made_from)
    if merged is not None:
        ready = replace(merged, path=output, tokenizer=give_name(merged.path, output))
    else:
        with timeline.stage(decision.mode):
            if decision.mode == "attach":
                ready = attach(found.path, adapters, output)
            else:
                ready = _merge(settings, found.path, adapters, output)
    provenance = ready.provenance | {"why": decision.why, "made_from": made_from}
    if decision.mode == "merge":
        provenance["name"] = adapters[0].name
    return replace(ready, provenance=provenance)


def _check_fit(
    settings: Settings, base: Checkpoint, adapters: Sequence[NamedAdapter], late: LateWeights
) -> None:
    tensors = {name: stored.info for name, stored in late.tensors.items()}
    view = Base(tensors, read_json(base.path / "config.json"))
    check_all(adapters, view, allow_pickle=settings.allow_pickle)


def _check_fit_on_hub(settings: Settings, name: str, adapters: Sequence[NamedAdapter]) -> None:
    """Check the adapters against the headers of a model on the Hub whose weights are not here."""
    from loader.stores.hub_headers import read_tensors

    if Path(name).expanduser().is_dir() or not REPO_ID.fullmatch(name):
        return
    small = _find_base(settings, name, weights=False)
    config = read_json(small.path / "config.json")
    if any(small.path.glob("*.safetensors")) or quantisation_of(config) is not None:
        return  # whoever attaches or merges looks at the weights themselves
    token = settings.hf_token.value if settings.hf_token else None
    tensors = read_tensors(name, str(small.identity["commit"]), token=token)
    if tensors is not None:
        infos = {
            tensor: TensorInfo(tensor, t.dtype, t.shape, 0, size_bytes(t.dtype, t.shape))
            for tensor, t in tensors.items()
        }
        check_all(adapters, Base(infos, config), allow_pickle=settings.allow_pickle)


def _merge(
    settings: Settings,
    base: Path,
    adapters: Sequence[NamedAdapter],
    output: Path,
    arriving: Arriving | None = None,
) -> ReadyModel:
    from loader.adapters.merge import WeightedAdapter, merge  # torch

    if output.is_dir():  # published whole, and its name is the digest of what it was made from
        _log.info("the merged model is here already: %s", output)
        return ReadyModel(output, (), None, output, {})
    return merge(
        base,
        [WeightedAdapter(adapter.folder) for adapter in adapters],
        output,
        exact=settings.exact,
        dequantise=settings.dequantise,
        allow_pickle=settings.allow_pickle,
        incoming=arriving.weights if arriving else None,
    )


def _unnamed(settings: Settings) -> Path:
    """Return a place for a merged model whose base has no digest yet, to be moved from there."""
    return output_folder(settings, "merging", {"process": os.getpid(), "moment": time.time_ns()})


def _named_base(sources: Sequence[Source]) -> str:
    """Return the one base that all adapters' configs name."""
    named = {str(s.checkpoint.detail.get("base_model") or ""): s.place for s in sources}
    if len(named) > 1 or "" in named:
        raise AdapterError(
            "the adapters do not name one base model",
            problems=[
                f"{place}: {base or 'no base_model_name_or_path'}" for base, place in named.items()
            ],
            next_step="set base_model",
        )
    return next(iter(named))


def _find_small_files(settings: Settings, sources: Sequence[Source]) -> BaseModel | None:
    """Return where the base model's config and tokenizer lie, None where no base is named."""
    if settings.base_model is None:
        return None
    if (name := settings.base_checkpoint) is None:
        return _find_base(settings, settings.base_model, weights=False)
    for source in sources:
        if f"{name.job}/{name.name}" in source.places:
            return BaseModel(source.checkpoint.path, {"checkpoint": dict(source.files)})
    return None


def _find_base(settings: Settings, name: str, *, weights: bool = True) -> BaseModel:
    """Return the base called *name*: a local folder, a URL's folder, else a model of the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        checkpoint = open_checkpoint(folder)
        if checkpoint.kind is not Kind.FULL:
            raise _not_a_base(str(folder), checkpoint.kind.value)
        _check_weights(settings, checkpoint)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        return BaseModel(folder.resolve(), {"folder": str(folder.resolve()), "files": stats})
    if is_remote(name):
        return fetch_base(settings, name, weights=weights)
    if not REPO_ID.fullmatch(name):
        raise AdapterError(
            "the base model is not there",
            where=name,
            expected="a folder on this machine, a folder's URL or a Hugging Face id",
            next_step="set base_model to where the base model lies now",
        )
    token = settings.hf_token.value if settings.hf_token else None
    model = fetch_model(
        name,
        settings.base_revision,
        token=token,
        allow_pickle=settings.allow_pickle,
        concurrency=settings.concurrency,
        weights=weights,
    )
    return BaseModel(model.path, {"hub": name, "commit": model.commit})


def _check_weights(settings: Settings, checkpoint: Checkpoint) -> None:
    if checkpoint.detail.get("format") == "bin" and not settings.allow_pickle:
        raise FormatError(
            "the weights are pickled",
            where=str(checkpoint.path),
            expected="safetensors",
            got=".bin files",
            next_step="save them as safetensors, or set allow_pickle to read tensors from them",
        )


def _has_tokenizer(folder: Path) -> bool:
    return _has_any(folder, _TOKENIZERS)


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)
