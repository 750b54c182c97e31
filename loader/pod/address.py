"""Where to listen, read from vLLM's own arguments before vLLM can be imported to read them."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from loader.errors import ConfigError

_PORT = 8000  # vLLM's default
_PORTS = range(1, 65536)


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address, and the certificate and key of https. An empty host is every address."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None


class _Parser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("an argument for vLLM is wrong", got=message, where="after --")


def serving_address(arguments: Sequence[str]) -> Address:
    """Return the address that *arguments* of ``vllm serve`` ask for.

    Raises:
        ConfigError: no port, or one that cannot be.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host", default="")
    parser.add_argument("--port", type=int, default=_PORT)
    parser.add_argument("--ssl-certfile", "--ssl_certfile", type=Path)
    parser.add_argument("--ssl-keyfile", "--ssl_keyfile", type=Path)
    found, _ = parser.parse_known_args(list(arguments))
    if found.port not in _PORTS:
        raise ConfigError(
            "no such port", where="--port", expected="1 to 65535", got=str(found.port)
        )
    return Address(found.host, found.port, found.ssl_certfile, found.ssl_keyfile)
