"""``podloader truss init``: from real listings to a Truss that Truss, podloader and vLLM read."""

from __future__ import annotations

import json
import os
import pty
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from truss.base.truss_config import TrussConfig

from loader import boot
from loader.config.settings import Settings
from loader.demo.origin import PROJECT
from loader.errors import AdapterError, ConfigError, ListingError, ResolveError
from loader.pod.pod import vllm_arguments
from loader.scaffold import deployment as deployments
from loader.scaffold.choice import choose
from loader.scaffold.deployment import Deployment, Secret, Wishes, decide
from loader.scaffold.folder import write_truss
from loader.scaffold.survey import Found, survey
from loader.scaffold.wheel import AUDIO, INSTALL, REQUIREMENTS
from loader.serve.vllm.arguments import parse_arguments
from loader.types import ReadyModel
from tests.models import tiny_llama, train_or_draw_lora
from tests.origin import FaultyOrigin, serving, write_listing
from tests.other_models import draw_whisper_lora, tiny_embedder, tiny_whisper


class Jobs:
    """Checkpoints of every sort, one job for each, behind signed URLs."""

    def __init__(self, origin: FaultyOrigin, folder: Path) -> None:
        self.origin, self.folder = origin, folder
        self.base = tiny_llama(folder / "base")
        for step, rank in ((9, 4), (100, 12)):
            lora = train_or_draw_lora(self.base, folder / f"lora-{step}", r=rank)
            shutil.copytree(lora, origin.folder("lora") / f"checkpoint-{step}")
        dora = train_or_draw_lora(self.base, folder / "dora", use_dora=True)
        shutil.copytree(dora, origin.folder("dora") / "checkpoint-1")
        full = origin.folder("full")
        shutil.copytree(self.base, full, dirs_exist_ok=True)
        for step in (5, 20):
            shutil.copytree(self.base, full / f"checkpoint-{step}")
        self.whisper = tiny_whisper(folder / "whisper")
        shutil.copytree(self.whisper, origin.folder("whisper") / "out")
        hearing = draw_whisper_lora(self.whisper, folder / "hearing")
        shutil.copytree(hearing, origin.folder("hearing") / "checkpoint-1")
        shutil.copytree(tiny_embedder(folder / "embed"), origin.folder("embed") / "out")
        for rank in (0, 1):
            origin.put(f"step-3/__{rank}_0.distcp", b"x", "dcp", rank)
        origin.put("step-3/.metadata", b"x", "dcp")
        shutil.copy(self.base / "config.json", origin.folder("dcp") / "step-3")

    def listing(self, *jobs: str) -> str:
        """Return the path of a listing of *jobs*."""
        path = self.folder / f"{'-'.join(jobs)}.json"
        path.write_text(json.dumps([self.origin.listing(job) for job in jobs]))
        return str(path)

    def find(self, *jobs: str) -> tuple[Found, ...]:
        """Return what is found in the listing of *jobs*."""
        return survey([self.listing(*jobs)])


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    folder = tmp_path_factory.mktemp("jobs")
    with serving(folder / "origin") as origin:
        yield Jobs(origin, folder)


def over(jobs: Jobs, **wishes: Any) -> Wishes:
    """Return the *wishes* of a person whose base is local, which no adapter may choose."""
    return Wishes(**{"base_model": str(jobs.base)} | wishes)


def make(jobs: Jobs, job: str, output: Path, *names: str, **wishes: Any) -> Deployment:
    """Write a Truss of *job*'s checkpoints and return what was decided."""
    wished = over(jobs, **wishes) if job in ("lora", "dora") else Wishes(**wishes)
    deployment = decide(choose(jobs.find(job), names or ["latest"]), wished)
    write_truss(deployment, [jobs.listing(job)], output)
    return deployment


