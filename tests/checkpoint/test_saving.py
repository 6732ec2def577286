"""A run's output is checked, loads in peft, and is not overwritten."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from benchmarks.peers.environments import is_made, peer_python
from data.errors import RunError, UserError
from loop.checkpoint.run_folder import is_finished
from loop.config.flags import Config
from loop.config.load import read_config
from loop.model.bundled_model import embedded_model
from loop.utils import COMMON_KEYS, _check_saved
from tests.support.helpers import adapter_of, command, log_of, write_dialogues

Train = Callable[..., Path]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(30).view(1, -1)).logits
    return found


def test_a_run_leaves_the_documented_files_and_peft_loads_them(
    train: Train, tiny_model: Path
) -> None:
    folder = train("run")
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "trainer_state.json", "metrics.jsonl", "training_config.yaml",
    }  # fmt: skip
    assert not [name for name in names if "partial" in name]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    before = logits(base)
    after = logits(PeftModel.from_pretrained(base, str(folder)))
    assert (after - before).abs().max() > 1e-3
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (8, 16, True)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    state = json.loads((folder / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"], state["epoch"]) == (4, 4, 4.0)


def test_the_log_has_the_documented_keys(train: Train) -> None:
    history = log_of(train("run", "--logging_steps", "2"))
    assert [entry["step"] for entry in history] == [1, 2, 4]
    keys = {
        "step", "epoch", "loss", "learning_rate", "grad_norm", "supervised_tokens",
        "tokens_per_second", "supervised_tokens_per_second", "seconds",
    }  # fmt: skip
    assert all({*entry} >= keys for entry in history)
    per_step = history[0]["supervised_tokens"]
    assert [entry["supervised_tokens"] for entry in history] == [n * per_step for n in (1, 2, 4)]


def test_adapter_model_bin_is_loaded_by_peft(train: Train, tiny_model: Path) -> None:
    safe, pickled = train("safe"), train("bin", "--save_safetensors", "False")
    assert not (pickled / "adapter_model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    found = logits(PeftModel.from_pretrained(model, str(pickled)))
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert torch.equal(found, logits(PeftModel.from_pretrained(model, str(safe))))


def test_training_twice_gives_the_same_adapter_bit_for_bit(train: Train) -> None:
    one, two = adapter_of(train("one")), adapter_of(train("two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_gradient_checkpointing_recomputes_and_changes_nothing(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    forwards = []
    forward = LlamaMLP.forward

    def counted(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():  # The loss check before step 1 computes no gradient.
            forwards.append(1)
        return forward(*args, **options)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    one = adapter_of(train("one"))
    plain = len(forwards)
    two = adapter_of(train("two", "--gradient_checkpointing"))
    assert len(forwards) == 3 * plain  # a second forward pass per layer
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_biases_are_saved_and_loaded(bias: str, train: Train, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, attention_bias=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(embedded_model()).save_pretrained(tmp_path / "biased")
    folder = train("run", "--model_name_or_path", tmp_path / "biased", "--lora_bias", bias)
    saved = {n: tensor for n, tensor in adapter_of(folder).items() if n.endswith("bias")}
    layers = {name.replace(".base_layer", "").split(".")[-2] for name in saved}
    targets, others = {"q_proj", "v_proj"}, {"k_proj", "o_proj"}
    assert layers == {"none": set(), "all": targets | others, "lora_only": targets}[bias]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "biased")
    loaded = PeftModel.from_pretrained(base, str(folder)).state_dict()
    assert all(tensor.any() and torch.equal(loaded[n], tensor) for n, tensor in saved.items())


def test_training_continues_an_adapter_with_its_own_shape(train: Train) -> None:
    first = train("first", "--lora_r", "4", "--lora_target_modules", "q_proj", "o_proj")
    second = train("second", "--lora_weight_path", first, "--learning_rate", "1e-12")
    third = train("dropped", "--lora_weight_path", first, "--lora_dropout", "0.5")
    assert json.loads((third / "adapter_config.json").read_text())["lora_dropout"] == 0.5
    before, after = adapter_of(first), adapter_of(second)
    assert {*before} == {*after}
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    with pytest.raises(UserError, match=r"--lora_r: found 16, but the adapter .* has 4"):
        train("third", "--lora_weight_path", first, "--lora_r", "16")
    with pytest.raises(UserError, match="--lora_target_modules: found"):
        train("third", "--lora_weight_path", first, "--lora_target_modules", "q_proj")
    file = first / "adapter_model.safetensors"
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file)
    with pytest.raises(UserError, match="missing adapter keys"):
        train("third", "--lora_weight_path", first)
    file.write_text("{")
    with pytest.raises(UserError, match=r"first.* cannot be loaded"):
        train("third", "--lora_weight_path", first)
    (first / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="no LoRA adapter"):
        train("third", "--lora_weight_path", first)


def test_all_linear_targets_every_linear_layer_except_the_head(train: Train) -> None:
    names = adapter_of(train("run", "--lora_target_modules", "all-linear"))
    layers = {name.split(".")[-3] for name in names}
    assert layers == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_an_unknown_target_is_refused_with_the_existing_names(train: Train) -> None:
    with pytest.raises(UserError, match=r"found query.*k_proj, lm_head, o_proj, q_proj"):
        train("run", "--lora_target_modules", "q_proj", "query")


def test_embeddings_can_be_targets(train: Train) -> None:
    names = adapter_of(train("run", "--lora_target_modules", "q_proj", "embed_tokens"))
    assert any(name.endswith("embed_tokens.lora_embedding_B") for name in names)


def test_the_logged_loss_is_weighted_by_tokens_over_the_steps(train: Train) -> None:
    flags = ("--max_steps", "7", "--per_device_train_batch_size", "1")
    each = log_of(train("each", *flags, "--logging_steps", "1"))
    some = log_of(train("some", *flags, "--logging_steps", "3"))
    assert [entry["step"] for entry in some] == [1, 3, 6, 7]
    counts = [b["supervised_tokens"] - a["supervised_tokens"] for a, b in pairwise(each)]
    counts = [each[0]["supervised_tokens"], *counts]
    assert len({*counts}) == 2, "the steps must differ in tokens, or the test proves nothing"
    for begin, end, entry in ((1, 3, some[1]), (3, 6, some[2])):
        part = [(e["loss"], n) for e, n in zip(each, counts, strict=True)][begin:end]
        mean = sum(loss * n for loss, n in part) / sum(n for _, n in part)
        assert entry["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_single_step_of_warm_up_is_refused(train: Train) -> None:
    with pytest.raises(UserError, match=r"learning rate 0.*--warmup_ratio 0"):
        train("run", "--max_steps", "1")
    assert log_of(train("run", "--max_steps", "1", "--warmup_ratio", "0"))[0]["step"] == 1


def test_a_folder_that_cannot_be_written_is_a_user_error(train: Train, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written: Not a directory"):
        train("file/run")


@pytest.mark.parametrize("damaged", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_corrupt_model_folder_is_a_user_error(
    damaged: str, train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_model, folder)
    (folder / damaged).write_text("{")
    with pytest.raises(UserError, match=f"{folder}.* cannot be loaded"):
        train("run", "--model_name_or_path", folder)


def test_a_model_that_lacks_a_weight_is_refused(
    train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "lacking"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights lack model\.layers\.1\.mlp\.up_proj"):
        train("run", "--model_name_or_path", folder)


def test_an_incorrectly_saved_adapter_is_an_error(train: Train) -> None:
    file = train("run") / "adapter_model.safetensors"
    good = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in good.items()}
    _check_saved(good, shapes, file)
    name = next(name for name in good if "lora_B" in name)
    zeros = {n: torch.zeros_like(t) if "lora_B" in n else t for n, t in good.items()}
    for wrong, complaint in (
        ({n: t for n, t in good.items() if n != name}, "missing"),
        ({**good, "other": good[name].clone()}, "unexpected"),
        ({**good, name: torch.zeros(0)}, "of the wrong shape"),
        ({**good, name: good[name] * torch.inf}, "not finite"),
        (zeros, "is not trained"),
    ):
        save_file(wrong, file)
        with pytest.raises(RunError, match=complaint):
            _check_saved(load_file(file), shapes, file)


def test_modules_that_got_no_gradient_are_named(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    file = train("run") / "adapter_model.safetensors"
    saved = load_file(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    capsys.readouterr()
    _check_saved(saved, shapes, file)
    assert capsys.readouterr().out == ""
    name = next(name for name in saved if "lora_B" in name)
    _check_saved({**saved, name: torch.zeros_like(saved[name])}, shapes, file)
    assert f"got no gradient, so they are as in the base model: {name[:40]}" in (
        capsys.readouterr().out
    )


def test_adapter_config_has_common_keys_and_what_is_not_a_default(
    train: Train, tiny_model: Path
) -> None:
    folder = train("run")
    found = json.loads((folder / "adapter_config.json").read_text())
    assert {*found} == COMMON_KEYS
    checkpoint = next(folder.glob("checkpoint-*"))
    assert json.loads((checkpoint / "adapter_config.json").read_text()) == found
    loaded = LoraConfig.from_pretrained(str(folder))
    assert (loaded.r, loaded.lora_alpha, loaded.inference_mode) == (8, 16, True)


# The tiny model's tokenizer has no slow version, which FastChat asks for and only copies.
FASTCHAT = """
import sys
from types import SimpleNamespace
from fastchat.model import apply_lora
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, adapter, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
PeftModel.from_pretrained(model, adapter)
tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
apply_lora.AutoTokenizer = SimpleNamespace(from_pretrained=lambda *_, **__: tokenizer)
apply_lora.apply_lora(base, target, adapter)
AutoModelForCausalLM.from_pretrained(target)
print("loaded")
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not is_made("fastchat"), reason="benchmarks/peers/environments.py fastchat was never run"
)
def test_fastchats_environment_loads_and_applies_the_adapter(
    train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    words = ["-c", FASTCHAT, tiny_model, train("run"), tmp_path / "merged"]
    done = command(peer_python("fastchat"), *words)
    assert "loaded" in done.stdout, done.stderr[-2000:]


def test_a_finished_run_is_recognised_and_other_settings_are_refused(train: Train) -> None:
    folder = train("run")
    settings = ["--config", str(folder / "training_config.yaml")]
    assert is_finished(read_config(settings, Config))
    assert is_finished(read_config([*settings, "--output_dir", f"{folder}/../run/"], Config))
    with pytest.raises(UserError, match=r"other settings \(seed was 42, is 7\)"):
        is_finished(read_config([*settings, "--seed", "7"], Config))
    data = Path(yaml.safe_load((folder / "training_config.yaml").read_text())["data_path"][0])
    write_dialogues(data, ["Hi", "Other."])
    with pytest.raises(UserError, match="data_sha256 was"):
        is_finished(read_config(settings, Config))
    (folder / "adapter_model.safetensors").unlink()
    assert not is_finished(read_config(settings, Config))
    (folder / "trainer_state.json").unlink()
    assert not is_finished(read_config(settings, Config))


def test_losses_that_are_never_finite_stop_the_run(
    train: Train, broken_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="step 3: 3 steps in a row"):
        train("run", "--model_name_or_path", broken_model)
    assert not (tmp_path / "run/trainer_state.json").exists()
