"""Peers that Ray names: each listens at its node's address, and dead nodes are left out."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from loader.errors import ConfigError
from loader.peers.members import parse_peers
from loader.ray_cluster import Node
from loader.types import Artifact
from tests.origin import FaultyOrigin
from tests.peers.conftest import CONTENT, MakePod, free_ports, sent_copies

# As in test_sharing.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

HOSTS = ("127.0.0.2", "127.0.0.3")


def test_nodes_with_one_port_share(
    make_pod: MakePod,
    origin: FaultyOrigin,
    weights: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [Node(host, host, host) for host in (*HOSTS, "127.0.0.9")]
    monkeypatch.setattr("loader.peers.members.living_nodes", lambda: tuple(nodes))
    monkeypatch.setattr("loader.peers.sharing.join_cluster", lambda: None)
    (port,) = free_ports(1)
    pods = []
    for host in HOSTS:
        monkeypatch.setattr("loader.peers.sharing.own_address", lambda host=host: host)
        pods.append(make_pod(port, [], peers=("ray",)))
        pods[-1].root /= host
    expected = {f"{host}:{port}" for host in HOSTS}
    until = time.monotonic() + 60
    while any(set(pod.sharing._members.living()) != expected for pod in pods):
        assert time.monotonic() < until
        time.sleep(0.01)
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda pod: pod.fetch(weights), pods):
            assert found == CONTENT
    assert sent_copies(origin) < 1.05


def test_a_cluster_that_does_not_answer_leaves_the_origin(
    make_pod: MakePod, weights: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> tuple[Node, ...]:
        raise RuntimeError("the head is gone")

    monkeypatch.setattr("loader.peers.members.living_nodes", fail)
    monkeypatch.setattr("loader.peers.sharing.join_cluster", lambda: None)
    monkeypatch.setattr("loader.peers.sharing.own_address", lambda: "127.0.0.1")
    (port,) = free_ports(1)
    assert make_pod(port, [], peers=("ray",)).fetch(weights) == CONTENT


def test_ray_stands_alone() -> None:
    assert parse_peers(["ray"], 7) == ("ray", ())
    assert parse_peers(["ray:1"], 7) == (None, ("ray:1",))
    with pytest.raises(ConfigError):
        parse_peers(["ray", "dns://"], 7)
