"""On a CPU, dropout has the given rate for each element, and freed memory is kept."""

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from loop import train as training
from loop.model import load as loading
from loop.model.kernels import DROPOUT_LEVELS, Dropout, replace_dropout
from tests.support.helpers import command

Train = Callable[..., Path]


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_has_the_given_rate_and_scales_the_other_values_up(
    p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    values = torch.ones(1001, 999, dtype=dtype, requires_grad=True)
    found = Dropout(p)(values)
    assert found.dtype == dtype
    rate = (found == 0).float().mean().item()
    assert rate == pytest.approx(p, abs=5 * (p * (1 - p) / values.numel()) ** 0.5)
    scale = DROPOUT_LEVELS / (DROPOUT_LEVELS - round(p * DROPOUT_LEVELS))
    assert scale == pytest.approx(1 / (1 - p), rel=1e-3)
    assert {*found.detach().unique().tolist()} == {0.0, torch.tensor(scale, dtype=dtype).item()}
    found.backward(torch.full_like(found, 3.0))
    assert values.grad is not None
    assert torch.equal(values.grad == 0, found == 0)
    assert values.grad.max() == (torch.tensor(3.0, dtype=dtype) * scale).to(dtype)


def test_elements_of_one_random_number_are_dropped_independently() -> None:
    torch.manual_seed(0)
    dropped = (Dropout(0.3)(torch.ones(1 << 20)) == 0).view(-1, 4).float()
    pairs = dropped.T @ dropped / len(dropped)
    # Two places are both dropped with probability 0.09. The bound is five standard deviations.
    for one in range(4):
        for other in range(4):
            expected = 0.3 if one == other else 0.09
            deviation = (expected * (1 - expected) / len(dropped)) ** 0.5
            assert pairs[one, other].item() == pytest.approx(expected, abs=5 * deviation)


def test_dropout_repeats_with_the_seed_and_is_off_in_evaluation() -> None:
    values = torch.randn(3, 7)
    module = Dropout(0.5)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(module(values))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert module.eval()(values) is values
    assert Dropout(0.0)(values) is values
    assert torch.equal(Dropout(1.0)(values), torch.zeros_like(values))


def test_all_dropout_modules_are_replaced_and_keep_their_mode() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Dropout(0.1)), "b": nn.Dropout(0.2).eval()})
    twice = nn.Sequential(*[nn.Dropout(0.1)] * 2)
    replace_dropout(twice)
    assert {*map(type, twice)} == {Dropout}
    replace_dropout(model)
    found = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert [(type(module), module.p, module.training) for module in found] == [
        (Dropout, 0.1, True),
        (Dropout, 0.2, False),
    ]


@pytest.mark.parametrize(("compiled", "kind"), [("False", Dropout), ("True", nn.Dropout)])
def test_a_cpu_run_uses_this_dropout_unless_it_is_compiled(
    compiled: str, kind: type[nn.Dropout], train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[nn.Module] = []
    calls: list[None] = []
    load = training.load_model

    def recorded(*arguments: object) -> object:
        model = load(*arguments)  # type: ignore[arg-type]
        seen.extend(model.modules())
        return model

    monkeypatch.setattr(training, "load_model", recorded)
    monkeypatch.setattr(loading, "keep_memory", lambda: calls.append(None))
    train("run", "--max_steps", "2", "--torch_compile", compiled)
    assert {type(module) for module in seen if isinstance(module, nn.Dropout)} == {kind}
    assert calls == [None]
    adapted = [module for module in seen if isinstance(module, LoraLayer)]
    assert {module.cast_input_dtype_enabled for module in adapted} == {False}


FREES = """
import ctypes, sys, torch
from loop.model.kernels import keep_memory
class Info(ctypes.Structure):  # malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
if sys.argv[1] == "kept":
    keep_memory()
mapped = []
for turn in range(20):
    before = libc.mallinfo2().hblks
    # Of many lengths, like the rows of a run: 4 to 28 MiB.
    held = [torch.ones((1 + (turn + place) % 7) << 20) for place in range(10)]
    mapped.append(libc.mallinfo2().hblks - before)
    arena = libc.mallinfo2().arena
    del held
    assert sys.argv[1] == "given" or libc.mallinfo2().arena == arena
print(sum(mapped))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_memory_that_is_freed_is_kept_by_the_c_library() -> None:
    """malloc returns mapped memory to the system each time that it is freed."""
    mapped = {how: int(command("python", "-c", FREES, how).stdout) for how in ("kept", "given")}
    assert mapped["kept"] == 0
    assert mapped["given"] > 0
