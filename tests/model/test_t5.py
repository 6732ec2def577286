"""An encoder-decoder trains in the same loop, and peft loads its adapter with the new tokens."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

from data.batching.collate import collate_pairs
from data.encoding.tokenizer import CHARACTERS
from data.errors import UserError
from loop.adapters.chat import ChatConfig, load_speaker
from loop.checkpoint import run_folder
from loop.checkpoint.full_model import save_non_lora
from loop.config.flags import Config
from loop.inputs.training_data import read_training_data
from loop.model import new_tokens
from loop.training.loss import supervised_loss_sum
from tests.conftest import trainer
from tests.data.test_seq2seq import LONG
from tests.support.helpers import adapter_of, log_of, prompt_of, write_dialogues
from tests.support.small_t5 import TOKENS, joined_shards, make_t5

CODE = 'Say:\n\tx = {"a": `b`} if c < d ^ e else \\f and so on.'
NEW = [*range(TOKENS, TOKENS + len(CHARACTERS))]
Train = Callable[..., Path]


@pytest.fixture
def train(tiny_t5: Path, tmp_path: Path) -> Train:
    """Return a function that trains a T5 in this process on two dialogues with code."""
    data = write_dialogues(tmp_path / "code.json", ["Show me.", CODE], ["And?", LONG, "Go", CODE])
    run = trainer(tiny_t5, tmp_path)
    return lambda name, *flags: run(name, "--data_path", data, "--lora_dropout", "0", *flags)


def loaded(model: Path, adapter: Path) -> Any:
    base = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=torch.float32)
    new_tokens.grow(base, NEW[-1] + 1)
    return PeftModel.from_pretrained(base, str(adapter)).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(**prompt_of(model.config)).logits
    return found


@pytest.fixture(params=["untied", "tied", "too few rows"])
def model(request: pytest.FixtureRequest, tiny_t5: Path, tmp_path: Path) -> Path:
    if request.param == "untied":
        return tiny_t5
    rows = TOKENS + 32 if request.param == "tied" else TOKENS
    tied = request.param == "tied"
    return make_t5(tmp_path / "model", AutoTokenizer.from_pretrained(tiny_t5), tied, rows)


def test_peft_loads_the_trained_model_with_its_new_tokens(
    model: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[torch.Tensor] = []
    from loop import train as training

    save = training.save_run

    def save_and_ask(accelerator: Any, net: Any, *rest: Any) -> None:
        save(accelerator, net, *rest)
        trained.append(logits(accelerator.unwrap_model(net).eval()).clone())

    monkeypatch.setattr(training, "save_run", save_and_ask)
    folder = train("run", "--model_name_or_path", model)
    found = logits(loaded(model, folder))
    assert torch.allclose(found, trained[0], atol=1e-6)
    base = AutoModelForSeq2SeqLM.from_pretrained(model)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    rows = {k: v for k, v in adapter_of(folder).items() if "trainable_tokens" in k}
    tied = torch.equal(before["shared.weight"], before["lm_head.weight"])
    assert len(rows) == (1 if tied else 3)
    for name, value in rows.items():
        matrix = "lm_head.weight" if "lm_head" in name else "shared.weight"
        mean = before[matrix][:TOKENS].mean(0)
        assert value.shape == (len(NEW), 64)
        moved = (value - mean).abs().max()
        assert 1e-3 < moved < 0.1  # the rows start as the mean, and are trained
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["task_type"], {*config["target_modules"]}) == ("SEQ_2_SEQ_LM", {"q", "v"})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids("{") == TOKENS


def test_new_rows_are_saved_in_the_precision_of_training(train: Train) -> None:
    for precision, expected in (("no", False), ("bf16", True)):
        saved = adapter_of(train(precision, "--mixed_precision", precision))
        rows = [value for name, value in saved.items() if "trainable_tokens" in name]
        assert [torch.equal(row, row.bfloat16().float()) for row in rows] == [expected] * 3


def test_a_separate_lm_head_keeps_its_old_rows_bit_for_bit(
    tiny_t5: Path, train: Train, tmp_path: Path
) -> None:
    small = make_t5(tmp_path / "small", AutoTokenizer.from_pretrained(tiny_t5), False, TOKENS)
    for model in (tiny_t5, small):
        name = f"run-{model.name}"
        folder = train(name, "--model_name_or_path", model, "--save_non_lora_state", "all")
        before = AutoModelForSeq2SeqLM.from_pretrained(model).state_dict()
        state = load_file(folder / "non_lora_state.safetensors")
        again = loaded(model, folder).get_base_model().state_dict()
        assert not torch.equal(before["lm_head.weight"], before["shared.weight"])
        for matrix in ("lm_head.weight", "shared.weight"):
            old = before[matrix][:TOKENS]
            assert torch.equal(state[matrix][:TOKENS], old)
            wrapped = "lm_head.token_adapter.base_layer.weight"
            reloaded = again[wrapped if matrix == "lm_head.weight" else matrix]
            assert torch.equal(reloaded[:TOKENS], old)


def test_a_single_missing_character_gets_its_own_row_in_both_matrices(
    tiny_t5: Path, train: Train, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    tokenizer.add_tokens([character for character in CHARACTERS if character != "{"])
    few = TOKENS + len(CHARACTERS) - 1
    model = make_t5(tmp_path / "few", tokenizer, False, few)
    folder = train("run", "--model_name_or_path", model)
    rows = {k: v for k, v in adapter_of(folder).items() if "trainable_tokens" in k}
    assert {value.shape for value in rows.values()} == {(2, 64)}
    head = next(value for name, value in rows.items() if "lm_head" in name)
    before = AutoModelForSeq2SeqLM.from_pretrained(model).lm_head.weight[:few].mean(0)
    assert 1e-3 < (head - before).abs().max() < 0.1


def test_frozen_new_tokens_stay_the_mean_and_are_saved(tiny_t5: Path, train: Train) -> None:
    folder = train("run", "--train_new_tokens", "False")
    before = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    means = {
        "shared": before.shared.weight[:TOKENS].mean(0),
        "lm_head": before.lm_head.weight[:TOKENS].mean(0),
    }
    rows = {k: v for k, v in adapter_of(folder).items() if "trainable_tokens" in k}
    assert len(rows) == 3
    for name, value in rows.items():
        mean = means["lm_head" if "lm_head" in name else "shared"]
        assert torch.allclose(value, mean.expand(len(NEW), 64), atol=1e-7)
    changed = load_file(
        train("more", "--save_non_lora_state", "trainable") / "non_lora_state.safetensors"
    )
    assert {*changed} == {*rows}
    assert not torch.equal(changed[min(rows)], rows[min(rows)])


def test_the_saved_base_in_one_file_or_in_shards_restores_the_trained_model(
    tiny_t5: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = train("run", "--save_non_lora_state", "all")
    state = load_file(folder / "non_lora_state.safetensors")
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    found = base.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    monkeypatch.setattr(run_folder, "save_non_lora", partial(save_non_lora, shard=50_000))
    parts = train("parts", "--save_non_lora_state", "all")
    joined = joined_shards(parts, tiny_t5, parts / "alone")
    assert {*joined} == {*state, *found.missing_keys}
    assert all(torch.equal(joined[name], state[name]) for name in state)
    assert {*found.missing_keys} == {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    adapter = json.loads((folder / "adapter_config.json").read_text())
    del adapter["trainable_token_indices"]
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    alone = logits(PeftModel.from_pretrained(base, str(folder)).eval())
    adapter["trainable_token_indices"] = {
        "encoder.embed_tokens": NEW, "decoder.embed_tokens": NEW, "lm_head": NEW[::-1]
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    assert torch.allclose(alone, logits(loaded(tiny_t5, folder)), atol=1e-6)


def test_the_loss_is_the_cross_entropy_of_each_target(tiny_t5: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hello.", LONG], ["And?", f"{LONG} {LONG}"])
    prepared = read_training_data(Config(str(tiny_t5), data_path=(str(data),)))
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    alone = 0.0
    for example in prepared.examples:
        found = model(
            input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])
        ).logits
        alone += cross_entropy(found[0], torch.tensor(example.labels), reduction="sum").item()
    batch = prepared.collator(prepared.examples, 0)
    assert supervised_loss_sum(model, batch).item() == pytest.approx(alone, rel=1e-6)
    empty = supervised_loss_sum(model, collate_pairs([], 0, 0, 0))
    assert empty.item() == 0.0


def test_training_continues_an_adapter_with_new_tokens(train: Train, tmp_path: Path) -> None:
    first = train("first")
    second = train("second", "--lora_weight_path", first, "--learning_rate", "1e-12")
    before, after = adapter_of(first), adapter_of(second)
    assert {*before} == {*after}
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    config = json.loads((first / "adapter_config.json").read_text())
    config["trainable_token_indices"] = None
    (first / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="found rows of the tokens"):
        train("third", "--lora_weight_path", first)


def test_gradient_checkpointing_changes_no_gradient_and_a_resumed_run_is_identical(
    train: Train,
) -> None:
    unbroken = adapter_of(train("unbroken", "--save_steps", "2"))
    recomputed = train("recomputed", "--gradient_checkpointing")
    # Gradients are compared, because AdamW makes a full step even from a gradient near 0.
    ours, theirs = (
        load_file(folder / "checkpoint-4" / "optimizer.safetensors")
        for folder in (train("unbroken"), recomputed)
    )
    means = [name for name in ours if name.startswith("exp_avg.")]
    assert max(ours[name].abs().max() for name in means) > 1e-2
    assert all(torch.allclose(ours[name], theirs[name], atol=5e-6, rtol=0) for name in means)
    checkpoint = train("unbroken") / "checkpoint-2"
    resumed = adapter_of(train("resumed", "--resume_from_checkpoint", checkpoint))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)


def test_chat_answers_with_the_reloaded_model(tiny_t5: Path, train: Train) -> None:
    folder = train("run", "--max_steps", "60", "--learning_rate", "3e-2")
    assert log_of(folder)[-1]["loss"] < log_of(folder)[0]["loss"] - 1
    speaker = load_speaker(ChatConfig(adapter=(str(folder),), max_new_tokens=40))
    from data.dialogues.conversation import Turn

    answer = speaker.answer((Turn("user", "Show me."),))
    assert answer.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "vicuna"), r"found vicuna .*an encoder-decoder \(t5\); expected t5"),
        (("--lora_target_modules", "q_proj"), "found q_proj, which names no module of the model"),
        (("--lora_target_modules", "q", "lm_head"), "found lm_head, whose rows"),
        (("--lora_target_modules", "encoder.embed_tokens"), "found encoder.embed_tokens, whose"),
    ],
)
def test_flags_that_do_not_fit_an_encoder_decoder_are_refused(
    flags: tuple[str, ...], message: str, train: Train
) -> None:
    with pytest.raises(UserError, match=message):
        train("run", *flags)


def test_more_tokens_than_a_model_has_positions_are_refused(tmp_path: Path, tiny_t5: Path) -> None:
    config = AutoConfig.for_model("bart", vocab_size=TOKENS, decoder_start_token_id=0)
    config.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"length 2048 with bart, which has 1024 positions"):
        read_training_data(Config(str(tmp_path)))


def test_fp16_with_t5_is_refused_before_the_data_is_read(tiny_t5: Path) -> None:
    with pytest.raises(UserError, match="found precision fp16 with t5"):
        read_training_data(Config(str(tiny_t5), fp16=True, data_path=("none.json",)))


def test_limits_that_the_model_does_not_use_are_refused(tiny_t5: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"found --max_target_length .*one limit"):
        read_training_data(Config(str(tiny_t5), t5_compat=True, max_target_length=8))
    with pytest.raises(UserError, match=r"found --keep_header .*a decoder"):
        read_training_data(Config(str(tiny_model), keep_header=True))


def test_t5_flags_are_refused_for_a_decoder(tiny_model: Path) -> None:
    with pytest.raises(UserError, match=r"found t5 .*a decoder"):
        read_training_data(Config(str(tiny_model), template="t5"))
    with pytest.raises(UserError, match=r"--t5_compat: .* is a decoder"):
        read_training_data(Config(str(tiny_model), t5_compat=True))


@pytest.mark.parametrize("kind", ["mt5", "umt5", "bart"])
def test_relatives_of_t5_train_too(kind: str, tiny_t5: Path, train: Train, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 64, "vocab_size": TOKENS + 32, "decoder_start_token_id": 0}
    flags: list[str] = []
    if kind == "bart":
        flags = ["--model_max_length", "1024"]  # the model's positions
        sizes["vocab_size"] = TOKENS  # The rows and final_logits_bias must grow.
        sizes |= {"encoder_layers": 1, "decoder_layers": 1, "pad_token_id": 0, "eos_token_id": 1}
        sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    else:
        sizes |= {"d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path / kind)
    AutoTokenizer.from_pretrained(tiny_t5).save_pretrained(tmp_path / kind)
    folder = train("run", "--model_name_or_path", tmp_path / kind, *flags)
    log = log_of(folder)
    assert log[-1]["loss"] < log[0]["loss"]
    targets = json.loads((folder / "adapter_config.json").read_text())["target_modules"]
    assert {*targets} == ({"q_proj", "v_proj"} if kind == "bart" else {"q", "v"})
    assert logits(loaded(tmp_path / kind, folder)).isfinite().all()
