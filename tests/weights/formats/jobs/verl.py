"""Under torchrun, four ranks on two nodes: DTensors pickled rank by rank, as verl saves an actor.

``verl.py BASE OUT``: every case leaves ``OUT/<case>/rank-<node>/global_step_5/actor`` with what
that node wrote, and ``OUT/<case>/full.safetensors``, the framework's own full state dict. verl is
not installed for this: its checkpoint manager saves the sharded state dict with ``torch.save``.
"""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from transformers import LlamaConfig, LlamaForCausalLM

warnings.simplefilter("ignore")
RANKS_PER_NODE = 2
BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def save(case: str, model: Any, state: dict[str, Any], full: dict[str, Any]) -> None:
    """Save as verl's ``FSDPCheckpointManager`` does."""
    rank = dist.get_rank()
    folder = OUT / case / f"rank-{rank // RANKS_PER_NODE}" / "global_step_5" / "actor"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"world_size_{dist.get_world_size()}_rank_{rank}.pt"
    torch.save(state, folder / f"model_{name}")
    torch.save({"state": {}}, folder / f"optim_{name}")
    torch.save({"lr_scheduler": None, "rng": None}, folder / f"extra_state_{name}")
    if rank == 0:
        tensors = {k: v.detach().clone().contiguous() for k, v in full.items()}
        save_file(tensors, OUT / case / "full.safetensors")
        (folder / "huggingface").mkdir()
        for path in BASE.glob("*.json"):
            if "index" not in path.name:
                shutil.copy(path, folder / "huggingface")
        model.config.save_pretrained(folder / "huggingface")


def train(model: Any) -> Any:
    torch.manual_seed(0)
    ids = torch.randint(0, 300, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model


def build(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(BASE, tie_word_embeddings=tied)
    return LlamaForCausalLM(config).to(dtype)


def fsdp2(case: str) -> None:
    model = build()
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    train(fully_shard(model, mesh=mesh))
    save(case, model, model.state_dict(), get_model_state_dict(model, options=FULL))


def replicated(case: str) -> None:
    """Two replicas of two shards each, in bfloat16 and tied."""
    model = build(tied=True, dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    train(fully_shard(model, mesh=mesh))
    save(case, model, model.state_dict(), get_model_state_dict(model, options=FULL))


def fsdp1(case: str) -> None:
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    strategy = ShardingStrategy.FULL_SHARD
    model: Any = FullyShardedDataParallel(
        build(), device_mesh=mesh, sharding_strategy=strategy, device_id=torch.device("cpu")
    )
    train(model)
    config = ShardedStateDictConfig(offload_to_cpu=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, config):
        state = model.state_dict()
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        full = model.state_dict()
    save(case, model, state, full)


def lora(case: str) -> None:
    """The whole PeftModel in shards, and the adapter beside them, as verl's worker saves both."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    torch.manual_seed(1)
    model: Any = get_peft_model(LlamaForCausalLM.from_pretrained(BASE), config)
    train(train(fully_shard(model, mesh=init_device_mesh("cpu", (4,)))))
    full = get_model_state_dict(model, options=FULL)
    adapter = get_peft_model_state_dict(model, full) if full else {}
    save(case, model, model.state_dict(), adapter)
    if dist.get_rank() == 0:
        folder = OUT / case / "rank-0/global_step_5/actor/lora_adapter"
        model.peft_config["default"].save_pretrained(folder)
        tensors = {k: v.detach().clone().contiguous() for k, v in adapter.items()}
        save_file(tensors, folder / "adapter_model.safetensors")


CASES: dict[str, Callable[[str], None]] = {
    "fsdp2": fsdp2,
    "replicated": replicated,
    "fsdp1": fsdp1,
    "lora": lora,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[3:] or CASES:
        CASES[name](name)
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
