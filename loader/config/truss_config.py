"""What of a Truss ``config.yaml`` is Truss's: the document and its ``training_checkpoints``.

Truss keeps unknown keys in the pod, so nothing is refused here for being unknown.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loader.config.paths import suggest_path
from loader.errors import ConfigError
from loader.types import JOB_ID, ArtifactReference, TrainingCheckpoints

_MOST_BYTES = 16 << 20
DOWNLOAD_FOLDER = "/tmp/training_checkpoints"  # the default of Truss's CheckpointList


def read_config(config: Path | str | Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return what to call the config in messages, and its document.

    Raises:
        ConfigError: it cannot be read, or is no mapping.
    """
    if isinstance(config, Mapping):
        return "the Truss config", config
    path = Path(config)
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)  # a device has no end
        if len(text) > _MOST_BYTES:
            raise OSError(errno.EFBIG, "more than any config has")
        document = yaml.safe_load(text.decode("utf-8"))
    except RecursionError:
        raise ConfigError(
            "the config is not valid YAML",
            where=str(path),
            got="lists in lists without end",
            next_step="give a Truss config.yaml with training_checkpoints in it",
        ) from None
    except (OSError, ValueError) as error:  # of a date or a number that is none, too
        reason = error.strerror if isinstance(error, OSError) else _text_fault(error)
        raise ConfigError(
            "the config cannot be read",
            where=str(path),
            expected="a Truss config.yaml",
            got=str(reason),
            next_step="give the path of the config.yaml itself"
            if path.exists()
            else suggest_path(path, "give the path of a Truss config.yaml, or of its folder"),
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            "the config is not valid YAML",
            where=f"{path}{_yaml_place(error)}",
            got=str(getattr(error, "problem", None) or "unreadable text"),
            next_step="correct the file at that line",
        ) from None
    if not isinstance(document, dict):
        raise ConfigError(
            "the config is not a mapping",
            where=str(path),
            expected="keys and values, as a Truss config.yaml has them",
            got=type(document).__name__,
            next_step="give a Truss config.yaml with training_checkpoints in it",
        )
    return str(path), document


def _text_fault(error: ValueError) -> str:
    return "not UTF-8 text" if isinstance(error, UnicodeError) else str(error)


def _yaml_place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def mapping_at(document: Mapping[str, Any], dotted: str, where: str) -> Mapping[str, Any]:
    """Return the mapping at *dotted*, empty where there is none."""
    value: object = document
    for depth, key in enumerate(dotted.split(".")):
        value = value.get(key) if isinstance(value, Mapping) else None
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{'.'.join(dotted.split('.')[: depth + 1])} is not a mapping",
                where=where,
                expected="keys and values",
                got=type(value).__name__,
                next_step="write each key on its own line below it",
            )
    assert isinstance(value, Mapping)
    return value


def training_checkpoints(document: Mapping[str, Any], where: str) -> TrainingCheckpoints:
    """Return the section of that name.

    Raises:
        ConfigError: it is missing, or wrong; everything that is wrong is named.
    """
    section = mapping_at(document, "training_checkpoints", where)
    problems: list[str] = []
    references = section.get("artifact_references") or []
    folder = section.get("download_folder", DOWNLOAD_FOLDER)
    if not isinstance(folder, str) or not folder or "\0" in folder:
        problems.append(f"download_folder: expected a path, got {folder!r}")
        folder = DOWNLOAD_FOLDER
    parsed = _loops_references(section.get("loops_checkpoint_ids") or [], problems)
    if parsed and references:
        problems.append("loops_checkpoint_ids excludes artifact_references: give one of them")
    elif not parsed and (not isinstance(references, list) or not references):
        problems.append("artifact_references: expected a list with at least one training job")
        references = []
    parsed += [_reference(i, entry, problems) for i, entry in enumerate(references)]
    if problems:
        raise ConfigError(
            "training_checkpoints is wrong or missing",
            where=where,
            problems=problems,
            next_step="write it as Truss defines it: download_folder, artifact_references",
        )
    return TrainingCheckpoints(Path(folder), tuple(parsed))


def _loops_references(ids: object, problems: list[str]) -> list[ArtifactReference]:
    """Return a reference to everything in each Loops checkpoint."""
    if not isinstance(ids, list):
        problems.append("loops_checkpoint_ids: expected a list of ids")
        return []
    for i, entry in enumerate(ids):
        if not isinstance(entry, str) or not JOB_ID.fullmatch(entry):
            problems.append(f"loops_checkpoint_ids[{i}]: expected an id, got {entry!r}")
    return [ArtifactReference(str(entry), ("rank-*/",), loops=True) for entry in ids]


def _reference(i: int, entry: object, problems: list[str]) -> ArtifactReference:
    at = f"artifact_references[{i}]"
    fields = entry if isinstance(entry, Mapping) else {}
    job, paths = fields.get("training_job_id"), fields.get("paths")
    if not isinstance(job, str) or not JOB_ID.fullmatch(job):
        problems.append(f"{at}.training_job_id: expected a job id, got {job!r}")
    if not isinstance(paths, list) or not paths:
        problems.append(f"{at}.paths: expected a list of patterns that is not empty")
        paths = []
    for j, pattern in enumerate(paths):
        if not isinstance(pattern, str) or not pattern:
            problems.append(f"{at}.paths[{j}]: expected a pattern, got {pattern!r}")
    return ArtifactReference(str(job), tuple(map(str, paths)))
