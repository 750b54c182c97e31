"""What an archive of kernels is asked for by."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader.serve import machine
from loader.serve.vllm import kernel_facts
from loader.serve.vllm.kernel_facts import (
    facts_name,
    image_facts,
    machine_facts,
    relevant_arguments,
)

_CPU = "processor\t: 0\nflags\t\t: {}\n\nprocessor\t: 1\nflags\t\t: other\n"


def test_arguments_of_the_door_do_not_matter() -> None:
    outside = "--host 0.0.0.0 --port 80 --api-key s3cr3t t2 --served_model_name a b --ssl-keyfile k"
    outside += " --disable-uvicorn-access-log --enable-log-requests --no-enable-log-requests"
    outside += " --lora-modules {} --chat-template x --enable-auto-tool-choice --hf-token=s3cr3t"
    assert relevant_arguments(outside.split()) == []


def test_others_do() -> None:
    words = ["--max_model_len", "256", "-tp=2", "--no-enable-prefix-caching", "--compile", "{a: 1}"]
    found = relevant_arguments(["--port", "1", *words])
    assert found == ["max-model-len=256", "tp=2", "no-enable-prefix-caching=", "compile={a: 1}"]


def test_their_order_does_not_matter() -> None:
    one, other = ["--dtype", "half", "-tp", "2"], ["-tp", "2", "--dtype", "half"]
    assert image_facts(one) == image_facts(other) != image_facts(["--dtype", "half"])


def test_an_images_packages_are_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "site-packages"
    folder.mkdir()
    before = image_facts([])
    monkeypatch.syspath_prepend(str(folder))
    assert image_facts([]) == before
    (folder / "torch-9.9.dist-info").mkdir()
    assert image_facts([]) != before


def test_the_processors_instructions_are_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "cpuinfo"
    monkeypatch.setattr(kernel_facts, "_CPUINFO", told)
    names = []
    for flags in ("fpu avx2", "avx2 fpu", "fpu avx2 avx512f"):
        told.write_text(_CPU.format(flags))
        names.append(facts_name(machine_facts()))
    assert names[0] == names[1] != names[2]


def test_gpus_and_their_driver_are_in_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    row = "{}, GPU-{}, NVIDIA H100, 9.0, {}"
    found = []
    for rows in (
        [row.format(0, "a", "550")],
        [row.format(0, "b", "550"), row.format(1, "c", "550")],
        [row.format(0, "a", "560")],
    ):
        program.write_text("#!/bin/sh\ncat <<END\n" + "\n".join(rows) + "\nEND\n")
        program.chmod(0o755)
        assert machine.query_gpus("name")
        found.append(machine_facts()["gpus"])
    assert found[0] == found[1] == [["NVIDIA H100", "9.0", "550"]] != found[2]


def test_amds_are_told_by_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for node, target in enumerate((0, 90402)):
        (tmp_path / str(node)).mkdir()
        (tmp_path / str(node) / "properties").write_text(f"a 1\ngfx_target_version {target}\n")
    (tmp_path / "version").write_text("6.10\n")
    monkeypatch.setattr(kernel_facts, "_AMD_NODES", tmp_path)
    monkeypatch.setattr(kernel_facts, "_AMD_DRIVER", tmp_path / "version")
    assert machine_facts()["gpus"] == ["90402", "6.10"]
