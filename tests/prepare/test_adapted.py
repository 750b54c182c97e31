"""Adapters over bases that are not here yet: found unfit, or without room, before they are."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from loader import boot
from loader.adapters.merge import WeightedAdapter, merge
from loader.config.settings import Settings
from loader.errors import AdapterError, DiskError, UnsupportedError
from loader.weights.vocabulary import warn_of_ids
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin
from tests.test_boot import Job

FILE = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "base", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_or_draw_lora(base, tmp_path_factory.mktemp("models") / "adapter")


@pytest.fixture(scope="module")
def misfit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    other = tiny_llama(folder / "other", hidden_size=64, tokenizer=False)
    return train_or_draw_lora(other, folder / "misfit")


@pytest.fixture
def job(origin: FaultyOrigin, tmp_path: Path) -> Job:
    return Job(origin, tmp_path)


def behind_url(job: Job, base: Path, **own: Any) -> Settings:
    """Return settings whose base lies behind a URL of fsspec's."""
    place: dict[str, Any] = {"base_model": f"file://{base}", "allow_local_urls": True}
    return job.settings("rank-0/", **place | own)


def over_checkpoint(job: Job, base: Path, **own: Any) -> Settings:
    job.put(base, "checkpoint-5", job="basejob")
    own = {"base_model": "checkpoint:basejob/rank-0/checkpoint-5/"} | own
    return job.settings("rank-0/", jobs=("job1", "basejob"), **own)


def weights_here(job: Job) -> list[Path]:
    return [p for p in job.root.rglob("model*") if p.suffix in (".safetensors", ".part")]


@pytest.mark.parametrize("policy", ["auto", "attach"])
def test_a_misfit_over_a_base_behind_a_url(job: Job, base: Path, misfit: Path, policy: str) -> None:
    job.put(misfit, "checkpoint-10")
    with pytest.raises(AdapterError, match="does not fit its base") as error:
        boot.prepare(behind_url(job, base, adapter_policy=policy))
    assert len(error.value.problems) == 4
    assert not weights_here(job)


def test_merged_while_it_is_fetched_from_a_url(
    job: Job, base: Path, adapter: Path, tmp_path: Path
) -> None:
    job.put(adapter, "checkpoint-10")
    merge(base, [WeightedAdapter(adapter)], tmp_path / "expected")
    ready = boot.prepare(behind_url(job, base))
    assert (ready.path / FILE).read_bytes() == (tmp_path / "expected" / FILE).read_bytes()
    assert "along with the base's download" in str(ready.provenance["why"])
    made = (ready.path / "podloader.json").stat().st_mtime_ns
    again = boot.prepare(behind_url(job, base))
    assert again.path == ready.path
    assert (again.path / "podloader.json").stat().st_mtime_ns == made
    attached = boot.prepare(behind_url(job, base, adapter_policy="attach"))
    assert "bases" in attached.path.parts
    assert [a.name for a in attached.adapters] == ["job1"]


def test_attached_over_a_base_behind_a_url(job: Job, base: Path, adapter: Path) -> None:
    job.put(adapter, "checkpoint-10")
    ready = boot.prepare(behind_url(job, base, adapter_policy="attach"))
    assert (ready.path / FILE).read_bytes() == (base / FILE).read_bytes()
    assert ready.max_lora_rank == 8


