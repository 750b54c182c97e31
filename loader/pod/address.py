"""Where to listen and whom to let in, read from vLLM's arguments before vLLM could read them."""

from __future__ import annotations

import os
import secrets
import ssl
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from loader.errors import ConfigError
from loader.http.trust import server_tls

_PORT = 8000  # vLLM's default
_PORTS = range(1, 65536)


# vllm/entrypoints/serve/middleware/authenticate.py
GUARDED = ("/v1", "/v2", "/inference", "/cohere")


@dataclass(frozen=True, slots=True)
class Address:
    """A TCP address, and what https there takes. An empty host is every address."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    clients: Path | None = None
    """The authorities that sign clients' certificates."""
    verify: ssl.VerifyMode = ssl.CERT_NONE
    ciphers: str | None = None
    root_path: str = ""
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    middleware: tuple[str, ...] = ()
    """What vLLM imports to let requests in or not: nobody but it can ask them."""

    def arguments(self) -> Mapping[str, object]:
        """Return what vLLM must have been given, by its own names."""
        return {
            "host": self.host,
            "port": self.port,
            "ssl_certfile": self.certificate and str(self.certificate),
            "ssl_keyfile": self.key and str(self.key),
            "ssl_ca_certs": self.clients and str(self.clients),
            "ssl_cert_reqs": int(self.verify),
            "ssl_ciphers": self.ciphers,
            "root_path": self.root_path,
            "api_key": list(self.api_keys),
            "middleware": list(self.middleware),
        }

    def tls(self) -> ssl.SSLContext | None:
        """Return what https takes; None where plain HTTP is served.

        Raises:
            ConfigError: as ``server_tls``.
        """
        if self.certificate is None:
            return None
        return server_tls(
            self.certificate, self.key, self.clients, verify=self.verify, ciphers=self.ciphers
        )

    def lets_in(self, method: str, target: str, authorization: str) -> bool:
        """Return whether vLLM would answer a request for *target* with that header."""
        keys = self.api_keys or (os.environ.get("VLLM_API_KEY", ""),)
        if not any(keys) or method == "OPTIONS":
            return True
        if not target.removeprefix(self.root_path).startswith(GUARDED):
            return True
        scheme, _, given = authorization.partition(" ")
        matches = [secrets.compare_digest(given.encode(), k.encode()) for k in keys if k]
        return scheme.lower() == "bearer" and any(matches)


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
    parser.add_argument("--ssl-ca-certs", "--ssl_ca_certs", type=Path)
    parser.add_argument("--ssl-cert-reqs", "--ssl_cert_reqs", type=int, default=0)
    parser.add_argument("--ssl-ciphers", "--ssl_ciphers")
    parser.add_argument("--root-path", "--root_path", default="")
    parser.add_argument("--api-key", "--api_key", nargs="+", default=())
    parser.add_argument("--middleware", action="append", default=[])
    found, _ = parser.parse_known_args(list(arguments))
    if found.port not in _PORTS:
        raise ConfigError(
            "no such port", where="--port", expected="1 to 65535", got=str(found.port)
        )
    if found.ssl_cert_reqs not in set(ssl.VerifyMode):
        raise ConfigError(
            "no such demand on clients' certificates",
            where="--ssl-cert-reqs",
            expected="0 (none), 1 (optional) or 2 (required)",
            got=str(found.ssl_cert_reqs),
        )
    return Address(
        found.host,
        found.port,
        found.ssl_certfile,
        found.ssl_keyfile,
        found.ssl_ca_certs,
        ssl.VerifyMode(found.ssl_cert_reqs),
        found.ssl_ciphers,
        found.root_path,
        tuple(found.api_key),
        tuple(found.middleware),
    )
