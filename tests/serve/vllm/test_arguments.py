"""From ReadyModel and engine_args to what vLLM's own parser reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loader.errors import ConfigError
from loader.serve.vllm.arguments import (
    check_engine_args,
    parse_arguments,
    serve_arguments,
    sizing_arguments,
)
from loader.types import ReadyModel, ServedAdapter


def make_ready(*names: str, rank: int | None = 16) -> ReadyModel:
    adapters = tuple(ServedAdapter(name, Path(f"/a/{name}=x y"), 4) for name in names)
    return ReadyModel(Path("/models/base"), adapters, rank, Path("/models/tok"), {})


def parse(ready: ReadyModel, **engine_args: Any) -> Any:
    return parse_arguments(serve_arguments(ready, engine_args))


@pytest.mark.engine
def test_vllm_reads_back_what_was_meant() -> None:
    arguments = serve_arguments(
        make_ready("job-1", "job.2"),
        {
            "max_model_len": 4096,
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "gpu_memory_utilization": 0.5,
            "hf_overrides": {"a.b": [1, {"c": None}]},
            "limit_mm_per_prompt": {"image": 1},
            "quantization": None,
            "ignore_patterns": ["x*", "y z"],
            "middleware": ["a.B", "c.d"],
        },
        served_model_name="my model",
        trust_remote_code=True,
        extra=("--port", "1234", "--max-num-seqs=7"),
    )
    args = parse_arguments(arguments)
    assert (args.model, args.tokenizer) == ("/models/base", "/models/tok")
    assert args.served_model_name == ["my model"]
    assert args.trust_remote_code
    assert (args.max_model_len, args.enforce_eager) == (4096, True)
    assert args.enable_prefix_caching is False
    assert args.gpu_memory_utilization == 0.5
    assert args.hf_overrides == {"a.b": [1, {"c": None}]}
    assert args.ignore_patterns == ["x*", "y z"]
    assert args.middleware == ["a.B", "c.d"]
    assert (args.port, args.max_num_seqs) == (1234, 7)
    assert (args.enable_lora, args.max_lora_rank) == (True, 16)
    assert [(m.name, m.path) for m in args.lora_modules] == [
        ("job-1", "/a/job-1=x y"),
        ("job.2", "/a/job.2=x y"),
    ]


@pytest.mark.engine
def test_without_adapters_lora_stays_off() -> None:
    args = parse(make_ready(rank=None))
    assert not args.enable_lora
    assert args.lora_modules is None


@pytest.mark.engine
@pytest.mark.parametrize(
    ("engine_args", "message"),
    [
        ({"max_model_len": "long"}, "long"),
        ({"dtype": "float7"}, "float7"),
        ({"enable_auto_tool_choice": True}, "tool-call-parser"),
        ({"no_such_thing": 1}, "no-such-thing"),
    ],
)
def test_values_that_vllm_refuses(engine_args: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match="refuses") as error:
        parse(make_ready(), **engine_args)
    assert message in error.value.got


@pytest.mark.engine
def test_unknown_names_are_all_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError) as error:
        check_engine_args({"max_modellen": 1, "dtype": "auto", "--tensor-paralel-size": 2})
    assert error.value.problems == (
        "'max_modellen'; did you mean 'max_model_len'?",
        "'--tensor-paralel-size'; did you mean 'tensor_parallel_size'?",
    )


def test_what_podloader_decides_is_not_an_engine_argument() -> None:
    with pytest.raises(ConfigError) as error:
        serve_arguments(make_ready(), {"lora_modules": "a=b", "model": "x"})
    assert len(error.value.problems) == 2


def test_one_name_for_two_models() -> None:
    with pytest.raises(ConfigError, match="one name") as error:
        serve_arguments(make_ready("a"), {}, served_model_name="a")
    assert error.value.got == "a"


@pytest.mark.parametrize(
    ("adapters", "asked", "cpu", "slots", "kept"),
    [
        (2, None, False, 2, 2),
        (9, None, False, 4, 9),
        (9, 2, False, 2, 9),
        (1, 6, False, 6, 6),
        (2, None, True, 3, 3),
        (9, 2, True, 10, 10),
    ],
)
def test_slots_for_adapters(
    monkeypatch: pytest.MonkeyPatch, adapters: int, asked: int, cpu: bool, slots: int, kept: int
) -> None:
    monkeypatch.setattr("loader.serve.vllm.arguments.is_cpu_build", lambda: cpu)
    ready = make_ready(*(f"a{i}" for i in range(adapters)))
    words = serve_arguments(ready, {"max_loras": asked})
    assert words[words.index("--max-loras") + 1] == str(slots)
    assert words[words.index("--max-cpu-loras") + 1] == str(kept)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-tp", "2", "--port", "8000"], {"tensor_parallel_size": 2}),
        (["--tensor-parallel-size=4"], {"tensor_parallel_size": 4}),
        (["--pipeline_parallel_size", "2"], {"pipeline_parallel_size": 2}),
        (
            ["--gpu-memory-utilization", "0.5", "-q", "fp8"],
            {"gpu_memory_utilization": 0.5, "quantization": "fp8"},
        ),
        (["--config", "more.yaml"], {"config": "more.yaml"}),
        (["--runner", "pooling", "--convert=embed"], {"runner": "pooling", "convert": "embed"}),
        (["-tp", "two"], {}),
        (["--dtype"], {}),
        ([], {}),
    ],
)
def test_what_of_a_command_line_decides_what_is_prepared(
    words: list[str], found: dict[str, object]
) -> None:
    assert sizing_arguments(words) == found