def quantise(
    base: Path, folder: Path, about: dict[str, Any], change: Callable[..., Tensors]
) -> Path:
    """Save *base* with each linear weight replaced by what *change* makes of it."""
    shutil.copytree(base, folder)
    tensors: Tensors = {}
    for name, tensor in load_file(base / FILE).items():
        tensors |= change(name, tensor) if name.endswith("_proj.weight") else {name: tensor}
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"quantization_config": about}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def fp8(base: Path, folder: Path) -> Path:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        scale = torch.full((-(-weight.shape[0] // 64), -(-weight.shape[1] // 64)), 0.01)
        return {name: (weight / 0.01).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}

    return quantise(base, folder, {"quant_method": "fp8", "weight_block_size": [64, 64]}, change)


def four_bits(base: Path, folder: Path) -> Path:
    """As bitsandbytes writes it: the shape is told by a JSON among the tensors."""

    def change(name: str, weight: torch.Tensor) -> Tensors:
        state = {"shape": list(weight.shape), "blocksize": 64, "dtype": "bfloat16"}
        return {
            name: torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
            f"{name}.absmax": torch.ones(weight.numel() // 64),
            f"{name}.quant_map": torch.linspace(-1, 1, 16),
            f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
                list(json.dumps(state).encode()), dtype=torch.uint8
            ),
        }

    return quantise(base, folder, {"quant_method": "bitsandbytes"}, change)


def gptq(base: Path, folder: Path) -> Path:
    def change(name: str, weight: torch.Tensor) -> Tensors:
        module, (rows, columns) = name.removesuffix(".weight"), weight.shape
        words = torch.zeros(columns // 8, rows, dtype=torch.int32)
        return {f"{module}.qweight": words, f"{module}.scales": torch.ones(1, rows)}

    return quantise(base, folder, {"quant_method": "gptq", "bits": 4}, change)


@pytest.mark.parametrize("method", [fp8, four_bits, gptq])
@pytest.mark.parametrize("place", [behind_url, over_checkpoint])
def test_a_misfit_over_a_quantised_base(
    job: Job,
    base: Path,
    misfit: Path,
    adapter: Path,
    tmp_path: Path,
    method: Callable[..., Path],
    place: Callable[..., Settings],
) -> None:
    """Nothing of the weights is downloaded; an adapter that fits is attached."""
    quantised = method(base, tmp_path / "quantised")
    settings = place(job, quantised, adapter_policy="attach")
    job.put(misfit, "checkpoint-10")
    with pytest.raises(AdapterError, match="does not fit its base") as error:
        boot.prepare(place_again(job, settings))
    assert len(error.value.problems) == 4
    assert not weights_here(job)
    shutil.rmtree(job.origin.folder("job1"))
    job.put(adapter, "checkpoint-10")
    assert boot.prepare(place_again(job, settings)).adapters


def place_again(job: Job, settings: Settings) -> Settings:
    """Return *settings* with the listing as it is now."""
    own = {"base_model": settings.base_model, "allow_local_urls": True}
    jobs = ("job1", "basejob") if settings.base_checkpoint else ("job1",)
    return job.settings("rank-0/", jobs=jobs, adapter_policy=settings.adapter_policy, **own)


@pytest.mark.parametrize(
    ("method", "dequantise", "text"),
    [
        (fp8, False, "cannot take up"),
        (four_bits, False, "cannot take up"),
        (gptq, True, "'gptq' are not dequantised"),
    ],
)
@pytest.mark.parametrize("place", [behind_url, over_checkpoint])
def test_a_merge_that_will_be_refused_costs_no_download(
    job: Job,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    method: Callable[..., Path],
    dequantise: bool,
    text: str,
    place: Callable[..., Settings],
) -> None:
    job.put(adapter, "checkpoint-10")
    quantised = method(base, tmp_path / "quantised")
    with pytest.raises(UnsupportedError, match=text) as error:
        boot.prepare(place(job, quantised, adapter_policy="merge", dequantise=dequantise))
    assert error.value.next_step
    assert not weights_here(job)


@pytest.mark.parametrize("place", [behind_url, over_checkpoint])
def test_a_quantised_base_is_merged_when_asked(
    job: Job, base: Path, adapter: Path, tmp_path: Path, place: Callable[..., Settings]
) -> None:
    job.put(adapter, "checkpoint-10")
    quantised = fp8(base, tmp_path / "quantised")
    ready = boot.prepare(place(job, quantised, adapter_policy="merge", dequantise=True))
    merge(quantised, [WeightedAdapter(adapter)], tmp_path / "expected", dequantise=True)
    assert (ready.path / FILE).read_bytes() == (tmp_path / "expected" / FILE).read_bytes()


@pytest.mark.parametrize("place", [behind_url, over_checkpoint])
def test_room_for_base_and_merged_model_together(
    job: Job,
    base: Path,
    adapter: Path,
    place: Callable[..., Settings],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either alone would fit."""
    job.put(adapter, "checkpoint-10")
    settings = place(job, base)
    size = (base / FILE).stat().st_size
    usage = shutil.disk_usage(job.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size * 3 // 2))
    monkeypatch.setattr("loader.fetch.download._SPARE_BYTES", 0)
    with pytest.raises(DiskError, match="free space"):
        boot.prepare(settings)
    assert not weights_here(job)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size * 5 // 2))
    assert boot.prepare(settings).path.is_dir()


def test_what_a_killed_merge_left_is_swept(job: Job, base: Path, adapter: Path) -> None:
    """A living one's stays."""
    job.put(adapter, "checkpoint-10")
    settings = over_checkpoint(job, base)
    cache = job.root / ".podloader/models"
    code = (
        "import pathlib, sys, time\n"
        "from loader.weights.publishing import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1]), 'merging') as folder:\n"
        "    (folder / 'model').mkdir()\n"
        "    print('in', flush=True)\n"
        "    time.sleep(120)"
    )
    command = [sys.executable, "-c", code, str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        boot.prepare(settings)
        assert list(cache.glob(".merging.*.partial/model"))
        process.send_signal(signal.SIGKILL)
    assert list(cache.glob(".merging.*.partial/model"))
    ready = boot.prepare(settings)  # all is here: nothing is merged
    assert [path.name for path in cache.iterdir()] == [ready.path.name]


def test_tokens_without_a_row_are_told(job: Job, base: Path, tmp_path: Path) -> None:
    """By `plan`, of what its small files say, and by `prepare`."""
    rows = json.loads((base / "config.json").read_text())["vocab_size"]
    model = Path(shutil.copytree(base, tmp_path / "model"))
    (model / "added_tokens.json").write_text(json.dumps({"<|new|>": rows}))
    job.put(model, "checkpoint-10")
    settings = job.settings("rank-0/")
    expected = f"1 tokens of the tokenizer are beyond the model's {rows} rows: '<|new|>' is {rows}"
    assert any(expected in warning for warning in boot.plan(settings).warnings)
    told = boot.prepare(settings).provenance["warnings"]
    assert isinstance(told, list)
    assert expected in told
    assert warn_of_ids(base, base) is None


def test_a_pickled_adapter_is_attached_as_safetensors(job: Job, base: Path, tmp_path: Path) -> None:
    lora = train_or_draw_lora(base, tmp_path / "pickled", safe_serialization=False)
    job.put(lora, "checkpoint-10")
    settings = behind_url(job, base, adapter_policy="attach", allow_pickle=True)
    (served,) = boot.prepare(settings).adapters
    assert (served.path / "adapter_model.safetensors").is_file()
    assert not list(served.path.glob("*.bin"))
