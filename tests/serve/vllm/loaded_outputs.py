"""What vLLM's own loader says of folders of weights, and what their parameters are afterwards.

``python -m tests.serve.vllm.loaded_outputs`` reads ``[[output, base or null], …]`` and prints what
came of each output, as ``Loaded`` has it; of what did not come whole, what comes of its base as
well. As in ``loaded_weights``, all of vLLM but the model is left out, in one process for all.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypedDict


class Loaded(TypedDict, total=False):
    """Either why it could not be loaded, or what is in its parameters."""

    error: str
    unset: list[str]  # parameters that no tensor gave every value of
    left_out: int  # how many values of the files are in no parameter
    foreign: int  # how many values of the parameters are in no file
    cast: list[str]  # dtypes of the files that no parameter has
    base: Loaded


WHOLE: Loaded = {"unset": [], "left_out": 0, "foreign": 0, "cast": []}


def load_in_vllm(outputs: Sequence[tuple[Path, Path | None]]) -> list[Loaded]:
    """Return what became of each output, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.serve.vllm.loaded_outputs"],
        input=json.dumps([[str(output), base and str(base)] for output, base in outputs]),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )
    assert not done.returncode, done.stderr[-5000:]
    found: list[Loaded] = json.loads(done.stdout)
    return found


def main(outputs: Sequence[tuple[str, str | None]], answer: TextIO) -> None:
    """Write what became of them to *answer*."""
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    import torch

    from tests.serve.vllm.loaded_weights import begin

    found = []
    with tempfile.TemporaryDirectory() as name:
        begin(Path(name))
        torch.use_deterministic_algorithms(True, warn_only=True)  # new memory is full of NaN
        for output, base in outputs:
            told = _try(Path(output))
            if told != WHOLE and base is not None:
                told["base"] = _try(Path(base))
            found.append(told)
    with answer:
        json.dump(found, answer)


def _try(folder: Path) -> Loaded:
    try:
        return _load(folder)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return {"error": text.replace(str(folder), "HERE")[:1000]}


def _load(folder: Path) -> Loaded:
    from vllm.model_executor.model_loader import get_model_loader

    from loader.serve.vllm.private import EngineArgs, ModelRegistry, set_current_vllm_config

    config = json.loads((folder / "config.json").read_text())
    for name in config["architectures"]:
        lazy = ModelRegistry.models.get(name)
        if hasattr(lazy, "module_name"):  # else each would be looked at in a process of its own
            ModelRegistry.register_model(name, lazy.load_model_cls())
            gc.freeze()  # vLLM collects twice a load: what was imported takes a second of it
    args = EngineArgs(
        model=str(folder),
        dtype="float32" if config.get("dtype") == "float32" else "auto",  # which is bfloat16
        enforce_eager=True,
        skip_tokenizer_init=True,
    )
    vllm_config = args.create_engine_config()
    model_loader = get_model_loader(vllm_config.load_config)
    load_weights = model_loader.load_weights
    told: Loaded = {}

    def load_and_look(model: Any, *arguments: Any) -> None:
        """Before the weights are packed for this machine's kernels."""
        load_weights(model, *arguments)
        told.update(_look(model, folder))

    model_loader.load_weights = load_and_look
    with set_current_vllm_config(vllm_config):
        model_loader.load_model(vllm_config, vllm_config.model_config)
    return told


def _look(model: Any, folder: Path) -> Loaded:
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    files = [t for path in folder.glob("*.safetensors") for t in load_file(path).values()]
    has, wanted = _values(parameters.values()), _values(files)
    same = has.shape == wanted.shape and bool(has.eq(wanted).all())
    held, filed = (Counter(() if same else values.tolist()) for values in (has, wanted))
    return {
        "unset": sorted(n for n, p in parameters.items() if p.data.isnan().any()),
        "left_out": (filed - held).total(),
        "foreign": sum(count for value, count in held.items() if value not in filed),
        "cast": sorted({str(t.dtype) for t in files} - {str(p.dtype) for p in parameters.values()}),
    }


def _values(tensors: Iterable[Any]) -> Any:
    """Return all of them but zeros, some of which are vLLM's padding, in order."""
    import torch

    values = torch.cat([tensor.detach().double().flatten() for tensor in tensors])
    return values[values != 0].sort().values


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes log lines there
    main(json.load(sys.stdin), answer)
