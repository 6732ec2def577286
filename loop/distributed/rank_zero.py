"""Prints on rank 0 only, and filters known messages of other packages."""

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
    """Filter other packages' known messages on rank 0, and all of their messages on other ranks.

    No error is lost: errors are exceptions.
    """
    first = is_rank0()
    if not (first and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()  # A log file would hold each redraw.
    if not first:
        huggingface_hub.utils.disable_progress_bars()
        # Every rank runs the same code, so rank 0 prints the same warnings.
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
    # DeepSpeed 0.19 reads every attribute of every module, including this deprecated one.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # DeepSpeed 0.19 uses functions of torch.distributed that torch 2.13 deprecates.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    # DeepSpeed 0.19 also enters a barrier without naming a device.
    warnings.filterwarnings("ignore", message=".*using the device under current context")
    # transformers 5.23 deprecates this method; 5.17 does not have the new one.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
    logging.getLogger("transformers.modeling_utils").addFilter(_is_not_tied_weights)


def _is_not_tied_weights(record: logging.LogRecord) -> bool:
    # transformers 5.23 sets tie_word_embeddings for every Flan-T5, and then warns that its weights
    # are not tied. They are not, and new_tokens.py expects that.
    return not record.getMessage().startswith("The tied weights mapping and config for this model")


def quiet_deepspeed(fp16: bool) -> None:
    """Filter two messages of DeepSpeed 0.19: an op was built, a step is skipped.

    Sources: comm/torch.py, runtime/fp16/loss_scaler.py.
    """
    # `import deepspeed.comm.torch as comm` would return PyTorch, an attribute of deepspeed.comm.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.print = _print_unless_built  # replaces `print` in comm/torch.py only
    if not fp16:  # In fp16, no other line reports an overflow of the loss scale.
        logging.getLogger("DeepSpeed").addFilter(_is_not_overflow)


def _print_unless_built(*words: object) -> None:
    # Every rank without a GPU prints this line. A failed build raises an error anyway.
    if not str(words[0]).endswith("built successfully"):
        print(*words)


def _is_not_overflow(record: logging.LogRecord) -> bool:
    # For a skipped step the loop itself prints a line, with the examples' ids (loss_guard.py).
    return "OVERFLOW! Skipping step" not in record.getMessage()
