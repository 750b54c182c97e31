"""Relative paths of a config: from its own folder, wherever a command runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

from loader.config.settings import Settings
from loader.truss.hook import TrussModel


def write_config(folder: Path, **own: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "training_checkpoints": {
            "download_folder": "down",
            "artifact_references": [{"training_job_id": "job1", "paths": ["rank-0/"]}],
        },
        "model_metadata": {"podloader": own},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_from_the_configs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truss = tmp_path / "truss"
    (truss / "models" / "base").mkdir(parents=True)
    config = write_config(
        truss,
        artifacts=["data/listing.json", "s3://bucket/prefix", "baseten:job", "local"],
        base_model="models/base",
        ca_bundle="ca.pem",
        cache_folder="cache",
    )
    monkeypatch.chdir(tmp_path)
    for path in (config, config.relative_to(tmp_path)):
        found = Settings.load(path)
        assert found.artifacts == (
            str(truss / "data/listing.json"),
            "s3://bucket/prefix",
            "baseten:job",
            "local",
        )
        assert found.base_model == str(truss / "models/base")
        assert (found.ca_bundle, found.cache_folder) == (truss / "ca.pem", truss / "cache")
        assert found.training.download_folder == truss / "down"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", "org/model"),
        ("./mistyped", "{folder}/mistyped"),
        ("/abs/model", "/abs/model"),
        ("checkpoint:job1/rank-0/x/", "checkpoint:job1/rank-0/x/"),
    ],
)
def test_what_a_base_may_be(tmp_path: Path, text: str, expected: str) -> None:
    config = write_config(tmp_path, base_model=text)
    assert Settings.load(config).base_model == expected.format(folder=tmp_path)


def test_the_command_line_and_variables_are_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path / "truss", artifacts=["own.json"], ca_bundle="own.pem")
    monkeypatch.setenv("PODLOADER_CA_BUNDLE", "given.pem")
    found = Settings.load(config, overrides={"artifacts": ("given.json",)})
    assert (found.artifacts, found.ca_bundle) == (("given.json",), Path("given.pem"))


def test_the_older_rule_still_finds_files_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_config(tmp_path / "truss", artifacts=["listing.json"])
    (tmp_path / "listing.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.WARNING, "podloader"):
        assert Settings.load(config).artifacts == (str(tmp_path / "listing.json"),)
    assert "write it relative to the config" in caplog.text


def test_in_a_truss_from_the_truss(tmp_path: Path) -> None:
    config = yaml.safe_load(write_config(tmp_path, artifacts=["data/listing.json"]).read_text())
    model = TrussModel(config, data_dir=tmp_path / "data")
    assert model.settings().artifacts == (str(tmp_path / "data/listing.json"),)


def test_a_config_that_is_a_symlink(tmp_path: Path) -> None:
    config = write_config(tmp_path / "truss", artifacts=["data/listing.json"])
    (config.parent / "data").mkdir()
    (config.parent / "data/listing.json").touch()
    link = tmp_path / "other/config.yaml"
    link.parent.mkdir()
    link.symlink_to("../truss/config.yaml")
    assert Settings.load(link).artifacts == (str(config.parent / "data/listing.json"),)
    (link.parent / "data").mkdir()
    (link.parent / "data/listing.json").touch()  # beside the link goes before
    assert Settings.load(link).artifacts == (str(link.parent / "data/listing.json"),)
