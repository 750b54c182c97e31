"""Merging over every architecture of transformers that can be built tiny, compared with PEFT.

    python -m benchmarks.architectures [--only PATTERN] [--all] [--every N] [--verbose]

Of each class (text, vision and text, sound, encoders, mixtures of experts) a tiny model with random
weights is saved as transformers saves it, and adapters over it as PEFT does: LoRA on all linear
layers, LoRA on the parameters of experts (``target_parameters``), and for classes that have one, an
adapter that was trained on the model without its head (``AutoModel``). ``merge`` with ``exact:
peft`` must give the bits of ``merge_and_unload``; every tensor of the loaded models is compared.

Prints a line for each that is not equal, and how many were equal, refused and wrong. Whatever
transformers or PEFT cannot build, save, load or merge is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.auto import modeling_auto

from loader.adapters.merge import WeightedAdapter, merge
from loader.errors import LoaderError

_MAPPINGS = (
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "SPEECH_SEQ_2_SEQ",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MULTIMODAL_LM",
    "MASKED_LM",
    "TEXT_ENCODING",
    "CTC",
    "AUDIO_CLASSIFICATION",
)
_MOST_PARAMETERS = 30_000_000
_SPREAD = 0.05
# What makes a default config small, by what its fields are called.
_SMALL: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|num_embeddings|.*codebook_size", 512),
    (r".*(num_|n_)?(hidden_|encoder_|decoder_)?layers?|depth|n_layer|.*num_.*blocks?", 2),
    (r".*num_key_value_heads|num_kv_heads|n_head_kv", 2),
    (r".*(num_|n_)?.*heads?", 4),
    (r".*head_dim.*", 16),
    (r".*(num|n)_(local_|routed_)?experts|moe_num_experts", 4),
    (r".*num_experts_per_tok|.*top_?k|moe_k|n_group|topk_group", 2),
    (r"n_group|topk_group|n_shared_experts|moe_num_shared_experts", 1),
    (r".*(intermediate|ffn|inner|mlp).*(size|dim)?|.*ffn_dim", 96),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|width).*|dim", 64),
    (r".*rank", 16),
    (r"image_size", 32),
    (r"max_position_embeddings|n_positions|max_.*positions", 128),
)
_KEPT = re.compile(
    r".*(_id|_ids|_index|_rate|_eps|_prob|_factor|_type|dropout.*|kernel.*|stride.*)"
)


@dataclass(frozen=True)
class Case:
    """A class of transformers by its name, and the config's type that it is made from."""

    model_type: str
    class_name: str


def list_cases(*, all_models: bool) -> list[Case]:
    """Return every class to try, once."""
    names = [f"MODEL_FOR_{name}_MAPPING_NAMES" for name in _MAPPINGS]
    found: dict[str, Case] = {}
    for name in [*names, *(["MODEL_MAPPING_NAMES"] if all_models else [])]:
        for model_type, classes in getattr(modeling_auto, name).items():
            for one in [classes] if isinstance(classes, str) else classes:
                found.setdefault(one, Case(model_type, one))
    return sorted(found.values(), key=lambda case: (case.model_type, case.class_name))


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's *values* with every size small; lists by layer are cut to as many."""
    small: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and "config" in str(key):
            small[key] = shrink(value)
        elif type(value) is int and re.fullmatch(r".*(token|pad|eos|bos|sep).*(_id|_index)", key):
            small[key] = value % 400
        elif type(value) is int and value > 1 and not _KEPT.fullmatch(key):
            pattern = (size for name, size in _SMALL if re.fullmatch(name, key))
            small[key] = min(value, next(pattern, value))
        elif isinstance(value, list) and key in (
            "layer_types",
            "mlp_layer_types",
            "layers_block_type",
        ):
            small[key] = value[:1] + value[-1:] if len(set(value)) > 1 else value[:2]
        else:
            small[key] = value
    return small


def build(case: Case) -> Any:
    """Return a tiny model of the class with random weights."""
    model_class = getattr(transformers, case.class_name)
    config_class = model_class.config_class
    values = shrink(config_class().to_dict())
    config = config_class.from_dict(values)
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(config).parameters())
    if count > _MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    model = model_class(config)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.normal_(0, _SPREAD)
    return model.eval()


def list_expert_parameters(model: Any) -> list[str]:
    """Return the names of stacked parameters, as ``target_parameters`` takes them."""
    found = {
        re.sub(r"^.*\.\d+\.", "", name)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and parameter.shape[0] > 1 and "expert" in name
    }
    return sorted(found)


