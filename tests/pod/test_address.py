"""The address, from vLLM's arguments."""

from __future__ import annotations

from pathlib import Path

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
    ],
)
def test_it_is_read_as_vllm_does(arguments: list[str], expected: Address) -> None:
    assert serving_address(arguments) == expected


@pytest.mark.parametrize("arguments", [["--port", "http"], ["--port"], ["--port", "70000"]])
def test_no_port(arguments: list[str]) -> None:
    with pytest.raises(ConfigError):
        serving_address(arguments)
