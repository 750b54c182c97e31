"""What merging refuses: everything wrong at once, and nothing written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader.adapters.merge import WeightedAdapter, merge
from loader.errors import AdapterError, CheckpointError, FormatError, LoaderError, UnsupportedError
from tests.models import tiny_llama, tiny_tokenizer, train_or_draw_lora

PREFIX = "base_model.model.model.layers.0.self_attn"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), max_shard_size="500KB")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return train_or_draw_lora(base, tmp_path / "adapter")


def refused(base: Path, adapter: Path, kind: type[LoaderError], match: str) -> LoaderError:
    """Merge, expect *kind*, and see that nothing was left behind."""
    output = adapter.parent / "refused" / "out"
    with pytest.raises(kind, match=match) as error:
        merge(base, [WeightedAdapter(adapter)], output)
    assert not output.parent.exists() or not list(output.parent.iterdir())
    return error.value


def change(adapter: Path, edit: Callable[[Tensors], Any]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def set_config(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_left_over_tensors_are_all_listed(base: Path, adapter: Path) -> None:
    extra = {
        f"{PREFIX}.q_proj.lora_C.weight": torch.ones(2),
        f"{PREFIX}.nope.lora_A.weight": torch.ones(4, 2),
        f"{PREFIX}.nope.lora_B.weight": torch.ones(2, 4),
        "something.else": torch.ones(1),
        "base_model.vera_A": torch.ones(1),  # of another method than the config names
        f"{PREFIX}.q_proj.ia3_l": torch.ones(1, 128),
    }
    change(adapter, lambda tensors: tensors.update(extra))
    error = refused(base, adapter, AdapterError, "does not fit its base")
    assert all(any(name in problem for problem in error.problems) for name in extra)
    assert len(error.problems) == 5


def test_base_of_other_shapes(adapter: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    error = refused(other, adapter, AdapterError, "does not fit its base")
    assert len(error.problems) == 4


def test_every_tensor_with_nan_is_named(base: Path, adapter: Path) -> None:
    spoilt = [f"model.layers.{i}.self_attn.{p}.weight" for i, p in ((0, "v_proj"), (1, "q_proj"))]

    def spoil(tensors: Tensors) -> None:
        for name in spoilt:
            part = f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"
            tensors[part][0, 0] = float("nan")

    change(adapter, spoil)
    error = refused(base, adapter, AdapterError, "NaN or infinite")
    assert [problem.partition(":")[0] for problem in error.problems] == spoilt


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 1e3), (torch.bfloat16, 3e38)])
def test_overflow_names_the_tensor(tmp_path: Path, dtype: torch.dtype, size: float) -> None:
    base = tiny_llama(tmp_path / "narrow", dtype=dtype, tokenizer=False)
    adapter = train_or_draw_lora(base, tmp_path / "adapter")

    def spoil(tensors: Tensors) -> None:
        tensors[f"{PREFIX}.q_proj.lora_A.weight"][0, 0] = size
        tensors[f"{PREFIX}.q_proj.lora_B.weight"][5, 0] = 1e3

    change(adapter, spoil)
    (problem,) = refused(base, adapter, AdapterError, "NaN or infinite").problems
    assert "q_proj" in problem


def test_adapter_without_effect(base: Path, adapter: Path) -> None:
    change(adapter, lambda t: t.update({n: torch.zeros_like(x) for n, x in t.items() if "_B" in n}))
    assert len(refused(base, adapter, AdapterError, "change nothing").problems) == 4


def test_lora_bias_without_a_bias_to_take_it(base: Path, tmp_path: Path) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "a", lora_bias=True)
    error = refused(base, adapter, AdapterError, "does not fit")
    assert all("bias" in problem for problem in error.problems)


def test_missing_base(adapter: Path, tmp_path: Path) -> None:
    refused(tmp_path / "none", adapter, AdapterError, "base model is missing")


def test_base_and_adapter_swapped(base: Path, adapter: Path) -> None:
    error = refused(adapter, base, AdapterError, "base and adapter are swapped")
    assert error.next_step == f"swap them: --base {base} --adapter {adapter}"


def test_a_whole_model_in_an_adapters_place(base: Path, adapter: Path) -> None:
    error = refused(base, base, AdapterError, "a whole model in an adapter's place")
    assert "swap" not in error.next_step
    assert refused(adapter, adapter, AdapterError, "the base model is missing").got == "an adapter"


def test_missing_config_and_truncated_adapter(base: Path, adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(base, adapter, FormatError, "lies about")
    (adapter / "adapter_config.json").unlink()
    error = refused(base, adapter, AdapterError, r"missing adapter_config.*; .*lies about")
    assert len(error.problems) == 2


def test_pickles(base: Path, tmp_path: Path) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "a", safe_serialization=False)
    refused(base, adapter, FormatError, "pickle")


class Hostile:
    """Runs a command where a pickle is opened without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_a_hostile_pickle_is_never_run(base: Path, tmp_path: Path) -> None:
    adapter = train_or_draw_lora(base, tmp_path / "a", safe_serialization=False)
    tensors = torch.load(adapter / "adapter_model.bin")
    torch.save(tensors | {"x": Hostile(tmp_path / "mark")}, adapter / "adapter_model.bin")
    for allowed in (False, True):
        with pytest.raises(FormatError, match="pickle"):
            merge(base, [WeightedAdapter(adapter)], tmp_path / "out", allow_pickle=allowed)
    assert not (tmp_path / "mark").exists()
    assert not (tmp_path / "out").exists()


