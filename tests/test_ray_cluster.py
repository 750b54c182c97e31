"""A cluster that is not there, or no address, is one error at once."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from loader.errors import ConfigError
from loader.ray_cluster import connected, import_ray, living_nodes
from tests.peers.conftest import free_ports


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="cannot be imported") as error:
        import_ray()
    assert "podloader[ray]" in error.value.next_step


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Ray that must not be asked to connect."""
    ray = SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setattr("loader.ray_cluster.import_ray", lambda: ray)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("address", ["", "head", "head:x", ":6379", "ray://head:10001"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="not the address"), connected(address):
        pass


@pytest.mark.usefixtures("no_ray")
def test_a_head_that_does_not_listen_is_told_before_ray_asks_for_minutes() -> None:
    (port,) = free_ports(1)
    with pytest.raises(ConfigError) as error, connected(f"127.0.0.1:{port}"):
        pass
    assert error.value.where == f"--ray 127.0.0.1:{port}"
    assert "refused" in error.value.got


def test_nodes_of_one_address_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(address: str, id_: str, *, alive: bool = True) -> dict[str, object]:
        return {"NodeManagerAddress": address, "NodeID": id_, "Alive": alive}

    found = [node("b", "1" * 56), node("a", "2" * 56), node("b", "3" * 56)]
    found.append(node("c", "4" * 56, alive=False))
    ray = SimpleNamespace(nodes=lambda: found)
    monkeypatch.setattr("loader.ray_cluster.import_ray", lambda: ray)
    assert [one.name for one in living_nodes()] == ["a", "b (11111111)", "b (33333333)"]
