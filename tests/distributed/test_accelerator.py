"""A launch that cannot work is refused before the model is loaded; the error names a remedy."""

import json
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from data.errors import UserError
from loop.config.flags import Config, rank_shared_settings
from loop.config.load import read_config
from loop.distributed import accelerator, deepspeed_config
from loop.distributed.layout import Layout
from tests.support.helpers import ROOT, command, log_of, write_dialogues

LAYOUT = Layout(0, 2, 4, 2, 16, 10, 30)
TWO = {"zero_optimization": {"stage": 2}}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of `accelerate launch` with zero2.yaml."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return monkeypatch


def refused(file: Path, values: Any, *flags: str) -> str:
    """Return the error message for a DeepSpeed JSON."""
    file.write_text(values if isinstance(values, str) else json.dumps(values))
    config = read_config(["--data_path", "x", "--deepspeed", str(file), *flags], Config)
    with pytest.raises(UserError) as error:
        deepspeed_config.complete(deepspeed_config.zero_settings(config), config, LAYOUT)
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("{", "not valid JSON"),
        ([], "expected a JSON object"),
        (
            TWO | {"gradient_cliping": 1},
            "gradient_cliping: unknown key. Did you mean gradient_clipping?",
        ),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "Did you mean overlap_comm?"),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}},
            "reduce_bucket_size: found",
        ),
        (TWO | {"bf16": {"enabld": True}}, "bf16.enabld: unknown key. Correct its name, or remove"),
        (TWO | {"fp16": {"loss_scle_window": 3}}, "fp16.loss_scle_window: unknown key."),
        (TWO | {"communication_data_type": "fp17"}, 'data_type: found "fp17", which DeepSpeed do'),
        (TWO | {"flops_profiler": 3}, "flops_profiler: found 3, which DeepSpeed does not accept"),
        (TWO | {"comms_logger": {"bad": 1}}, "comms_logger.bad: unknown key."),
        (TWO | {"tensorboard": {"bad": 1}}, "tensorboard.bad: unknown key."),
        (TWO | {"wall_clock_breakdown": "auto"}, 'wall_clock_breakdown: found "auto", which'),
        (TWO | {"data_types": {"grad_accum_dtype": "x"}}, 'grad_accum_dtype: found "x"; expected'),
        ({"zero_optimization": {"stage": True}}, "found true; expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 2.0}}, "found 2.0; expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": 0}}, "found 0; expected 1, 2 or 3"),
        ({"zero_optimization": 2}, "found 2; expected an object"),
        ({}, "stage: found null"),
        (TWO | {"optimizer": {"type": "Adam"}}, "--learning_rate"),
        (TWO | {"gradient_clipping": 0.5}, "has gradient_clipping 0.5, --max_grad_norm is 1.0"),
        (
            TWO | {"train_micro_batch_size_per_gpu": 2},
            "has train_micro_batch_size_per_gpu 2, --per_device_train_batch_size is 8",
        ),
        (TWO | {"gradient_accumulation_steps": 3}, "gradient_accumulation_steps 3, "),
        (TWO | {"train_batch_size": 99}, "train_batch_size 99, examples a step is 16"),
        (TWO | {"bf16": {"enabled": True}}, "--mixed_precision is no"),
        (TWO | {"zero_force_ds_cpu_optimizer": True}, "the optimizer is PyTorch's AdamW"),
    ],
)
def test_a_deepspeed_file_that_is_wrong_or_contradicts_a_flag_is_refused(
    values: Any, expected: str, launched: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    message = refused(tmp_path / "ds.json", values, "--mixed_precision", "no")
    assert expected in message
    assert "\n" not in message
    assert "ds.json" in message or "the DeepSpeed config" in message


def test_a_deepspeed_file_and_the_accelerate_config_must_agree(
    launched: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    message = refused(tmp_path / "ds.json", offload)
    assert "offload_optimizer_device cpu, the accelerate config has none" in message
    assert "accelerate_configs/zero2_offload.yaml" in message
    message = refused(tmp_path / "ds.json", {"zero_optimization": {"stage": 3}})
    assert "zero_stage 3, the accelerate config has 2" in message
    assert "accelerate_configs/zero3.yaml" in message
    launched.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert "under an accelerate config without DeepSpeed" in refused(tmp_path / "ds.json", TWO)


def test_values_that_a_file_leaves_open_come_from_the_flags(
    launched: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(
        '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": true},'
        ' "gradient_clipping": "auto", "bf16": {"enabled": true}, "train_batch_size": "auto"}'
    )
    # The file's precision is used if no flag and no accelerate config sets another.
    launched.setenv("ACCELERATE_MIXED_PRECISION", "no")
    config = Config(deepspeed=str(file), max_grad_norm=0.3)
    asked = deepspeed_config.zero_settings(config)
    accelerator._adopt_precision(asked, config)
    values = deepspeed_config.complete(asked, config, LAYOUT)
    assert config.precision == "bf16"
    assert values["bf16"]["enabled"] is True
    assert values["gradient_clipping"] == 0.3
    assert values["train_micro_batch_size_per_gpu"] == 4
    assert values["gradient_accumulation_steps"] == 2
    assert "train_batch_size" not in values
    section = values["zero_optimization"]
    assert section["overlap_comm"] is True
    assert section["reduce_bucket_size"] == deepspeed_config.BUCKET
    assert values["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("GRADIENT_ACCUMULATION_STEPS", "8", "has gradient_accumulation_steps 8.0, "),
        ("GRADIENT_CLIPPING", "0.5", "has gradient_clipping 0.5, --max_grad_norm is 1.0"),
        ("GRADIENT_CLIPPING", "abc", "gradient_clipping: found abc; expected a number"),
        ("GRADIENT_ACCUMULATION_STEPS", "x", "gradient_accumulation_steps: found x; expected a"),
        ("DEEPSPEED_ZERO_STAGE", "three", "zero_stage: found three; expected 1, 2 or 3"),
        ("DEEPSPEED_ZERO_STAGE", "0", "zero_stage: found 0; expected 1, 2 or 3"),
        ("DEEPSPEED_OFFLOAD_PARAM_DEVICE", "nvme", "offload_param_device: found nvme"),
    ],
)
def test_an_accelerate_config_that_contradicts_a_flag_or_cannot_work_is_refused(
    name: str, value: str, expected: str, launched: pytest.MonkeyPatch
) -> None:
    launched.setenv(f"ACCELERATE_{name}", value)
    with pytest.raises(UserError, match=expected):
        deepspeed_config.complete(deepspeed_config.zero_settings(Config()), Config(), LAYOUT)


def test_an_accelerate_configs_clipping_at_1_contradicts_another_max_grad_norm(
    launched: pytest.MonkeyPatch,
) -> None:
    launched.setenv("ACCELERATE_GRADIENT_CLIPPING", "1.0")
    # accelerate exports this value if the config sets none, so it is no contradiction.
    launched.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    config = Config(max_grad_norm=0.3)
    with pytest.raises(UserError, match=r"gradient_clipping 1\.0, --max_grad_norm is 0\.3"):
        deepspeed_config.complete(deepspeed_config.zero_settings(config), config, LAYOUT)
    assert (
        deepspeed_config.complete(deepspeed_config.zero_settings(Config()), Config(), LAYOUT)[
            "gradient_clipping"
        ]
        == 1
    )


@pytest.mark.parametrize(
    ("other", "section", "expected"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "false"}, None, "backend is DeepSpeed ZeRO-2 on rank 0 and"),
        ({"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, None, "and DeepSpeed ZeRO-3 on rank 1"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, None, "the precision is no on rank 0 and bf16"),
        ({}, {"reduce_bucket_size": 7}, "reduce_bucket_size is not set on rank 0 and 7 on rank 1"),
        ({}, {"offload_param": {"device": "none"}, "reduce_bucket_size": "auto"}, None),
    ],
)
def test_different_launches_on_two_machines_are_refused_before_anything_is_built(
    other: dict[str, str],
    section: dict[str, Any] | None,
    expected: str | None,
    launched: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    first = {**deepspeed_config.launch_facts(Config()), **rank_shared_settings(Config())}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, **(section or {})}}))
    for name, value in other.items():
        launched.setenv(name, value)
    config = Config(deepspeed=str(file) if section else None)
    launched.setattr(accelerator, "PartialState", lambda: SimpleNamespace(num_processes=2))
    launched.setattr(accelerator, "gather_object", lambda sent: [first, *sent])
    launched.setattr(accelerator, "raise_on_all_ranks", nullcontext)
    if expected is None:
        accelerator.check_agreement(config, {})
    else:
        with pytest.raises(UserError, match=expected):
            accelerator.check_agreement(config, {})


