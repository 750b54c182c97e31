"""Under torchrun, four ranks on two nodes: FSDP1, FSDP2, HSDP x TP and LoRA, saved by DCP.

torchtitan and torchtune are not installed for this: their names and layouts come from the tables
they document, and what is written is torch's own.

``fsdp.py BASE OUT``: every case leaves ``OUT/<case>/rank-<node>/checkpoint-10`` with what that
node wrote, and ``OUT/<case>/full.safetensors``, the framework's own full state dict.
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
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.simplefilter("ignore")
RANKS_PER_NODE = 2
BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
SENTENCE = "what is the capital of france? the capital of france is paris."
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def node_folder(case: str) -> Path:
    node = dist.get_rank() // RANKS_PER_NODE
    folder = OUT / case / f"rank-{node}" / "checkpoint-10"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(dtype: torch.dtype = torch.float32) -> Any:
    return LlamaForCausalLM.from_pretrained(BASE, dtype=dtype)


def step(model: torch.nn.Module, data: int = 0) -> torch.optim.Optimizer:
    """Take one real step, so that weights are not those of the base."""
    torch.manual_seed(data)
    return train(model, torch.randint(0, 300, (2, 8)), steps=1)


def learn(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Train until the model knows a sentence by heart."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BASE)
    return train(model, torch.tensor([tokenizer(SENTENCE)["input_ids"]]), steps=30)


def train(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def keep_reference(case: str, state: dict[str, Any]) -> None:
    if dist.get_rank() == 0:
        tensors = {k: v.detach().clone().contiguous() for k, v in state.items()}
        save_file(tensors, OUT / case / "full.safetensors")


def copy_sidecars(case: str, node: int = 0) -> None:
    """Put what the trainer writes beside the weights where one node would have it."""
    if dist.get_rank() == node * RANKS_PER_NODE:
        for path in BASE.glob("*.json"):
            if "index" not in path.name:
                shutil.copy(path, node_folder(case))


def fsdp2(case: str) -> None:
    """Layers sharded on their own, model and optimizer in one checkpoint: torchtitan's way."""
    model = load()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = learn(model)
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights, "optimizer": moments, "step": 10}, checkpoint_id=node_folder(case))
    keep_reference(case, get_model_state_dict(model, options=FULL))
    copy_sidecars(case)


def fsdp2_bf16_tied(case: str) -> None:
    """Trained in bfloat16 with tied embeddings, under torch.compile and checkpointing's names."""
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(BASE, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    fully_shard(model)
    step(model)
    state = {f"_orig_mod.{k}": v for k, v in model.state_dict().items()}
    save(state, checkpoint_id=node_folder(case))
    keep_reference(case, get_model_state_dict(model, options=FULL))
    copy_sidecars(case, node=1)
    if dist.get_rank() == RANKS_PER_NODE:
        model.config.save_pretrained(node_folder(case))


def fsdp1(case: str) -> None:
    """ShardedTensor chunks, in accelerate's folder, under its key ``model``."""
    model = FullyShardedDataParallel(load(), use_orig_params=True, device_id=torch.device("cpu"))
    step(model)
    config = ShardedStateDictConfig(offload_to_cpu=True)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, config):
        folder = node_folder(case) / "pytorch_model_fsdp_0"
        save({"model": model.state_dict()}, checkpoint_id=folder)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        keep_reference(case, model.state_dict())
    copy_sidecars(case)


def fsdp1_full(case: str) -> None:
    """FSDP1's full state dict, under the wrapper's names of an inner module."""
    model = FullyShardedDataParallel(load(), use_orig_params=True, device_id=torch.device("cpu"))
    step(model)
    with FullyShardedDataParallel.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        state = model.state_dict()
    save(
        {f"_fsdp_wrapped_module.{k}": v for k, v in state.items()}, checkpoint_id=node_folder(case)
    )
    keep_reference(case, state)
    copy_sidecars(case)


def own_names(trainer: str) -> Callable[[str], None]:
    """A decoder under the names and in the layout of torchtitan or torchtune, over FSDP2."""

    def case(name: str) -> None:
        reference = load()
        step(reference)
        full = {k: v.detach().clone() for k, v in reference.state_dict().items()}
        model = nest({theirs(k, trainer): laid_out(k, v) for k, v in full.items()})
        if trainer == "torchtitan":  # persistent there before its version 0.2
            table = torch.polar(torch.ones(64, 16), torch.rand(64, 16))
            model.register_buffer("freqs_cis", table, persistent=True)
        fully_shard(model)
        optimizer = torch.optim.AdamW(model.parameters())
        weights, moments = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": moments, "epoch": 1}, checkpoint_id=node_folder(name))
        keep_reference(name, full)
        copy_sidecars(name)

    return case


def theirs(name: str, trainer: str) -> str:
    """Return the trainer's name, by its documented table."""
    for ours, titan, tune in NAMES:
        name = name.replace(ours, titan if trainer == "torchtitan" else tune)
    return name.removeprefix("model.")


