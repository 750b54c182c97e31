"""Quantised bases: merged as what their weights stand for when asked, else refused by name."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from loader.adapters.attach import NamedAdapter, attach
from loader.adapters.merge import WeightedAdapter, merge
from loader.errors import AdapterError, FormatError, UnsupportedError
from loader.serve.transformers import TransformersModel
from loader.serve.vllm.inprocess import VLLMModel
from loader.weights.dequantise import DequantisedReader
from loader.weights.header import TensorInfo
from loader.weights.quantised import check_dequantisable, find_packed
from loader.weights.readers import SafetensorsReader, open_weights
from loader.weights.stored_forms import find_four_bits
from tests.adapters.peft import differing, load, merged_state, state
from tests.adapters.test_methods import build
from tests.models import tiny_llama, train_or_draw_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # the makers warn of much
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    targets = ["q_proj", "down_proj", "embed_tokens"]
    return train_or_draw_lora(base, tmp_path_factory.mktemp("a") / "a", target_modules=targets)


def is_linear(name: str) -> bool:
    return name.endswith("_proj.weight")


def rewrite(
    base: Path, folder: Path, quantise: Callable[[str, torch.Tensor], Tensors], about: Any
) -> Path:
    """Save *base* with every linear weight replaced by what *quantise* makes of it."""
    folder.mkdir()
    tensors: Tensors = {}
    for name, tensor in load_file(base / "model.safetensors").items():
        tensors |= quantise(name, tensor) if is_linear(name) else {name: tensor}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": about}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def plain(base: Path, folder: Path, weights: Callable[[str], torch.Tensor]) -> Path:
    """Save *base* with every linear weight as it reads after quantisation."""
    model = load(base)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name in filter(is_linear, own):
            own[name].copy_(weights(name))
    model.save_pretrained(folder)
    return folder


def check(quantised: Path, reference: Path, adapter: Path, output: Path) -> None:
    """Both merge to the same, and nothing of the quantisation is left."""
    merge(reference, [WeightedAdapter(adapter)], output / "plain")
    merge(quantised, [WeightedAdapter(adapter)], output / "out", dequantise=True)
    assert "quantization_config" not in json.loads((output / "out/config.json").read_text())
    assert not (output / "out/hf_quant_config.json").exists()
    stored = load_file(output / "out/model.safetensors")
    assert stored.keys() == load_file(output / "plain/model.safetensors").keys()
    assert not differing(state(output / "out"), state(output / "plain"))
    with pytest.raises(UnsupportedError, match="quantised base") as error:
        merge(quantised, [WeightedAdapter(adapter)], output / "refused")
    assert "dequantise" in error.value.next_step
    attach(quantised, [NamedAdapter("a", adapter)], output / "attached")


@pytest.mark.parametrize("block", [(64, 64), (48, 80)])
def test_fp8_in_blocks(base: Path, adapter: Path, tmp_path: Path, block: tuple[int, int]) -> None:
    """As DeepSeek and Qwen publish it; (48, 80) divides no weight here."""
    seen: Tensors = {}

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        scale = torch.rand(-(-rows // block[0]), -(-columns // block[1])) * 0.01 + 1e-3
        whole = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)
        stored = (weight.float() / whole[:, :columns]).to(torch.float8_e4m3fn)
        seen[name] = (stored.float() * whole[:, :columns]).to(torch.bfloat16)
        return {name: stored, f"{name}_scale_inv": scale}

    about = {"quant_method": "fp8", "weight_block_size": list(block)}
    quantised = rewrite(base, tmp_path / "fp8", quantise, about)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


def compress(base: Path, folder: Path, strategy: str, **args: Any) -> Path:
    """Quantise *base* with compressed-tensors itself."""
    weights = QuantizationArgs(strategy=strategy, symmetric=True, dynamic=False, **args)
    config = QuantizationConfig(
        config_groups={"all": QuantizationScheme(targets=["Linear"], weights=weights)},
        ignore=["lm_head"],
        format="pack-quantized" if args["type"] == "int" else "float-quantized",
        quantization_status="compressed",
    )
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    apply_quantization_config(model, config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "quantization_scheme"):
            stored: Any = module.weight_scale
            high, width = stored.shape if strategy != "tensor" else (1, 1)
            rows, columns = module.weight.shape
            blocks = module.weight.data.float().view(high, rows // high, width, columns // width)
            scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
            stored.data.copy_(scale.view_as(stored))
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)
    return folder


@pytest.mark.parametrize(
    ("strategy", "args"),
    [("tensor", {}), ("channel", {}), ("block", {"block_structure": [64, 32]})],
)
def test_compressed_tensors(
    base: Path, adapter: Path, tmp_path: Path, strategy: str, args: dict[str, Any]
) -> None:
    folder = compress(base, tmp_path / "ct", strategy, num_bits=8, type="float", **args)
    opened = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    weights = {n: p.data.clone() for n, p in opened.named_parameters()}
    check(folder, plain(base, tmp_path / "seen", weights.__getitem__), adapter, tmp_path)


def test_compressed_tensors_of_packed_integers(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = compress(base, tmp_path / "ct", "group", num_bits=4, type="int", group_size=64)
    attach(folder, [NamedAdapter("a", adapter)], tmp_path / "attached")
    with pytest.raises(UnsupportedError, match="'compressed-tensors' are not dequantised") as error:
        merge(folder, [WeightedAdapter(adapter)], tmp_path / "out", dequantise=True)
    assert len(error.value.problems) == 14
    assert not (tmp_path / "out").exists()


def four_bits(kind: str, nested: bool, seen: Tensors) -> Callable[[str, torch.Tensor], Tensors]:
    """Quantise as bitsandbytes stores it, where that is not installed."""
    code = torch.linspace(-1, 1, 16) ** 3
    outer_code = torch.linspace(-1, 1, 256)

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        flat = weight.float().flatten()
        absmax = flat.view(-1, 64).abs().amax(1)
        about: dict[str, Any] = {
            "quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape),
        }  # fmt: skip
        stored: Tensors = {}
        if nested:
            offset = float(absmax.mean())
            outer = (absmax - offset).view(-1, 32).abs().amax(1)
            relative = (absmax - offset) / outer.repeat_interleave(32)
            index = (relative[:, None] - outer_code).abs().argmin(1).to(torch.uint8)
            absmax = outer_code[index.long()] * outer.repeat_interleave(32) + offset
            about |= {"nested_blocksize": 32, "nested_dtype": "float32", "nested_offset": offset}
            stored = {
                f"{name}.absmax": index,
                f"{name}.nested_absmax": outer,
                f"{name}.nested_quant_map": outer_code,
            }
        else:
            stored[f"{name}.absmax"] = absmax
        scale = absmax.repeat_interleave(64)
        nibbles = (flat[:, None] / scale[:, None] - code).abs().argmin(1).to(torch.uint8)
        seen[name] = (code[nibbles.long()] * scale).view(weight.shape).to(torch.bfloat16)
        text = json.dumps(about).encode()
        stored[name] = (nibbles[::2] << 4 | nibbles[1::2]).view(-1, 1)
        stored[f"{name}.quant_map"] = code
        stored[f"{name}.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text)).to(
            torch.uint8
        )
        return {key: value.clone() for key, value in stored.items()}

    return quantise


@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", False)])
def test_bitsandbytes_in_four_bits(
    base: Path, adapter: Path, tmp_path: Path, kind: str, nested: bool
) -> None:
    seen: Tensors = {}
    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised = rewrite(base, tmp_path / "bnb", four_bits(kind, nested, seen), about)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


def test_bitsandbytes_in_eight_bits(base: Path, adapter: Path, tmp_path: Path) -> None:
    seen: Tensors = {}

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().amax(1)
        stored = (weight.float() / scale[:, None] * 127).round().to(torch.int8)
        seen[name] = (stored.float() * (scale / 127)[:, None]).to(torch.bfloat16)
        module = name.removesuffix(".weight")
        mark = torch.zeros((), dtype=torch.uint8)
        return {name: stored, f"{module}.SCB": scale, f"{module}.weight_format": mark}

    about = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    quantised = rewrite(base, tmp_path / "bnb", quantise, about)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("kind", "nested"), [("nf4", True), ("nf4", False), ("fp4", True)])
def test_four_bits_as_bitsandbytes_itself_stores_and_reads_them(
    base: Path, adapter: Path, tmp_path: Path, kind: str, nested: bool, storage: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    seen: Tensors = {}

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        stored, state = functional.quantize_4bit(
            weight.to(torch.bfloat16),
            blocksize=64,
            compress_statistics=nested,
            quant_type=kind,
            quant_storage=storage,
        )
        seen[name] = functional.dequantize_4bit(stored, state)
        packed = {f"{name}.{key}": part for key, part in state.as_dict(packed=True).items()}
        return {name: stored, **packed}

    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised = rewrite(base, tmp_path / "bnb", quantise, about)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


def test_eight_bits_as_bitsandbytes_itself_stores_and_reads_them(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    seen: Tensors = {}

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        stored, scale, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        read = functional.int8_vectorwise_dequant(stored, scale)
        seen[name] = read.to(torch.bfloat16)
        module = name.removesuffix(".weight")
        mark = torch.zeros((), dtype=torch.uint8)
        return {name: stored, f"{module}.SCB": scale, f"{module}.weight_format": mark}

    about = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    quantised = rewrite(base, tmp_path / "bnb", quantise, about)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_packed_words(base: Path, adapter: Path, tmp_path: Path, method: str) -> None:
    """Attached where the shapes fit, refused by name for merging."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        module = name.removesuffix(".weight")
        shape = (columns // 8, rows) if method == "gptq" else (columns, rows // 8)
        words = torch.zeros(shape, dtype=torch.int32)
        return {f"{module}.qweight": words, f"{module}.scales": torch.ones(1, rows)}

    quantised = rewrite(base, tmp_path / "q", quantise, {"quant_method": method, "bits": 4})
    attach(quantised, [NamedAdapter("a", adapter)], tmp_path / "attached")
    with pytest.raises(UnsupportedError, match=f"'{method}' are not dequantised"):
        merge(quantised, [WeightedAdapter(adapter)], tmp_path / "out", dequantise=True)
    other = tiny_llama(tmp_path / "other", hidden_size=64, tokenizer=False)
    misfit = train_or_draw_lora(other, tmp_path / "misfit")
    with pytest.raises(AdapterError, match="does not fit"):
        attach(quantised, [NamedAdapter("a", misfit)], tmp_path / "attached")


def test_a_broken_description(base: Path, adapter: Path, tmp_path: Path) -> None:
    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        mark = f"{name}.quant_state.bitsandbytes__nf4"
        return {name: torch.zeros(8, 1, dtype=torch.uint8), mark: torch.zeros(9).to(torch.uint8)}

    quantised = rewrite(base, tmp_path / "q", quantise, {"quant_method": "bitsandbytes"})
    with pytest.raises(FormatError, match="quant_state"):
        merge(quantised, [WeightedAdapter(adapter)], tmp_path / "out", dequantise=True)


@pytest.mark.parametrize(
    "change",
    [
        {"blocksize": 0},
        {"blocksize": 0.5},
        {"blocksize": 10**400},
        {"blocksize": True},
        {"shape": [4.0, 4]},
        {"shape": [-4, 4]},
        {"shape": [1] * 65},
        {"shape": 4},
        {"nested_blocksize": 0},
        {"nested_offset": float("nan")},
        {"nested_offset": "x"},
    ],
)
def test_values_of_a_description_that_are_none(change: dict[str, object]) -> None:
    right: dict[str, object] = {"shape": [4, 4], "blocksize": 64}
    right |= {"nested_blocksize": 256, "nested_offset": 0.5}
    name = "w.quant_state.bitsandbytes__nf4"
    tensors = {
        n: TensorInfo(n, "U8", (size,), 0, size)
        for n, size in (("w", 8), (name, 9), ("w.nested_absmax", 4))
    }
    found = find_four_bits(name, tensors, lambda _: json.dumps(right).encode())
    assert found is not None
    assert found.shape == (4, 4)
    with pytest.raises(FormatError, match="quant_state"):
        find_four_bits(name, tensors, lambda _: json.dumps(right | change).encode())


def with_scheme(base: Path, folder: Path, args: dict[str, Any], form: str, seen: Tensors) -> Path:
    """Quantise with the compressor that compressed-tensors has for *form*, weight by weight.

    *seen* is what it decompresses, told the config's own block.
    """
    weights = QuantizationArgs(symmetric=True, dynamic=False, num_bits=8, **args)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor: Any = BaseCompressor.get_value_from_registry(form)

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        rows, columns = weight.shape
        high, width = weights.block_structure or (1, weights.group_size)
        grid = -(-rows // high), -(-columns // width)
        padded = torch.zeros(grid[0] * high, grid[1] * width)
        padded[:rows, :columns] = weight.float()
        blocks = padded.view(grid[0], high, grid[1], width)
        scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), weights)
        module = name.removesuffix("weight")
        state = {"weight": weight, "weight_scale": scale.to(torch.bfloat16)}
        stored = compressor.compress(state, scheme)
        if weights.block_structure:
            whole = stored["weight_scale"].repeat_interleave(high, 0).repeat_interleave(width, 1)
            factors = whole[:rows, :columns].float()
            seen[name] = (stored["weight"].float() * factors).to(torch.bfloat16)
        else:
            seen[name] = compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)
        return {f"{module}{key}": value.contiguous() for key, value in stored.items()}

    about = QuantizationConfig(
        config_groups={"all": scheme}, ignore=["lm_head"], format=form,
        quantization_status="compressed",
    ).model_dump(mode="json")  # fmt: skip
    return rewrite(base, folder, quantise, about | {"quant_method": "compressed-tensors"})


