"""Adapters beside their base: named, checked from headers alone, ready for vLLM to serve by name.

The rule of ``auto``, which is about the faster server:

1. Several adapters are attached: they share one base.
2. What vLLM would refuse has to be merged, one adapter at a time.
3. One plain adapter is merged where its base is a training checkpoint too, or lies behind a URL:
   the merge goes along with the base's download, and a merged server spends nothing on an adapter
   at each token.
4. Over a base that lies here, or on the Hub, it is attached: a merge would have to read and write
   the whole model before the server can start.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from loader.adapters.config import read_adapter_config
from loader.adapters.converted import as_safetensors
from loader.adapters.edit_plan import MergePlan, plan_merge
from loader.adapters.edits import Replace
from loader.adapters.effect import check_effect, check_finite, check_read
from loader.adapters.plan_builder import (
    Base,
    UnaskedError,
    check_base_folder,
)
from loader.adapters.problems import run_all
from loader.adapters.surroundings import write_tokenizer
from loader.errors import AdapterError
from loader.types import ReadyModel, ServedAdapter
from loader.weights.header import TensorInfo
from loader.weights.inspect import read_json
from loader.weights.quantised import find_packed, plain_dtype, plain_tensors, read_model_config
from loader.weights.stored import (
    StoredTensor,
    find_weight_files,
    list_tensors,
    read_bytes,
    refuse_pickle,
)

Policy = Literal["auto", "attach", "merge"]
# vllm/config/lora.py, MaxLoRARanks; 1 is there since 0.33 only.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_RANK = re.compile(r"^rank-\d+$")
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")
# vllm/lora/utils.py, parse_fine_tuned_lora_name and is_base_embedding_weights.
_ATTACHABLE = re.compile(
    r"\.lora_[AB]\.weight$|\.lora_embedding_[AB]$|\.(score|classifier)\.(weight|bias)$"
    r"|\.(embed_tokens|lm_head)\.base_layer\.weight$"
)
_log = logging.getLogger("podloader")


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter and the model name that requests call it by."""

    name: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do with the adapters, and why, in one line."""

    mode: Literal["attach", "merge"]
    why: str


def name_adapters(folders: Sequence[tuple[str, Path]]) -> tuple[NamedAdapter, ...]:
    """Return a name for each (job, folder), in order: ``<job>``, or ``<job>-<checkpoint>``.

    The checkpoint is the folder's own name; where that does not tell two of a job apart, as many
    folders above it as it takes come before it.
    """
    per_job = Counter(job for job, _ in folders)
    names = {}
    for job, folder in folders:
        depth = 0 if per_job[job] == 1 else 1
        others = [f for j, f in folders if j == job and f != folder]
        while depth and any(_tail(f, depth) == _tail(folder, depth) for f in others):
            depth += 1
            if depth > len(folder.parts):
                break
        names[job, folder] = "-".join(filter(None, [job, _tail(folder, depth)]))
    return _tell_apart([NamedAdapter(names[job, folder], folder) for job, folder in folders])


def _tail(folder: Path, depth: int) -> str:
    return _UNSAFE.sub("_", "-".join(folder.parts[-depth:])) if depth else ""


def _tell_apart(named: Sequence[NamedAdapter]) -> tuple[NamedAdapter, ...]:
    """Number what still collides: job "a" with checkpoint "b-c" and job "a-b" with "c"."""
    taken: set[str] = set()
    found = []
    for adapter in named:
        name, number = adapter.name, 2
        while name in taken:
            name, number = f"{adapter.name}-{number}", number + 1
        taken.add(name)
        found.append(NamedAdapter(name, adapter.folder))
    return tuple(found)


def decide(
    policy: Policy,
    adapters: Sequence[NamedAdapter],
    *,
    base_is_fetched: bool = False,
    by_configs: bool = False,
) -> Decision:
    """Return whether to attach or to merge; ``base_is_fetched``: podloader itself fetches the base.

    ``by_configs``: their weights are not here yet, and may still be a reason to merge.

    Raises:
        AdapterError: several adapters of which one cannot be attached, several to be merged, or
            ``attach`` for what vLLM refuses; also a malformed ``adapter_config.json``.
    """
    found = run_all(partial(_find_obstacles, adapter.folder, by_configs) for adapter in adapters)
    obstacles = {a.name: texts for a, texts in zip(adapters, found, strict=True)}
    refused = {name: texts for name, texts in obstacles.items() if texts}
    problems = [f"{name}: {'; '.join(texts)}" for name, texts in refused.items()]
    if len(adapters) > 1 and policy == "merge":
        raise AdapterError(
            "several adapters cannot be merged into one model",
            problems=[adapter.name for adapter in adapters],
            expected="one adapter, or the policy attach",
            next_step="narrow the paths to one adapter; `podloader merge` combines with weights",
        )
    if refused and (len(adapters) > 1 or policy == "attach"):
        raise AdapterError(
            "adapters that vLLM cannot attach",
            problems=problems,
            next_step="serve each alone, merged" if len(adapters) > 1 else "set the policy to auto",
        )
    if policy != "auto":
        return Decision(policy, f"{policy}: the configuration asks for it")
    if refused:
        return Decision("merge", f"merge: vLLM cannot attach {problems[0]}")
    if len(adapters) > 1:
        return Decision("attach", f"attach: {len(adapters)} adapters share one base")
    if base_is_fetched:
        return Decision("merge", "merge: it goes along with the base's download")
    return Decision("attach", "attach: vLLM serves plain LoRA as it is, nothing to write first")


def _find_obstacles(folder: Path, by_config: bool) -> tuple[str, ...]:
    config = read_adapter_config(folder)
    found = config.attach_obstacles()
    whole = [] if found or by_config else _whole_tensors(folder)
    if whole:
        found = (f"tensors that replace the base's own ({', '.join(whole[:3])})",)
    if config.max_rank > LORA_RANKS[-1]:
        found = (*found, f"rank {config.max_rank}, vLLM's limit is {LORA_RANKS[-1]}")
    return found


def _whole_tensors(folder: Path) -> list[str]:
    """Return the tensors that vLLM knows no place for, such as resized embeddings."""
    files = find_weight_files(folder, "adapter_model")
    names = () if files.pickled else list_tensors(files)
    return [name for name in names if not _ATTACHABLE.search(name)]


def attach(
    base: Path,
    adapters: Sequence[NamedAdapter],
    output: Path,
    *,
    allow_pickle: bool = False,
    tensors: Mapping[str, TensorInfo] | None = None,
) -> ReadyModel:
    """Return the base with *adapters* to be attached; only what no folder of theirs has is written.

    ``tokenizer`` is a folder with tokenizer and chat template: the one they came in where it has
    both, else *output*. Beside it lie adapters that came pickled, as safetensors. *tensors* are
    the base's where its weights are not in *base* yet, which is asked for again when they are.

    Raises:
        AdapterError: tensors without a module, of other shapes, ranks that disagree, or no effect;
            of all adapters everything wrong is listed.
        FormatError: broken files, or pickles without ``allow_pickle``.
        DiskError: the tokenizer folder could not be written.
    """
    view = Base(tensors or _list_base(base, allow_pickle), read_json(base / "config.json"))
    here = base if tensors is None else None
    check_all(adapters, view, allow_pickle=allow_pickle, base=here)
    readable = [
        replace(adapter, folder=as_safetensors(adapter.folder, Path(f"{output}-{number}")))
        for number, adapter in enumerate(adapters)
    ]
    if readable != list(adapters):
        check_all(readable, view, base=here)  # its copy of the base, which a pickle does not show
        adapters = readable
    configs = [read_adapter_config(adapter.folder) for adapter in adapters]
    warnings = []
    for adapter, config in zip(adapters, configs, strict=True):
        config.check_patterns([name.rpartition(".")[0] for name in view.tensors])
        if not config.may_be_over(base):
            warnings.append(f"{adapter.name} was trained over {config.base_model}, not {base}")
            _log.warning("every shape fits, but %s", warnings[-1])
    tokenizer = write_tokenizer(base, [adapter.folder for adapter in adapters], output)
    ranks = [config.max_rank for config in configs]
    served = tuple(
        ServedAdapter(adapter.name, adapter.folder, rank)
        for adapter, rank in zip(adapters, ranks, strict=True)
    )
    provenance: dict[str, object] = {
        "kind": "attached",
        "base": str(base),
        "adapters": {adapter.name: str(adapter.folder) for adapter in adapters},
        **({"warnings": warnings} if warnings else {}),
    }
    return ReadyModel(
        base, served, smallest_limit(ranks) if served else None, tokenizer, provenance
    )


def smallest_limit(ranks: Iterable[int]) -> int:
    """Return the smallest ``max_lora_rank`` that vLLM allows for all of *ranks*."""
    highest = max(ranks, default=0)
    return next((rank for rank in LORA_RANKS if rank >= highest), LORA_RANKS[-1])


def _list_base(base: Path, allow_pickle: bool) -> Mapping[str, TensorInfo]:
    check_base_folder(base)
    files = find_weight_files(base)
    if files.pickled and allow_pickle:
        from loader.weights.readers import open_weights  # torch

        return open_weights(base, allow_pickle=True).tensors
    stored = list_tensors(files)
    tensors = {name: tensor.info for name, tensor in stored.items()}
    config = read_model_config(base)
    packed = find_packed(config, tensors, lambda name: read_bytes(stored[name]))
    return plain_tensors(tensors, packed, plain_dtype(config))


def check_all(
    adapters: Sequence[NamedAdapter],
    view: Base,
    *,
    allow_pickle: bool = False,
    base: Path | None = None,
) -> bool:
    """Return whether it is known that every adapter fits *view*, told from headers alone.

    It is not where it takes transformers to say, which *view* is not to ask.

    With ``base``, whose weights are there, also that vLLM would leave nothing of theirs out.

    Raises:
        AdapterError: of all adapters everything that is wrong.
        FormatError: broken files, or pickles without ``allow_pickle``.
    """

    def check(folder: Path) -> bool:
        plan = check_fit(folder, view, allow_pickle=allow_pickle)
        if base is not None and plan is not None:
            _check_own_embeddings(folder, plan, base)
        return plan is not None

    return all(run_all(partial(check, adapter.folder) for adapter in adapters))


def check_fit(folder: Path, base: Base, *, allow_pickle: bool = False) -> MergePlan | None:
    """Return what the adapter in *folder* does to *base*, told from headers alone.

    None where it takes transformers to say, which *base* is not to ask.

    Raises:
        AdapterError: tensors without a module, of other shapes, ranks that disagree, or no effect.
        FormatError: broken files, or pickles without ``allow_pickle``.
    """
    config = read_adapter_config(folder)
    shapes, read = open_adapter(folder, allow_pickle)

    def fits() -> MergePlan | None:
        with contextlib.suppress(UnaskedError):
            return plan_merge(config, shapes, base, only_fit=True)
        return None

    checks = partial(check_effect, config), partial(check_finite, folder)
    return check_read(fits, checks, config, shapes, read)


def open_adapter(
    folder: Path, allow_pickle: bool
) -> tuple[Mapping[str, TensorInfo], Callable[[str], bytes | memoryview]]:
    """Return the adapter's tensors, and what reads the bytes of one."""
    files = find_weight_files(folder, "adapter_model")
    if not files.pickled:
        stored = list_tensors(files)
        shapes = {name: tensor.info for name, tensor in stored.items()}
        return shapes, lambda name: read_bytes(stored[name])
    if not allow_pickle:
        raise refuse_pickle(files.paths[0])
    from loader.weights.readers import open_weights  # torch

    reader = open_weights(folder, stem="adapter_model", allow_pickle=True)
    return reader.tensors, reader.read_raw