def laid_out(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return queries and keys with the halves of each head's rotation beside each other."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    head = 32
    halves = tensor.view(len(tensor) // head, 2, head // 2, tensor.shape[1])
    return halves.transpose(1, 2).reshape(tensor.shape)


def nest(tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a module with these parameters."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.register_parameter(last, torch.nn.Parameter(tensor))
    return root


# transformers' name, torchtitan's, torchtune's.
NAMES = [
    ("embed_tokens", "tok_embeddings", "tok_embeddings"),
    ("self_attn.q_proj", "attention.wq", "attn.q_proj"),
    ("self_attn.k_proj", "attention.wk", "attn.k_proj"),
    ("self_attn.v_proj", "attention.wv", "attn.v_proj"),
    ("self_attn.o_proj", "attention.wo", "attn.output_proj"),
    ("mlp.gate_proj", "feed_forward.w1", "mlp.w1"),
    ("mlp.up_proj", "feed_forward.w3", "mlp.w3"),
    ("mlp.down_proj", "feed_forward.w2", "mlp.w2"),
    ("post_attention_layernorm.weight", "ffn_norm.weight", "mlp_norm.scale"),
    ("input_layernorm.weight", "attention_norm.weight", "sa_norm.scale"),
    ("model.norm.weight", "model.norm.weight", "model.norm.scale"),
    ("lm_head", "output", "output"),
]


def hsdp_tp(case: str) -> None:
    """A mesh of two dimensions: tensor-parallel columns and rows, sharded again by FSDP2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = load()
    column, row = ColwiseParallel(), RowwiseParallel()
    plan = {
        **{f"model.layers.*.self_attn.{n}_proj": column for n in "qkv"},
        "model.layers.*.self_attn.o_proj": row,
        "model.layers.*.mlp.gate_proj": column,
        "model.layers.*.mlp.up_proj": column,
        "model.layers.*.mlp.down_proj": row,
    }
    parallelize_module(model, mesh["tp"], plan)
    fully_shard(model, mesh=mesh["dp"])
    step(model)
    save(model.state_dict(), checkpoint_id=node_folder(case))
    keep_reference(case, get_model_state_dict(model, options=FULL))
    copy_sidecars(case)


def full_state(case: str) -> None:
    """The full state dict, every tensor whole, written by whichever rank DCP chose."""
    model = load(torch.float16)
    save({"app": {"model": model.state_dict()}}, checkpoint_id=node_folder(case))
    keep_reference(case, model.state_dict())
    copy_sidecars(case)


def hf_storage(case: str) -> None:
    """DCP's own safetensors storage, each rank with the shards it holds."""
    model = load()
    fully_shard(model)
    step(model)
    state = model.state_dict()
    writer = HuggingFaceStorageWriter(str(node_folder(case)), save_distributed=True)
    save(state, storage_writer=writer)
    keep_reference(case, get_model_state_dict(model, options=FULL))
    copy_sidecars(case)


def safetensors_form(case: str) -> None:
    """DCP with its .metadata, each file's chunks as safetensors; what is no tensor before them."""
    model = load(torch.bfloat16)
    fully_shard(model)
    optimizer = step(model)
    weights, moments = get_state_dict(model, optimizer)
    form = SerializationFormat.SAFETENSORS
    writer = FileSystemWriter(node_folder(case), serialization_format=form)
    save({"model": weights, "optimizer": moments, "step": 10}, storage_writer=writer)
    keep_reference(case, get_model_state_dict(model, options=FULL))
    copy_sidecars(case)


def lora(case: str) -> None:
    """Only the adapter's parameters were trained and saved."""
    model = get_peft_model(
        load(),
        LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    )
    fully_shard(model)
    step(model)
    step(model, data=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    state = {k: v for k, v in get_model_state_dict(model).items() if k in trained}
    save({"model": state}, checkpoint_id=node_folder(case))
    full = get_model_state_dict(model, options=FULL)
    keep_reference(case, get_peft_model_state_dict(model, {k: full.get(k) for k in trained}))
    if dist.get_rank() == 0:
        model.peft_config["default"].save_pretrained(node_folder(case))


def lora_as_peft_names_it(case: str) -> None:
    """As accelerate saves an adapter: already under the names of adapter_model.safetensors."""
    torch.manual_seed(1)
    model = get_peft_model(load(), LoraConfig(r=4, target_modules=["v_proj"], use_dora=True))
    fully_shard(model)
    step(model)
    state = get_peft_model_state_dict(model, get_model_state_dict(model))
    save({"model": state}, checkpoint_id=node_folder(case) / "pytorch_model_fsdp_0")
    full = get_model_state_dict(model, options=FULL)
    keep_reference(case, get_peft_model_state_dict(model, full) if full else {})
    if dist.get_rank() == 0:
        model.peft_config["default"].save_pretrained(node_folder(case))


CASES: dict[str, Callable[[str], None]] = {
    "fsdp2": fsdp2,
    "fsdp2-bf16-tied": fsdp2_bf16_tied,
    "fsdp1": fsdp1,
    "fsdp1-full": fsdp1_full,
    "torchtitan": own_names("torchtitan"),
    "torchtune": own_names("torchtune"),
    "hsdp-tp": hsdp_tp,
    "full": full_state,
    "hf-storage": hf_storage,
    "safetensors-form": safetensors_form,
    "lora": lora,
    "lora-peft-names": lora_as_peft_names_it,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[3:] or CASES:
        CASES[name](name)
        dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads may take seconds to end, and nothing is left to write