MX = {"strategy": "group", "group_size": 32, "type": "float", "scale_dtype": torch.uint8}


@pytest.mark.parametrize(
    ("args", "form"),
    [
        (MX, "mxfp8-quantized"),
        ({"strategy": "group", "group_size": 64, "type": "float"}, "naive-quantized"),
        ({"strategy": "group", "group_size": 64, "type": "int"}, "naive-quantized"),
        ({"strategy": "block", "block_structure": [48, 80], "type": "float"}, "float-quantized"),
        ({"strategy": "block", "block_structure": [96, 96], "type": "float"}, "float-quantized"),
    ],
)
def test_the_configs_own_blocks(
    base: Path, adapter: Path, tmp_path: Path, args: dict[str, Any], form: str
) -> None:
    """As compressed-tensors' own library decompresses; blocks that divide no weight here, too."""
    seen: Tensors = {}
    quantised = with_scheme(base, tmp_path / "ct", args, form, seen)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


def change(folder: Path, edit: Callable[[Tensors], Tensors], **about: Any) -> None:
    """Write other tensors, and other fields of the quantisation, into *folder*."""
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= about
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder: Path, adapter: Path, output: Path) -> tuple[str, ...]:
    with pytest.raises(UnsupportedError, match="not dequantised here") as error:
        merge(folder, [WeightedAdapter(adapter)], output, dequantise=True)
    assert "dequantise" not in error.value.next_step
    assert not output.exists()
    return error.value.problems


