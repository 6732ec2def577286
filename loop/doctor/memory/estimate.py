"""Estimates the memory of one rank by part, with formulas over the model's shape.

docs/memory.md has the same formulas and their derivation. Units are bytes, or elements where
stated.
"""

from collections.abc import Iterable
from math import ceil

from loop.distributed.deepspeed_config import BUCKET
from loop.doctor.memory import estimate_t5
from loop.doctor.memory.run import Run, small
from loop.doctor.memory.shape import Weights

# In elements. A parameter that is used again within this distance stays gathered (deepspeed 0.19,
# runtime/zero/config.py: stage3_max_reuse_distance).
REUSE_DISTANCE = 1_000_000_000
# cuBLAS's workspace on Hopper, from torch's allocator (torch 2.13,
# aten/src/ATen/cuda/CublasHandlePool.cpp). The CUDA context and NCCL's buffers are not included.
WORKSPACE_BYTES = 32 * 2**20
# Bytes per logit, in fp32. With chunks: the logits and the terms of their log-sum. Without chunks,
# under autograd: the log-probabilities, their gradient and the logits' gradient.
CHUNKED_LOSS_BYTES, FULL_LOSS_BYTES = 2 * 4, 3 * 4


def memory(run: Run) -> dict[str, float]:
    """Return the bytes of each part on one rank's device, at the step's peak."""
    return {
        "base weights": base_weights(run),
        "4-bit scales": scales(run),
        "adapter": adapter_weights(run),
        "gradients": gradients(run),
        "optimizer": 0 if run.backend.offload_optimizer else optimizer(run),
        "gathered weights": run.width * gathered(run),
        **activations(run),
        "cuBLAS workspace": WORKSPACE_BYTES,
    }


def activations(run: Run) -> dict[str, int]:
    """Return the bytes of the parts that depend on the size of the micro-batch."""
    t5 = run.shape.t5
    kept = estimate_t5.kept_activations(run, t5) if t5 else kept_activations(run)
    backward = estimate_t5.layer_backward(run, t5) if t5 else layer_backward(run)
    return {"kept activations": kept, "loss, or one layer's backward": max(loss(run), backward)}


def base_weights(run: Run) -> float:
    """Return the frozen weights' bytes, 4-bit codes included."""
    if not run.gathers:
        return run.width * run.base
    shard = 0 if run.backend.offload_param else run.base / run.world
    frozen = sum(n for n in run.stored(run.shape.model) if small(n))
    return run.width * (shard + frozen)


def scales(run: Run) -> int:
    """Return the bytes of all scales under double quantisation; no ZeRO stage partitions them.

    64 weights share a uint8 scale, 256 scales share an fp32 scale. Each tensor has the mean of its
    scales and two code tables, of 16 and 256 fp32 values (bitsandbytes 0.50, functional.py).
    """
    if not run.config.q_lora:
        return 0
    blocks = [ceil(n / 64) for n in run.shape.model.linears]
    return sum(n + 4 * ceil(n / 256) + 4 * (1 + 16 + 256) for n in blocks)


def adapter_weights(run: Run) -> float:
    """Return the adapter's bytes, without DeepSpeed's fp32 master."""
    if run.backend.stage == 0:
        # fp32, and autocast's copy in the run's precision.
        return (4 + run.autocast * run.width) * run.adapter
    if not run.gathers:
        return run.width * run.adapter
    shard = 0 if run.backend.offload_param else run.adapter / run.world
    return run.width * (shard + sum(n for n in run.shape.trained if small(n)))


def gradients(run: Run) -> float:
    """Return the bytes of the gradients and of their reduction buffers."""
    if run.backend.stage == 0:
        # DDP's buckets are copies (torch 2.13, gradient_as_bucket_view=False).
        return (4 if run.world == 1 else 8) * run.adapter
    if run.backend.stage == 1 and run.config.precision == "bf16":
        # BF16_Optimizer sums all gradients in fp32 on every rank (deepspeed 0.19, engine.py).
        return (run.width + run.accumulated) * run.adapter
    if run.backend.stage == 1:
        return run.width * (run.adapter + BUCKET)
    if run.backend.stage == 2:
        return run.accumulated * run.adapter / run.world + run.width * BUCKET
    if run.backend.offload_optimizer:
        return 4 * BUCKET  # fp32 communication (loop/distributed/deepspeed_config.py)
    return run.accumulated * run.adapter / run.world + 4 * BUCKET


def optimizer(run: Run) -> float:
    """Return the bytes of Adam's moments and DeepSpeed's fp32 master, offloaded or not."""
    if run.backend.stage == 0:
        return 8 * run.adapter
    return (4 + 8) * run.adapter / run.world


def sharded(run: Run, weights: Weights, trained: Iterable[int] = ()) -> list[int]:
    """Return the elements of each tensor that ZeRO-3 partitions."""
    return [n for n in (*run.stored(weights), *trained) if not small(n)]


