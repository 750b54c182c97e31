"""Sharded checkpoints made one: podloader, torch, accelerate, DeepSpeed's zero_to_fp32 and ``cp``.

    python -m benchmarks.consolidate [--folder DIR] [--layers 10] [--runs 2] [--rate 100]

Give a ``--folder`` in memory (/dev/shm) to leave a slow disk out of it.

The checkpoints are made in place by real jobs of two processes under torchrun: FSDP2 with
torch.distributed.checkpoint (bf16 weights, model and optimizer in folders of their own, as
accelerate saves them), and DeepSpeed ZeRO-3. Each node's files lie in a folder of its own; peers
are given links to all of them in one. Every contestant runs as a process of its own, after one
that reads its files into the page cache. The time is the whole process's but for imports, which are
told beside it, as is the process from its start to its end; the peak is resident memory above what
the interpreter takes once everything is imported. "podloader consolidate" is the command, of which
only the whole is told: it learns the model's names in a process beside it. ``cp`` copies the bytes
that matter: the model's shards. Python keeps its compiled modules, as an installed package's are.

Then both jobs are served by signed URLs, all connections together held to ``--rate`` MB/s, and
prepared on an empty folder, against the download alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.merge import _CLOCK
from benchmarks.models import VOCABULARY, make_llama
from benchmarks.overlap import measure as measure_command
from benchmarks.overlap import serve
from loader.demo.origin import PROJECT

CHECKPOINT = "checkpoint-10"
TAG = "global_step10"
_PODLOADER = (
    "import torch, transformers\n"
    "from transformers import LlamaForCausalLM\n"
    "from pathlib import Path\n"
    "from loader.weights.formats.consolidation import consolidate\n"
    "from loader.weights.formats.places import find_sharded",
    "folders = sorted(Path({job!r}).glob('rank-*/checkpoint-10'))\n"
    "consolidate(find_sharded(folders), Path({output!r}), dtype={dtype!r})",
)
_COMMAND = "podloader consolidate"
_CP = ("import subprocess", "subprocess.run(['cp', '-rL', {shards!r}, {output!r}], check=True)")
_SAVE = (
    "import torch\nfrom safetensors.torch import save_file\n"
    "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save"
)
CONTESTANTS = {
    "fsdp": {
        "podloader": _PODLOADER,
        "dcp_to_torch_save + save": (
            _SAVE,
            "Path = __import__('pathlib').Path\n"
            "Path({output!r}).mkdir()\n"
            "dcp_to_torch_save({shards!r}, {output!r} + '/whole.pt')\n"
            "state = torch.load({output!r} + '/whole.pt', weights_only=True)['model']\n"
            "save_file(state, {output!r} + '/model.safetensors')",
        ),
        "accelerate merge-weights": (
            "from accelerate.utils import merge_fsdp_weights",
            "merge_fsdp_weights({shards!r}, {output!r})",
        ),
        "cp": _CP,
    },
    "zero": {
        "podloader": _PODLOADER,
        "zero_to_fp32": (
            "from deepspeed.utils.zero_to_fp32 import "
            "convert_zero_checkpoint_to_fp32_state_dict as convert",
            "convert({together!r}, {output!r}, safe_serialization=True)",
        ),
    },
}


def make_job(kind: str, folder: Path, layers: int) -> Path:
    """Return the folder of a job of two nodes, run now unless its files are there already."""
    job = folder / f"{kind}-{layers}"
    if (job / "done").exists():
        return job
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(Path(__file__).resolve()), "--train", kind]
    command += ["--folder", str(job), "--layers", str(layers)]
    root = str(Path(__file__).resolve().parents[1])
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    together = job / "together"
    together.mkdir()
    for path in job.glob(f"rank-*/{CHECKPOINT}/**/*"):
        if path.is_file():
            link = together / path.relative_to(_home(path))
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    (job / "done").touch()
    return job


def _home(path: Path) -> Path:
    at = path.parts.index(CHECKPOINT)
    return Path(*path.parts[: at + 1])


def train(kind: str, job: Path, layers: int) -> None:
    """Take one step and save, as one rank of the job."""
    import torch

    rank = int(os.environ["RANK"])
    home = job / f"rank-{rank}" / CHECKPOINT
    home.mkdir(parents=True, exist_ok=True)
    model: Any = make_llama(layers)
    config = model.config
    ids = torch.randint(0, VOCABULARY, (1, 8))
    if kind == "fsdp":
        _train_fsdp(model, ids, home)
    else:
        _train_zero(model, ids, home)
    if rank == 0:
        config.save_pretrained(home)
        (home / "tokenizer.json").write_text(json.dumps({}))


def _train_fsdp(model: Any, ids: Any, home: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    save({"model": weights}, checkpoint_id=home / "pytorch_model_fsdp_0")
    save({"optimizer": moments}, checkpoint_id=home / "optimizer_0")
    dist.barrier()


def _train_zero(model: Any, ids: Any, home: Path) -> None:
    import deepspeed
    import torch.distributed as dist

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it is compiled
    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings
    )
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    engine.step()
    engine.save_checkpoint(str(home), tag=TAG)
    dist.barrier()


def measure(kind: str, name: str, job: Path) -> dict[str, float]:
    """Return the times and the peak memory of one contestant, run once."""
    output = job / "output"
    shutil.rmtree(output, ignore_errors=True)
    for path in job.glob("rank-*/**/*"):
        if path.is_file() and "optimizer_0" not in path.parts:
            with path.open("rb") as file:
                while file.read(1 << 24):
                    pass
    together = job / "together"
    dtype = "float32" if kind == "zero" else None
    names = {
        "job": str(job),
        "together": str(together),
        "shards": str(together / "pytorch_model_fsdp_0"),
        "output": str(output),
        "dtype": dtype,
    }
    if name == _COMMAND:
        folders = [str(path) for path in sorted(job.glob(f"rank-*/{CHECKPOINT}"))]
        command = [sys.executable, "-m", "loader", "consolidate", *folders, "--output", str(output)]
        command += ["--dtype", dtype] if dtype else []
    else:
        imports, work = CONTESTANTS[kind][name]
        code = _CLOCK.format(imports=imports, work=work.format(**names))
        command = [sys.executable, "-c", code]
    variables = {"DS_ACCELERATOR": "cpu", "PYTHONDONTWRITEBYTECODE": ""}
    variables["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    began = time.perf_counter()
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **variables}
    )
    if result.returncode:
        raise SystemExit(f"{name} failed:\n{result.stderr[-2000:]}")
    found = {"whole_s": time.perf_counter() - began}
    if name != _COMMAND:
        found |= json.loads(result.stdout.splitlines()[-1])
    shutil.rmtree(output, ignore_errors=True)
    return found


def compare(kind: str, job: Path, runs: int) -> None:
    """Print the best of each contestant."""
    best: dict[str, dict[str, float]] = {}
    for _ in range(runs):
        for name in (_COMMAND, *CONTESTANTS[kind]):
            for what, value in measure(kind, name, job).items():
                least = best.setdefault(name, {})
                least[what] = min(value, least.get(what, value))
    patterns = "pytorch_model_fsdp_0/*" if kind == "fsdp" else "global_step10/*"
    size = sum(p.stat().st_size for p in job.glob(f"rank-*/{CHECKPOINT}/{patterns}"))
    print(f"\n{kind}: {size / 1e9:.2f} GB of shards, best of {runs}")
    ours = best["podloader"]
    print(f"  {_COMMAND:28} process {best.pop(_COMMAND)['whole_s']:5.2f} s")
    for name, found in best.items():
        print(
            f"  {name:28} {found['work_s']:7.2f} s  imports {found['imports_s']:5.2f} s  "
            f"process {found['whole_s']:5.2f} s  peak {found['peak_bytes'] / 1e6:6.0f} MB  "
            f"{found['work_s'] / ours['work_s']:5.2f} x podloader's time  "
            f"{found['peak_bytes'] / max(1, ours['peak_bytes']):6.1f} x its memory"
        )


def overlap(kind: str, job: Path, rate_mb_s: float, runs: int) -> None:
    """Print what a pod's start takes: the download alone, and until the model is ready."""
    with tempfile.TemporaryDirectory(dir=job.parent) as temporary:
        folder = Path(temporary)
        jobs = folder / "origin" / "training_projects" / PROJECT / "jobs"
        for name in ("base", "tuned"):  # the server lists two jobs
            (jobs / name).mkdir(parents=True)
        for path in job.glob("rank-*/**/*"):
            if path.is_file():
                place = jobs / "tuned" / path.relative_to(job)
                place.parent.mkdir(parents=True, exist_ok=True)
                os.link(path, place)
        (jobs / "base" / "rank-0").mkdir()
        (jobs / "base" / "rank-0" / "empty").touch()
        ours, theirs = multiprocessing.Pipe()
        server = multiprocessing.get_context("spawn").Process(
            target=serve, args=(folder / "origin", folder, rate_mb_s, theirs), daemon=True
        )
        server.start()
        ours.recv()
        print(f"\n{kind}: over {rate_mb_s:.0f} MB/s, best of {runs}")
        for command, weights_only in (("fetch", False), ("prepare", False), ("prepare", True)):
            config = _write_config(folder, weights_only=weights_only)
            seconds = min(measure_command(command, config, folder / "down") for _ in range(runs))
            title = f"podloader {command}" + (", weights_only_fetch" if weights_only else "")
            print(f"  {title:40} {seconds:7.2f} s")
        ours.send("stop")


