"""Builds tiny random configurations of all causal and seq2seq architectures of transformers."""

import re
from pathlib import Path
from typing import Any

VOCABULARY, WIDTH, HEADS, HEAD, LAYERS, EXPERTS = 1000, 64, 4, 16, 2, 4

# Sizes by the name of the config's field; the first pattern that matches the whole name counts.
# A field that is smaller already keeps its value.
SIZES: tuple[tuple[str, int], ...] = (
    (r"qk_head_dim", 2 * HEAD),
    (r"num_filters", 4),
    (r"adapter_(in|out)_dim|adapter_input_size", WIDTH),
    (r"codebook_size", 512),  # a power of 2
    (r"(mamba_n|mamba_num|n_mamba)_heads", 2 * HEADS),  # of the doubled width
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"(src_|tgt_|decoder_|t2u_|char_|audio_|unpadded_|unit_hifi_gan_)?vocab_size.*", VOCABULARY),
    (r"pronunciation_vocab_size|shape_vocab_size|ngram_vocab_size_base", VOCABULARY),
    (r"encoder_hash_byte_group_vocab", VOCABULARY),
    (r"num_(hidden_|encoder_|decoder_|attention_)?layers|n_layers?|depth|num_blocks", LAYERS),
    (r"(\w+_)?(encoder|decoder)_layers|num_layers_per_stack|num_global_layers", LAYERS),
    (r"conf_num_hidden_layers|num_hidden_layers_\w+|moe_layer_end_index", LAYERS),
    (r"(linear_|swa_)?num_(key_value|key|kv|query)_?(heads|groups)", 2),
    (r"(linear_num_value|index_n|linear_num)_heads", HEADS),
    (r"(\w+_)?num_(\w+_)?heads|n_heads?|(\w+_)?attention_heads|vocoder_num_\w+", HEADS),
    (r"head_dim|(\w+_)?(head_dim|d_head|head_size|dim_head|headdim)|kv_channels|d_kv", HEAD),
    (r"rotary_dim|d_rel|(q|kv|o)_lora_rank|mamba_dt_rank|time_step_rank|(ssm_)?state_size", HEAD),
    (r"mamba_d_state|adapter_rank|hc_lowrank|gated_norm_rank|laurel_rank|swa_head_dim", HEAD),
    (r"query_pre_attn_scalar|hidden_size_per_layer_input", HEAD),
    (r"(moe|expert|shared_expert|shared_experts|moe_shared_expert)_intermediate_size", 32),
    (
        r"moe_num_experts|(num|n)_(local_|routed_)?experts|num_routed_experts|zero_expert_num",
        EXPERTS,
    ),
    (r"first_k_dense_replace|num_dense_layers|n_shared_experts|moe_num_shared_experts", 1),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_\w+", 0),
    (r"num_experts_per_tok(en)?|moe_(topk|top_k|k)|top_k|router_top_k|top_k_experts", 2),
    (r"n_groups?|num_expert_group|topk_group|mamba_n_groups|o_groups", 1),
    (r"(\w+_)?intermediate_size(_mlp)?|(encoder_|decoder_)?ffn_dim|(\w+_)?ffn_hidden_size", 128),
    (r"ffn_hidden_size|d_ff|dff|dim_ff|n_inner|mlp_dim|feed_forward_size|d_inner", 128),
    (r"mamba_intermediate|ple_embed_dim", WIDTH),
    (
        r"(\w+_)?hidden_size|hidden_size_global|d_model|n_embd|(\w+_)?emb(ed|edding)?_(dim|size)",
        WIDTH,
    ),
    (r"dim|emb_dim|word_embed_proj_dim|lru_width|output_dim|out_hidden_size", WIDTH),
    (r"input_embedding_size", WIDTH),
    (r"(\w+_)?output_dim|projector_(in|out)put_dim|hidden_dim|prompt_mid_dim", WIDTH),
    (r"vocab_size_per_layer_input|split_ngram_parts", VOCABULARY),
    (r"image_size|crop_size|num_position_embeddings|image_seq_length", WIDTH),
    (r"sliding_window(_size)?|attention_(chunk|window)(_size)?|local_attention|window_size", 64),
    (r"(mamba_)?chunk_size|attention_window_size|block_size", 64),
    (r"(\w+_)?max_(\w+_)?position_embeddings|n_positions|n_ctx|max_seq_len|context_length", 512),
    (r"original_max_position_embeddings|max_(source|target)_positions|model_max_length", 512),
)
# index_topk keeps its value. A tiny random indexer gives many keys the score 0, and which of them
# are the top k then depends on the number of keys.
# What the rules above do not reach: fields by model type.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8}},
    "falcon_h1": {"mamba_d_head": HEAD},
    "hrm_text": {"num_hidden_layers": 16},  # H_cycles x (L_cycles + 1) stacks of two layers
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 2 * HEADS},
    "qwen4_exp_text": {
        "indexer_n_heads": HEADS,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * HEAD,
    },
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD},
}