def test_scales_that_the_config_does_not_describe(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = with_scheme(base, tmp_path / "ct", MX, "mxfp8-quantized", {})
    weights: dict[str, Any] = {"type": "float", "group_size": 32}
    groups = {"all": {"targets": ["Linear"], "weights": weights}}
    change(folder, lambda tensors: tensors, config_groups=groups, format="float-quantized")
    problems = refused(folder, adapter, tmp_path / "out")
    assert len(problems) == 14
    assert all("U8 scales" in problem for problem in problems)
    weights["group_size"] = 64
    change(folder, lambda tensors: tensors, config_groups=groups, format="mxfp8-quantized")
    assert len(refused(folder, adapter, tmp_path / "out")) == 14


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: value for key, value in tensors.items() if key != name}


Q = "model.layers.0.self_attn.q_proj"
LEFT_OVER: dict[str, Callable[[Tensors], Tensors]] = {
    "a weight without its scale": lambda t: without(t, f"{Q}.weight_scale"),
    "a scale without its weight": lambda t: without(t, f"{Q}.weight"),
    "reordered columns": lambda t: t | {f"{Q}.weight_g_idx": torch.zeros(128, dtype=torch.int32)},
    "sparse beside it": lambda t: t | {f"{Q}.bitmask": torch.zeros(8, dtype=torch.uint8)},
    "NVFP4 beside it": lambda t: t | {
        "x.weight_packed": torch.zeros(8, 8, dtype=torch.uint8),
        "x.weight_scale": torch.zeros(8, 1).to(torch.float8_e4m3fn),
        "x.weight_global_scale": torch.ones(1),
    },
    "columns smoothed before": lambda t: t | {f"{Q}.pre_quant_scale": torch.ones(128)},
    "words of another method": lambda t: t | {"x.qweight": torch.zeros(8, 8, dtype=torch.int16)},
}  # fmt: skip


