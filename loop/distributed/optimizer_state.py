"""Gathers weights and AdamW's moments from any backend, and loads them into any other.

DeepSpeed flattens fp32 master weights and moments, and partitions them over the ranks. Without
DeepSpeed, every rank holds them completely.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loop.utils import Tensors, file_name, gather_trained, gathered, is_partitioned

MOMENTS = ("exp_avg", "exp_avg_sq")


def create_moments(optimizer: Any) -> None:
    """Create AdamW's state as its first step would, so that it can be loaded and gathered.

    DeepSpeed 0.19.8 links all parameters to their moments after the step of the first parameter
    group (zero/stage_1_and_2.py). At that time the second group, the biases, has no moments yet.
    """
    inner = adamw(optimizer)
    zero = optimizer
    while hasattr(zero, "optimizer") and zero.optimizer is not inner:
        zero = zero.optimizer
    grouped = [parameter for group in inner.param_groups for parameter in group["params"]]
    # ZeRO-3 gives AdamW its flat tensors only during a step.
    for parameter in getattr(zero, "fp32_partitioned_groups_flat", grouped):
        inner.state[parameter] = {
            "step": torch.tensor(0.0),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def moments(model: nn.Module, optimizer: Any, keep: bool = True) -> Tensors:
    """Return AdamW's gathered moments, in fp32, on the CPU, and its step count, [] float32.

    Keys: `exp_avg.<name>`, `exp_avg_sq.<name>` and `step`. Every rank must call this.
    """
    state = adamw(optimizer).state
    all_moments: Tensors = {}
    for moment in MOMENTS:
        values = gather_trained(model, lambda p, key=moment: state[p][key], moment, keep)
        all_moments |= {f"{moment}.{file_name(name)}": value for name, value in values.items()}
    steps = next(iter(state.values()))["step"]
    return {**all_moments, "step": torch.as_tensor(steps).float().cpu().clone()} if keep else {}


def adamw(optimizer: Any) -> torch.optim.AdamW:
    """Return the AdamW inside the wrappers of accelerate and DeepSpeed."""
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def put_weights(model: nn.Module, adapter: Tensors) -> None:
    """Load weights into a model before `prepare`; every rank must hold them and call this.

    `load_optimizer_state` is not enough under DeepSpeed: it sets the fp32 master weights, and the
    model's weights keep their old values until the next step.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter), torch.no_grad():
                parameter.copy_(adapter[file_name(name)])


def load_trainable(model: nn.Module, adapter: Tensors) -> None:
    """Load weights into a prepared model and its fp32 master; every rank must call this."""
    put_weights(model, adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_partitioned(parameter):
            _put_partition(parameter, adapter[file_name(name)], None)


def load_optimizer_state(
    model: nn.Module, optimizer: Any, adapter: Tensors, moments: Tensors
) -> None:
    """Load a prepared optimizer's moments, step count and, under DeepSpeed, fp32 master weights."""
    state = adamw(optimizer).state
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_partitioned(parameter):
            _put_partition(parameter, adapter[file_name(name)], None)
        for moment in MOMENTS:
            value = moments[f"{moment}.{file_name(name)}"]
            if is_partitioned(parameter):
                _put_partition(parameter, value, moment)
            else:
                state[parameter][moment].copy_(value)
    for parameter_state in state.values():
        parameter_state["step"].copy_(moments["step"])


def _put_partition(parameter: Any, value: Tensor, moment: str | None) -> None:
    """Write an unpartitioned `value` to a parameter's moment, or to its fp32 master weights.

    Under ZeRO-3, each rank writes its own partition. DeepSpeed's setter would split the tensor
    without the padding of the last partition (0.19.8, zero/stage3.py, set_full_hp_param).
    """
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        if moment:
            utils.safe_set_full_optimizer_state(parameter, value, moment)
        else:
            utils.safe_set_full_fp32_param(parameter, value)
        return
    size, group = parameter.ds_tensor.numel(), parameter.ds_process_group
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    padded = nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    partition = padded[size * rank : size * (rank + 1)]
    if moment:
        utils.safe_set_local_optimizer_state(parameter, partition, moment)
    else:
        utils.safe_set_local_fp32_param(parameter, partition)


def broadcast_tensors(tensors: Tensors, device: torch.device) -> Tensors:
    """Return rank 0's tensors on every rank, on the CPU; every rank must call this."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    (shapes,) = broadcast_object_list([shapes])
    sent = {}
    for name, (shape, dtype) in shapes.items():
        tensor = tensors.get(name, torch.empty(shape, dtype=dtype))
        sent[name] = broadcast(tensor.to(device)).cpu()
    return sent


def loss_scale(accelerator: Accelerator, optimizer: Any) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scale; None in other precisions."""
    if accelerator.mixed_precision != "fp16":
        return None
    if accelerator.scaler is not None:
        return dict(accelerator.scaler.state_dict())
    values = vars(optimizer.optimizer.loss_scaler).items()
    return {k: v for k, v in values if isinstance(v, int | float)}


def put_loss_scale(accelerator: Accelerator, optimizer: Any, state: dict[str, float]) -> None:
    """Restore fp16's loss scale; the step counters only from the same backend."""
    if accelerator.mixed_precision != "fp16":  # resumed with --allow_resume_mismatch
        return
    if accelerator.scaler is not None:
        mine = accelerator.scaler.state_dict()
        scale = state.get("scale", state.get("cur_scale"))
        accelerator.scaler.load_state_dict(
            state if {*mine} == {*state} else {**mine, "scale": scale}
        )
        return
    scaler = optimizer.optimizer.loss_scaler
    if "scale" in state:
        state = {"cur_scale": state["scale"]}
    for name, value in state.items():
        setattr(scaler, name, value)


def forget_gradients(model: Any) -> None:
    """Drop the gradients that ZeRO-3 has accumulated since the last optimizer step.

    Call this only before the last backward pass of a window. Until then, nothing else needs a
    reset: moments, step counts and loss scale change only in an optimizer step (DeepSpeed 0.19.8,
    zero/stage3.py).
    """
    zero = model.optimizer
    zero.zero_grad()  # The next pass overwrites gradients instead of adding to them.
    zero.averaged_gradients = {}
    zero.grad_partitions_flat_buffer.zero_()  # for parameters without a gradient in the next pass


def freeze_ddp_buckets(model: Any) -> None:
    """Fix DDP's bucket layout before the first step; call this after `prepare`.

    DDP rebuilds its buckets after the first step of a launch (torch 2.13, reducer.hpp,
    should_rebuild_buckets). Over three or more ranks this changes the order of summation. So a
    resumed run would differ in its last digits.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()
