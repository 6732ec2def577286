"""The estimate equals the memory of built models; docs/memory.md equals the estimate."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.errors import UserError
from loop.doctor.command import main
from loop.doctor.flags import DoctorConfig
from loop.doctor.memory import estimate
from loop.doctor.memory.estimate import (
    kept_activations,
    layer_activations,
    layer_backward,
    memory,
    sent,
)
from loop.doctor.memory.run import Run
from loop.doctor.memory.shape import Shape, backends, read_backend, read_shape
from loop.doctor.memory.table import counts, launch, overview, setting
from loop.model.kernels import replace_dropout
from loop.model.load import leave_inputs
from tests.support.helpers import ROOT

DOCS = ROOT / "docs" / "memory.md"
TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}
# hidden, intermediate, layers, heads, key heads
LLAMA_2 = {
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}
# The settings of the tables in docs/memory.md.
DOCUMENTED = DoctorConfig(per_device_train_batch_size=1, gradient_checkpointing=True)


def llama(folder: Path, **values: Any) -> str:
    """Write a folder with only a config.json."""
    folder.mkdir(exist_ok=True)
    fixed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(fixed | TINY | values))
    return str(folder)


def llama_2(folder: Path, size: str) -> Shape:
    """Return the shape of a Llama-2 with the default adapter."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = dict(zip((*names, "num_key_value_heads"), LLAMA_2[size], strict=True))
    return read_shape(llama(folder / size, vocab_size=32000, **values), DOCUMENTED)


@pytest.fixture(scope="module")
def seven(tmp_path_factory: pytest.TempPathFactory) -> Shape:
    return llama_2(tmp_path_factory.mktemp("shapes"), "7B")


def run(shape: Shape, name: str, ranks: int = 8, **values: Any) -> Run:
    backend = next(backend for backend in backends() if backend.name == name)
    return launch(shape, replace(DOCUMENTED, num_processes=ranks, **values), backend)


