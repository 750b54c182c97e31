"""Every base with every adapter in every way: each ends in the right model, and fetches it once.

What is asked of each cell: its model is that of a plain merge of local folders, tensor by tensor,
and the bytes that leave the origins are at most 1.05 times those that the model needs.
"""

from __future__ import annotations

import itertools
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loader import boot
from loader.adapters.merge import WeightedAdapter, merge
from loader.arriving.origin_files import RemoteFile
from loader.config.settings import Settings
from loader.errors import FetchError
from loader.fetch.progress import LogProgress
from loader.prepare.engine_start import Base, ServedWeights, why_files
from loader.types import ReadyModel
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving, write_listing
from tests.prepare.test_adapted import fp8
from tests.stores.hub import Hub
from tests.weights.formats.test_bounds import save_alone, write_zero

BASES: tuple[Base, ...] = ("local", "hub", "url", "checkpoint")
ADAPTERS = ("none", "peft", "dcp", "zero")
MODES = ("full", "attach", "merge", "dequantise")
STATES = ("cold", "half fetched", "all here")
# What there is no such thing as, by adapter and mode.
IMPOSSIBLE = {
    **{("none", mode): "nothing to attach or to merge" for mode in MODES[1:]},
    **{(adapter, "full"): "an adapter is attached or merged" for adapter in ADAPTERS[1:]},
}
FOLLOWED = "while they arrive"
BLOCK_BYTES = 8192  # what small reads at the origin are rounded up to, here
SMALL_READS_BYTES = 64 << 10  # of headers and directories, which a tiny model is not large beside
SMALL = (".json", ".jinja", ".md", ".txt", ".metadata")
UNFINISHED_BYTES = 8 * (64 << 10)  # ranges under way when a run ends; each is asked for anew
WHERE = {"full": "plain", "attach": "plain", "merge": "plain", "dequantise": "fp8"}


@dataclass(frozen=True)
class World:
    """Models on this disk, behind an origin and on a Hub."""

    root: Path
    origin: FaultyOrigin
    hub: Hub

    def expected(self, mode: str) -> dict[str, torch.Tensor]:
        """Return the tensors of a plain merge, or of the base."""
        return tensors_of(self.root / (mode if mode in ("merge", "dequantise") else "plain"))

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        """The tensors of the adapter."""
        found: dict[str, torch.Tensor] = load_file(self.root / "peft/adapter_model.safetensors")
        return found


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("matrix")
    plain = tiny_llama(root / "plain", dtype=torch.bfloat16, max_shard_size="300KB")
    one = tiny_llama(root / "one", dtype=torch.bfloat16)
    quantised = fp8(one, root / "fp8")
    peft = train_or_draw_lora(plain, root / "peft", dtype=torch.bfloat16)
    merge(plain, [WeightedAdapter(peft)], root / "merge")
    merge(quantised, [WeightedAdapter(peft)], root / "dequantise", dequantise=True)
    hub = Hub(plain)
    with serving(root / "origin") as origin:
        for base in (plain, quantised):
            place = shutil.copytree(base, origin.folder("basejob") / base.name)
            (place / "optimizer.pt").write_bytes(bytes(1 << 20))
        put_adapters(root, origin.folder("job1"))
        for job in ("job1", "basejob"):
            write_listing(origin, root / f"{job}.json", job)
        yield World(root, origin, hub)
    hub.shutdown()
    hub.server_close()


def put_adapters(root: Path, job: Path) -> None:
    """Save the adapter in every form, and the base as a model without a tokenizer."""
    shutil.copytree(root / "peft", job / "peft")
    saved = load_file(root / "peft/adapter_model.safetensors")
    trained = {n.replace(".weight", ".default.weight"): tensor for n, tensor in saved.items()}
    optimizer = {name: {"exp_avg": torch.ones(1 << 19)} for name in list(trained)[:2]}
    save_alone({"model": trained, "optimizer": optimizer}, job / "dcp")
    write_zero(job / "zero/global_step1", trained, moments=True)
    (job / "zero/latest").write_text("global_step1")
    for form in ("dcp", "zero"):
        shutil.copy(root / "peft/adapter_config.json", job / form)
    none = Path(shutil.copytree(root / "plain", job / "none"))
    for path in none.glob("*token*"):
        path.unlink()
    (none / "optimizer.pt").write_bytes(bytes(1 << 20))


