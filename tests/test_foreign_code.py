"""Code that lies in a checkpoint does not run, and nobody is asked whether it may."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoConfig, LlamaConfig

from loader.errors import EngineError, UnsupportedError
from loader.serve.transformers import TransformersModel
from loader.serve.vllm.arguments import parse_arguments, serve_arguments
from loader.types import ReadyModel
from loader.weights import meta_models
from loader.weights.formats import expected
from tests.models import tiny_llama

ROOT = Path(__file__).parent.parent
# What makes an object from a folder or a config; each asks on standard input where nothing is said.
MAKERS = {"from_pretrained", "from_config", "get_class_from_dynamic_module", "pipeline", "LLM"}
MAKERS |= {"EngineArgs", "AsyncEngineArgs", "ModelConfig", "get_config", "get_tokenizer"}  # vLLM's
PEFT = {"PeftModel", "PeftConfig"}  # whose loaders know no code in a folder
STARTERS = {"Popen", "run", "check_output", "check_call", "call"}


def calls() -> Iterator[tuple[str, ast.Call]]:
    for folder in (ROOT / "loader", ROOT / "truss_templates"):
        for path in sorted(folder.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def called(node: ast.Call) -> tuple[str, str]:
    """Return the last two names of what is called; ``find("X")(…)`` calls an X of vLLM's."""
    if isinstance(node.func, ast.Call) and node.func.args:
        return "", str(getattr(node.func.args[0], "value", ""))
    if isinstance(node.func, ast.Attribute):
        value = node.func.value
        owner = value.id if isinstance(value, ast.Name) else getattr(value, "attr", "")
        return owner, node.func.attr
    return "", getattr(node.func, "id", "")


def test_every_maker_is_told_whether_code_may_run() -> None:
    seen = 0
    for where, node in calls():
        owner, name = called(node)
        if name in MAKERS and owner not in PEFT:
            seen += 1
            told = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
            assert told, f"{where}: {name} without trust_remote_code"
            # False, or a name that was handed down: never looked up in what was fetched.
            assert isinstance(told[0], ast.Name | ast.Attribute) or (
                isinstance(told[0], ast.Constant) and told[0].value is False
            ), where
    assert seen >= 7


def test_every_child_is_told_what_its_standard_input_is() -> None:
    seen = 0
    for where, node in calls():
        owner, name = called(node)
        if name in STARTERS and owner == "subprocess":
            seen += 1
            assert "stdin" in [k.arg for k in node.keywords], f"{where}: {name} without stdin"
    assert seen >= 3


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A checkpoint with an architecture of its own; its code leaves a file behind."""
    folder = tmp_path / "trap"
    tiny_llama(folder)
    (folder / "own.py").write_text(
        f"open({os.fspath(tmp_path / 'ran')!r}, 'w')\n"
        "from transformers import LlamaConfig as Config, LlamaForCausalLM as Model\n"
    )
    auto = {
        "AutoConfig": "own.Config",
        "AutoModel": "own.Model",
        "AutoModelForCausalLM": "own.Model",
        "AutoTokenizer": ["own.Config", None],
    }
    change(folder, architectures=["Own"], auto_map=auto)
    return folder


def change(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_no_name_of_a_tensor_is_worth_running_code(trap: Path) -> None:
    """Neither here nor in a process that learns. ``clip_text_model`` has no causal model."""
    folders = [trap.parent / name for name in ("own", "clip_text_model", "llama")]
    for folder in folders:
        shutil.copytree(trap, folder)
        change(folder, model_type=folder.name)
    code = (
        "import contextlib, json, sys; from pathlib import Path\n"
        "from loader.errors import UnsupportedError\n"
        "from loader.weights.formats.expected import read_model_names\n"
        "from loader.weights.formats.learning import learning_names\n"
        "from loader.weights.gaps import find_gaps\n"
        "for folder in map(Path, sys.argv[1:]):\n"
        "    with learning_names() as learn, contextlib.suppress(UnsupportedError):\n"
        "        learn(folder)\n"
        "    with contextlib.suppress(UnsupportedError):\n"
        "        read_model_names(folder)\n"
        "    find_gaps(json.loads((folder / 'config.json').read_text()), {'x.weight': (1,)})"
    )
    command = [sys.executable, "-c", code, *map(str, folders)]
    done = subprocess.run(command, input="y\n" * 9, capture_output=True, text=True, check=True)
    assert "y/N" not in done.stdout + done.stderr
    assert not (trap.parent / "ran").exists()


@pytest.mark.parametrize("name", ["pipeline", "AutoModelForCausalLM", "LlamaConfig", "logging"])
def test_an_architecture_is_a_model_of_transformers(name: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change(tmp_path, architectures=[name])
    assert "lm_head.weight" in expected.read_model_names(tmp_path).shapes


@pytest.mark.parametrize(
    "change_to",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 10**400},
        {"num_attention_heads": 10**12},
        {
            "model_type": "mixtral",
            "architectures": ["MixtralForCausalLM"],
            "num_local_experts": 10**8,
        },
    ],
)
def test_no_config_asks_for_work_without_end(change_to: dict[str, object], tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change(tmp_path, **change_to)
    with pytest.raises(UnsupportedError, match="transformers makes no model"):
        expected.read_model_names(tmp_path)


def test_modules_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tmp_path)
    monkeypatch.setattr(meta_models, "_MOST_MODULES", 10)
    with pytest.raises(UnsupportedError) as caught:
        expected.read_model_names(tmp_path)
    assert "more than 10 modules" in caught.value.got


def test_no_config_wishes_for_kernels(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    change(tmp_path, attn_implementation="somebody/kernel", experts_implementation="sonicmoe")
    wish = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert wish._attn_implementation == "somebody/kernel"
    config = meta_models.read_model_config(tmp_path, trust_remote_code=False)
    assert config._attn_implementation is config._experts_implementation is None


def test_transformers_runs_none(trap: Path) -> None:
    change(trap, model_type="own")
    with pytest.raises(EngineError, match="transformers did not load the model"):
        TransformersModel(trap).load()
    assert not (trap.parent / "ran").exists()


def test_transformers_loads_no_kernel(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    change(tmp_path, attn_implementation="somebody/kernel")
    model = TransformersModel(tmp_path)
    model.load()
    assert model.is_healthy()
    model.close()


@pytest.mark.engine
def test_vllm_is_told_too() -> None:
    ready = ReadyModel(Path("m"), (), None, Path("m"), {})
    assert "--no-trust-remote-code" in serve_arguments(ready, {})
    assert parse_arguments(serve_arguments(ready, {})).trust_remote_code is False
    asked = serve_arguments(ready, {}, extra=("--trust-remote-code",))
    assert parse_arguments(asked).trust_remote_code is True  # what a person says stands last
