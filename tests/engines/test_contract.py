"""Each proved release has what podloader uses; what another would lack is told by name."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from loader.serve.vllm.private import IMPORTED, REACHED, SPOKEN, Private
from loader.serve.vllm.releases import PROVED
from tests.engines.contract import TABLES, breaks, read_source, room_files, room_uses
from tests.engines.sources import UnavailableError, sources_of

_OF_PYDANTIC = {"model_copy"}
_TABLES = [*IMPORTED.items(), *REACHED.items()]


def have(release: str) -> Path:
    try:
        return sources_of(release)
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.mark.engine
@pytest.mark.parametrize("release", PROVED)
def test_a_proved_release_has_all_that_is_used(release: str) -> None:
    assert breaks(have(release)) == []


# A file below vllm/, what stands there, what takes its place, what is to be told of it.
_ENTRY, _OPENAI = "entrypoints", "entrypoints/openai"
_CHANGES = [
    (f"{_ENTRY}/common/cli_args.py", "def make_arg_parser", "def make", "make_arg_parser"),
    (f"{_ENTRY}/common/cli_args.py", "class BaseFrontendArgs", "class Base", "BaseFrontendArgs"),
    (f"{_ENTRY}/launchers/app.py", "def build_app", "def make_app", "build_app"),
    (f"{_ENTRY}/launchers/launcher.py", "async def serve_http", "async def serve", "serve_http"),
    (f"{_ENTRY}/launchers/app.py", "    model_config: ModelConfig | None = None,\n", "", "3"),
    (f"{_ENTRY}/serve/__init__.py", "create_error_response", "make", "create_error_response"),
    (f"{_ENTRY}/serve/lora/protocol.py", "lora_path:", "path:", "lora_path"),
    (f"{_OPENAI}/models/serving.py", "static_lora_modules", "loras", "static_lora_modules"),
    (f"{_OPENAI}/models/serving.py", "request: LoadLoRA", "load: LoadLoRA", "other parameters"),
    (f"{_OPENAI}/completion/serving.py", "def create_completion", "def c", "create_completion"),
    (f"{_ENTRY}/generate/api_router.py", "state.openai_serving_chat =", "x =", "serving_chat"),
    ("v1/engine/utils.py", "failed_proc_name", "failed_name", "failed_proc_name"),
    ("v1/engine/utils.py", "= get_mp_context()", "= mp()", "does not call get_mp_context"),
    ("v1/engine/utils.py", '"EngineCore', '"Core', "'EngineCore'"),
    ("v1/engine/core_client.py", "    ctx: ", "    context: ", "ctx"),
    ("v1/engine/async_llm.py", "def remove_lora", "def drop_lora", "remove_lora"),
    (f"{_OPENAI}/models/serving.py", "lora_name: str", "name: str", "other parameters"),
    ("lora/model_manager.py", "def lora_slots", "def slots", "lora_slots"),
    ("utils/counter.py", "def inc", "def add", "inc"),
    ("envs.py", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE", "VLLM_ALIVE", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"),
    (f"{_ENTRY}/common/cli_args.py", "    uds: ", "    path: ", "args.uds"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("file", "is_there", "becomes", "told"), _CHANGES, ids=lambda t: t[:24])
def test_one_change_is_told(file: str, is_there: str, becomes: str, told: str) -> None:
    sources = have(PROVED[-1])
    changed = sources / "vllm" / file
    assert is_there in read_source(changed)

    def read(path: Path) -> str:
        text = read_source(path)
        return text.replace(is_there, becomes) if path == changed else text

    found = breaks(sources, read=read)
    assert any(told in line for line in found), found


@pytest.mark.engine
@pytest.mark.parametrize("name", TABLES)
def test_whatever_is_renamed_is_told(name: str) -> None:
    sources, entry = have(PROVED[-1]), TABLES[name]
    members = entry.members if isinstance(entry, Private) else ()
    words = [name] if name not in REACHED else []
    for word in (*words, *(member.partition("(")[0] for member in members)):
        anywhere = re.compile(rf"\b{word.replace('_', '[-_]')}")  # as an option of the command, too

        def read(path: Path, anywhere: re.Pattern[str] = anywhere) -> str:
            return anywhere.sub("renamed", read_source(path))

        assert breaks(sources, [name], read), word


@pytest.mark.engine
@pytest.mark.parametrize("name", ["serve_http", "EngineArgs", "LoRAModelManager"])
def test_a_module_that_is_gone_is_told(name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(have(PROVED[-1]), tmp_path / "sources"))
    for other in IMPORTED[name].places:
        copy.joinpath(other.replace(".", "/")).with_suffix(".py").unlink(missing_ok=True)
    assert any(name in line for line in breaks(copy))


def test_the_tables_say_all_that_the_room_uses() -> None:
    members = {name: {m.partition("(")[0] for m in entry.members} for name, entry in _TABLES}
    unsaid = [use for use in room_uses() if use.member not in members[use.owner] | _OF_PYDANTIC]
    assert unsaid == []


def test_the_tables_say_no_more_than_the_room_uses() -> None:
    text = "\n".join(path.read_text(encoding="utf-8") for path in room_files())
    words = re.findall(r"\w+", text)
    once = [name for name in IMPORTED if words.count(name) < 2]
    members = {m.partition("(")[0] for _, entry in _TABLES for m in entry.members}
    assert {*once, *(member for member in members if words.count(member) < 2)} <= {"__call__"}


def test_what_vllm_and_podloader_both_say_is_in_its_table() -> None:
    texts = [path.read_text(encoding="utf-8") for path in room_files()]
    said = {word for text in texts for word in re.findall(r'"(VLLM_\w+)"', text)}
    assert said <= SPOKEN.keys() | IMPORTED.keys()