def test_quantised_base(adapter: Path, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "quantised", tokenizer=False)
    set_config(base, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(base, adapter, UnsupportedError, "quantised").got == "gptq"


def test_quantised_tensors(adapter: Path, tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "f8", tokenizer=False)
    path = base / "model.safetensors"
    small = torch.float8_e4m3fn
    save_file({n: t.to(small) if "q_proj" in n else t for n, t in load_file(path).items()}, path)
    assert len(refused(base, adapter, UnsupportedError, "names no quantisation").problems) == 2


@pytest.mark.parametrize(
    "values", [{"peft_type": "OFT", "r": 0}, {"init_lora_weights": "pissa"}, {"use_qalora": True}]
)
def test_methods_that_do_not_fold(base: Path, adapter: Path, values: dict[str, Any]) -> None:
    set_config(adapter, "adapter_config.json", **values)
    refused(base, adapter, UnsupportedError, "do not fold")


def test_output_in_the_way(base: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out")  # its own product is replaced
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(CheckpointError, match="in the way"):
        merge(base, [WeightedAdapter(adapter)], tmp_path / "mine")


def test_combinations(base: Path, adapter: Path, tmp_path: Path) -> None:
    dora = train_or_draw_lora(base, tmp_path / "dora", use_dora=True)
    wide = train_or_draw_lora(base, tmp_path / "wide", r=8)
    for adapters, match in (
        ([WeightedAdapter(adapter), WeightedAdapter(dora)], "only plain LoRA"),
        ([WeightedAdapter(dora, 0.5)], "only plain LoRA"),
        ([WeightedAdapter(adapter), WeightedAdapter(wide)], "different ranks"),
        ([], "no adapter"),
    ):
        with pytest.raises(AdapterError, match=match):
            merge(base, adapters, tmp_path / "out")


def test_another_base_of_the_same_shapes_is_warned_of(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    set_config(adapter, "adapter_config.json", base_model_name_or_path="org/another-model")
    ready = merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    assert "org/another-model" in str(ready.provenance["warnings"])


def test_tokenizer_of_the_adapter_wins(base: Path, adapter: Path, tmp_path: Path) -> None:
    tiny_tokenizer(adapter, extra_tokens=["<|tool|>"], chat_template="tuned")
    merge(base, [WeightedAdapter(adapter)], tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (adapter / name).read_bytes()