def read(output: Path) -> tuple[TrussConfig, Settings]:
    """Return what Truss and podloader make of it, Truss's own complete copy included."""
    config = TrussConfig.from_yaml(output / "config.yaml")
    config.write_to_yaml_file(output / "complete.yaml", verbose=True)
    return config, Settings.load(output / "complete.yaml")


def test_only_small_telling_files_are_read(jobs: Jobs) -> None:
    jobs.origin.requests.clear()
    jobs.find("lora", "full", "whisper", "dcp")
    read_whole = {path.rpartition("/")[2] for path, header in jobs.origin.requests if header}
    whole = [path for path, header in jobs.origin.requests if header != "bytes=0-0"]
    assert not [path for path in whole if path.endswith((".safetensors", ".distcp"))]
    assert "adapter_config.json" in read_whole


def test_one_adapter(jobs: Jobs, tmp_path: Path) -> None:
    deployment = make(jobs, "lora", tmp_path / "out")
    config, settings = read(tmp_path / "out")
    assert settings.base_model == str(jobs.base)
    assert settings.training.artifact_references[0].paths == ("rank-0/checkpoint-100/",)
    assert settings.engine_args == {
        "dtype": "bfloat16",
        "tensor_parallel_size": 1,
        "max_model_len": 256,
        "max_lora_rank": 16,
    }
    assert deployment.adapters == ("lora",)
    assert {"--enable-lora", "--lora-modules"} <= set(deployment.command)
    assert str(config.resources.accelerator.accelerator) == "Accelerator.L4"
    assert config.docker_server is not None
    assert config.docker_server.predict_endpoint == "/v1/chat/completions"
    assert config.docker_server.readiness_endpoint == "/health"
    assert config.requirements == [*REQUIREMENTS]
    assert config.build_commands == [INSTALL]
    assert [path.name for path in (tmp_path / "out/data").glob("*.whl")]
    text = (tmp_path / "out/config.yaml").read_text()
    for line in deployment.placement.calculation:
        assert f"# {line}" in text


def test_two_adapters_of_one_job_never_collide(jobs: Jobs, tmp_path: Path) -> None:
    deployment = make(jobs, "lora", tmp_path / "out", "checkpoint-9", "checkpoint-100")
    _, settings = read(tmp_path / "out")
    assert set(deployment.adapters) == {"lora-checkpoint-9", "lora-checkpoint-100"}
    assert settings.adapter_policy == "attach"
    assert settings.engine_args["max_lora_rank"] == 16


