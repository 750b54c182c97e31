"""The config is read as Truss writes it; our own section is strict; the environment wins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from truss.base.truss_config import TrussConfig

from loader.config import credentials
from loader.config.settings import Settings, setting_defaults, settings_table
from loader.config.truss_config import DOWNLOAD_FOLDER
from loader.errors import ConfigError
from loader.types import ArtifactReference

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
REFERENCES = [{"training_job_id": "job1", "paths": ["rank-*/checkpoint-10/", "rank-0/x.json"]}]


def config(**podloader: object) -> dict[str, Any]:
    return {
        "training_checkpoints": {"artifact_references": REFERENCES},
        "model_metadata": {"example_model_input": {"prompt": "x"}, "podloader": podloader},
    }


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "BASETEN_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(credentials, "SECRETS_FOLDER", tmp_path / "secrets")


def test_reads_what_truss_writes(tmp_path: Path) -> None:
    truss = TrussConfig.from_dict(config(concurrency=3) | {"model_name": "m"})
    truss.write_to_yaml_file(tmp_path / "config.yaml", verbose=True)
    loaded = Settings.load(tmp_path / "config.yaml")
    assert loaded.concurrency == 3
    assert loaded.training.download_folder == Path(DOWNLOAD_FOLDER)
    assert loaded.training.artifact_references == (
        ArtifactReference("job1", ("rank-*/checkpoint-10/", "rank-0/x.json")),
    )


def test_arguments_win_over_variables_over_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLOADER_CONCURRENCY", "5")
    monkeypatch.setenv("PODLOADER_RANGE_SIZE", "1MiB")
    monkeypatch.setenv("PODLOADER_ENGINE_ARGS", '{"max_model_len": 64}')
    loaded = Settings.load(config(concurrency=3, retries=2), overrides={"range_size": "2MiB"})
    assert (loaded.concurrency, loaded.retries, loaded.range_size) == (5, 2, 2 * 2**20)
    assert loaded.engine_args == {"max_model_len": 64}


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a.json  b.json", ("a.json", "b.json")), ('["a b.json"]', ("a b.json",)), ("", ())],
)
def test_artifacts_from_a_variable(
    monkeypatch: pytest.MonkeyPatch, value: str, expected: tuple[str, ...]
) -> None:
    monkeypatch.setenv("PODLOADER_ARTIFACTS", value)
    assert Settings.load(config()).artifacts == expected


def test_unknown_key_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(config(concurency=1, adapter_polcy="attach", retries=-1))
    assert "'concurency' is not a setting; did you mean 'concurrency'?" in str(caught.value)
    assert "did you mean 'adapter_policy'?" in str(caught.value)
    assert "retries" in str(caught.value)


def test_unknown_variable_suggests_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLOADER_CONCURENCY", "1")
    with pytest.raises(ConfigError, match="variables") as caught:
        Settings.load(config())
    assert "did you mean 'PODLOADER_CONCURRENCY'?" in str(caught.value)


def test_a_kubernetes_service_of_that_name_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("PODLOADER", "PODLOADER_METRICS", "PODLOADER_SERVICE"):
        for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP"):
            monkeypatch.setenv(f"{service}_{name}", "tcp://10.0.0.1:80")
        monkeypatch.setenv(f"{service}_PORT_80_TCP_ADDR", "10.0.0.1")
    assert Settings.without_config() == Settings.without_config()
    monkeypatch.setenv("PODLOADER_API_PORT", "80")
    with pytest.raises(ConfigError, match="no settings") as caught:
        Settings.without_config()
    assert "PODLOADER_API_PORT" in str(caught.value)
    assert "SERVICE" not in str(caught.value)


def test_malformed_engine_args_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PODLOADER_ENGINE_ARGS", "{token: hf_S3CR3T")
    with pytest.raises(ConfigError) as caught:
        Settings.load(config())
    assert "S3CR3T" not in str(caught.value)


def test_malformed_artifacts_list() -> None:
    with pytest.raises(ConfigError, match="settings") as caught:
        Settings.load(config(artifacts="[a.json"))
    assert "JSON" in str(caught.value)


@pytest.mark.parametrize("name", ["training", "hf_token", "api_key"])
def test_secrets_have_no_place_in_the_section(name: str) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        Settings.load(config(**{name: "S3CR3T"}))
    assert "S3CR3T" not in str(caught.value)


def test_a_wrong_value_is_not_shown() -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load(config(engine_args="hf_S3CR3T"))
    assert "S3CR3T" not in str(caught.value) + repr(caught.value)


class TrussSecrets(Mapping[str, str]):
    """Like Truss's: look-up only."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> str:
        if key not in self._values:
            raise RuntimeError("not found")  # Truss's SecretNotFound is no KeyError
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._values)


