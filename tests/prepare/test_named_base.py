"""What a checkpoint may call its base model, and what only a person may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from loader.config.settings import Settings
from loader.errors import AdapterError
from loader.prepare.named_base import NamedBase, named_base

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def settings(tmp_path: Path, **own: Any) -> Settings:
    references = [{"training_job_id": "job", "paths": ["*"]}]
    checkpoints = {"download_folder": str(tmp_path / "down"), "artifact_references": references}
    section = {"podloader": own}
    return Settings.load({"training_checkpoints": checkpoints, "model_metadata": section})


def read(name: object, tmp_path: Path, **own: Any) -> NamedBase:
    return named_base({"job/rank-0/a": name}, settings(tmp_path, **own))


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("org/model", NamedBase("org/model")),
        ("gpt2", NamedBase("gpt2")),
        (f"/root/.cache/huggingface/hub/models--org--m-1/snapshots/{COMMIT}", ("org/m-1", COMMIT)),
        (f"/x/models--org--m/snapshots/{COMMIT}/", NamedBase("org/m", COMMIT)),
        (f"models--gpt2/snapshots/{COMMIT}/sub", NamedBase("gpt2", COMMIT)),
        ("/x/models--org--m", NamedBase("org/m")),
    ],
)
def test_the_hub(name: str, base: NamedBase | tuple[str, str], tmp_path: Path) -> None:
    found = read(name, tmp_path)
    assert (found.name, found.revision) == (
        base if isinstance(base, tuple) else (base.name, base.revision)
    )


def test_a_revision_that_a_person_chose_stays(tmp_path: Path) -> None:
    base = NamedBase("org/model", COMMIT)
    assert base.over(settings(tmp_path)).base_revision == COMMIT
    assert base.over(settings(tmp_path, base_revision="main")).base_revision == "main"


@pytest.mark.parametrize(
    "name",
    [
        "http://169.254.169.254/latest/meta-data/",
        "HTTP://[::ffff:169.254.169.254]/",
        "file:///etc",
        "s3://bucket/model",
        "S3:bucket",
        "gs://bucket/model",
        "memory::x",
        "simplecache::s3://b/m",
        "baseten",  # looks like a model's id: asked of the Hub, see below
        "baseten:job",
        "/etc",
        "/",
        "/proc/self/root/etc",
        "..",
        "../..",
        "a/../../etc",
        "~/model",
        "org/model/more",
        "org--x/model",
        "a..b",
        "x" * 97,
        "x" * 5000,
        "/" + "x" * 300,
        "org/mödel",
        "-rf",
        ".",
        "checkpoint:../../etc",
        "checkpoint:job/rank-0/none",
        "/x/models--..--etc/snapshots/" + COMMIT,
        "/x/models--a--b/snapshots/../../../etc",
        "a\0b",
        "org/model\n",
        " org/model",
    ],
)
def test_all_else_is_the_person_s(name: str, tmp_path: Path) -> None:
    if name == "baseten":
        assert read(name, tmp_path) == NamedBase("baseten")
        return
    with pytest.raises(AdapterError, match="only you may choose") as caught:
        read(name, tmp_path)
    assert "set base_model" in caught.value.next_step


@pytest.mark.parametrize("name", [None, "", 7, ["org/model"], {"a": 1}])
def test_none_is_named(name: object, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="do not name one base model"):
        read(name, tmp_path)


def test_folders_below_those_of_the_settings(tmp_path: Path) -> None:
    fetched = tmp_path / "down/job/rank-0/base"
    inside, outside = tmp_path / "models/base", tmp_path / "models-2/base"
    for folder in (fetched, inside, outside):
        folder.mkdir(parents=True)
    assert read("checkpoint:job/rank-0/base/", tmp_path).name == str(fetched)
    assert read(str(fetched), tmp_path).name == str(fetched)
    trusted = {"trusted_folders": [str(tmp_path / "models")]}
    assert read(f"{inside}/", tmp_path, **trusted).name == str(inside)
    (tmp_path / "models/link").symlink_to(outside)
    for name in (outside, tmp_path / "models/link", f"{inside}/../../models-2/base"):
        with pytest.raises(AdapterError, match="only you may choose"):
            read(str(name), tmp_path, **trusted)


def test_an_id_is_no_folder_that_happens_to_lie_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match="only you may choose"):
        read("org/model", tmp_path)


def test_several_names_of_one(tmp_path: Path) -> None:
    in_cache = "/x/models--org--m"
    assert named_base({"a": "org/m", "b": in_cache}, settings(tmp_path)) == NamedBase("org/m")
    with pytest.raises(AdapterError, match="do not name one") as caught:
        named_base({"a": "org/m", "b": "org/n", "c": None})
    assert caught.value.problems == ("a: org/m", "b: org/n", "c: no base_model_name_or_path")
