"""An adapter's folder: what it was trained on and how; loads its base model, and both."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from data.encoding.templates import TemplateName, default_template
from data.errors import UserError
from loop.checkpoint.run_folder import SETTINGS
from loop.checkpoint.storage import MANIFEST, list_folders
from loop.distributed.rank_zero import quiet
from loop.model.base import as_user_error
from loop.model.load import DTYPES
from loop.model.new_tokens import grow, set_up
from loop.model.quantization import four_bit, kept_in_fp32, returned_memory


@dataclass(frozen=True)
class Adapter:
    """What lies in a folder; `base` is the folder or hub name of what it was trained on.

    trained: the run's training_config.yaml; empty for an adapter that was made elsewhere.
    hub: cache_dir, where the hub's files are kept, and trust_remote_code.
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
        """Whether the base is an encoder-decoder."""
        return bool(self.base_config.is_encoder_decoder)

    @property
    def quantised_by(self) -> str | None:
        """How the base's own files are quantised, if they are."""
        stored = getattr(self.base_config, "quantization_config", None)
        if not stored:
            return None
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        four = " 4-bit" * bool(stored.get("load_in_4bit"))
        return f"{stored.get('quant_method')}{four}"

    @property
    def dtype(self) -> torch.dtype | str:
        """The precision it was trained in; that of the weights where nothing tells it."""
        return DTYPES[self.trained["mixed_precision"]] if self.trained else "auto"


def read_adapter(folder: Path, base: str | None = None, trust_remote_code: bool = False) -> Adapter:
    """Return what lies in an adapter's folder, on another base where one is given.

    trust_remote_code: of the command line. The folder's own training_config.yaml is not asked: it
    comes from whoever made the adapter.
    Raises UserError where the folder holds no adapter, or code that is not trusted.
    """
    if not (folder / "adapter_config.json").is_file():
        whole = [path for path in list_folders(folder) if (path / MANIFEST).is_file()]
        what = f"Give its newest checkpoint: {whole[0]}" if whole else "Train first: ./launch.sh"
        raise UserError(f"--adapter {folder}: no adapter_config.json there. {what}")
    file = folder / SETTINGS  # An adapter made elsewhere has none.
    trained = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # Never None: transformers would ask on the terminal (5.23, dynamic_module_utils.py).
    hub = {"cache_dir": trained.get("cache_dir"), "trust_remote_code": trust_remote_code}
    with as_user_error(f"--adapter {folder}"):
        name = base or PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
        base_config = AutoConfig.from_pretrained(name, **hub)
        has_tokenizer = (folder / "tokenizer_config.json").is_file()
        tokenizer = AutoTokenizer.from_pretrained(folder if has_tokenizer else name, **hub)
    pairs = base_config.is_encoder_decoder
    template = trained.get("template") or ("t5" if pairs else default_template(tokenizer))
    return Adapter(folder, name, base_config, tokenizer, template, trained, hub)


def load_base(
    adapter: Adapter, source: str, dtype: torch.dtype | str, quantised: torch.dtype | None = None
) -> Any:
    """Return the base model, or what was merged from it, with a row for each of the tokens.

    `quantised`: hold its linear layers in 4 bits, as QLoRA does, and compute them in this dtype.
    """
    quiet()
    options: dict[str, Any] = {}
    if quantised:
        settings = four_bit(quantised)  # makes bitsandbytes ready, too
        if not getattr(adapter.base_config, "quantization_config", None):
            options["quantization_config"] = settings
    loader = AutoModelForSeq2SeqLM if adapter.pairs else AutoModelForCausalLM
    with (
        as_user_error(source),
        returned_memory() if quantised else nullcontext(),
        kept_in_fp32() if quantised else nullcontext(),
    ):
        model = loader.from_pretrained(source, dtype=dtype, **options, **adapter.hub)
    if adapter.pairs:
        grow(model, len(adapter.tokenizer))
    return model


def with_adapter(model: Any, adapter: Adapter) -> PeftModel:
    """Return the model with the adapter, as peft loads it, ready to answer."""
    with as_user_error(f"--adapter {adapter.folder}"):
        loaded = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
    set_up(loaded, None, train=False)
    return loaded
