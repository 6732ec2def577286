"""LoRA's targets are right on every architecture of transformers, experts included."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from data.errors import UserError
from loop.adapters import merge
from loop.config.flags import Config
from loop.config.load import read_config
from loop.model.base import check_experts, read_base_config
from loop.model.lora_targets import ALL_BUT_EXPERTS, ALL_LINEAR, Targets, find_targets, kind_of
from loop.model.quantization import describe_parameters
from tests.conftest import small_tokenizer
from tests.support.helpers import command
from tests.support.target_table import PAGE, target_table
from tests.support.tiny_models import architectures, save_tiny, tiny_model

MIXTURES = [
    *("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "olmoe", "granitemoe", "ernie4_5_moe"),
    *("glm4_moe", "qwen3_next", "llama4_text"),
]
# Stored as one tensor a layer, as one an expert, renamed, and [experts, in, out].
STORED = ["gpt_oss", "qwen3_moe", "granitemoe", "deepseek_v3", "mixtral", "llama4_text"]
DEFAULTS = {
    "llama": ["q_proj", "v_proj"],
    "phi3": ["qkv_proj"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
    "mpt": ["Wqkv"],
    "deepseek_v3": ["kv_a_proj_with_mqa", "kv_b_proj", "q_a_proj", "q_b_proj"],
    "mamba2": ["in_proj"],
    "falcon_h1": ["in_proj", "q_proj", "v_proj"],
    "bert": ["query", "value"],
    "t5": ["q", "v"],
    "qwen3_next": ["in_proj_qkvz", "q_proj", "v_proj"],
}


def adapted(model: Any, targets: Targets) -> Any:
    modules, parameters = targets.for_peft(model)
    config = LoraConfig(r=2, target_modules=modules, target_parameters=parameters or None)
    return get_peft_model(model, config)


def trained(with_adapter: Any) -> dict[str, Any]:
    return {n: p for n, p in with_adapter.named_parameters() if "lora_B" in n}


@pytest.mark.parametrize(("kind", "names"), DEFAULTS.items())
def test_the_default_is_attentions_query_and_value_fused_or_not(
    kind: str, names: list[str]
) -> None:
    model = tiny_model(kind)
    assert find_targets(model, None).for_peft(model) == (names, [])


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_linear_adapts_each_expert_and_dense_layer_but_no_router_and_no_head(kind: str) -> None:
    model = tiny_model(kind)
    targets = find_targets(model, ALL_LINEAR)
    names = [*targets.modules, *targets.parameters]
    matrices = {
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim in (2, 3) and not name.endswith("_bias") and "conv" not in name
    }
    left_out = {name for name in matrices if name.removesuffix(".weight") not in names} - {*names}
    parts = {part for name in left_out for part in name.split(".")[-2:-1]}
    known = {"embed_tokens", "lm_head", "gate", "router", "shared_expert_gate", "moe_statics"}
    assert parts <= known, left_out
    routers = {"gate", "router", "shared_expert_gate", "lm_head"}
    assert [name for name in names if routers & {*name.split(".")}] == []
    assert sum(kind_of(name) == "expert" for name in names) >= 2
    without = find_targets(model, ALL_BUT_EXPERTS)
    assert {*names} - {*without.modules, *without.parameters} == {
        name for name in names if kind_of(name) == "expert"
    }


@pytest.mark.parametrize("kind", MIXTURES)
def test_each_target_of_a_mixture_gets_a_pair_of_its_own_and_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(kind)
    targets = find_targets(model, ALL_LINEAR)
    with_adapter = adapted(model, targets)
    tokens = torch.randint(3, 900, (4, 32))
    with_adapter(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    pairs = trained(with_adapter)
    assert len(pairs) == len(targets.modules) + len(targets.parameters)
    assert [name for name, b in pairs.items() if not b.grad.abs().max() > 0] == []


def test_the_plan_counts_what_is_adapted_by_kind() -> None:
    model = tiny_model("deepseek_v3")
    plan = describe_parameters(adapted(model, find_targets(model, ALL_LINEAR)))
    # Two layers; the second has four experts of two matrices, and a shared one of three.
    assert "adapted: 10 attention, 6 mlp, 8 experts" in plan


def test_only_the_text_part_of_a_vision_language_model_is_adapted() -> None:
    for asked in (None, ALL_LINEAR):
        targets = find_targets(tiny_model("gemma3"), asked)
        assert targets.modules
        assert all(name.startswith("model.language_model.") for name in targets.modules)


def test_weights_that_a_state_space_kernel_reads_are_left_out() -> None:
    for kind in ("mamba", "mamba2", "nemotron_h", "bamba"):
        model = tiny_model(kind)
        own = {name.rpartition(".")[2] for name in find_targets(model, ALL_LINEAR).modules}
        assert "in_proj" in own
        assert not own & {"out_proj", "x_proj", "dt_proj"}
        adapted(model, find_targets(model, ALL_LINEAR))


def test_a_dense_layers_name_does_not_adapt_the_experts() -> None:
    model = tiny_model("deepseek_v3")
    targets = find_targets(model, ("up_proj",))
    assert not targets.modules
    assert {*targets.parameters} == {
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.mlp.shared_experts.up_proj.weight",
    }
    assert len(trained(adapted(model, targets))) == 2


def test_experts_get_no_dropout_and_all_other_modules_get_theirs(
    tmp_path: Path, chat_tokenizer: Any
) -> None:
    folder = save_tiny("mixtral", tmp_path / "base", small_tokenizer(chat_tokenizer))
    output = tmp_path / "run"
    done = command(
        *("python", "loop/train.py", "--model_name_or_path", folder, "--output_dir", output),
        *("--max_steps", "2", "--num_data", "8", "--learning_rate", "1e-2"),
        *("--lora_target_modules", "all-linear", "--lora_dropout", "0.25"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adapted: 8 attention, 16 experts" in done.stdout
    assert "note: experts get LoRA dropout 0; all other modules 0.25" in done.stdout
    saved = json.loads((output / "adapter_config.json").read_text())
    assert saved["lora_dropout"] == 0
    # The names with which doctor and a continued training find the same targets.
    flags = ["--lora_weight_path", str(output), "--model_name_or_path", str(folder)]
    config = read_config(flags, Config)
    model = tiny_model("mixtral")
    again, first = (find_targets(model, n) for n in (config.lora_target_modules, ALL_LINEAR))
    assert again.modules.keys() == first.modules.keys()
    assert again.parameters.keys() == first.parameters.keys()


def test_4_bits_are_refused_where_most_of_the_model_would_stay_in_16(
    tmp_path: Path, chat_tokenizer: Any
) -> None:
    folder = str(save_tiny("qwen3_moe", tmp_path / "base", small_tokenizer(chat_tokenizer)))
    config = Config(q_lora=True)
    with pytest.raises(UserError, match=r"experts are 24 % .* 16 bits .* Leave --q_lora out"):
        check_experts(folder, read_base_config(folder, config), config)
    check_experts(folder, read_base_config(folder, Config()), Config())


@pytest.mark.parametrize("kind", STORED)
def test_merged_experts_are_those_of_peft_in_the_layout_of_the_base(
    kind: str, tmp_path: Path, chat_tokenizer: Any
) -> None:
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    folder = save_tiny(kind, tmp_path / "base", small_tokenizer(chat_tokenizer))
    base = AutoModelForCausalLM.from_pretrained(folder)
    with_adapter = adapted(base, find_targets(base, ALL_LINEAR))
    for b in trained(with_adapter).values():
        torch.nn.init.normal_(b, std=0.1)
    with_adapter.save_pretrained(tmp_path / "adapter")
    flags = ["--base", str(folder), "--prompts", "0", "--dtype", "fp32"]
    merge.main(["--adapter", str(tmp_path / "adapter"), *flags])
    expected = with_adapter.merge_and_unload().state_dict()
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter-merged").state_dict()
    assert {*result} == {*expected}
    for name, tensor in expected.items():
        assert torch.allclose(result[name], tensor, atol=1e-5, rtol=0), name
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "adapter-merged" / "model.safetensors")
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}


@pytest.mark.slow
def test_every_architecture_has_default_targets_or_is_refused_by_name() -> None:
    found, refused, unbuilt = [], [], []
    for kind, tasks in architectures().items():
        try:
            model = tiny_model(kind, tasks[-1])
        except Exception:  # needs timm, or has no text model
            unbuilt.append(kind)
            continue
        try:
            targets = find_targets(model, None)
        except UserError:
            refused.append(kind)
            continue
        assert len(trained(adapted(model, targets))) == len(targets.modules), kind
        found.append(kind)
    print(f"default targets: {len(found)}; refused: {refused}; not built: {unbuilt}")
    assert refused == ["moshi", "xlnet"]
    assert len(found) >= 205


@pytest.mark.slow
def test_the_table_of_default_targets_is_that_of_the_installed_transformers() -> None:
    assert target_table() in PAGE.read_text(encoding="utf-8")
