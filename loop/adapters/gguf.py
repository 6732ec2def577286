"""Writes a LLaMA model with a byte-level BPE tokenizer as GGUF, llama.cpp's file format.

For other models and tokenizers, use llama.cpp's own converter.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)
from gguf.quants import quantize
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from data.errors import UserError
from data.files.atomic_write import written_whole
from loop.adapters.base_tensors import Source, tensors_in
from loop.model.base import as_user_error

GGUF_TYPES = {
    torch.float32: (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    torch.bfloat16: (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    torch.float16: (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
}
# Pre-tokenizers, as in tokenizer.json. llama.cpp recognises a pre-tokenizer by the ids of a test
# text (convert_hf_to_gguf.py, get_vocab_base_pre).
DIGITS = {"type": "Digits", "individual_digits": True}
LLAMA_3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+"
    "[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
_UINT8 = np.dtype(np.uint8)
REMEDY = "Convert the merged folder with llama.cpp's convert_hf_to_gguf.py (docs/adapters.md)"


def check(config: Any, tokenizer: Any) -> str:
    """Return llama.cpp's name for the pre-tokenizer; raises UserError for an unsupported model."""
    if config.model_type != "llama":
        raise UserError(f"--gguf: found a {config.model_type} model; expected llama. {REMEDY}.")
    rope = getattr(config, "rope_parameters", None) or {}
    for setting, found, expected in [
        ("attention_bias", config.attention_bias, False),
        ("mlp_bias", config.mlp_bias, False),
        ("rope_type", rope.get("rope_type", "default"), "default"),
    ]:
        if found != expected:
            raise UserError(f"--gguf: found {setting} {found}; expected {expected}. {REMEDY}.")
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    name = _pre_tokenizer(text["pre_tokenizer"] or {}) if text["model"]["type"] == "BPE" else None
    if name is None or text["normalizer"]:
        raise UserError(
            f"--gguf: found an unsupported tokenizer; expected GPT-2's or Llama 3's. {REMEDY}."
        )
    return name


def _pre_tokenizer(found: dict[str, Any]) -> str | None:
    steps = found.get("pretokenizers", [found])
    *before, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if not before and last.get("use_regex"):
        return "gpt-2"
    if before == [DIGITS] and last.get("use_regex"):
        return "smollm"
    pattern = before[0].get("pattern", {}).get("Regex") if len(before) == 1 else None
    return "llama-bpe" if pattern == LLAMA_3 and not last.get("use_regex") else None


def write_gguf(folder: Path, file: Path, trust_remote_code: bool = False) -> None:
    """Write the folder's model in its stored dtype, one tensor at a time; raises UserError."""
    with as_user_error(str(folder)):
        config, tokenizer = (
            kind.from_pretrained(folder, trust_remote_code=trust_remote_code)
            for kind in (AutoConfig, AutoTokenizer)
        )
    pre_tokenizer = check(config, tokenizer)
    source = tensors_in(folder)
    with written_whole(file, "--gguf") as unfinished:
        writer = GGUFWriter(unfinished, "llama")
        _add_settings(writer, config, GGUF_TYPES[source.dtype][1])
        _add_tokenizer(writer, config, tokenizer, pre_tokenizer)
        _add_tensors(writer, config, source)
    print(f"{file}: {GGUF_TYPES[source.dtype][0].name}, {file.stat().st_size / 1e6:,.0f} MB")


def _add_settings(writer: GGUFWriter, config: Any, stored: LlamaFileType) -> None:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(stored)


def _add_tokenizer(writer: GGUFWriter, config: Any, tokenizer: Any, pre_tokenizer: str) -> None:
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        if number in added:
            tokens.append(added[number].content)
            special = added[number].special
            kinds.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        elif number < len(tokenizer):
            tokens.append(tokenizer.convert_ids_to_tokens(number))
            kinds.append(TokenType.NORMAL)
        else:  # a row without a token
            tokens.append(f"[PAD{number}]")
            kinds.append(TokenType.UNUSED)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for add, number in [
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ]:
        if number is not None:
            add(number)
    adds_bos = tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(adds_bos)
    writer.add_add_space_prefix(False)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _add_tensors(writer: GGUFWriter, config: Any, source: Source) -> None:
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {key: _kind(source, key) for key in source.shapes}
    for key, shape in source.shapes.items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"--gguf: found {key}; expected LLaMA's tensors only. {REMEDY}.")
        kind = stored[key]
        size = 4 if kind == GGMLQuantizationType.F32 else 2
        as_bytes = (*shape[:-1], shape[-1] * size)
        bytes_ = torch.Size(as_bytes).numel()
        writer.add_tensor_info(name, as_bytes, _UINT8, bytes_, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, kind in stored.items():
        tensor = source.read(key).float()
        rotated = next((count for name, count in heads.items() if f".{name}." in key), None)
        tensor = _interleaved(tensor, rotated) if rotated else tensor
        writer.write_tensor_data(quantize(tensor.numpy(), kind).view(_UINT8))
    writer.close()


def _kind(source: Source, key: str) -> GGMLQuantizationType:
    """Return a tensor's type: norms in fp32, as llama.cpp expects; matrices as stored."""
    matrix = len(source.shapes[key]) > 1
    return GGUF_TYPES[source.dtype][0] if matrix else GGMLQuantizationType.F32


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return q_proj's or k_proj's weight with the two halves of each head's rows interleaved.

    llama.cpp rotates neighbouring rows, transformers rotates halves (convert_hf_to_gguf.py,
    LlamaModel.permute).
    """
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.transpose(1, 2).reshape(rows, width).contiguous()
