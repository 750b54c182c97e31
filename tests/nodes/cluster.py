"""Ray's own ``Cluster`` in a process of its own: raylets on one machine, as machines of their own.

Each has an address and a mount namespace with its own folder, which all believe to be at one path.

``python -m tests.nodes.cluster TEMP SHARED FOLDER...`` writes the head's address, then an answer to
each line: ``kill ADDRESS`` ends a raylet as a power cut would, ``state`` is what Ray tells of
actors, tasks and placement groups.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

_NEW_MOUNTS, _PRIVATE, _BIND = 0x20000, (1 << 18) | (1 << 14), 1 << 12  # sched.h, mount.h
SMALL = "small"  # a folder on a file system of a few MB, of the second node


class RayNodes:
    """The process, for tests. ``folders`` are those of the nodes, the head's first."""

    __test__ = False

    def __init__(self, shared: Path, folders: list[Path], temp: Path) -> None:
        self.shared, self.folders, self.temp = shared, folders, temp
        words = [sys.executable, "-m", "tests.nodes.cluster", str(temp), str(shared)]
        self._process = subprocess.Popen(
            [*words, *map(str, folders)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"},
        )
        self.address = self._read()["address"]

    def kill(self, address: str) -> None:
        """End the raylet at *address*, and all that it started, with SIGKILL."""
        self._ask(f"kill {address}")

    def state(self) -> dict[str, Any]:
        """Return what Ray tells."""
        return self._ask("state")

    def close(self) -> None:
        """End all of it."""
        with self._process:  # which closes the pipes as well
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(60)

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"own"'):
                found: dict[str, Any] = json.loads(line)["own"]
                return found
        raise RuntimeError("Ray's cluster did not start; its process says why")


def _in_own_mounts(folder: Path, shared: Path, small: bool, start: Callable[[], None]) -> None:
    """Run *start* on a thread that sees *folder* at *shared*, as all that it starts does."""

    def mount(source: str, target: Path, kind: str | None, flags: int, data: str = "") -> None:
        words = [os.fsencode(w) if w is not None else None for w in (source, target, kind)]
        if libc.mount(*words, ctypes.c_ulong(flags), data.encode() or None):
            raise OSError(ctypes.get_errno(), "mount")

    libc = ctypes.CDLL(None, use_errno=True)
    failures: list[Exception] = []
    started = threading.Event()

    def run() -> None:
        try:
            if libc.unshare(_NEW_MOUNTS):
                raise OSError(ctypes.get_errno(), "unshare")
            mount("none", Path("/"), None, _PRIVATE)
            if small:
                (folder / SMALL).mkdir()
                mount("tmpfs", folder / SMALL, "tmpfs", 0, "size=8m")
            mount(str(folder), shared, None, _BIND | (1 << 14))
            start()
        except Exception as error:
            failures.append(error)
        started.set()
        threading.Event().wait()  # the kernel ends Ray's processes with the thread that made them

    threading.Thread(target=run, daemon=True).start()
    started.wait()
    if failures:
        raise failures[0]


def main() -> None:
    """Start, answer, end."""
    import ray
    from ray.cluster_utils import Cluster

    # The nodes are made on threads, where no handler may be set.
    ray._private.utils.set_sigterm_handler = lambda handler: None
    temp, shared, *folders = sys.argv[1:]
    cluster, nodes = Cluster(), {}

    def add(place: int) -> None:
        own = {"node_ip_address": f"127.0.0.{place + 2}"}
        if not place:
            own["temp_dir"] = temp
        node = cluster.add_node(num_cpus=1, include_dashboard=not place, **own)
        nodes[node.node_ip_address] = node

    for place, folder in enumerate(folders):
        _in_own_mounts(Path(folder), Path(shared), place == 1, functools.partial(add, place))
    _answer({"address": cluster.address})
    for line in sys.stdin:
        command, _, address = line.strip().partition(" ")
        if command == "kill":
            for process in nodes[address].all_processes["raylet"]:
                os.kill(process.process.pid, signal.SIGKILL)
            _answer({})
        else:
            _answer(_state(cluster))
    cluster.shutdown()


def _state(cluster: Any) -> dict[str, Any]:
    import ray
    from ray.util import state

    ray.init(cluster.address, log_to_driver=False, ignore_reinit_error=True)
    all_of = {"detail": True, "limit": 1000, "raise_on_missing_output": False}  # of dead nodes
    told = {
        name: [str(one) for one in getattr(state, f"list_{name}")(**all_of)]
        for name in ("actors", "tasks", "placement_groups", "jobs", "workers", "runtime_envs")
    }
    groups = ray.util.placement_group_table().values()
    living = [a for a in state.list_actors(limit=1000) if a.state not in ("DEAD",)]
    return {
        "told": told,
        "living": [a.class_name for a in living],
        "groups": [g["state"] for g in groups if g["state"] != "REMOVED"],
    }


def _answer(found: dict[str, Any]) -> None:
    print(json.dumps({"own": found}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
