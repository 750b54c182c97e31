"""Manifests of sums: their forms, and which files they are about."""

from __future__ import annotations

import hashlib

import pytest

from loader.errors import FormatError, ResolveError
from loader.resolve.sum_files import declare, find_sum_files, parse_sums, write_sums
from loader.types import Artifact, Checksum

ONE, TWO = hashlib.sha256(b"1"), hashlib.sha256(b"2")
A = Checksum("sha256", ONE.digest())
CRC = Checksum("crc64nvme", bytes(range(8)))


def artifact(name: str, rank: int = 0) -> Artifact:
    return Artifact("job1", rank, name, f"http://h/{name}")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f"{ONE.hexdigest()}  a", "a"),
        (f"{ONE.hexdigest()} *a", "a"),
        (f"{ONE.hexdigest().upper()}  a b ", "a b "),
        (f"{ONE.hexdigest()}  ./x/../a\r", "a"),
        (f"\\{ONE.hexdigest()}  a\\\\b\\nc", "a\\b\nc"),
        (f"SHA256 (a (1)) = {ONE.hexdigest()}", "a (1)"),
        (f"# a comment\n\n{ONE.hexdigest()}  é", "é"),
    ],
)
def test_forms(line: str, name: str) -> None:
    assert parse_sums(f"{line}\n".encode(), "m") == {name: (A,)}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no sum", "line 1"),
        (f"# x\n{ONE.hexdigest()[:-2]}  a", "line 2"),
        (f"{ONE.hexdigest()}  a\n{TWO.hexdigest()}  ./a", "another sha256"),
        ("\n".join(["x"] * 99), "…"),
    ],
)
def test_what_is_none(text: str, said: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_sums(text.encode(), "m")
    assert said in str(caught.value)
    assert len(caught.value.problems) < 12


def test_what_is_written_is_read() -> None:
    sums = dict.fromkeys(
        ("a", "b/c d", "e\\f\ng", "é", b"\xff".decode(errors="surrogateescape")), (CRC, A)
    )
    text = write_sums(sums)
    assert parse_sums(text, "m") == sums
    assert parse_sums(b"\n".join(text.split(b"\n")[::2]), "m")


def test_they_are_about_the_files_below_them() -> None:
    files = [artifact("ck/a/w.bin"), artifact("ck/b.bin"), artifact("ck/a/w.bin", 1)]
    listed = [
        artifact("ck/SHA256SUMS"),
        artifact("ck/a/podloader.sums"),
        artifact("SHA256SUMS"),
        artifact("other/SHA256SUMS"),
        artifact("ck/SHA256SUMS.bin"),
        artifact("ck/SHA256SUMS", 2),
    ]
    found = find_sum_files([*files, *listed], files)
    assert found == tuple(listed[:3])
    manifests: dict[str, dict[str, tuple[Checksum, ...]]] = {
        "job1/rank-0/ck/SHA256SUMS": {"a/w.bin": (A,), "../x": (A,), "/b.bin": (A,)}
    }
    declared = declare(files, manifests)
    assert [a.checksums for a in declared] == [(A,), (), ()]
    assert list(declared) == files  # what is declared of it makes no other file of it
    same: dict[str, dict[str, tuple[Checksum, ...]]] = {
        "job1/rank-0/ck/a/podloader.sums": {"w.bin": (CRC, A)}
    }
    assert declare(files, manifests | same)[0].checksums == (A, CRC)
    other: dict[str, dict[str, tuple[Checksum, ...]]] = {
        "job1/rank-0/SHA256SUMS": {"ck/a/w.bin": (Checksum("sha256", TWO.digest()),)}
    }
    with pytest.raises(ResolveError, match="different sums") as caught:
        declare(files, manifests | other)
    assert "ck/a/w.bin" in caught.value.problems[0]
