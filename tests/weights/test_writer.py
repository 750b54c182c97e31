"""Reading and writing weights: what was written is what the library reads, or nothing at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loader.errors import CheckpointError, DiskError, FormatError
from loader.weights.header import read_header
from loader.weights.readers import MemoryReader, SafetensorsReader, open_weights
from loader.weights.writer import CheckpointWriter, TensorSpec, plan_shard, plan_shards

TENSORS = {
    "a": torch.arange(12, dtype=torch.bfloat16).reshape(4, 3),
    "b": torch.arange(5, dtype=torch.int64),
    "c": torch.tensor(2.5),
    "empty": torch.zeros(0, 2),
    "z": torch.randn(3, 3).to(torch.float8_e4m3fn),
}
CODES = {"a": "BF16", "b": "I64", "c": "F32", "empty": "F32", "z": "F8_E4M3"}
SPECS = [TensorSpec(name, CODES[name], tuple(t.shape)) for name, t in TENSORS.items()]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(TENSORS, folder / "model.safetensors")
    return folder


def same(folder: Path) -> bool:
    found = {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}
    return set(found) == set(TENSORS) and all(
        found[n].dtype == t.dtype
        and found[n].shape == t.shape
        and found[n].flatten().view(torch.uint8).equal(t.flatten().view(torch.uint8))
        if t.ndim
        else found[n].equal(t)
        for n, t in TENSORS.items()
    )


def test_reader(source: Path) -> None:
    with SafetensorsReader(open_weights(source).stored) as reader:  # type: ignore[union-attr]
        assert set(reader.tensors) == set(TENSORS)
        for name, tensor in TENSORS.items():
            assert reader.read(name).to(torch.float32).equal(tensor.to(torch.float32))
            assert bytes(reader.read_raw(name)) == bytes(MemoryReader(TENSORS).read_raw(name))
        assert reader.read_rows("a", 1, 3).equal(TENSORS["a"][1:3])
    assert MemoryReader(TENSORS).read_rows("a", 1, 3).equal(TENSORS["a"][1:3])


def test_a_file_that_shrinks_while_it_is_read(source: Path) -> None:
    reader = open_weights(source)
    os.truncate(source / "model.safetensors", 200)
    with pytest.raises(FormatError, match="became shorter"):
        [reader.read(name) for name in TENSORS]


def test_dtype_that_torch_lacks(tmp_path: Path) -> None:
    head = plan_shard("x", [TensorSpec("t", "F6_E2M3", (4,))]).head
    (tmp_path / "model.safetensors").write_bytes(head + b"\0\0\0")
    with pytest.raises(FormatError, match="torch cannot hold"):
        open_weights(tmp_path).read("t")


@pytest.mark.parametrize("limit", [1, 30, 10_000])
def test_written_in_any_order_and_in_rows(tmp_path: Path, limit: int) -> None:
    out = tmp_path / "deep" / "out"
    plans = plan_shards(SPECS, max_shard_bytes=limit)
    with CheckpointWriter(out, plans) as writer:
        for name in reversed(TENSORS):
            if name == "a":
                writer.write_rows(name, 2, TENSORS[name][2:])
                writer.write_rows(name, 0, TENSORS[name][:2])
            else:
                writer.write(name, TENSORS[name])
        (writer.path / "config.json").write_text("{}")
        assert not out.exists()
    assert same(out)
    assert (out / "config.json").exists()
    for path in out.glob("*.safetensors"):
        read_header(path)
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    index = out / "model.safetensors.index.json"
    assert index.exists() == (limit < 10_000)
    if index.exists():
        names = json.loads(index.read_text())["weight_map"]
        assert {p.name for p in out.glob("*.safetensors")} == set(names.values())
    assert [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("limit", [30, 10_000])
def test_copied_without_being_decoded(source: Path, tmp_path: Path, limit: int) -> None:
    reader = open_weights(source)
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS, max_shard_bytes=limit)) as writer:
        writer.copy(list(TENSORS), reader)
    assert same(tmp_path / "out")
    with CheckpointWriter(tmp_path / "out2", plan_shards(SPECS)) as writer:
        writer.copy(list(TENSORS), MemoryReader(TENSORS))
    assert same(tmp_path / "out2")


def test_a_failure_publishes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError, match="boom"), CheckpointWriter(out, plan_shards(SPECS)):
        raise KeyError("boom")
    assert not list(tmp_path.iterdir())


def test_a_tensor_left_out_publishes_nothing(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", plan_shards(SPECS)).__enter__()
    writer.write("b", TENSORS["b"])
    writer.write_rows("a", 0, TENSORS["a"][:1])
    with pytest.raises(CheckpointError, match="not written") as error:
        writer.__exit__(None, None, None)
    assert error.value.problems == ("a: 18 bytes", "c: 4 bytes", "z: 9 bytes")
    assert not list(tmp_path.iterdir())


def test_other_shapes_than_planned(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS)) as writer:
        for wrong in (TENSORS["a"].float(), TENSORS["a"][:2]):
            with pytest.raises(CheckpointError, match="planned"):
                writer.write("a", wrong)
        with pytest.raises(CheckpointError, match="planned"):
            writer.write_rows("a", 2, TENSORS["a"])
        writer.copy(list(TENSORS), MemoryReader(TENSORS))


def test_an_older_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").touch()
    with CheckpointWriter(tmp_path / "out", plan_shards(SPECS)) as writer:
        writer.copy(list(TENSORS), MemoryReader(TENSORS))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_no_room(tmp_path: Path) -> None:
    plans = plan_shards([TensorSpec("huge", "F32", (1 << 50,))])
    with pytest.raises(DiskError, match="free space"), CheckpointWriter(tmp_path / "out", plans):
        pass
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from loader.weights.publishing import PartialFolder\n"
        "PartialFolder(pathlib.Path(sys.argv[1])).__enter__()\n"
        "print('in', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with CheckpointWriter(tmp_path / "out", plan_shards([])):
            assert len(list(tmp_path.glob(".out.*.partial"))) == 2
        process.send_signal(signal.SIGKILL)
    assert list(tmp_path.glob(".out.*.partial"))
    with CheckpointWriter(tmp_path / "out", plan_shards([])):
        assert len(list(tmp_path.glob(".out.*.partial"))) == 1


def test_pickles_are_refused_then_restricted(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_model.bin"
    torch.save({"t": torch.ones(1).expand(2)}, path)
    with pytest.raises(FormatError, match="pickle where safetensors"):
        open_weights(tmp_path)
    assert open_weights(tmp_path, allow_pickle=True).read("t").tolist() == [1, 1]


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, ("pwned",))


@pytest.mark.parametrize(
    "content",
    [{"t": Evil()}, {"t": 1}, [torch.ones(1)], {"t": torch.ones(1).expand(1 << 20, 1 << 20)}],
)
def test_pickles_of_anything_else(
    tmp_path: Path, content: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(FormatError, match="pickle"):
        open_weights(tmp_path, allow_pickle=True)
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_named_safetensors(tmp_path: Path) -> None:
    torch.save({"t": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(FormatError):
        open_weights(tmp_path, allow_pickle=True)


def test_shards_missing_and_twice(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no weights"):
        open_weights(tmp_path)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    save_file({"a": torch.ones(1)}, tmp_path / names["a"])
    with pytest.raises(FormatError, match="not there") as error:
        open_weights(tmp_path)
    assert error.value.problems == (names["b"],)
    save_file({"a": torch.ones(1)}, tmp_path / names["b"])
    with pytest.raises(FormatError, match="twice"):
        open_weights(tmp_path)


def test_what_is_written_can_be_followed(tmp_path: Path) -> None:
    """By any number of threads, over the folder's renames, from the first tensor on."""
    plans = plan_shards(SPECS, max_shard_bytes=40)
    with CheckpointWriter(tmp_path / "out", plans) as writer:
        (writer.path / "config.json").write_text("{}")
        filling = writer.fill()
        assert set(filling.small_files) == {"config.json", "model.safetensors.index.json"}
        assert filling.heads[plans[0].file_name].size_bytes == plans[0].size_bytes
        early = filling.follow()
        assert list(next(early)) == ["empty"]
        writer.write_rows("a", 0, TENSORS["a"][:2])
        writer.write("b", TENSORS["b"])
        assert list(next(early)) == ["b"]
        writer.write_rows("a", 2, TENSORS["a"][2:])
        for name in ("c", "empty", "z"):
            writer.write(name, TENSORS[name])
    assert [name for names in early for name in names] == ["a", "c", "z"]
    (tmp_path / "out").rename(tmp_path / "renamed")
    assert sorted(name for names in filling.follow() for name in names) == sorted(TENSORS)
    for plan in plans:
        descriptor = filling.open(plan.file_name)
        with os.fdopen(descriptor, "rb") as file:
            assert file.read() == (tmp_path / "renamed" / plan.file_name).read_bytes()


def test_who_follows_hears_why_the_writing_ended(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", plan_shards(SPECS)).__enter__()
    followed = writer.fill().follow()
    with pytest.raises(CheckpointError):
        writer.__exit__(None, None, None)
    with pytest.raises(CheckpointError, match="not written"):
        list(followed)
