"""Archives of compiled kernels: whole, or nothing; never out of their folder."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loader.errors import FormatError
from loader.serve.vllm import kernel_archive
from loader.serve.vllm.kernel_archive import merge_into, pack, unpack

FACTS = {"vllm": "1", "gpus": [["H100", "9.0"]]}
_HEAD_BYTES = 4096


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    for name, content in {
        "vllm/torch_compile_cache/torch_aot_compile/ab/rank_0_0/model": os.urandom(70_000),
        "vllm/modelinfos/llama.json": b"{}",
        "triton/kernel.so": b"\x7fELF",
        "inductor/empty": b"",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "triton/kernel.so").chmod(0o755)
    return folder


@pytest.fixture
def archive(root: Path, tmp_path: Path) -> Path:
    file = tmp_path / "archive"
    pack(root, file, FACTS)
    return file


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    folder = tmp_path / "fresh"
    folder.mkdir()
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_all_of_it_comes_back(root: Path, archive: Path, fresh: Path) -> None:
    unpack(archive, fresh, FACTS)
    assert files(fresh) == files(root)
    assert os.access(fresh / "triton/kernel.so", os.X_OK)


def test_variables_and_links_stay_here(root: Path, tmp_path: Path, fresh: Path) -> None:
    (root / "vllm/cache_key_factors.json").write_text('{"env": {"VLLM_API_KEY": "secret"}}')
    (root / ".archive").write_text("x")
    (root / "vllm/link").symlink_to("/etc/passwd")
    (root / "vllm/folder").symlink_to("/etc")
    os.mkfifo(root / "vllm/pipe")
    assert pack(root, tmp_path / "archive", FACTS) == 4
    unpack(tmp_path / "archive", fresh, FACTS)
    assert len(files(fresh)) == 4


def test_a_broken_one_is_refused_wherever_it_breaks(archive: Path, fresh: Path) -> None:
    whole = archive.read_bytes()
    drawn = random.Random(0)
    cuts = [0, 1, 100, _HEAD_BYTES - 1, _HEAD_BYTES, len(whole) - 1]
    for cut in [*cuts, *(drawn.randrange(len(whole)) for _ in range(10))]:
        archive.write_bytes(whole[:cut])
        with pytest.raises(FormatError):
            unpack(archive, fresh, FACTS)
    for place in [0, 30, *(drawn.randrange(_HEAD_BYTES, len(whole)) for _ in range(20))]:
        archive.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(FormatError):
            unpack(archive, fresh, FACTS)
    archive.write_bytes(whole + b"x")
    with pytest.raises(FormatError):
        unpack(archive, fresh, FACTS)
    assert not files(fresh)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_file_is_not_waited_for(
    put: Callable[[Path], None], tmp_path: Path, fresh: Path
) -> None:
    put(tmp_path / "archive")
    with pytest.raises(FormatError, match="cannot be used"):
        unpack(tmp_path / "archive", fresh, FACTS)


def test_another_machines_is_refused(archive: Path, fresh: Path) -> None:
    with pytest.raises(FormatError, match="another machine"):
        unpack(archive, fresh, FACTS | {"vllm": "2"})


@pytest.mark.parametrize("head", [b"[]", b"{}", b"null", b"3", b"\xff", b"[" * 4000, b""])
def test_a_head_of_something_else(head: bytes, archive: Path, fresh: Path) -> None:
    archive.write_bytes(head.ljust(_HEAD_BYTES) + archive.read_bytes()[_HEAD_BYTES:])
    with pytest.raises(FormatError):
        unpack(archive, fresh, FACTS)


def craft(archive: Path, add: Callable[[tarfile.TarFile], None], **head: Any) -> None:
    """Write an archive with a right digest and whatever *add* puts into it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        add(tar)
    payload = gzip.compress(out.getvalue())
    told = {
        "podloader": "kernel cache",
        "version": 1,
        "facts": FACTS,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "size_bytes": len(payload),
        "unpacked_bytes": 1 << 20,
        "entries": 10,
    }
    archive.write_bytes(json.dumps(told | head).encode().ljust(_HEAD_BYTES) + payload)


def member(name: str, **fields: Any) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        for field, value in fields.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(b"x" * info.size))

    return add


@pytest.mark.parametrize(
    "add",
    [
        member("../outside", size=1),
        member("vllm/../../outside", size=1),
        member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("link", type=tarfile.SYMTYPE, linkname="inside"),
        member("link", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        member("device", type=tarfile.CHRTYPE),
        member("device", type=tarfile.BLKTYPE),
        member("pipe", type=tarfile.FIFOTYPE),
        member("large", size=(1 << 20) + 1),
    ],
)
def test_what_leads_out_or_is_no_file(
    add: Callable[[tarfile.TarFile], None], archive: Path, fresh: Path, tmp_path: Path
) -> None:
    craft(archive, add)
    with pytest.raises(FormatError):
        unpack(archive, fresh, FACTS)
    assert not (tmp_path / "outside").exists()
    assert not any(fresh.iterdir())


def test_an_absolute_name_stays_inside(archive: Path, fresh: Path, tmp_path: Path) -> None:
    craft(archive, member(str(tmp_path / "outside"), size=1))
    unpack(archive, fresh, FACTS)
    assert not (tmp_path / "outside").exists()


def test_more_than_was_announced(archive: Path, fresh: Path) -> None:
    craft(archive, member("one", size=20), unpacked_bytes=10)
    with pytest.raises(FormatError):
        unpack(archive, fresh, FACTS)
    craft(archive, member("one", size=20), entries=0)
    with pytest.raises(FormatError):
        unpack(archive, fresh, FACTS)
    for wrong in ({"unpacked_bytes": 5 << 30}, {"entries": 1 << 20}, {"entries": "1"}):
        craft(archive, member("one", size=20), **wrong)
        with pytest.raises(FormatError):
            unpack(archive, fresh, FACTS)


def test_nothing_too_large_is_packed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_archive, "MOST_BYTES", 1000)
    with pytest.raises(FormatError, match="too large"):
        pack(root, tmp_path / "large", FACTS)


def test_what_is_here_stays(root: Path, fresh: Path) -> None:
    (fresh / "vllm/modelinfos").mkdir(parents=True)
    (fresh / "vllm/modelinfos/llama.json").write_text("another")
    (fresh / "vllm/modelinfos/qwen.json").write_text("new")
    (fresh / "cuda").mkdir()
    before = files(root)
    merge_into(fresh, root)
    assert files(root) == before | {"vllm/modelinfos/qwen.json": b"new"}
    assert (root / "cuda").is_dir()