def _write_config(folder: Path, *, weights_only: bool) -> Path:
    path = folder / "config.yaml"
    reference = {"training_job_id": "tuned", "paths": [f"rank-*/{CHECKPOINT}/"]}
    settings = {
        "artifacts": [str(folder / "tuned.json")],
        "weights_only_fetch": weights_only,
    }
    config = {
        "training_checkpoints": {
            "download_folder": str(folder / "down"),
            "artifact_references": [reference],
        },
        "model_metadata": {"podloader": settings},
    }
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def main() -> None:
    """Make what is missing, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "consolidate-bench"
    parser.add_argument("--folder", type=Path, default=default)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--rate", type=float, default=100.0, help="MB/s; 0 leaves it out")
    parser.add_argument("--kinds", nargs="+", default=["fsdp", "zero"])
    parser.add_argument("--only-make", action="store_true", help="make the checkpoints and stop")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.train, options.folder, options.layers)
        sys.stdout.flush()
        os._exit(0)
    options.folder.mkdir(parents=True, exist_ok=True)
    jobs = {kind: make_job(kind, options.folder, options.layers) for kind in options.kinds}
    if options.only_make:
        return
    for kind, job in jobs.items():
        compare(kind, job, options.runs)
        if options.rate:
            overlap(kind, job, options.rate, 1)


if __name__ == "__main__":
    main()
