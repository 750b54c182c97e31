"""Models that do not write text: a tiny Whisper, a tiny embedding model, and a sound to hear."""

from __future__ import annotations

import io
import json
import math
import struct
import wave
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import BertProcessing
from transformers import (
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizerFast,
)

from tests.models import CORPUS, draw_adapter

SOUND_RATE = 16_000
_MELS = 80
_SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|de|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nocaptions|>",
    "<|notimestamps|>",
]


def tiny_whisper(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a Whisper with random weights, its tokenizer and feature extractor; return *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _whisper_tokenizer(folder)
    end, start = tokenizer.convert_tokens_to_ids(_SPECIAL[:2])
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "num_mel_bins": _MELS,
        "d_model": 64,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "decoder_ffn_dim": 128,
        "max_source_positions": 1500,
        "max_target_positions": 448,
        "init_std": 0.3,
        "pad_token_id": end,
        "bos_token_id": end,
        "eos_token_id": end,
        "decoder_start_token_id": start,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    }
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(WhisperConfig(**(settings | overrides)))
    model.generation_config = GenerationConfig(
        pad_token_id=end, bos_token_id=end, eos_token_id=end, decoder_start_token_id=start
    )
    model.save_pretrained(folder)
    extractor = WhisperFeatureExtractor(feature_size=_MELS)
    WhisperProcessor(extractor, tokenizer).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def draw_whisper_lora(base: Path, folder: Path) -> Path:
    """Save a LoRA of random weights over all of a Whisper's attention; return *folder*."""
    model = WhisperForConditionalGeneration.from_pretrained(base)
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"])
    tuned = get_peft_model(model, settings)
    draw_adapter(tuned)
    tuned.save_pretrained(folder)
    return folder


def _whisper_tokenizer(folder: Path) -> WhisperTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(_SPECIAL)
    tokenizer.model.save(str(folder))
    return WhisperTokenizerFast(tokenizer_object=tokenizer, language="en", task="transcribe")


def tiny_embedder(folder: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Save a BERT with random weights and a tokenizer, as sentence-transformers lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    words = sorted({word for line in CORPUS for word in line.replace("?", " ?").split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    BertModel(BertConfig(**(settings | overrides))).save_pretrained(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    )
    return folder


def tone(seconds: float = 1.0, hertz: float = 440.0) -> bytes:
    """Return a WAV file (44 bytes of header, then 16-bit samples) of one tone."""
    turn = 2 * math.pi * hertz / SOUND_RATE
    frames = [int(12_000 * math.sin(turn * i)) for i in range(int(seconds * SOUND_RATE))]
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(SOUND_RATE)
        sound.writeframes(struct.pack(f"<{len(frames)}h", *frames))
    return file.getvalue()


def heard(folder: Path, tokens: int) -> str:
    """Return the first *tokens* that transformers' Whisper writes for ``tone()``."""
    processor = WhisperProcessor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder)
    samples = torch.frombuffer(bytearray(tone()[44:]), dtype=torch.int16) / 2**15
    features = processor(samples.numpy(), sampling_rate=SOUND_RATE, return_tensors="pt")
    names = ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    ids = torch.tensor([processor.tokenizer.convert_tokens_to_ids(names)])
    with torch.no_grad():
        for _ in range(tokens):
            scores = model(features.input_features, decoder_input_ids=ids).logits[0, -1]
            ids = torch.cat([ids, scores.argmax().view(1, 1)], dim=1)
    return str(processor.decode(ids[0], skip_special_tokens=True))
