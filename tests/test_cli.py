"""The command as its users meet it: a process, its streams and its exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import yaml
from safetensors.numpy import save_file

from loader.cli.parser import _EXAMPLES, parse
from tests.origin import FaultyOrigin, act, slow, status, write_listing
from tests.planted import module_names, plant, planted_and_run


def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "loader", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **variables},
        check=False,
    )


@pytest.fixture
def config(origin: FaultyOrigin, tmp_path: Path) -> Path:
    origin.put("checkpoint-10/model.bin", b"x" * 100_000)
    origin.put("checkpoint-10/notes.txt", b"notes")
    origin.put("checkpoint-20/notes.txt", b"notes", rank=1)
    listing = write_listing(origin, tmp_path / "listing.json")
    path = tmp_path / "config.yaml"
    document: dict[str, Any] = {
        "model_name": "m",
        "training_checkpoints": {
            "download_folder": str(tmp_path / "down"),
            "artifact_references": [
                {"training_job_id": "job1", "paths": ["rank-*/checkpoint-10/"]}
            ],
        },
        "model_metadata": {"podloader": {"artifacts": [str(listing)]}},
    }
    path.write_text(yaml.safe_dump(document))
    return path


_LONG = "x" * 300


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", _LONG),
        ("plan", _LONG),
        ("sums", _LONG),
        ("clean", _LONG),
        ("settings", _LONG),
        ("consolidate", _LONG, "--output", "x"),
        ("merge", "--base", _LONG, "--adapter", "x", "--output", "x"),
        ("inspect", "loop"),
        ("plan", "--config", "/dev/zero"),
    ],
)
def test_paths_that_the_system_refuses(command: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    found = [str(tmp_path / "loop") if word == "loop" else word for word in command]
    done = run(*found, "--json")
    assert done.returncode in (2, 3, 4, 5), done.stderr
    assert "Traceback" not in done.stderr
    assert json.loads(done.stdout)["error"]["where"]


def test_plan_json(config: Path, origin: FaultyOrigin, tmp_path: Path) -> None:
    done = run("plan", config, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["version"] == 1
    assert document["files"][0] == {
        "path": "job1/rank-0/checkpoint-10/model.bin",
        "job": "job1",
        "rank": 0,
        "size_bytes": 100_000,
        "presence": "missing",
    }
    assert document["total_bytes"] == 100_005
    assert document["download_folder"] == str(tmp_path / "down")
    assert "100.0 kB" in done.stderr
    assert "Signature" not in done.stdout + done.stderr


def test_plan_without_sizes_asks_nothing(config: Path, origin: FaultyOrigin) -> None:
    document = json.loads(run("plan", config, "--no-sizes", "--json").stdout)
    assert origin.requests == []
    assert [file["size_bytes"] for file in document["files"]] == [None, None]
    assert document["total_bytes"] is None


def test_fetch_json(config: Path, tmp_path: Path) -> None:
    done = run("fetch", config, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert [file["path"] for file in document["files"]] == [
        "job1/rank-0/checkpoint-10/model.bin",
        "job1/rank-0/checkpoint-10/notes.txt",
    ]
    assert document["files"][0]["digest"].startswith("crc64nvme:")
    assert (tmp_path / "down/job1/rank-0/checkpoint-10/notes.txt").read_bytes() == b"notes"
    assert "2/2 files" in done.stderr
    assert json.loads(run("fetch", config, "--json").stdout)["fetched_bytes"] == 0


def test_results_go_to_standard_output_and_all_else_does_not(config: Path) -> None:
    plan = run("plan", config)
    assert "checkpoint-10/model.bin" in plan.stdout
    assert not plan.stderr
    fetched = run("fetch", config)
    assert "2 files in " in fetched.stdout
    assert "model.bin" not in fetched.stdout
    assert "fetching 2 files" in fetched.stderr
    for words in (["-v", "fetch"], ["fetch", "-v"]):
        assert "crc64nvme:" in run(*words, config).stdout
    for words in (["-q", "fetch"], ["fetch", "--quiet"]):
        quiet = run(*words, config)
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    refused = run("-q", "fetch", config, "--set", "verify=never")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")


def test_a_listing_alone_is_enough(origin: FaultyOrigin, tmp_path: Path) -> None:
    for step in (2, 10):
        folder = f"checkpoint-{step}"
        origin.put(f"{folder}/config.json", b'{"model_type": "llama"}')
        origin.put(f"{folder}/model.safetensors", (8).to_bytes(8, "little") + b"{}      ")
    origin.put("notes.txt", b"notes", job="job2")
    listing = write_listing(origin, tmp_path / "list.json")
    down = tmp_path / "out"

    def fetched(*words: str | Path) -> set[str]:
        done = run("fetch", listing, "--output", down, "--json", *words)
        assert done.returncode == 0, done.stderr
        return {file["path"] for file in json.loads(done.stdout)["files"]}

    every = {
        f"job1/rank-0/checkpoint-{step}/{name}"
        for step in (2, 10)
        for name in ("config.json", "model.safetensors")
    }
    assert fetched() == every
    assert fetched("rank-0/checkpoint-2/") == {path for path in every if "checkpoint-2/" in path}
    assert fetched("--checkpoint", "latest") == {path for path in every if "checkpoint-10/" in path}
    assert fetched("--job-id", "job1", "*/config.json") == {p for p in every if "config" in p}
    assert (down / "job1/rank-0/checkpoint-2/config.json").is_file()
    forced = run("plan", "--artifacts", listing)
    assert "4 files" in forced.stdout, forced.stderr
    assert "a start serves one alone" in forced.stdout
    latest = run("plan", "--artifacts", listing, "--checkpoint", "latest")
    assert "serves one alone" not in latest.stdout
    ready = run("prepare", listing, "--output", down)  # the latest, whose tokenizer is missed
    assert "job1/rank-0/checkpoint-10" in ready.stderr
    assert "without a tokenizer" in ready.stderr


def test_flags_win_over_a_config(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    done = run("fetch", config, "--download-folder", other, "*/notes.txt")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (other / "job1").rglob("*") if path.is_file()} == {"notes.txt"}
    folder = config.parent / "truss"
    folder.mkdir()
    (folder / "config.yaml").write_text(config.read_text())
    assert "model.bin" in run("plan", folder).stdout
    odd = config.with_name("odd")
    config.rename(odd)
    assert "model.bin" in run("plan", "--config", odd).stdout


def test_settings_and_where_they_came_from(config: Path) -> None:
    hidden = '{"s3": {"secret": "hush", "endpoint": "e"}}'
    done = run(
        *("settings", config, "--set", "concurrency=4", "--set", f"storage_options={hidden}"),
        PODLOADER_RETRIES="3",
    )
    assert re.search(r"^concurrency +4  \(from the command line\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^retries +3  \(from PODLOADER_RETRIES\)$", done.stdout, re.MULTILINE)
    assert re.search(rf"^artifacts +.*  \(from {config}\)$", done.stdout, re.MULTILINE)
    assert re.search(r"^verify +sample$", done.stdout, re.MULTILINE)
    assert "hush" not in done.stdout
    assert "Signature" not in done.stdout
    wrong = run("plan", config, PODLOADER_RETRIES="many")
    assert "retries, from PODLOADER_RETRIES: " in wrong.stderr


def test_a_folder_that_holds_a_config_is_one_everywhere(config: Path) -> None:
    folder = config.parent
    done = run("settings", folder)
    assert f"(from {folder / 'config.yaml'})" in done.stdout
    part = folder / "down/.podloader/files/job1/rank-0/old.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x")
    os.utime(part, (0, 0))
    done = run("clean", folder, "--json", "--dry-run")
    assert json.loads(done.stdout)["freed_bytes"] > 0


def test_the_surroundings_without_secrets(tmp_path: Path) -> None:
    proxies = {"HTTPS_PROXY": "http://me:hush@proxy:3128", "http_proxy": "me:hush@proxy:3128"}
    found = json.loads(run("env", "--json", **proxies).stdout)["env"]
    assert found["podloader"].startswith("0.")
    assert found["torch"]
    assert found["HTTPS_PROXY"] == "http://proxy:3128"
    assert "hush" not in json.dumps(found)


@pytest.mark.parametrize("command", _EXAMPLES)
def test_the_examples_of_each_command(command: str) -> None:
    for line in _EXAMPLES[command]:
        assert parse(line.split())["command"] == command


def test_log_lines_as_json(config: Path) -> None:
    done = run("--log-format", "json", "fetch", config)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(set(line) == {"time", "level", "message"} for line in lines)
    assert lines[0]["level"] == "INFO"


def test_json_lines_name_the_trace_of_a_start(config: Path) -> None:
    """The table at the end and the error are lines as well."""
    done = run("prepare", config, "--log-format", "json")
    assert done.returncode == 5, done.stderr
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(set(line) == {"time", "level", "message", "trace_id"} for line in lines[1:])
    (trace_id,) = {line["trace_id"] for line in lines}
    assert re.fullmatch("[0-9a-f]{32}", trace_id)
    assert (lines[-1]["level"], lines[-1]["message"][:7]) == ("ERROR", "error: ")


def test_artifacts_and_settings_from_the_command_line(config: Path, tmp_path: Path) -> None:
    listing = tmp_path / "elsewhere.json"
    (tmp_path / "listing.json").rename(listing)
    assert run("plan", config).returncode == 3
    assert run("plan", config, "--artifacts", listing).returncode == 0
    assert run("plan", config, PODLOADER_ARTIFACTS=str(listing)).returncode == 0
    done = run("plan", config, "--artifacts", listing, "--set", "concurrency=0")
    assert done.returncode == 2
    assert "concurrency" in done.stderr
    done = run("plan", config, "--set", "concurency=3")
    assert done.returncode == 2
    assert "did you mean 'concurrency'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["plan", "none.yaml"], 2, "cannot be read"),
        ([], 2, "usage: podloader"),
        (["plan"], 2, "neither a config nor a source"),
        (["pln"], 2, "there is no command pln; did you mean plan?"),
        (["unheard-of"], 2, "choose from plan, fetch"),
        (["fetch", "--artifact", "x", "c.yaml"], 2, "did you mean --artifacts?"),
        (["-v", "fech", "c.yaml"], 2, "did you mean fetch?"),
        (["plan", "c.yaml", "--", "--port", "1"], 2, "unknown: --port 1"),
        (["truss", "init", "--output", "out", "--requests", "0"], 2, "at least 1"),
        (["inspect", "/none"], 5, "no such checkpoint folder"),
        (["--verison"], 2, "did you mean --version?"),
        (["serve", "c.yaml", "--port", "8000"], 2, "podloader serve CONFIG -- --port 8000"),
        (["serve", "c.yaml", "--model", "x"], 2, "podloader serve CONFIG -- --model x"),
        (["serve", "c.yaml", "--config-format", "x"], 2, "CONFIG -- --config-format x"),
        (["serve", "c.yaml", "--verbos"], 2, "did you mean --verbose?"),
        (["help"], 0, "usage: podloader"),
        (["prepare", "c.yaml", "--timeline", "/none/x.json"], 2, "there is no folder /none"),
        (["plan", "baseten"], 2, "--job-id"),
        (["fetch", "x.json", "--output", ""], 2, "an empty argument"),
        (["fetch", "x.json", "--output="], 2, "an empty argument of --output"),
        (["fetch", "x.json", "rank-0/*", "--checkpoint", "latest"], 2, "give one of them"),
        (["fetch", "/", "--output", "out"], 3, "as a URL: file:///"),
        (["plan", "x.json", "--set", "concurrency=abc"], 2, "concurrency, from the command line"),
        (["-V"], 0, "podloader 0."),
        (["plan", "x.json", "--json=yes"], 2, "--json: it takes no value"),
        (["plan", "x.json", "-o", "out"], 2, "did you mean --output?"),
        (["plan", "s3:/bucket/job"], 3, "two slashes: s3://bucket/job"),
        (["plan", "/none/of/it.json"], 3, "there is no folder /none/of; / is the last"),
        (["plan", "x.json", "--set", "concurrency"], 2, "concurrency without a value"),
        (["plan", "x.json", "--checkpoint"], 2, "plan --help` says what it takes"),
        (["clean", "/none"], 2, "nothing lies there"),
        (["clean", ".", "--older-than", "today"], 2, "a number that is not negative, got today"),
        (["truss", "init", "--output", "o", "--requests", "few"], 2, "at least 1, got few"),
        (["merge", "--base", "b", "--adapter", "/tmp=half", "--output", "o"], 2, "got: half"),
        (["completion", "tcsh"], 2, "argument SHELL: invalid choice"),
        (["merge", "--base", "/none", "--adapter", "/none", "--output", "out"], 5, "/none"),
        (["merge", "--base", "b", "--adapter", "a=nan", "--output", "out"], 2, "a finite number"),
    ],
)
def test_mistakes(arguments: list[str], code: int, said: str) -> None:
    done = run(*arguments)
    assert done.returncode == code
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_the_nearest_of_what_is_there_is_named(config: Path, tmp_path: Path) -> None:
    listing = tmp_path / "listing.json"
    for command, wrong in (("plan", "listing.jsn"), ("inspect", "lsting.json")):
        assert f"did you mean {listing}?" in run(command, tmp_path / wrong).stderr
    assert f"did you mean {config}?" in run("plan", tmp_path / "confg.yaml").stderr
    assert "a file" in run("sums", listing).stderr


def test_where_a_source_that_cannot_be_read_was_named(config: Path) -> None:
    document = yaml.safe_load(config.read_text())
    document["model_metadata"]["podloader"]["artifacts"] = ["gone.json"]
    config.write_text(yaml.safe_dump(document))
    assert f"named by artifacts, from {config}" in run("plan", config).stderr
    told = run("plan", config, PODLOADER_ARTIFACTS="/gone.json").stderr
    assert "named by artifacts, from PODLOADER_ARTIFACTS" in told
    assert "named by" not in run("plan", "/gone.json").stderr


def test_inspect_one_file_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    header = b'{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    done = run("inspect", path)
    assert done.returncode == 0, done.stderr
    assert "parameters: 4 in 1 tensors" in done.stdout
    assert json.loads(run("inspect", path, "--json").stdout)["version"] == 1
    path.write_bytes(b"x")
    refused = run("inspect", path)
    assert (refused.returncode, refused.stdout) == (5, "")
    assert "Traceback" not in refused.stderr


def test_a_folder_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "abc_checkpoints.json").touch()
    (tmp_path / ".podloader").mkdir()
    (tmp_path / "empty").mkdir()
    done = run("plan", tmp_path)
    assert done.returncode == 3
    assert "a folder that holds a Truss's config.yaml" in done.stderr
    assert "got: a folder of abc_checkpoints.json, empty\n" in done.stderr
    assert "got: a folder of nothing" in run("plan", tmp_path / "empty").stderr


@pytest.mark.parametrize("command", ["plan", "inspect", "prepare"])
@pytest.mark.parametrize("text", ["[]", '{"job": {"id": "x"}, "checkpoint_artifacts": []}'])
def test_an_empty_listing(tmp_path: Path, command: str, text: str) -> None:
    (tmp_path / "listing.json").write_text(text)
    done = run(command, tmp_path / "listing.json")
    assert done.returncode == 3
    assert "error: " in done.stderr
    assert "correct" not in done.stderr, "there is nothing to choose from"


def test_a_models_folder_in_a_sources_place(tmp_path: Path) -> None:
    model = tmp_path / "my-model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    told = run("plan", model)
    assert told.returncode == 3
    assert "what lies here needs no fetching: `podloader inspect`" in told.stderr
    url = f"file://{model}"
    assert url in told.stderr
    taken = run("fetch", url, "--output", tmp_path / "down")
    assert taken.returncode == 0, taken.stderr
    assert (tmp_path / "down/my-model/rank-0/config.json").is_file()


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["plan", "x.json", "--bogus", "--json"], "unknown: --bogus"),
        (["fetch", "--json", "--log-format", "xml"], "argument --log-format: invalid choice"),
        (["fech", "--json"], "there is no command fech; did you mean fetch?"),
        (["truss", "wheel", "--json"], "the following arguments are required: TRUSS"),
    ],
)
def test_a_wrong_command_line_as_json(words: list[str], what: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    (line,) = done.stdout.splitlines()
    error = json.loads(line)["error"]
    assert (error["error"], error["where"]) == ("UsageError", "the command line")
    assert error["what"].startswith(what)
    assert what in done.stderr


def test_inspect_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {"a": numpy.zeros((2, 3), numpy.float16), "b": numpy.zeros((), numpy.float32)}
    save_file(tensors, path, {"format": "pt"})
    done = run("inspect", path, "--json")
    found = json.loads(done.stdout)["file"]
    assert (found["parameters"], found["metadata"]) == (7, {"format": "pt"})
    assert {t["name"]: t["shape"] for t in found["tensors"]} == {"a": [2, 3], "b": []}
    shown = run("inspect", path).stdout
    assert "7 in 2 tensors" in shown
    assert re.search(r"F16 +2x3  a$", shown, re.MULTILINE)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "full: " in run("inspect", tmp_path / "config.json").stdout
    path.write_bytes(b"x")
    assert run("inspect", path).returncode == 5


def test_errors_as_json(config: Path) -> None:
    done = run("plan", config, "--artifacts", "/none.json", "--json")
    assert done.returncode == 3
    error = json.loads(done.stdout)["error"]
    assert error["error"] == "ListingError"
    assert error["where"] == "/none.json"


def test_a_fetch_that_fails_says_what_to_do(config: Path, origin: FaultyOrigin) -> None:
    origin.fail("model.bin", act(lambda: None), *[status(404)] * 20)
    done = run("fetch", config)
    assert done.returncode == 4
    assert "error: the object is not there" in done.stderr
    assert "next:" in done.stderr
    assert "Signature" not in done.stderr


@pytest.mark.parametrize("words", [["fetch"], ["fetch", "--json"], ["prepare", "--json"]])
def test_interrupted_by_a_person(config: Path, origin: FaultyOrigin, words: list[str]) -> None:
    origin.put("checkpoint-10/model.bin", b"x" * 10_000_000)
    origin.fail("model.bin", act(lambda: None), *[slow(0.2)] * 100)
    process = subprocess.Popen(
        [sys.executable, "-m", "loader", *words, str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while len(origin.ranges_of("model.bin")) < 2:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    shown, said = process.communicate(timeout=20)
    assert process.returncode == 130
    if "--json" in words:
        error = json.loads(shown)["error"]
        assert error == {"error": "Interrupted", "what": "ended by SIGINT"}
    else:
        assert shown == ""
    assert "ended by SIGINT; what has been fetched is kept" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("at", ["loader.cli.commands", "loader.cli.parser", "loader.units", "gc"])
def test_an_interrupt_before_there_is_a_command(at: str) -> None:
    """At any import, or between them and the command."""
    text = f"""
