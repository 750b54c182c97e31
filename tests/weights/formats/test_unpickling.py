"""Pickles of strangers: descriptions and plain containers come out, whatever they say."""

from __future__ import annotations

import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from loader.errors import FormatError, LoaderError, UnsupportedError
from loader.weights.byte_files import LocalFile
from loader.weights.formats import unpickling
from loader.weights.formats.allowed import ALLOWED
from loader.weights.formats.archive import Archive
from loader.weights.formats.records import TensorRef
from loader.weights.formats.unpickling import unpickle


class Attack:
    """Pickles as a call of *function*."""

    def __init__(self, function: Any, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", range(2, 6))
def test_plain_things(protocol: int) -> None:
    value = {"a": [1, 2.5, None, True, -(1 << 70)], "b": ({"x"}, b"raw", "text"), "c": {}}
    assert unpickle(pickle.dumps(value, protocol), "here") == value
    ordered: Any = OrderedDict(a=1)
    assert unpickle(pickle.dumps(ordered, protocol), "here") == {"a": 1}


@pytest.mark.parametrize(
    "attack",
    [
        Attack(os.system, "touch pwned"),
        Attack(eval, "1+1"),
        Attack(getattr, [], "append"),
        Attack(__import__, "os"),
        Attack(torch.load, "x"),
        Attack(pickle.loads, b"N."),
        Attack(open, "/etc/passwd"),
        {"deep": [({"deeper": Attack(exec, "pass")},)]},
    ],
)
def test_a_call_of_anything_else_is_refused(
    attack: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in (0, 1):  # with opcodes that no framework writes
        with pytest.raises((UnsupportedError, FormatError)):
            unpickle(pickle.dumps(attack, protocol), "here")
    for protocol in range(2, 6):
        with pytest.raises(UnsupportedError, match="something else than tensors"):
            unpickle(pickle.dumps(attack, protocol), "here")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"N",
        b".",
        b"NN.",
        b"(.",
        b"\x80\x09N.",  # a protocol of the future
        b"Ptext\n.",  # a persistent id as text
        b"\x82\x01.",  # the extension registry
        b"cos\nsystem\n(S'id'\ntR.",
        b"(S'id'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'id'\no.",  # OBJ
        b"X" + struct.pack("<I", 1 << 31) + b"short.",
        b"\x8e" + struct.pack("<Q", 1 << 62) + b".",
        b"\x8a\xff.",
        b"h\x05.",  # a memo that is not there
        b"]N\x85b.",  # state for a list
        b"N]s.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNt R.",
        b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\ntR.",
        b"c__main__\n\xff\xfe\n.",
        b"0.",
        b"a.",
    ],
)
def test_malformed_pickles_are_errors_of_our_own(data: bytes) -> None:
    with pytest.raises(LoaderError):
        unpickle(data, "here")


