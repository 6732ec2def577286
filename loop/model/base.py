"""Finds the base model and reads its configuration and tokenizer, but not its weights."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from data.encoding.encode import check_fast
from data.encoding.templates import TemplateName, default_template
from data.encoding.tokenizer import with_fastchat_tokens, with_missing_characters
from data.errors import UserError
from data.files.hashes import HASH_VERSION, value_sha256
from loop.config.flags import Config
from loop.model.bundled_model import embedded_model

# Exceptions that transformers, peft and safetensors raise for files that they cannot load.
LIBRARY_ERRORS = (
    *(OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, UserWarning),
    *(ArithmeticError, AssertionError, IndexError, ImportError),
    *(SafetensorError, StrictDataclassError),
)

# The largest part of a model's parameters that --q_lora may leave in 16 bits as experts.
MAX_EXPERTS_IN_16_BITS = 0.1


@dataclass(frozen=True)
class BaseModel:
    """The base model of a run, without its weights.

    name: a folder or a hub name. config: transformers' configuration. new_tokens: ids added to the
    tokenizer for characters that it lacked. packed: each micro-batch is one row without padding.
    flash: attention is FlashAttention-2. sharing: a shared prefix in a row is computed once. alone:
    each micro-batch is one example.
    """

    name: str
    config: Any
    tokenizer: Any
    new_tokens: list[int]
    template: TemplateName
    packed: bool
    flash: bool
    sharing: bool
    alone: bool = False

    @property
    def embedding_rows(self) -> int | None:
        """The number of ids that the model takes; None if its configuration does not say."""
        rows = getattr(self.config.get_text_config(), "vocab_size", None)
        return max(rows, len(self.tokenizer)) if rows and self.new_tokens else rows


def read_base_model(config: Config) -> BaseModel:
    """Return the base model's name, configuration, tokenizer and template; raises UserError."""
    # Imported here: `python -m loop check` imports this module, but not torch.
    from loop.model.packed_attention import can_pack

    name = find_base_model(config)
    base_config = read_base_config(name, config)
    check_architecture(name, base_config)
    tokenizer = load_tokenizer(name, config)
    check_fast(tokenizer)
    template = template_of(name, base_config, tokenizer, config)
    check_pairs(name, base_config, config)
    new_tokens: list[int] = []
    if template == "t5":
        added = with_fastchat_tokens if config.t5_compat else with_missing_characters
        tokenizer, new_tokens = added(tokenizer)
    packed = config.packing and can_pack(base_config)
    flash = config.flash_attn
    # FlashAttention-2 needs queries and keys at the same positions.
    sharing = packed and not flash
    return BaseModel(name, base_config, tokenizer, new_tokens, template, packed, flash, sharing)


def find_base_model(config: Config) -> str:
    """Return the absolute folder or the hub name of the base model.

    Raises UserError within seconds if it does not exist.
    """
    name = config.model_name_or_path
    if name is None:
        return str(embedded_model())
    with as_user_error(f"--model_name_or_path {name[:200]}"):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            _check_hub(name, config.cache_dir)
            return name
        if not (folder / "config.json").is_file():
            raise UserError(
                f"--model_name_or_path {name}: the folder holds no config.json; expected a "
                "model's files. Give another folder, or a hub name."
            )
        return str(folder.resolve())


def _check_hub(name: str, cache_dir: str | None) -> None:
    """Look for the model in the cache, then in the hub; raises UserError if it is in neither.

    One request is sent. transformers would retry for about 25 s.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    what = f"--model_name_or_path {name}"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"{what}: no such folder. Give a folder with config.json, or a hub name.")
    if isinstance(try_to_load_from_cache(name, "config.json", cache_dir), str):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=2.0)
    except HfHubHTTPError as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{what}: no such folder; the hub's answer: {reason}") from None
    except Exception as error:  # Offline mode, no route and no name server differ in their type.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{what}: no such folder, not in the cache, and the hub is not reachable ({reason})."
        ) from None


@contextmanager
def as_user_error(what: str) -> Iterator[None]:
    """Turn a library's error about files that it cannot load into a UserError."""
    try:
        yield
    except LIBRARY_ERRORS as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which `check` does not import
            raise
        # transformers 5.23, dynamic_module_utils.py, resolve_trust_remote_code.
        code = re.search(r"repository (.+?) (?:contains|references) custom code", str(error))
        if code and "trust_remote_code=True" in str(error):
            raise UserError(
                f"{what}: found Python code that comes with {code[1]} (auto_map in its JSON "
                "files) and did not run it; expected a class of transformers. Read the code; "
                "if you trust it, give --trust_remote_code True on the command line."
            ) from None
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(
            f"{what} cannot be loaded: {type(error).__name__}: {reason}; expected a folder or "
            "hub name that transformers and peft load. Check its files."
        ) from error


