"""Adapters that cannot be merged are refused, and a wrong merge leaves no files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from data.errors import RunError, Stopped, UserError
from loop.adapters.merge_rules import Change, read_changes
from tests.adapters.test_merge import merged, write_adapter


def rewritten(adapter: Path, **values: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "found peft_type IA3; expected LORA"),
        ({"init_lora_weights": "pissa"}, "found init_lora_weights pissa, which also"),
        ({"alora_invocation_tokens": [1]}, r"found alora_invocation_tokens \[1\], which cannot"),
        ({"layer_replication": [[0, 1]]}, "found layer_replication"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused(
    values: dict[str, Any], message: str, tiny_model: Path, train: Callable[..., Path]
) -> None:
    adapter = train("run")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    read_changes(adapter, model)
    rewritten(adapter, **values)
    with pytest.raises(UserError, match=message):
        read_changes(adapter, model)


def test_a_matrix_that_two_modules_share_is_not_changed_for_one_of_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    base.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.save_pretrained(tmp_path / "base")
    for number, target in enumerate(("lm_head", "embed_tokens")):
        tied = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        adapter = write_adapter(tied, tmp_path / f"a{number}", tokenizer, target_modules=[target])
        with pytest.raises(UserError, match=rf"it changes .*{target}.weight, which other modules"):
            merged(adapter, "--base", tmp_path / "base", "--prompts", "0")
    assert not [*tmp_path.glob("*merged*")]


def test_an_adapter_of_another_base_is_refused(
    tiny_model: Path, chat_tokenizer: Any, tmp_path: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    adapter = write_adapter(base, tmp_path / "adapter", tokenizer, layers_to_transform=[1])
    other = GPT2LMHeadModel(GPT2Config(vocab_size=1000, n_embd=64, n_layer=1, n_head=4))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="which the base model does not have"):
        merged(adapter, "--base", tmp_path / "other")


def test_a_wrong_merge_is_an_error_and_leaves_no_files(
    tiny_model: Path, train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, right = train("run"), Change.of
    # In fp32, the merge is slightly wrong. In bf16, which rounds every weight, nothing is merged.
    wrong = {"fp32": lambda change, tensor: right(change, tensor) * 1.001, "bf16": lambda _, t: t}
    for dtype, change in wrong.items():
        monkeypatch.setattr(Change, "of", change)
        with pytest.raises(RunError, match="differs from the trained one and was deleted"):
            merged(adapter, "--dtype", dtype)
        assert not [*adapter.parent.glob("*merged*")]


def test_a_folder_that_is_not_empty_is_refused(train: Callable[..., Path], tmp_path: Path) -> None:
    adapter = train("run")
    (tmp_path / "run-merged").mkdir()
    (tmp_path / "run-merged" / "mine").touch()
    with pytest.raises(UserError, match=r"it exists and is not empty\. Give a new folder"):
        merged(adapter)


def test_only_a_qlora_adapter_is_merged_into_dequantised_weights(
    train: Callable[..., Path],
) -> None:
    with pytest.raises(UserError, match="found an adapter whose base was not in 4 bits"):
        merged(train("run"), "--base_weights", "dequantised")


def test_the_error_for_a_stopped_runs_folder_names_its_newest_complete_checkpoint(
    train: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(Stopped):
        train("run", "--max_minutes", "1e-6")
    (tmp_path / "run/checkpoint-9").mkdir()
    with pytest.raises(UserError, match=r"Give its newest checkpoint: \S+/run/checkpoint-1$"):
        merged(tmp_path / "run")


def test_merged_weights_have_the_file_mode_of_their_config(train: Callable[..., Path]) -> None:
    folder = merged(train("run"))
    modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1