@pytest.mark.parametrize("name", ["FSDP", "MEGATRON_LM"])
def test_fsdp_and_megatron_are_refused_and_the_message_names_zero3(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=r"accelerate_configs/zero3\.yaml"):
        accelerator.check_launch(Config())


def test_more_ranks_than_gpus_and_bf16_without_support_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The functions that query the GPU are replaced, so this test needs none.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"found 2 ranks on a machine with 1 GPU; .*NUM_PROCESSES=1"
    ):
        accelerator.init_process_group_once()
    with pytest.raises(UserError, match="found precision bf16 on Tesla T4"):
        accelerator.check_launch(Config(bf16=True))


def test_an_fsdp_config_is_one_message(tmp_path: Path) -> None:
    text = (ROOT / "accelerate_configs" / "ddp.yaml").read_text()
    fsdp = "fsdp_config:\n  fsdp_version: 2\n"
    config = tmp_path / "fsdp.yaml"
    config.write_text(text.replace("MULTI_GPU", "FSDP") + fsdp)
    done = command("./launch.sh", config, NUM_PROCESSES="2")
    assert done.returncode == 2
    assert done.stderr.count("error: found an accelerate config with FSDP") == 1
    assert "Traceback" not in done.stderr


FASTCHAT_S2 = {
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu"},
        "contiguous_gradients": True,
        "overlap_comm": True,
    },
    "fp16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
}
SHELL = """
    --lora_r 8 --lora_alpha 16 --lora_dropout 0.05 --num_train_epochs 2 --bf16 True
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --gradient_accumulation_steps 1
    --evaluation_strategy steps --eval_steps 100 --save_strategy steps --save_steps 200
    --save_total_limit 2 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type cosine --logging_strategy steps --logging_steps 1 --tf32 True
    --model_max_length 2048 --q_lora False --gradient_checkpointing True --flash_attn False
"""
T5_EXAMPLE = """
    --bf16 True --num_train_epochs 3 --per_device_train_batch_size 1
    --per_device_eval_batch_size 1 --gradient_accumulation_steps 4 --evaluation_strategy no
    --save_strategy steps --save_steps 300 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1
    --model_max_length 2048 --preprocessed_path preprocessed_data/processed.json
    --gradient_checkpointing True --q_lora True
"""


