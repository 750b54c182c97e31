"""Everything that ``merge`` writes while its tests run is loaded by vLLM, every value of it.

Dequantised bases are among it. What ``consolidate`` writes: ``tests/weights/formats``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel

from loader.adapters.merge import WeightedAdapter, merge
from loader.serve.vllm.releases import installed_release
from tests.models import train_or_draw_lora
from tests.other_models import draw_whisper_lora, tiny_embedder, tiny_whisper
from tests.serve.vllm.loaded_outputs import WHOLE, Loaded, load_in_vllm

pytestmark = pytest.mark.engine

ROOMS = "tests/adapters"
KINDS = (
    "test_equal_to_peft[LlamaForCausalLM]",
    "test_equal_to_peft[Qwen2ForCausalLM]",
    "test_equal_to_peft[Qwen3ForCausalLM]",
    "test_equal_to_peft[Gemma2ForCausalLM]",
    "test_equal_to_peft[MistralForCausalLM]",
    "test_equal_to_peft[BertForMaskedLM]",
    "test_equal_to_peft[GPT2LMHeadModel]",
    "test_equal_to_peft[WhisperForConditionalGeneration]",
    "test_experts[mixtral]",
    "test_experts[qwen3_moe]",
    "test_experts[gpt_oss]",
    "test_tied_pairs_that_change_by_halves",
    "test_fp8_in_blocks",
    "test_compressed_tensors[tensor",
    "test_the_configs_own_blocks[args0-mxfp8-quantized]",
    "test_bitsandbytes_in_four_bits",
    "test_bitsandbytes_in_eight_bits",
    "test_bitsandbytes_in_other_storage",
    "test_modelopt",
    "test_a_quantised_cache_alone",
    "test_gpt_oss_merged_as_peft_merges_it",
)
# What this release says of some, and of their bases alike: by the test that makes them.
RELEASE = "0.32.0"
NOT_BUILT = {
    "[GteForMaskedLM]": "does not dispatch through the Transformers attention interface",
    "[MllamaForConditionalGeneration]": "Can't load image processor",  # the tiny model has none
    # The wheels for CPUs are installed without it.
    "[Qwen3VLMoeForConditionalGeneration]": "No module named 'torchvision'",
    "[llava]": "No module named 'torchvision'",
    "[qwen2_5_vl]": "No module named 'torchvision'",
    "[gemma3]": "No module named 'torchvision'",
    # Named as transformers 5 names it; what lies on the Hub is named as transformers 4 did.
    "[Qwen2AudioForConditionalGeneration]": "no module or parameter named 'model' in Qwen2Model",
    "test_names_of_a_multimodal_runtime": "no module or parameter named 'language_model'",
    "test_a_square_of_a_class_that_transformers_does_not_know": "model type `jais`",
}
NOT_KEPT = {
    "[AriaForConditionalGeneration]": "the last norm of its tower, which is not used",
    "[NemotronHForCausalLM]": "A_log is kept as A",
    "test_a_tied_embedding_changes_alone[mamba]": "A_log is kept as A",
    "test_a_base_of_float64": "rounded",
    "a tiny bert": "its pooler, which embeddings do not go through",
}

of_release = pytest.mark.skipif(
    not (installed_release() or "").startswith(RELEASE), reason=f"of vLLM {RELEASE}"
)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Loaded]]:
    """What vLLM says of every output, by the test that made it."""
    root = tmp_path_factory.mktemp("outputs")
    recorded = root / "recorded"
    recorded.mkdir()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.recorded", ROOMS]
    command += ["-m", "not engine", "-p", "no:cacheprovider", "--basetemp", str(root / "made")]
    done = subprocess.run(
        command,
        env=os.environ | {"RECORDED": str(recorded)},
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    # A test that fails is told of where it stands.
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-3000:]
    abouts = sorted(recorded.glob("*.json"), key=lambda path: int(path.stem))
    documents = [json.loads(path.read_text()) for path in abouts]
    outputs: dict[Path, tuple[str, Path]] = {
        path.with_suffix(""): (about["test"], Path(about["base"]))
        for path, about in zip(abouts, documents, strict=True)
    } | more(root)
    answers = load_in_vllm([(output, base) for output, (_, base) in outputs.items()])
    found: dict[str, list[Loaded]] = {}
    for (test, _), answer in zip(outputs.values(), answers, strict=True):
        found.setdefault(test, []).append(answer)
    return found


def more(root: Path) -> dict[Path, tuple[str, Path]]:
    """Merge what those tests do not: models with all that a server reads beside the weights."""
    whisper = tiny_whisper(root / "a tiny whisper")
    bert = tiny_embedder(root / "a tiny bert")
    adapters: Any = {
        whisper: draw_whisper_lora(whisper, root / "heard"),
        bert: train_or_draw_lora(
            bert, root / "found", target_modules=["query", "dense"], model_class=AutoModel
        ),
    }
    return {
        merge(base, [WeightedAdapter(adapter)], root / f"{base.name}-out").path: (base.name, base)
        for base, adapter in adapters.items()
    }


def of(told: dict[str, list[Loaded]], part: str) -> list[Loaded]:
    return [answer for test, answers in told.items() if part in test for answer in answers]


@pytest.mark.parametrize("kind", [*KINDS, "a tiny whisper"])
def test_whole(told: dict[str, list[Loaded]], kind: str) -> None:
    """Every parameter was given all of its values, and every value is in a parameter."""
    answers = of(told, kind)
    assert answers
    assert all(answer == WHOLE for answer in answers), answers


@of_release
@pytest.mark.parametrize("test", NOT_BUILT)
def test_not_built_for_a_reason_that_the_base_has_too(
    told: dict[str, list[Loaded]], test: str
) -> None:
    answers = of(told, test)
    assert any("error" in answer for answer in answers)
    for answer in answers:
        if answer != WHOLE:
            assert re.search(NOT_BUILT[test], answer["error"])
            assert re.search(NOT_BUILT[test], answer["base"]["error"])


@of_release
@pytest.mark.parametrize("test", NOT_KEPT)
def test_what_vllm_makes_of_a_base_it_makes_of_what_was_merged(
    told: dict[str, list[Loaded]], test: str
) -> None:
    answers = of(told, test)
    assert answers
    for answer in answers:
        assert not answer["unset"]
        assert answer == {**answer["base"], "base": answer["base"]}


def test_nothing_else_is_refused_or_changed(told: dict[str, list[Loaded]]) -> None:
    known = (*NOT_BUILT, *NOT_KEPT)
    assert sum(map(len, told.values())) > 100
    for test, answers in told.items():
        if not any(part in test for part in known):
            assert all(answer == WHOLE for answer in answers), (test, answers)
