"""Chat, samples and merged models stop at the token with which training closed its answers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from data.dialogues.conversation import Turn
from data.errors import UserError
from loop.adapters import merge
from loop.adapters.adapter import read_adapter
from loop.adapters.chat import ChatConfig, load_speaker, read_tools
from tests.conftest import trainer
from tests.support.chat_templates import CASES, LOOKUP, tokenizer_with

Train = Callable[..., Path]


@pytest.fixture(scope="module")
def other_end(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base that ends with <|endoftext|>, and whose template closes with <|im_end|>."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": end}))
    GenerationConfig(eos_token_id=end).save_pretrained(folder)
    return folder


def test_generation_stops_at_what_training_closed_with(
    other_end: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = trainer(other_end, tmp_path)("run")
    output = capsys.readouterr().out
    assert "answers trained incl. EOS ('<|im_end|>')" in output
    note = "note: answers end with '<|im_end|>', but the model's eos_token_id is '<|endoftext|>'"
    assert note in output
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    both = {tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")}
    assert read_adapter(adapter).end_ids == both

    speaker = load_speaker(ChatConfig(adapter=(str(adapter),), max_new_tokens=3))
    asked: list[Any] = []
    generate = speaker.model.generate

    def watched(**how: Any) -> Any:
        asked.append(how["eos_token_id"])
        return generate(**how)

    speaker.model.generate = watched
    speaker.answer((Turn("user", "Hi"),))
    assert {*asked[0]} == both

    merge.main(["--adapter", str(adapter), "--prompts", "0"])
    written = GenerationConfig.from_pretrained(tmp_path / "run-merged")
    assert {*written.eos_token_id} == both


def test_a_base_that_ends_like_its_template_gets_no_note(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer(tiny_model, tmp_path)("run")
    assert "note: answers end" not in capsys.readouterr().out


def test_chat_shows_the_tools_of_a_file_to_the_template(
    chat_tokenizer: Any, tiny_model: Path, tmp_path: Path
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CASES["rewrites"].text)
    adapter = trainer(tiny_model, tmp_path)("run", "--chat_template", str(template))
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([LOOKUP]))
    how = {"adapter": (str(adapter),), "max_new_tokens": 3}
    speaker = load_speaker(ChatConfig(**how, tools=str(tools)))
    seen: list[Any] = []
    generate = speaker.model.generate

    def watched(**inputs: Any) -> Any:
        seen.append(inputs["input_ids"][0].tolist())
        return generate(**inputs)

    speaker.model.generate = watched
    speaker.answer((Turn("user", "Hi"),))
    expected = tokenizer_with(chat_tokenizer, CASES["rewrites"].text).apply_chat_template(
        [{"role": "user", "content": "Hi"}], [LOOKUP], add_generation_prompt=True, tokenize=False
    )
    tokenizer = speaker.adapters[speaker.first].tokenizer
    assert tokenizer.decode(seen[0]) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "found no tool"), ("[1]", "expected a list of objects")],
)
def test_an_invalid_file_of_tools_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tools.json"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        read_tools(file)
