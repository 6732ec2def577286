"""Reads an adapter's folder, loads its base model, and applies the adapter to it."""

import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoTokenizer

from data.encoding.templates import (
    RenderSettings,
    TemplateName,
    default_template,
    template_arguments,
)
from data.errors import UserError
from loop.checkpoint.run_folder import GENERATION, SETTINGS
from loop.checkpoint.storage import MANIFEST, list_folders
from loop.distributed.rank_zero import quiet
from loop.model.base import as_user_error
from loop.model.dtypes import torch_dtype
from loop.model.load import load_pretrained
from loop.model.new_tokens import grow, set_up


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder and the settings that it was trained with.

    base: the base model's folder or hub name. trained: the run's training_config.yaml; empty for an
    adapter of another trainer. hub: cache_dir and trust_remote_code for transformers.
    """

    folder: Path
    base: str
    base_config: Any
    tokenizer: Any
    template: TemplateName
    trained: dict[str, Any]
    hub: dict[str, Any]

    @property
    def pairs(self) -> bool:
        """Return whether the base is an encoder-decoder."""
        return bool(self.base_config.is_encoder_decoder)

    @property
    def rendering(self) -> RenderSettings:
        """How the run rendered its dialogues."""
        names = ("chat_template_name", "multi_turn", "train_on_reasoning", "train_on_tool_calls")
        known = {name: self.trained[name] for name in names if name in self.trained}
        return RenderSettings(template_arguments(self.trained.get("chat_template_kwargs")), **known)

    @property
    def end_ids(self) -> set[int]:
        """The ids of the tokens that close answers in training; the tokenizer's EOS is one."""
        ends = {self.tokenizer.eos_token_id}
        with suppress(OSError, ValueError):  # Adapters of other trainers have no such file.
            text = (self.folder / GENERATION).read_text(encoding="utf-8")
            ends |= {int(one) for one in json.loads(text)["eos_token_id"]}
        return ends

    @property
    def quantised_by(self) -> str | None:
        """Return the quantisation of the base's own files, if any."""
        stored = getattr(self.base_config, "quantization_config", None)
        if not stored:
            return None
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        four = " 4-bit" * bool(stored.get("load_in_4bit"))
        return f"{stored.get('quant_method')}{four}"

    @property
    def dtype(self) -> torch.dtype | str:
        """Return the dtype of the run's precision; "auto" for adapters of other trainers."""
        return torch_dtype(self.trained["mixed_precision"]) if self.trained else "auto"


def read_adapter(folder: Path, base: str | None = None, trust_remote_code: bool = False) -> Adapter:
    """Return an adapter and its settings; `base` replaces the base model of its folder.

    trust_remote_code: the command line's value. That of the folder's training_config.yaml is
    ignored, since the adapter's author wrote it.
    Raises UserError if the folder holds no adapter, or needs code that is not trusted.
    """
    if not (folder / "adapter_config.json").is_file():
        complete = [path for path in list_folders(folder) if (path / MANIFEST).is_file()]
        remedy = (
            f"Give its newest checkpoint: {complete[0]}" if complete else "Train first: ./launch.sh"
        )
        raise UserError(f"--adapter {folder}: found no adapter_config.json. {remedy}")
    file = folder / SETTINGS  # Adapters of other trainers have none.
    trained = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # With trusted code, the adapter's cache_dir is ignored: it could hold other code than the hub.
    # trust_remote_code must not be None, for which transformers prompts on the terminal (5.23,
    # dynamic_module_utils.py).
    cache_dir = None if trust_remote_code else trained.get("cache_dir")
    hub = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    with as_user_error(f"--adapter {folder}"):
        name = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        base_config = AutoConfig.from_pretrained(name, **hub)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else name, **hub)
    pairs = base_config.is_encoder_decoder
    template = trained.get("template") or ("t5" if pairs else default_template(tokenizer))
    return Adapter(folder, name, base_config, tokenizer, template, trained, hub)


def load_base(
    adapter: Adapter,
    source: str,
    dtype: torch.dtype | str,
    compute_dtype: torch.dtype | None = None,
) -> Any:
    """Return the model in `source`, the base or a merged model, with a row for each token.

    compute_dtype: dtype that QLoRA's 4-bit layers compute in; None: no layer is quantised here.
    """
    quiet()
    model, _ = load_pretrained(source, adapter.base_config, dtype, compute_dtype, **adapter.hub)
    if adapter.pairs:
        grow(model, len(adapter.tokenizer))
    return model


def with_adapter(model: Any, adapter: Adapter) -> PeftModel:
    """Return the model with the adapter, loaded by peft, in evaluation mode."""
    with as_user_error(f"--adapter {adapter.folder}"):
        loaded = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
    set_up(loaded, None, train=False)
    return loaded
