"""Compares loss and gradients with and without liger-kernel, in triton's interpreter; prints JSON.

python tests/support/kernels_on_cpu.py KIND ACTIVATION, with TRITON_INTERPRET=1
"""

import functools
import json
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from data.batching.collate import Collator
from data.encoding.encode import Example
from loop.model.kernels import use_kernels
from loop.model.packed_attention import implementation, row_inputs
from loop.training.loss import supervised_loss_sum


def mend_interpreter() -> None:
    """Make triton 3.9's interpreter accept Python floats and the GPU's rsqrt."""
    # Imported here, because pytest imports every module of tests/, even without these packages.
    import liger_kernel.ops.rms_norm as norm
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        handle = interpreter.TensorHandle(np.array([value], np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = converted
    norm.rsqrt = lambda x: tl.math.rsqrt(x)


def tiny(kind: str, activation: str) -> Any:
    """Return a random model of two layers, with norm weights other than 1."""
    torch.manual_seed(0)
    shape = AutoConfig.for_model(
        kind,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=60,
        hidden_act=activation,
    )
    model = AutoModelForCausalLM.from_config(shape, attn_implementation=implementation(True, False))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1, 0.3)
    return model


def loss_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss sum of a row of two dialogues, and the adapter's gradients."""
    examples = [
        Example("a", [*range(5, 22)], [-100] * 6 + [*range(11, 22)], 3),
        Example("b", [*range(30, 41)], [-100] * 3 + [*range(33, 41)], 3),
    ]
    batch = Collator(0, None, functools.partial(row_inputs, flash=False))(examples, 0)
    model.zero_grad()
    loss = supervised_loss_sum(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def main(kind: str, activation: str) -> None:
    """Print the differences, and the modules whose functions the layers run."""
    mend_interpreter()
    base = tiny(kind, activation)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, 0, 0.3)
    loss, gradients = loss_and_gradients(model)
    note = use_kernels(base)
    theirs, their_gradients = loss_and_gradients(model)
    layer = base.model.layers[0]
    rotation = sys.modules[type(base).__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]
    print(
        json.dumps(
            {
                "note": note,
                "loss": abs(loss - theirs).item() / loss.item(),
                "gradients": max(
                    ((g - their_gradients[n]).abs().max() / g.abs().max()).item()
                    for n, g in gradients.items()
                ),
                "trained": len(gradients),
                "run": [
                    layer.mlp.forward.__module__,
                    layer.input_layernorm.forward.__module__,
                    rotation.__module__,
                ],
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
