"""What training frameworks leave in folders of their ranks: found by names, torch stays out.

::

    <checkpoint>/[pytorch_model_fsdp_0/]{.metadata, __<r>_<n>.distcp}      torch's DCP
    <checkpoint>/{latest, <tag>/…_mp_rank_00_…_states.pt}                  DeepSpeed
    <checkpoint>/pytorch_model_fsdp.bin                                    accelerate, all in one
    <checkpoint>/model_world_size_<N>_rank_<r>.pt                          verl
    <checkpoint>/[iter_<n>/]mp_rank_<r>/model_optim_rng.pt                 Megatron, by rank
    <checkpoint>/[optimizer_0/]…                                           an optimizer alone

What of it is not served, and why, says ``formats/refused.py``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from loader.types import Checkpoint, Kind
from loader.weights.layout import Place

# accelerate's full state dict, on the first rank; of its second model with _1
FSDP_WEIGHTS = re.compile(r"^pytorch_model_fsdp(_\d+)?\.bin$")
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's and verl's
DTENSOR_FILE = re.compile(r"^model_world_size_(?P<world>\d+)_rank_(?P<rank>\d+)\.pt$")
BESIDE = ("huggingface", "lora_adapter")  # verl's folders of config, tokenizer and adapter
_DCP = re.compile(r"\.distcp$|^shard-\d+-model-\d+-of-\d+\.safetensors$")
_DCP_OF_PARENT = re.compile(r"^(pytorch_model_fsdp_\d+|model(_\d+)?|sharded)$")
_OPTIMIZER = re.compile(r"^optim(izer)?(_\d+)?$")
_OPTIMIZER_FILES = re.compile(
    r"^(optimizer(_\d+)?\.(bin|pt)|distrib_optim\.pt|optim_world_size_\d+_rank_\d+\.pt)$"
    r"|_optim_states\.pt$"
)
_ZERO = re.compile(r"mp_rank_\d+_(optim|model)_states\.pt$")
_ZERO_TAG = re.compile(r"^(global_step\d+(_universal)?|pytorch_model(_\d+)?)$")
_ZERO_MODEL_TAG = re.compile(r"^pytorch_model(_\d+)?$")  # accelerate's, a tag for each model
_MEGATRON_RANK = re.compile(r"^mp_rank_\d{2,}(_\d{3})*$")
_MEGATRON = frozenset({"model_optim_rng.pt", "model_rng.pt"})
_MOST_OF_NAME = 4096  # letters, more than any folder's
_ITERATION = re.compile(r"^iter_\d+$")
_STEP = re.compile(r"^(?:(?P<above>.*)/)?(?P<name>(iter_|global_step_)(?P<number>\d+))(/[^/]+)?$")


def find_cut(places: Sequence[Place], by_folder: Mapping[str, Place]) -> dict[str, Checkpoint]:
    """Return the checkpoints that are cut between ranks, by folder, but for DeepSpeed's."""
    found = {**_find_megatron(places, by_folder), **_find_full_states(places)}
    return found | _find_dcp(places, by_folder) | _find_dtensors(places, by_folder)


def find_zero(places: Sequence[Place], by_folder: Mapping[str, Place]) -> dict[str, Checkpoint]:
    """Return DeepSpeed's checkpoints by folder.

    The tag is the one that ``latest`` names, there or not; without ``latest`` the highest step's.
    """
    tags: dict[str, list[Place]] = {}
    for place in places:
        owner = by_folder.get(place.parent)
        tagged = _ZERO_TAG.match(place.base) or (owner and "latest" in owner.names)
        if tagged and any(_ZERO.search(name) for name in place.names):
            tags.setdefault(place.parent, []).append(place)
    found = {}
    for relative, tagged_places in tags.items():
        owner = by_folder.get(relative)
        highest = max(tagged_places, key=lambda p: (len(p.base), p.base))
        named = _read_latest(owner, "latest") if owner else []
        chosen = next((p for p in tagged_places if [p.base] == named), highest)
        roots = [chosen.folder(rank).parent for rank in chosen.ranks]
        detail: dict[str, object] = {
            "tag": " and ".join(named) if named else chosen.base,
            "folders": [str(root) for root in roots],
            "tags": [p.base for p in tagged_places],
            "files": len(chosen.names),
        }
        models = [p.relative for p in tagged_places if _ZERO_MODEL_TAG.match(p.base)]
        if len(models) > 1:
            detail["models"] = models
        found[relative] = Checkpoint(Kind.ZERO, _folder_with_config(owner, roots[0]), detail)
    return found


def find_optimizers(places: Sequence[Place]) -> list[Checkpoint]:
    """Return the folders that hold an optimizer's state; meant where nothing else is found."""
    return [
        Checkpoint(Kind.OPTIMIZER, place.folder(place.ranks[0]), {"found": sorted(place.names)[:8]})
        for place in places
        if _is_optimizer(place)
        or (
            any(map(_OPTIMIZER_FILES.search, place.names))
            and not any(name.endswith("model_states.pt") for name in place.names)
        )
    ]


