"""What a folder is, told from names and small files; all made by the libraries that write them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loader.errors import CheckpointError, FormatError
from loader.types import Kind
from loader.weights.formats.refused import find_refusal
from loader.weights.inspect import find_checkpoints, open_checkpoint
from tests.models import tiny_llama, train_or_draw_lora


def put(root: Path, *names: str, text: str = "{}") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def listed(root: Path) -> list[str]:
    return [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"), max_shard_size="300KB")


def shards(base: Path) -> list[Path]:
    return sorted(base.glob("model-*.safetensors"))


def test_full_model(base: Path) -> None:
    found = open_checkpoint(base)
    assert (found.kind, found.path) == (Kind.FULL, base)
    assert found.detail["model_type"] == "llama"
    assert found.detail["files"] == [p.name for p in shards(base)]
    assert "missing" not in found.detail


def test_full_model_beside_optimizer_state(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-10"
    tiny_llama(folder, tokenizer=False)
    put(folder, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
    put(
        folder,
        "optimizer_0/__0_0.distcp",
        "optimizer_0/.metadata",
        "pytorch_model_fsdp_0/.metadata",
    )
    put(folder, "pytorch_model_fsdp_0/__0_0.distcp")
    put(folder, "global_step10/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    put(folder, "latest", text="global_step10")
    assert [(c.kind, c.path) for c in find_checkpoints(tmp_path)] == [(Kind.FULL, folder)]


def test_missing_shards_are_listed(base: Path, tmp_path: Path) -> None:
    for path in [*base.glob("*.json"), *shards(base)[1:]]:
        (tmp_path / path.name).symlink_to(path)
    found = open_checkpoint(tmp_path)
    assert found.kind is Kind.FULL
    assert found.detail["missing"] == [shards(base)[0].name]


def test_adapter(base: Path, tmp_path: Path) -> None:
    train_or_draw_lora(base, tmp_path / "a", r=4)
    found = open_checkpoint(tmp_path / "a")
    assert found.kind is Kind.ADAPTER
    assert found.detail["base_model"] == str(base)
    assert found.detail["rank"] == 4
    assert found.detail["peft_type"] == "LORA"
    assert set(found.detail["targets"]) == {"q_proj", "v_proj"}  # type: ignore[call-overload]


def test_trainer_run_gives_each_checkpoint(tmp_path: Path) -> None:
    for step in (10, 9):
        put(tmp_path, f"j/rank-0/run/checkpoint-{step}/adapter_model.safetensors")
        put(tmp_path, f"j/rank-0/run/checkpoint-{step}/adapter_config.json")
        put(tmp_path, f"j/rank-0/run/checkpoint-{step}/trainer_state.json")
    put(tmp_path, "j/rank-0/run/logs/train.log")
    names = [c.path.name for c in find_checkpoints(tmp_path)]
    assert sorted(names) == ["checkpoint-10", "checkpoint-9"]
    assert open_checkpoint(tmp_path).kind is Kind.UNKNOWN
    assert len(open_checkpoint(tmp_path).detail["found"]) == 2  # type: ignore[arg-type]


def test_only_the_names_given_count(tmp_path: Path) -> None:
    files = ("adapter_config.json", "adapter_model.safetensors")
    put(tmp_path, *(f"{job}/rank-0/c/{file}" for job in ("j1", "j2") for file in files))
    found = find_checkpoints(tmp_path, [f"j2/rank-0/c/{file}" for file in files])
    assert [c.path for c in found] == [tmp_path / "j2/rank-0/c"]
    assert len(find_checkpoints(tmp_path)) == 2


def test_the_same_adapter_from_every_node_is_one(tmp_path: Path) -> None:
    for rank in (0, 1, 2):
        put(tmp_path, f"j/rank-{rank}/c/adapter_config.json")
        text = "other weights" if rank == 2 else "weights"
        put(tmp_path, f"j/rank-{rank}/c/adapter_model.safetensors", text=text)
    found = [c.path for c in find_checkpoints(tmp_path)]
    assert found == [tmp_path / "j/rank-0/c", tmp_path / "j/rank-2/c"]


def test_shards_spread_over_ranks(base: Path, tmp_path: Path) -> None:
    for i, path in enumerate(shards(base)):
        put(tmp_path, f"j/rank-{i % 2}/c/{path.name}")
    put(tmp_path, "j/rank-1/c/config.json")
    (tmp_path / "j/rank-1/c/model.safetensors.index.json").write_bytes(
        (base / "model.safetensors.index.json").read_bytes()
    )
    (found,) = find_checkpoints(tmp_path)
    assert (found.kind, found.path) == (Kind.RANK_SHARDS, tmp_path / "j/rank-1/c")
    assert found.detail["folders"] == [str(tmp_path / f"j/rank-{i}/c") for i in (0, 1)]
    assert "missing" not in found.detail
    (tmp_path / "j/rank-0/c" / shards(base)[0].name).unlink()
    assert find_checkpoints(tmp_path)[0].detail["missing"] == [shards(base)[0].name]


def test_the_same_model_from_every_node_is_full(tmp_path: Path) -> None:
    for rank in (0, 1):
        put(tmp_path, f"j/rank-{rank}/c/config.json", f"j/rank-{rank}/c/model.safetensors")
    (found,) = find_checkpoints(tmp_path)
    assert (found.kind, found.path) == (Kind.FULL, tmp_path / "j/rank-0/c")


def test_config_and_weights_on_different_ranks(tmp_path: Path) -> None:
    put(tmp_path, "j/rank-0/c/model.safetensors", "j/rank-1/c/config.json")
    assert find_checkpoints(tmp_path)[0].kind is Kind.RANK_SHARDS


@pytest.mark.parametrize("inner", ["", "pytorch_model_fsdp_0/"])
def test_dcp(tmp_path: Path, inner: str) -> None:
    put(tmp_path, "j/rank-0/step-5/config.json", f"j/rank-0/step-5/{inner}.metadata")
    put(tmp_path, f"j/rank-0/step-5/{inner}__0_0.distcp", f"j/rank-1/step-5/{inner}__1_0.distcp")
    (found,) = find_checkpoints(tmp_path)
    assert (found.kind, found.path) == (Kind.DCP, tmp_path / "j/rank-0/step-5")
    folders = [str(tmp_path / f"j/rank-{i}/step-5/{inner}".rstrip("/")) for i in (0, 1)]
    assert found.detail["folders"] == folders
    assert found.detail["has_metadata"] is True


def test_zero_spread_over_ranks(tmp_path: Path) -> None:
    put(tmp_path, "j/rank-0/c/latest", text="global_step20\n")
    put(tmp_path, "j/rank-0/c/config.json")
    for step in (20, 30):
        for rank in (0, 1):
            name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
            put(tmp_path, f"j/rank-{rank}/c/global_step{step}/{name}")
    (found,) = find_checkpoints(tmp_path)
    assert (found.kind, found.path) == (Kind.ZERO, tmp_path / "j/rank-0/c")
    assert found.detail["tag"] == "global_step20"
    assert found.detail["folders"] == [str(tmp_path / f"j/rank-{i}/c") for i in (0, 1)]


def test_zero_beside_a_model_of_empty_tensors(tmp_path: Path) -> None:
    put(tmp_path, "c/config.json", "c/global_step1/mp_rank_00_model_states.pt")
    save_file({"w": torch.zeros(0)}, tmp_path / "c/model.safetensors")
    assert find_checkpoints(tmp_path)[0].kind is Kind.ZERO
    save_file({"w": torch.zeros(1)}, tmp_path / "c/model.safetensors")
    assert find_checkpoints(tmp_path)[0].kind is Kind.FULL


@pytest.mark.parametrize("texts", [("global_step99",), ("global_step20", "global_step30"), ("",)])
def test_a_tag_that_is_missing_is_refused_with_those_that_are_there(
    tmp_path: Path, texts: tuple[str, ...]
) -> None:
    for rank, text in enumerate(texts):
        put(tmp_path, f"j/rank-{rank}/c/latest", text=text)
    for step in (20, 30):
        put(tmp_path, f"j/rank-0/c/global_step{step}/mp_rank_00_model_states.pt")
    (found,) = find_checkpoints(tmp_path)
    refusal = find_refusal(found)
    assert refusal is not None
    assert refusal.got == "global_step20/, global_step30/"
    put(tmp_path, "j/rank-0/c/latest", text="global_step30")
    for path in tmp_path.glob("j/rank-1/c/latest"):
        path.unlink()
    (found,) = find_checkpoints(tmp_path)
    assert (find_refusal(found), found.detail["tag"]) == (None, "global_step30")


def test_a_second_model_beside_the_first_is_refused_by_name(tmp_path: Path) -> None:
    put(tmp_path, "j/rank-0/c/config.json", "j/rank-0/c/optimizer_0/__0_0.distcp")
    for number in (0, 1):
        put(tmp_path, f"j/rank-0/c/pytorch_model_fsdp_{number}/__0_0.distcp")
    (found,) = find_checkpoints(tmp_path)
    refusal = find_refusal(found)
    assert refusal is not None
    assert refusal.problems == ("c/pytorch_model_fsdp_0", "c/pytorch_model_fsdp_1")
    chosen = [n for n in listed(tmp_path) if "fsdp_0" not in n]
    (found,) = find_checkpoints(tmp_path, chosen)
    assert find_refusal(found) is None
    assert found.detail["folders"] == [str(tmp_path / "j/rank-0/c/pytorch_model_fsdp_1")]


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_model_fsdp.bin", "pytorch_model_fsdp_1.bin"),
        ("model.safetensors", "model_1.safetensors"),
        ("pytorch_model.bin", "pytorch_model_1.bin"),
        ("pytorch_model/mp_rank_00_model_states.pt", "pytorch_model_1/mp_rank_00_model_states.pt"),
    ],
)
def test_the_models_that_accelerate_saves_beside_each_other(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    put(tmp_path, "j/rank-0/c/config.json", *(f"j/rank-0/c/{name}" for name in names))
    put(tmp_path, "j/rank-0/c/latest", text="pytorch_model_1")
    (found,) = find_checkpoints(tmp_path)
    refusal = find_refusal(found)
    assert refusal is not None
    assert "2 models" in refusal.what
    leave = (f"/c/{names[1]}", "/c/latest")
    (found,) = find_checkpoints(tmp_path, [n for n in listed(tmp_path) if not n.endswith(leave)])
    assert find_refusal(found) is None


@pytest.mark.parametrize(
    "name", ["iter_0000010/__0_0.distcp", "global_step_10/actor/model_world_size_1_rank_0.pt"]
)
def test_an_iteration_that_is_missing_is_refused(tmp_path: Path, name: str) -> None:
    """``latest_checkpointed_iteration.txt`` is Megatron's and verl's ``latest``."""
    put(tmp_path, f"j/rank-0/c/{name}")
    tracker = "j/rank-0/c/latest_checkpointed_iteration.txt"
    put(tmp_path, tracker, text="20\n")
    (found,) = find_checkpoints(tmp_path)
    refusal = find_refusal(found)
    assert refusal is not None
    assert refusal.got == f"{name.partition('/')[0]}/"
    put(tmp_path, tracker, text="10")
    (found,) = find_checkpoints(tmp_path)
    assert find_refusal(found) is None


@pytest.mark.parametrize(
    "name",
    [
        "optimizer_0/__0_0.distcp",
        "optim/__0_0.distcp",
        "optimizer.pt",
        "distrib_optim.pt",
    ],
)
@pytest.mark.parametrize("inside", [True, False])
def test_an_optimizer_alone_is_named(tmp_path: Path, name: str, inside: bool) -> None:
    put(tmp_path, name)
    root = (tmp_path / name).parent if inside else tmp_path
    (found,) = find_checkpoints(root)
    assert found.kind is Kind.OPTIMIZER
    assert "optimizer" in str(find_refusal(found))


def test_megatron_by_rank_is_named_wherever_it_is_opened(tmp_path: Path) -> None:
    put(tmp_path, "iter_0000010/mp_rank_00/model_optim_rng.pt")
    for root in [tmp_path, tmp_path / "iter_0000010", tmp_path / "iter_0000010/mp_rank_00"]:
        (found,) = find_checkpoints(root)
        assert (found.kind, found.path) == (Kind.MEGATRON, root)
        assert "mp_rank_00" in str(find_refusal(found))


def test_whisper(tmp_path: Path) -> None:
    put(tmp_path, "config.json", text='{"model_type": "whisper"}')
    put(tmp_path, "model.safetensors")
    assert open_checkpoint(tmp_path).kind is Kind.WHISPER


@pytest.mark.parametrize(
    ("name", "lacks"),
    [
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_model.safetensors", "adapter_config.json"),
        ("model.safetensors", "config.json"),
        ("config.json", "model.safetensors"),
        ("notes.txt", "anything"),
    ],
)
def test_unknown_tells_what_it_found(tmp_path: Path, name: str, lacks: str) -> None:
    put(tmp_path, f"j/rank-0/c/{name}")
    (found,) = find_checkpoints(tmp_path)
    assert (found.kind, found.path) == (Kind.UNKNOWN, tmp_path / "j")
    assert found.detail["found"] == [f"c/{name}"]
    assert lacks in str(found.detail["lacks"])


def test_quantized_base_is_named(tmp_path: Path) -> None:
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    put(tmp_path, "config.json", text=json.dumps(config))
    put(tmp_path, "model.safetensors")
    assert open_checkpoint(tmp_path).detail["quantization"] == "gptq"


def test_malformed_config(tmp_path: Path) -> None:
    put(tmp_path, "adapter_config.json", text="[1")
    put(tmp_path, "adapter_model.safetensors")
    with pytest.raises(FormatError, match="malformed JSON") as error:
        open_checkpoint(tmp_path)
    assert error.value.where.endswith("adapter_config.json")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such"):
        open_checkpoint(tmp_path / "none")


def test_torch_stays_out() -> None:
    code = (
        "import sys, loader.weights.inspect, loader.weights.header, loader.weights.index;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\xff\xfeg\0", b"\0", b"x" * (1 << 20)])
def test_a_latest_that_is_no_text(tmp_path: Path, content: bytes) -> None:
    put(tmp_path, "j/rank-0/c/global_step20/mp_rank_00_model_states.pt")
    (tmp_path / "j/rank-0/c/latest").write_bytes(content)
    (found,) = find_checkpoints(tmp_path)
    refusal = find_refusal(found)
    assert refusal is not None
    assert refusal.got == "global_step20/"
    assert str(refusal).isprintable() or "\n" in str(refusal)
    assert len(str(refusal)) < 10_000


@pytest.mark.parametrize(
    "name", ["latest", "config.json", "model.safetensors.index.json", "adapter_config.json"]
)
def test_pipes_are_not_waited_for(tmp_path: Path, name: str) -> None:
    put(tmp_path, "c/global_step20/mp_rank_00_model_states.pt", "c/model.safetensors")
    os.mkfifo(tmp_path / "c" / name)
    (found,) = find_checkpoints(tmp_path)
    assert found.path == tmp_path / "c"