@pytest.fixture
def sent(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Count the bytes that come from folders behind URLs; let the Hub be ours."""
    from huggingface_hub import constants

    from loader.stores.fs import FsspecStream

    counted: list[int] = []
    readinto = FsspecStream.readinto

    def count(stream: FsspecStream, buffer: memoryview, /) -> int:
        counted.append(readinto(stream, buffer))
        return counted[-1]

    monkeypatch.setattr(FsspecStream, "readinto", count)

    def open_remote(*given: Any, **named: Any) -> RemoteFile:
        return RemoteFile(*given, **named | {"block_bytes": BLOCK_BYTES})

    monkeypatch.setattr("loader.arriving.origin_files.BLOCK_BYTES", BLOCK_BYTES)
    for room in ("loader.arriving.delivery", "loader.prepare.bases"):
        monkeypatch.setattr(f"{room}.RemoteFile", open_remote)
    template = world.hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", world.hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return counted


@dataclass(frozen=True)
class Cell:
    """One combination; *only*: ``weights_only_fetch``."""

    base: Base
    adapter: str
    mode: str
    only: bool
    state: str

    @property
    def id(self) -> str:
        """How the test is called."""
        only = "weights-only" if self.only else "all"
        return "-".join((self.base, self.adapter, self.mode, only, self.state.replace(" ", "-")))

    def settings(self, world: World, folder: Path) -> Settings:
        """Return what asks for it."""
        where = WHERE[self.mode]
        named = {
            "local": str(world.root / where),
            "hub": "org/base",
            "url": f"file://{world.root / where}",
            "checkpoint": f"checkpoint:basejob/rank-0/{where}/",
        }
        own: dict[str, Any] = {
            "base_model": named[self.base],
            "allow_local_urls": True,
            "range_size": "64KiB",
            "concurrency": 2,
            "weights_only_fetch": self.only,
            "engine_start": "auto",
            "adapter_policy": "attach" if self.mode == "attach" else "merge",
            "dequantise": self.mode == "dequantise",
            "artifacts": [str(world.root / f"{job}.json") for job in ("job1", "basejob")],
        }
        alone = self.base == "checkpoint" and self.adapter == "none"
        job, place = ("basejob", where) if alone else ("job1", self.adapter)
        references = [{"training_job_id": job, "paths": [f"rank-0/{place}/"]}]
        checkpoints = {"download_folder": str(folder), "artifact_references": references}
        return Settings.load(
            {"training_checkpoints": checkpoints, "model_metadata": {"podloader": own}}
        )

    @property
    def weights_from(self) -> str:
        """What a plan says of it."""
        weights = ServedWeights(
            "as it is" if self.mode == "full" else "attach" if self.mode == "attach" else "merge",
            "" if self.mode == "full" else self.base,
            is_here=self.state == "all here",
        )
        why = why_files(weights)
        return f"files: {why}" if why else FOLLOWED

    def needed_bytes(self, world: World) -> int:
        """Return the bytes that it needs from the origins."""
        base = size_of(world.root / WHERE[self.mode])
        optimizer = 0 if self.only else 1 << 20
        if self.adapter == "none":
            tokenizer = size_of(world.root / "plain", "*token*")
            own = size_of(world.origin.folder("job1") / "none") - (1 << 20)
            small = 0 if self.base in ("local", "checkpoint") else tokenizer + 2048
            return (base if self.base == "checkpoint" else own + small) + optimizer
        adapter = size_of(world.origin.folder("job1") / self.adapter)
        if self.only and self.adapter == "dcp":
            adapter = needed_of_dcp(world.origin.folder("job1") / "dcp")
        if self.only and self.adapter == "zero":
            adapter = size_of(world.root / "peft") * 2
        if self.base == "local":
            return adapter
        return adapter + base + (optimizer if self.base == "checkpoint" else 0)


def needed_of_dcp(folder: Path) -> int:
    """Return the bytes of the model's chunks and of the small files."""
    small = size_of(folder) - sum(path.stat().st_size for path in folder.glob("*.distcp"))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    chunks = metadata.storage_data.items()
    return small + sum(int(i.length) for index, i in chunks if index.fqn.startswith("model."))


def all_cells() -> Iterator[Any]:
    """Yield every cell; of each base, adapter and mode one in turn is always run."""
    turn = 0
    for base, adapter, mode in itertools.product(BASES, ADAPTERS, MODES):
        if (adapter, mode) in IMPOSSIBLE:
            continue
        for number, (only, state) in enumerate(itertools.product((True, False), STATES)):
            cell = Cell(base, adapter, mode, only, state)
            marks = () if number == turn % 6 else (pytest.mark.slow,)
            yield pytest.param(cell, id=cell.id, marks=marks)
        turn += 1


class Interruption(LogProgress):
    """Ends a run when bytes of its weights come, and small files are here."""

    def advance(self, count_bytes: int, path: str) -> None:
        """Look whose they are."""
        if not path.endswith(SMALL):
            raise FetchError("interrupted", where=path)


@pytest.mark.parametrize("cell", [*all_cells()])
def test_every_combination(cell: Cell, world: World, sent: list[int], tmp_path: Path) -> None:
    world.hub.folder = world.root / WHERE[cell.mode]
    settings = cell.settings(world, tmp_path / "down")
    slack = SMALL_READS_BYTES
    if cell.state == "half fetched":
        slack = 2 * slack + UNFINISHED_BYTES
        with pytest.raises(FetchError, match="interrupted"):
            boot.prepare(settings, Interruption())
    elif cell.state == "all here":
        boot.prepare(settings)
    forecast = boot.look_ahead(settings).weights_from
    sent.clear()
    before = world.origin.bytes_sent + world.hub.bytes_sent
    announced: list[ReadyModel] = []
    ready = boot.prepare(settings, announce=lambda filling, ready: announced.append(ready))
    check_model(cell, world, ready)
    assert forecast == cell.weights_from
    assert [forecast == FOLLOWED] == [bool(announced)]
    got = world.origin.bytes_sent + world.hub.bytes_sent - before + sum(sent)
    needed = 0 if cell.state == "all here" else cell.needed_bytes(world)
    assert got <= 1.05 * needed + slack, f"{got} bytes came, where {needed} are needed"


def check_model(cell: Cell, world: World, ready: ReadyModel) -> None:
    """Check that *ready* is what a plain merge makes."""
    found, wanted = tensors_of(ready.path), world.expected(cell.mode)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(tensor) for name, tensor in wanted.items())
    assert (ready.tokenizer / "tokenizer.json").is_file()
    assert len(ready.adapters) == (cell.mode == "attach")
    for adapter in ready.adapters:
        own = load_file(adapter.path / "adapter_model.safetensors")
        assert own.keys() == world.adapter.keys()
        assert all(own[name].equal(tensor) for name, tensor in world.adapter.items())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}


def size_of(folder: Path, pattern: str = "**/*") -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern) if path.is_file())