def architectures() -> dict[str, tuple[str, ...]]:
    """Return the model types that transformers loads with an LM head, each with its tasks."""
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    pairs = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    names = sorted({*causal, *pairs})
    return {n: ("causal",) * (n in causal) + ("seq2seq",) * (n in pairs) for n in names}


def tiny_config(model_type: str) -> Any:
    """Return a configuration with two layers or more, width 64, 4 heads and 1,000 tokens.

    It has a layer of each kind of the default configuration. Raises transformers' errors where no
    such configuration can be made.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**_tiny_fields(CONFIG_MAPPING[model_type]()))


def tiny_model(model_type: str, task: str | None = None) -> Any:
    """Return the model of `tiny_config` with random weights, in evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    task = task or architectures()[model_type][-1]
    loader = AutoModelForSeq2SeqLM if task == "seq2seq" else AutoModelForCausalLM
    return loader.from_config(tiny_config(model_type)).eval()


def save_tiny(model_type: str, folder: Path, tokenizer: Any) -> Path:
    """Write a tiny random model with a tokenizer of at most 1,000 tokens; return the folder."""
    import torch
    from transformers import GenerationConfig

    torch.manual_seed(0)
    model = tiny_model(model_type)
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tiny_fields(config: Any) -> dict[str, Any]:
    """Return the fields that differ between a configuration and its tiny one."""
    kept, layers = _kept_layers(config)
    fields: dict[str, Any] = {}
    # These defaults do not build, or depend on the large width.
    unset = {
        "head_dim": HEAD,
        "num_key_value_heads": HEADS,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    }
    fields |= {name: n for name, n in unset.items() if vars(config).get(name, n) is None}
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        fields |= {"decoder_start_token_id": 2, "pad_token_id": 0}
    for name, value in vars(config).items():
        if name.startswith("_") or value is None or isinstance(value, bool):
            continue
        if hasattr(value, "model_type"):
            fields[name] = _tiny_fields(value) | {"model_type": value.model_type}
        elif isinstance(value, list) and len(value) == layers:
            fields[name] = [value[index] for index in kept]
        elif re.fullmatch(r"(\w+_)?token_(id|index)", name) and isinstance(value, int):
            fields[name] = value if value < VOCABULARY else VOCABULARY - 1 - len(fields) % 50
        elif isinstance(value, int):
            fields[name] = _tiny(name, value, len(kept))
        if isinstance(fields.get(name), list):
            fields[name] = [_tiny(name, one, len(kept)) for one in fields[name]]
    if vars(config).get("num_key_value_heads", 0) == vars(config).get("num_attention_heads"):
        fields["num_key_value_heads"] = HEADS
    return fields | EXCEPTIONS.get(config.model_type, {})


def _tiny(name: str, value: Any, layers: int) -> Any:
    """Return a field's tiny value; layers: the number of layers."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    size = next((size for names, size in SIZES if re.fullmatch(names, name)), value)
    return min(value, layers if size == LAYERS and "layers" in name else size)


def _kept_layers(config: Any) -> tuple[list[int], int]:
    """Return the indices of layers that together have each kind of layer, and their number."""
    layers = getattr(config, "num_hidden_layers", None)
    if not isinstance(layers, int):
        return [0, 1], -1
    lists = [v for k, v in vars(config).items() if isinstance(v, list) and len(v) == layers]
    kinds = [tuple(str(one[index]) for one in lists) for index in range(layers)]
    first = sorted({kind: index for index, kind in reversed([*enumerate(kinds)])}.values())[:4]
    others = [index for index in range(layers) if index not in first]
    return sorted(first + others[: max(0, LAYERS - len(first))]), layers
