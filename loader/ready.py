"""Checkpoints on disk -> ReadyModel: which one is the base, and what happens to the adapters."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from loader.adapters.attach import NamedAdapter, attach, check_fit, decide, name_adapters
from loader.adapters.draft import Base
from loader.adapters.incoming import IncomingWeights
from loader.errors import AdapterError, CheckpointError, ConfigError, FormatError, UnsupportedError
from loader.fetch.files import STATE
from loader.settings import Settings
from loader.stores.hub import REPO_ID, fetch_model
from loader.timeline import Timeline
from loader.types import Checkpoint, Kind, ReadyModel, Snapshot
from loader.weights.inspect import open_checkpoint, read_json
from loader.weights.listing import StoredTensor
from loader.weights.publishing import disk_error

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


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model on this disk, and what tells it from any other."""

    path: Path
    identity: dict[str, object]


def make_ready(
    settings: Settings,
    snapshot: Snapshot,
    checkpoints: Sequence[Checkpoint],
    timeline: Timeline,
    late: LateWeights | None = None,
) -> ReadyModel:
    """Return the model that *checkpoints*, those of *snapshot*, make up.

    With ``late``, the snapshot lacks the weights of the base: they are fetched when it is known
    that the adapters fit, and merged into while they arrive.

    Raises:
        UnsupportedError: a kind that cannot be served yet.
        CheckpointError: nothing to serve, or too much.
        AdapterError: adapters that do not fit their base or each other.
    """
    _refuse_unservable(checkpoints, snapshot)
    base = _base_checkpoint(settings, snapshot, checkpoints)
    rest = [c for c in checkpoints if c is not base]
    adapters = [c for c in rest if c.kind is Kind.ADAPTER]
    models = [c for c in rest if c.kind in _SERVED]
    if adapters and models:
        raise CheckpointError(
            "full models and adapters together",
            problems=[f"{c.kind}: {_place(c, snapshot)}" for c in rest],
            next_step="leave one sort out of the paths, or name the model the adapters were "
            f"trained over: base_model: checkpoint:{_place(models[0], snapshot)}/",
        )
    if not adapters:
        return _whole_model(settings, snapshot, [*models, *([base] if base else [])])
    return _with_adapters(settings, snapshot, base, adapters, timeline, late)


def _refuse_unservable(checkpoints: Sequence[Checkpoint], snapshot: Snapshot) -> None:
    for checkpoint in checkpoints:
        where = _place(checkpoint, snapshot)
        if checkpoint.kind is Kind.UNKNOWN:
            found = checkpoint.detail.get("found")
            raise CheckpointError(
                "no checkpoint that podloader knows",
                where=where,
                expected=str(checkpoint.detail.get("lacks", "a model or an adapter")),
                got=", ".join(map(str, found[:8])) if isinstance(found, list) else "nothing",
                next_step="choose the checkpoint's whole folder in paths, with / at its end",
            )
        if checkpoint.kind not in (*_SERVED, Kind.ADAPTER):
            raise UnsupportedError(
                f"a checkpoint of the kind {checkpoint.kind.value!r} cannot be served yet",
                where=where,
                expected="a full Hugging Face model or a PEFT adapter",
                got=f"{checkpoint.kind.value} ({_DESCRIPTIONS[checkpoint.kind]})",
                next_step="save it as a Hugging Face model in the training job",
            )
        if missing := checkpoint.detail.get("missing"):
            raise CheckpointError(
                "shards are missing from the checkpoint",
                where=where,
                problems=[str(name) for name in missing] if isinstance(missing, list) else (),
                next_step="widen the pattern until it takes every shard",
            )


_DESCRIPTIONS = {
    Kind.RANK_SHARDS: "Hugging Face shards spread over ranks",
    Kind.DCP: "torch.distributed.checkpoint, as FSDP saves",
    Kind.ZERO: "DeepSpeed ZeRO",
}


def _base_checkpoint(
    settings: Settings, snapshot: Snapshot, checkpoints: Sequence[Checkpoint]
) -> Checkpoint | None:
    """Return the checkpoint that ``base_model: checkpoint:…`` names, if it names one."""
    name = settings.base_checkpoint
    if name is None:
        return None
    place = f"{name.job}/{name.name}"
    for checkpoint in checkpoints:
        if _place(checkpoint, snapshot) == place:
            if checkpoint.kind is Kind.FULL:
                return checkpoint
            raise _not_a_base(place, checkpoint.kind.value)
    raise _not_a_base(place, "no checkpoint")


def _not_a_base(where: str, got: str) -> ConfigError:
    return ConfigError(
        "the base model is no full model",
        where=where,
        expected="a full Hugging Face model",
        got=got,
        next_step="correct base_model",
    )


def _whole_model(
    settings: Settings, snapshot: Snapshot, models: Sequence[Checkpoint]
) -> ReadyModel:
    if len(models) != 1:
        raise CheckpointError(
            f"{len(models)} full models, where one is served",
            problems=[_place(c, snapshot) for c in models],
            next_step="narrow artifact_references[].paths to one of them",
        )
    model = models[0]
    _check_weights(settings, model)
    tokenizer = model.path
    if not _has_tokenizer(tokenizer) and settings.base_model and not settings.base_checkpoint:
        tokenizer = _find_base(settings, settings.base_model).path
    if not _has_tokenizer(tokenizer):
        raise CheckpointError(
            "the model came without a tokenizer",
            where=_place(model, snapshot),
            expected=" or ".join(_TOKENIZERS),
            next_step="set base_model to the model it was trained from: its tokenizer is taken",
        )
    if model.kind is Kind.WHISPER and not _has_any(model.path, _HEARING):
        raise CheckpointError(
            "the Whisper model came without its feature extractor",
            where=_place(model, snapshot),
            expected=" or ".join(_HEARING),
            next_step="save the processor beside the model in the training job",
        )
    provenance: dict[str, object] = {
        "kind": model.kind.value,
        "checkpoint": _place(model, snapshot),
        "files": _digests(model, snapshot),
    }
    return ReadyModel(model.path, (), None, tokenizer, provenance)


