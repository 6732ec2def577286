"""Adapters of every kind that peft makes train further, save, resume, merge and load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.errors import RunError, UserError
from loop import utils
from loop.adapters.adapter import load_base, read_adapter, with_adapter
from loop.adapters.merge import main as merge
from loop.checkpoint import storage
from loop.model import saving_check
from tests.support.helpers import adapter_of, launch, write_dialogues
from tests.support.matrix import share_all_file

Train = Callable[..., Path]
KINDS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "a whole head": {"modules_to_save": ["lm_head"]},
    "DoRA, whole embedding and norms": {
        "use_dora": True,
        "modules_to_save": ["embed_tokens", "norm"],
    },
}
EXACT = ("--lora_dropout", "0", "--mixed_precision", "no")


def made_by_peft(base: Path, folder: Path, **settings: Any) -> Path:
    """Write an adapter of peft alone, with values that differ from a new one's."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **settings}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    adapted.save_pretrained(str(folder))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(30).view(1, -1)).logits
    return found


def opened(base: Path, folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base)
    return logits(PeftModel.from_pretrained(model, str(folder)))


@pytest.mark.parametrize("kind", [*KINDS])
def test_an_adapter_of_each_kind_trains_saves_resumes_merges_and_loads(
    kind: str, train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    first = made_by_peft(tiny_model, tmp_path / "first", **KINDS[kind])
    flags = ("--lora_weight_path", first, "--save_steps", "2", *EXACT)
    folder = train("run", *flags)
    before, after = load_file(first / "adapter_model.safetensors"), adapter_of(folder)
    assert {*before} == {*after}
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    # A checkpoint is an adapter, too, with the same names.
    assert {*load_file(folder / "checkpoint-2" / storage.ADAPTER)} == {*after}
    expected = opened(tiny_model, folder)
    assert (expected - opened(tiny_model, first)).abs().max() > 1e-3
    assert torch.equal(opened(tiny_model, folder / "checkpoint-4"), expected)
    # chat and merge open it by the project's own code.
    adapter = read_adapter(folder)
    base = load_base(adapter, adapter.base, torch.float32)
    assert torch.equal(logits(with_adapter(base, adapter)), expected)
    merge(["--adapter", str(folder), "--output_dir", str(tmp_path / "merged")])
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert (merged - expected).abs().max() < 1e-4
    resumed = train("resumed", *flags, "--resume_from_checkpoint", folder / "checkpoint-2")
    again = adapter_of(resumed)
    assert all(torch.equal(again[name], after[name]) for name in after)


@pytest.mark.parametrize(("backend", "processes"), [("ddp", 2), ("zero2", 2), ("zero3", 2)])
def test_every_backend_trains_dora_and_whole_modules_to_the_same_adapter(
    backend: str, processes: int, train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    kind = {"use_dora": True, "modules_to_save": ["lm_head", "embed_tokens"]}
    first = made_by_peft(tiny_model, tmp_path / "first", **kind)
    data = write_dialogues(tmp_path / "four.json", *[["Hi", "Hello."], ["And?", "So."]] * 2)
    flags = ["--lora_weight_path", first, "--data_path", data, "--global_batch_size", "4"]
    alone = adapter_of(train("alone", *flags, *EXACT))
    flags += ["--model_name_or_path", tiny_model, "--max_steps", "4", "--learning_rate", "1e-2"]
    if backend == "zero3":
        flags += ["--deepspeed", share_all_file(tmp_path), "--gradient_checkpointing", "True"]
    split = ("--per_device_train_batch_size", "1")
    launch(backend, tmp_path / backend, *flags, *EXACT, *split, processes=processes)
    found = adapter_of(tmp_path / backend)
    assert {*found} == {*alone}
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_checkpoint_with_the_names_of_the_model_resumes(
    train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    kind = {"use_dora": True, "modules_to_save": ["lm_head"]}
    first = made_by_peft(tiny_model, tmp_path / "first", **kind)
    flags = ("--lora_weight_path", first, "--save_steps", "2", *EXACT)
    folder = train("run", *flags)
    expected = adapter_of(folder)
    checkpoint = shutil.copytree(folder / "checkpoint-2", tmp_path / "old" / "checkpoint-2")
    for name in (storage.ADAPTER, storage.OPTIMIZER):
        old = {
            key.replace("lora_magnitude_vector", "lora_magnitude_vector.weight").replace(
                "lm_head.weight", "lm_head.modules_to_save.weight"
            ): tensor
            for key, tensor in load_file(checkpoint / name).items()
        }
        save_file(old, checkpoint / name, {"format": "pt"})
    manifest = json.loads((checkpoint / storage.MANIFEST).read_text())
    manifest["files"] = {
        name: storage._size_and_hash(checkpoint / name) for name in manifest["files"]
    }
    manifest["manifest_sha256"] = storage._own_sha256(manifest)
    (checkpoint / storage.MANIFEST).write_text(json.dumps(manifest))
    found = adapter_of(train("resumed", *flags, "--resume_from_checkpoint", checkpoint))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_whole_modules_start_from_the_adapters_fp32_values(
    train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    first = made_by_peft(tiny_model, tmp_path / "first", modules_to_save=["lm_head"])
    flags = ("--learning_rate", "1e-30", "--mixed_precision", "bf16")
    found = adapter_of(train("run", "--lora_weight_path", first, *flags))
    for name, tensor in load_file(first / "adapter_model.safetensors").items():
        assert torch.equal(found[name], tensor)


def test_whole_modules_in_4_bits_are_refused_before_step_1(
    train: Train, tiny_model: Path, tmp_path: Path
) -> None:
    first = made_by_peft(tiny_model, tmp_path / "first", modules_to_save=["o_proj"])
    flags = ("--lora_weight_path", first, *EXACT)
    with pytest.raises(UserError, match=r"o_proj in 4 bits.*Give --q_lora False"):
        train("run", *flags, "--q_lora", "True")
    assert adapter_of(train("plain", *flags, "--q_lora", "False"))


def test_a_tensor_that_peft_would_not_save_is_found_before_step_1(
    train: Train, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(model: Any, state: Any) -> Any:
        return {n: t for n, t in real(model, state).items() if "layers.1.self_attn.v_proj" not in n}

    real = saving_check.adapter_weights
    monkeypatch.setattr(saving_check, "adapter_weights", lossy)
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.v_proj.* not saved") as found:
        train("run")
    assert found.value.exit_code == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_adapter_that_does_not_load_is_found_before_step_1(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(model: Any) -> dict[str, Any]:
        return {**real(model), "r": 4}

    real = saving_check.adapter_settings
    monkeypatch.setattr(saving_check, "adapter_settings", other)
    with pytest.raises(UserError, match="could not be saved and loaded again"):
        train("run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_weights_of_a_rejected_adapter_are_kept(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RunError("wrong.")

    monkeypatch.setattr(utils, "_check_saved", refuse)
    with pytest.raises(RunError, match=r"kept in rejected-adapter_model\.safetensors"):
        train("run", "--save_strategy", "no")
    assert load_file(tmp_path / "run" / "rejected-adapter_model.safetensors")
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
