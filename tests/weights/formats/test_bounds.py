"""What consolidation takes: memory by the largest tensor, and from the origin the model alone."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import LlamaForCausalLM

from loader import boot
from tests.models import tiny_llama
from tests.origin import FaultyOrigin
from tests.weights.formats.conftest import assert_same, tensors_of

TENSORS, SHAPE = 12, (2048, 4096)
TENSOR_BYTES = 4 * SHAPE[0] * SHAPE[1]
BOUND_BYTES = 2 * TENSOR_BYTES + (256 << 20)
NAMES = [f"layers.{i}.weight" for i in range(TENSORS)]
# Resident memory above what the interpreter takes with its modules; torch's own code, paged in when
# a kernel first runs, counts as well.
MEASURE = """
import json, sys
from pathlib import Path
from loader.types import Checkpoint, Kind
from loader.weights.formats.consolidation import consolidate

def kilobytes(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0])

kind, folder, output, dtype, detail, names = json.loads(sys.argv[1])
names = {name: tuple(shape) for name, shape in names.items()}
before = kilobytes("VmRSS")
consolidate(Checkpoint(Kind(kind), Path(folder), detail), Path(output), names=names, dtype=dtype)
print(1024 * (kilobytes("VmHWM") - before))
"""


def make_dcp(folder: Path) -> dict[str, object]:
    """Write a distributed checkpoint; return what inspection would say of it."""
    save_alone({name: torch.zeros(SHAPE) for name in NAMES}, folder)
    return {}


def save_alone(state: dict[str, Any], folder: Path) -> None:
    """Save a distributed checkpoint of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of exactly that
        save(state, checkpoint_id=folder, no_dist=True)


def make_zero(folder: Path) -> dict[str, object]:
    """Write ZeRO-3's files of two ranks, the float32 partitions alone."""
    write_zero(folder / "global_step1", {name: torch.zeros(SHAPE) for name in NAMES}, moments=False)
    return {"tag": "global_step1"}


def write_zero(folder: Path, tensors: dict[str, torch.Tensor], *, moments: bool) -> None:
    """Write *tensors* as ZeRO-3 of two ranks lays them out; all sizes are even."""
    folder.mkdir(parents=True)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    module = {name: torch.empty(0, dtype=torch.bfloat16) for name in tensors}
    for rank in (0, 1):
        halves = [t.reshape(2, -1)[rank] for t in tensors.values()]
        flat = torch.cat(halves) if len(halves) > 1 else halves[0]
        states = {"module": module, "param_shapes": [shapes], "dp_world_size": 2}
        torch.save(states, folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        inner = {"state": {0: {"exp_avg": flat * 2, "exp_avg_sq": flat * 3}}} if moments else {}
        optimizer = {
            "zero_stage": 3,
            "partition_count": 2,
            "fp32_flat_groups": [flat],
            "optimizer_state_dict": inner,
        }
        path = folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, path)


def make_transposed(folder: Path) -> dict[str, object]:
    """Write a pickle of tensors that lie in memory in the other order of dimensions."""
    state = {name: torch.zeros(SHAPE[::-1]).t() for name in NAMES}
    torch.save(state, folder / "pytorch_model.bin")
    return {}


def make_columns(folder: Path) -> dict[str, object]:
    """Write DCP's safetensors storage of two ranks, each with half of the columns."""
    half = SHAPE[1] // 2
    for rank in (0, 1):
        state = {name: torch.zeros(SHAPE[0], half) for name in NAMES}
        places = {name: {"saved_offsets": [0, rank * half]} for name in NAMES}
        path = folder / f"shard-0000{rank + 1}-model-00001-of-00001.safetensors"
        save_file(state, path, metadata={"DCP_SHARDING_INFO": json.dumps(places)})
    return {}


@pytest.mark.parametrize(
    ("kind", "make", "dtype"),
    [
        ("dcp", make_dcp, None),
        ("dcp", make_dcp, "bfloat16"),
        ("dcp", make_columns, None),
        ("zero", make_zero, "float32"),
        ("zero", make_zero, None),
        ("rank-shards", make_transposed, None),
        ("rank-shards", make_transposed, "bfloat16"),
    ],
)
def test_peak_memory(
    kind: str, make: Callable[[Path], dict[str, object]], dtype: str | None, tmp_path: Path
) -> None:
    """At most twice the largest tensor and 256 MiB; all tensors together are more than that."""
    assert TENSORS * TENSOR_BYTES > 1.1 * BOUND_BYTES
    folder = tmp_path / "checkpoint-10"
    folder.mkdir()
    detail = make(folder)
    (folder / "config.json").write_text("{}")
    shapes = dict.fromkeys(NAMES, SHAPE)
    given = json.dumps([kind, str(folder), str(tmp_path / "out"), dtype, detail, shapes])
    command = [sys.executable, "-c", MEASURE, given]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    assert int(done.stdout) < BOUND_BYTES
    written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    element = 2 if dtype == "bfloat16" or (kind == "zero" and dtype is None) else 4
    assert written > TENSORS * TENSOR_BYTES // 4 * element


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A model of 26 MB after a step, and its optimizer with two moments."""
    base = tiny_llama(tmp_path_factory.mktemp("larger"), hidden_size=512, intermediate_size=1536)
    model: Any = LlamaForCausalLM.from_pretrained(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 300, (1, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return base, model, optimizer


@pytest.mark.parametrize("kind", ["dcp", "zero"])
def test_the_optimizers_bytes_stay_at_the_origin(
    kind: str, trained: tuple[Path, Any, Any], publish: Any, origin: FaultyOrigin, tmp_path: Path
) -> None:
    """They lie in the same files as the model's, and are twice as many."""
    base, model, optimizer = trained
    home = tmp_path / "case/rank-0/checkpoint-10"
    home.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (home / name).write_bytes((base / name).read_bytes())
    if kind == "dcp":
        weights, moments = get_state_dict(model, optimizer)
        save_alone({"model": weights, "optimizer": moments}, home)
        shards = list(home.glob("*.distcp"))
    else:
        state = {k: v.detach() for k, v in model.state_dict().items()}
        write_zero(home / "global_step1", state, moments=True)
        shards = list(home.glob("global_step1/*optim*"))
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert sum(path.stat().st_size for path in shards) > 2.9 * size
    settings = publish(
        tmp_path / "case",
        weights_only_fetch=True,
        consolidate_dtype="float32",
        base_model=str(base),
    )
    ready = boot.prepare(settings)
    assert_same(tensors_of(ready.path), dict(model.state_dict()))
    # Of each chunk a block of 256 KiB is read for its directory, too.
    assert size < origin.bytes_sent < 1.5 * size
