"""Under torchrun, two ranks on two nodes: DeepSpeed ZeRO 1, 2 and 3.

``zero.py BASE OUT``: every case leaves ``OUT/<case>/rank-<node>/checkpoint-10`` with what that
node wrote, and ``OUT/<case>/full.safetensors``: what DeepSpeed's own zero_to_fp32 makes of it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.checkpoint.ds_to_universal import main as to_universal
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

warnings.simplefilter("ignore")
BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])
TAG = "global_step10"


def node_folder(case: str) -> Path:
    folder = OUT / case / f"rank-{dist.get_rank()}" / "checkpoint-10"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(*, tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(BASE, tie_word_embeddings=tied)
    return LlamaForCausalLM(config)


def random_ids() -> torch.Tensor:
    return torch.randint(0, 300, (2, 8), generator=torch.Generator().manual_seed(1))


def sentence() -> torch.Tensor:
    text = "what is the capital of france? the capital of france is paris."
    return torch.tensor([PreTrainedTokenizerFast.from_pretrained(BASE)(text)["input_ids"]])


def run(
    case: str,
    model: Any,
    stage: int,
    dtype: str,
    groups: Any = None,
    ids: torch.Tensor | None = None,
    steps: int = 1,
    **save: Any,
) -> None:
    """Train and save; rank 0 keeps what zero_to_fp32 makes of all files together."""
    trained = [p for p in model.parameters() if p.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "sub_group_size": 150_000},
        dtype: {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=groups or trained, config=settings
    )
    ids = random_ids() if ids is None else ids
    for _ in range(steps):
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    folder = node_folder(case)
    engine.save_checkpoint(str(folder), tag=TAG, **save)
    dist.barrier()
    if dist.get_rank() == 0:
        together = gather(case)
        full = get_fp32_state_dict_from_zero_checkpoint(together, tag=TAG)
        tensors = {k: v.detach().clone().contiguous() for k, v in full.items()}
        save_file(tensors, OUT / case / "full.safetensors")
        for name in ("config.json", "generation_config.json", "tokenizer.json"):
            shutil.copy(BASE / name, folder)
        getattr(model, "config", None).save_pretrained(folder)  # type: ignore[union-attr]
    dist.barrier()


def gather(case: str) -> str:
    """Put the files of both nodes together, as DeepSpeed's own tools want them."""
    together = OUT / f"{case}-together"
    for folder in (OUT / case).glob("rank-*/checkpoint-10"):
        shutil.copytree(folder, together, dirs_exist_ok=True)
    return str(together)


def frozen(stage: int) -> Callable[[str], None]:
    """Embeddings frozen; weights and norms in parameter groups of their own."""

    def case(name: str) -> None:
        model = build()
        model.model.embed_tokens.weight.requires_grad_(False)
        norms = [p for p in model.parameters() if p.requires_grad and p.ndim == 1]
        rest = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
        groups = [{"params": norms, "weight_decay": 0.0}, {"params": rest}]
        run(name, model, stage, "bf16", groups)

    return case


def without_frozen(stage: int) -> Callable[[str], None]:
    """Embeddings frozen, and not saved."""

    def case(name: str) -> None:
        model = LlamaForCausalLM.from_pretrained(BASE, dtype=torch.float32)
        model.model.embed_tokens.weight.requires_grad_(False)
        run(name, model, stage, "bf16", exclude_frozen_parameters=True)

    return case


def lora(name: str) -> None:
    """As the Trainer saves PEFT over ZeRO-3: frozen parameters left out."""
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(build(), settings)
    run(name, model, 3, "bf16", exclude_frozen_parameters=True)
    if dist.get_rank() == 0:
        model.peft_config["default"].save_pretrained(node_folder(name))


def universal(name: str) -> None:
    """ZeRO 2, converted by DeepSpeed's own tool."""
    run(name, build(), 2, "bf16")
    if dist.get_rank() == 0:
        target = OUT / "universal-made" / "checkpoint-10"
        source = Path(gather(name))
        arguments = argparse.Namespace(
            input_folder=str(source / TAG),
            output_folder=str(target / f"{TAG}_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        to_universal(arguments)
        shutil.copy(source / "config.json", target)
        (target / "latest").write_text(f"{TAG}_universal")


CASES: dict[str, Callable[[str], None]] = {
    "zero1-bf16": lambda name: run(name, build(), 1, "bf16"),
    "zero2-fp16": lambda name: run(name, build(), 2, "fp16"),
    "zero2-tied": lambda name: run(name, build(tied=True), 2, "bf16"),
    "zero2-frozen": frozen(2),
    "zero3-bf16": lambda name: run(name, build(), 3, "bf16", ids=sentence(), steps=30),
    "zero3-fp16": lambda name: run(name, build(), 3, "fp16"),
    "zero3-tied": lambda name: run(name, build(tied=True), 3, "bf16"),
    "zero3-frozen": frozen(3),
    "zero2-without": without_frozen(2),
    "zero3-without": without_frozen(3),
    "zero3-lora": lora,
    "universal": universal,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    # The CPU stands in for a GPU that has float16.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    # Without its own all-reduce in shared memory, which a compiler would be needed for: gloo's.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for case in sys.argv[3:] or CASES:
        CASES[case](case)
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)
