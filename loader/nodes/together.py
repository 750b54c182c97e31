"""Every node prepares; the first error ends all, a node that is gone is named within seconds."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from loader import __version__
from loader.config.settings import Settings
from loader.errors import ConfigError, NodeError, on_node
from loader.fetch.progress import LogProgress
from loader.nodes.placing import PLACEMENT_TIMEOUT_S, Place, placed
from loader.nodes.preparer import Event, Look, NodePreparer
from loader.ray_cluster import AUTO, Node, connected, living_nodes
from loader.stores.base import Progress, Report
from loader.timeline import Timeline
from loader.types import ReadyModel
from loader.units import show_seconds

_LOOK_S = 0.5
_BEGIN_S = 120.0  # a worker's start, with its imports, on a node that is busy
_UNAVAILABLE_S = 3.0  # a process that breaks off is not asked for longer than that
_SILENT_S = 60.0  # one that is busy may be quiet; Ray says before that whether its node lives
_log = logging.getLogger("podloader")


def prepare_on_ray(
    settings: Settings,
    address: str = AUTO,
    *,
    placement_group: Any | None = None,
    progress_of: Callable[[str], Progress] | None = None,
    timeline: Timeline | None = None,
    placement_timeout_s: float = PLACEMENT_TIMEOUT_S,
) -> Mapping[str, ReadyModel]:
    """Return what each node of a Ray cluster has on its disk now, by the node's name.

    *placement_group*: whose nodes are meant; else what vLLM would reserve, or every node that
    lives. *progress_of* gives what shows the progress of the node with that name; of the cluster
    itself where the name is empty. podloader has to be installed on every node.

    Example::

        models = prepare_on_ray(Settings.load("config.yaml"))

    Raises:
        LoaderError: as ``prepare``, of the node that is named in front of it.
        NodeError: a node is gone or cannot begin, or the cluster has no room.
        ConfigError: no cluster is there, or a node has another podloader.
    """
    shows = progress_of or _log_of
    of_all = shows("")
    with (
        connected(address) as ray,
        placed(settings, placement_group, ray, of_all, placement_timeout_s) as places,
        _started(places, ray) as actors,
    ):
        _log.info("preparing on %s", ", ".join(one.node.name for one in actors))
        for one in actors:
            one.replay = Replay(shows(one.node.name), one.node.name)
        _begin_all(actors, settings, ray)
        return _follow_all(actors, ray, timeline or Timeline(quiet=True))


class Replay:
    """Tells a ``Progress`` what was kept on a node."""

    def __init__(self, progress: Progress, node: str) -> None:
        self._progress, self._node = progress, node
        self._works: dict[int, tuple[AbstractContextManager[Report], Report]] = {}

    def tell(self, event: Event) -> None:
        """Tell it of *event*."""
        name, *arguments = event
        if name == "log":
            level, line = arguments
            _log.log(level, "%s: %s", self._node, line)
        elif name == "work":
            number, what = arguments
            work = self._progress.working(what)
            self._works[number] = (work, work.__enter__())
        elif name == "report":
            number, done, total = arguments
            if number in self._works:
                self._works[number][1](done, total)
        elif name == "worked":
            if found := self._works.pop(arguments[0], None):
                found[0].__exit__(None, None, None)
        else:
            getattr(self._progress, name)(*arguments)

    def close(self) -> None:
        """End what has not ended."""
        for number in list(self._works):
            self.tell(("worked", number))


@dataclass(slots=True)
class _Actor:
    """The actor of a node; ``ref`` is what it was asked last, ``asked_at`` when."""

    node: Node
    handle: Any
    replay: Replay = field(default_factory=lambda: Replay(Progress(), ""))
    ref: Any = None
    asked_at: float = 0.0
    failing_since: float | None = None


@contextlib.contextmanager
def _started(places: tuple[Place, ...], ray: Any) -> Iterator[list[_Actor]]:
    """Give an actor in each of *places*; all of them end with the block."""
    remote = ray.remote(NodePreparer)
    actors: list[_Actor] = []
    try:
        for place in places:
            options = remote.options(
                num_cpus=0,
                max_restarts=0,
                max_task_retries=0,
                scheduling_strategy=place.strategy,
                # Ray hides GPUs from who reserves none; merging and what is said of room see them.
                runtime_env={"env_vars": {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}},
            )
            actors.append(_Actor(place.node, options.remote()))
        yield actors
    finally:
        for one in actors:
            one.replay.close()
            with contextlib.suppress(Exception):  # it is gone
                ray.kill(one.handle)


def _begin_all(actors: list[_Actor], settings: Settings, ray: Any) -> None:
    """Return when every node has begun. Raises as ``prepare_on_ray``."""
    for one in actors:
        _ask(one, one.handle.begin, settings, __version__)
    versions = {}
    for one, version in _answers(actors, ray, _BEGIN_S):
        if version is not None:
            versions[one.node.name] = str(version)
            one.ref = None
        if len(versions) == len(actors):
            break
    if others := {name: v for name, v in versions.items() if v != __version__}:
        raise ConfigError(
            "nodes with another podloader",
            expected=f"{__version__}, as here",
            problems=[f"{name}: {version}" for name, version in others.items()],
            next_step="install one version everywhere",
        )


def _follow_all(actors: list[_Actor], ray: Any, timeline: Timeline) -> Mapping[str, ReadyModel]:
    began = time.monotonic()
    found: dict[str, ReadyModel] = {}
    for one in actors:
        _ask(one, one.handle.look)
    for one, look in _answers(actors, ray, _SILENT_S):
        if not isinstance(look, Look):  # it did not answer; it may do so now
            _ask(one, one.handle.look)
            continue
        for event in look.events:
            one.replay.tell(event)
        if look.error is not None:
            raise on_node(look.error, one.node.name)
        if look.fault:
            raise RuntimeError(f"{one.node.name}: {look.fault}")
        if look.ready is None:
            _ask(one, one.handle.look)
            continue
        one.ref = None
        found[one.node.name] = look.ready
        for span in look.spans:
            lane = f"{one.node.name} {span.lane}"
            begun = timeline.begin(span.name, kind=span.kind, lane=lane, at=began + span.start_s)
            timeline.end(begun, at=began + span.end_s, failed=span.failed, stopped=span.stopped)
        if len(found) == len(actors):
            break
    return {one.node.name: found[one.node.name] for one in actors}


def _ask(actor: _Actor, method: Any, *arguments: Any) -> None:
    actor.ref, actor.asked_at = method.remote(*arguments), time.monotonic()


def _answers(actors: list[_Actor], ray: Any, silent_s: float) -> Iterator[tuple[_Actor, Any]]:
    """Yield answers as they come; None of a process that does not answer for the moment.

    Raises:
        NodeError: a node or its process is gone.
    """
    looked_at = time.monotonic()
    while True:
        asked = {one.ref: one for one in actors if one.ref is not None}
        for ref in ray.wait(list(asked), num_returns=1, timeout=_LOOK_S)[0]:
            yield asked[ref], _answer(asked[ref], ray)
        if time.monotonic() - looked_at > 2 * _LOOK_S:
            _check_living(actors, silent_s)
            looked_at = time.monotonic()


def _check_living(actors: list[_Actor], silent_s: float) -> None:
    """Raise NodeError where a node is dead, or silent: those that are done serve the others yet."""
    living = {node.id for node in living_nodes()}
    for one in actors:
        if one.node.id not in living:
            raise _gone(one, "Ray counts it as dead")
        if one.ref is not None and time.monotonic() - one.asked_at > silent_s:
            raise _gone(one, f"no answer for {show_seconds(silent_s)}")


def _answer(actor: _Actor, ray: Any) -> Any:
    try:
        found = ray.get(actor.ref)
    except ray.exceptions.ActorUnavailableError as error:
        actor.failing_since = actor.failing_since or time.monotonic()
        if time.monotonic() - actor.failing_since > _UNAVAILABLE_S:
            raise _gone(actor, str(error)) from None
        time.sleep(_LOOK_S)
        return None
    except ray.exceptions.RayTaskError as error:  # podloader is missing there, or broken
        raise NodeError(
            f"{actor.node.name}: podloader cannot begin on this node",
            got=str(error.cause or error),
            next_step="install podloader there as it is here",
        ) from None
    except ray.exceptions.RayError as error:
        raise _gone(actor, str(error)) from None
    actor.failing_since = None
    return found


def _gone(actor: _Actor, told: str) -> NodeError:
    return NodeError(
        f"{actor.node.name}: this node is gone, or what prepared on it",
        got=told.strip().partition("\n")[0],
        next_step="see Ray's logs of it; what the others have fetched is kept",
    )


def _log_of(node: str) -> Progress:
    return LogProgress(before=f"{node}: " if node else "")