def test_the_pod_prepares_what_was_promised(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promised = make(jobs, "lora", tmp_path / "out", "checkpoint-9", "latest")
    document = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    document["training_checkpoints"]["download_folder"] = str(tmp_path / "down")
    monkeypatch.chdir(tmp_path / "out")
    ready = boot.prepare(Settings.load(document))
    assert tuple(a.name for a in ready.adapters) == promised.adapters
    assert ready.max_lora_rank == promised.engine_args["max_lora_rank"]
    assert ready.path == jobs.base


def test_the_last_model_beside_its_checkpoints(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(jobs.find("full"), ["latest"])[0].name == "checkpoint-20"
    make(jobs, "full", tmp_path / "out", "full/rank-0")
    document = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    document["training_checkpoints"]["download_folder"] = str(tmp_path / "down")
    monkeypatch.chdir(tmp_path / "out")
    ready = boot.prepare(Settings.load(document))
    assert ready.path == tmp_path / "down/full/rank-0"
    assert not (tmp_path / "down/full/rank-0/checkpoint-20").exists()


def test_whisper(jobs: Jobs, tmp_path: Path) -> None:
    make(jobs, "whisper", tmp_path / "out")
    config, _ = read(tmp_path / "out")
    assert config.docker_server is not None
    assert config.docker_server.predict_endpoint == "/v1/audio/transcriptions"
    assert config.requirements == [*REQUIREMENTS, *AUDIO]


def test_an_adapter_of_whisper(jobs: Jobs, tmp_path: Path) -> None:
    """It is transcribed with, merged: no prompt would prove that an attached one works."""
    made = make(jobs, "hearing", tmp_path / "out", base_model=str(jobs.whisper))
    config, settings = read(tmp_path / "out")
    assert config.docker_server is not None
    assert config.docker_server.predict_endpoint == "/v1/audio/transcriptions"
    assert config.requirements == [*REQUIREMENTS, *AUDIO]
    assert (made.adapters, settings.adapter_policy) == ((), "merge")


def test_embeddings(jobs: Jobs, tmp_path: Path) -> None:
    make(jobs, "embed", tmp_path / "out")
    config, settings = read(tmp_path / "out")
    assert config.docker_server is not None
    assert config.docker_server.predict_endpoint == "/v1/embeddings"
    assert settings.engine_args["runner"] == "pooling"


def test_shards_of_all_ranks(jobs: Jobs, tmp_path: Path) -> None:
    deployment = make(jobs, "dcp", tmp_path / "out", base_model=str(jobs.base))
    _, settings = read(tmp_path / "out")
    assert settings.training.artifact_references[0].paths == ("rank-*/step-3/",)
    assert settings.base_model == str(jobs.base)
    assert "counted" in deployment.placement.calculation[0]


def test_what_cannot_be_attached_is_merged_alone(jobs: Jobs, tmp_path: Path) -> None:
    deployment = make(jobs, "dora", tmp_path / "out")
    _, settings = read(tmp_path / "out")
    assert settings.adapter_policy == "merge"
    assert "--enable-lora" not in deployment.command
    chosen = choose(jobs.find("dora", "lora"), ["dora/checkpoint-1", "lora/checkpoint-9"])
    with pytest.raises(AdapterError, match="cannot attach") as error:
        decide(chosen, over(jobs))
    assert "DoRA" in error.value.problems[0]


def test_all_secrets_and_variables_are_kept(jobs: Jobs, tmp_path: Path) -> None:
    secrets = (Secret("hf_access_token", "HF_TOKEN"), Secret("wandb"), Secret("key", "API_KEY"))
    environment = {"A": "b c", "N": "1"}
    deployment = decide(
        choose(jobs.find("lora"), ["latest"]), over(jobs, secrets=secrets, environment=environment)
    )
    write_truss(deployment, [jobs.listing("lora")], tmp_path / "out")
    config, _ = read(tmp_path / "out")
    assert set(config.secrets) == {"hf_access_token", "wandb", "key"}
    assert config.environment_variables == environment
    command = str(config.docker_server.start_command) if config.docker_server else ""
    for variable, name in (("HF_TOKEN", "hf_access_token"), ("API_KEY", "key")):
        assert f'export {variable}="$(cat /secrets/{name})"' in command
    with pytest.raises(ConfigError, match="secret"):
        Secret("x; rm -rf /", "V")


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("s3://bucket/prefix", ["aws_access_key_id", "aws_secret_access_key", "aws_region"]),
        ("baseten", ["baseten_api_key"]),
        ("listing.json", []),
    ],
)
def test_secrets_that_the_source_needs(jobs: Jobs, source: str, names: list[str]) -> None:
    chosen = choose(jobs.find("lora"), ["latest"])
    assert [s.name for s in decide(chosen, over(jobs, sources=(source,))).secrets] == names


