"""The fp16 loss scale is saved and restored; it is in neither the adapter nor AdamW's state."""

from types import SimpleNamespace
from typing import Any

import torch

from loop.distributed.optimizer_state import loss_scale, put_loss_scale


def plain(scale: float) -> Any:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    scaler.scale(torch.zeros(()))  # creates its state
    return SimpleNamespace(mixed_precision="fp16", scaler=scaler)


def deepspeed(scale: float) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    scaler = DynamicLossScaler(scale, 1000, 1.0, 1, False)
    return SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))


def test_the_fp16_loss_scale_resumes_on_the_same_and_on_another_backend() -> None:
    under_deepspeed = SimpleNamespace(mixed_precision="fp16", scaler=None)
    saved = loss_scale(plain(512.0), None)
    assert saved
    other = plain(2.0)
    put_loss_scale(other, None, saved)
    assert other.scaler.get_scale() == 512.0
    engine = deepspeed(2.0)
    put_loss_scale(under_deepspeed, engine, saved)
    assert engine.optimizer.loss_scaler.cur_scale == 512.0
    engine.optimizer.loss_scaler.update_scale(overflow=False)
    engine.optimizer.loss_scaler.update_scale(overflow=False)
    saved = loss_scale(under_deepspeed, engine)
    assert saved
    again = deepspeed(2.0)
    put_loss_scale(under_deepspeed, again, saved)
    mine, theirs = vars(again.optimizer.loss_scaler), vars(engine.optimizer.loss_scaler)
    assert mine == theirs
    put_loss_scale(other, None, saved)
    assert other.scaler.get_scale() == theirs["cur_scale"]
    assert loss_scale(SimpleNamespace(mixed_precision="bf16"), None) is None