def read_base_config(base: str, config: Config) -> Any:
    """Return the base model's configuration; raises UserError."""
    from transformers import AutoConfig  # Imported here: it is slow, and `check` does not need it.

    with as_user_error(base):
        return AutoConfig.from_pretrained(
            base, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
        )


def check_architecture(base: str, base_config: Any) -> None:
    """Raise UserError if transformers has no class of text models for the configuration."""
    if type(base_config) in model_class(base_config)._model_mapping:
        return
    if getattr(base_config, "auto_map", None):  # Python code that comes with the model
        return
    parts = [name.removesuffix("_config") for name in base_config.sub_configs]
    made_of = f", made of {', '.join(parts)}," if parts else ""
    task = "an encoder-decoder" if base_config.is_encoder_decoder else "a causal LM"
    raise UserError(
        f"{base}: found the model type {base_config.model_type}{made_of} which transformers does "
        f"not load as {task} of text; expected one that it does. Give a text model."
    )


def model_class(base_config: Any) -> Any:
    """Return transformers' class that loads this configuration's model with its LM head."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if base_config.is_encoder_decoder else AutoModelForCausalLM


def meta_model(base: str, base_config: Any, trust_remote_code: bool) -> Any:
    """Return the base model on the meta device, which has no weights; raises UserError."""
    import torch

    with as_user_error(base), _without_zero3(), torch.device("meta"):
        return model_class(base_config).from_config(
            base_config, trust_remote_code=trust_remote_code
        )


@contextmanager
def _without_zero3() -> Iterator[None]:
    """Build a model as without ZeRO-3, whose partitions cannot be taken of the meta device."""
    # transformers 5.23, integrations/deepspeed.py: the reference enables ZeRO-3 in from_config.
    from transformers.integrations import deepspeed

    enabled = getattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = enabled


def check_experts(base: str, base_config: Any, config: Config) -> None:
    """Raise UserError if --q_lora would leave most of a mixture of experts in 16 bits.

    bitsandbytes quantises linear layers; experts that are one parameter per layer stay as they are.
    """
    from loop.model.lora_targets import experts_of

    if not config.q_lora:
        return
    model = meta_model(base, base_config, config.trust_remote_code)
    experts = sum(parameter.numel() for parameter in experts_of(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    if experts > MAX_EXPERTS_IN_16_BITS * total:
        raise UserError(
            f"--q_lora True: found {base}, whose experts are {100 * experts / total:.0f} % of its "
            f"{total:,} parameters and would stay in 16 bits ({2 * experts / 2**30:,.1f} GiB); "
            f"expected at most {100 * MAX_EXPERTS_IN_16_BITS:.0f} %. Leave --q_lora out, and "
            "launch with accelerate_configs/zero3.yaml to partition the weights."
        )


def check_ties(base: str, base_config: Any, zero3: bool) -> None:
    """Raise UserError if the installed transformers overwrites LM heads under ZeRO-3."""
    if zero3 and base_config.is_encoder_decoder and not compares_ties():
        raise UserError(
            f"{base}: under ZeRO-3, the installed transformers ties an encoder-decoder's LM head "
            "without comparing the weights; expected 5.23 or newer. Install it, or launch with "
            "accelerate_configs/zero2.yaml."
        )


def compares_ties() -> bool:
    """Return whether transformers compares weights before it ties them (5.23 does)."""
    from transformers import modeling_utils

    return hasattr(modeling_utils, "_tied_params_are_equal")


def load_tokenizer(base: str, config: Config) -> Any:
    """Return the base model's tokenizer, with a pad token and padding on the right.

    --chat_template replaces its chat template, also when the tokenizer is saved. Raises UserError.
    """
    from transformers import AutoTokenizer

    with as_user_error(f"{base}: its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(
            base, cache_dir=config.cache_dir, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.eos_token is None:
        raise UserError(
            f"{base}: found a tokenizer without an EOS token; expected one, since it ends every "
            "answer. Set eos_token in its tokenizer_config.json."
        )
    if config.chat_template:
        tokenizer.chat_template = _read_template(config.chat_template)
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _read_template(name: str) -> str:
    from jinja2 import Environment, TemplateSyntaxError

    what = f"--chat_template {name}"
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
        # The extensions that transformers uses (5.23, utils/chat_template_utils.py).
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        environment.parse(re.sub(r"{%(-?)\s*(end)?generation\s*(-?)%}", "", text))
    except OSError as error:
        raise UserError(f"{what}: cannot be read: {error.strerror}. Give a Jinja file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: not UTF-8: {error}. Give a Jinja file.") from None
    except TemplateSyntaxError as error:
        raise UserError(f"{what}: line {error.lineno}: not valid Jinja: {error}.") from None
    if not text.strip():
        raise UserError(f"{what}: it is empty; expected a Jinja template.")
    return text


def model_end_ids(base_config: Any, name: str) -> set[int]:
    """Return the ids at which generation stops, by the model's config and generation config."""
    from transformers import GenerationConfig

    found = [getattr(base_config.get_text_config(), "eos_token_id", None)]
    with suppress(OSError, ValueError):  # Not every model has the file.
        if Path(name).is_dir():
            found.append(GenerationConfig.from_pretrained(name).eos_token_id)
    lists = (ends if isinstance(ends, list) else [ends] for ends in found)
    return {end for ends in lists for end in ends if end is not None}


