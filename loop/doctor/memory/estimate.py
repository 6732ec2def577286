"""Memory by part, for one rank: formulas over a model's shape, without its weights.

docs/memory.md derives them, in the same words. Bytes throughout, and elements where it says so.
"""

from collections.abc import Iterable
from math import ceil

from loop.distributed.deepspeed_config import BUCKET
from loop.doctor.memory import estimate_t5
from loop.doctor.memory.run import Run, small
from loop.doctor.memory.shape import Weights

# DeepSpeed's own value, in elements (deepspeed 0.19, runtime/zero/config.py): a parameter that is
# used again within this distance stays gathered.
REUSE = 1_000_000_000
# cuBLAS's workspace, which torch's allocator hands out; 32 MiB on Hopper (torch 2.13,
# aten/src/ATen/cuda/CublasHandlePool.cpp). The CUDA context and NCCL's buffers lie outside it.
WORKSPACE = 32 * 2**20
# In fp32: a chunk's logits, and what their logarithm is summed from. All at once, by autograd: the
# log-probabilities, their gradient and the logits' gradient.
CHUNKED, WHOLE = 2 * 4, 3 * 4


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
        "cuBLAS workspace": WORKSPACE,
    }


def activations(run: Run) -> dict[str, int]:
    """Return the bytes of the parts that follow the micro-batch's size."""
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
    """Return the bytes of all scales under double quantisation, which no stage shares out.

    Blocks of 64 have a uint8 scale, 256 of these an fp32 one; each weight has the mean of its
    scales and two code tables of 16 and 256 in fp32 (bitsandbytes 0.50, functional.py).
    """
    if not run.config.q_lora:
        return 0
    blocks = [ceil(n / 64) for n in run.shape.model.linears]
    return sum(n + 4 * ceil(n / 256) + 4 * (1 + 16 + 256) for n in blocks)


def adapter_weights(run: Run) -> float:
    """Return the adapter's bytes, without the fp32 master that DeepSpeed keeps of it."""
    if run.backend.stage == 0:
        # In fp32; autocast holds a copy in the run's precision.
        return (4 + run.autocast * run.width) * run.adapter
    if not run.gathers:
        return run.width * run.adapter
    shard = 0 if run.backend.offload_param else run.adapter / run.world
    return run.width * (shard + sum(n for n in run.shape.trained if small(n)))


def gradients(run: Run) -> float:
    """Return the bytes of gradients and of the buffers they are reduced in."""
    if run.backend.stage == 0:
        # DDP's buckets are copies (torch 2.13, gradient_as_bucket_view=False).
        return (4 if run.world == 1 else 8) * run.adapter
    if run.backend.stage == 1 and run.config.precision == "bf16":
        # BF16_Optimizer: fp32 sums of all gradients on every rank (deepspeed 0.19, engine.py).
        return (run.width + run.accumulated) * run.adapter
    if run.backend.stage == 1:
        return run.width * (run.adapter + BUCKET)
    if run.backend.stage == 2:
        return run.accumulated * run.adapter / run.world + run.width * BUCKET
    if run.backend.offload_optimizer:
        return 4 * BUCKET  # in what it sends, fp32 (loop/distributed/deepspeed_config.py)
    return run.accumulated * run.adapter / run.world + 4 * BUCKET


def optimizer(run: Run) -> float:
    """Return the bytes of Adam's two moments, and of DeepSpeed's fp32 master, wherever they are."""
    if run.backend.stage == 0:
        return 8 * run.adapter
    return (4 + 8) * run.adapter / run.world


def sharded(run: Run, weights: Weights, trained: Iterable[int] = ()) -> list[int]:
    """Return the elements of each tensor that ZeRO-3 gathers for its use."""
    return [n for n in (*run.stored(weights), *trained) if not small(n)]