DEEP = 1 << 17
LAUGHS = b"]r\x00\x00\x00\x00" + b"".join(
    b"(" + b"j" + struct.pack("<I", n) + b"j" + struct.pack("<I", n) + b"l" + b"r"
    + struct.pack("<I", n + 1) for n in range(64)
)  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b")" + b"\x85" * DEEP + b".",  # tuples in tuples
        b"\x8f(" + b")" + b"\x85" * DEEP + b"\x90.",  # as a set's member, which is hashed
        b"(" + b")" + b"\x85" * DEEP + b"\x91.",
        b"})" + b"\x85" * DEEP + b"Ns.",  # as a key
        b"]" * DEEP + b"a" * (DEEP - 1) + b".",
        b"}" + b"Nq\x00" * 1 + b"0" + b"}" * 0 + b"(K\x00" + b"]" * 300 + b"a" * 299 + b"u.",
        b"(" * DEEP + b".",
        b"(" * DEEP + b"t" * DEEP + b".",
        LAUGHS + b".",
        b"}(" + b"K\x01" + LAUGHS + b"u.",
        b"}" + b")" + b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(60))
        + b"Ns.",  # a key that doubles sixty times
        b"]q\x00h\x00a.",  # in itself
        b"}q\x00K\x01h\x00s.",
        b"ctorch\nSize\n(" + b"K\x01" * 9 + b"tq\x00" + b"\x85R.",
    ],
)  # fmt: skip
def test_what_nests_or_repeats_without_end(data: bytes) -> None:
    """Hashing, printing or walking it would end this process, or never end."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        value = unpickle(data, "here")
    except FormatError:
        value = (1,) * 9
    assert value == (1,) * 9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_what_is_pushed_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "_MOST_VALUES", 1000)
    assert unpickle(b"(" + b"N" * 900 + b"l.", "here") == [None] * 900
    with pytest.raises(FormatError, match="cannot be read") as caught:
        unpickle(b"(" + b"N" * 1001 + b"l.", "here")
    assert "more than 1000 values" in caught.value.got


def test_copies_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpickling, "_MOST_VALUES", 100_000)
    big = b"(" + b"K\x01" * 1000 + b"lq\x00"
    again = b"ccollections\nOrderedDict\n0" + b"cbuiltins\nset\nh\x00\x85R" * 1000
    with pytest.raises(FormatError, match="cannot be read") as caught:
        unpickle(big + again + b"l.", "here")
    assert "more than 100000 values" in caught.value.got


def test_more_dimensions_than_a_tensor_has() -> None:
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\n"
    storage = b"X\x01\0\0\x000X\x03\0\0\0cpuJ\xff\xff\xff\x7ftQK\0"
    for count in (2, 240):
        shape = b"(" + b"J\xff\xff\xff\x7f" * count + b"t"
        data = head + storage + shape + shape + b"\x89NtR."
        if count == 2:
            assert isinstance(unpickle(data, "here"), TensorRef)
            continue
        with pytest.raises(FormatError, match="cannot be read"):
            unpickle(data, "here")


def test_entries_that_zipfile_does_not_read(tmp_path: Path) -> None:
    """Encrypted ones, by a method that is not known, with a directory that lies."""
    path = tmp_path / "x.pt"
    torch.save(torch.arange(6.0), path)
    content = path.read_bytes()
    for place, byte in ((8, 1), (10, 99), (42, 255), (44, 255), (46 + 7, 0xFF)):
        changed = bytearray(content)
        at = changed.index(b"PK\x01\x02")  # of the directory
        while at >= 0:
            changed[at + place] = byte
            at = changed.find(b"PK\x01\x02", at + 4)
        path.write_bytes(changed)
        with pytest.raises(FormatError, match="cannot be read"):
            Archive(LocalFile(path)).value  # noqa: B018


def test_every_cut_of_a_real_file_is_an_error_of_our_own(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(6).reshape(2, 3), "step": 7}, path)
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    whole = unpickle(data, "here")
    assert isinstance(whole, dict)
    assert isinstance(whole["w"], TensorRef)
    for end in range(len(data)):
        with pytest.raises(LoaderError):
            unpickle(data[:end], "here")
    content = path.read_bytes()
    for end in range(0, len(content), 7):
        path.write_bytes(content[:end])
        with pytest.raises(LoaderError):
            Archive(LocalFile(path))


def test_flipped_bytes_never_escape(tmp_path: Path) -> None:
    """Whatever one byte says, the answer is a value or an error of our own."""
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(6).reshape(2, 3), "n": [1, "two"]}, path)
    with zipfile.ZipFile(path) as archive:
        data = archive.read(next(n for n in archive.namelist() if n.endswith("data.pkl")))
    for place in range(len(data)):
        for byte in (0x00, 0x28, 0x52, 0x62, 0x71, 0xFF):
            try:
                unpickle(data[:place] + bytes([byte]) + data[place + 1 :], "here")
            except LoaderError:
                continue


def test_a_tensor_that_reaches_behind_its_storage(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.arange(6.0), path)
    archive = Archive(LocalFile(path))
    tensor = archive.value
    assert isinstance(tensor, TensorRef)
    for bad in (
        TensorRef(tensor.storage, "F32", 0, (7,), (1,)),
        TensorRef(tensor.storage, "F32", 5, (2,), (1,)),
        TensorRef(tensor.storage, "F32", 0, (2, 2), (1 << 60, 1)),
        TensorRef(tensor.storage, "F64", 0, (6,), (1,)),
    ):
        with pytest.raises(FormatError):
            archive.piece(bad)


def test_no_name_that_is_allowed_runs_anything() -> None:
    """The list is short enough to be read; what could act is not on it."""
    acting = ("os.", "posix.", "subprocess.", "sys.", "builtins.e", "builtins.g", "functools.")
    assert not [name for name in ALLOWED if name.startswith(acting)]
    plain = {"OrderedDict", "dict", "tuple", "set", "frozenset", "list", "encode"}
    owners = ("torch.", "deepspeed.", "pathlib.")
    assert {name.rpartition(".")[2] for name in ALLOWED if not name.startswith(owners)} == plain
    assert len(ALLOWED) < 120
