"""A thousand pods, as no machine here can run them: the decisions of ``loader.peers``, in SimPy.

    python -m benchmarks.pods_model [--pods 100,1000] [--size-gb 140] [--node-gbit-s 25]
                                    [--origin-gb-s 10] [--dead 0.05] [--slow 0.05] [--one-order]

Homes and orders are those of ``loader.peers.ring``. Modelled is the network: a node carries so many
transfers at a time in each direction, each at its share of the node's rate, and the origin as many
as its own rate allows. A chunk is passed on when it is whole, a home that is busy names those that
have it from there, and a dead or slow pod costs whoever asks it two seconds, once. Chunks are
larger than the real ones, so that this ends soon: that makes it worse, not better. ``--one-order``:
every pod takes the chunks in the order of the file, for comparison.
"""

from __future__ import annotations

import argparse
import itertools
import random
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

import simpy

from loader.peers.chunks import CHUNK_BYTES, Chunk, SharedObject
from loader.peers.ring import order_chunks, rank_homes

_FLOWS = 16  # transfers of one node at a time, in each direction
_HOMES = 4
_DEAD_S = 2.0
_SLOW, _SLOWER = 10.0, 4.0  # of the slow ones, and what a pod does without
_COLUMNS = 60
Steps = Generator[simpy.Event, None, None]


@dataclass
class Pod:
    """One node: what it has, who is fetching what, and its way out."""

    name: str
    up: simpy.Resource
    rate: float  # of one of its transfers
    dies_at: float
    has: set[int] = field(default_factory=set)
    coming: dict[int, simpy.Event] = field(default_factory=dict)
    done_without: set[str] = field(default_factory=set)  # peers that are dead or slow
    sent: float = 0.0
    done_at: float | None = None


class Model:
    """One scale-out, from the first request to the last byte."""

    def __init__(self, options: argparse.Namespace, count: int) -> None:
        self.env = simpy.Environment()
        self.size = options.size_gb / options.chunks  # of a chunk, GB
        self.one_order = options.one_order
        rate = options.node_gbit_s / 8 / _FLOWS
        self.origin = simpy.Resource(self.env, max(1, round(options.origin_gb_s / rate)))
        self.rate, self.origin_gb = rate, 0.0
        shared = SharedObject("model.safetensors", options.chunks * CHUNK_BYTES, '"1"')
        self.chunks = list(shared.chunks(0, shared.size_bytes))
        chance = random.Random(1)
        self.pods: dict[str, Pod] = {}
        for number in range(count):
            slow = chance.random() < options.slow
            dies = chance.uniform(1, 40) if chance.random() < options.dead else float("inf")
            name = f"10.0.{number // 256}.{number % 256}:8790"
            up = simpy.Resource(self.env, _FLOWS)
            self.pods[name] = Pod(name, up, rate / (_SLOW if slow else 1), dies)
        self.homes = [rank_homes(chunk.name, self.pods, 4 * _HOMES) for chunk in self.chunks]
        self.holders: list[list[Pod]] = [[] for _ in self.chunks]

    def run(self) -> None:
        """Run it to its end."""
        workers = [self.env.process(w) for pod in self.pods.values() for w in self._workers(pod)]
        self.env.run(simpy.AllOf(self.env, workers))

    def _workers(self, pod: Pod) -> Iterator[Steps]:
        def is_mine(chunk: Chunk) -> bool:
            return self.homes[chunk.number][0] == pod.name

        ordered = self.chunks if self.one_order else order_chunks(self.chunks, pod.name, is_mine)
        left = iter(ordered)
        for _ in range(_FLOWS):
            yield self._work(pod, left)

    def _work(self, pod: Pod, left: Iterator[Chunk]) -> Steps:
        for chunk in left:
            if self._is_dead(pod):
                return
            yield from self._bring(pod, chunk.number)
        if len(pod.has) == len(self.chunks) and pod.done_at is None:
            pod.done_at = self.env.now

    def _bring(self, pod: Pod, number: int) -> Steps:
        """Get one chunk into *pod*, once whoever wants it there."""
        if number in pod.has:
            return
        if number in pod.coming:
            yield pod.coming[number]
            return
        pod.coming[number], is_given = self.env.event(), False
        known = (name for name in self.homes[number] if name not in pod.done_without)
        for name in list(itertools.islice(known, _HOMES)):
            home = self.pods[name]
            if home is pod:
                break
            if self._is_dead(home):
                pod.done_without.add(name)
                yield self.env.timeout(_DEAD_S)
                continue
            if number not in home.has:
                yield self.env.process(self._bring(home, number))
            giver = home
            if home.up.count >= _FLOWS:  # busy: it names those that have it from there
                giver = self._choose_holder(pod, number) or home
            if giver.rate < self.rate / _SLOWER:
                yield self.env.timeout(_DEAD_S)
                pod.done_without.add(giver.name)
                if giver is home:
                    continue
                giver = home
            yield from self._transfer(giver.up, giver.rate)
            giver.sent += self.size
            self.holders[number].append(pod)
            is_given = True
            break
        if not is_given:
            yield from self._transfer(self.origin, self.rate)
            self.origin_gb += self.size
        pod.has.add(number)
        pod.coming.pop(number).succeed()

    def _choose_holder(self, pod: Pod, number: int) -> Pod | None:
        holders = (p for p in self.holders[number][-4:] if p.name not in pod.done_without)
        free = [holder for holder in holders if holder.up.count < _FLOWS]
        return random.choice(free) if free else None

    def _transfer(self, way: simpy.Resource, rate: float) -> Steps:
        with way.request() as turn:
            yield turn
            yield self.env.timeout(self.size / rate)

    def _is_dead(self, pod: Pod) -> bool:
        return self.env.now >= pod.dies_at


def show(model: Model, size_gb: float, alone_s: float) -> None:
    """Print a line of the table, and how many pods were done when."""
    done = sorted(pod.done_at for pod in model.pods.values() if pod.done_at is not None)
    sent = sorted(pod.sent / size_gb for pod in model.pods.values())
    print(
        f"{len(model.pods):5} {len(done):5} {done[len(done) // 2]:8.1f} {done[-1]:8.1f} "
        f"{model.origin_gb / size_gb:7.2f} {sent[len(sent) // 2]:8.2f} {sent[-1]:8.2f} "
        f"{alone_s:8.0f}"
    )
    last = done[-1]
    for row in range(1, 11):
        until = last * row / 10
        share = sum(at <= until for at in done) / len(model.pods)
        print(f"  {until:7.1f} s |{'#' * round(share * _COLUMNS):{_COLUMNS}}| {share:4.0%}")


def main() -> None:
    """Print the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pods", default="100,1000")
    parser.add_argument("--size-gb", type=float, default=140)
    parser.add_argument("--chunks", type=int, default=1024)
    parser.add_argument("--node-gbit-s", type=float, default=25)
    parser.add_argument("--origin-gb-s", type=float, default=10)
    parser.add_argument("--dead", type=float, default=0.0)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--one-order", action="store_true")
    options = parser.parse_args()
    floor_s = options.size_gb * 8 / options.node_gbit_s
    print(f"a node's own limit: {floor_s:.1f} s")
    print(
        f"{'pods':>5} {'done':>5} {'median s':>8} {'last s':>8} {'copies':>7} {'up med':>8} "
        f"{'up most':>8} {'direct s':>8}"
    )
    for count in map(int, options.pods.split(",")):
        model = Model(options, count)
        model.run()
        direct_s = max(floor_s, count * options.size_gb / options.origin_gb_s)
        show(model, options.size_gb, direct_s)


if __name__ == "__main__":
    main()
