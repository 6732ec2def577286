"""Keeps a run's output readable: rank 0 prints, and known noise of other packages is filtered."""

import importlib
import logging
import os
import sys
import warnings
from typing import Any

import huggingface_hub.utils
from transformers.utils import logging as transformers_logging


def is_rank0() -> bool:
    """Return whether this is rank 0, which prints for all ranks."""
    return os.environ.get("RANK", "0") == "0"


def print_rank0(text: str) -> None:
    """Print on rank 0 only; accelerate 1.15's own print prints once per machine."""
    if is_rank0():
        print(text, flush=True)


def quiet() -> None:
    """Filter known messages of other packages on rank 0, and all of them on other ranks.

    Errors are raised, so none is lost.
    """
    first = is_rank0()
    if not (first and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()  # A file would get each redraw of the bar.
    if not first:
        huggingface_hub.utils.disable_progress_bars()
        # Every rank runs the same code, so rank 0 prints the same warnings.
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
    # DeepSpeed 0.19 reads every attribute of every module, this deprecated one included.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # DeepSpeed 0.19 uses names of torch.distributed that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    # DeepSpeed 0.19 also enters a barrier without naming a device.
    warnings.filterwarnings("ignore", message=".*using the device under current context")
    # transformers 5.23 renamed it; 5.17 does not have the new name.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_tied_weights)


def _is_not_tied_weights(record: logging.LogRecord) -> bool:
    # transformers 5.23 sets tie_word_embeddings for every Flan-T5, and then warns that its weights
    # are not tied. They are not, and new_tokens.py expects that.
    return not record.getMessage().startswith("The tied weights mapping and config for this model")


def quiet_deepspeed(fp16: bool) -> None:
    """Filter what DeepSpeed 0.19 prints on every rank without a GPU, and what the loop prints too.

    Sources: comm/torch.py, runtime/fp16/loss_scaler.py.
    """
    # Not `import ... as`: the package has PyTorch itself under that name.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.print = _print_unless_built  # replaces `print` in that file only
    if not fp16:  # In fp16 no other line reports that the loss scale was too large.
        logging.getLogger("DeepSpeed").addFilter(_is_not_overflow)


def _print_unless_built(*words: object) -> None:
    # A communication op that cannot be built raises an error; success needs no line.
    if not str(words[0]).endswith("built successfully"):
        print(*words)


def _is_not_overflow(record: logging.LogRecord) -> bool:
    # The loop prints a line of its own for a skipped step, with its samples (loss_guard.py).
    return "OVERFLOW! Skipping step" not in record.getMessage()
