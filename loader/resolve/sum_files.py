"""Manifests of sums beside a checkpoint: ``podloader.sums``, ours, and ``SHA256SUMS``. Pure.

::

    # CRC64NVME 0123456789abcdef  model.safetensors      a comment to sha256sum
    <64 hex digits>  model.safetensors                   or with " *" before the name

``sha256sum -c`` reads both. Names are relative to the manifest's folder; a line that begins with
a backslash has them with ``\\\\`` and ``\\n``. BSD's ``SHA256 (name) = <hex>`` is read as well.
Source: GNU coreutils, "cksum output modes" and "md5sum invocation".
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from loader.errors import FormatError, ResolveError
from loader.types import Algorithm, Artifact, Checksum

OURS = "podloader.sums"
SUM_FILES = (OURS, "SHA256SUMS")
_SHOWN = 10
_OF_SHA256 = re.compile(r"(?P<escaped>\\?)(?P<sha256>[0-9A-Fa-f]{64}) [ *](?P<name>.+)")
_OF_BSD = re.compile(r"(?P<escaped>\\?)SHA256 \((?P<name>.+)\) = (?P<sha256>[0-9A-Fa-f]{64})")
_OF_CRC = re.compile(r"# CRC64NVME (?P<escaped>\\?)(?P<crc64nvme>[0-9a-f]{16})  (?P<name>.+)")
_PLAIN = re.compile(r"\\(.)", re.DOTALL)

Sums = Mapping[str, tuple[Checksum, ...]]  # by the file's name, relative to the manifest


def parse_sums(text: bytes, where: str) -> Sums:
    """Return what the manifest at *where* declares of each file.

    Raises:
        FormatError: lines that are none of a manifest, or two sums of one file.
    """
    found: dict[str, dict[str, Checksum]] = {}
    problems = []
    for number, line in enumerate(text.decode("utf-8", "surrogateescape").split("\n"), 1):
        line = line.removesuffix("\r")
        match = _OF_CRC.fullmatch(line) or _OF_SHA256.fullmatch(line) or _OF_BSD.fullmatch(line)
        if match is None:
            if line.strip() and not line.startswith("#"):
                problems.append(f"line {number}: no sum and no comment")
            continue
        name = match["name"]
        if match["escaped"]:
            name = _PLAIN.sub(lambda pair: "\n" if pair[1] == "n" else pair[1], name)
        algorithm: Algorithm = "crc64nvme" if match.re is _OF_CRC else "sha256"
        checksum = Checksum(algorithm, bytes.fromhex(match[algorithm]), said_by=where)
        sums = found.setdefault(posixpath.normpath(name), {})
        if sums.setdefault(algorithm, checksum) != checksum:
            problems.append(f"line {number}: another {algorithm} of the same file")
    if problems:
        raise FormatError(
            "a manifest of sums that cannot be read",
            where=where,
            problems=[*problems[:_SHOWN], *(["…"] if len(problems) > _SHOWN else [])],
            next_step="write it anew with `podloader sums`, or take it away",
        )
    return {name: tuple(sums.values()) for name, sums in found.items()}


def write_sums(sums: Sums) -> bytes:
    """Return the manifest of *sums*."""
    lines = ["# sha256sum -c reads this file, too"]
    for name, checksums in sorted(sums.items()):
        plain = name.replace("\\", "\\\\").replace("\n", "\\n")
        escape = "\\" if plain != name else ""
        for checksum in checksums:
            digest = f"{escape}{checksum.digest.hex()}  {plain}"
            lines.append(digest if checksum.algorithm == "sha256" else f"# CRC64NVME {digest}")
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def find_sum_files(listed: Iterable[Artifact], files: Sequence[Artifact]) -> tuple[Artifact, ...]:
    """Return those of the *listed* artifacts that are manifests of a folder that *files* lie in."""
    holding = {artifact.path.rpartition("/")[0] for artifact in files}
    folders = {above for folder in holding for above in _folders(folder)}
    return tuple(
        artifact
        for artifact in listed
        if artifact.relative_file_name.rpartition("/")[2] in SUM_FILES
        and artifact.path.rpartition("/")[0] in folders
    )


def declare(files: Sequence[Artifact], manifests: Mapping[str, Sums]) -> tuple[Artifact, ...]:
    """Return *files* with what the *manifests*, by their paths, declare of them.

    Raises:
        ResolveError: two manifests declare different sums of one file.
    """
    told: dict[str, dict[str, Checksum]] = {}
    problems = []
    for manifest, sums in manifests.items():
        folder = manifest.rpartition("/")[0]
        for name, checksums in sums.items():
            path = f"{folder}/{name}"
            for checksum in checksums:
                known = told.setdefault(path, {}).setdefault(checksum.algorithm, checksum)
                if known != checksum:
                    problems.append(f"{path}: {known.said_by} and {checksum.said_by}")
    if problems:
        raise ResolveError(
            "manifests that declare different sums of one file",
            problems=problems,
            next_step="take the older one away",
        )
    return tuple(
        replace(artifact, checksums=tuple(told[artifact.path].values()))
        if artifact.path in told
        else artifact
        for artifact in files
    )


def _folders(folder: str) -> Iterable[str]:
    """``<job>/rank-<N>`` and all below it that *folder* lies in, itself too."""
    parts = folder.split("/")
    return ("/".join(parts[:depth]) for depth in range(2, len(parts) + 1))