@pytest.mark.parametrize("what", LEFT_OVER)
def test_quantised_tensors_that_nothing_explains(
    base: Path, adapter: Path, tmp_path: Path, what: str
) -> None:
    folder = with_scheme(base, tmp_path / "ct", MX, "mxfp8-quantized", {})
    change(folder, LEFT_OVER[what])
    assert len(refused(folder, adapter, tmp_path / "out")) == 1


def test_rows_that_bitsandbytes_tiled_are_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Its layouts of one sort of GPU; bitsandbytes itself reads ``row`` (0) alone by now."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        module = name.removesuffix(".weight")
        mark = torch.tensor(2 if name.startswith(Q) else 0, dtype=torch.uint8)
        stored, scale = weight.to(torch.int8), torch.ones(len(weight))
        return {name: stored, f"{module}.SCB": scale, f"{module}.weight_format": mark}

    about = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    folder = rewrite(base, tmp_path / "bnb", quantise, about)
    (problem,) = refused(folder, adapter, tmp_path / "out")
    assert "weight_format" in problem


def test_a_method_that_is_not_known(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = with_scheme(base, tmp_path / "ct", MX, "mxfp8-quantized", {})
    change(folder, lambda tensors: tensors, quant_method="quark")
    refused(folder, adapter, tmp_path / "out")


def test_quantised_weights_without_a_config(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = with_scheme(base, tmp_path / "ct", MX, "mxfp8-quantized", {})
    shutil.copy(base / "config.json", folder)
    with pytest.raises(UnsupportedError, match="names no quantisation") as error:
        merge(folder, [WeightedAdapter(adapter)], tmp_path / "out")
    assert len(error.value.problems) == 28


def fp8_of_modelopt(base: Path, folder: Path, seen: Tensors, *, beside: bool) -> Path:
    """Save as ModelOpt does: a factor a weight, scales of the cache; its config *beside* or in."""

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        scale = weight.float().abs().amax() / 448
        stored = (weight.float() / scale).to(torch.float8_e4m3fn)
        seen[name] = (stored.float() * scale).to(torch.bfloat16)
        module = name.removesuffix(".weight")
        made = {name: stored, f"{name}_scale": scale, f"{module}.input_scale": torch.tensor(0.5)}
        for kind in "kv":
            if module.endswith(f"{kind}_proj"):
                made[f"{module}.{kind}_scale"] = torch.tensor(1.0)
        return made

    fields = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    rewrite(base, folder, quantise, {"quant_method": "modelopt"} | fields)
    if beside:
        shutil.copy(base / "config.json", folder)
    text = json.dumps({"producer": {"name": "modelopt"}, "quantization": fields})
    (folder / "hf_quant_config.json").write_text(text)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    return folder


@pytest.mark.parametrize("beside", [True, False])
def test_modelopt(base: Path, adapter: Path, tmp_path: Path, beside: bool) -> None:
    seen: Tensors = {}
    quantised = fp8_of_modelopt(base, tmp_path / "mo", seen, beside=beside)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


def test_a_quantised_cache_alone(base: Path, adapter: Path, tmp_path: Path) -> None:
    """The weights are plain; the scales of the cache go with the config that names them."""
    about = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": {}}
    folder = rewrite(base, tmp_path / "kv", lambda name, weight: {name: weight}, about)
    scales = {f"{Q.removesuffix('.q_proj')}.{kind}_scale": torch.ones(1) for kind in "kv"}
    change(folder, lambda tensors: tensors | scales)
    check(folder, base, adapter, tmp_path)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.float16, torch.int8])
