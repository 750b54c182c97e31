"""What vLLM makes of models whose weights fill up while it loads them, told by digests.

``python -m tests.serve.vllm.loaded_weights FOLDER…`` prints ``{model: {how: {parameter: digest}}}``
for each folder, loaded from its files and as its tensors arrive in several orders. All of it but
the model is left out of the engine: a load takes a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from loader.types import STREAM_VARIABLE

ORDERS = ("as they lie", "reversed", "shuffled")
PLAIN = "files"
DRAFT = "as a draft model, whose weights nobody feeds"


def main(folders: list[Path], answer: TextIO) -> None:
    """Write them all to *answer*."""
    os.environ[STREAM_VARIABLE] = "1"
    os.environ["VLLM_TARGET_DEVICE"] = "cpu"
    from loader.serve.vllm import streamed_weights
    from loader.serve.vllm.streaming import LOAD_FORMAT

    streamed_weights._SMALL_BYTES = 8192  # tiny models have tensors of both sorts
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        begin(Path(name))
        for folder in folders:
            found[folder.name] = {PLAIN: load(folder, "auto")}
            found[folder.name][DRAFT] = load(folder, LOAD_FORMAT)
            for order in ORDERS:
                found[folder.name][order] = _load_slowly(folder, order, Path(name))
    with answer:
        json.dump(found, answer)


def begin(folder: Path) -> None:
    """Begin vLLM's groups of processes, of this one alone; *folder* is theirs."""
    import torch
    from vllm.config import VllmConfig

    from loader.serve.vllm.private import (
        ensure_model_parallel_initialized,
        init_distributed_environment,
        set_current_vllm_config,
    )

    torch.accelerator.empty_cache = lambda: None  # as vLLM's runner for CPUs has it
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/group", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)


def _load_slowly(folder: Path, order: str, scratch: Path) -> dict[str, str]:
    from loader.arriving.feed import Feed
    from loader.arriving.standins import EnginePath
    from loader.serve.vllm.streaming import LOAD_FORMAT
    from tests.filling import SlowFolder

    filling = SlowFolder(folder, scratch / f"{folder.name} {order}")
    names = filling.order(order)
    taken = EnginePath.take(scratch / folder.name)  # vLLM remembers what a path is
    taken.stand_in(filling)
    feed = Feed(filling, taken.feed)

    def fill() -> None:
        for start in range(0, len(names), 3):
            filling.put(names[start : start + 3])
            time.sleep(0.02)
        filling.end()

    thread = threading.Thread(target=fill)
    thread.start()
    found = load(taken.path, LOAD_FORMAT)
    thread.join()
    assert feed.is_taken
    feed.close()
    taken.release()
    return found


def load(folder: Path, load_format: str) -> dict[str, str]:
    """Return a digest of each parameter and buffer that vLLM has of *folder*.

    On a CPU it packs most of them into forms that nobody can read: they are looked at before that,
    too.
    """
    from vllm.model_executor.model_loader import base_loader, get_model

    from loader.serve.vllm.private import EngineArgs, set_current_vllm_config

    found: dict[str, str] = {}
    process = base_loader.process_weights_after_loading

    def look_and_process(model: Any, *given: Any) -> None:
        found.update({f"loaded {name}": digest for name, digest in _digests(model).items()})
        process(model, *given)

    args = EngineArgs(model=str(folder), load_format=load_format, enforce_eager=True)
    vllm_config = args.create_engine_config()
    base_loader.process_weights_after_loading = look_and_process
    try:
        with set_current_vllm_config(vllm_config):
            model = get_model(vllm_config=vllm_config)
    finally:
        base_loader.process_weights_after_loading = process
    poolers = getattr(getattr(model, "pooler", None), "poolers_by_task", {})
    for task, pooler in poolers.items():  # which are no modules of the model
        found |= {f"{task} {name}": digest for name, digest in _digests(pooler).items()}
    return found | _digests(model)


def _digests(module: Any) -> dict[str, str]:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: Any) -> str:
    import torch

    dense = tensor.data.to_dense() if tensor.is_mkldnn else tensor.data
    raw = dense.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()[:16] + str(tuple(tensor.shape))


if __name__ == "__main__":
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM writes log lines there
    main([Path(name) for name in sys.argv[1:]], answer)