def test_secrets_come_by_name_and_stay_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BASETEN_API_KEY", "S3CR3T-api")
    loaded = Settings.load(config(), secrets=TrussSecrets({"hf_access_token": "S3CR3T-hf\n"}))
    assert loaded.hf_token is not None
    assert loaded.hf_token.value == "S3CR3T-hf"
    assert loaded.api_key is not None
    assert "S3CR3T" not in repr(loaded)


def test_a_mounted_secret_wins_over_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "hf_access_token").write_text("mounted\n")
    monkeypatch.setenv("TRUSS_SECRET_hf_access_token", "variable")
    token = Settings.load(config()).hf_token
    assert token is not None
    assert token.value == "mounted"


def test_no_url_or_argument_in_repr() -> None:
    loaded = Settings.load(
        config(artifacts=["https://h/l?sig=S3CR3T"], engine_args={"hf_token": "S3CR3T"})
    )
    assert "S3CR3T" not in repr(loaded)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (None, "artifact_references"),
        ({}, "artifact_references"),
        ([], "mapping"),
        ({"artifact_references": []}, "artifact_references"),
        ({"artifact_references": [{"training_job_id": "j", "paths": []}]}, "paths"),
        ({"artifact_references": [{"training_job_id": "j"}]}, "paths"),
        ({"artifact_references": [{"training_job_id": "../j", "paths": ["a"]}]}, "job id"),
        ({"artifact_references": [{"training_job_id": "j", "paths": [""]}]}, r"paths\[0\]"),
        ({"artifact_references": ["j"]}, "training_job_id"),
        ({"artifact_references": REFERENCES, "download_folder": 5}, "download_folder"),
        ({"loops_checkpoint_ids": "x"}, "loops_checkpoint_ids"),
        ({"loops_checkpoint_ids": ["../x"]}, r"loops_checkpoint_ids\[0\]"),
        ({"loops_checkpoint_ids": ["x"], "artifact_references": REFERENCES}, "excludes"),
    ],
)
def test_training_checkpoints_that_are_wrong(section: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings.load({"training_checkpoints": section})
    assert said.replace("\\", "") in str(caught.value)


def test_loops_checkpoints_are_taken_whole() -> None:
    loaded = Settings.load({"training_checkpoints": {"loops_checkpoint_ids": ["c1", "c2"]}})
    assert loaded.training.artifact_references == (
        ArtifactReference("c1", ("rank-*/",), loops=True),
        ArtifactReference("c2", ("rank-*/",), loops=True),
    )


@pytest.mark.parametrize(
    ("text", "said"), [("a: [1,\nb: {", "line 2"), ("- a\n", "list"), ("", "NoneType")]
)
def test_files_that_are_no_config(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Settings.load(path)
    assert said in str(caught.value)


def test_a_config_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Settings.load(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        Settings.load(tmp_path)


def test_the_readme_has_the_table_of_settings() -> None:
    assert settings_table() in PAGE.read_text(encoding="utf-8")


def test_a_config_may_hold_every_default() -> None:
    defaults = setting_defaults()
    text = yaml.safe_dump(json.loads(json.dumps(config(**defaults))))
    assert Settings.load(yaml.safe_load(text)).concurrency == defaults["concurrency"]


def test_repr_shows_no_secret() -> None:
    url = "https://user:S3CR3T@h/model?X-Amz-Signature=S3CR3T"
    settings = Settings.without_config(
        {"base_model": url, "s3_endpoint_url": url, "api_url": url, "artifacts": [url]}
    )
    assert "S3CR3T" not in repr(settings)
    assert "base_model='https://h/model?…" in repr(settings)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "a: 2025-99-99",
        "a: " + "9" * 5000,
        "a: \ud7ff\x00",
        "- a\n- &b [*b]",
        "? [a]\n: b",
    ],
)
def test_yaml_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        Settings.load(path)