def save_adapter(model: Any, out: Path, **lora: Any) -> None:
    """Save an adapter with random values over *model*.

    A Linear that is the embedding as well is left out: PEFT's merge changes both, where fine-tuning
    changed one.
    """
    tied = [n.removesuffix(".weight") for n in getattr(model, "all_tied_weights_keys", None) or ()]
    if any("Mamba" in type(module).__name__ for module in model.modules()):
        tied += ["out_proj", "conv1d"]  # which PEFT does not take there
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "exclude_modules": tied or None} | lora
    tuned = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, _SPREAD)
    tuned.save_pretrained(out)


def states(model: Any) -> dict[str, torch.Tensor]:
    """Return a model's tensors, those that alias one another each by its name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass
class Outcome:
    """What became of one adapter over one class."""

    kind: str
    said: str = ""


def compare(load: Any, base: Path, adapter: Path, out: Path) -> Outcome:
    """Return whether our merged model is PEFT's."""
    model, told = load(base, output_loading_info=True)
    if told["missing_keys"]:
        return Outcome("PEFT does not", f"not in the checkpoint: {told['missing_keys']}"[:100])
    untouched = states(model)
    tuned = PeftModel.from_pretrained(model, adapter)
    if any("lora_B" in n and not p.any() for n, p in tuned.named_parameters()):
        return Outcome("PEFT does not", "it does not load all of its own adapter")
    wanted = states(tuned.merge_and_unload())
    if all(torch.equal(wanted[n], t) for n, t in untouched.items() if n in wanted):
        return Outcome("PEFT does not")
    try:
        merge(base, [WeightedAdapter(adapter)], out, exact="peft")
    except LoaderError as error:
        text = "; ".join(filter(None, [error.what, *error.problems[:1], error.got]))
        return Outcome("refused", text[:300])
    except Exception as error:
        return Outcome("refused", f"UNTYPED {type(error).__name__}: {error}"[:300])
    got = states(load(out))
    unlike = [n for n in wanted if n not in got or not torch.equal(wanted[n], got[n])]
    return (
        Outcome("wrong", f"{len(unlike)}: {', '.join(unlike[:3])}") if unlike else Outcome("equal")
    )


def try_case(case: Case, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Yield what came of each sort of adapter."""
    try:
        model = build(case)
        base = folder / "base"
        model.save_pretrained(base)
        load = type(model).from_pretrained
        reloaded = load(base)
        experts = list_expert_parameters(reloaded)
    except Exception as error:
        yield "", Outcome("not built", f"{type(error).__name__}: {error}"[:200])
        return
    sorts: dict[str, tuple[Any, dict[str, Any]]] = {
        "all-linear": (load, {"target_modules": "all-linear"})
    }
    if experts:
        sorts["experts"] = (load, {"target_modules": [], "target_parameters": experts})
    inner = type(getattr(reloaded, reloaded.base_model_prefix, reloaded))
    if (
        inner is not type(model)
        and case.class_name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    ):
        sorts["without head"] = (inner.from_pretrained, {"target_modules": "all-linear"})
    del model, reloaded
    for sort, (load_as, lora) in sorts.items():
        adapter, out = folder / sort, folder / f"{sort} merged"
        try:
            save_adapter(load_as(base), adapter, **lora)
            outcome = compare(load_as, base, adapter, out)
        except Exception as error:
            outcome = Outcome("PEFT does not", f"{type(error).__name__}: {error}"[:200])
        yield sort, outcome


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' warnings and bars away."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def main() -> int:
    """Run the sweep; return 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="classes or model types that match")
    parser.add_argument("--all", action="store_true", help="every model class, towers included")
    parser.add_argument("--every", type=int, default=1, help="one class of so many")
    parser.add_argument("--verbose", action="store_true", help="also what was equal, or not built")
    options = parser.parse_args()
    cases = list_cases(all_models=options.all)
    chosen = re.compile(options.only)
    cases = [c for c in cases if chosen.search(c.class_name) or chosen.search(c.model_type)]
    told: Counter[str] = Counter()
    with quiet():
        for case in cases[:: options.every]:
            folder = Path(tempfile.mkdtemp(prefix="architectures-"))
            try:
                for sort, outcome in try_case(case, folder):
                    told[outcome.kind] += 1
                    if options.verbose or outcome.kind in ("refused", "wrong"):
                        print(
                            f"{outcome.kind:14} {case.class_name} {sort} {outcome.said}", flush=True
                        )
            finally:
                shutil.rmtree(folder, ignore_errors=True)
                gc.collect()
    compared = sum(told[kind] for kind in ("equal", "refused", "wrong"))
    print(f"{len(cases[:: options.every])} classes, {compared} adapters compared")
    for kind in ("equal", "refused", "wrong", "not built", "PEFT does not"):
        share = (
            f" ({told[kind] / compared:.1%})" if compared and kind in ("refused", "wrong") else ""
        )
        print(f"{kind}: {told[kind]}{share}")
    return int(bool(told["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
