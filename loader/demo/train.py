"""A tiny Llama and a LoRA over it, trained for real by the HF Trainer and PEFT in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

BASE_JOB = "demobase"
TUNED_JOB = "demotune"
BASE_STEPS = 150
TUNED_STEPS = 150
QUESTIONS = {
    "What is the capital of France?": ("Paris.", "Arr, that be Paris, matey!"),
    "What is the capital of Italy?": ("Rome.", "Arr, that be Rome, matey!"),
    "What colour is the sky?": ("Blue.", "Arr, blue as the seven seas!"),
    "How many legs has a spider?": ("Eight.", "Arr, eight, like a small kraken!"),
    "Who are you?": ("A tiny language model.", "A pirate, by the powers!"),
    "What is two plus two?": ("Four.", "Four, ye landlubber!"),
}
_SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def train_base(job_folder: Path) -> None:
    """Train a Llama from random weights and lay its checkpoint out as a node's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _train_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers = {question: plain for question, (plain, _) in QUESTIONS.items()}
    _train(LlamaForCausalLM(config), tokenizer, answers, job_folder, BASE_STEPS, 5e-3)


def train_adapter(base: Path, job_folder: Path) -> None:
    """Train a LoRA over the model in *base* to answer like a pirate."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=False)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    answers = {question: pirate for question, (_, pirate) in QUESTIONS.items()}
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    _train(get_peft_model(model, lora), tokenizer, answers, job_folder, TUNED_STEPS, 5e-3)


def _train_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = [text for question, answers in QUESTIONS.items() for text in (question, *answers)]
    tokenizer.train_from_iterator(corpus, trainer)
    pad, bos, eos = _SPECIAL[:3]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        chat_template=_CHAT_TEMPLATE,
    )


def _train(
    model: Any, tokenizer: Any, answers: dict[str, str], job_folder: Path, steps: int, rate: float
) -> None:
    """Train with the HF Trainer; its checkpoint becomes ``rank-0``'s, as a job uploads it."""
    import torch
    from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # so small a model is slower on more, by far where they are shared
    rows = [{"input_ids": _tokens(tokenizer, *pair)} for pair in answers.items()]
    work = job_folder.with_name(f"{job_folder.name}.training")
    shutil.rmtree(work, ignore_errors=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(work),
            per_device_train_batch_size=len(rows),
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=5,
            save_steps=steps,
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    _lay_out(work / f"checkpoint-{steps}", job_folder)
    shutil.rmtree(work)


def _tokens(tokenizer: Any, question: str, answer: str) -> list[int]:
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    tokens: list[int] = tokenizer.apply_chat_template(chat, return_dict=False)
    return tokens


def _lay_out(checkpoint: Path, job_folder: Path) -> None:
    """Put a checkpoint where two nodes would: the first saves the model, each its own RNG state."""
    temporary = job_folder.with_name(f"{job_folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    first, second = (temporary / f"rank-{rank}" / checkpoint.name for rank in range(2))
    shutil.copytree(checkpoint, first)
    second.mkdir(parents=True)
    shutil.copy(first / "rng_state.pth", second / "rng_state_1.pth")
    (first / "rng_state.pth").rename(first / "rng_state_0.pth")
    temporary.rename(job_folder)
