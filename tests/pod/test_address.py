"""The address, from vLLM's arguments."""

from __future__ import annotations

import ssl
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from loader.errors import ConfigError
from loader.pod.address import Address, serving_address


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Address("", 8000)),
        (["--port", "9", "--host", "::1", "--max-model-len", "4"], Address("::1", 9)),
        (["--port=9", "--max-num-seqs=3"], Address("", 9)),
        (["--port", "9", "--port", "10"], Address("", 10)),
        (
            ["--ssl-certfile", "c.pem", "--ssl-keyfile=k.pem"],
            Address("", 8000, Path("c.pem"), Path("k.pem")),
        ),
        (
            ["--ssl-ca-certs", "a.pem", "--ssl-cert-reqs", "2", "--ssl-ciphers=HIGH"],
            Address("", 8000, clients=Path("a.pem"), verify=ssl.CERT_REQUIRED, ciphers="HIGH"),
        ),
        (["--middleware", "a.B", "--middleware=c.d"], Address("", 8000, middleware=("a.B", "c.d"))),
    ],
)
def test_it_is_read_as_vllm_does(arguments: list[str], expected: Address) -> None:
    assert serving_address(arguments) == expected


@pytest.mark.parametrize("arguments", [["--port", "http"], ["--port"], ["--port", "70000"]])
def test_no_port(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        serving_address(arguments)


def test_no_such_demand_on_clients() -> None:
    with pytest.raises(ConfigError, match="clients' certificates"):
        serving_address(["--ssl-cert-reqs", "3"])


_HEADERS = [
    "",
    "Bearer sesame",
    "bearer two",
    "Bearer three",
    "Basic sesame",
    "sesame",
    "Bearer ",
    "Bearer é",
]
_TARGETS = [
    "/v1/models",
    "/v1",
    "/v2/embed",
    "/inference/x",
    "/health",
    "/metrics",
    "/a/v1/models",
    "/",
]


@pytest.mark.parametrize("root", ["", "/a"])
@pytest.mark.parametrize("given", [["--api-key", "sesame", "two"], ["--api-key=sesame"], []])
async def test_those_are_let_in_that_vllm_lets_in(
    monkeypatch: pytest.MonkeyPatch, given: list[str], root: str
) -> None:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    monkeypatch.setenv("VLLM_API_KEY", "two")
    address = serving_address([*given, "--root-path", root])
    assert "sesame" not in repr(address)
    tokens = [word for word in given if not word.startswith("--")] or ["two"]
    tokens = ["sesame"] if given == ["--api-key=sesame"] else tokens
    answered: list[str] = []

    async def app(scope: dict[str, Any], receive: object, send: object) -> None:
        answered.append("by the engine")

    async def send(message: dict[str, Any]) -> None:
        answered.append("refused")

    guard: Any = AuthenticationMiddleware(app, tokens)
    for header, target, method in product(_HEADERS, _TARGETS, ("GET", "POST", "OPTIONS")):
        scope = {"type": "http", "method": method, "path": target, "root_path": root}
        answered.clear()
        await guard(scope | {"headers": [(b"authorization", header.encode())]}, None, send)
        ours = address.lets_in(method, target, header)
        assert ours == (answered[0] == "by the engine"), (header, target, method)