def test_bitsandbytes_in_other_storage(
    base: Path, adapter: Path, tmp_path: Path, storage: torch.dtype
) -> None:
    """``bnb_4bit_quant_storage``, as FSDP-QLoRA sets it: the same bytes under another dtype."""
    seen: Tensors = {}
    bits = four_bits("nf4", True, seen)

    def quantise(name: str, weight: torch.Tensor) -> Tensors:
        stored = bits(name, weight)
        return stored | {name: stored[name].flatten().view(storage).view(-1, 1)}

    about = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    quantised = rewrite(base, tmp_path / "bnb", quantise, about)
    check(quantised, plain(base, tmp_path / "seen", seen.__getitem__), adapter, tmp_path)


def test_stacked_experts_in_fp8(tmp_path: Path) -> None:
    """A factor for each box of each expert, as transformers' own module takes them."""
    block, shape = (32, 48), (3, 80, 100)
    scale = torch.rand(3, 3, 3) + 0.5
    stored = torch.randn(shape).to(torch.float8_e4m3fn)
    save_file({"x.up": stored, "x.up_scale_inv": scale}, tmp_path / "model.safetensors")
    about = {"quant_method": "fp8", "weight_block_size": list(block)}
    found, rows = dequantised(tmp_path, {"quantization_config": about}, "x.up")
    whole = scale.repeat_interleave(32, 1)[:, :80].repeat_interleave(48, 2)[:, :, :100]
    assert found.equal((stored.float() * whole).to(torch.bfloat16))
    assert rows.equal(found[1:3])


