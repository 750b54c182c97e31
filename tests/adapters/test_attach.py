"""Attaching: names, the decision, and what is checked before an engine sees an adapter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from loader.adapters.attach import NamedAdapter, attach, check_all, decide, name_adapters
from loader.adapters.merge import WeightedAdapter, merge
from loader.adapters.plan_builder import Base
from loader.errors import AdapterError, FormatError
from loader.weights.stored import find_weight_files, list_tensors
from tests.models import tiny_llama, tiny_tokenizer, train_or_draw_lora


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("base"))


def draw(base: Path, folder: Path, **lora: Any) -> NamedAdapter:
    return NamedAdapter(folder.name, train_or_draw_lora(base, folder, **lora))


def edit_tensors(adapter: NamedAdapter, **changes: torch.Tensor | None) -> None:
    """Replace or, with None, drop tensors of the first layer: "q_A" is q_proj.lora_A."""
    path = adapter.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        module, _, side = key.partition("_")
        name = f"base_model.model.model.layers.0.self_attn.{module}_proj.lora_{side}.weight"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)


def names(*folders: tuple[str, str]) -> list[str]:
    return [a.name for a in name_adapters([(job, Path(path)) for job, path in folders])]


def test_names() -> None:
    assert names(("j1", "/d/j1/rank-0/checkpoint-10")) == ["j1"]
    both = names(("j1", "/d/j1/rank-0/checkpoint-10"), ("j1", "/d/j1/rank-0/checkpoint-20"))
    assert both == ["j1-checkpoint-10", "j1-checkpoint-20"]
    assert names(("j1", "/d/j1/rank-0/a"), ("j2", "/d/j2/rank-0/a")) == ["j1", "j2"]


def test_names_never_collide() -> None:
    ranks = names(("j", "/d/j/rank-0/c"), ("j", "/d/j/rank-1/c"))
    assert ranks == ["j-rank-0-c", "j-rank-1-c"]
    runs = names(("j", "/d/a/c"), ("j", "/d/b/c"), ("j", "/d/b/e"))
    assert runs == ["j-a-c", "j-b-c", "j-e"]
    assert len(set(names(("a", "/b-c"), ("a", "/x"), ("a-b", "/c"), ("a-b", "/d")))) == 4
    spaced = names(("j", "/d/with space/é"), ("j", "/d/x"))
    assert all(c.isascii() and c != " " and c != "/" for name in spaced for c in name)


def test_ranks_and_no_writing(base: Path, tmp_path: Path) -> None:
    one = draw(base, tmp_path / "one", r=4)
    two = draw(base, tmp_path / "two", r=2, rank_pattern={"layers.1.*q_proj": 20})
    ready = attach(base, [one, two], tmp_path / "out")
    assert ready.path == ready.tokenizer == base
    assert ready.max_lora_rank == 32
    assert [(a.name, a.path, a.rank) for a in ready.adapters] == [
        ("one", one.folder, 4),
        ("two", two.folder, 20),
    ]
    assert not (tmp_path / "out").exists()
    assert attach(base, [one], tmp_path / "out").max_lora_rank == 8


@pytest.mark.parametrize(
    ("lora", "mode"),
    [
        ({}, "attach"),
        ({"use_rslora": True, "rank_pattern": {"q_proj": 2}}, "attach"),
        ({"target_modules": ["embed_tokens", "lm_head"]}, "attach"),
        ({"use_dora": True}, "merge"),
        ({"bias": "all"}, "attach"),  # this base has no biases, yet vLLM reads the config
        ({"modules_to_save": ["lm_head"]}, "merge"),
        ({"trainable_token_indices": [1]}, "merge"),
    ],
)
def test_auto(base: Path, tmp_path: Path, lora: dict[str, Any], mode: str) -> None:
    mode = "merge" if "bias" in lora else mode
    adapter = draw(base, tmp_path / "a", **lora)
    decision = decide("auto", [adapter])
    assert decision.mode == mode
    assert "\n" not in decision.why
    if mode == "attach":
        attach(base, [adapter], tmp_path / "out")


def test_auto_merges_resized_embeddings(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a")
    path = adapter.folder / "adapter_model.safetensors"
    extra = {"base_model.model.model.embed_tokens.weight": torch.ones(400, 128)}
    save_file(load_file(path) | extra, path)
    assert decide("auto", [adapter]).mode == "merge"


def test_decisions_that_cannot_be_honoured(base: Path, tmp_path: Path) -> None:
    plain, dora = draw(base, tmp_path / "p"), draw(base, tmp_path / "d", use_dora=True)
    assert decide("auto", [plain, plain]).mode == "attach"
    assert decide("merge", [plain]).mode == "merge"
    assert decide("auto", [plain], base_is_fetched=True).mode == "merge"
    assert decide("attach", [plain], base_is_fetched=True).mode == "attach"
    assert decide("auto", [plain, plain], base_is_fetched=True).mode == "attach"
    for policy, adapters in (
        ("auto", [plain, dora]),
        ("attach", [dora]),
        ("attach", [plain, dora]),
        ("merge", [plain, plain]),
    ):
        with pytest.raises(AdapterError) as error:
            decide(policy, adapters)  # type: ignore[arg-type]
        assert error.value.problems
        assert error.value.next_step


def test_everything_that_does_not_fit_is_listed(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a")
    edit_tensors(adapter, q_A=torch.ones(4, 99), k_A=torch.ones(4, 128), v_B=torch.ones(64, 3))
    with pytest.raises(AdapterError, match="does not fit its base") as error:
        attach(base, [adapter], tmp_path / "out")
    text = "\n".join(error.value.problems)
    assert "layers.0.self_attn.q_proj.lora_A.weight" in text
    assert "(128, 99), the base has (128, 128)" in text
    assert "lora_B of model.layers.0.self_attn.k_proj is missing" in text
    assert "ranks 4 and 3, the config says 4" in text
    assert len(error.value.problems) == 3


def test_everything_wrong_with_all_adapters_is_listed(base: Path, tmp_path: Path) -> None:
    """Misfits and empty tensors, of one adapter and of another."""
    one, two, good = (draw(base, tmp_path / name) for name in ("one", "two", "good"))
    edit_tensors(one, q_A=torch.ones(4, 99), v_B=torch.zeros(64, 0))
    edit_tensors(two, k_A=torch.ones(4, 128))
    with pytest.raises(AdapterError, match="does not fit its base") as error:
        attach(base, [one, good, two], tmp_path / "out")
    text = "\n".join(error.value.problems)
    for part in ("one", "q_proj.lora_A", "v_proj.lora_B.weight: empty", "two", "k_proj"):
        assert part in text
    assert "good" not in text
    assert "change nothing" in error.value.what


def test_everything_wrong_with_all_files_is_listed(base: Path, tmp_path: Path) -> None:
    """One adapter lacks its config, one was cut short, one does not fit."""
    none, short, misfit, good = (draw(base, tmp_path / n) for n in ("none", "short", "misfit", "g"))
    path = short.folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    edit_tensors(misfit, k_A=torch.ones(4, 128))
    with pytest.raises(AdapterError) as error:
        attach(base, [misfit, short, good], tmp_path / "out")
    assert len(error.value.problems) == 2
    assert all(name in "\n".join(error.value.problems) for name in ("short", "k_proj"))
    (none.folder / "adapter_config.json").unlink()
    with pytest.raises(AdapterError) as error:
        decide("auto", [none, short, good])
    text = "\n".join(error.value.problems)
    assert "missing adapter_config.json" in text
    assert "short" in text
    with pytest.raises(AdapterError, match="missing"):
        merge(base, [WeightedAdapter(a.folder) for a in (none, good)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_modules_that_the_base_lacks(base: Path, tmp_path: Path) -> None:
    deep = tiny_llama(tmp_path / "deep", num_hidden_layers=4, tokenizer=False)
    with pytest.raises(AdapterError) as error:
        attach(base, [draw(deep, tmp_path / "a")], tmp_path / "out")
    assert sum("the base has no model.layers" in p for p in error.value.problems) == 4
    assert str(deep) in error.value.next_step


def test_rank_that_disagrees_with_the_tensors(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a", r=4)
    path = adapter.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 16}))
    with pytest.raises(AdapterError) as error:
        attach(base, [adapter], tmp_path / "out")
    assert all("the config says 16" in p for p in error.value.problems)


def test_adapters_without_effect(base: Path, tmp_path: Path) -> None:
    empty = draw(base, tmp_path / "empty")
    edit_tensors(empty, q_A=torch.zeros(0), q_B=torch.zeros(0))
    with pytest.raises(AdapterError, match="fit its base") as error:
        attach(base, [empty], tmp_path / "out")
    assert "not gathered" in error.value.problems[0]
    none = draw(base, tmp_path / "none")
    save_file({}, none.folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="change nothing"):
        attach(base, [none], tmp_path / "out")


def test_embeddings_of_its_own(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a", target_modules=["embed_tokens"])
    attach(base, [adapter], tmp_path / "out")
    path = adapter.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][7] += 1
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="embeddings of its own"):
        attach(base, [adapter], tmp_path / "out")


def test_broken_files(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a")
    path = adapter.folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(FormatError):
        attach(base, [adapter], tmp_path / "out")
    path.unlink()
    with pytest.raises(FormatError, match="no weights"):
        attach(base, [adapter], tmp_path / "out")
    with pytest.raises(AdapterError, match="base model is missing"):
        attach(tmp_path / "nowhere", [adapter], tmp_path / "out")


def test_pickled_adapter(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a", safe_serialization=False)
    with pytest.raises(FormatError, match="pickle"):
        attach(base, [adapter], tmp_path / "out")
    path = adapter.folder / "adapter_model.bin"
    for _ in range(2):  # what an earlier run made is made anew
        (served,) = attach(base, [adapter], tmp_path / "out", allow_pickle=True).adapters
        assert served.path != adapter.folder
        assert not list(served.path.glob("*.bin"))
        ours, theirs = load_file(served.path / "adapter_model.safetensors"), torch.load(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (served.path / "adapter_config.json").is_file()
    prefix = "base_model.model.model.layers.0.self_attn"
    wrong = {
        f"{prefix}.q_proj.lora_A.weight": torch.ones(4, 99),
        f"{prefix}.v_proj.lora_B.weight": torch.zeros(64, 0),
    }
    torch.save(torch.load(path) | wrong, path)
    with pytest.raises(AdapterError, match=r"does not fit .*; .* change nothing") as error:
        attach(base, [adapter], tmp_path / "out", allow_pickle=True)
    assert error.value.where == str(adapter.folder)


def test_embeddings_of_its_own_in_a_pickle(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a", target_modules=["embed_tokens"], safe_serialization=False)
    assert attach(base, [adapter], tmp_path / "out", allow_pickle=True).adapters
    path = adapter.folder / "adapter_model.bin"
    tensors = torch.load(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][7] += 1
    torch.save(tensors, path)
    with pytest.raises(AdapterError, match="embeddings of its own"):
        attach(base, [adapter], tmp_path / "out", allow_pickle=True)


def test_tokenizer_of_the_adapter_wins(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a")
    tiny_tokenizer(adapter.folder, extra_tokens=["<|tool|>"], chat_template="tuned")
    ready = attach(base, [adapter], tmp_path / "out")
    assert ready.tokenizer == tmp_path / "out"
    tokenizer = AutoTokenizer.from_pretrained(ready.tokenizer)
    assert tokenizer.chat_template == "tuned"
    assert "<|tool|>" in tokenizer.get_vocab()


def test_chat_template_alone(base: Path, tmp_path: Path) -> None:
    adapter = draw(base, tmp_path / "a")
    (adapter.folder / "chat_template.jinja").write_text("tuned")
    ready = attach(base, [adapter], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(ready.tokenizer)
    assert tokenizer.chat_template == "tuned"
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(base))


def test_adapters_must_agree_on_the_tokenizer(base: Path, tmp_path: Path) -> None:
    adapters = [draw(base, tmp_path / name) for name in "abc"]
    for adapter, template in zip(adapters, ("x", "x", "y"), strict=True):
        tiny_tokenizer(adapter.folder, chat_template=template)
    attach(base, adapters[:2], tmp_path / "out")
    with pytest.raises(AdapterError, match="different chat templates") as error:
        attach(base, adapters, tmp_path / "out")
    assert str(adapters[2].folder) in error.value.problems


def test_torch_stays_out() -> None:
    code = "import sys, loader.adapters.attach; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_takes_transformers_is_not_asked_before_the_download(
    base: Path, tmp_path: Path
) -> None:
    plain = draw(base, tmp_path / "plain")
    head = draw(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    tensors = {n: t.info for n, t in list_tensors(find_weight_files(base)).items()}
    view = Base(tensors, json.loads((base / "config.json").read_text()), quick=True)
    assert check_all([plain], view)
    assert not check_all([plain, head], view)
    edit_tensors(plain, q_A=torch.ones(4, 99))
    with pytest.raises(AdapterError, match="does not fit"):
        check_all([plain, head], view)
