"""Before step 1, a run takes a layout that agrees with the model's plain forward pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    FalconH1Config,
    Gemma3Config,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    T5GemmaConfig,
)

from data.batching.collate import Collator
from data.encoding.encode import Example
from loop import train as training
from loop.training.loss import changes_logits, supervised_loss_sum, token_losses
from tests.conftest import trainer
from tests.support.helpers import adapter_of, command, launch, log_of, write_dialogues

DIALOGUES = (
    ["What do you see in the garden?", "A small fox, and behind it a second one."],
    ["And what happens after that?", "They run into the wood, and do not come back."],
    ["Does anybody follow them at all?", "No, everybody stays at home that evening."],
)
SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 16}
CAPPED = {**SIZES, "final_logit_softcapping": 0.5}
CODE = """from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig

    def forward(self, input_ids, **options):
        embeddings = self.get_input_embeddings()(input_ids)
        CHANGE_INPUT
        options["inputs_embeds"] = embeddings
        made = super().forward(**options)
        CHANGE_LOGITS
        return made
"""


@pytest.fixture
def halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Halve Llama's logits, like a setting of an unknown name would."""
    forward = LlamaForCausalLM.forward

    def half(*args: Any, **options: Any) -> Any:
        made = forward(*args, **options)
        made.logits = made.logits * 0.5
        return made

    monkeypatch.setattr(LlamaForCausalLM, "forward", half)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("packing", ["True", "False"])
