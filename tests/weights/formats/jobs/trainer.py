"""Under torchrun, two ranks on two nodes: the Hugging Face Trainer over FSDP, saving shards.

``trainer.py BASE OUT``: leaves ``OUT/trainer/rank-<node>/checkpoint-2`` as the Trainer wrote it on
that node, ``OUT/accelerate/…`` as ``accelerator.save_state`` did, and
``OUT/accelerate-full/…`` its full state dict; and ``OUT/trainer/full.safetensors``.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from accelerate.utils.fsdp_utils import save_fsdp_model
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import StateDictType
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

warnings.simplefilter("ignore")
BASE, OUT = Path(sys.argv[1]), Path(sys.argv[2])


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    data: Any = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 8
    arguments = TrainingArguments(
        output_dir=str(OUT / "trainer" / f"rank-{rank}"),
        per_device_train_batch_size=1,
        max_steps=2,
        save_steps=2,
        save_on_each_node=True,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        fsdp=True,
        fsdp_config={
            "version": 2,
            "state_dict_type": "SHARDED_STATE_DICT",
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        },
    )
    arguments.device  # noqa: B018  sets the process group up
    # accelerate takes FSDP for accelerators only; what it writes is the same on a CPU.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(
        model=LlamaForCausalLM.from_pretrained(BASE),
        args=arguments,
        train_dataset=data,
        processing_class=PreTrainedTokenizerFast.from_pretrained(BASE),
    )
    trainer.train()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full: dict[str, Any] = get_model_state_dict(trainer.model_wrapped, options=options)
    if rank == 0:
        save_file({k: v.contiguous() for k, v in full.items()}, OUT / "trainer/full.safetensors")
    # What accelerate itself writes, optimizer and scheduler in files of their own.
    trainer.accelerator.save_state(str(OUT / "accelerate" / f"rank-{rank}" / "checkpoint-2"))
    plugin = trainer.accelerator.state.fsdp_plugin
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    folder = OUT / "accelerate-full" / f"rank-{rank}" / "checkpoint-2"
    save_fsdp_model(plugin, trainer.accelerator, trainer.model_wrapped, str(folder))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
