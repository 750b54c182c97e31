"""What two processes tell each other."""

from __future__ import annotations

import socket

import pytest

from loader.errors import (
    AdapterError,
    ConfigError,
    EngineError,
    LoaderError,
    error_from_json,
)
from loader.serve.vllm.channel import Channel


def test_messages_arrive_whole_and_in_order() -> None:
    ours, theirs = map(Channel, socket.socketpair())
    ours.send("load", arguments=["a\nb", "ü"], canary=True)
    ours.send("go", boot={"x": [1.5, None]})
    assert theirs.receive() == {"kind": "load", "arguments": ["a\nb", "ü"], "canary": True}
    assert theirs.receive() == {"kind": "go", "boot": {"x": [1.5, None]}}
    ours.close()
    assert theirs.receive() is None
    theirs.send("late")
    theirs.close()


@pytest.mark.parametrize("kind", [EngineError, ConfigError, AdapterError])
def test_errors_keep_their_type_and_fields(kind: type[LoaderError]) -> None:
    error = kind("what", where="there", expected="e", got="g", next_step="n", problems=["p", "q"])
    again = error_from_json(error.to_json())
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.exit_code == error.exit_code


def test_what_is_no_error_of_ours_is_the_engines() -> None:
    assert type(error_from_json({"error": "Sequence", "what": "x"})) is EngineError


@pytest.mark.parametrize("problems", [5, None, "abc", {"a": 1}])
def test_what_anybody_may_have_written_is_an_error_all_the_same(problems: object) -> None:
    error = error_from_json({"error": "ConfigError", "what": "x", "problems": problems})
    assert error.problems == ()
    assert error.what == "x"
