"""Estimates the memory that a micro-batch of a T5 takes, with formulas over transformers' blocks.

docs/memory.md has the same formulas and their derivation. Units are bytes.
"""

from loop.doctor.memory.run import Run
from loop.doctor.memory.shape import T5, Reads


def kept_activations(run: Run, t5: T5) -> int:
    """Return the bytes kept between the forward and the backward pass of a micro-batch."""
    source, target = sides(run)
    # The last norm of each stack, and the mask of the dropout after it.
    ends = (source + target) * (norm(run) + t5.dropout * run.shape.hidden)
    if run.config.gradient_checkpointing:
        return ends + checkpoints(run, t5) + biases(run)
    layers = t5.encoder * encoder_layer(run, t5) + t5.decoder * decoder_layer(run, t5)
    adapter = source * (lora(run, t5, t5.own) + lora(run, t5, t5.crosswise))
    return ends + layers + adapter + target * lora(run, t5, t5.target)


def sides(run: Run) -> tuple[int, int]:
    """Return the tokens of all sources and of all targets."""
    return run.size.rows * run.size.source, run.size.rows * run.size.target


def checkpoints(run: Run, t5: T5) -> int:
    """Return the bytes of the inputs of checkpointed layers and of the encoder's output.

    peft 0.21 makes the embedding's output require a gradient (peft_model.py,
    _prepare_model_for_gradient_checkpointing). So the output is kept, with the next dropout's mask.
    """
    source, target = sides(run)
    inputs = stream(run) * (source * t5.encoder + target * t5.decoder) + run.width * source
    embedded = t5.dropout * (1 + run.width) * (source + target)
    return run.shape.hidden * (inputs + embedded)


def stream(run: Run) -> int:
    """Return the bytes of an element of the residual stream; under QLoRA `wo` makes it fp32."""
    return 4 if run.config.q_lora else run.width


def norm(run: Run) -> int:
    """Return the bytes per token that a norm saves: input, its fp32 copy, and reciprocal root."""
    narrow = stream(run) if stream(run) < 4 else 0
    return (4 + narrow) * run.shape.hidden + 4


def encoder_layer(run: Run, t5: T5) -> int:
    """Return the bytes that autograd saves in an encoder layer, without LoRA (transformers 5.23).

    Linears with frozen weights and residual sums save nothing.
    """
    rows, source = run.size.rows, run.size.source
    token = 2 * (norm(run) + t5.dropout * run.shape.hidden) + feed_forward(run, t5)
    token += linear_inputs(run, t5, attentions=1)
    mask = bias(run, t5, source, source)
    return rows * (source * token + attention(run, t5, source, source) + mask)


def decoder_layer(run: Run, t5: T5) -> int:
    """Return the bytes that autograd saves in a decoder layer, without LoRA."""
    rows, source, target = run.size.rows, run.size.source, run.size.target
    token = 3 * (norm(run) + t5.dropout * run.shape.hidden) + feed_forward(run, t5)
    token += linear_inputs(run, t5, attentions=2)
    itself = attention(run, t5, target, target)
    crosswise = attention(run, t5, target, source) + bias(run, t5, target, source)
    # Padding in targets needs no mask, so all rows share one bias.
    return rows * (target * token + itself + crosswise) + bias(run, t5, target, target)


def materialised(run: Run, t5: T5) -> bool:
    """Return whether attention computes its full weight matrix.

    On a CPU, only PyTorch's plain attention supports dropout; it computes in fp32 (torch 2.13,
    aten/src/ATen/native/transformers/attention.cpp).
    """
    return t5.dropout and not run.gpu


def attention(run: Run, t5: T5, queries: int, keys: int) -> int:
    """Return the bytes that the attention of one row saves.

    Query, key and value are always saved. With materialised weights: also the weights, their
    dropout mask and the masked weights. Otherwise: also the output and a log-sum per head.
    """
    inner, heads = run.shape.query, run.shape.heads
    if materialised(run, t5):
        return 4 * inner * (queries + 2 * keys) + 3 * 4 * heads * queries * keys
    return run.width * inner * (2 * queries + 2 * keys) + 4 * heads * queries


def bias(run: Run, t5: T5, queries: int, keys: int) -> int:
    """Return the bytes of the position bias, a matrix per head, saved by fused attention."""
    return 0 if materialised(run, t5) else run.width * run.shape.heads * queries * keys


def feed_forward(run: Run, t5: T5) -> int:
    """Return the bytes per token of activation, gate and dropout, without the linears' inputs.

    transformers computes `gelu_new` with powers, for which four tensors are saved. On GPUs autocast
    computes powers and their results in fp32 (torch 2.13, ATen/autocast_mode.h).
    """
    width = run.width
    powers = t5.activation == "gelu_new"
    wide = 4 if powers and run.gpu and run.autocast else width
    activation = 3 * wide + width if powers else width
    gate = (wide + width) if t5.gated else 0
    return run.shape.intermediate * (activation + gate + t5.dropout)


def linear_inputs(run: Run, t5: T5, attentions: int) -> int:
    """Return the bytes per token that one layer's linears save under ZeRO-3 (see estimate.py)."""
    if run.backend.stage < 3 or run.config.q_lora:
        return 0
    outputs = attentions * run.shape.query if materialised(run, t5) else 0
    return run.width * ((attentions + 1) * run.shape.hidden + run.shape.intermediate + outputs)


def lora(run: Run, t5: T5, reads: Reads) -> int:
    """Return the bytes per token that LoRA targets save (see lora_inputs of estimate.py)."""
    outputs = run.width * run.config.lora_r * len(reads.targets)
    if run.config.lora_dropout > 0:
        return outputs + (1 + run.width) * sum(reads.targets)
    if run.backend.stage == 3 and not run.config.q_lora:
        return outputs  # linear_inputs counts the inputs
    inputs = sum(reads.inputs) + (sum(reads.outputs) if materialised(run, t5) else 0)
    return outputs + run.width * inputs


def biases(run: Run) -> int:
    """Return the bytes of position biases and masks, kept once for all checkpointed layers."""
    rows, source, target = run.size.rows, run.size.source, run.size.target
    places = source * source + target * target + target * source
    return (run.width * run.shape.heads + rows) * places


def layer_backward(run: Run, t5: T5) -> int:
    """Return the bytes that one layer's backward pass adds: the gradients of its activations.

    Checkpointing adds the layer's activations. QLoRA adds its largest weight, dequantised. The
    decoder's kept activations are freed before the encoder's backward pass.
    """
    source, target = sides(run)
    flowing = run.width * (3 * run.shape.intermediate + 2 * run.shape.hidden)
    plain = run.width * max(run.shape.layer.linears) if run.config.q_lora else 0
    encoder, decoder = source * flowing, target * flowing
    if run.config.gradient_checkpointing:
        crosswise = source * lora(run, t5, t5.crosswise) + target * lora(run, t5, t5.target)
        encoder += encoder_layer(run, t5) + source * lora(run, t5, t5.own) // t5.encoder
        decoder += decoder_layer(run, t5) + crosswise // t5.decoder
        freed = stream(run) * run.shape.hidden * target
    else:
        freed = decoder_layer(run, t5)
    return plain + max(decoder, encoder - t5.decoder * freed)
