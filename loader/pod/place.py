"""Which node of a model a pod is, read from vLLM's arguments before vLLM could read them."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loader.errors import ConfigError

MOST_NODES = 4096


@dataclass(frozen=True, slots=True)
class Place:
    """Which node this is, of how many, and where node 0 is."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 29501
    """torch's own; the nodes' is the one behind it."""

    @classmethod
    def read(cls, words: Sequence[str]) -> Place:
        """Return what *words* of ``vllm serve`` say; the values are vLLM's to judge.

        Raises:
            ConfigError: there is no such node.
        """
        parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        parser.add_argument("--nnodes", "-n", type=int, default=cls().count)
        parser.add_argument("--node-rank", "--node_rank", "-r", type=int, default=0)
        parser.add_argument("--master-addr", "--master_addr", default=cls().address)
        parser.add_argument("--master-port", "--master_port", type=int, default=cls().port)
        try:
            found, _ = parser.parse_known_args(list(words))
        except Exception as error:
            raise ConfigError("an argument for vLLM is wrong", got=str(error)) from None
        if not (0 <= found.node_rank < found.nnodes <= MOST_NODES):
            raise ConfigError(
                "no such node",
                where="--node-rank",
                expected=f"0 to {found.nnodes - 1}, of --nnodes {found.nnodes}",
                got=str(found.node_rank),
            )
        return cls(found.nnodes, found.node_rank, found.master_addr, found.master_port)

    def arguments(self) -> Mapping[str, object]:
        """Return what vLLM must have been given, by its own names."""
        return {
            "nnodes": self.count,
            "node_rank": self.rank,
            "master_addr": self.address,
            "master_port": self.port,
            "headless": self.rank > 0,
        }