def live(run: Run) -> int:
    """Return the elements that are gathered when the forward pass ends and the backward starts.

    A weight is released if it is not used again within REUSE_DISTANCE elements (deepspeed 0.19,
    partitioned_param_coordinator.py). Between a weight's forward and backward pass, each weight
    after it is used twice, or three times with checkpointing.
    """
    tensors = sharded(run, run.shape.model, run.shape.trained)
    if not run.gathers or not tensors:
        return 0
    uses = 3 if run.config.gradient_checkpointing else 2
    return min(sum(tensors), REUSE_DISTANCE // uses + max(tensors))


def gathered(run: Run) -> int:
    """Return the elements of gathered weights that a rank holds at its peak under ZeRO-3.

    bitsandbytes 0.50 keeps a view of gathered codes for the backward pass (autograd/_functions.py,
    MatMul4Bit). So releasing a weight frees no memory, except with checkpointing, which drops the
    view.
    """
    if run.gathers and run.config.q_lora and not run.config.gradient_checkpointing:
        return sum(sharded(run, run.shape.model, run.shape.trained))
    return live(run)


def kept_activations(run: Run) -> int:
    """Return the bytes kept between the forward and the backward pass of a micro-batch."""
    checkpoint = run.width * run.shape.hidden
    layer = checkpoint if run.config.gradient_checkpointing else layer_activations(run)
    return run.tokens * (run.shape.layers * layer + 4 * run.shape.hidden)


def layer_activations(run: Run) -> int:
    """Return the bytes per token that autograd saves in one layer (transformers 5.23, llama).

    Linears with frozen weights, residual sums and rotary embeddings save nothing.
    """
    shape, width = run.shape, run.width
    # RMSNorm: its input in fp32 and the reciprocal root.
    norms = 2 * (4 * shape.hidden + 4)
    # SDPA and FlashAttention: query, key, value, output, and an fp32 log-sum per head.
    attention = width * (2 * shape.query + 2 * shape.key) + 4 * shape.heads
    # silu(gate) * up: gate, its SiLU, up.
    mlp = width * 3 * shape.intermediate
    return norms + attention + mlp + linear_inputs(run) + ceil(lora_inputs(run) / shape.layers)


def linear_inputs(run: Run) -> int:
    """Return the bytes per token that one layer's linears save under ZeRO-3.

    DeepSpeed's own F.linear saves its input even for a frozen weight (deepspeed 0.19,
    runtime/zero/linear.py); 4-bit linears do not use it.
    """
    if run.backend.stage < 3 or run.config.q_lora:
        return 0
    return run.width * (2 * run.shape.hidden + run.shape.intermediate)


def lora_inputs(run: Run) -> int:
    """Return the bytes per token that all LoRA targets save: their inputs and lora_A's outputs."""
    outputs = run.width * run.config.lora_r * len(run.shape.targets)
    if run.config.lora_dropout > 0:
        # The input after dropout, and the mask, one byte per element.
        return outputs + (1 + run.width) * sum(run.shape.targets)
    if linear_inputs(run):
        return outputs  # linear_inputs counts the inputs
    return outputs + run.width * sum(run.shape.inputs)  # without dropout the input itself


def loss(run: Run) -> int:
    """Return the bytes of logits and their gradients, at supervised positions only.

    With a frozen head, the forward pass computes the gradient of the hidden states.
    """
    chunk = min(run.supervised, run.config.loss_chunk_tokens)
    if not run.chunked:
        return full_loss(run, run.supervised)
    states = 2 * run.width * run.shape.hidden * run.supervised
    if run.shape.head_trained:
        return states + full_loss(run, chunk)
    return states + CHUNKED_LOSS_BYTES * chunk * run.shape.vocabulary


def full_loss(run: Run, supervised: int) -> int:
    """Return the bytes of logits and gradients of `supervised` tokens, without chunks."""
    return FULL_LOSS_BYTES * supervised * run.shape.vocabulary


def layer_backward(run: Run) -> int:
    """Return the bytes that one layer's backward pass adds: the gradients of its activations.

    Checkpointing adds the layer's activations. QLoRA adds its largest weight, dequantised.
    """
    flowing = run.width * (3 * run.shape.intermediate + 2 * run.shape.hidden)
    recomputed = layer_activations(run) if run.config.gradient_checkpointing else 0
    plain = run.width * max(run.shape.layer.linears) if run.config.q_lora else 0
    return run.tokens * (flowing + recomputed) + plain


def host_memory(run: Run) -> float:
    """Return the bytes of main memory that one rank uses for offloading."""
    total = 0.0
    if run.backend.offload_optimizer:
        # Optimizer state, its fp32 gradient, and accumulated gradients (ZeRO-3) or new weights.
        copy = run.accumulated if run.backend.stage == 3 else run.width
        total += optimizer(run) + (4 + copy) * run.adapter / run.world
    if run.backend.offload_param:
        total += run.width * (run.base + run.adapter) / run.world
    return total


def sent(run: Run) -> float:
    """Return the bytes that one rank sends in each step, with ring algorithms.

    With world size W, an all-gather or reduce-scatter of n bytes sends n (W - 1) / W bytes. An
    all-reduce sends twice as many. ZeRO-1 and 2 reduce by all-reduce (deepspeed 0.19,
    stage_1_and_2.py: use_multi_rank_bucket_allreduce).
    """
    ring = (run.world - 1) / run.world
    if run.backend.stage == 0:
        return ring * 2 * 4 * run.adapter
    if run.backend.stage == 1:
        return ring * (2 * 4 + run.width) * run.adapter
    if run.backend.stage == 2:
        return ring * (2 * 4 * run.micro_batches + run.width) * run.adapter
    each = 4 * run.adapter + run.width * fetched(run)
    return ring * (run.micro_batches * each + run.width * run.persistent)


def fetched(run: Run) -> int:
    """Return the elements that ZeRO-3 gathers for one micro-batch, forward and backward.

    Elements that stay gathered from forward to backward (`live`) are gathered once, others twice.
    In a checkpointed layer, elements beyond half of REUSE_DISTANCE are gathered three times.
    """
    total = sum(sharded(run, run.shape.model, run.shape.trained))
    layer = sum(sharded(run, run.shape.layer))
    again = run.shape.layers * max(0, layer - REUSE_DISTANCE // 2)
    return 2 * total - live(run) + (again if run.config.gradient_checkpointing else 0)