def test_a_base_of_the_hub_needs_its_token(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = choose(jobs.find("lora"), ["latest"])
    deployment = decide(chosen, Wishes(base_model="org/thing-8b-it"))
    assert [s.name for s in deployment.secrets] == ["hf_access_token"]
    assert "8B in its name" in deployment.placement.calculation[0]
    assert deployment.placement.accelerator == "H100_40GB"
    with pytest.raises(ConfigError, match="how large"):
        decide(chosen, Wishes(base_model="org/thing"))


def test_gpus_without_bfloat16_get_float16(jobs: Jobs) -> None:
    deployment = decide(choose(jobs.find("lora"), ["latest"]), over(jobs, accelerator="T4"))
    assert deployment.engine_args["dtype"] == "float16"


def test_lengths_and_names_that_are_refused(jobs: Jobs) -> None:
    chosen = choose(jobs.find("lora"), ["latest"])
    with pytest.raises(ConfigError, match="length") as error:
        decide(chosen, over(jobs, max_model_len=257))
    assert "256" in error.value.expected
    with pytest.raises(ConfigError, match="name"):
        decide(chosen, over(jobs, model_name="a b/c"))


def test_a_listing_without_checkpoints(jobs: Jobs) -> None:
    jobs.origin.put("notes.txt", b"x", "empty")
    with pytest.raises(ResolveError, match="no checkpoint") as error:
        jobs.find("empty")
    assert "1 files" in error.value.got


def test_the_same_wishes_give_the_same_folder(jobs: Jobs, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make(jobs, "lora", tmp_path / name, "latest", "checkpoint-9")
    texts = [(tmp_path / name / "config.yaml").read_text() for name in ("a", "b")]
    assert texts[0] == texts[1]


def test_the_listing_goes_along_and_a_bucket_does_not(jobs: Jobs, tmp_path: Path) -> None:
    deployment = make(jobs, "lora", tmp_path / "out")
    given = jobs.folder / "lora.json"  # as ``make`` gave it: another listing is another moment's
    assert (tmp_path / "out/data/lora.json").read_text() == given.read_text()
    write_truss(deployment, ["s3://bucket/prefix"], tmp_path / "bucket")
    assert read(tmp_path / "bucket")[1].artifacts == ("s3://bucket/prefix",)
    assert not list((tmp_path / "bucket/data").glob("*.json"))
    signed = "https://host/listing.json?Signature=hush"
    with pytest.raises(ConfigError, match="signed URL") as error:
        write_truss(deployment, [signed], tmp_path / "signed")
    assert "hush" not in str(error.value)
    assert not (tmp_path / "signed").exists()


def test_a_folder_that_is_there_is_kept(jobs: Jobs, tmp_path: Path) -> None:
    deployment = make(jobs, "lora", tmp_path / "out")
    (tmp_path / "out/config.yaml").write_text("mine: true")
    sources = [jobs.listing("lora")]
    with pytest.raises(ConfigError, match="there already"):
        write_truss(deployment, sources, tmp_path / "out")
    assert (tmp_path / "out/config.yaml").read_text() == "mine: true"
    write_truss(deployment, sources, tmp_path / "out", overwrite=True)
    assert "mine" not in (tmp_path / "out/config.yaml").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("dear")
    with pytest.raises(ConfigError, match="there already"):
        write_truss(deployment, sources, tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_nothing_half_written_stays(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment = make(jobs, "lora", tmp_path / "out")
    before = (tmp_path / "out/config.yaml").read_text()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("loader.scaffold.folder.shutil.copyfile", full)
    for output in ("out", "new"):
        with pytest.raises(Exception, match="could not be written") as error:
            write_truss(deployment, [jobs.listing("lora")], tmp_path / output, overwrite=True)
        assert "No space left" in str(error.value)
    assert (tmp_path / "out/config.yaml").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("job", "names"),
    [
        ("lora", ["latest"]),
        ("lora", ["latest", "checkpoint-9"]),
        ("dora", ["latest"]),
        ("full", ["latest"]),
        ("whisper", ["latest"]),
        ("embed", ["latest"]),
        ("dcp", ["latest"]),
    ],
)
def test_vllms_own_parser_reads_the_arguments(jobs: Jobs, job: str, names: list[str]) -> None:
    wishes = over(jobs) if job in ("lora", "dora") else Wishes()
    deployment = decide(choose(jobs.find(job), names), wishes)
    args = parse_arguments((*deployment.command, "--port", "8000"))
    assert args.served_model_name == [deployment.served_model_name]
    assert args.tensor_parallel_size == 1
    assert bool(args.lora_modules) == bool(deployment.adapters)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "loader", "truss", "init", *arguments]


def test_the_command_where_there_is_no_terminal(jobs: Jobs, tmp_path: Path) -> None:
    base = ["--base-model", str(jobs.base)]
    arguments = ["--artifacts", jobs.listing("lora"), *base, "--output", str(tmp_path / "out")]
    arguments.append("--json")
    done = subprocess.run(
        command(*arguments, "--secret", "A=b", "--env", "C=d", "--name", "mine"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["checkpoints"] == [{"kind": "adapter", "path": "lora/rank-0/checkpoint-100"}]
    assert document["accelerator"] == "L4"
    assert "Signature" not in done.stdout + done.stderr
    config, settings = read(tmp_path / "out")
    assert (config.model_name, set(config.secrets)) == ("mine", {"b"})
    assert 10 <= config.runtime.health_checks.startup_threshold_seconds <= 3000
    assert settings.drain_timeout_s < 10, "its PID 1 kills then"
    assert "end after 7 days at most" in done.stderr
    assert "--artifacts baseten with --secret baseten_api_key does not end" in done.stderr
    again = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def in_a_terminal(arguments: list[str], typed: str, code: int = 0) -> str:
    """Run the command in a terminal where somebody types, and return what the terminal showed."""
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command(*arguments)],  # Ctrl-C is the terminal's
        stdin=follower,
        stdout=follower,
        stderr=follower,
        close_fds=True,
    )
    os.close(follower)
    os.write(leader, typed.encode())
    shown = b""
    while True:
        try:
            piece = os.read(leader, 1 << 16)
        except OSError:  # the terminal's other side is closed
            break
        shown += piece
    os.close(leader)
    assert process.wait(timeout=60) == code, shown.decode()
    return shown.decode()


def test_all_that_is_lacking_is_asked_for(jobs: Jobs, tmp_path: Path) -> None:
    """Each answer is checked at once; the platform is offered where URLs in data/ would end."""
    typed = [
        *("nothing.json", jobs.listing("lora"), "3", "1"),
        *("nothing known", str(jobs.base), "a name", "mine", "many", "128", "V100", "L4"),
        *("perhaps", "y", "a=b=c", "A=b, c"),
        *(str(jobs.folder), str(tmp_path / "out")),
    ]
    shown = in_a_terminal([], "".join(f"{line}\n" for line in typed))
    for told in (
        "the listing cannot be read",
        "numbers from 1 to 2, please",
        "only you may choose",
        "nothing tells how large the base model is",
        "a model name that Truss does not take",
        "a number, please",
        "that the engine has no code for",
        "whose URLs end in",
        "y or n, please",
        "not the name of a secret",
        "the output folder is there already",
        "which no pod has",
        f"next       truss push {tmp_path / 'out'}",
    ):
        assert told in shown.replace("\r\n", "\n"), told
    config, settings = read(tmp_path / "out")
    assert (config.model_name, settings.artifacts) == ("mine", ("baseten",))
    assert set(config.secrets) == {"baseten_api_key", "b", "c"}
    assert not list((tmp_path / "out/data").glob("*.json"))


@pytest.mark.parametrize(
    ("key", "code", "said"), [("\x04", 1, "error: no answer; "), ("\x03", 130, "ended by SIGINT; ")]
)
def test_a_person_who_gives_up(jobs: Jobs, tmp_path: Path, key: str, code: int, said: str) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command("--output", str(tmp_path / "out"))],
        stdin=follower,
        stdout=follower,
        stderr=follower,
    )
    os.close(follower)
    shown = ""
    while "Source" not in shown:
        shown += os.read(leader, 1 << 16).decode()
    os.write(leader, key.encode())
    assert process.wait(timeout=60) == code
    shown = os.read(leader, 1 << 16).decode()
    os.close(leader)
    assert shown.strip().splitlines()[-1] == f"{said}nothing was written"
    assert not (tmp_path / "out").exists()