import gc, os, signal, sys
class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {at!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
if {at!r} == "gc":
    gc.set_threshold = lambda count: None
    os.environ.__class__.__setitem__ = lambda *of: os.kill(os.getpid(), signal.SIGINT)
sys.argv = ["podloader", "settings"]
from loader.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr


def test_bars_in_a_terminal(config: Path) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "loader", "fetch", str(config)],
        stderr=follower,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
    )
    assert process.wait(timeout=60) == 0
    os.close(follower)
    shown = os.read(leader, 1 << 20).decode()
    os.close(leader)
    assert "2/2 files" in shown
    assert "━" in shown


def test_inspect_a_listing_without_downloading_it(
    config: Path, origin: FaultyOrigin, tmp_path: Path
) -> None:
    origin.put("checkpoint-30/adapter_model.safetensors", b"x" * 100)
    origin.put(
        "checkpoint-30/adapter_config.json",
        json.dumps({"peft_type": "LORA", "r": 8, "base_model_name_or_path": "b"}).encode(),
    )
    listing = write_listing(origin, tmp_path / "listing.json")
    done = run("inspect", listing, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["checkpoints"]
    assert found["kind"] == "adapter"
    assert found["path"] == "job1/rank-0/checkpoint-30"
    assert {path.rpartition("/")[2] for path, _ in origin.requests} == {"adapter_config.json"}


def test_the_version(config: Path) -> None:
    assert run("--version").stdout.startswith("podloader 0.")


# libc calls what it was given last first: this would be seen where its own ``exit`` is reached.
_LEAVE = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc._exit, ctypes.c_void_p(99), None)
from loader.cli import main
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc and musl have this function")
@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["plan", "none.yaml"], 2), (["pln"], 2)]
)
def test_the_process_ends_before_libc_takes_libraries_down(arguments: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _LEAVE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == code
    assert done.stdout + done.stderr


def test_a_reader_that_has_seen_enough(config: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "loader", "plan", str(config), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert done.returncode == 141
    assert "Traceback" not in done.stderr


def test_a_listing_cannot_command_a_terminal(config: Path, origin: FaultyOrigin) -> None:
    origin.put("checkpoint-\x1b[2J/x.bin", b"x")
    listing = write_listing(origin, config.parent / "listing.json")
    for pattern in ("checkpoint-30/", "rank-0/checkpoint-*"):
        config.write_text(config.read_text().replace("rank-*/checkpoint-10/", pattern))
        done = run("plan", config, "--artifacts", listing)
        assert done.returncode == 3
        assert "checkpoint-\\x1b[2J/" in done.stderr
        assert "\x1b" not in done.stderr


@pytest.mark.parametrize("command", [["plan"], ["fetch"], ["inspect"]])
def test_no_file_of_the_working_folder_is_run(
    config: Path, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "mine").mkdir()
    plant(tmp_path / "mine", module_names())
    program = Path(sys.executable).with_name("podloader")
    target = tmp_path / ("listing.json" if command == ["inspect"] else "config.yaml")
    done = subprocess.run(
        [program, *command, target],
        cwd=tmp_path / "mine",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert planted_and_run(tmp_path / "mine") == []


def test_nor_by_python_m(config: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    plant(
        tmp_path / "mine", {"torch", "json", "yaml", "argparse", "socket", "ssl", "logging", "gc"}
    )
    done = subprocess.run(
        [sys.executable, "-m", "loader", "fetch", config],
        cwd=tmp_path / "mine",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert planted_and_run(tmp_path / "mine") == []
