"""What an engine will want, beside what the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from loader.errors import EngineError
from loader.serve import machine as machines
from loader.serve import room
from loader.serve.machine import Gpu, Machine, Node, read_machine
from loader.serve.room import check_engine_room, engine_room

GB = 10**9
H100 = Gpu(80 * GB, 79 * GB)


def found(args: Mapping[str, object], machine: Machine) -> dict[str, object]:
    return {r.what: (r.is_short, r.is_sure) for r in engine_room("vllm", args, 30 * GB, machine)}


@pytest.fixture
def of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_cpu_build", lambda: False)


@pytest.mark.usefixtures("of_gpus")
def test_weights_and_a_floor_on_every_gpu() -> None:
    small = Gpu(24 * GB, 23 * GB)
    assert found({}, Machine((H100,), 64 * GB, GB)) == {"GPU memory": (False, True)}
    assert found({}, Machine((small,), 64 * GB, GB)) == {"GPU memory": (True, True)}
    two = {"tensor_parallel_size": 2}
    assert found(two, Machine((small, small), 64 * GB, GB)) == {
        "GPU memory": (False, True),
        "/dev/shm": (False, False),
    }
    docker = Machine((small, small), 64 * GB, 64 << 20)
    assert found(two, docker)["/dev/shm"] == (True, False)
    assert found({"gpu_memory_utilization": 0.2}, Machine((H100,), 64 * GB, GB)) == {
        "GPU memory": (True, True)
    }


@pytest.mark.usefixtures("of_gpus")
@pytest.mark.parametrize(
    ("args", "sure"),
    [
        ({"quantization": "fp8"}, False),
        ({"cpu_offload_gb": 10}, False),
        ({"load_format": "dummy"}, False),
        ({"load_format": "safetensors"}, True),
        ({"data_parallel_size": 1}, True),
    ],
)
def test_weights_that_take_another_room_than_their_files(
    args: dict[str, object], sure: bool
) -> None:
    assert found(args, Machine((Gpu(24 * GB, None),), GB, GB)) == {"GPU memory": (True, sure)}


@pytest.mark.usefixtures("of_gpus")
def test_what_nobody_knows_is_no_refusal() -> None:
    assert found({}, Machine((Gpu(None, None),), GB, GB)) == {"GPU memory": (False, True)}
    assert found({}, Machine((), GB, GB)) == {}, "made ready here, served elsewhere"


def test_on_a_cpu_the_machines_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "is_cpu_build", lambda: True)
    assert found({}, Machine((), 16 * GB, GB)) == {"memory": (True, True)}
    monkeypatch.setattr(room, "read_machine", lambda: Machine((), 16 * GB, GB))
    with pytest.raises(EngineError) as caught:
        check_engine_room("vllm", {}, 30 * GB, "job1/rank-0/out")
    assert caught.value.problems == (
        "memory: 31.0 GB wanted (weights 30.0 GB, at least 1.0 GB beside them), 16.0 GB there",
    )
    assert check_engine_room("vllm", {}, 3 * GB, "out") == ()


@pytest.mark.parametrize(
    ("args", "space", "needed", "told"),
    [
        ({}, None, 92, "vLLM takes 92% of all, unless VLLM_CPU_KVCACHE_SPACE says"),
        ({"gpu_memory_utilization": 0.5}, None, 50, "vLLM takes 50% of all, unless"),
        ({"kv_cache_memory_bytes": 4 * GB}, None, 34, "weights 30.0 GB, KV cache 4.0 GB"),
        ({"kv_cache_memory_bytes": "4000000000"}, None, 34, "weights 30.0 GB, KV cache 4.0 GB"),
        ({"kv_cache_memory_bytes": "4G"}, None, None, ""),
        ({}, "10", 30 + (10 << 30) / GB, "weights 30.0 GB, KV cache 10.7 GB"),
        ({"kv_cache_memory_bytes": 4 * GB}, "10", 30 + (10 << 30) / GB, "KV cache 10.7 GB"),
        ({}, "", 92, "vLLM takes"),
        ({}, "half", None, ""),
    ],
)
def test_what_has_to_be_free_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    args: Mapping[str, object],
    space: str | None,
    needed: float | None,
    told: str,
) -> None:
    monkeypatch.setattr(room, "is_cpu_build", lambda: True)
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    if space is not None:
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
    machine = Machine((), 100 * GB, GB, Node(100 * GB, 91 * GB))
    now = [r for r in engine_room("vllm", args, 30 * GB, machine) if r.what == "memory now"]
    assert [r.needed_bytes / GB for r in now] == ([] if needed is None else [needed])
    assert all(told in r.why and not r.is_sure for r in now)
    assert not [r for r in engine_room("transformers", args, 0, machine) if r.what == "memory now"]


def test_memory_is_read_as_vllm_reads_it() -> None:
    pytest.importorskip("vllm")
    from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info

    theirs = get_memory_node_info(get_allowed_cpu_list()[0].numa_node)
    node = read_machine().node
    assert node is not None
    assert node.memory_bytes == theirs.total_memory
    assert node.free_bytes == pytest.approx(theirs.available_memory, rel=0.2)


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_CGROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("8000000\n")
    (tmp_path / "memory.current").write_text("3000000\n")
    assert read_machine().node == Node(8_000_000, 5_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    node = read_machine().node
    assert node is not None
    assert node.memory_bytes > 8_000_000


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: int = 0) -> None:
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")


ROWS = "0, GPU-aa, 81559, 81000, Disabled\n1, GPU-bb, 24564, 20000, [N/A]"


@pytest.mark.parametrize(
    ("named", "mib"),
    [
        (None, [81559, 24564]),
        ("", []),
        ("1", [24564]),
        ("GPU-bb,0", [24564, 81559]),
        ("0,7,1", [81559]),
        ("MIG-x", [None]),
    ],
)
def test_gpus_that_a_process_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str | None, mib: list[int | None]
) -> None:
    smi(tmp_path, monkeypatch, ROWS)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    told = [gpu.memory_bytes for gpu in read_machine().gpus]
    assert told == [m and m << 20 for m in mib]


@pytest.mark.parametrize(
    ("text", "code", "gpus"),
    [
        ("0, GPU-aa, 81559, 1, Enabled", 0, (Gpu(None, None),)),
        ("0, GPU-aa, [N/A], [N/A], [N/A]", 0, (Gpu(None, None),)),
        ("NVIDIA-SMI has failed", 9, ()),
        ("", 0, ()),
    ],
)
def test_gpus_that_do_not_tell(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    code: int,
    gpus: tuple[Gpu, ...],
) -> None:
    smi(tmp_path, monkeypatch, text, code)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert read_machine().gpus == gpus


@pytest.mark.parametrize(
    ("group", "files", "limit"),
    [
        ("0::/a/b", {"a/b/memory.max": "max", "a/memory.max": "1000"}, 1000),
        ("0::/", {"memory.max": "2000"}, 2000),
        ("5:cpu,memory:/x", {"memory/x/memory.limit_in_bytes": "3000"}, 3000),
        ("4:cpu:/x", {"memory.max": "1"}, None),
        ("0::/gone", {}, None),
    ],
)
def test_the_limit_of_a_container(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    group: str,
    files: dict[str, str],
    limit: int | None,
) -> None:
    (tmp_path / "cgroup").write_text(f"{group}\n")
    for name, text in files.items():
        place = tmp_path / "fs" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{text}\n")
    monkeypatch.setattr(machines, "_CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(machines, "_GROUP", tmp_path / "cgroup")
    total = min(machines._memory_total())
    assert read_machine().memory_bytes == (limit or total)