def live(run: Run) -> int:
    """Return the elements that are gathered at the turn from forward to backward.

    A weight is let go where it is not used again within REUSE elements (deepspeed 0.19,
    partitioned_param_coordinator.py). Before the turn, all that lies behind a weight comes twice
    until it is needed again, and three times if checkpointing runs it forward once more.
    """
    tensors = sharded(run, run.shape.model, run.shape.trained)
    if not run.gathers or not tensors:
        return 0
    uses = 3 if run.config.gradient_checkpointing else 2
    return min(sum(tensors), REUSE // uses + max(tensors))


def gathered(run: Run) -> int:
    """Return the elements of whole weights that a rank holds at its peak under ZeRO-3.

    bitsandbytes 0.50 keeps a view of gathered codes for the backward pass (autograd/_functions.py,
    MatMul4Bit), so letting a weight go frees nothing, unless checkpointing drops the view.
    """
    if run.gathers and run.config.q_lora and not run.config.gradient_checkpointing:
        return sum(sharded(run, run.shape.model, run.shape.trained))
    return live(run)


def kept_activations(run: Run) -> int:
    """Return the bytes that lie between the forward and the backward pass of a micro-batch."""
    checkpoint = run.width * run.shape.hidden
    layer = checkpoint if run.config.gradient_checkpointing else layer_activations(run)
    return run.tokens * (run.shape.layers * layer + 4 * run.shape.hidden)


def layer_activations(run: Run) -> int:
    """Return the bytes a token that autograd saves in one layer (transformers 5.23, llama).

    Linears with frozen weights save nothing, nor do residual sums and rotary embeddings.
    """
    shape, width = run.shape, run.width
    # RMSNorm: its input in fp32, and the reciprocal root.
    norms = 2 * (4 * shape.hidden + 4)
    # SDPA and FlashAttention: query, key, value, output, and a logarithm a head in fp32.
    attention = width * (2 * shape.query + 2 * shape.key) + 4 * shape.heads
    # silu(gate) * up: gate, its SiLU, up.
    mlp = width * 3 * shape.intermediate
    return norms + attention + mlp + linear_inputs(run) + ceil(lora_inputs(run) / shape.layers)


def linear_inputs(run: Run) -> int:
    """Return the bytes a token that one layer's linears save under ZeRO-3.

    DeepSpeed's own F.linear saves its input even for a frozen weight (deepspeed 0.19,
    runtime/zero/linear.py); 4-bit linears do not go through it.
    """
    if run.backend.stage < 3 or run.config.q_lora:
        return 0
    return run.width * (2 * run.shape.hidden + run.shape.intermediate)


def lora_inputs(run: Run) -> int:
    """Return the bytes a token that all LoRA targets save: their inputs, and lora_A's outputs."""
    outputs = run.width * run.config.lora_r * len(run.shape.targets)
    if run.config.lora_dropout > 0:
        # What is left of the input, and a mask of one byte each.
        return outputs + (1 + run.width) * sum(run.shape.targets)
    if linear_inputs(run):
        return outputs  # They are counted there.
    return outputs + run.width * sum(run.shape.inputs)  # without dropout the input itself


def loss(run: Run) -> int:
    """Return the bytes of logits and their gradients, at supervised positions only.

    Through a frozen head the gradient of the hidden states is made at once, beside them.
    """
    chunk = min(run.supervised, run.config.loss_chunk_tokens)
    if not run.chunked:
        return whole_loss(run, run.supervised)
    states = 2 * run.width * run.shape.hidden * run.supervised
    if run.shape.head_trained:
        return states + whole_loss(run, chunk)
    return states + CHUNKED * chunk * run.shape.vocabulary


def whole_loss(run: Run, supervised: int) -> int:
    """Return the bytes of the logits of so many tokens, all at once."""
    return WHOLE * supervised * run.shape.vocabulary


def layer_backward(run: Run) -> int:
    """Return the bytes that one layer's backward pass needs for itself: gradients, and more.

    With checkpointing all its activations; with QLoRA its largest weight, dequantised.
    """
    flowing = run.width * (3 * run.shape.intermediate + 2 * run.shape.hidden)
    recomputed = layer_activations(run) if run.config.gradient_checkpointing else 0
    plain = run.width * max(run.shape.layer.linears) if run.config.q_lora else 0
    return run.tokens * (flowing + recomputed) + plain


def host_memory(run: Run) -> float:
    """Return the bytes of one rank's share in main memory, where the config offloads."""
    total = 0.0
    if run.backend.offload_optimizer:
        # Besides the optimizer: its fp32 gradient, and the sums (ZeRO-3) or new weights (ZeRO-2).
        copy = run.accumulated if run.backend.stage == 3 else run.width
        total += optimizer(run) + (4 + copy) * run.adapter / run.world
    if run.backend.offload_param:
        total += run.width * (run.base + run.adapter) / run.world
    return total


def sent(run: Run) -> float:
    """Return the bytes one rank sends each step, with rings.

    Gathering or scattering n bytes sends n (W - 1) / W of them, an all-reduce twice that. ZeRO-1
    and 2 reduce by all-reduce (deepspeed 0.19, stage_1_and_2.py: use_multi_rank_bucket_allreduce).
    """
    ring = (run.world - 1) / run.world
    if run.backend.stage == 0:
        return ring * 2 * 4 * run.adapter
    if run.backend.stage == 1:
        return ring * (2 * 4 + run.width) * run.adapter
    if run.backend.stage == 2:
        return ring * (2 * 4 * run.micro_batches + run.width) * run.adapter
    each = 4 * run.adapter + run.width * fetched(run)
    return ring * (run.micro_batches * each + run.width * run.whole)


def fetched(run: Run) -> int:
    """Return the elements that ZeRO-3 gathers for one micro-batch: forward, then backward.

    What is live at the turn comes once. A checkpointed layer too large for REUSE comes thrice.
    """
    total = sum(sharded(run, run.shape.model, run.shape.trained))
    layer = sum(sharded(run, run.shape.layer))
    again = run.shape.layers * max(0, layer - REUSE // 2)
    return 2 * total - live(run) + (again if run.config.gradient_checkpointing else 0)
