"""A Truss folder, written whole or not at all.

::

    <output>/
        config.yaml     for people: every choice with its reason beside it
        data/*.json     the listings, where they were files
        data/*.whl      podloader itself
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from loader.config.settings import Settings
from loader.config.truss_config import DOWNLOAD_FOLDER
from loader.errors import ConfigError, DiskError
from loader.scaffold.deployment import DRAIN_S, ENDPOINTS, PORT, Deployment, Task
from loader.scaffold.wheel import AUDIO, INSTALL, REQUIREMENTS, write_wheel
from loader.serve.vllm.releases import IMAGE
from loader.stores.registry import is_remote
from loader.types import Kind

_STARTUP_S = 3000  # the most that the platform takes
_WIDTH = 96
_EXAMPLES: Mapping[Task, dict[str, object]] = {
    "chat": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64},
    "embeddings": {"input": ["Hello"]},
    "transcription": {},
}


def write_truss(
    deployment: Deployment, sources: Sequence[str], output: Path, *, overwrite: bool = False
) -> None:
    """Write the Truss of *deployment* into *output*; a folder there is replaced if asked to.

    ``sources`` are where its listings come from: files go along, the rest is named in the config.

    Raises:
        ConfigError: *output* is there, or a source cannot be kept in a config.
        DiskError: the disk refused.
    """
    check_output(output, overwrite)
    listings = _listings(sources)
    text = render(deployment, tuple(listings.values()))
    Settings.load(yaml.safe_load(text))  # what podloader itself would refuse is never written
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise _refused(output, error) from None
    try:
        _fill(made, text, listings)
        _publish(made, output)
    except OSError as error:
        raise _refused(output, error) from None
    finally:
        shutil.rmtree(made, ignore_errors=True)


def render(deployment: Deployment, artifacts: Sequence[str]) -> str:
    """Return the config.yaml. The same deployment gives the same text."""
    d = deployment
    needs = [*REQUIREMENTS, *(AUDIO if d.task == "transcription" else ())]
    metadata: dict[str, object] = {"example_model_input": _example(d)} if _EXAMPLES[d.task] else {}
    parts = [
        _comment(_heading(d)),
        _section("model_name", d.model_name),
        _section("base_image", {"image": IMAGE}),
        _comment(["Beside what the image has; podloader itself comes along in data/."]),
        _section("requirements", needs),
        _section("build_commands", [INSTALL]),
        _comment(["The memory of one GPU:", *d.placement.calculation]),
        _section("resources", {"accelerator": d.placement.accelerator, "use_gpu": True}),
        _section("training_checkpoints", _checkpoints(d)),
        _section("model_metadata", metadata | {"podloader": _podloader(d, artifacts)}),
        _comment(["podloader prepares, then becomes", "", *_command(d)]),
        _section("docker_server", _docker_server(d)),
        _comment(["Until the download is over and the engine up, /health answers 503."]),
        _section("runtime", {"health_checks": {"startup_threshold_seconds": _STARTUP_S}}),
    ]
    if d.environment:
        parts.append(_section("environment_variables", dict(d.environment)))
    if d.secrets:
        parts.append(_comment(["Names only: the values are kept by the platform."]))
        parts.append(_section("secrets", dict.fromkeys((s.name for s in d.secrets), None)))
    return "\n".join(parts)


def start_command(deployment: Deployment) -> str:
    """Return what the container runs: exec keeps signals and exit codes."""
    exports = [
        f'export {s.variable}="$(cat /secrets/{s.name})"'
        for s in deployment.secrets
        if s.variable is not None
    ]
    serve = f"exec podloader serve config.yaml -- --port {PORT}"
    return f"sh -c {shlex.quote(' && '.join(['cd /app', *exports, serve]))}"


def _heading(d: Deployment) -> list[str]:
    kinds = {Kind.ADAPTER: "adapter", Kind.WHISPER: "Whisper model", Kind.FULL: "model"}
    lines = [
        f"{kinds.get(f.kind, f'model in shards ({f.kind.value})')}: {f.path}" for f in d.chosen
    ]
    if d.base_model:
        lines.append(f"over {d.base_model}")
    names = [*d.adapters, d.served_model_name]
    lines.append(f"requests call it {', '.join(names)}")
    return [*lines, "", "Made by `podloader truss init`; every line can be edited."]


def _example(d: Deployment) -> dict[str, object]:
    return {"model": (*d.adapters, d.served_model_name)[0], **_EXAMPLES[d.task]}


def _checkpoints(d: Deployment) -> dict[str, object]:
    jobs: dict[str, list[str]] = {}
    for found in d.chosen:
        jobs.setdefault(found.job, []).extend(found.patterns)
    return {
        "download_folder": DOWNLOAD_FOLDER,
        "artifact_references": [
            {"training_job_id": job, "paths": paths} for job, paths in jobs.items()
        ],
    }


def _podloader(d: Deployment, artifacts: Sequence[str]) -> dict[str, object]:
    section: dict[str, object] = {"artifacts": list(artifacts)}
    if d.base_model:
        section["base_model"] = d.base_model
    if d.adapter_policy:
        section["adapter_policy"] = d.adapter_policy
    section["served_model_name"] = d.served_model_name
    section["engine_args"] = dict(d.engine_args)
    section["drain_timeout_s"] = DRAIN_S
    return section


def _command(d: Deployment) -> list[str]:
    words = ["vllm", "serve", *d.command]
    lines: list[str] = []
    for word in map(shlex.quote, words):
        fits = lines and len(lines[-1]) + len(word) < _WIDTH - 8
        if fits and not word.startswith("--"):
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}" if lines else word)
    return [f"  {line}" for line in lines]


def _docker_server(d: Deployment) -> dict[str, object]:
    return {
        "start_command": start_command(d),
        "server_port": PORT,
        "predict_endpoint": ENDPOINTS[d.task],
        "readiness_endpoint": "/health",
        "liveness_endpoint": "/health",
    }


def _section(name: str, value: object) -> str:
    return yaml.safe_dump({name: value}, sort_keys=False, width=10_000, allow_unicode=True)


def _comment(lines: Sequence[str]) -> str:
    return textwrap.indent("\n".join(lines), "# ", lambda line: True).replace("# \n", "#\n")


def _listings(sources: Sequence[str]) -> dict[str, str]:
    """Return each source, and what the config calls it: a file in data/, or the source itself."""
    named: dict[str, str] = {}
    for source in sources:
        if Path(source).is_file():
            stem, number = Path(source).stem, 1
            name = f"data/{stem}.json"
            while name in named.values():
                number += 1
                name = f"data/{stem}-{number}.json"
            named[source] = name
        elif not is_remote(source) or source.lower().startswith("file:"):
            raise ConfigError(
                "a folder of this machine, which no pod has",
                where=source,
                expected="a listing's file, which goes into the Truss, or a source that a pod can "
                "reach: s3://…, baseten, or an fsspec URL",
                next_step="give one of them with --artifacts",
            )
        elif "?" in source and source.startswith(("http://", "https://")):
            raise ConfigError(
                "a signed URL of a listing would end soon, and a config is no place for one",
                where=source,
                next_step="save the listing as a file and give that with --artifacts",
            )
        else:
            named[source] = source
    return named


def check_output(output: Path, overwrite: bool) -> None:
    """Raise ConfigError where *output* is there, and may not be replaced."""
    if not output.exists():
        return
    empty = output.is_dir() and not any(output.iterdir())
    if empty or (overwrite and (output / "config.yaml").is_file()):
        return
    raise ConfigError(
        "the output folder is there already",
        where=str(output),
        got="a folder without a config.yaml" if overwrite else "",
        next_step="choose another folder" if overwrite else "add --overwrite to replace it",
    )


def _fill(folder: Path, text: str, listings: Mapping[str, str]) -> None:
    folder.chmod(0o755)
    for source, name in listings.items():
        if name != source:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, folder / name)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    write_wheel(folder / "data")


def _publish(made: Path, output: Path) -> None:
    """Put *made* in the place of *output*; what was there goes last."""
    if not output.exists():
        made.rename(output)
        return
    old = made.with_name(f"{made.name}-old")
    output.rename(old)
    try:
        made.rename(output)
    except OSError:
        old.rename(output)
        raise
    shutil.rmtree(old)


def _refused(output: Path, error: OSError) -> DiskError:
    return DiskError(
        "the Truss could not be written",
        where=str(output),
        got=os.strerror(error.errno) if error.errno else str(error),
        next_step="choose a folder that can be written",
    )
