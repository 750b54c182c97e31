"""Whether vLLM has a layer for every tensor of an adapter, asked of it before a start."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from loader.adapters.attach import Decision, NamedAdapter, Policy, open_adapter
from loader.adapters.plan_builder import PLAIN_FAMILIES, PLAIN_LAYERS
from loader.errors import AdapterError
from loader.weights.inspect import read_json

_PLAIN = re.compile(
    r"base_model\.model\.model\.layers\.\d+\.(self_attn|mlp)\."
    rf"({'|'.join(sorted(PLAIN_LAYERS))})\.lora_[AB]\.weight"
)
_log = logging.getLogger("podloader")

Reason = tuple[str, bool]
Ask = Callable[[Path, Mapping[str, Sequence[str]]], Mapping[str, Reason]]
"""Returns why vLLM would not use all of an adapter, by its name, and whether that is sure.

Of a model's folder, and the names of each adapter's tensors.
"""


def reconsider(
    decision: Decision,
    policy: Policy,
    adapters: Sequence[NamedAdapter],
    base: Path,
    ask: Ask,
    *,
    allow_pickle: bool = False,
) -> Decision:
    """Return *decision*, or another where vLLM would leave something of an adapter out.

    *ask* is not called for what every vLLM has layers for.

    Raises:
        AdapterError: several adapters, or the policy ``attach``, and vLLM would.
    """
    family = read_json(base / "config.json").get("model_type")
    names = {a.name: list(open_adapter(a.folder, allow_pickle)[0]) for a in adapters}
    plain = family in PLAIN_FAMILIES
    odd = {n: t for n, t in names.items() if not (plain and all(map(_PLAIN.match, t)))}
    unbound = ask(base, odd) if odd else {}
    if not unbound:
        return decision
    problems = [f"{name}: {text}" for name, (text, _) in unbound.items()]
    if len(adapters) == 1 and policy == "auto":
        return Decision("merge", f"merge: vLLM would not serve all of {problems[0]}")
    if not any(certain for _, certain in unbound.values()):
        _log.warning("vLLM will say whether it uses all of them: %s", "; ".join(problems))
        return decision
    raise AdapterError(
        "adapters that vLLM would not serve in full",
        where=str(base),
        problems=problems,
        expected="a layer of vLLM's for every tensor",
        next_step="serve each alone, merged"
        + ("" if len(adapters) > 1 else ": set the policy to auto")
        + ", or towers with engine_args enable_tower_connector_lora",
    )
