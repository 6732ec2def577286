"""Keeps other packages' lines that mean nothing here out of a run's, and other ranks silent."""

import importlib
import logging
import os
import sys
import warnings
from typing import Any

import huggingface_hub.utils
from transformers.utils import logging as transformers_logging


def quiet() -> None:
    """Silence what other packages say, here message by message, on other ranks than the first all.

    What goes wrong is raised, never only warned of, and so is told all the same.
    """
    first = is_rank0()
    if not (first and sys.stderr.isatty()):
        transformers_logging.disable_progress_bar()  # It would be redrawn into a file, too.
    if not first:
        huggingface_hub.utils.disable_progress_bars()
        # Every rank runs the same code, so the first one says the same.
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
    # DeepSpeed 0.19 asks every module for every attribute, this deprecated one included.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
    # DeepSpeed 0.19 calls torch.distributed by names that torch 2.13 calls deprecated.
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated")
    # It waits on a barrier without a device, too.
    warnings.filterwarnings("ignore", message=".*using the device under current context")
    # transformers 5.23 has a new name for it, which 5.17 does not know.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing_enable.*")
    logging.getLogger("transformers.modeling_utils").addFilter(_is_meant)


def is_rank0() -> bool:
    """Whether this is the first rank, which alone says what all find."""
    return os.environ.get("RANK", "0") == "0"


def print_rank0(text: str) -> None:
    """Print on the first rank alone; accelerate's own print speaks once a machine (1.15)."""
    if is_rank0():
        print(text, flush=True)


def _is_meant(record: logging.LogRecord) -> bool:
    # transformers 5.23 sets Flan-T5's tie_word_embeddings whatever its weights, and then warns that
    # they are not tied: which is right, and what new_tokens.py reckons with.
    return not record.getMessage().startswith("The tied weights mapping and config for this model")


def quiet_deepspeed(fp16: bool) -> None:
    """Silence what DeepSpeed 0.19 prints on every rank without a GPU, or what is told here, too.

    comm/torch.py, runtime/fp16/loss_scaler.py.
    """
    # Not `import ... as`: the package has PyTorch itself under that name.
    comm: Any = importlib.import_module("deepspeed.comm.torch")
    comm.print = _but_for_builds  # a name of that file alone
    if not fp16:  # where nobody else tells that the loss scale was too large
        logging.getLogger("DeepSpeed").addFilter(_is_no_overflow)


def _is_no_overflow(record: logging.LogRecord) -> bool:
    # A step without an update is told by the run's own line, with its samples (guard.py).
    return "OVERFLOW! Skipping step" not in record.getMessage()


def _but_for_builds(*words: object) -> None:
    # That its communication op was built is no news: where it is not, it raises.
    if not str(words[0]).endswith("built successfully"):
        print(*words)
