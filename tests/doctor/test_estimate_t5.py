"""The estimate equals the bytes that a T5 saves per layer, and is close to a step's peak."""

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import profile

from data.batching.collate import MicroBatch
from data.errors import UserError
from loop.doctor import forecast
from loop.doctor.command import main
from loop.doctor.flags import DoctorConfig
from loop.doctor.memory import estimate_t5
from loop.doctor.memory.estimate import activations, base_weights, scales
from loop.doctor.memory.run import Run, Size
from loop.doctor.memory.shape import backends, read_shape
from loop.model.dtypes import torch_dtype
from loop.model.kernels import replace_dropout
from loop.model.load import leave_inputs
from loop.model.quantization import compute_in_fp32, four_bit, kept_in_fp32
from loop.training.loss import supervised_loss_sum
from tests.support.helpers import ROOT

SMALL = {"vocab_size": 100, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_heads": 4}
LARGER = {"vocab_size": 1000, "d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4}
FLAN, FIRST = {"feed_forward_proj": "gated-gelu"}, {"feed_forward_proj": "relu"}
LINEAR, USUAL = ("all-linear",), ("q", "v")


def t5(folder: Path, layers: tuple[int, int], **values: Any) -> Any:
    """Return a random T5's config, and write it; layers: the encoder's and the decoder's."""
    from transformers import T5Config

    names = {"num_layers": layers[0], "num_decoder_layers": layers[1], "decoder_start_token_id": 0}
    config = T5Config(**SMALL | names | values)
    config.save_pretrained(folder)
    return config


def built(folder: Path, config: DoctorConfig, name: str = "single_gpu") -> Any:
    """Return a T5 with peft's adapter, loaded and set up as loop/model/load.py does on a CPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    dtype = torch_dtype(config.precision)
    T5ForConditionalGeneration(T5Config.from_pretrained(folder)).save_pretrained(folder)
    options = {"quantization_config": four_bit(dtype)} if config.q_lora else {}
    if config.q_lora:
        with kept_in_fp32():
            base = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype, **options)
        if config.precision != "no":
            compute_in_fp32(base, deepspeed=False)
    else:
        base = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=dtype)
    if config.gradient_checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    targets = config.lora_target_modules or USUAL
    settings = LoraConfig(
        task_type="SEQ_2_SEQ_LM",
        r=config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == LINEAR else list(targets),
    )
    model = get_peft_model(base, settings, autocast_adapter_dtype=name == "single_gpu")
    if name == "single_gpu":
        leave_inputs(model)
    replace_dropout(model.train())
    return model


def estimated(folder: Path, config: DoctorConfig, size: Size, name: str = "single_gpu") -> Run:
    backend = next(backend for backend in backends() if backend.name == name)
    return Run(read_shape(str(folder), config), config, backend, 1, 1.0, size, gpu=False)


def batch(size: Size, words: int) -> MicroBatch:
    """Return random pairs, the first source with padding."""
    ids, read = (torch.randint(words, (size.rows, side)) for side in (size.source, size.target))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": read}
    return MicroBatch(inputs, torch.arange(read.numel()), read.flatten(), 1)


def saved_bytes(model: Any, size: Size, autocast: bool) -> int:
    """Return the bytes that autograd saves in a forward pass, without weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = batch(size, SMALL["vocab_size"]).model_inputs
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        output = model(**inputs, use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    del output
    return found


@pytest.mark.parametrize(
    ("name", "precision", "base", "dropout", "values"),
    [
        ("single_gpu", "bf16", FLAN, 0.1, {}),
        ("single_gpu", "bf16", FLAN, 0.0, {"lora_target_modules": LINEAR}),
        ("single_gpu", "bf16", FLAN, 0.1, {"lora_target_modules": LINEAR, "lora_dropout": 0.0}),
        ("single_gpu", "bf16", FIRST, 0.1, {}),
        ("single_gpu", "bf16", FIRST, 0.0, {"lora_dropout": 0.0}),
        ("single_gpu", "no", FLAN, 0.1, {"lora_target_modules": LINEAR}),
        ("single_gpu", "no", FIRST, 0.0, {}),
        ("zero2", "bf16", FLAN, 0.1, {"lora_dropout": 0.0}),
        ("zero2", "bf16", FIRST, 0.1, {"lora_target_modules": LINEAR}),
        ("single_gpu", "bf16", FLAN, 0.1, {"q_lora": True, "lora_target_modules": LINEAR}),
        ("single_gpu", "no", FIRST, 0.1, {"q_lora": True}),
    ],
    ids=str,
)
def test_a_layer_of_either_stack_keeps_what_autograd_saves(
    name: str, precision: Any, base: Any, dropout: float, values: Any, tmp_path: Path
) -> None:
    config = DoctorConfig(mixed_precision=precision, **values)
    size, measured, counted = Size(2, 12, 7), [], []
    for layers in ((2, 2), (3, 2), (2, 3)):
        t5(tmp_path, layers, dropout_rate=dropout, **base)
        run = estimated(tmp_path, config, size, name)
        assert run.shape.t5
        measured.append(saved_bytes(built(tmp_path, config, name), size, run.autocast))
        copies = run.autocast * 2 * run.adapter  # counted as part of the adapter
        counted.append(estimate_t5.kept_activations(run, run.shape.t5) + copies)
    for deeper in (1, 2):
        assert measured[deeper] - measured[0] == counted[deeper] - counted[0] > 0
    # Layers before the first trained weight save nothing, but the estimate counts them.
    assert measured[0] <= counted[0] < 1.15 * measured[0]


def held_and_most(profile: Any) -> tuple[int, int]:
    """Return the allocated bytes at the end, and their peak."""
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return held, most


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("size", "precision", "base", "values"),
    [
        (Size(2, 96, 64), "bf16", FLAN, {}),
        (Size(2, 192, 16), "no", FLAN, {"lora_target_modules": LINEAR}),
        (Size(2, 16, 192), "bf16", FIRST, {"lora_target_modules": LINEAR}),
        (Size(2, 96, 64), "no", FIRST, {}),
        (Size(2, 192, 16), "bf16", FLAN, {"q_lora": True}),
    ],
    ids=str,
)
def test_a_step_s_peak_is_within_15_percent_of_the_estimate(
    size: Size, precision: Any, base: Any, values: Any, checkpointing: bool, tmp_path: Path
) -> None:
    """The peak is measured in the allocator, without weights, gradients and moments."""
    config = DoctorConfig(mixed_precision=precision, gradient_checkpointing=checkpointing, **values)
    t5(tmp_path, (3, 3), **LARGER, **base)
    run, model = estimated(tmp_path, config, size), built(tmp_path, config)
    pairs = batch(size, LARGER["vocab_size"])
    with torch.autocast("cpu", torch.bfloat16, enabled=run.autocast):
        supervised_loss_sum(model, pairs).backward()  # From the second step on, gradients exist.
    gc.collect()
    # On some CPUs oneDNN takes scratch memory for bf16.
    with torch.backends.mkldnn.flags(enabled=False):
        with (
            profile(profile_memory=True) as forward,
            torch.autocast("cpu", torch.bfloat16, enabled=run.autocast),
        ):
            loss = supervised_loss_sum(model, pairs)
        with profile(profile_memory=True) as backward:
            loss.backward()
    held, most = held_and_most(forward)
    most = max(most, held + held_and_most(backward)[1])
    kept, other = activations(run).values()
    states = run.width * run.shape.hidden * run.supervised  # the states' gradient, of the loss
    assert held - states == pytest.approx(kept, rel=0.05)
    assert most == pytest.approx(kept + other, rel=0.15)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_beside_wo_are_in_4_bits_and_wo_in_fp32(precision: Any, tmp_path: Path) -> None:
    config = DoctorConfig(q_lora=True, mixed_precision=precision)
    t5(tmp_path, (2, 3), **LARGER, **FLAN)
    run, model = estimated(tmp_path, config, Size(1, 8, 8)), built(tmp_path, config)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert base_weights(run) == sum(p.numel() * p.element_size() for p in frozen)
    states = [p.quant_state for p in frozen if hasattr(p, "quant_state")]
    parts = [(s.absmax, s.code, s.state2.absmax, s.state2.code, s.offset) for s in states]
    assert scales(run) == sum(x.numel() * x.element_size() for part in parts for x in part)


def test_on_a_gpu_attention_s_weights_are_not_kept_and_autocast_s_powers_are_wide(
    tmp_path: Path,
) -> None:
    """The expected values are from PyTorch's code, not measured."""
    t5(tmp_path, (2, 2), **FLAN)
    on_cpu = estimated(tmp_path, DoctorConfig(mixed_precision="bf16"), Size(2, 1024, 1024))
    on_gpu = replace(on_cpu, gpu=True)
    shape = on_cpu.shape.t5
    assert shape
    assert estimate_t5.feed_forward(on_gpu, shape) == 160 * (3 * 4 + 2 + 4 + 2 + 1)
    assert estimate_t5.feed_forward(on_cpu, shape) == 160 * (3 * 2 + 2 + 2 + 2 + 1)
    square = 4 * 1024 * 1024
    assert 3 * 4 * square < estimate_t5.attention(on_cpu, shape, 1024, 1024) < 4 * 4 * square
    assert estimate_t5.attention(on_gpu, shape, 1024, 1024) < square
    assert estimate_t5.bias(on_gpu, shape, 1024, 1024) == 2 * square


def test_the_micro_batch_that_takes_most_is_not_the_one_with_most_tokens(tmp_path: Path) -> None:
    base_config = t5(tmp_path, (2, 2), **FLAN)
    model: Any = SimpleNamespace(no_estimate="", bare=None, base_config=base_config)
    from loop.doctor.memory.shape import bare_model

    config = DoctorConfig(mixed_precision="bf16")
    model.bare = bare_model(str(tmp_path), base_config, config)
    many, long = Size(16, 60, 10), Size(1, 1000, 10)
    tokens = forecast.TokenForecast(1e5, frozenset({many, long}), 0.3)
    backend = next(backend for backend in backends() if backend.name == "single_gpu")
    data: Any = SimpleNamespace(base=SimpleNamespace(new_tokens=[]))
    found = forecast.largest_run(model, data, backend, 1, tokens, config)
    assert found
    assert many.tokens > long.tokens
    assert found.size == long
    assert found.supervised == 10  # all target tokens


def test_the_doctor_estimates_a_t5_and_refuses_one_of_another_build(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t5(tmp_path, (2, 3), **FLAN)
    words = ["--estimate", "--model_name_or_path", str(tmp_path), "--max_target_length", "256"]
    main(words)
    report = capsys.readouterr().out
    assert "micro-batch 8 x (2048 + 256) tokens" in report
    assert "LoRA r 8 on q v" in report
    file = ROOT / "accelerate_configs" / "zero3.yaml"
    main([*words, "--accelerate_config", str(file), "--q_lora", "True"])
    assert "zero3, QLoRA, bf16, rank of 8" in capsys.readouterr().out
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"t5"', '"umt5"'))
    with pytest.raises(UserError, match="expects a LLaMA-like model, or one of the types t5, mt5"):
        main(words)


def test_the_doctor_prints_a_t5_s_memory_by_part(
    tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = []
    original: Callable[..., Any] = forecast.memory_rows

    def keep(*values: Any) -> Any:
        found = original(*values)
        rows.extend(found[0])
        return found

    monkeypatch.setattr(forecast, "memory_rows", keep)
    words = ["--model_name_or_path", str(tiny_t5), "--output_dir", str(tmp_path / "run")]
    alone = str(ROOT / "accelerate_configs" / "cpu.yaml")
    main([*words, "--accelerate_config", alone, "--report_to", "none"])
    table = dict(rows)
    assert "kept activations" in table["each rank"]
    assert " + " in table["assuming"]