def _is_optimizer(place: Place) -> bool:
    """Return whether a folder of DCP files is called as that of an optimizer."""
    parts = any(_DCP.search(name) for name in place.names)
    return parts and bool(_OPTIMIZER.match(place.folder(place.ranks[0]).name))


def _read_latest(owner: Place, name: str) -> list[str]:
    """Return what the file *name* says on the ranks that have it: one text, as it should be."""
    texts = set()
    for rank in owner.holders(name):
        with (owner.folder(rank) / name).open(encoding="utf-8", errors="replace") as file:
            texts.add(file.read(_MOST_OF_NAME).strip())
    return sorted(texts)


def _missing_iteration(relative: str, by_folder: Mapping[str, Place]) -> dict[str, object]:
    """Return what ``TRACKER`` names and what there is, where that is none of the iterations."""
    if not (step := _STEP.match(relative)) or not (owner := by_folder.get(step["above"] or "")):
        return {}
    steps = [m for m in map(_STEP.match, by_folder) if m and m["above"] == step["above"]]
    named = _read_latest(owner, TRACKER)
    numbers = {m["number"].lstrip("0") for m in steps}
    if not named or (len(named) == 1 and named[0].lstrip("0") in numbers):
        return {}
    tags = sorted({m["name"] for m in steps})
    return {"tag": " and ".join(named), "tags": tags, "pointer": TRACKER}


def _find_dcp(places: Sequence[Place], by_folder: Mapping[str, Place]) -> dict[str, Checkpoint]:
    models: dict[str, list[Place]] = {}
    iterations = Counter(place.parent for place in places if _ITERATION.match(place.base))
    for place in places:
        if not any(_DCP.search(name) for name in place.names) or _is_optimizer(place):
            continue
        # Megatron-LM's folder of an iteration, where there is one: the config lies above it.
        alone = _ITERATION.match(place.base) and iterations[place.parent] == 1
        of_parent = alone or _DCP_OF_PARENT.match(place.base)
        models.setdefault(place.parent if of_parent else place.relative, []).append(place)
    found = {}
    for relative, of_one in models.items():
        place = of_one[0]
        detail: dict[str, object] = {
            "folders": [str(place.folder(rank)) for rank in place.ranks],
            "files": sum(bool(_DCP.search(name)) for name in place.names),
            "has_metadata": ".metadata" in place.names,
            **_missing_iteration(place.relative, by_folder),
        }
        if len(of_one) > 1:
            detail["models"] = [p.relative for p in of_one]
        home = place.folder(place.ranks[0])
        root = home if relative == place.relative else home.parent
        owner = by_folder.get(relative)
        found[relative] = Checkpoint(Kind.DCP, _folder_with_config(owner, root), detail)
    return found


def _find_full_states(places: Sequence[Place]) -> dict[str, Checkpoint]:
    found = {}
    for place in places:
        if names := sorted(filter(FSDP_WEIGHTS.match, place.names)):
            detail: dict[str, object] = {"folders": [str(place.folder(r)) for r in place.ranks]}
            if len(names) > 1:
                detail["models"] = names
            home = _folder_with_config(place, place.folder(place.holders(names[0])[0]))
            found[place.relative] = Checkpoint(Kind.RANK_SHARDS, home, detail)
    return found


def _find_dtensors(
    places: Sequence[Place], by_folder: Mapping[str, Place]
) -> dict[str, Checkpoint]:
    found = {}
    for place in places:
        names = [name for name in place.names if DTENSOR_FILE.match(name)]
        if names:
            folders = [str(place.folder(rank)) for rank in place.ranks]
            detail: dict[str, object] = {
                "folders": folders,
                "files": len(names),
                **_missing_iteration(place.relative, by_folder),
            }
            home = place.folder(place.ranks[0])
            found[place.relative] = Checkpoint(
                Kind.DTENSOR, _folder_with_config(place, home), detail
            )
    return found


def _find_megatron(
    places: Sequence[Place], by_folder: Mapping[str, Place]
) -> dict[str, Checkpoint]:
    """Return Megatron's checkpoints of a file per model-parallel rank: known, to be refused."""
    ranks: dict[str, list[Place]] = {}
    for place in places:
        if place.names & _MEGATRON:
            above = place.parent if _MEGATRON_RANK.match(place.base) else place.relative
            inside = _ITERATION.match(above.rpartition("/")[2])
            ranks.setdefault(above.rpartition("/")[0] if inside else above, []).append(place)
    found = {}
    for relative, cut in ranks.items():
        home = cut[0].folder(cut[0].ranks[0])
        names = sorted({place.base or home.name for place in cut})
        detail: dict[str, object] = {"model_ranks": names}
        owner = by_folder.get(relative)
        inner = cut[0].relative.removeprefix(relative).strip("/")
        root = home.parents[inner.count("/")] if inner else home
        found[relative] = Checkpoint(Kind.MEGATRON, _folder_with_config(owner, root), detail)
    return found


def _folder_with_config(owner: Place | None, otherwise: Path) -> Path:
    ranks = owner.holders("config.json") if owner else ()
    return owner.folder(ranks[0]) if owner and ranks else otherwise
