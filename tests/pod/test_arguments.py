"""Every command line that a pod makes, through the parser of vLLM's own ``serve``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.errors import ConfigError
from loader.pod.address import serving_address
from loader.pod.place import Place
from loader.pod.pod import vllm_arguments
from loader.serve.vllm.arguments import parse_arguments, written
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


def address(*given: str, **engine_args: object) -> Any:
    words = (*written(engine_args), *given)
    return {**serving_address(words).arguments(), **Place.read(words).arguments()}


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
def test_it_is_accepted(ready: ReadyModel, section: dict[str, Any], given: list[str]) -> None:
    args = parse(ready, *given, **section)
    assert args.model == "/m/base"
    assert [module.name for module in args.lora_modules or ()] == [a.name for a in ready.adapters]
    assert args.shutdown_timeout == 20
    check_mode(args, address(*given, **section.get("engine_args", {})))


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
        check_mode(args, address(*given))
    assert given[0] in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("api_key", ["sesame", "two"]),
        ("api_key", "sesame"),
        ("host", "127.0.0.1"),
        ("port", 8123),
        ("root_path", "/a"),
        ("ssl_ca_certs", "/tls/ca.pem"),
        ("ssl_cert_reqs", 2),
        ("ssl_certfile", "/tls/cert.pem"),
        ("ssl_ciphers", "HIGH"),
        ("ssl_keyfile", "/tls/key.pem"),
    ],
)
def test_where_to_listen_and_whom_to_let_in_is_one_thing_wherever_it_is_given(
    tmp_path: Path, name: str, value: Any
) -> None:
    flag = "--" + name.replace("_", "-")
    words = [flag, *map(str, value if isinstance(value, list) else [value])]
    file = tmp_path / "vllm.yaml"
    file.write_text(json.dumps({name.replace("_", "-"): value}))
    in_config, on_line = parse(PLAIN, engine_args={name: value}), parse(PLAIN, *words)
    elsewhere = parse(PLAIN, "--config", str(file))
    for args in (in_config, on_line, elsewhere):
        check_mode(args, address(**{name: value}))
        check_mode(args, address(*words))
    assert address(*words, **{name: value}) == address(*words)
    with pytest.raises(ConfigError, match=flag):
        check_mode(elsewhere, address("--config", str(file)))


def test_an_abbreviation_lets_nobody_in() -> None:
    args = parse(PLAIN, "--api-k", "sesame")
    with pytest.raises(ConfigError, match="--api-key"):
        check_mode(args, address("--api-k", "sesame"))


def test_a_mistyped_argument_is_a_config_error() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(PLAIN, "--max-modl-len", "5")
    assert "--max-modl-len" in str(caught.value)
