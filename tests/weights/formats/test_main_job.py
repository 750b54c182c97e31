"""The main job over what several nodes wrote: signed URLs in, one model that answers out."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loader import boot
from loader.cli.documents import plan_document
from loader.errors import ChangedError, CheckpointError, FormatError
from loader.prepare.forecast import Forecast
from loader.status.state import BootState
from loader.timeline import Timeline
from loader.types import ReadyModel
from tests.origin import FaultyHandler, FaultyOrigin, act, cut, status
from tests.weights.formats.conftest import assert_same, copy_case, tensors_of

PROMPT = "what is the capital of"


def test_a_model_is_consolidated_once(fsdp: Path, publish: Any) -> None:
    settings = publish(fsdp / "fsdp2")
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), load_file(fsdp / "fsdp2/full.safetensors"))
    assert ready.path.parent == settings.training.download_folder / ".podloader/models"
    assert (ready.tokenizer, ready.adapters) == (ready.path, ())
    assert ready.provenance["kind"] == "dcp"
    assert ready.provenance["checkpoint"] == "job1/rank-0/checkpoint-10"
    files = ready.provenance["files"]
    assert isinstance(files, dict)
    assert {path.split("/")[1] for path in files} == {"rank-0", "rank-1"}
    made = (ready.path / "model.safetensors").stat().st_mtime_ns
    assert boot.prepare(settings) == ready
    assert (ready.path / "model.safetensors").stat().st_mtime_ns == made


def test_the_dtype_that_is_asked_for(zero: Path, publish: Any) -> None:
    ready = boot.prepare(publish(zero / "zero2-fp16", consolidate_dtype="bfloat16"))
    wanted = load_file(zero / "zero2-fp16/full.safetensors")
    assert_same(tensors_of(ready.path), {k: v.to(torch.bfloat16) for k, v in wanted.items()})


def test_a_sharded_adapter_is_attached_by_its_jobs_name(
    zero: Path, base: Path, publish: Any
) -> None:
    ready = boot.prepare(publish(zero / "zero3-lora", base_model=str(base)))
    assert [adapter.name for adapter in ready.adapters] == ["job1"]
    assert ready.path == base


def test_a_sharded_dora_is_merged(fsdp: Path, base: Path, publish: Any) -> None:
    ready = boot.prepare(publish(fsdp / "lora-peft-names", base_model=str(base)))
    assert ready.adapters == ()
    merged, plain = tensors_of(ready.path), tensors_of(base)
    changed = {name for name, tensor in merged.items() if not tensor.equal(plain[name])}
    assert changed == {f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)}


def test_the_config_of_the_base_model(trainer: Path, base: Path, publish: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no rank has the config.json"):
        boot.prepare(publish(trainer))
    ready = boot.prepare(publish(trainer, base_model=str(base)))
    assert_same(tensors_of(ready.path), load_file(trainer / "full.safetensors"))
    assert (ready.tokenizer / "tokenizer.json").is_file()


def test_a_node_that_was_not_asked_for(fsdp: Path, publish: Any) -> None:
    settings = publish(fsdp / "fsdp2")
    reference = settings.training.artifact_references[0]
    object.__setattr__(reference, "paths", ("rank-0/checkpoint-10/",))
    with pytest.raises(CheckpointError, match="no rank's folder holds"):
        boot.prepare(settings)


@pytest.mark.parametrize("weights_only", [False, True])
def test_dcps_safetensors_storage(fsdp: Path, publish: Any, weights_only: bool) -> None:
    settings = publish(fsdp / "hf-storage", weights_only_fetch=weights_only)
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), load_file(fsdp / "hf-storage/full.safetensors"))
    here = list((settings.training.download_folder / "job1").rglob("shard-*"))
    assert bool(here) is not weights_only
    assert boot.prepare(settings) == ready


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2-bf16-tied", "hsdp-tp"])
def test_only_the_models_bytes_leave_the_origin(
    fsdp: Path, publish: Any, origin: FaultyOrigin, name: str
) -> None:
    """Model and optimizer lie in the same files; those are never on this disk."""
    settings = publish(fsdp / name, weights_only_fetch=True)
    ready = boot.prepare(settings)
    wanted = load_file(fsdp / name / "full.safetensors")
    if name.endswith("tied"):
        del wanted["lm_head.weight"]
    assert_same(tensors_of(ready.path), wanted)
    assert not list(settings.training.download_folder.rglob("*.distcp*"))
    files = ready.provenance["files"]
    assert isinstance(files, dict)
    assert any("bytes of version" in text for text in files.values())
    before = len(origin.requests)
    assert boot.prepare(settings) == ready
    assert not [r for p, r in origin.requests[before:] if p.endswith(".distcp") and r > "bytes=1"]


def test_shards_that_nothing_pins_come_whole(
    fsdp: Path, publish: Any, origin: FaultyOrigin
) -> None:
    """A weak ETag does not say that two ranges are of the same bytes: their digests have to."""
    origin.headers = lambda path: {"ETag": f'W/"{path}"'}
    settings = publish(fsdp / "fsdp1", weights_only_fetch=True)
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), load_file(fsdp / "fsdp1/full.safetensors"))
    assert list((settings.training.download_folder / "job1").rglob("*.distcp"))
    files = ready.provenance["files"]
    assert isinstance(files, dict)
    assert all(digest.startswith("crc64nvme:") for digest in files.values())


@pytest.mark.parametrize("name", ["zero2-fp16", "zero3-bf16", "zero3-frozen", "zero3-lora"])
def test_zero_reads_the_float32_partition_at_the_origin(
    zero: Path, base: Path, publish: Any, origin: FaultyOrigin, name: str
) -> None:
    settings = publish(zero / name, weights_only_fetch=True, base_model=str(base))
    ready = boot.prepare(settings)
    assert not list(settings.training.download_folder.rglob("*states.pt*"))
    if name == "zero3-lora":
        assert [adapter.name for adapter in ready.adapters] == ["job1"]
        return
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    full = load_file(zero / name / "full.safetensors")
    assert_same(tensors_of(ready.path), {k: v.to(dtype) for k, v in full.items()})
    asked = [path for path, _ in origin.requests if "optim_states" in path]
    assert bool(asked) is name.startswith("zero3")


def test_bytes_that_go_by_ranges_are_told_of(
    fsdp: Path, publish: Any, origin: FaultyOrigin
) -> None:
    """As those of a fetch: in what ``/health`` answers, with a span for each file."""
    settings = publish(fsdp / "fsdp1", weights_only_fetch=True)
    timeline = Timeline()
    state = BootState(timeline)
    origin.fail("__2_0.distcp", act(lambda: None), cut(1000))  # the first tells the version
    ready = boot.prepare(settings, state, timeline)
    now = state.boot()
    shards = {a.path for a in boot.plan(settings).files if a.path.endswith(".distcp")}
    assert {span.name for span in now.spans if span.name in shards} == shards
    weights = sum(t.numel() * t.element_size() for t in tensors_of(ready.path).values())
    here = (settings.training.download_folder / "job1").rglob("*")
    small = sum(path.stat().st_size for path in here if path.is_file())
    assert now.bytes == now.bytes_done == weights + small
    assert now.files == now.files_done
    assert now.counts["retries"] == 1


def test_a_connection_that_breaks_and_an_object_that_changes(
    fsdp: Path, publish: Any, origin: FaultyOrigin
) -> None:
    settings = publish(fsdp / "fsdp1", weights_only_fetch=True)
    origin.fail("__2_0.distcp", *[cut(1000)] * 3, status(503))
    assert boot.prepare(settings).path.is_dir()
    shutil.rmtree(settings.training.download_folder)
    (path,) = origin.root.rglob("__2_0.distcp")
    origin.fail("__2_0.distcp", act(lambda: None), act(lambda: path.write_bytes(b"new")))
    with pytest.raises((ChangedError, CheckpointError)):
        boot.prepare(settings)
    models = settings.training.download_folder / ".podloader/models"
    assert not [folder for folder in models.glob("*") if folder.name[0] != "."]


def test_shards_are_written_while_others_arrive(
    fsdp: Path, publish: Any, origin: FaultyOrigin
) -> None:
    """The last file comes slowly; what the others hold is written before it is there."""
    settings = publish(fsdp / "fsdp2", concurrency=8)
    down = settings.training.download_folder
    seen: list[int] = []

    def look() -> None:
        for _ in range(100):
            partial = list(down.glob(".podloader/models/**/model.safetensors"))
            seen.append(max((path.stat().st_blocks for path in partial), default=0))
            if seen[-1] > 100:
                return
            time.sleep(0.1)

    def hold(handler: FaultyHandler) -> bool:
        first, _, last = handler.headers["Range"].removeprefix("bytes=").partition("-")
        if int(last) - int(first) >= 1 << 18:  # less are headers, which are read at the origin
            look()
        return False

    origin.fail("__3_0.distcp", *[hold] * 100)
    ready = boot.prepare(settings)
    assert seen[-1] > 100
    assert_same(tensors_of(ready.path), load_file(fsdp / "fsdp2/full.safetensors"))
    assert (down / "job1/rank-1/checkpoint-10/__3_0.distcp").is_file()
    made = (ready.path / "model.safetensors").stat().st_mtime_ns
    assert boot.prepare(settings) == ready
    assert (ready.path / "model.safetensors").stat().st_mtime_ns == made


def test_plan_shows_both_totals(zero: Path, publish: Any) -> None:
    settings = publish(zero / "zero2-fp16", weights_only_fetch=True)
    manifest = boot.plan(settings)
    document = plan_document(Forecast(manifest), Path("/"), 0)
    names = {artifact.path.rpartition("/")[2] for artifact in manifest.left_out}
    assert names == {
        "zero_to_fp32.py",
        "zero_to_torch.py",
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "zero_pp_rank_1_mp_rank_00_optim_states.pt",
    }
    everything = sum(
        p.stat().st_size for p in (zero / "zero2-fp16").glob("rank-*/**/*") if p.is_file()
    )
    assert document["all_bytes"] == everything
    assert document["total_bytes"] == document["serving_bytes"]
    assert int(str(document["total_bytes"])) < everything / 2
    whole = plan_document(boot.look_ahead(publish(zero / "zero2-fp16")), Path("/"), 0)
    assert (whole["total_bytes"], whole["left_out"]) == (everything, [])
    assert whole["serving_bytes"] == document["total_bytes"]


def tokens_of_training(full: Path, base: Path) -> list[int]:
    """Return what the trained model itself answers, greedily."""
    model: Any = LlamaForCausalLM(LlamaConfig.from_pretrained(base)).float()
    model.load_state_dict({k: v.float() for k, v in load_file(full).items()})
    return greedy_tokens(model, base)


def greedy_tokens(model: Any, base: Path) -> list[int]:
    """Return what *model* answers, as transformers decodes greedily."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=16, min_new_tokens=16)
    return [int(token) for token in out[0, ids.shape[1] :]]