def _check_own_embeddings(folder: Path, plan: MergePlan, base: Path) -> None:
    """Raise AdapterError when the copy of the base that PEFT saved is another than the base."""
    files = find_weight_files(folder, "adapter_model")
    stored = {} if files.pickled else list_tensors(files)
    own = [
        edit.source
        for edits in plan.edits.values()
        for edit in edits
        if isinstance(edit, Replace)
        and edit.source in stored
        and _differs(edit, plan, stored, base)
    ]
    if own:
        raise AdapterError(
            "an adapter with embeddings of its own, which vLLM would leave out",
            where=str(folder),
            problems=own,
            expected="the base's own values",
            next_step="merge this adapter: set the policy to merge",
        )


def _differs(
    edit: Replace, plan: MergePlan, stored: Mapping[str, StoredTensor], base: Path
) -> bool:
    """Return whether the copy of the base that PEFT saved is another than the base itself."""
    if not edit.is_saved_base:
        return False
    if edit.target in plan.shapes:
        return True
    origin = plan.origins.get(edit.target, edit.target)
    own = list_tensors(find_weight_files(base)).get(origin)
    ours = stored[edit.source]
    return (
        own is not None
        and own.info.dtype == ours.info.dtype
        and read_bytes(own) != read_bytes(ours)
    )