def built(base: str, config: DoctorConfig, **lora: Any) -> Any:
    """Return a real model with peft's adapter, as loop/model/load.py injects it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    targets = config.lora_target_modules or ("q_proj", "v_proj")
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_r,
        lora_dropout=config.lora_dropout,
        target_modules=targets[0] if targets == ("all-linear",) else list(targets),
        bias=config.lora_bias,
    )
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    return get_peft_model(model, settings, **lora)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"lora_target_modules": ("all-linear",), "lora_r": 3},
        {"lora_target_modules": ("o_proj", "embed_tokens"), "tied": True},
        {"lora_target_modules": ("all-linear",), "tied": True},
        {"lora_bias": "all", "biased": True},
        {"lora_bias": "lora_only", "biased": True},
    ],
    ids=str,
)
def test_parameters_are_counted_as_in_a_built_model(values: dict[str, Any], tmp_path: Path) -> None:
    from torch import nn

    biased, tied = values.pop("biased", False), values.pop("tied", False)
    config = DoctorConfig(**values)
    base = llama(tmp_path / "m", attention_bias=biased, tie_word_embeddings=tied)
    shape = read_shape(base, config)
    # The built model also has LoRA's Linears, whose weights are trained.
    model = built(base, config)
    parameters = list(model.parameters())
    assert sorted(shape.trained) == sorted(p.numel() for p in parameters if p.requires_grad)
    frozen = [p.numel() for p in parameters if not p.requires_grad]
    assert sorted([*shape.model.linears, *shape.model.others]) == sorted(frozen)
    head = model.get_output_embeddings()
    linears = [
        m.weight.numel()
        for m in model.modules()
        if isinstance(m, nn.Linear) and m is not head and not m.weight.requires_grad
    ]
    assert sorted(shape.model.linears) == sorted(linears)
    assert len(shape.layer.linears) * 3 == len(shape.model.linears) == 21


@pytest.mark.parametrize("name", ["single_gpu", "zero2"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("all-linear",)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.05])
def test_a_layer_keeps_what_autograd_saves(
    name: str, targets: tuple[str, ...], share: float, tmp_path: Path
) -> None:
    import torch

    values = {"lora_target_modules": targets, "lora_dropout": share, "mixed_precision": "bf16"}
    config = replace(DOCUMENTED, gradient_checkpointing=False, **values)
    saved = []
    for layers in (3, 4):
        base = llama(tmp_path / str(layers), num_hidden_layers=layers)
        adapter_in_fp32 = name == "single_gpu"
        model = built(base, config).bfloat16()
        leave_inputs(model)
        replace_dropout(model.train())
        for parameter in model.parameters():
            if parameter.requires_grad and adapter_in_fp32:
                parameter.data = parameter.data.float()
        storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, Any] = {}

        def keep(tensor: Any, storages: Any = storages, kept: Any = kept) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                kept[storage.data_ptr()] = storage
            return tensor

        ids = torch.arange(24).view(2, 12)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=adapter_in_fp32),
        ):
            output = model(input_ids=ids, use_cache=False)
        saved.append(sum(storage.nbytes() for storage in kept.values()))
        del output
    shape = read_shape(base, config)
    backend = next(backend for backend in backends() if backend.name == name)
    one = launch(shape, config, backend)
    copies = one.autocast * 2 * one.adapter / shape.layers  # counted as part of the adapter
    assert saved[1] - saved[0] == 24 * layer_activations(one) + copies


def test_optimizer_state_and_gradients_divide_by_the_ranks_and_weights_do_not(seven: Shape) -> None:
    one, eight = (memory(run(seven, "zero2", ranks)) for ranks in (1, 8))
    assert eight["optimizer"] == one["optimizer"] / 8 > 0
    assert eight["base weights"] == one["base weights"] == 2 * 6_738_415_616
    # The bucket is not partitioned.
    assert one["gradients"] - eight["gradients"] == 4 * sum(seven.trained) * 7 / 8


def test_zero3_divides_the_weights_except_small_ones_and_the_scales(seven: Shape) -> None:
    norms = 2 * (2 * 32 + 1) * 4096
    for ranks in (2, 8):
        found = memory(run(seven, "zero3", ranks))
        assert found["base weights"] == 2 * 6_738_415_616 / ranks + norms
        codes = memory(run(seven, "zero3", ranks, q_lora=True))
        assert codes["4-bit scales"] == memory(run(seven, "zero2", q_lora=True))["4-bit scales"]
        assert codes["base weights"] < found["base weights"] / 3
    # 4.127 bits per weight: 4, and 0.127 for scales (QLoRA, Dettmers 2023, section 3).
    bits = 8 * codes["4-bit scales"] / sum(seven.model.linears)
    assert bits == pytest.approx(0.127, abs=1e-3)


def test_offloaded_parts_leave_the_device(seven: Shape) -> None:
    on, off = (memory(run(seven, name)) for name in ("zero3", "zero3_offload"))
    assert off["optimizer"] == 0 < on["optimizer"]
    assert off["base weights"] < on["base weights"] / 100


def test_checkpointing_lowers_activations(seven: Shape) -> None:
    for name in ("single_gpu", "zero2", "zero3"):
        off, on = (run(seven, name, gradient_checkpointing=flag) for flag in (False, True))
        assert kept_activations(on) < kept_activations(off) / 5


def test_communication_follows_ranks_and_micro_batches(seven: Shape) -> None:
    adapter = sum(seven.trained)
    assert sent(run(seven, "ddp")) == 2 * 4 * adapter * 7 / 8
    assert sent(run(seven, "ddp", global_batch_size=64)) == 2 * 4 * adapter * 7 / 8
    assert sent(run(seven, "zero2", global_batch_size=64)) == (2 * 4 * 8 + 2) * adapter * 7 / 8
    for name in ("ddp", "zero1", "zero2", "zero3"):
        assert sent(run(seven, name, ranks=1)) == 0
    # Twice the weights, except those that stay gathered between forward and backward pass.
    assert 1.5 < sent(run(seven, "zero3")) / (2 * 6_738_415_616 * 7 / 8) < 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--estimate", "--model_name_or_path", "{here}"), "holds no config.json"),
        (("--estimate", "--accelerate_config", "nowhere.yaml"), "zero3_offload.yaml"),
        (
            ("--estimate", "--accelerate_config", "{here}/fsdp.yaml"),
            "accelerate_configs/zero3.yaml",
        ),
        (("--estimate", "--accelerate_config", "{here}/five.yaml"), "deepspeed_config: found 5"),
        (("--estimate", "--model_name_or_path", "{here}/no_heads"), "cannot be loaded"),
        (("--estimate", "--model_name_or_path", "{here}/text"), "cannot be loaded"),
        (("--estimate", "--model_name_or_path", "{here}/odd"), "cannot be loaded"),
        (("--estimate", "--deepspeed", "ds.json"), "accelerate configs only"),
        (("--estimate", "--model_name_or_path", "{here}/gpt2"), "expects a LLaMA-like model"),
        (
            ("--estimate", "--model_name_or_path", "{here}/m", "--lora_target_modules", "query"),
            "found query, which names no module of the model",
        ),
    ],
    ids=str,
)
def test_an_error_is_one_message(flags: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "fsdp.yaml").write_text("distributed_type: FSDP\n")
    llama(tmp_path / "m")
    (tmp_path / "five.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: 5\n")
    llama(tmp_path / "no_heads", num_attention_heads=0)
    llama(tmp_path / "text", hidden_size="64")
    llama(tmp_path / "odd", hidden_size=65)
    llama(tmp_path / "gpt2", model_type="gpt2", intermediate_size=None)
    here = [flag.format(here=tmp_path) for flag in flags]
    model = () if "--model_name_or_path" in here else ("--model_name_or_path", str(tmp_path / "m"))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        main([*here, *model])
    assert "\n" not in str(caught.value)


def test_every_accelerate_config_can_be_read() -> None:
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        assert read_backend(path).name == path.stem


def test_the_documented_tables_are_the_estimates(tmp_path: Path) -> None:
    text = DOCS.read_text()
    for size in LLAMA_2:
        shape = llama_2(tmp_path, size)
        assert setting(shape, DOCUMENTED) in text
        assert f"{size}: {counts(shape)}" in text
        assert overview(shape, DOCUMENTED) in text


def test_each_documented_formula_is_in_the_code() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\s|\b(run|shape|config|self)\.", "", text)

    folder = ROOT / "loop" / "doctor" / "memory"
    code = plain("".join(file.read_text() for file in folder.glob("estimate*.py")))
    cells = re.findall(r"^\|[^|]*\| `([^`]+)`", DOCS.read_text(), re.MULTILINE)
    assert len(cells) > 25
    assert not [formula for formula in cells if plain(formula) not in code]


def test_the_estimate_is_within_15_percent_of_what_was_measured(tmp_path: Path) -> None:
    """The table in docs/memory.md, measured when all logits were computed at once."""
    row = r"^\| (\w+) \| (Q?LoRA) \| (on|off) \| ([\d,]+) \| ([\d,]+) \|"
    rows = re.findall(row, DOCS.read_text(), re.MULTILINE)
    assert len(rows) == 16
    folder = llama(
        tmp_path / "measured",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=49152,
    )
    for name, kind, checkpointing, estimated, measured in rows:
        config = DoctorConfig(
            q_lora=kind == "QLoRA",
            gradient_checkpointing=checkpointing == "on",
            mixed_precision="bf16",
            model_max_length=512,
            per_device_train_batch_size=4,
        )
        backend = read_backend(ROOT / "accelerate_configs" / f"{name}.yaml")
        run = Run(read_shape(folder, config), config, backend, 1, 0.822)
        parts = memory(run)
        parts["loss, or one layer's backward"] = max(
            estimate.full_loss(run, run.supervised), layer_backward(run)
        )
        megabytes = sum(parts.values()) / 2**20
        assert f"{megabytes:,.0f}" == estimated
        assert megabytes == pytest.approx(int(measured.replace(",", "")), rel=0.15)
