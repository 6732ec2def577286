"""The trained state, whole: gathered from any backend, and put into any other.

DeepSpeed holds fp32 master weights and AdamW's moments in flat tensors that the ranks share out;
elsewhere every rank has all of both.
"""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from loop.utils import Tensors, file_name, gather_trained, gathered, is_partitioned

MOMENTS = ("exp_avg", "exp_avg_sq")


def moments(model: nn.Module, optimizer: Any, keep: bool = True) -> Tensors:
    """Return AdamW's moments whole, in fp32, on the CPU, and its count of steps, [] float32.

    Named `exp_avg.<name>`, `exp_avg_sq.<name>` and `step`. Every rank must call this.
    """
    state = adamw(optimizer).state
    gathered: Tensors = {}
    for moment in MOMENTS:
        found = gather_trained(model, lambda p, key=moment: state[p][key], moment, keep)
        gathered |= {f"{moment}.{file_name(name)}": tensor for name, tensor in found.items()}
    steps = next(iter(state.values()))["step"]
    return {**gathered, "step": torch.as_tensor(steps).float().cpu().clone()} if keep else {}


def adamw(optimizer: Any) -> torch.optim.AdamW:
    """Return the AdamW that accelerate and DeepSpeed have wrapped."""
    while not isinstance(optimizer, torch.optim.AdamW):
        optimizer = optimizer.optimizer
    return optimizer


def create_moments(optimizer: Any) -> None:
    """Make AdamW's state as its first step would make it, so that it can be filled and gathered.

    DeepSpeed 0.19.8 (zero/stage_1_and_2.py) links parameters to their moments once the first
    group of parameters has stepped, when the second one has no moments yet: biases had none.
    """
    inner = adamw(optimizer)
    zero = optimizer
    while hasattr(zero, "optimizer") and zero.optimizer is not inner:
        zero = zero.optimizer
    grouped = [parameter for group in inner.param_groups for parameter in group["params"]]
    # ZeRO-3 lends AdamW its flat tensors for the time of a step only.
    for parameter in getattr(zero, "fp32_partitioned_groups_flat", grouped):
        inner.state[parameter] = {
            "step": torch.tensor(0.0),
            **{moment: torch.zeros_like(parameter) for moment in MOMENTS},
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def broadcast_tensors(tensors: Tensors, device: torch.device) -> Tensors:
    """Return the first rank's tensors on every rank, on the CPU; every rank must call this."""
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    (shapes,) = broadcast_object_list([shapes])
    sent = {}
    for name, (shape, dtype) in shapes.items():
        tensor = tensors.get(name, torch.empty(shape, dtype=dtype))
        sent[name] = broadcast(tensor.to(device)).cpu()
    return sent


def put_weights(model: nn.Module, adapter: Tensors) -> None:
    """Put weights into a model that is not prepared yet; every rank must hold them and call this.

    DeepSpeed casts its working copies from these: setting its master alone leaves them as they
    were until the next step.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter), torch.no_grad():
                parameter.copy_(adapter[file_name(name)])


def load_trainable(model: nn.Module, adapter: Tensors) -> None:
    """Put weights into a prepared model, its fp32 master too; every rank must call this."""
    put_weights(model, adapter)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_partitioned(parameter):
            _put_share(parameter, adapter[file_name(name)], None)


def load_optimizer_state(
    model: nn.Module, optimizer: Any, adapter: Tensors, moments: Tensors
) -> None:
    """Fill the prepared optimizer: fp32 weights where it has its own, moments, count of steps."""
    state = adamw(optimizer).state
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_partitioned(parameter):
            _put_share(parameter, adapter[file_name(name)], None)
        for moment in MOMENTS:
            value = moments[f"{moment}.{file_name(name)}"]
            if is_partitioned(parameter):
                _put_share(parameter, value, moment)
            else:
                state[parameter][moment].copy_(value)
    for held in state.values():
        held["step"].copy_(moments["step"])


def freeze_ddp_buckets(model: Any) -> None:
    """Have DDP lay its buckets out before the first step, once and for all; after `prepare`.

    By itself it does so after a run's first step (torch 2.13, reducer.hpp, should_rebuild_buckets),
    and with them changes the order in which three ranks or more are summed: a resumed run would
    differ in the last digits.
    """
    if isinstance(model, DistributedDataParallel):
        model.reducer._push_all_rebuilt_params()
        model.reducer._rebuild_buckets()


def forget_gradients(model: Any) -> None:
    """Drop what backward passes under ZeRO-3 have summed up since the last step, or the first.

    From its engine, after passes that are not a window's last. Moments, counts of steps and loss
    scale change with a step alone; whether a pass is the last is told before each (DeepSpeed
    0.19.8, zero/stage3.py).
    """
    zero = model.optimizer
    zero.zero_grad()  # the next pass writes gradients over what there is; it would have added them
    zero.averaged_gradients = {}
    zero.grad_partitions_flat_buffer.zero_()  # for a parameter that the next pass does not use


def loss_scale(accelerator: Accelerator, optimizer: Any) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scale; None in other precisions."""
    if accelerator.mixed_precision != "fp16":
        return None
    if accelerator.scaler is not None:
        return dict(accelerator.scaler.state_dict())
    values = vars(optimizer.optimizer.loss_scaler).items()
    return {k: v for k, v in values if isinstance(v, int | float)}


def put_loss_scale(accelerator: Accelerator, optimizer: Any, state: dict[str, float]) -> None:
    """Restore it; from another backend the scale alone, since each counts in its own way."""
    if accelerator.mixed_precision != "fp16":  # --allow_resume_mismatch
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


def _put_share(parameter: Any, value: Tensor, moment: str | None) -> None:
    """Write this rank's share of a whole tensor: the fp32 master, or one of the moments.

    DeepSpeed's own setter cuts a tensor into equal parts without the padding that its last part
    has (0.19.8, zero/stage3.py, set_full_hp_param), so the part is cut here.
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
    share = padded[size * rank : size * (rank + 1)]
    if moment:
        utils.safe_set_local_optimizer_state(parameter, share, moment)
    else:
        utils.safe_set_local_fp32_param(parameter, share)