def _with_adapters(
    settings: Settings,
    snapshot: Snapshot,
    base: Checkpoint | None,
    checkpoints: Sequence[Checkpoint],
    timeline: Timeline,
    late: LateWeights | None,
) -> ReadyModel:
    jobs = [(_place(c, snapshot).partition("/")[0], c.path) for c in checkpoints]
    adapters = name_adapters(jobs)
    decision = decide(settings.adapter_policy, adapters, base_is_fetched=base is not None)
    _log.info("adapters: %s", decision.why)
    if base is not None:
        _check_weights(settings, base)
    if late is not None and base is not None:
        with timeline.stage("fit"):
            _check_fit(settings, base, adapters, late)
        with late.fetching() as arriving:
            merged = None
            if decision.mode == "merge":
                with timeline.stage("merge"):
                    merged = _merge(settings, base.path, adapters, _unnamed(settings), arriving)
            snapshot = arriving.wait()
    if base is None:
        with timeline.stage("base model"):
            found = _find_base(settings, settings.base_model or _named_base(checkpoints, snapshot))
    else:
        found = BaseModel(base.path, {"checkpoint": _digests(base, snapshot)})
    made_from: dict[str, object] = {
        "mode": decision.mode,
        "base": found.identity,
        "adapters": {
            a.name: _digests(c, snapshot) for a, c in zip(adapters, checkpoints, strict=True)
        },
    }
    if decision.mode == "merge":
        made_from["exact"] = settings.exact
    output = _output(settings, decision.mode, made_from)
    if late is not None and merged is not None:
        ready = _give_name(merged, output)
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
    for adapter in adapters:
        check_fit(adapter.folder, view, allow_pickle=settings.allow_pickle)


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
        allow_pickle=settings.allow_pickle,
        incoming=arriving.weights if arriving else None,
    )


def _unnamed(settings: Settings) -> Path:
    """Return a place for a merged model whose base has no digest yet, to be moved from there."""
    return _output(settings, "merging", {"process": os.getpid(), "moment": time.time_ns()})


def _give_name(ready: ReadyModel, output: Path) -> ReadyModel:
    """Return *ready* moved to *output*; one that is there already is the same and stays."""
    try:
        output.exists() or ready.path.rename(output)
        shutil.rmtree(ready.path, ignore_errors=True)
    except OSError as error:
        raise disk_error(output, error) from error
    return replace(ready, path=output, tokenizer=output)


def _named_base(checkpoints: Sequence[Checkpoint], snapshot: Snapshot) -> str:
    """Return the one base that all adapters' configs name."""
    named = {str(c.detail.get("base_model") or ""): _place(c, snapshot) for c in checkpoints}
    if len(named) > 1 or "" in named:
        raise AdapterError(
            "the adapters do not name one base model",
            problems=[
                f"{place}: {base or 'no base_model_name_or_path'}" for base, place in named.items()
            ],
            next_step="set base_model",
        )
    return next(iter(named))


def _find_base(settings: Settings, name: str) -> BaseModel:
    """Return the base called *name*: a local folder, else a model of the Hub."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        checkpoint = open_checkpoint(folder)
        if checkpoint.kind is not Kind.FULL:
            raise _not_a_base(str(folder), checkpoint.kind.value)
        _check_weights(settings, checkpoint)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        stats = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
        return BaseModel(folder.resolve(), {"folder": str(folder.resolve()), "files": stats})
    if not REPO_ID.fullmatch(name):
        raise AdapterError(
            "the base model is not there",
            where=name,
            expected="a folder on this machine or a Hugging Face id",
            next_step="set base_model to where the base model lies now",
        )
    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    model = fetch_model(
        name,
        settings.base_revision,
        token=token,
        allow_pickle=settings.allow_pickle,
        concurrency=settings.concurrency,
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


def _output(settings: Settings, mode: str, made_from: dict[str, object]) -> Path:
    """Return the folder for what is made, named by the digest of what it is made from."""
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    cache = settings.cache_folder or settings.training.download_folder / STATE / "models"
    return cache.absolute() / f"{mode}-{key}"


def _has_tokenizer(folder: Path) -> bool:
    return _has_any(folder, _TOKENIZERS)


def _has_any(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)


def _place(checkpoint: Checkpoint, snapshot: Snapshot) -> str:
    """Return ``<job>/rank-<N>/<folder>``."""
    return checkpoint.path.relative_to(snapshot.root).as_posix()


def _digests(checkpoint: Checkpoint, snapshot: Snapshot) -> dict[str, str]:
    """Return the digest of every file of the checkpoint's own folder, by path."""
    place = _place(checkpoint, snapshot)
    return {f.path: f.digest for f in snapshot.files if f.path.rpartition("/")[0] == place}
