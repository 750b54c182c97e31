"""A Ray cluster: the connection of this process to it, and the nodes that are alive in it.

Ray watches the nodes and says who is there; no bytes of a model go through its object store.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loader.errors import ConfigError

AUTO = "auto"  # the cluster that this machine is a node of, or the one that RAY_ADDRESS names
_CONNECT_S = 5.0  # Ray itself asks a port that nobody listens on for minutes
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True, slots=True)
class Node:
    """One machine of the cluster; ``name`` is its address, with its id where that is not enough."""

    id: str
    address: str
    name: str


def import_ray() -> Any:
    """Return the package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "Ray is asked for and cannot be imported",
            got=str(error),
            next_step="pip install 'podloader[ray]', the cluster's own version of Ray",
        ) from None
    return ray


@contextlib.contextmanager
def connected(address: str = AUTO) -> Iterator[Any]:
    """Give Ray, connected to the cluster at *address*, in the block; or as it is, where it is so.

    Raises:
        ConfigError: no cluster is there, or one that this Ray does not fit.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    join_cluster(address)
    try:
        yield ray
    finally:
        ray.shutdown()


def join_cluster(address: str = AUTO) -> None:
    """Connect this process to a cluster, for as long as it lives, unless it is so already.

    Raises:
        ConfigError: no cluster is there, or one that this Ray does not fit.
    """
    ray = import_ray()
    if ray.is_initialized():
        return
    if address != AUTO:
        _check_address(address)
    try:
        with _own_handlers():
            # What nodes log is theirs: Ray would write it to standard output.
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
            # Nor is it told of a node that dies: Ray prints that node's log there all the same.
            ray._private.worker._worker_logs_enabled = False
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise _no_cluster(address, str(error)) from None


def living_nodes() -> tuple[Node, ...]:
    """Return the nodes that are alive, by address. This process is connected."""
    found = [
        (str(node["NodeManagerAddress"]), str(node["NodeID"]))
        for node in import_ray().nodes()
        if node["Alive"]
    ]
    shared = Counter(address for address, _ in found)
    return tuple(
        Node(id_, address, address if shared[address] == 1 else f"{address} ({id_[:8]})")
        for address, id_ in sorted(found)
    )


def own_address() -> str:
    """Return the address that the cluster knows this process's node by."""
    return str(import_ray().util.get_node_ip_address())


def _check_address(address: str) -> None:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(
            "not the address of a Ray cluster",
            where="--ray",
            expected="host:port of its head, usually port 6379, or auto",
            got=address,
            next_step="from outside the cluster: `ray job submit -- podloader prepare … --ray`"
            if address.startswith("ray://")
            else "",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, str(error)) from None


def _no_cluster(address: str, told: str) -> ConfigError:
    return ConfigError(
        "no Ray cluster that can be joined",
        where=f"--ray {address}",
        got=told,
        next_step="start this on a node of the cluster"
        if address == AUTO
        else "see that its head runs, with the same versions of Ray and Python",
    )


@contextlib.contextmanager
def _own_handlers() -> Iterator[None]:
    """Keep this process's handlers of signals: ``ray.init`` puts in one that exits at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
