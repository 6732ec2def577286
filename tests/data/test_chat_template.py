"""--chat_template replaces the model's chat template."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data.errors import UserError
from loop.adapters.chat import ChatConfig, load_speaker
from loop.checkpoint.run_folder import is_finished
from loop.config.flags import Config
from loop.config.load import read_config
from loop.inputs.training_data import read_training_data
from tests.conftest import trainer
from tests.support.helpers import log_of, write_dialogues

OWN = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>me:
{{ m.content }}<|im_end|>{% endgeneration %}{% else %}<|im_start|>you: {{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>me:
{% endif %}"""
DATED = "{{ strftime_now('%d %b %Y') }}\n" + OWN
Train = Callable[..., Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_dialogues(tmp_path / "data.json", ["Hello there.", "Hi."], ["And?", "Well."])


@pytest.fixture
def own(tmp_path: Path) -> Path:
    file = tmp_path / "own.jinja"
    file.write_text(OWN)
    return file


def texts(model: Path, data: Path, template: Path) -> list[str]:
    prepared = read_training_data(
        Config(str(model), data_path=(str(data),), chat_template=str(template))
    )
    supervised = [[i for i in one.labels if i >= 0] for one in prepared.examples]
    for ids in supervised:
        assert ids
    decoded: list[str] = prepared.base.tokenizer.batch_decode(
        [one.input_ids for one in prepared.examples]
    )
    answers = prepared.base.tokenizer.batch_decode(supervised)
    assert answers == ["Hi.<|im_end|>", "Well.<|im_end|>"]
    return decoded


def test_a_template_file_renders_and_its_answers_are_supervised(
    tiny_model: Path, data: Path, own: Path
) -> None:
    found = texts(tiny_model, data, own)
    assert found[0] == "<|im_start|>you: Hello there.<|im_end|>\n<|im_start|>me:\nHi.<|im_end|>"


def test_a_template_with_the_date_gives_the_same_ids_on_any_day(
    tiny_model: Path, data: Path, own: Path
) -> None:
    own.write_text(DATED)
    assert texts(tiny_model, data, own)[0].startswith("26 Jul 2024\n<|im_start|>you: Hello")


def test_the_template_is_saved_with_the_adapter_and_identifies_the_run(
    tiny_model: Path, data: Path, own: Path, tmp_path: Path
) -> None:
    flags = ("--data_path", data, "--chat_template", own, "--save_steps", "2")
    train = trainer(tiny_model, tmp_path)
    folder = train("run", *flags)
    assert len(log_of(folder)) > 1
    speaker = load_speaker(ChatConfig(adapter=(str(folder),), max_new_tokens=4))
    assert speaker.adapters[speaker.first].tokenizer.chat_template == OWN
    again = ["--config", str(folder / "training_config.yaml")]
    assert is_finished(read_config(again, Config))
    moved = own.rename(tmp_path / "moved.jinja")
    assert is_finished(read_config([*again, "--chat_template", str(moved)], Config))
    moved.write_text(DATED)
    with pytest.raises(UserError, match="chat_template_sha256 was"):
        is_finished(read_config([*again, "--chat_template", str(moved)], Config))
    with pytest.raises(UserError, match="template was chat"):
        train(
            *("other", "--resume_from_checkpoint", folder / "checkpoint-2"),
            *(*flags, "--chat_template", moved),
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "own.jinja: cannot be read: No such file"),
        ("", "it is empty; expected a Jinja template"),
        ("{% for m in messages %}", "line 1: not valid Jinja"),
        ("a\n{{ m. }}", "line 2: not valid Jinja"),
        (b"\xff\xfe", "not UTF-8"),
        ("{{ raise_exception('No.') }}", "fails with TemplateError: No"),
        ("{{ messages[0].content }}", r"does not show turn 1 \(assistant\)"),
        ("{{ messages[0].nothing.at_all }}", "fails with UndefinedError"),
    ],
)
def test_an_invalid_template_is_refused(
    text: str | bytes | None, message: str, tiny_model: Path, data: Path, own: Path
) -> None:
    own.unlink()
    if text is not None:
        own.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        texts(tiny_model, data, own)


def test_a_template_file_that_nothing_uses_is_refused(
    tiny_model: Path, data: Path, own: Path
) -> None:
    config = Config(
        str(tiny_model), data_path=(str(data),), template="vicuna", chat_template=str(own)
    )
    with pytest.raises(UserError, match=r"found --template vicuna, which does not use it"):
        read_training_data(config)