def dequantised(folder: Path, config: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight, and two rows of it that were read alone."""
    reader = open_weights(folder)
    assert isinstance(reader, SafetensorsReader)
    packed = find_packed(config, reader.tensors, reader.read_raw)
    check_dequantisable("here", config, reader.tensors, packed, asked_for=True)
    plain_reader = DequantisedReader(reader, packed, "BF16")
    return plain_reader.read(name), plain_reader.read_rows(name, 1, 3)


def test_mxfp4_as_transformers_converts_it(tmp_path: Path) -> None:
    blocks = torch.randint(0, 256, (3, 24, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 24, 2), dtype=torch.uint8)
    tensors = {"x.up_blocks": blocks, "x.up_scales": scales}
    save_file(tensors, tmp_path / "model.safetensors")
    found, rows = dequantised(tmp_path, {"quantization_config": {"quant_method": "mxfp4"}}, "x.up")
    assert found.equal(convert_moe_packed_tensors(blocks, scales))
    assert rows.equal(found[1:3])


@pytest.mark.parametrize(
    "targets",
    [{"target_modules": ["q_proj"]}, {"target_parameters": ["experts.gate_up_proj"], "r": 2}],
)
def test_gpt_oss_merged_as_peft_merges_it(tmp_path: Path, targets: dict[str, Any]) -> None:
    """Experts in MXFP4, attention in bfloat16: transformers dequantises it on a CPU."""
    base = build("gpt_oss", tmp_path / "base")
    adapter = train_or_draw_lora(base, tmp_path / "a", **targets)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_blocks"] = blocks
        tensors[f"{name}_scales"] = torch.randint(118, 122, blocks.shape[:3], dtype=torch.uint8)
    quantised = shutil.copytree(base, tmp_path / "mxfp4")
    save_file(tensors, quantised / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (quantised / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    merge(quantised, [WeightedAdapter(adapter)], out, exact="peft", dequantise=True)
    assert not differing(state(out), merged_state(quantised, adapter))
    assert differing(state(out), state(quantised))
    with pytest.raises(UnsupportedError, match="quantised base") as error:
        merge(quantised, [WeightedAdapter(adapter)], tmp_path / "refused")
    assert "dequantise: true" in error.value.next_step


@pytest.mark.engine
async def test_vllm_serves_what_was_dequantised(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made of what had ModelOpt's config and the scales of an FP8 cache; nothing of both is left.

    What comes of other methods has the same files, names, shapes and dtypes: see ``check``.
    """
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    quantised = fp8_of_modelopt(base, tmp_path / "mo", {}, beside=True)
    ready = merge(quantised, [WeightedAdapter(adapter)], tmp_path / "out", dequantise=True)
    body = {"model": "base", "prompt": "what is the capital", "temperature": 0, "max_tokens": 8}
    arguments = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    answers = []
    for kind in (VLLMModel, TransformersModel):
        model: Any = kind(ready, engine_args=arguments, served_model_name="base")
        await asyncio.to_thread(model.load)
        answers.append((await model.predict(body))["choices"][0]["text"])
        await asyncio.to_thread(model.close)
    assert answers[0] == answers[1]
