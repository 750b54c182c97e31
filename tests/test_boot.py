"""The main job up to the engine, on real checkpoints behind signed URLs."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import WhisperForConditionalGeneration

from loader import boot
from loader.config.settings import Settings
from loader.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    FormatError,
    ListingError,
    ResolveError,
)
from loader.fetch.progress import Progress
from loader.prepare.artifact_sources import open_origin, place_downloads
from loader.serve.model import base_name
from loader.timeline import Timeline
from loader.types import ReadyModel
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, status, write_listing
from tests.other_models import draw_whisper_lora, tiny_whisper


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_or_draw_lora(base, tmp_path_factory.mktemp("models") / "adapter")


class Job:
    """Checkpoints behind an origin, and settings that ask for them."""

    def __init__(self, origin: FaultyOrigin, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        self.root = folder / "down"
        self.listings: list[str] = []

    def put(self, source: Path, name: str, job: str = "job1", rank: int = 0) -> Path:
        return Path(shutil.copytree(source, self.origin.folder(job, rank) / name))

    def settings(self, *paths: str, jobs: tuple[str, ...] = ("job1",), **own: Any) -> Settings:
        listings = [str(write_listing(self.origin, self.folder / f"{j}.json", j)) for j in jobs]
        references = [{"training_job_id": "job1", "paths": list(paths)}]
        checkpoints = {"download_folder": str(self.root), "artifact_references": references}
        return Settings.load(
            {
                "training_checkpoints": checkpoints,
                "model_metadata": {"podloader": {"artifacts": listings} | own},
            }
        )


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path) -> Job:
    return Job(origin, tmp_path)


def test_a_full_model(job: Job, base: Path) -> None:
    job.put(base, "checkpoint-10")
    settings = job.settings("rank-*/checkpoint-10/")
    ready = boot.prepare(settings)
    assert ready.path == job.root / "job1/rank-0/checkpoint-10"
    assert (ready.tokenizer, ready.adapters, ready.max_lora_rank) == (ready.path, (), None)
    assert ready.provenance["checkpoint"] == "job1/rank-0/checkpoint-10"
    before = len(job.origin.requests)
    assert boot.prepare(settings) == ready
    assert len(job.origin.requests) - before == len(list(base.iterdir()))


@pytest.mark.parametrize("made", ["base", "adapter"])
def test_nodes_with_other_weights_under_one_name(
    job: Job, base: Path, adapter: Path, made: str
) -> None:
    first = job.put(base if made == "base" else adapter, "checkpoint-10")
    second = job.put(first, "checkpoint-10", rank=1)
    settings = job.settings("rank-*/checkpoint-10/", base_model=str(base))
    assert boot.prepare(settings).provenance
    (path,) = second.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match="under one name") as error:
        boot.prepare(settings)
    where = "job1/rank-{}/checkpoint-10/" + path.name
    assert error.value.problems == (f"{where.format(1)} differs from {where.format(0)}",)
    chosen = job.settings("rank-1/checkpoint-10/", base_model=str(base))
    assert boot.prepare(chosen).provenance


def test_an_adapter_is_attached(job: Job, base: Path, adapter: Path) -> None:
    job.put(adapter, "checkpoint-10")
    ready = boot.prepare(job.settings("rank-0/checkpoint-10/", base_model=str(base)))
    assert ready.path == base
    assert [a.name for a in ready.adapters] == ["job1"]
    assert ready.adapters[0].path == job.root / "job1/rank-0/checkpoint-10"
    assert ready.max_lora_rank == 8
    assert (ready.tokenizer / "tokenizer.json").is_file()
    assert "attach" in str(ready.provenance["made_from"])


def test_a_start_tells_what_it_is_about(job: Job, base: Path, adapter: Path) -> None:
    job.put(adapter, "lora")
    timeline = Timeline(quiet=True)
    ready = boot.prepare(job.settings("rank-0/lora/", base_model=str(base)), timeline=timeline)
    facts = timeline.facts
    assert facts["checkpoints"] == ["job1/rank-0/lora/"]
    assert facts["bytes_from"] == [f"http://127.0.0.1:{job.origin.server_port}"]
    assert (facts["model"], facts["base_model"]) == (str(ready.path), str(base))
    assert facts["adapters"] == ["job1"]
    assert facts["served_as"] == ["base", "job1"]
    assert {"podloader", "vllm", "torch"} == set(dict(facts["versions"]))  # type: ignore[call-overload]


def test_several_adapters_of_one_job_have_names_of_their_own(
    job: Job, base: Path, adapter: Path
) -> None:
    job.put(adapter, "checkpoint-10")
    job.put(adapter, "checkpoint-20")
    ready = boot.prepare(job.settings("rank-0/", base_model=str(base)))
    assert [a.name for a in ready.adapters] == ["job1-checkpoint-10", "job1-checkpoint-20"]


def test_an_adapter_is_merged_once(job: Job, base: Path, adapter: Path) -> None:
    job.put(adapter, "checkpoint-10")
    settings = job.settings("rank-0/", base_model=str(base), adapter_policy="merge")
    ready = boot.prepare(settings)
    assert (ready.adapters, ready.tokenizer) == ((), ready.path)
    assert base_name(ready, None) == "job1"  # as if it were attached
    assert job.root / ".podloader/models" in ready.path.parents
    name = "model.layers.0.self_attn.q_proj.weight"
    merged, plain = (
        load_file(ready.path / "model.safetensors"),
        load_file(base / "model.safetensors"),
    )
    assert not torch.equal(merged[name], plain[name])
    made = (ready.path / "model.safetensors").stat().st_mtime_ns
    again = boot.prepare(settings)
    assert again.path == ready.path
    assert (again.path / "model.safetensors").stat().st_mtime_ns == made


def test_the_cache_folder_is_used(job: Job, base: Path, adapter: Path, tmp_path: Path) -> None:
    job.put(adapter, "checkpoint-10")
    cache = tmp_path / "cache"
    ready = boot.prepare(
        job.settings(
            "rank-0/", base_model=str(base), adapter_policy="merge", cache_folder=str(cache)
        )
    )
    assert cache in ready.path.parents


def test_a_base_that_is_a_checkpoint_too(job: Job, base: Path, adapter: Path) -> None:
    job.put(base, "checkpoint-5", job="basejob")
    job.put(adapter, "checkpoint-10")
    settings = job.settings(
        "rank-0/checkpoint-10/",
        jobs=("job1", "basejob"),
        base_model="checkpoint:basejob/rank-0/checkpoint-5/",
        adapter_policy="attach",
    )
    ready = boot.prepare(settings)
    assert ready.path == job.root / "basejob/rank-0/checkpoint-5"
    assert [a.name for a in ready.adapters] == ["job1"]


def test_the_base_that_the_adapter_names(job: Job, base: Path, adapter: Path) -> None:
    place = job.put(adapter, "checkpoint-10")
    trusted = job.settings("rank-0/", trusted_folders=[str(base.parent)])
    assert boot.prepare(trusted).path == base
    with pytest.raises(AdapterError, match="only you may choose"):
        boot.prepare(job.settings("rank-0/"))
    config = json.loads((place / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = (
        f"http://127.0.0.1:{job.origin.server_address[1]}/meta-data/"
    )
    (place / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="only you may choose") as caught:
        boot.prepare(job.settings("rank-0/", allow_local_urls=True))
    assert "base_model" in caught.value.next_step
    assert not [path for path, _ in job.origin.requests if "meta-data" in path]


def test_a_base_of_other_shapes(job: Job, adapter: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", hidden_size=64)
    job.put(adapter, "checkpoint-10")
    for policy in ("attach", "merge"):
        with pytest.raises(AdapterError):
            boot.prepare(job.settings("rank-0/", base_model=str(other), adapter_policy=policy))


@pytest.mark.parametrize("name", ["checkpoint:job1/rank-0/checkpoint-10/", "checkpoint-folder"])
def test_a_base_that_is_no_model(job: Job, adapter: Path, name: str) -> None:
    job.put(adapter, "checkpoint-10")
    model = str(adapter) if name == "checkpoint-folder" else name
    with pytest.raises(ConfigError, match="no full model"):
        boot.prepare(job.settings("rank-0/", base_model=model))


def test_models_and_adapters_together(job: Job, base: Path, adapter: Path) -> None:
    job.put(base, "checkpoint-5")
    job.put(adapter, "checkpoint-10")
    with pytest.raises(CheckpointError, match="together") as caught:
        boot.prepare(job.settings("rank-0/"))
    assert "checkpoint:job1/rank-0/checkpoint-5/" in caught.value.next_step
    model = "checkpoint:job1/rank-0/checkpoint-5/"
    ready = boot.prepare(job.settings("rank-0/", base_model=model, adapter_policy="attach"))
    assert ready.adapters[0].name == "job1"


def test_two_full_models(job: Job, base: Path) -> None:
    job.put(base, "checkpoint-5")
    job.put(base, "checkpoint-10")
    with pytest.raises(CheckpointError, match="2 full models"):
        boot.prepare(job.settings("rank-0/"))


def test_a_model_without_tokenizer_takes_the_bases(job: Job, base: Path) -> None:
    place = job.put(base, "checkpoint-5")
    for path in place.glob("*token*"):
        path.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        boot.prepare(job.settings("rank-0/"))
    assert boot.prepare(job.settings("rank-0/", base_model=str(base))).tokenizer == base


def no_tokenizer(place: Path) -> Path:
    for path in [*place.glob("*token*"), *place.glob("chat_template*")]:
        path.unlink()
    return place


@pytest.mark.parametrize("kind", ["full", "attach", "merge"])
def test_the_tokenizer_of_whichever_has_it(job: Job, base: Path, adapter: Path, kind: str) -> None:
    """Over ``checkpoint:…``: what was trained, or what it was trained over."""
    under = job.put(base, "checkpoint-1", job="basejob")
    place = job.put(base if kind == "full" else adapter, "checkpoint-5")
    own = {} if kind == "full" else {"adapter_policy": kind}
    own["base_model"] = "checkpoint:basejob/rank-0/checkpoint-1/"

    def prepare() -> bytes:
        shutil.rmtree(job.root, ignore_errors=True)
        ready = boot.prepare(job.settings("rank-0/", jobs=("job1", "basejob"), **own))
        return (ready.tokenizer / "tokenizer.json").read_bytes()

    no_tokenizer(place)
    wanted = (under / "tokenizer.json").read_bytes()
    assert prepare() == wanted
    for path in base.glob("*token*"):
        shutil.copy(path, place)
    no_tokenizer(under)
    assert prepare() == wanted
    no_tokenizer(place)
    with pytest.raises(CheckpointError, match="without a tokenizer") as caught:
        prepare()
    assert "base_model" not in caught.value.next_step


def test_an_unknown_folder_says_what_was_found(job: Job) -> None:
    job.origin.put("checkpoint-1/notes.txt", b"x")
    with pytest.raises(CheckpointError, match="knows") as caught:
        boot.prepare(job.settings("rank-0/"))
    assert "notes.txt" in caught.value.got


def test_shards_that_are_none(job: Job) -> None:
    job.origin.put("checkpoint-5/.metadata", b"x")
    job.origin.put("checkpoint-5/__0_0.distcp", b"x")
    with pytest.raises(FormatError, match="pickle"):
        boot.prepare(job.settings("rank-0/"))


def test_a_whisper_model_needs_its_feature_extractor(job: Job, tmp_path: Path) -> None:
    whole = tiny_whisper(tmp_path / "whisper")
    place = job.put(whole, "checkpoint-5")
    for name in ("processor_config.json", "preprocessor_config.json"):
        (place / name).unlink()
    with pytest.raises(CheckpointError, match="feature extractor"):
        boot.prepare(job.settings("rank-0/"))
    shutil.copy(whole / "preprocessor_config.json", place)
    ready = boot.prepare(job.settings("rank-0/"))
    assert ready.provenance["kind"] == "whisper"
    assert ready.path.name == "checkpoint-5"


@pytest.mark.parametrize("kind", ["folder", "checkpoint"])
def test_an_adapter_of_whisper_is_merged(job: Job, tmp_path: Path, kind: str) -> None:
    """Under ``auto``, as PEFT merges it: nothing would prove that vLLM took it up."""
    base = tiny_whisper(tmp_path / "whisper")
    adapter = draw_whisper_lora(base, tmp_path / "adapter")
    job.put(adapter, "a")
    job.put(base, "base", job="job2")
    name = {"folder": str(base), "checkpoint": "checkpoint:job2/rank-0/base"}[kind]
    own: dict[str, Any] = {"jobs": ("job1", "job2"), "base_model": name}
    ready = boot.prepare(job.settings("rank-0/a/", **own))
    assert ready.adapters == ()
    assert (ready.path / "preprocessor_config.json").is_file()
    found = WhisperForConditionalGeneration.from_pretrained(ready.path).state_dict()
    plain = WhisperForConditionalGeneration.from_pretrained(base)
    model: Any = PeftModel.from_pretrained(plain, adapter)
    wanted = model.merge_and_unload().state_dict()
    assert all(torch.allclose(found[key], tensor, atol=1e-6) for key, tensor in wanted.items())
    key = "model.encoder.layers.0.self_attn.q_proj.weight"
    assert not torch.allclose(found[key], load_file(base / "model.safetensors")[key], atol=1e-3)
    with pytest.raises(AdapterError, match="another task"):
        boot.prepare(job.settings("rank-0/a/", **own, adapter_policy="attach"))


POOLING = '[{"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"}]'


@pytest.mark.parametrize(
    ("modules", "engine_args", "mode"),
    [
        ("[]", {}, "attached"),
        (POOLING, {}, "merged"),
        (POOLING, {"runner": "generate"}, "attached"),
        ("[]", {"runner": "pooling"}, "merged"),
        ("[]", {"convert": "embed"}, "merged"),
    ],
)
def test_an_adapter_of_what_vllm_pools_is_merged(
    job: Job, base: Path, adapter: Path, tmp_path: Path, modules: str, engine_args: Any, mode: str
) -> None:
    """A model that could go on with text makes embeddings: no canary would prove the adapter."""
    pooled = Path(shutil.copytree(base, tmp_path / "pooled"))
    (pooled / "modules.json").write_text(modules)
    job.put(adapter, "a")
    own = {"base_model": str(pooled), "engine_args": engine_args}
    ready = boot.prepare(job.settings("rank-0/a/", **own))
    assert ready.provenance["kind"] == mode


def test_pickled_weights_are_refused(job: Job, base: Path) -> None:
    place = job.put(base, "checkpoint-5")
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="pickled"):
        boot.prepare(job.settings("rank-0/"))


def sharded(job: Job, tmp_path: Path) -> Path:
    model = tiny_llama(tmp_path / "sharded", max_shard_size="300KB")
    return job.put(model, "checkpoint-5")


def test_shards_that_the_listing_lacks_are_refused_before_the_download(
    job: Job, tmp_path: Path
) -> None:
    place = sharded(job, tmp_path)
    shards = sorted(place.glob("*-of-*.safetensors"))
    assert len(shards) > 3
    for path in shards[1:3]:
        path.unlink()
    with pytest.raises(ResolveError, match="lacks") as caught:
        boot.prepare(job.settings("rank-0/"))
    assert [path.name in str(caught.value) for path in shards[:4]] == [False, True, True, False]
    assert not (job.root / "job1").exists()


def test_an_index_that_names_other_shards_is_refused_before_the_download(
    job: Job, tmp_path: Path
) -> None:
    place = sharded(job, tmp_path)
    index = place / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "weights-00001"))
    with pytest.raises(ResolveError, match="lacks"):
        boot.prepare(job.settings("rank-0/"))
    assert not (job.root / "job1").exists()


def test_shards_that_the_patterns_leave_out(job: Job, tmp_path: Path) -> None:
    place = sharded(job, tmp_path)
    last = sorted(path.name for path in place.glob("*-of-*"))[-1]
    names = [path.name for path in place.iterdir() if path.name != last]
    with pytest.raises(CheckpointError, match="missing") as caught:
        boot.prepare(job.settings(*(f"rank-0/checkpoint-5/{name}" for name in names)))
    assert caught.value.problems == (last,)


def test_a_listing_that_is_too_short_or_of_another_job(job: Job, base: Path) -> None:
    job.put(base, "checkpoint-5")
    settings = job.settings("rank-0/")
    path = write_listing(job.origin, job.folder / "job1.json", total_count=99)
    with pytest.raises(ListingError, match="total_count"):
        boot.prepare(settings)
    path.write_text(json.dumps(job.origin.listing("job1") | {"job": {"id": "other"}}))
    with pytest.raises(ListingError, match="no listing for a job"):
        boot.prepare(settings)


def test_a_listing_that_is_read_again_is_counted(job: Job) -> None:
    job.origin.put("checkpoint-5/notes.txt", b"x")
    settings = job.settings("rank-0/")
    timeline = Timeline(quiet=True)
    settings, laid = place_downloads(settings)
    with open_origin(settings, laid, timeline) as origin:
        (artifact,) = origin.listings[0].artifacts
        assert timeline.counts == {}
        job.origin.lifetime_s += 5  # another signature
        write_listing(job.origin, job.folder / "job1.json")
        job.origin.fail("notes.txt", status(403))
        assert origin.store.stat(artifact).size_bytes == 1
    assert timeline.counts == {"refreshes": 1}


def test_no_listing_at_all(job: Job) -> None:
    settings = Settings.load(
        {
            "training_checkpoints": {
                "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/"]}]
            }
        }
    )
    with pytest.raises(ConfigError, match="listing"):
        boot.plan(settings)


def test_plan_asks_for_sizes_or_not(job: Job, base: Path) -> None:
    job.put(base, "checkpoint-5")
    settings = job.settings("rank-0/")
    assert all(a.size_bytes is None for a in boot.plan(settings, with_sizes=False).files)
    assert job.origin.requests == []
    manifest = boot.plan(settings)
    assert all(a.size_bytes for a in manifest.files)
    assert not job.root.exists()
    job.origin.stop()
    manifest = boot.plan(settings)
    assert "files are unknown" in manifest.warnings[-1]
    assert "Signature" not in manifest.warnings[-1]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "added_tokens.json", "config.json"])
def test_plan_beside_json_without_end(job: Job, base: Path, name: str) -> None:
    place = job.put(base, "checkpoint-5")
    (place / "tokenizer_config.json").write_text("{}")
    (place / name).write_text("[" * 100_000)
    assert boot.look_ahead(job.settings("rank-0/")).manifest.files


def test_a_lying_safetensors_header(job: Job, base: Path) -> None:
    place = job.put(base, "checkpoint-5")
    whole = (place / "model.safetensors").read_bytes()
    (place / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(FormatError, match="broken"):
        boot.prepare(job.settings("rank-0/"))
    save_file({"x": torch.zeros(1)}, place / "model.safetensors")
    assert boot.fetch_files(job.settings("rank-0/")).fetched_bytes > 0


def test_kernels_come_before_the_engine_and_go_after_it(
    job: Job, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.put(base, "model")
    for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "disk"))
    for name in ("FLASHINFER_WORKSPACE_BASE", "CUDA_CACHE_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr("loader.serve.early_imports.import_vllm", lambda: None)
    monkeypatch.setattr("loader.serve.early_imports.start_forkserver", lambda: None)
    monkeypatch.setattr("loader.serve.early_imports._inspect", lambda config: None)
    found: list[Path] = []
    compiled: list[bool] = []

    def start(ready: ReadyModel, *_: object, load_format: str | None) -> None:
        found.append(ready.path)
        kernels = Path(os.environ["VLLM_CACHE_ROOT"]) / "torch_compile_cache/one"
        compiled.append(kernels.exists())
        kernels.mkdir(parents=True, exist_ok=True)
        (kernels / "model").write_text("code")

    monkeypatch.setattr(boot, "start", start)
    for _ in range(2):
        shutil.rmtree(tmp_path / "disk", ignore_errors=True)
        monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "disk"))
        settings = job.settings(
            "rank-0/", kernel_cache=str(tmp_path / "shared"), engine_start="files"
        )
        ready, _ = boot.prepare_and_start(settings, Progress(), Timeline())
        for thread in threading.enumerate():
            if thread.name == "kernels":
                thread.join()
        assert found[-1].resolve() == ready.path.resolve()
        assert found[-1] != ready.path
    assert compiled == [False, True]