@pytest.mark.parametrize("name", ["fsdp2", "zero3-bf16"])
def test_the_command_makes_the_same_of_folders(
    fsdp: Path, zero: Path, publish: Any, name: str, tmp_path: Path
) -> None:
    """To the byte what the main job makes, on which vLLM answers below."""
    case, out = (fsdp if name == "fsdp2" else zero) / name, tmp_path / "out"
    folders = sorted(map(str, case.glob("rank-*/checkpoint-10")))
    command = [sys.executable, "-m", "loader", "consolidate", *folders, "--output", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    ready = boot.prepare(publish(case))
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    assert made == {path.name: path.read_bytes() for path in ready.path.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= made.keys()


@pytest.mark.engine
@pytest.mark.parametrize("name", ["fsdp2", "zero3-bf16"])
async def test_vllm_answers_like_the_model_that_was_trained(
    fsdp: Path, zero: Path, base: Path, publish: Any, name: str
) -> None:
    case = (fsdp if name == "fsdp2" else zero) / name
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    arguments = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True}
    # Either way the folder is the same, to the bit: one of the two is fetched by its weights alone.
    settings = publish(case, engine_args=arguments, weights_only_fetch=name == "fsdp2")
    ready: ReadyModel = boot.prepare(settings)
    model = await asyncio.to_thread(boot.start, ready, settings)
    try:
        body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 16, "ignore_eos": True}
        answer: Any = await model.predict(body)
    finally:
        await asyncio.to_thread(model.close)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    expected = tokens_of_training(case / "full.safetensors", base)
    assert greedy_tokens(LlamaForCausalLM.from_pretrained(ready.path).float(), base) == expected
    assert answer["choices"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer["choices"][0]["text"].startswith(" france? the capital of france is paris.")
    assert json.loads((ready.path / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("only", [True, False])
def test_copies_on_several_nodes(
    fsdp: Path, publish: Any, origin: FaultyOrigin, tmp_path: Path, only: bool
) -> None:
    """A copy serves; bytes of another run, of the same size, are refused wherever they are."""
    case = copy_case(fsdp / "fsdp2", tmp_path / "case")
    name = "checkpoint-10/__0_0.distcp"
    shutil.copy(case / "rank-0" / name, case / "rank-1" / name)
    settings = publish(case, weights_only_fetch=only)
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), load_file(fsdp / "fsdp2/full.safetensors"))
    shutil.rmtree(settings.training.download_folder)
    other = origin.folder("job1", 1) / name
    other.write_bytes(other.read_bytes()[:-1] + b"\x01")
    with pytest.raises(FormatError, match="under one name"):
        boot.prepare(settings)
