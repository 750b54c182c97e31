"""Every command line that a pod makes, through the parser of vLLM's own ``serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.pod.pod import vllm_arguments
from loader.serve.vllm.arguments import parse_arguments
from loader.serve.vllm.openai_server import check_mode
from loader.types import ReadyModel, ServedAdapter

PLAIN = ReadyModel(Path("/m/base"), (), None, Path("/m/tokenizer"), {})
ADAPTERS = ReadyModel(
    Path("/m/base"),
    (
        ServedAdapter("job-a", Path("/m/a"), 8),
        ServedAdapter("job-b", Path("/m/with space"), 16),
    ),
    16,
    Path("/m/base"),
    {},
)


def settings(**section: object) -> Settings:
    """Return settings with this section."""
    training = {"artifact_references": [{"training_job_id": "j", "paths": ["rank-0/"]}]}
    return Settings.load(
        {"training_checkpoints": training, "model_metadata": {"podloader": section}}
    )


def parse(ready: ReadyModel, *given: str, **section: object) -> Any:
    return parse_arguments(vllm_arguments(settings(**section), ready, given))


@pytest.mark.parametrize("ready", [PLAIN, ADAPTERS], ids=["plain", "adapters"])
@pytest.mark.parametrize(
    ("section", "given"),
    [
        ({}, []),
        ({"served_model_name": "mine", "trust_remote_code": True}, ["--port", "9000"]),
        ({"engine_args": {"max_model_len": 8192, "dtype": "bfloat16"}}, ["--host", "::1"]),
        ({"engine_args": {"hf_overrides": {"rope_scaling": None}, "enforce_eager": True}}, []),
        ({"engine_args": {"enable_prefix_caching": False}}, ["--api-key", "a", "b"]),
        ({"engine_args": {"tensor_parallel_size": 2}}, ["--uvicorn-log-level=warning"]),
    ],
)
def test_it_is_accepted(ready: ReadyModel, section: dict[str, object], given: list[str]) -> None:
    args = parse(ready, *given, **section)
    assert args.model == "/m/base"
    assert [module.name for module in args.lora_modules or ()] == [a.name for a in ready.adapters]
    assert args.shutdown_timeout == 20
    check_mode(args, args.port)


def test_the_limit_for_the_end_is_vllms_too_unless_the_user_says_otherwise() -> None:
    assert parse(PLAIN, drain_timeout_s=7.4).shutdown_timeout == 7
    assert parse(PLAIN, engine_args={"shutdown_timeout": 3}).shutdown_timeout == 3
    assert parse(PLAIN, "--shutdown-timeout", "4").shutdown_timeout == 4


@pytest.mark.parametrize(
    "given", [["--headless"], ["--uds", "/tmp/s"], ["--grpc"], ["--api-server-count", "2"]]
)
def test_other_ways_to_serve_are_refused(given: list[str]) -> None:
    args = parse(PLAIN, *given)
    with pytest.raises(ConfigError) as caught:
        check_mode(args, args.port)
    assert given[0] in str(caught.value)


def test_a_port_from_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError):
        check_mode(parse(PLAIN), 8123)


def test_a_mistyped_argument_is_a_config_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(PLAIN, "--max-modl-len", "5")
    assert "--max-modl-len" in str(caught.value)