def test_a_model_that_changes_its_logits_computes_them_itself(
    precision: str,
    packing: str,
    halved: None,
    train: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--mixed_precision", precision, "--packing", packing]
    found = log_of(train("run", *flags))
    assert "the model computes the logits of supervised positions" in capsys.readouterr().out
    given = log_of(train("given", *flags, "--loss_chunk_tokens", "0"))
    assert "check_model" not in capsys.readouterr().out
    assert [entry["loss"] for entry in found] == [entry["loss"] for entry in given]
    # Without the check, the loss is another one.
    unchecked = log_of(train("unchecked", *flags, "--check_model", "False"))
    assert "check_model: left out" in capsys.readouterr().out
    assert unchecked[0]["loss"] != pytest.approx(found[0]["loss"], rel=1e-3)


def test_a_row_whose_examples_are_not_run_as_alone_is_padded(
    train: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from loop.model import packed_attention

    flags = ["--lora_dropout", "0"]
    expected = train("padded", *flags, "--packing", "False")
    per_example = packed_attention.per_example

    def wrong(*args: Any, **options: Any) -> Any:
        row = options.get("row")
        made, weights = per_example(*args, **options)
        return (made if row is None else made * 0.5), weights

    monkeypatch.setattr(packed_attention, "per_example", wrong)
    capsys.readouterr()
    found = train("run", *flags)
    assert "using padded micro-batches" in capsys.readouterr().out
    assert losses_of(found) == losses_of(expected)
    assert losses_of(train("again", *flags)) == losses_of(expected)


def test_a_row_that_runs_out_of_memory_is_not_padded_instead(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loop.model import packed_attention

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("found no memory")

    monkeypatch.setattr(packed_attention, "per_example", full)
    with pytest.raises(torch.OutOfMemoryError):
        train("run")


@pytest.mark.parametrize(
    "config",
    [
        FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.04),
        RecurrentGemmaConfig(**SIZES, lru_width=64, logits_soft_cap=0.5),
        T5GemmaConfig(encoder=CAPPED, decoder=CAPPED, vocab_size=1000),
    ],
    ids=["FalconH1", "RecurrentGemma", "T5Gemma"],
)
def test_models_with_scaled_or_capped_logits_have_the_plain_loss(config: Any) -> None:
    torch.manual_seed(0)
    pairs, ids = config.is_encoder_decoder, [*range(5, 30)]
    loader = AutoModelForSeq2SeqLM if pairs else AutoModelForCausalLM
    model = loader.from_config(config).eval()
    inputs = {"input_ids": torch.tensor([ids])}
    if pairs:
        inputs["decoder_input_ids"] = torch.tensor([[2, *ids[:-1]]])
    example = Example("a", ids, ids, len(ids), is_pair=pairs)
    batch = Collator(0, 2 if pairs else None)([example], 0)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
        logits = model(**inputs, use_cache=False).logits[0]
        logits = logits if pairs else logits[:-1]
        expected = cross_entropy(logits, batch.targets, reduction="sum").item()
        assert supervised_loss_sum(model, batch).item() == pytest.approx(expected, rel=1e-5)
        assert token_losses(model, batch)[0].sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_composite_configurations_text_part_is_looked_at() -> None:
    assert changes_logits(Gemma3Config(text_config=CAPPED))
    assert not changes_logits(Gemma3Config(text_config=SIZES))


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in log_of(folder)]


def assert_same(one: Path, other: Path) -> None:
    assert losses_of(one) == losses_of(other)
    first, second = adapter_of(one), adapter_of(other)
    assert {*first} == {*second}
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("flags", [[], ["--bf16", "--q_lora", "True"]], ids=["LoRA", "QLoRA"])
@pytest.mark.parametrize("kind", ["tiny_model", "tiny_t5"])
def test_the_comparison_changes_no_bit_of_a_run(
    kind: str,
    flags: list[str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = trainer(request.getfixturevalue(kind), tmp_path)
    compared, check = [], training.check_model

    def watched(*given: Any) -> Any:
        model = given[3]
        state, modes = torch.get_rng_state(), [m.training for m in model.modules()]
        result = check(*given)
        compared.append(torch.equal(state, torch.get_rng_state()))
        assert modes == [m.training for m in model.modules()]
        return result

    monkeypatch.setattr(training, "check_model", watched)
    data = write_dialogues(tmp_path / "d.json", *DIALOGUES)
    flags = ["--data_path", str(data), "--lora_dropout", "0.2", "--logging_steps", "1", *flags]
    checked = run("checked", *flags)
    assert compared == [True]
    monkeypatch.setattr(training, "check_model", lambda *given: given[:2])
    assert_same(checked, run("unchecked", *flags))


@pytest.mark.parametrize("kind", ["tiny_model", "tiny_t5"])
def test_under_zero3_it_changes_no_bit_of_a_run(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = write_dialogues(tmp_path / "d.json", *DIALOGUES)
    flags = ["--model_name_or_path", request.getfixturevalue(kind), "--data_path", data]
    flags += [
        "--max_steps",
        "3",
        "--learning_rate",
        "1e-2",
        "--mixed_precision",
        "no",
        "--logging_steps",
        "1",
    ]
    checks = {"checked": "True", "unchecked": "False"}
    for name, check in checks.items():
        launch("zero3", tmp_path / name, *flags, "--check_model", check, processes=2)
    assert_same(*(tmp_path / name for name in checks))


HALVED = "made.logits = made.logits * 0.5"
LATER = "embeddings = embeddings + embeddings.mean(1, keepdim=True)"


@pytest.mark.parametrize("change", [HALVED, LATER], ids=["halved logits", "later tokens"])
def test_ranks_under_zero3_fall_back_or_are_refused_together(
    change: str, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    values = json.loads((base / "config.json").read_text())
    values |= {"model_type": "odd", "auto_map": auto_map}
    (base / "config.json").write_text(json.dumps(values))
    (base / "odd.py").write_text(
        CODE.replace("CHANGE_INPUT", change * (change == LATER) or "pass").replace(
            "CHANGE_LOGITS", change * (change == HALVED) or "pass"
        )
    )
    data = write_dialogues(tmp_path / "d.json", ["Hi", "Hello."], ["And?", "So."])
    words = ["./launch.sh", "accelerate_configs/zero3.yaml", "--model_name_or_path", base]
    words += ["--data_path", data, "--max_steps", "3", "--output_dir", tmp_path / "run"]
    words += ["--trust_remote_code", "True", "--mixed_precision", "no"]
    how = {"NUM_PROCESSES": "2", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = command(*words, **how)
    said = done.stdout + done.stderr
    assert "Traceback" not in said
    if change == HALVED:
        assert done.returncode == 0, said
        assert said.count("the model computes the logits of supervised positions") == 1
    else:
        assert done.returncode == 2, said
        assert said.count("tokens that attend to later ones") == 1
