"""Under torchrun, two tensor-parallel ranks on two nodes: a GPT of Megatron-Core.

``mcore.py BASE OUT``: leaves ``OUT/torch-dist/rank-<node>/checkpoint-10`` as Megatron's
distributed checkpointing wrote it, ``OUT/numbered/…`` the same with numbered layers and no output
layer of its own, ``OUT/ranks/…`` in the old format of a file per tensor-parallel rank; and
``OUT/<case>/answers.safetensors``: token ids and the logits of the model that was trained.
Not trained, for want of a schedule on CPUs: ``OUT/pipeline/…``, a stage on each node, and
``OUT/experts/…``. And ``OUT/<switch>.pt``, a common.pt whose arguments have that switch on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tokenizers import Tokenizer

warnings.simplefilter("ignore")

from megatron.core import dist_checkpointing, parallel_state  # noqa: E402
from megatron.core.dist_checkpointing.optimizer import (  # noqa: E402
    get_param_id_to_sharded_param_map,
    optim_state_to_sharding_state,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # noqa: E402
from megatron.core.transformer.enums import AttnBackend  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
SENTENCE = "what is the capital of france? the capital of france is paris."
PADDED_VOCABULARY = 512


def node_folder(case: str) -> Path:
    folder = OUT / case / f"rank-{dist.get_rank()}" / "checkpoint-10"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(*, tied: bool, stages: int = 1, experts: int | None = None) -> Any:
    config = json.loads((BASE / "config.json").read_text())
    settings = TransformerConfig(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=config["num_attention_heads"],
        num_query_groups=config["num_key_value_heads"],
        layernorm_epsilon=config["rms_norm_eps"],
        tensor_model_parallel_size=2 // stages,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        num_moe_experts=experts,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        # Kernels that are written for GPUs.
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config=settings,
        transformer_layer_spec=get_gpt_layer_local_spec(experts, normalization="RMSNorm"),
        vocab_size=PADDED_VOCABULARY,
        max_sequence_length=128,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
        parallel_output=False,
        pre_process=stages == 1 or dist.get_rank() == 0,
        post_process=stages == 1 or dist.get_rank() == 1,
    )


def arguments() -> argparse.Namespace:
    """A few of what Megatron-LM's training keeps of its command line; kept as they are."""
    return argparse.Namespace(
        num_layers=2,
        apply_layernorm_1p=False,
        rotary_interleaved=False,
        swiglu=True,
        params_dtype=torch.float32,
        attention_backend=AttnBackend.auto,
        save="/checkpoints",
    )


def forward(model: Any, ids: torch.Tensor) -> Any:
    length = ids.shape[1]
    positions = torch.arange(length)[None]
    mask = torch.triu(torch.ones(length, length, dtype=torch.bool), 1)[None, None]
    return model(ids, positions, mask)


def learn(model: Any, ids: torch.Tensor, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        logits = forward(model, ids)[:, :-1]
        loss: Any = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def save_distributed(case: str, model: Any, optimizer: Any, **metadata: object) -> None:
    """Save as ``torch_dist``; nodes without a common disk each keep what their rank wrote."""
    sharded = model.sharded_state_dict(metadata=metadata or None)
    state = {"model": sharded, "args": arguments(), "iteration": 10}
    if optimizer is not None:
        state["optimizer"] = moments = optimizer.state_dict()
        ids = get_param_id_to_sharded_param_map(sharded, list(model.parameters()))
        optim_state_to_sharding_state(moments, ids, exclude_keys="step")
    together = OUT / f"{case}-together"
    together.mkdir(exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, str(together))
    dist.barrier()
    rank, folder = dist.get_rank(), node_folder(case)
    if case == "torch-dist":
        (folder / "latest_checkpointed_iteration.txt").write_text("10")
        folder /= "iter_0000010"
        folder.mkdir(exist_ok=True)
        for switch in ("apply_layernorm_1p", "rotary_interleaved") if rank == 0 else ():
            common = torch.load(together / "common.pt", weights_only=False)
            setattr(common["args"], switch, True)
            torch.save(common, OUT / f"{switch}.pt")
    for path in together.iterdir():
        if path.name.startswith(f"__{rank}_") or (rank == 0 and not path.name.startswith("__")):
            shutil.copy(path, folder)


def save_ranks(case: str, model: Any) -> None:
    """Save as Megatron-LM's ``--ckpt-format torch`` does."""
    home = node_folder(case)
    folder = home / "iter_0000010" / f"mp_rank_{dist.get_rank():02d}"
    folder.mkdir(parents=True)
    state = {"model": model.state_dict(), "checkpoint_version": 3.0, "iteration": 10}
    torch.save(state, folder / "model_optim_rng.pt")
    (home / "latest_checkpointed_iteration.txt").write_text("10")


def keep_state(case: str, model: Any) -> None:
    tensors = {k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    node_folder(case)
    save_file(tensors, OUT / case / f"state-{dist.get_rank()}.safetensors")


def finish(case: str, model: Any, ids: torch.Tensor, *, tied: bool) -> None:
    with torch.no_grad():
        logits = forward(model, ids)
    if dist.get_rank() == 0:
        save_file({"ids": ids, "logits": logits.contiguous()}, OUT / case / "answers.safetensors")
    put_config(case, tied=tied)


def put_config(case: str, *, tied: bool) -> None:
    if dist.get_rank() == 0:
        config = json.loads((BASE / "config.json").read_text())
        text = json.dumps(config | {"tie_word_embeddings": tied})
        (node_folder(case) / "config.json").write_text(text)
        shutil.copy(BASE / "tokenizer.json", node_folder(case))


def main() -> None:
    torch.set_num_threads(1)
    # The CPU stands in for a GPU; ranks are told apart by their seeds, not by a GPU's generator.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    multiprocessing.set_start_method("fork")
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    ids = torch.tensor([Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(SENTENCE).ids])
    for case, tied in (("torch-dist", False), ("numbered", True), ("ranks", False)):
        torch.manual_seed(0)
        model = build(tied=tied)
        optimizer = learn(model, ids, steps=30 if case == "torch-dist" else 1)
        if case == "ranks":
            save_ranks(case, model)
        else:
            layers = {} if case == "torch-dist" else {"non_homogeneous_layers": True}
            save_distributed(case, model, optimizer, **layers)
        keep_state(case, model)
        finish(case, model, ids, tied=tied)
        dist.barrier()
    save_untrained("experts", build(tied=False, experts=2))
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(pipeline_model_parallel_size=2)
    save_untrained("pipeline", build(tied=False, stages=2))


def save_untrained(case: str, model: Any) -> None:
    save_distributed(case, model, None)
    keep_state(case, model)
    put_config(case, tied=False)
    dist.barrier()


if __name__ == "__main__":
    main()
    for child in multiprocessing.active_children():  # Megatron's managers outlive it
        child.kill()
    sys.stdout.flush()
    os._exit(0)