def tokenizer_sha256(tokenizer: Any, hash_version: int = HASH_VERSION) -> str:
    """Return the SHA-256 of everything that determines a text's ids.

    hash_version: that of a checkpoint to compare with.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        if hash_version != 1:
            return value_sha256("tokenizer", tokenizer.get_vocab())
        return hashlib.sha256(
            json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
        ).hexdigest()
    # Every call of the tokenizer sets padding and truncation again, so they do not matter.
    backend.no_padding()
    backend.no_truncation()
    # Templates end answers with the EOS token, which is not part of the backend.
    special = json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True)
    if hash_version != 1:
        return value_sha256("tokenizer", [backend.to_str(), special])
    return hashlib.sha256((backend.to_str() + special).encode()).hexdigest()


def check_pairs(base: str, base_config: Any, config: Config) -> None:
    """Raise UserError for a precision or a length limit that does not fit the model."""
    pairs, kind = base_config.is_encoder_decoder, base_config.model_type
    if "t5" in kind and config.precision == "fp16":
        raise UserError(
            f"{base}: found precision fp16 with {kind}, whose activations overflow in fp16; "
            "expected bf16. Give --mixed_precision bf16, or no."
        )
    given = {"max_target_length": config.max_target_length, "keep_header": config.keep_header}
    unused = [f"--{name}" for name, value in given.items() if value]
    if unused and (config.t5_compat or not pairs):
        one_limit = "--t5_compat True, with one limit for both sides, as in FastChat"
        why = one_limit if pairs else f"{base}, a decoder ({kind})"
        raise UserError(
            f"found {' and '.join(unused)} with {why}; expected an encoder-decoder without "
            "--t5_compat. Leave it out."
        )
    positions = getattr(base_config, "max_position_embeddings", None)
    longest = max(config.model_max_length, config.max_target_length or 0)
    if pairs and positions and longest > positions:
        raise UserError(
            f"{base}: found --model_max_length or --max_target_length {longest} with {kind}, which "
            f"has {positions} positions; expected at most {positions}. Give --model_max_length "
            f"{positions}."
        )


def template_of(base: str, base_config: Any, tokenizer: Any, config: Config) -> TemplateName:
    """Return --template, or the template that fits the model; raises UserError."""
    pairs = base_config.is_encoder_decoder
    template = config.template or ("t5" if pairs else default_template(tokenizer))
    if pairs != (template == "t5"):
        kind = "an encoder-decoder" if pairs else "a decoder"
        fitting = "t5" if pairs else default_template(tokenizer)
        raise UserError(
            f"--template: found {template} with {base}, {kind} ({base_config.model_type}); "
            f"expected {fitting}. Give --template {fitting}, or leave the flag out."
        )
    if pairs and getattr(base_config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"{base}: its config.json has no decoder_start_token_id; expected one, since every "
            "answer starts with it. Add it to the file (T5's is the pad token's id, 0)."
        )
    if config.chat_template and template != "chat":
        raise UserError(
            f"--chat_template {config.chat_template}: found --template {template}, which does "
            "not use it; expected --template chat. Leave one of the two out."
        )
    if config.t5_compat and not pairs:
        raise UserError(
            f"--t5_compat: {base} is a decoder ({base_config.model_type}); expected a T5. Leave "
            "the flag out."
        )
    return template