def test_the_comment_is_the_command_that_the_pod_runs(
    jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deployment = make(jobs, "full", tmp_path / "out", "checkpoint-20")
    settings = Settings.load(tmp_path / "out/config.yaml")
    down = tmp_path / "down"
    settings = replace(settings, training=replace(settings.training, download_folder=down))
    ready = boot.prepare(settings)
    words = vllm_arguments(settings, ready, ["--port", "8000"])
    here = [word.replace(str(down), "/tmp/training_checkpoints") for word in words]
    assert list(deployment.command) == here
    text = (tmp_path / "out/config.yaml").read_text()
    told = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if "#" in line)
    assert shlex.join(["vllm", "serve", *here]) in told


def test_an_adapter_over_a_base_behind_a_url_is_shown_merged(jobs: Jobs) -> None:
    found = choose(jobs.find("lora"), ["latest"])
    deployment = decide(found, over(jobs))
    assert "--enable-lora" in deployment.command
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployments, "is_remote", lambda name: True)
        deployment = decide(found, over(jobs))
    assert "--enable-lora" not in deployment.command
    assert deployment.command[0].endswith("/.podloader/models/merge-DIGEST")


def test_a_config_that_deploy_checkpoints_wrote(jobs: Jobs, tmp_path: Path) -> None:
    """In the shape of the file in Truss's own tests."""
    start = (
        f'sh -c "HF_TOKEN=$(cat /secrets/hf_access_token) vllm serve {jobs.base} --port 8000 '
        "--tensor-parallel-size 2 --enable-lora --max-lora-rank 16 --dtype bfloat16 "
        "--max-model-len 128 --seed 7 --enforce-eager --lora-modules "
        'lora=/tmp/training_checkpoints/lora/rank-0/checkpoint-9"'
    )
    document = {
        "base_image": {"image": "vllm/vllm-openai:latest"},
        "docker_server": {
            "liveness_endpoint": "/health",
            "predict_endpoint": "/v1/chat/completions",
            "readiness_endpoint": "/health",
            "server_port": 8000,
            "start_command": "%(ENV_BT_DOCKER_SERVER_START_CMD)s",
        },
        "environment_variables": {
            "BT_DOCKER_SERVER_START_CMD": start,
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_USE_V1": "0",
        },
        "model_name": "mine-vLLM-LORA",
        "resources": {"accelerator": "H100:2", "use_gpu": True},
        "secrets": {"hf_access_token": "set token in baseten workspace", "other": "x"},
        "training_checkpoints": {
            "artifact_references": [{"training_job_id": "lora", "paths": ["rank-0/checkpoint-9/"]}],
            "download_folder": "/tmp/training_checkpoints",
        },
    }
    theirs = tmp_path / "config.yml"
    theirs.write_text(yaml.safe_dump(document))
    words = ["--from", str(theirs), "--artifacts", jobs.listing("lora"), "--non-interactive"]
    done = subprocess.run(
        command(*words, "--output", str(tmp_path / "out")),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    config, settings = read(tmp_path / "out")
    assert config.model_name == "mine-vLLM-LORA"
    assert config.resources.accelerator.count == 2
    assert settings.training.artifact_references[0].paths == ("rank-0/checkpoint-9/",)
    assert settings.base_model == str(jobs.base)
    assert settings.engine_args == {
        "dtype": "bfloat16",
        "tensor_parallel_size": 2,
        "max_model_len": 128,
        "max_lora_rank": 8,
        "seed": 7,
        "enforce_eager": True,
    }
    assert config.environment_variables == {"VLLM_LOGGING_LEVEL": "WARNING"}
    assert set(config.secrets) == {"hf_access_token", "other"}
    assert 'export HF_TOKEN="$(cat /secrets/hf_access_token)"' in str(config.docker_server)
    parse_arguments(_of_pod(settings))


def _of_pod(settings: Settings) -> list[str]:
    ready = ReadyModel(Path("m"), (), None, Path("m"), {})
    return list(vllm_arguments(settings, ready, ["--port", "8000"]))


def test_a_config_that_starts_something_else(jobs: Jobs, tmp_path: Path) -> None:
    make(jobs, "lora", tmp_path / "out")
    done = subprocess.run(
        command("--from", str(tmp_path / "out"), "--output", str(tmp_path / "b")),
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 2
    assert "starts no `vllm serve`" in done.stderr


def test_a_person_is_asked(jobs: Jobs, tmp_path: Path) -> None:
    base = ["--base-model", str(jobs.base)]
    arguments = ["--artifacts", jobs.listing("lora"), *base, "--output", str(tmp_path / "out")]
    shown = in_a_terminal(arguments, "7\n1,2\n\n128\nH100\n\n\n")
    assert "numbers from 1 to 2" in shown
    assert "lora/rank-0/checkpoint-100  (adapter)" in shown
    config, settings = read(tmp_path / "out")
    assert len(settings.training.artifact_references[0].paths) == 2
    assert config.model_name == "base"
    assert settings.engine_args["max_model_len"] == 128
    assert config.resources.accelerator.accelerator == "H100"


def test_defaults_by_pressing_enter_are_those_without_a_terminal(
    jobs: Jobs, tmp_path: Path
) -> None:
    source = ["--artifacts", jobs.listing("full"), "--output"]
    in_a_terminal([*source, str(tmp_path / "asked")], "\n\n\n\n\n\n")
    shown = in_a_terminal([*source, str(tmp_path / "silent"), "--non-interactive"], "")
    assert "Which" not in shown
    texts = [(tmp_path / name / "config.yaml").read_text() for name in ("asked", "silent")]
    assert texts[0] == texts[1]


def test_a_job_among_several(jobs: Jobs, tmp_path: Path) -> None:
    several = jobs.listing("lora", "full")
    arguments = ["--artifacts", several, "--output", str(tmp_path / "out")]
    refused = subprocess.run(command(*arguments), capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "--job-id" in refused.stderr
    done = subprocess.run(command(*arguments, "--job-id", "full"), capture_output=True, check=False)
    assert done.returncode == 0
    assert read(tmp_path / "out")[1].training.artifact_references[0].training_job_id == "full"


def test_another_source_than_a_listing(jobs: Jobs, tmp_path: Path) -> None:
    source = f"file://{jobs.origin.root}/training_projects/{PROJECT}"
    deployment = decide(choose(survey([source], ["lora"]), ["latest"]), over(jobs))
    assert deployment.chosen[0].path == "lora/rank-0/checkpoint-100"
    write_truss(deployment, ["s3://runs/demo"], tmp_path / "out")
    assert read(tmp_path / "out")[1].artifacts == ("s3://runs/demo",)
    assert read(tmp_path / "out")[1].drain_timeout_s == 8
    for folder in (source, str(jobs.origin.root)):
        with pytest.raises(ConfigError, match="which no pod has"):
            write_truss(deployment, [folder], tmp_path / "no")
    with pytest.raises(ListingError, match="no listing"):
        survey([jobs.listing("lora")], ["other"])


def test_listing_sizes_are_enough(jobs: Jobs, tmp_path: Path) -> None:
    path = write_listing(jobs.origin, tmp_path / "sizes.json", "full")
    path.write_text(json.dumps(jobs.origin.listing("full", with_sizes=True)))
    jobs.origin.requests.clear()
    (latest,) = choose(survey([str(path)]), ["latest"])
    assert latest.weight_bytes == (jobs.base / "model.safetensors").stat().st_size
    assert {name.rpartition("/")[2] for name, _ in jobs.origin.requests} == {"config.json"}
