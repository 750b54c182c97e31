"""Pods in one process: each with a port, a folder and a store of its own."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from loader.config.credentials import Secret
from loader.config.settings import Settings
from loader.fetch.snapshot import FetchOptions, fetch
from loader.http.client import HttpClient, HttpOptions
from loader.peers.chunks import CHUNK_BYTES
from loader.peers.sharing import Sharing
from loader.peers.store import PeerStore
from loader.stores.presigned import PresignedStore
from loader.types import Artifact, Manifest, TrainingCheckpoints
from tests.origin import FaultyOrigin

TOKEN = "held by all"
CONTENT = random.Random(7).randbytes(5 * CHUNK_BYTES + 12345)


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(found.getsockname()[1]) for found in sockets]
    for found in sockets:
        found.close()
    return ports


@dataclass
class TestPod:
    """One pod."""

    __test__ = False
    sharing: Sharing
    root: Path
    store: PresignedStore

    def fetch(self, artifact: Artifact) -> bytes:
        """Return the artifact's bytes, fetched into the pod's own folder."""
        options = self.sharing.adapt(FetchOptions(concurrency=4))
        front = PeerStore(self.sharing, self.store, self.root)
        fetch(Manifest((artifact,)), self.root, front, options)
        return (self.root / artifact.path).read_bytes()


MakePod = Callable[..., TestPod]


@pytest.fixture
def make_pod(tmp_path: Path) -> Iterator[MakePod]:
    """What makes a pod on a port that knows *ports*; all are closed in the end."""
    with ExitStack() as stack:

        def make(port: int, ports: list[int], *, token: str = TOKEN, **own: object) -> TestPod:
            settings = Settings(
                training=TrainingCheckpoints(tmp_path / "unused", ()),
                peers_port=port,
                concurrency=4,
                **{"peers": tuple(f"127.0.0.1:{other}" for other in ports), **own},  # type: ignore[arg-type]
            )
            client = HttpClient(HttpOptions())
            sharing = Sharing(settings, Secret(token))
            stack.callback(client.close)
            stack.callback(sharing.close)
            return TestPod(sharing, tmp_path / f"pod-{port}", PresignedStore(client))

        yield make


@pytest.fixture
def weights(origin: FaultyOrigin) -> Artifact:
    """An object of several chunks."""
    path = origin.put("model/weights.bin", CONTENT)
    url = origin.sign(path.relative_to(origin.root).as_posix())
    return Artifact("job1", 0, "model/weights.bin", url, len(CONTENT))


def sent_copies(origin: FaultyOrigin) -> float:
    """Return how much the origin has sent, in copies of the object."""
    return origin.bytes_sent / len(CONTENT)
