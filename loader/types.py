"""The values that travel between the rooms: frozen, checked where they are built."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal

from loader.errors import redact_url

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # matched whole: it becomes a folder's name

Algorithm = Literal["crc64nvme", "crc32c", "crc32", "sha256", "sha1", "md5"]

# To processes of vLLM's, which have no command line of ours: the Truss config's name, and that
# weights may be followed as they arrive.
CONFIG_VARIABLE = "PODLOADER_CONFIG"
STREAM_VARIABLE = "PODLOADER_STREAM"


@dataclass(frozen=True, slots=True)
class ArtifactReference:
    """Patterns of one training job, from ``training_checkpoints.artifact_references``.

    ``loops``: it is a Loops checkpoint instead, from ``loops_checkpoint_ids``, and its id.
    """

    training_job_id: str
    paths: tuple[str, ...]
    loops: bool = False


@dataclass(frozen=True, slots=True)
class TrainingCheckpoints:
    """The ``training_checkpoints`` section of a Truss config."""

    download_folder: Path
    artifact_references: tuple[ArtifactReference, ...]


@dataclass(frozen=True, slots=True)
class Checksum:
    """What the origin says that the object's bytes sum up to, as big-endian bytes.

    ``parts`` is 0 where ``digest`` is of the bytes themselves. Else the object was uploaded in so
    many parts and ``digest`` is of the parts' digests, one behind the other; ``part_bytes`` is the
    size of every part but the last, where the origin tells it. ``guessed``: nobody declares it; it
    is taken from an ETag that has the form of an MD5. ``said_by`` is the file that declares it.
    """

    algorithm: Algorithm
    digest: bytes
    parts: int = 0
    part_bytes: int | None = None
    guessed: bool = field(default=False, compare=False)
    said_by: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file of a listing. ``size_bytes`` is None where the listing has none.

    ``name`` is ``rank-<node_rank>/<relative_file_name>``, ``path`` is ``<job>/<name>``.
    ``checksums`` are what a manifest of sums in the listing declares of its bytes.
    """

    job: str
    node_rank: int
    relative_file_name: str
    url: str = field(repr=False)
    size_bytes: int | None = None
    checksums: tuple[Checksum, ...] = field(default=(), repr=False, compare=False)

    # What patterns are matched against, and the place below the download folder. Listings are
    # long, so both are made once.
    name: str = field(init=False, repr=False, compare=False)
    path: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", f"rank-{self.node_rank}/{self.relative_file_name}")
        object.__setattr__(self, "path", f"{self.job}/{self.name}")

    @property
    def source(self) -> str:
        """The URL without its signature."""
        return redact_url(self.url)


@dataclass(frozen=True, slots=True)
class Listing:
    """All artifacts of one job. ``total_count`` is what the origin says there are, if it does.

    ``syncing``: the checkpoints that are still being copied, as folders' names.
    """

    job: str
    artifacts: tuple[Artifact, ...]
    total_count: int | None = None
    syncing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files to fetch, sorted by path, and what a person should know about the choice.

    ``left_out`` are files that the patterns ask for and serving will not use. ``presence``, which
    only a plan has: ``proved``, ``unproved`` or ``missing``, by path.
    """

    files: tuple[Artifact, ...]
    warnings: tuple[str, ...] = ()
    left_out: tuple[Artifact, ...] = ()
    presence: Mapping[str, str] = field(default_factory=dict, compare=False)


def total_bytes(artifacts: Sequence[Artifact]) -> int | None:
    """Return the sum of their sizes, None where one is not known."""
    return sum_or_unknown([artifact.size_bytes for artifact in artifacts])


def sum_or_unknown(sizes: Sequence[int | None]) -> int | None:
    """Return the sum of *sizes*, None where one is not known."""
    return None if None in sizes else sum(size for size in sizes if size)


@dataclass(frozen=True, slots=True)
class FetchedFile:
    """One file that is whole on disk; ``digest`` is ``crc64nvme:<base64>``, as S3 writes it.

    ``seconds`` is how long it took to bring it, 0 where it was here.
    """

    path: str
    job: str
    rank: int
    size_bytes: int
    digest: str
    source: str
    reused: bool
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete download."""

    root: Path
    files: tuple[FetchedFile, ...]
    seconds: float
    fetched_bytes: int


@dataclass(frozen=True, slots=True)
class Head:
    """The first bytes of a file, and how many it has in all."""

    content: bytes
    size_bytes: int


class Kind(StrEnum):
    """What a folder of files is."""

    FULL = "full"
    ADAPTER = "adapter"
    RANK_SHARDS = "rank-shards"
    DCP = "dcp"
    ZERO = "zero"
    DTENSOR = "dtensor"
    MEGATRON = "megatron"
    OPTIMIZER = "optimizer"
    WHISPER = "whisper"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One checkpoint folder and what it is."""

    kind: Kind
    path: Path
    detail: dict[str, object]


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    """An adapter that the engine serves by name."""

    name: str
    path: Path
    rank: int


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """What an engine needs: a Hugging Face folder and the adapters to attach."""

    path: Path
    adapters: tuple[ServedAdapter, ...]
    max_lora_rank: int | None
    tokenizer: Path
    provenance: dict[str, object]
