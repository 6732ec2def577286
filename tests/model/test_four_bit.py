"""4-bit models are refused if they contradict the flags; others are loaded as stored."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data.errors import UserError
from loop.config.flags import Config
from loop.model.quantization import check_quantization
from tests.support.helpers import command

NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16",
}


@pytest.mark.parametrize(
    ("stored", "config", "stage", "section", "expected"),
    [
        ({"quant_method": "gptq"}, Config(q_lora=True), 0, {}, "quantised already (gptq)"),
        ({"quant_method": "gptq"}, Config(), 2, {}, "quantised already (gptq)"),
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            *(Config(), 2, {}, "Give --q_lora True"),
        ),
        (NF4, Config(q_lora=True, bf16=True), 3, {}, "as uint8, which ZeRO-3 cannot partition"),
        (
            NF4 | {"bnb_4bit_quant_type": "fp4"},
            *(Config(q_lora=True, bf16=True), 0, {}, "of the type fp4; expected nf4. Give the pla"),
        ),
        (NF4, Config(q_lora=True), 0, {}, "Give --mixed_precision bf16, or the plain model"),
        (NF4, Config(q_lora=True, fp16=True), 2, {}, "compute in bfloat16, and the run in float16"),
        (
            NF4 | {"bnb_4bit_quant_storage": "float16"},
            *(Config(q_lora=True, bf16=True), 2, {}, "which DeepSpeed would cast to bfloat16"),
        ),
        (None, Config(q_lora=True), 3, {"zero_quantized_weights": True}, "zero_quantized_weights"),
    ],
)
def test_a_4_bit_model_that_does_not_fit_the_run_is_refused(
    stored: Any, config: Config, stage: int, section: dict[str, Any], expected: str
) -> None:
    base_config = SimpleNamespace(quantization_config=stored)
    zero = {"stage": stage, **section} if stage else {}
    with pytest.raises(UserError) as error:
        check_quantization("base", base_config, config, zero)
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("storage", "stage"), [("uint8", 0), ("uint8", 2), ("float32", 0), ("bfloat16", 3)]
)
def test_a_4_bit_model_that_fits_the_run_is_accepted(storage: str, stage: int) -> None:
    base_config = SimpleNamespace(quantization_config=NF4 | {"bnb_4bit_quant_storage": storage})
    zero = {"stage": stage} if stage else {}
    check_quantization("base", base_config, Config(q_lora=True, bf16=True), zero)


def test_a_4_bit_model_keeps_its_own_settings_without_a_warning(
    tiny_model: Path, tmp_path: Path
) -> None:
    # A separate process, because bitsandbytes must not be imported in this one.
    code = f"""
import sys, torch, warnings
from transformers import AutoConfig, AutoModelForCausalLM
from loop.model.load import load_pretrained
from loop.model.quantization import four_bit
warnings.filterwarnings("error", message=".*quantization_config.*")
settings = four_bit(torch.float32)
settings.bnb_4bit_quant_storage = torch.uint8
plain, folder = {str(tiny_model)!r}, {str(tmp_path / "four")!r}
AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings).save_pretrained(folder)
base_config = AutoConfig.from_pretrained(folder)
model, missing = load_pretrained(folder, base_config, torch.float32, torch.float32)
assert not missing
weight = model.model.layers[0].self_attn.q_proj.weight
print("loaded:", weight.dtype, weight.quant_state.quant_type, model.lm_head.weight.dtype)
"""
    done = command("python", "-c", code)
    assert "loaded: torch.uint8 nf4 torch.float32" in done.stdout, done.stderr
    assert "quantization_config" not in done.stderr