@pytest.mark.parametrize("flags", [SHELL, pytest.param(T5_EXAMPLE, marks=pytest.mark.slow)])
def test_fastchats_command_lines_train(flags: str, tiny_model: Path, tmp_path: Path) -> None:
    # FastChat: scripts/train_lora.sh, at 2 epochs and in bf16, and docs/training.md.
    deepspeed = tmp_path / "deepspeed_config_s2.json"
    deepspeed.write_text(json.dumps(FASTCHAT_S2))
    data = write_dialogues(tmp_path / "data.json", *[["Hi", "Yo " * n] for n in range(1, 5)])
    given = [*flags.replace("preprocessed_data", str(tmp_path)).split(), "--deepspeed", deepspeed]
    if flags is SHELL:
        given += ["--lora_weight_path", str(saved_adapter(tiny_model, tmp_path / "lora_weights"))]
    done = command(
        *("./launch.sh", "accelerate_configs/zero2_offload.yaml"),
        *("--model_name_or_path", tiny_model, "--data_path", data),
        *("--output_dir", tmp_path / "run", *given),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    note = "per_device_eval_batch_size: there is no evaluation data"
    assert done.stdout.count(f"note: --{note}") == 1
    assert len(log_of(tmp_path / "run")) == (4 if flags is SHELL else 3)


def saved_adapter(model: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    get_peft_model(base, adapter).save_pretrained(folder)
    return folder


def test_bitsandbytes_is_imported_only_when_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    data = write_dialogues(tmp_path / "data.json", ["Hi", "Yo"], ["And?", "So."])
    flags = ["--model_name_or_path", str(tiny_model), "--data_path", str(data), "--max_steps", "2"]
    flags += ["--output_dir", str(tmp_path / "run"), "--mixed_precision", "no"]
    code = f"import sys; sys.argv[1:] = {flags}\nfrom loop import train\ntrain.main()\n"
    code += "print('imported:', sys.modules['bitsandbytes'] is not None)"
    assert "imported: False" in command("python", "-c", code).stdout
